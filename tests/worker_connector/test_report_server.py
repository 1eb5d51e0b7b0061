import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_protocol.messages import (
    SNAPSHOT_CHUNKS,
    Bye,
    Call,
    Digest,
    Heartbeat,
    Hello,
    Message,
    Open,
    Reply,
    Snapshot,
    SnapshotEnd,
    Stored,
    encode,
    pack,
)
from tests.worker_connector.reports import FAST, HELLO, Reader, Source, serving
from worker_connector.errors import ConfigurationError, ReportUnavailable
from worker_connector.report_server import CLIENT_FRAME_BYTES, ReportServer


def test_a_reader_gets_hello_a_snapshot_then_changes_heartbeats_and_digests() -> None:
    source = Source(chunks=10)
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        kinds = [type(each) for each in reader.messages[:4]]
        assert kinds == [Hello, Snapshot, Snapshot, SnapshotEnd]
        assert reader.messages[0] == HELLO
        source.change()
        reader.until_equal(source)
        assert reader.until(Heartbeat).held_chunks == {"gpu": 10, "cpu": 10} or len(source.tiers["gpu"]) != 10
        reader.until(Digest)


def test_a_large_snapshot_is_split_and_an_empty_tier_is_named() -> None:
    source = Source(chunks=SNAPSHOT_CHUNKS + 5)
    source.tiers["cpu"].clear()
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        parts = [(each.tier, len(each.chunks) // 16) for each in reader.messages if isinstance(each, Snapshot)]
        assert parts == [("gpu", SNAPSHOT_CHUNKS), ("gpu", 5), ("cpu", 0)]
        assert reader.content == {"gpu": set(source.tiers["gpu"]), "cpu": set()}


def test_a_large_change_is_split() -> None:
    source = Source()
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        source.store("cpu", 2 * SNAPSHOT_CHUNKS + 1)
        reader.until_equal(source)
        assert max(len(each.chunks) for each in reader.messages if isinstance(each, Stored)) == 16 * SNAPSHOT_CHUNKS


def test_a_late_reader_and_one_that_comes_back_see_the_same() -> None:
    source = Source(seed=1)
    with serving(source) as server:
        for _ in range(300):
            source.change()
        for _ in range(3):
            with Reader(server) as reader:
                reader.until(SnapshotEnd)
                for _ in range(50):
                    source.change()
                reader.until_equal(source)
            source.change()


def test_changes_that_nobody_published_reach_readers_with_the_next_heartbeat() -> None:
    source = Source(seed=2)
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        source.change(publish=False)
        reader.until_equal(source)


def test_snapshot_and_changes_equal_the_source_at_random_times_under_mutation() -> None:
    """Engine thread mutating at full speed, readers coming and going; the readers' views are strict about gaps."""
    source, stop = Source(seed=3, chunks=200), threading.Event()
    chance = random.Random(4)

    def mutate() -> None:
        while not stop.is_set():
            source.change(publish=source.random.random() < 0.7)
            time.sleep(source.random.random() * 0.0005)

    with serving(source, timing=msgspec.structs.replace(FAST, heartbeat=0.03, digest=0.05)) as server:
        engine = threading.Thread(target=mutate)
        engine.start()
        try:
            views = [Reader(server) for _ in range(3)]
            deadline = time.monotonic() + 4
            checks = relists = 0
            while time.monotonic() < deadline:
                for view in views:
                    view.pump()
                if chance.random() < 0.02:
                    gone = views.pop(chance.randrange(3))
                    gone.connection.close()
                    checks += gone.digests
                    relists += 1
                    views.append(Reader(server))
            stop.set()
            engine.join()
            for view in views:
                view.until(SnapshotEnd)
                view.until_equal(source)
                checks += view.digests
                view.connection.close()
        finally:
            stop.set()
            engine.join()
        assert checks > 20, "hardly a digest was compared"
        assert relists > 5, "hardly a reader came back"
        assert server.dropped_readers == 0


def test_two_readers_see_identical_streams() -> None:
    source = Source(seed=5)
    with serving(source) as server, Reader(server) as one, Reader(server) as two:
        for reader in (one, two):
            reader.until(SnapshotEnd)
        for _ in range(500):
            source.change()
        last = Stored("cpu", b"z" * 16)
        with source.lock:
            source.tiers["cpu"][b"z" * 16] = None
            source.publish([last])
        streams = []
        for reader in (one, two):
            while last not in reader.messages:
                reader.pump()
            changes = [each for each in reader.messages if not isinstance(each, Heartbeat | Digest | Hello | Snapshot)]
            streams.append([encode(each) for each in changes[: changes.index(last) + 1]])
        assert streams[0] == streams[1]
        assert len(streams[0]) == 502


def test_publishing_costs_the_engine_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    source = Source(seed=6)
    with serving(source) as server:
        batch: list[Message] = [Stored("cpu", os.urandom(16 * 20))]
        without = _time_publish(server, source, batch)
        readers = [Reader(server) for _ in range(3)]
        for reader in readers:
            reader.until(SnapshotEnd)
            reader._apply = lambda _: None  # type: ignore[method-assign]  # the same chunks again and again
        stop = threading.Event()
        threads = [threading.Thread(target=_drain, args=(reader, stop)) for reader in readers]
        for thread in threads:
            thread.start()
        with_readers = _time_publish(server, source, batch, pause=0.0005)
        stop.set()
        for thread, reader in zip(threads, readers, strict=True):
            thread.join()
            reader.connection.close()
    with capsys.disabled():
        print(
            f"\npublish of 20 chunks, median / p99: {median(without) * 1e6:.1f} / {_p99(without) * 1e6:.1f} µs without "
            f"readers, {median(with_readers) * 1e6:.1f} / {_p99(with_readers) * 1e6:.1f} µs with 3 readers"
        )
    assert median(without) < 20e-6
    assert median(with_readers) < 200e-6


def test_a_reader_that_stops_reading_is_dropped_with_bounded_memory_and_may_list_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, bound = Source(seed=7), 1 << 20
    with serving(source, queue_bytes=bound) as server, Reader(server) as good, Reader(server, receive_buffer=4096):
        good.until(SnapshotEnd)
        while server.readers < 2:
            time.sleep(0.01)
        published, most_queued, times = 0, 0, []
        deadline = time.monotonic() + 120
        while not server.dropped_readers and time.monotonic() < deadline:
            with source.lock:
                chunks = [source.random.randbytes(16) for _ in range(2000)]
                source.tiers["cpu"].update(dict.fromkeys(chunks))
                began = time.perf_counter()
                server.publish([Stored("cpu", pack(chunks))])
                times.append(time.perf_counter() - began)
            published += 32_000
            most_queued = max([most_queued, *(client._queued_bytes for client in list(server._clients))])
            good.pump()
        assert server.dropped_readers == 1
        assert most_queued <= bound
        good.until_equal(source)
        _wait(lambda: server.readers == 1)
        with Reader(server) as again:
            again.until(SnapshotEnd)
            again.until_equal(source)
            assert (server.readers, server.dropped_readers, server.relists) == (2, 1, 3)
    with capsys.disabled():
        print(
            f"\na stuck reader was dropped after {published >> 10} KiB, at most {most_queued >> 10} KiB of them queued "
            f"(bound {bound >> 10} KiB); publish took {median(times) * 1e6:.0f} µs in the median, {max(times) * 1e6:.0f} at most"
        )
    assert median(times) < 0.05, "publishing waits for a reader"


def test_a_starved_server_thread_drops_readers_instead_of_growing() -> None:
    source = Source(seed=8)
    with serving(source, queue_bytes=1 << 20) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        source.lock.acquire()
        release = threading.Event()
        server._loop.call_soon_threadsafe(release.wait, 5)  # type: ignore[union-attr]
        time.sleep(0.05)
        for _ in range(100):
            server.publish([Stored("cpu", bytes(16 * 4000))])
        assert sum(weight for weight, _ in server._published) <= 1 << 20
        source.lock.release()
        release.set()
        assert all(not isinstance(each, Stored) for each in reader.until_closed())
        assert server.dropped_readers == 1
        with Reader(server) as again:
            again.until(SnapshotEnd)
            source.change()
            again.until_equal(source)


def test_a_reader_that_stalls_within_a_large_snapshot_is_dropped() -> None:
    source = Source(chunks=300_000)
    timing = msgspec.structs.replace(FAST, write=0.5)
    with serving(source, timing=timing) as server, Reader(server, receive_buffer=4096):
        deadline = time.monotonic() + 10
        while not server.dropped_readers:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# ---- refusals --------------------------------------------------------------------------------------------------------


def _bye(server: ReportServer, opening: bytes) -> str:
    with Reader(server, opening=opening) as reader:
        messages = reader.until_closed()
    assert len(messages) == 1
    assert isinstance(messages[0], Bye)
    return messages[0].reason


def _frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


@pytest.fixture(scope="module")
def server() -> Iterator[ReportServer]:
    with serving(Source(seed=9, chunks=3), token="right") as running:
        yield running


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (encode(Open(token="wrong")), "wrong token: set the worker's report_token"),
        (encode(Open()), "wrong token"),
        (encode(Open(token="rightly")), "wrong token"),
        (encode(Open(major=2, token="right")), "report protocol 2.0, this side 1.0"),
        (encode(Call(1, "stats")), "the first message must be open, not call"),
        (_frame(b"\xc1"), "not a report message"),
        (_frame(b""), "not a report message"),
        (struct.pack("<I", 0xFFFFFFFF), "exceeds the limit of 1048576: is this a report port?"),
        (struct.pack("<I", CLIENT_FRAME_BYTES + 1), "exceeds the limit"),
        (b"GET /metrics HTTP/1.1\r\nHost: worker\r\n\r\n", "exceeds the limit"),
        (b"\x16\x03\x01\x02\x00", "exceeds the limit"),
        (b"", "a deadline passed"),
        (b"\x05\x00", "a deadline passed"),
    ],
    ids=str,
)
def test_what_is_no_opening_is_refused_with_a_reason(server: ReportServer, opening: bytes, reason: str) -> None:
    assert reason in _bye(server, opening)


