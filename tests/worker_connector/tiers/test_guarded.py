"""What a store that fails, hangs or answers late costs, and that nothing is written into memory taken back."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers.scripted import ScriptedStore
from tests.worker_connector.tiers.servers import Proxy, RedisServer, command, eventually, needs_redis, payload, soon
from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import MISSING, LoanEnded, Sink, Source, Status, failed
from worker_connector.tiers.breaker import Pauses
from worker_connector.tiers.filesystem import DirectorySettings, DirectoryStore
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.redis import RedisSettings, RedisStore

LIMITS = Limits(timeout=0.3, threads=2, waiting=4, pauses=Pauses(first=0.05, longest=0.2))


@pytest.fixture
def inner() -> Iterator[ScriptedStore]:
    store = ScriptedStore()
    yield store
    store.release()


@pytest.fixture
def store(inner: ScriptedStore) -> Iterator[Guarded]:
    guarded = Guarded(inner, LIMITS)
    yield guarded
    guarded.close()


def cause(call: object) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        call()  # type: ignore[operator]
    return caught.value.cause


def get(store: Guarded, key: str = "k", room: bytearray | None = None, seconds: float = 5.0) -> Status:
    return store.get([key], [Sink(room if room is not None else bytearray(8))], soon(seconds))[0].status


def test_a_well_store_is_passed_through(store: Guarded) -> None:
    assert store.put(["k", "l"], [Source(b"ab", b"cd"), Source(b"x")], soon())[0].size == 4
    room = bytearray(8)
    assert get(store, room=room) is Status.FOUND
    assert room == b"abcd\0\0\0\0"
    assert [each.status for each in store.exists(["k", "no"], soon())] == [Status.FOUND, Status.MISSING]
    assert [entry.key for entry in store.scan("", soon()).entries] == ["k", "l"]
    assert store.discard(["k"], "it is bad", soon())[0].ok
    assert store.delete(["l"], soon())[0].ok
    store.ping(soon())
    assert store.get([], [], soon()) == []
    tallies = store.tallies()
    assert (tallies["put"].calls, tallies["put"].ok, tallies["put"].bytes) == (1, 2, 5)
    assert (tallies["get"].ok, tallies["get"].bytes) == (1, 4)
    assert (tallies["exists"].ok, tallies["exists"].missing, tallies["exists"].bytes) == (1, 1, 0)
    assert tallies["ping"].ok == 1
    assert all(tally.seconds > 0 and tally.failed == 0 for tally in tallies.values())


def test_a_hung_store_costs_one_deadline_and_not_one_for_each_request(inner: ScriptedStore, store: Guarded) -> None:
    inner.hang()
    began = time.monotonic()
    assert cause(lambda: get(store)) == "timeout"
    assert 0.25 < time.monotonic() - began < 5
    began = time.monotonic()
    for _ in range(200):
        assert cause(lambda: get(store)) == "paused"
    assert time.monotonic() - began < 8, "each has waited"
    assert store.state == "open"
    inner.release()
    inner.held["k"] = b"back"
    eventually(lambda: store.state == "trial")
    assert get(store) is Status.FOUND
    assert store.state == "closed"
    eventually(lambda: store.hung == 0)
    assert store.late >= 1


def test_requests_side_by_side_wait_no_longer_than_one(inner: ScriptedStore, store: Guarded) -> None:
    inner.hang()
    causes: list[str] = []
    users = [threading.Thread(target=lambda: causes.append(cause(lambda: get(store)))) for _ in range(12)]
    began = time.monotonic()
    for user in users:
        user.start()
    for user in users:
        user.join(30)
    assert time.monotonic() - began < 3, "one has waited after the other"
    assert set(causes) <= {"timeout", "busy", "paused"}
    assert "timeout" in causes
    assert threading.active_count() < 30


def test_a_late_answer_never_reaches_memory_that_was_taken_back(inner: ScriptedStore, store: Guarded) -> None:
    inner.held["k"] = b"LATELATE"
    slot = bytearray(b"--------")
    inner.hang()
    assert cause(lambda: get(store, room=slot)) == "timeout"
    slot[:] = b"occupied"  # by another chunk
    inner.release()
    eventually(lambda: store.late)
    assert bytes(slot) == b"occupied"
    assert isinstance(inner.late_errors[0], LoanEnded)


def test_a_late_put_never_reads_memory_that_was_taken_back(inner: ScriptedStore, store: Guarded) -> None:
    slot = bytearray(b"mine")
    inner.hang()
    assert cause(lambda: store.put(["k"], [Source(slot)], soon())) == "timeout"
    slot[:] = b"else"
    inner.release()
    eventually(lambda: store.late)
    assert "k" not in inner.held


def test_late_writers_under_stress_never_spoil_a_slot(inner: ScriptedStore) -> None:
    """Slots are reused at once after each call, whatever its end, while the store answers around the deadline."""
    limits = Limits(timeout=0.004, threads=4, waiting=64, pauses=Pauses(first=0.0005, longest=0.001))
    store = Guarded(inner, limits)
    inner.held = {f"k{at}": bytes([at]) * 200_000 for at in range(8)}
    plain = inner._get

    def slow(key: str, sink: Sink) -> object:
        time.sleep(0.0005 * (hash(key) % 12))
        return plain(key, sink)

    inner._get = slow  # type: ignore[method-assign,assignment]
    spoilt: list[str] = []
    ends: set[str] = set()

    def use(slot: bytearray, number: int) -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            key = f"k{number}"
            try:
                ends.add(outcome := store.get([key], [Sink(slot)], soon())[0].status.value)
            except StoreUnavailable as error:
                ends.add(outcome := error.cause)
            if outcome == "found" and bytes(slot) != inner.held[key]:
                spoilt.append("found, but not what was stored")
            slot[:] = b"\xff" * len(slot)
            time.sleep(0.001)
            if bytes(slot) != b"\xff" * len(slot):
                spoilt.append(f"written after the call had ended ({outcome})")

    users = [threading.Thread(target=use, args=(bytearray(200_000), number)) for number in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join(20)
    assert not spoilt
    assert {"found", "timeout"} <= ends
    store.close()


def test_what_came_whole_before_the_deadline_is_kept(inner: ScriptedStore, store: Guarded) -> None:
    inner.held = {"a": b"aaaa", "b": b"bbbb"}
    plain = inner._get

    def stuck_at_b(key: str, sink: Sink) -> object:
        if key == "b":
            inner.hang()
            inner._enter("b")
        return plain(key, sink)

    inner._get = stuck_at_b  # type: ignore[method-assign,assignment]
    rooms = [bytearray(4), bytearray(4)]
    outcomes = store.get(["a", "b"], [Sink(room) for room in rooms], soon())
    assert [each.status for each in outcomes] == [Status.FOUND, Status.FAILED]
    assert outcomes[1].cause == "timeout"
    assert rooms[0] == b"aaaa"
    assert store.state == "open"


def test_impatient_callers_do_not_close_a_well_store(inner: ScriptedStore, store: Guarded) -> None:
    inner.hang()
    assert cause(lambda: get(store, seconds=0.01)) == "timeout"
    assert store.state == "closed"
    for _ in range(8):
        cause(lambda: get(store, seconds=0.01))
    assert store.state == "open", "but several in a row tell of trouble"


def test_refusals_and_misses_do_not_open_it(
    inner: ScriptedStore, store: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    inner.full = True
    with caplog.at_level(logging.INFO, "vllm.warmroute.store"):
        for _ in range(20):
            assert store.put(["k"], [Source(b"x")], soon())[0].status is Status.REFUSED
            assert get(store) is Status.MISSING
    assert store.state == "closed"
    assert [record.message for record in caplog.records] == ["scripted does not take objects: it is full"]
    assert store.tallies()["put"].refused == 20


def test_several_calls_that_fail_as_a_whole_open_it(inner: ScriptedStore, store: Guarded) -> None:
    inner._get = lambda _key, _sink: failed("io", "the disk fails")  # type: ignore[method-assign]
    for _ in range(5):
        assert get(store) is Status.FAILED
    assert store.state == "open"
    assert cause(lambda: get(store)) == "paused"


def test_it_serves_again_also_where_no_thread_could_be_had_to_find_out(
    inner: ScriptedStore, store: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def none_to_spare(thread: threading.Thread) -> None:
        if "probe" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    inner.error = ConnectionError("away")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_to_spare)
        with pytest.raises(StoreUnavailable):
            store.exists(["k"], soon())
    inner.error = None
    assert store.exists(["k"], soon()) == [MISSING]
    assert store.state == "closed"


def test_the_log_names_cause_and_recovery_once(
    inner: ScriptedStore, store: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    inner.error = StoreUnavailable("scripted", "auth", "the password is wrong: check it")
    with caplog.at_level(logging.INFO, "vllm.warmroute.store"):
        for _ in range(50):
            assert cause(lambda: get(store)) in ("auth", "paused")
            time.sleep(0.002)
        inner.error = None
        eventually(lambda: store.state == "trial")
        assert get(store) is Status.MISSING
    assert [record.message.split(". ")[0] for record in caplog.records] == [
        "scripted: the password is wrong: check it",
        "scripted serves again",
    ]


def test_another_cause_while_it_is_left_alone_is_said_too(
    inner: ScriptedStore, store: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    inner.error = StoreUnavailable("scripted", "unreachable", "it cannot be reached")
    with caplog.at_level(logging.WARNING, "vllm.warmroute.store"):
        cause(lambda: get(store))
        inner.error = StoreUnavailable("scripted", "auth", "the password is wrong")
        eventually(lambda: len(caplog.records) == 2)
    assert "the password is wrong" in caplog.records[1].message


def test_an_error_that_nobody_foresaw_is_one_of_the_store(inner: ScriptedStore, store: Guarded) -> None:
    inner.error = ZeroDivisionError("with a secret inside")
    with pytest.raises(StoreUnavailable, match="ZeroDivisionError in its client") as caught:
        get(store)
    assert "secret" not in str(caught.value)
    assert store.state == "open"


def test_a_closed_store_says_so_and_leaves_no_thread(inner: ScriptedStore) -> None:
    store = Guarded(inner, LIMITS)
    inner.error = StoreUnavailable("scripted", "unreachable", "gone")
    cause(lambda: get(store))
    store.close()
    assert cause(lambda: get(store)) == "closed"
    eventually(lambda: not [each for each in threading.enumerate() if "scripted" in each.name])


def test_a_file_system_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A FIFO that nobody writes to hangs its reader as a mount without its server does."""
    directory = DirectoryStore(DirectorySettings(path=tmp_path))
    store = Guarded(directory, LIMITS)
    directory.put(["k"], [Source(b"x")], soon())
    path = directory._path("k")
    path.unlink()
    os.mkfifo(path)
    slot = bytearray(b"--")
    began = time.monotonic()
    assert cause(lambda: get(store, room=slot)) == "timeout"
    assert time.monotonic() - began < 5
    assert store.hung == 1
    path.write_bytes(b"")  # lets the hung open return
    eventually(lambda: store.hung == 0)
    assert slot == b"--"
    store.close()


