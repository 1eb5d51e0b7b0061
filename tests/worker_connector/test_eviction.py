"""Every policy against a plain re-telling of its algorithm that shares no code with it."""

import random
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker_connector.eviction import (
    POLICIES,
    EvictionPolicy,
    Expiring,
    Expiry,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Prioritised,
)
from worker_connector.eviction.ring import Ring


class Plain(Protocol):
    """A reference: ``items`` may be evicted, ``held`` may not. O(n) wherever that is simpler."""

    def come(self, chunk: int) -> None: ...
    def use(self, chunk: int) -> None: ...
    def renew(self, chunk: int) -> None: ...
    def hold(self, chunk: int) -> None: ...
    def release(self, chunk: int) -> None: ...
    def go(self, chunk: int, evicted: bool, /) -> None: ...
    def victim(self) -> int | None: ...


class PlainQueue:
    """FIFO, and with ``by_use`` LRU."""

    by_use = False

    def __init__(self) -> None:
        self.items: list[int] = []

    def come(self, chunk: int) -> None:
        self.items.append(chunk)

    def renew(self, chunk: int) -> None:
        if chunk in self.items:
            self.items.remove(chunk)
            self.items.append(chunk)

    def use(self, chunk: int) -> None:
        if self.by_use:
            self.renew(chunk)

    def hold(self, chunk: int) -> None:
        self.items.remove(chunk)

    def release(self, chunk: int) -> None:
        self.items.append(chunk)

    def go(self, chunk: int, _evicted: bool) -> None:
        if chunk in self.items:
            self.items.remove(chunk)

    def victim(self) -> int | None:
        return self.items[0] if self.items else None


class PlainRecency(PlainQueue):
    by_use = True


class PlainFrequency(PlainQueue):
    """Every chunk with [rank, uses, time]; the victim is the least of (rank, time)."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.free: set[int] = set()
        self.age = self.time = 0

    def come(self, chunk: int) -> None:
        self.time += 1
        self.rows[chunk] = [self.age + 1, 1, self.time]
        self.free.add(chunk)

    def renew(self, chunk: int) -> None:
        self.time += 1
        if chunk in self.free:
            self.rows[chunk][2] = self.time

    def use(self, chunk: int) -> None:
        self.time += 1
        uses = self.rows[chunk][1] + 1
        self.rows[chunk] = [self.age + uses, uses, self.time]

    def hold(self, chunk: int) -> None:
        self.free.remove(chunk)

    def release(self, chunk: int) -> None:
        self.free.add(chunk)
        self.renew(chunk)

    def go(self, chunk: int, evicted: bool) -> None:
        row = self.rows.pop(chunk)
        self.free.discard(chunk)
        if evicted:
            self.age = row[0]

    def victim(self) -> int | None:
        return min(self.free, key=lambda chunk: (self.rows[chunk][0], self.rows[chunk][2]), default=None)


class PlainArc:
    """One list of (name, queue), oldest first, where queue is T1, T2, B1 or B2; held chunks are in a list of their own."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.held: list[tuple[int, str]] = []
        self.p, self.c = 0.0, 0

    def of(self, *queues: str) -> list[tuple[int, str]]:
        return [row for row in self.rows if row[1] in queues]

    def trim(self) -> None:
        while self.of("B1") and len(self.of("T1", "B1")) > self.c:
            self.rows.remove(self.of("B1")[0])
        while len(self.of("B1", "B2")) > self.c:
            self.rows.remove((self.of("B2") or self.of("B1"))[0])

    def come(self, chunk: int) -> None:
        b1, b2 = len(self.of("B1")), len(self.of("B2"))
        if (chunk, "B1") in self.rows:
            self.p = min(self.c, self.p + max(b2 / b1, 1))
            self.rows.remove((chunk, "B1"))
            self.rows.append((chunk, "T2"))
        elif (chunk, "B2") in self.rows:
            self.p = max(0, self.p - max(b1 / b2, 1))
            self.rows.remove((chunk, "B2"))
            self.rows.append((chunk, "T2"))
        else:
            self.rows.append((chunk, "T1"))
        self.trim()

    def find(self, chunk: int) -> tuple[int, str] | None:
        return next((row for row in self.of("T1", "T2") if row[0] == chunk), None)

    def renew(self, chunk: int) -> None:
        if row := self.find(chunk):
            self.rows.remove(row)
            self.rows.append(row)

    def use(self, chunk: int) -> None:
        if row := self.find(chunk):
            self.rows.remove(row)
            self.rows.append((chunk, "T2"))
        else:
            self.held = [(name, "T2" if name == chunk else queue) for name, queue in self.held]

    def hold(self, chunk: int) -> None:
        row = self.find(chunk)
        assert row
        self.rows.remove(row)
        self.held.append(row)

    def release(self, chunk: int) -> None:
        row = next(row for row in self.held if row[0] == chunk)
        self.held.remove(row)
        self.rows.append(row)

    def go(self, chunk: int, evicted: bool) -> None:
        if row := self.find(chunk):
            if evicted:
                self.c = len(self.of("T1", "T2")) + len(self.held)
                self.rows.append((chunk, row[1].replace("T", "B")))
            self.rows.remove(row)
            self.trim()
        self.held = [row for row in self.held if row[0] != chunk]

    def victim(self) -> int | None:
        t1, t2 = self.of("T1"), self.of("T2")
        wanted = (t1 or t2) if len(t1) > self.p else (t2 or t1)
        return wanted[0][0] if wanted else None