def test_messages_out_of_place_end_the_connection(server: ReportServer) -> None:
    with Reader(server, token="right") as reader:
        reader.until(SnapshotEnd)
        reader.send(SnapshotEnd())
        assert "after open only call is understood, not snapshotend" in reader.until(Bye).reason


def test_ten_thousand_random_inputs_never_stop_the_server(server: ReportServer) -> None:
    @settings(max_examples=10_000, deadline=None, database=None)
    @given(
        st.one_of(
            st.binary(max_size=64),
            st.binary(max_size=64).map(_frame),
            st.tuples(
                st.sampled_from([encode(Open(token="right")), encode(Open(watch=False, token="right"))]),
                st.binary(max_size=64),
            ).map(b"".join),
            st.dictionaries(
                st.text(max_size=6), st.integers() | st.text(max_size=6) | st.binary(max_size=6), max_size=4
            )
            .filter(lambda each: all(-(2**63) <= v < 2**64 for v in each.values() if isinstance(v, int)))
            .map(msgspec.msgpack.encode)
            .map(_frame),
        )
    )
    def attack(data: bytes) -> None:
        with socket.create_connection(server.address, timeout=5) as connection:
            connection.sendall(data)

    attack()
    with Reader(server, token="right") as reader:
        reader.until(SnapshotEnd)
    deadline = time.monotonic() + 10
    while server._clients:
        assert time.monotonic() < deadline, "connections are left behind"
        time.sleep(0.05)


