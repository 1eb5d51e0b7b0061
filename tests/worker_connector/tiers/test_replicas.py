"""Objects on several stores: dead, slow and forgetful members, and stores that are added."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers.scripted import ScriptedStore
from tests.worker_connector.tiers.servers import RedisServer, eventually, needs_redis, payload, running, soon
from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import Outcome, Sink, Source, Status, Store, failed, pages
from worker_connector.tiers.breaker import Pauses
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.redis import RedisSettings, RedisStore
from worker_connector.tiers.replicas import Replicas

LIMITS = Limits(timeout=0.5, threads=4, waiting=64, pauses=Pauses(first=0.05, longest=0.2))
KEYS = [f"k{at}" for at in range(60)]


class Group:
    def __init__(self, names: str, copies: int = 2, hedge: float = 5.0, **more: object) -> None:
        self.inner = {name: ScriptedStore(name) for name in names}
        self.copies, self.hedge, self.more = copies, hedge, more
        self.store = self.join(names)

    def join(self, names: str) -> Replicas:
        members: list[Store] = [Guarded(self.inner.setdefault(name, ScriptedStore(name)), LIMITS) for name in names]
        return Replicas(members, self.copies, hedge=self.hedge, **self.more)  # type: ignore[arg-type]

    def home(self, key: str) -> list[str]:
        return [self.store.members[at].name for at in self.store._placement.order(key)]

    def holders(self, key: str) -> set[str]:
        return {name for name, inner in self.inner.items() if key in inner.held}


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    made: list[Group] = []
    yield made
    for group in made:
        for inner in group.inner.values():
            inner.release()
        group.store.close()


def make(groups: list[Group], names: str = "abc", copies: int = 2, hedge: float = 5.0, **more: object) -> Group:
    groups.append(Group(names, copies, hedge, **more))
    return groups[-1]


def value(key: str) -> bytes:
    return key.encode() * 10


def put_all(store: Store) -> list[Outcome]:
    return store.put(KEYS, [Source(value(key)) for key in KEYS], soon())


def wrong(store: Store, keys: list[str] = KEYS, seconds: float = 5.0) -> list[str]:
    """The keys that a get does not find, or finds wrong."""
    rooms = [bytearray(64) for _ in keys]
    outcomes = store.get(keys, [Sink(room) for room in rooms], soon(seconds))
    pairs = zip(keys, outcomes, rooms, strict=True)
    for key, outcome, room in zip(keys, outcomes, rooms, strict=True):
        assert not outcome.ok or bytes(room[: outcome.size]) == value(key)
    return [key for key, outcome, _ in pairs if not outcome.ok]


def test_each_object_lies_on_its_stores(groups: list[Group]) -> None:
    group = make(groups, "abcd")
    outcomes = put_all(group.store)
    for key, outcome in zip(KEYS, outcomes, strict=True):
        assert group.holders(key) == set(group.home(key)[:2])
        assert (outcome.status, outcome.size, outcome.cause) == (Status.STORED, len(value(key)), "")
        assert set(outcome.reason.split(", ")) == group.holders(key)
    assert not wrong(group.store)
    assert all(len(group.inner[name].held) > 15 for name in "abcd")
    asked = sum(inner.calls.count("get") for inner in group.inner.values())
    assert asked <= 4, "one batch for each store"


def test_a_dead_member_loses_nothing_and_costs_nothing_after_its_first_failure(groups: list[Group]) -> None:
    group = make(groups)
    put_all(group.store)
    group.inner["a"].error = StoreUnavailable("a", "unreachable", "gone")
    assert not wrong(group.store)
    began = time.monotonic()
    for _ in range(20):
        assert not wrong(group.store)
    assert time.monotonic() - began < 8
    assert [each.status for each in group.store.exists(KEYS, soon())] == [Status.FOUND] * 60
    fresh = [f"fresh{at}" for at in range(40)]
    outcomes = group.store.put(fresh, [Source(value(key)) for key in fresh], soon())
    assert {each.status for each in outcomes} == {Status.STORED}
    assert {each.cause for each in outcomes} == {"", "partial"}
    assert all("a" not in each.reason for each in outcomes)


def test_what_a_dead_member_missed_is_put_back_when_it_serves_again(groups: list[Group]) -> None:
    group = make(groups)
    group.inner["a"].error = StoreUnavailable("a", "unreachable", "gone")
    put_all(group.store)
    group.inner["a"].error = None
    eventually(lambda: [each.state for each in group.store.members] != ["open"])  # type: ignore[attr-defined]
    mine = [key for key in KEYS if group.home(key)[0] == "a"]
    eventually(lambda: not wrong(group.store, mine) and all("a" in group.holders(key) for key in mine))
    assert group.store.figures["repairs"] >= len(mine)


def test_a_copy_that_is_not_good_is_not_spread(groups: list[Group]) -> None:
    group = make(groups, verify=lambda _key, data: bytes(data[:1]) == b"k")
    put_all(group.store)
    mine = [key for key in KEYS if group.home(key)[0] == "a"][:2]
    for key in mine:
        del group.inner["a"].held[key]
    bad = group.home(mine[0])[1]
    group.inner[bad].held[mine[0]] = b"spoilt"
    rooms = [bytearray(64), bytearray(64)]
    group.store.get(mine, [Sink(room) for room in rooms], soon())
    eventually(lambda: mine[1] in group.inner["a"].held)
    assert mine[0] not in group.inner["a"].held


def test_a_bad_copy_is_discarded_where_it_came_from(groups: list[Group]) -> None:
    group = make(groups)
    put_all(group.store)
    key = KEYS[0]
    first, second = group.home(key)[:2]
    group.inner[first].held[key] = b"spoilt"
    assert group.store.get([key], [Sink(bytearray(64))], soon())[0].size == 6
    assert group.store.discard([key], "checksum", soon())[0].ok
    assert group.holders(key) == {second}
    assert not wrong(group.store, [key])
    assert group.store.discard(["never met"], "checksum", soon())[0].status is Status.MISSING


def test_a_slow_member_is_overtaken_and_cannot_write_any_more(groups: list[Group]) -> None:
    group = make(groups, hedge=0.05)
    put_all(group.store)
    group.inner["a"].hang()
    rooms = [bytearray(64) for _ in KEYS]
    began = time.monotonic()
    outcomes = group.store.get(KEYS, [Sink(room) for room in rooms], soon())
    assert time.monotonic() - began < 5
    assert all(each.ok for each in outcomes)
    kept = [bytes(room) for room in rooms]
    assert [room.rstrip(b"\0") for room in kept] == [value(key) for key in KEYS]
    for room in rooms:
        room[:] = b"\xff" * 64
    group.inner["a"].release()
    time.sleep(0.1)
    assert all(bytes(room) == b"\xff" * 64 for room in rooms)
    assert group.store.figures["hedges"] == 1


def test_who_was_overtaken_does_not_write_while_others_are_waited_for(groups: list[Group]) -> None:
    group = make(groups, hedge=0.05)
    mine = next(key for key in KEYS if group.home(key)[0] == "a")
    slow = next(key for key in KEYS if group.home(key)[0] == "b")
    group.store.put([mine, slow], [Source(value(mine)), Source(value(slow))], soon())
    for inner in group.inner.values():
        plain = inner._get

        def late(key: str, sink: Sink, plain: Callable[[str, Sink], Outcome] = plain) -> Outcome:
            if key == slow:
                time.sleep(0.5)
            return plain(key, sink)

        inner._get = late  # type: ignore[method-assign]
    group.inner["a"].hang()
    rooms = [bytearray(64), bytearray(64)]
    getter = threading.Thread(target=wait_for, args=(group.store, [mine, slow], rooms))
    getter.start()
    time.sleep(0.2)
    group.inner["a"].held[mine] = b"X" * 64
    group.inner["a"].release()
    getter.join(30)
    assert bytes(rooms[0]).rstrip(b"\0") == value(mine)


def wait_for(store: Store, keys: list[str], rooms: list[bytearray]) -> None:
    store.get(keys, [Sink(room) for room in rooms], soon())


def test_what_is_deleted_while_it_is_repaired_stays_deleted(groups: list[Group]) -> None:
    reading, go = threading.Event(), threading.Event()

    def verify(_key: str, _data: memoryview) -> bool:
        reading.set()
        return go.wait(30)

    group = make(groups, "ab", verify=verify)
    put_all(group.store)
    key = KEYS[0]
    del group.inner[group.home(key)[0]].held[key]
    assert not wrong(group.store, [key])
    assert reading.wait(30)
    assert group.store.delete([key], soon())[0].ok
    go.set()
    eventually(lambda: not group.store._repairing and not group.store._repairs._queue)
    group.store._repairs.wait(group.store._repairs.submit(lambda: None), soon())
    assert not group.holders(key)


def test_all_dead_is_one_error_and_missing_is_not_failed(groups: list[Group]) -> None:
    group = make(groups)
    assert {each.status for each in group.store.exists(KEYS, soon())} == {Status.MISSING}
    assert len(wrong(group.store)) == 60
    for inner in group.inner.values():
        inner.error = StoreUnavailable(inner.name, "unreachable", "gone")
    for call in (lambda: wrong(group.store), lambda: put_all(group.store), lambda: group.store.ping(soon())):
        with pytest.raises(StoreUnavailable):
            call()
    with pytest.raises(StoreUnavailable):
        list(pages(group.store, threading.Event(), 1.0))


def test_missing_with_a_dead_home_is_a_failure(groups: list[Group]) -> None:
    """Whether an object is gone is not known while one of its stores does not answer."""
    group = make(groups, "abcd", copies=1)
    put_all(group.store)
    group.inner["a"].error = StoreUnavailable("a", "unreachable", "gone")
    rooms = [Sink(bytearray(64)) for _ in KEYS]
    outcomes = group.store.get(KEYS, rooms, soon())
    for key, outcome in zip(KEYS, outcomes, strict=True):
        assert outcome.status is (Status.FAILED if group.home(key)[0] == "a" else Status.FOUND)


def test_an_added_store_takes_its_share_and_nothing_is_lost(groups: list[Group]) -> None:
    group = make(groups, "abc", copies=2)
    put_all(group.store)
    grown = group.join("abcd")
    assert not wrong(grown)
    moved = [key for key in KEYS if 3 in grown._placement.order(key)[:2]]
    assert 15 < len(moved) < 45  # half of them: two of four stores
    firsts = [key for key in KEYS if grown._placement.order(key)[0] == 3]
    eventually(lambda: set(firsts) <= set(group.inner["d"].held))
    assert set(group.inner["d"].held) <= set(moved)
    grown.close()


def test_deletes_and_scans_reach_every_store(groups: list[Group]) -> None:
    group = make(groups)
    put_all(group.store)
    met = [entry.key for page in pages(group.store, threading.Event(), 5.0, 7) for entry in page.entries]
    assert sorted(set(met)) == sorted(KEYS)
    assert len(met) == 2 * len(KEYS)
    group.inner["b"].error = StoreUnavailable("b", "unreachable", "gone")
    met = [entry.key for page in pages(group.store, threading.Event(), 5.0, 7) for entry in page.entries]
    assert sorted(set(met)) == sorted(KEYS)
    group.inner["b"].error = None
    eventually(lambda: all(each.ok for each in put_all(group.store)) and group.store.members[1].state == "closed")  # type: ignore[attr-defined]
    assert {each.status for each in group.store.delete(KEYS, soon())} == {Status.DELETED}
    assert not any(inner.held for inner in group.inner.values())
    with pytest.raises(StoreUnavailable, match="cursor"):
        group.store.scan("7 0 x", soon())


def test_members_that_fail_for_some_keys_are_made_up_for(groups: list[Group]) -> None:
    group = make(groups)
    put_all(group.store)
    group.inner["a"]._get = lambda _key, _sink: failed("io", "the disk fails")  # type: ignore[method-assign]
    assert not wrong(group.store)


def test_a_full_store_does_not_keep_others_from_taking(groups: list[Group]) -> None:
    group = make(groups)
    for inner in group.inner.values():
        inner.full = True
    assert {each.status for each in put_all(group.store)} == {Status.REFUSED}
    group.inner["a"].full = False
    outcomes = put_all(group.store)
    assert {each.status for each in outcomes} == {Status.STORED, Status.REFUSED}
    assert not wrong(group.store, [key for key, each in zip(KEYS, outcomes, strict=True) if each.ok])


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="replicas is 3, but 2 stores are given"):
        Replicas([ScriptedStore("a"), ScriptedStore("b")], 3)
    with pytest.raises(ConfigurationError, match="given twice"):
        Replicas([ScriptedStore("a"), ScriptedStore("a")], 2)


def test_random_faults_never_give_wrong_bytes_or_hang(groups: list[Group]) -> None:
    group = make(groups, "abcd", hedge=0.02)
    put_all(group.store)
    stop = threading.Event()

    def disturb() -> None:
        at = 0
        while not stop.wait(0.01):
            at += 1
            inner = group.inner["abcd"[at % 4]]
            if at % 3 == 0:
                inner.error = StoreUnavailable(inner.name, "unreachable", "gone")
            elif at % 3 == 1:
                inner.hang()
            for other in group.inner.values():
                if other is not inner:
                    other.error = None
                    other.release()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    enough, latest = time.monotonic() + 2.0, time.monotonic() + 60
    found = 0
    while time.monotonic() < enough or (found <= 1000 and time.monotonic() < latest):
        began = time.monotonic()
        with contextlib.suppress(StoreUnavailable):
            found += len(KEYS) - len(wrong(group.store, seconds=1.0))
        assert time.monotonic() - began < 8
    stop.set()
    disturber.join(30)
    assert found > 1000


@needs_redis
def test_one_of_two_redis_servers_dead(tmp_path: Path) -> None:
    servers = [RedisServer(tmp_path / str(at)).start() for at in range(2)]
    settings = [RedisSettings(addresses=(("127.0.0.1", server.port),)) for server in servers]
    store = Replicas([Guarded(RedisStore(each), LIMITS) for each in settings], 2)
    data = payload(2 << 20)
    with running(*servers):
        assert store.put(["k"], [Source(data)], soon())[0].cause == ""
        servers[0].kill()
        for _ in range(20):
            room = bytearray(2 << 20)
            assert store.get(["k"], [Sink(room)], soon())[0].ok
            assert room == data
        servers[0].start()
        eventually(lambda: _holds(store, data))
        servers[1].kill()
        room = bytearray(2 << 20)
        eventually(lambda: store.get(["k"], [Sink(room)], soon())[0].ok)
        assert room == data
    store.close()


def _holds(store: Replicas, data: bytes) -> bool:
    """Every member has taken the object."""
    try:
        return all(member.put(["k"], [Source(data)], soon())[0].ok for member in store.members)
    except StoreUnavailable:
        return False