class PlainSieve:
    """``items`` from the oldest; ``hand`` is the chunk it points at."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.used: set[int] = set()
        self.hand: int | None = None

    def after(self, chunk: int) -> int | None:
        rest = self.items[self.items.index(chunk) + 1 :]
        return rest[0] if rest else None

    def take(self, chunk: int) -> None:
        if self.hand == chunk:
            self.hand = self.after(chunk)
        self.items.remove(chunk)

    def come(self, chunk: int) -> None:
        self.items.append(chunk)

    def use(self, chunk: int) -> None:
        self.used.add(chunk)

    def renew(self, chunk: int) -> None:
        if chunk in self.items:
            self.take(chunk)
            self.items.append(chunk)

    hold = take
    release = come

    def go(self, chunk: int, _evicted: bool) -> None:
        if chunk in self.items:
            self.take(chunk)
        self.used.discard(chunk)

    def victim(self) -> int | None:
        if not self.items:
            return None
        chunk = self.items[0] if self.hand is None else self.hand
        while chunk in self.used:
            self.used.remove(chunk)
            following = self.after(chunk)
            chunk = self.items[0] if following is None else following
        self.hand = chunk
        return chunk


class PlainS3:
    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.uses: dict[int, int] = {}
        self.held: dict[int, str] = {}

    def come(self, chunk: int) -> None:
        self.uses[chunk] = 0
        if chunk in self.ghosts:
            self.ghosts.remove(chunk)
            self.main.append(chunk)
        else:
            self.small.append(chunk)

    def use(self, chunk: int) -> None:
        self.uses[chunk] = min(3, self.uses[chunk] + 1)

    def renew(self, chunk: int) -> None:
        for queue in (self.small, self.main):
            if chunk in queue:
                queue.remove(chunk)
                queue.append(chunk)

    def hold(self, chunk: int) -> None:
        self.held[chunk] = "small" if chunk in self.small else "main"
        getattr(self, self.held[chunk]).remove(chunk)

    def release(self, chunk: int) -> None:
        getattr(self, self.held.pop(chunk)).append(chunk)

    def go(self, chunk: int, evicted: bool) -> None:
        self.held.pop(chunk, None)
        del self.uses[chunk]
        if chunk in self.main:
            self.main.remove(chunk)
        if chunk in self.small:
            self.small.remove(chunk)
            if evicted:
                self.ghosts.append(chunk)
                self.ghosts = self.ghosts[-max(1, len(self.main)) :]

    def victim(self) -> int | None:
        while self.small or self.main:
            total = len(self.small) + len(self.main)
            if self.small and (len(self.small) >= total / 10 or not self.main):
                chunk = self.small[0]
                if self.uses[chunk] < 2:
                    return chunk
                self.small.remove(chunk)
                self.main.append(chunk)
                self.uses[chunk] = 0
            else:
                chunk = self.main[0]
                if not self.uses[chunk]:
                    return chunk
                self.main.remove(chunk)
                self.main.append(chunk)
                self.uses[chunk] -= 1
        return None


PLAIN: dict[str, Callable[[], Any]] = {
    "fifo": PlainQueue,
    "lru": PlainRecency,
    "lfu": PlainFrequency,
    "arc": PlainArc,
    "sieve": PlainSieve,
    "s3fifo": PlainS3,
}


def name(chunk: int) -> bytes:
    return chunk.to_bytes(2, "little")


class Comparison:
    """A policy and its reference, called alike. ``victims`` counts the evictions that a full tier asked for."""

    def __init__(self, policy: str, capacity: int, chunks: int, rng: random.Random) -> None:
        self.policy: EvictionPolicy = POLICIES[policy]()
        self.plain: Plain = PLAIN[policy]()
        self.capacity, self.chunks, self.rng = capacity, chunks, rng
        self.resident: set[int] = set()
        self.held: set[int] = set()
        self.victims = 0

    def run(self, steps: int) -> "Comparison":
        for _ in range(steps):
            chunk = min(int(self.rng.paretovariate(0.7)), self.chunks)
            if chunk in self.resident:
                self.act(chunk, self.rng.random())
            elif len(self.resident) < self.capacity or self.evict():
                self.policy.add(name(chunk))
                self.plain.come(chunk)
                self.resident.add(chunk)
            self.policy.check()
        return self

    def named(self) -> int | None:
        victim, expected = self.policy.victim(), self.plain.victim()
        assert victim == (None if expected is None else name(expected))
        assert self.policy.victim() == victim, "asked again, it names another"
        return expected

    def evict(self) -> bool:
        victim = self.named()
        if victim is None:
            return False
        self.victims += 1
        self.drop(victim, evicted=True)
        return True

    def drop(self, chunk: int, *, evicted: bool) -> None:
        self.policy.discard(name(chunk))
        self.plain.go(chunk, evicted)
        self.resident.remove(chunk)
        self.held.discard(chunk)

    def act(self, chunk: int, action: float) -> None:
        if action < 0.6:
            self.policy.touch(name(chunk))
            self.plain.use(chunk)
        elif action < 0.7:
            self.policy.refresh(name(chunk))
            self.plain.renew(chunk)
        elif action < 0.8 and chunk not in self.held:
            self.policy.hold(name(chunk))
            self.plain.hold(chunk)
            self.held.add(chunk)
        elif action < 0.97 and self.held:
            self.release(self.rng.choice(sorted(self.held)))
        elif action >= 0.97 and self.named() != chunk:
            self.drop(chunk, evicted=False)

    def release(self, chunk: int) -> None:
        self.policy.release(name(chunk))
        self.plain.release(chunk)
        self.held.remove(chunk)


@pytest.mark.parametrize("policy", PLAIN)
@pytest.mark.parametrize("seed", range(3))
def test_against_the_reference(policy: str, seed: int) -> None:
    rng = random.Random(f"{policy} {seed}")
    capacity = rng.choice([2, 10, 40])
    assert Comparison(policy, capacity, 120, rng).run(3000).victims > 100


@pytest.mark.parametrize("policy", PLAIN)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 8), chunks=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_against_the_reference_on_few_chunks(policy: str, seed: int, capacity: int, chunks: int) -> None:
    Comparison(policy, capacity, chunks, random.Random(seed)).run(150)


def test_every_named_policy_has_a_reference() -> None:
    assert POLICIES.keys() == PLAIN.keys()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_policy_has_no_victim_and_ignores_strangers(policy: str) -> None:
    made: EvictionPolicy = POLICIES[policy]()
    assert made.victim() is None
    for call in (made.touch, made.refresh, made.hold, made.release, made.discard):
        call(b"?")
        made.check()
    assert made.victim() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_held_chunks_are_never_victims(policy: str) -> None:
    made: EvictionPolicy = POLICIES[policy]()
    for chunk in range(20):
        made.add(name(chunk))
    for chunk in range(20):
        made.hold(name(chunk))
        made.hold(name(chunk))
        made.touch(name(chunk))
        made.add(name(chunk))
    assert made.victim() is None
    made.release(name(7))
    assert made.victim() == name(7)
    made.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tail_of_a_prompt_goes_before_its_head(policy: str) -> None:
    """Chunks of a prompt come from last to first, in two batches, as a prompt computed in two steps is saved."""
    made: EvictionPolicy = POLICIES[policy]()
    for chunk in (1, 0):
        made.add(name(chunk))
    for chunk in (3, 2):
        made.add(name(chunk))
    for chunk in (1, 0):
        made.refresh(name(chunk))
    order = []
    while (victim := made.victim()) is not None:
        order.append(victim)
        made.discard(victim)
    assert order == [name(chunk) for chunk in (3, 2, 1, 0)]


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"fifo", "lru"}))
def test_a_scan_spares_what_is_used_again(policy: str) -> None:
    made: EvictionPolicy = POLICIES[policy]()
    loved = {name(chunk) for chunk in range(50)}
    resident = set(loved)
    for chunk in loved:
        made.add(chunk)
    for _ in range(12):
        for chunk in loved:
            made.touch(chunk)
    for newcomer in range(1000, 1100):
        if len(resident) >= 60:
            victim = made.victim()
            assert victim
            made.discard(victim)
            resident.remove(victim)
        made.add(name(newcomer))
        resident.add(name(newcomer))
    assert len(loved & resident) >= 45


def test_lfu_forgets_old_fame() -> None:
    made = LeastFrequentlyUsed()
    made.add(b"famous")
    for _ in range(20):
        made.touch(b"famous")
    gone = 0
    for chunk in range(200):
        made.add(name(chunk))
        made.touch(name(chunk))
        victim = made.victim()
        assert victim
        made.discard(victim)
        gone += victim == b"famous"
    assert gone == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_remembered_is_bounded(policy: str) -> None:
    made: Any = POLICIES[policy]()
    for chunk in range(5000):
        made.add(name(chunk))
        if chunk >= 100:
            victim = made.victim()
            assert victim
            made.discard(victim)
    sizes = [len(value) for value in vars(made).values() if hasattr(value, "__len__")]
    assert sum(sizes) <= 400


def test_expired_chunks_go_first_and_held_ones_stay() -> None:
    now = [100.0]
    made = Expiring(LeastRecentlyUsed(), lambda: now[0])
    for chunk in (b"a", b"b", b"c"):
        made.add(chunk)
    made.expire(b"b", 110)
    made.expire(b"c", 105)
    assert made.victim() == b"a"
    now[0] = 111
    assert made.expired(10) == [b"c", b"b"]
    made.hold(b"c")
    made.expire(b"c", 108)
    assert made.victim() == b"b"
    made.discard(b"b")
    assert made.victim() == b"a"
    made.release(b"c")
    assert made.victim() == b"c"
    made.check()


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.floats(0, 20))), max_size=60), st.floats(0, 25))
def test_expiry_against_a_plain_table(calls: list[tuple[int, float | None]], now: float) -> None:
    expiry = Expiry()
    table: dict[int, float] = {}
    for chunk, at in calls:
        if at is None:
            expiry.discard(name(chunk))
            table.pop(chunk, None)
        else:
            expiry.set(name(chunk), at)
            table[chunk] = at
        expiry.check()
    due = expiry.due(now, 100)
    assert set(due) == {name(chunk) for chunk, at in table.items() if -(-at // 1) <= now}
    assert expiry.due(now, 2) == due[:2]
    assert len(expiry) == len(table)


@given(st.lists(st.tuples(st.sampled_from(["append", "renew", "remove"]), st.integers(0, 8)), max_size=80))
def test_ring_against_a_list(calls: list[tuple[str, int]]) -> None:
    ring, plain = Ring(), []
    for call, number in calls:
        chunk = name(number)
        if call == "append" and chunk not in plain:
            ring.append(chunk)
            plain.append(chunk)
        elif call == "renew" and chunk in plain:
            ring.renew(ring.places[chunk])
            plain.remove(chunk)
            plain.append(chunk)
        elif call == "remove" and chunk in plain:
            ring.remove(chunk)
            plain.remove(chunk)
        ring.check()
        assert list(ring) == plain


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "touch", "set", "hold", "release", "discard"]),
            st.integers(0, 7),
            st.integers(-1, 1),
        ),
        max_size=80,
    )
)
def test_priorities_against_a_plain_queue(calls: list[tuple[str, int, int]]) -> None:
    made = Prioritised(LeastRecentlyUsed)
    queue: list[int] = []  # everything that is not held, the first to go first, whatever its priority
    holding: set[int] = set()
    levels: dict[int, int] = {}
    for call, number, level in calls:
        known = number in levels
        if call == "add" and not known:
            made.add(name(number))
            queue.append(number)
            levels[number] = 0
        elif call == "set" and known:
            made.set(name(number), level, held=number in holding)
            if level != levels[number] and number not in holding:
                queue.remove(number)
                queue.append(number)
            levels[number] = level
        elif call == "hold" and number in queue:
            made.hold(name(number))
            queue.remove(number)
            holding.add(number)
        elif call in ("touch", "release") and number in (queue if call == "touch" else holding):
            getattr(made, call)(name(number))
            holding.discard(number)
            queue = [each for each in queue if each != number] + [number]
        elif call == "discard" and known:
            made.discard(name(number))
            queue = [each for each in queue if each != number]
            holding.discard(number)
            del levels[number]
        made.check()
        first = min(queue, key=lambda each: levels[each], default=None)
        assert made.victim() == (None if first is None else name(first))
        assert all(made.level(name(each)) == level for each, level in levels.items())


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(moves=st.lists(st.tuples(st.sampled_from(["add", "touch", "hold", "release", "discard"]), st.integers(0, 12))))
@example(moves=[("hold", 1), ("add", 1), ("hold", 1), ("add", 0)])
@settings(max_examples=60, deadline=None)
def test_order_names_every_chunk_once_and_the_victim_early(name: str, moves: list[tuple[str, int]]) -> None:
    for policy in (POLICIES[name](), Prioritised(POLICIES[name]), Expiring(POLICIES[name]())):
        held, there = set[bytes](), set[bytes]()
        for move, number in moves:
            chunk = bytes([number])
            getattr(policy, move)(chunk)
            there = there | {chunk} if move == "add" else there - {chunk} if move == "discard" else there
            if move == "hold":
                held |= {chunk} & there
            elif move in ("release", "discard"):
                held.discard(chunk)
        order = policy.order()
        assert len(order) == len(set(order))
        assert set(order) == there
        assert set(order[len(order) - len(held) :]) == held, "held chunks are the last"