def test_a_half_open_connection_is_given_up() -> None:
    source = Source(seed=10)
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        (client,) = server._clients
        connection = client._writer.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        # A peer that resets, as a vanished one does in the end.
        reader.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader.connection.close()
        deadline = time.monotonic() + 5
        while server.readers:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_at_most_so_many_readers() -> None:
    with serving(Source(), max_readers=2) as server, Reader(server) as one, Reader(server, watch=False) as two:
        one.until(SnapshotEnd)
        two.until(Hello)
        assert "takes 2 readers at most: set report_max_readers" in _bye(server, encode(Open()))
        one.connection.close()
        deadline = time.monotonic() + 5
        while len(server._clients) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with Reader(server) as third:
            third.until(SnapshotEnd)


def test_connections_that_are_not_opened_keep_nobody_out() -> None:
    with serving(Source(), max_readers=3) as server:
        strangers = [socket.create_connection(server.address, timeout=5) for _ in range(8)]
        with Reader(server) as reader:
            reader.until(SnapshotEnd)
        assert len(server._clients) <= 1 + server.max_readers
        for stranger in strangers:
            stranger.close()


def test_a_connection_that_neither_watches_nor_calls_is_closed() -> None:
    timing = msgspec.structs.replace(FAST, idle=0.2)
    with serving(Source(), timing=timing) as server, Reader(server, watch=False) as reader:
        assert "deadline" in reader.until(Bye).reason


# ---- calls -----------------------------------------------------------------------------------------------------------


