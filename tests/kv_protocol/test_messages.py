import struct
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kv_protocol import messages
from kv_protocol.digests import RunningDigest
from kv_protocol.errors import FrameTooLarge, IncompatibleVersion, MalformedFrame, ProtocolError
from kv_protocol.identity import GroupGeometry, Identity
from kv_protocol.messages import (
    Admitted,
    Bye,
    Call,
    Cleared,
    Digest,
    FrameDecoder,
    Heartbeat,
    Hello,
    Open,
    Removed,
    Reply,
    Snapshot,
    SnapshotEnd,
    Stored,
    TierInfo,
    check_version,
    encode,
    pack,
    unpack,
)

IDENTITY = Identity("revision", "bfloat16", "LBNHC", (GroupGeometry("full_attention", 16, 8192, 4),))
EVERY_MESSAGE: list[messages.Message] = [
    Open(token="secret", reader="router"),
    Hello("epoch", "model", 256, 16, IDENTITY, [TierInfo("gpu", 100, 1 << 20), TierInfo("cpu", 5, 1, 2.5, 3.5)]),
    Snapshot("gpu", b"a" * 32),
    SnapshotEnd(),
    Stored("cpu", b"b" * 16),
    Removed("cpu", b"b" * 16),
    Cleared("gpu"),
    Admitted("request", 1000, {"gpu": 256, "cpu": 512}),
    Heartbeat(1, 2, 3, 0.5, 1234.5, {"gpu": 4}, {"cpu": 1e9}),
    Digest({"gpu": RunningDigest().take()}),
    Call(7, "lookup", {"chunks": [b"x" * 16]}),
    Reply(7, {"gpu": [True, False]}),
    Bye("enough"),
]


def _frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def test_the_list_above_has_every_message() -> None:
    assert {type(each) for each in EVERY_MESSAGE} == set(messages.Message.__args__)  # type: ignore[attr-defined]


@given(st.lists(st.sampled_from(EVERY_MESSAGE), max_size=8), st.data())
def test_any_cut_of_a_stream_gives_the_same_messages(sent: list[messages.Message], data: st.DataObject) -> None:
    stream = b"".join(encode(each) for each in sent)
    decoder, received = FrameDecoder(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        received += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert received == sent


def test_unknown_fields_and_unknown_types_are_passed_over() -> None:
    known = msgspec.msgpack.encode({"type": "cleared", "tier": "gpu", "since": "a later minor version"})
    unknown = msgspec.msgpack.encode({"type": "promoted", "tier": 5})
    received = list(FrameDecoder().feed(_frame(unknown) + _frame(known) + _frame(unknown) + encode(Bye("x"))))
    assert received == [Cleared("gpu"), Bye("x")]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"tier": "gpu"}),
        msgspec.msgpack.encode({"type": "cleared"}),
        msgspec.msgpack.encode({"type": "cleared", "tier": 5}),
        msgspec.msgpack.encode({"type": 5}),
        msgspec.msgpack.encode({"type": "stored", "tier": "gpu", "chunks": [1]}),
        b"\x81\xa4type\xa4\xff\xff\xff\xff",
        b"\x91" * 100_000,
        msgspec.msgpack.encode(Bye("x")) + b"rest",
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_a_payload_that_is_no_message_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedFrame):
        list(FrameDecoder().feed(_frame(payload)))


@settings(max_examples=1000)
@given(st.binary(max_size=200))
@example(b"\xff\xff\xff\xff")
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    decoder = FrameDecoder(limit=1000)
    try:
        for _ in decoder.feed(data):
            pass
    except ProtocolError:
        pass
    assert len(decoder._buffer) <= 1004


@given(st.sampled_from(EVERY_MESSAGE), st.data())
def test_a_flipped_byte_never_raises_anything_else(message: messages.Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        list(FrameDecoder().feed(bytes(frame)))


def test_messages_before_a_malformed_one_are_not_lost() -> None:
    received = FrameDecoder().feed(encode(Cleared("gpu")) + _frame(b"\xc1"))
    assert next(received) == Cleared("gpu")
    with pytest.raises(MalformedFrame):
        next(received)


def test_a_huge_length_is_refused_at_once_and_holds_nothing() -> None:
    decoder = FrameDecoder(limit=1 << 20)
    with pytest.raises(FrameTooLarge, match="frame of 1048577 bytes exceeds the limit of 1048576"):
        list(decoder.feed(struct.pack("<I", (1 << 20) + 1)))
    assert list(FrameDecoder(limit=1 << 20).feed(struct.pack("<I", 1 << 20))) == []


def test_a_message_too_large_for_a_frame_is_not_sent() -> None:
    with pytest.raises(FrameTooLarge, match="Stored of"):
        encode(Stored("cpu", bytes(messages.MAX_FRAME_BYTES)))


def test_a_whole_snapshot_frame_fits() -> None:
    assert len(encode(Snapshot("remote", bytes(16 * messages.SNAPSHOT_CHUNKS)))) < messages.MAX_FRAME_BYTES


@pytest.mark.parametrize("message", [Open(), EVERY_MESSAGE[1]])
def test_versions(message: Any) -> None:
    check_version(msgspec.structs.replace(message, minor=99))
    with pytest.raises(IncompatibleVersion, match=r"speaks report protocol 2\.0, this side 1\.0: run the same major"):
        check_version(msgspec.structs.replace(message, major=2))


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20))
def test_packed_hashes_come_back(chunks: list[bytes]) -> None:
    assert unpack(pack(chunks)) == chunks


def test_half_a_hash_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="17 bytes are no whole number of 16-byte"):
        unpack(b"x" * 17)