@needs_redis
def test_redis_killed_stopped_and_cut_off_comes_back_by_itself(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    proxy = Proxy(server.port)
    data = payload(4 << 20)
    store = Guarded(RedisStore(RedisSettings(addresses=(("127.0.0.1", proxy.port),))), LIMITS)

    def works() -> bool:
        room = bytearray(4 << 20)
        try:
            return store.put(["k"], [Source(data)], soon())[0].ok and (
                store.get(["k"], [Sink(room)], soon())[0].ok and bytes(room) == data
            )
        except StoreUnavailable:
            return False

    def is_left_alone() -> None:
        began = time.monotonic()
        refusals = 0
        while store.state != "open":
            assert not works()
            assert time.monotonic() - began < 20
        for _ in range(100):
            refusals += not works()
        assert refusals >= 90

    try:
        eventually(works)
        server.signal(signal.SIGSTOP)
        is_left_alone()
        server.signal(signal.SIGCONT)
        eventually(works)
        server.kill()
        is_left_alone()
        server.start()
        eventually(works)
        proxy.mode = "swallow"
        is_left_alone()
        proxy.mode = "pass"
        eventually(works)
        command(server.port, "CONFIG", "SET", "requirepass", "later")
        command_with_password = RedisStore(RedisSettings(addresses=(("127.0.0.1", server.port),), password="later"))
        eventually(works)  # connections that are logged in stay so
        command_with_password.close()
    finally:
        store.close()
        proxy.close()
        server.kill()
