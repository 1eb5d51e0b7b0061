"""The wire against a peer that sends what it wants, in pieces of any size."""

import socket
import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

redis_exceptions = pytest.importorskip("redis.exceptions", reason="redis-py is not installed")

from worker_connector.errors import StoreUnavailable  # noqa: E402 - after what may be missing
from worker_connector.tiers.base import Outcome, Sink, Status  # noqa: E402
from worker_connector.tiers.redis_link import Refusal, Wire, unavailable  # noqa: E402


class Peer:
    """A wire whose other end sends ``data`` in the given pieces, then closes."""

    def __init__(self, data: bytes, cuts: Sequence[int] = (), *, close: bool = True) -> None:
        ours, self.theirs = socket.socketpair()
        self.wire = Wire()
        self.wire.on_connect(type("Connection", (), {"_sock": ours})())
        self.wire.deadline = time.monotonic() + 5
        self.ours = ours
        edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        pieces = [data[start:end] for start, end in pairwise(edges) if end > start]
        self.sender = threading.Thread(target=self._send, args=(pieces, close))
        self.sender.start()

    def _send(self, pieces: list[bytes], close: bool) -> None:
        for piece in pieces:
            try:
                self.theirs.sendall(piece)
            except OSError:
                break
            time.sleep(0.0005)
        if close:
            self.theirs.close()

    def __enter__(self) -> Wire:
        return self.wire

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.sender.join(30)
        self.theirs.close()


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


@settings(max_examples=60, deadline=None)
@given(
    objects=st.lists(st.one_of(st.none(), st.binary(max_size=3000)), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 20_000), max_size=6),
    parts=st.lists(st.integers(1, 900), min_size=1, max_size=4),
)
def test_replies_in_any_pieces_land_whole(objects: list[bytes | None], cuts: list[int], parts: list[int]) -> None:
    stream = b"".join(b"$-1\r\n" if each is None else bulk(each) for each in objects) + b":7\r\n"
    with Peer(stream, cuts) as wire:
        for each in objects:
            rooms = [bytearray(size) for size in parts]
            outcome = wire.land(Sink(*rooms))
            if each is None:
                assert outcome is None
            elif len(each) > sum(parts):
                assert isinstance(outcome, Outcome)
                assert (outcome.status, outcome.cause) == (Status.FAILED, "size")
            else:
                assert outcome == Outcome(Status.FOUND, len(each))
                assert b"".join(rooms).startswith(each)
        assert wire.read_response() == 7


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_bytes_that_are_no_replies_are_errors_and_nothing_else(data: bytes, landing: bool) -> None:
    with Peer(data) as wire, pytest.raises((redis_exceptions.RedisError, OSError)) as caught:
        read_to_the_end(wire, landing=landing)
    assert isinstance(unavailable("store", caught.value), StoreUnavailable)


def read_to_the_end(wire: Wire, *, landing: bool) -> None:
    while True:
        wire.land(Sink(bytearray(64))) if landing else wire.read_response()


@pytest.mark.parametrize(
    "data",
    [b"$x\r\n", b"$-5\r\n", b"$99999999999999999999999\r\n", b"*1000000000\r\n", b"HTTP/1.1 400 Bad Request\r\n",
     b"\x15\x03\x01\x00\x02\x02\x46\r\n", b"a" * 100_000, b"$3\r\nabcde\r\n"],
)  # fmt: skip
@pytest.mark.parametrize("landing", [True, False])
def test_what_is_not_redis_is_told_apart(data: bytes, landing: bool) -> None:
    with Peer(data) as wire, pytest.raises(redis_exceptions.InvalidResponse) as caught:
        wire.land(Sink(bytearray(64))) if landing else wire.read_response()
    assert unavailable("store", caught.value).cause == "protocol"


def test_refusals_are_answers() -> None:
    with Peer(b"-OOM no memory\r\n-ERR \xff\r\n") as wire:
        first = wire.land(Sink(bytearray(4)))
        assert isinstance(first, Refusal)
        assert (first.code, first.text) == ("OOM", "no memory")
        assert isinstance(wire.read_response(), Refusal)


def test_a_peer_that_is_silent_costs_the_deadline() -> None:
    with Peer(b"$1000\r\nabc", close=False) as wire:
        wire.deadline = time.monotonic() + 0.2
        began = time.monotonic()
        with pytest.raises((TimeoutError, redis_exceptions.TimeoutError)):
            wire.land(Sink(bytearray(1000)))
        assert 0.1 < time.monotonic() - began < 8