def _operations() -> dict[str, Any]:
    def fail(_: dict[str, Any]) -> None:
        raise ValueError("no chunk is called that")

    return {
        "echo": lambda arguments: arguments,
        "fail": fail,
        "hang": lambda _: time.sleep(30),
        "odd": lambda _: object(),
        "huge": lambda _: bytes(20 << 20),
    }


@pytest.mark.parametrize("watch", [True, False])
def test_calls_are_answered_by_id(watch: bool) -> None:
    with serving(Source(), operations=_operations()) as server, Reader(server, watch=watch) as reader:
        reader.send(Call(5, "echo", {"a": [1, b"x"]}))
        reader.send(Call(6, "fail"))
        reader.send(Call(7, "nothing"))
        reader.send(Call(8, "odd"))
        reader.send(Call(9, "huge"))
        while len(replies := [each for each in reader.messages if isinstance(each, Reply)]) < 5:
            assert reader.pump() or not reader.closed
        assert replies[0] == Reply(5, {"a": [1, b"x"]})
        assert replies[1] == Reply(6, error="fail: no chunk is called that")
        assert replies[2].error == "unknown operation 'nothing'; available: echo, fail, hang, huge, odd"
        assert "cannot be sent" in replies[3].error
        assert "does not fit a frame" in replies[4].error


def test_an_operation_that_hangs_is_given_up_and_stops_neither_reports_nor_the_end() -> None:
    timing = msgspec.structs.replace(FAST, operation=0.3)
    source = Source(seed=11)
    began = time.monotonic()
    with serving(source, operations=_operations(), timing=timing) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        reader.send(Call(1, "hang"))
        source.change()
        reader.until_equal(source)
        assert reader.until(Reply).error == "hang took longer than 0.3 s"
    assert time.monotonic() - began < 5


def test_what_an_operation_changes_is_reported_before_its_answer() -> None:
    source = Source(chunks=5)

    def clear(_: dict[str, Any]) -> int:
        with source.lock:
            source.tiers["cpu"].clear()
            from kv_protocol.messages import Cleared

            source.unpublished.append(Cleared("cpu"))
        return 5

    with serving(source, operations={"clear": clear}) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        reader.send(Call(1, "clear"))
        reader.until(Reply)
        assert reader.content["cpu"] == set()


def test_a_heartbeat_that_fails_does_not_end_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    source = Source(seed=12)
    with serving(source) as server, Reader(server) as reader:
        source.fail_heartbeat = True
        reader.until(SnapshotEnd)
        while "no heartbeat today" not in caplog.text:
            time.sleep(0.05)
        source.fail_heartbeat = False
        source.change()
        reader.until_equal(source)
        reader.until(Heartbeat)


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"])
def test_other_addresses_than_loopback_need_a_token(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no report_token: set report_token .* or bind 127\.0\.0\.1"):
        ReportServer(host, 0, "", HELLO, Source(), {})
    ReportServer(host, 0, "secret", HELLO, Source(), {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1"])
def test_loopback_needs_none(host: str) -> None:
    with serving(Source(), host=host) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)


def test_a_taken_port_is_an_error_or_another_port(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Source()) as first:
        port = first.address[1]
        with pytest.raises(ReportUnavailable, match=f"report port {port} on 127.0.0.1 cannot be bound"):
            ReportServer("127.0.0.1", port, "", HELLO, Source(), {}).start()
        with caplog.at_level(logging.WARNING), serving(Source(), port=port, ephemeral_if_busy=True) as second:
            assert second.address[1] != port
            with Reader(second) as reader:
                reader.until(SnapshotEnd)
        assert caplog.text.count(f"Report port {port} is taken") == 1


def test_closing_says_goodbye_and_is_quick() -> None:
    source = Source()
    with serving(source) as server, Reader(server) as reader:
        reader.until(SnapshotEnd)
        began = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - began < 8
        assert reader.until(Bye).reason == "the worker is shutting down"
        assert not server.readers
        source.change()  # an engine that goes on publishing is not disturbed


def _wait(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _time_publish(server: ReportServer, source: Source, batch: list[Message], pause: float = 0.0) -> list[float]:
    times = []
    for _ in range(2000):
        with source.lock:
            began = time.perf_counter()
            server.publish(batch)
            times.append(time.perf_counter() - began)
        if pause:
            time.sleep(pause)
    return times


def _drain(reader: Reader, stop: threading.Event) -> None:
    while not stop.is_set() and not reader.closed:
        reader.pump()


def _p99(times: list[float]) -> float:
    return quantiles(times, n=100)[98]
