import random
import time
from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_protocol.digests import RunningDigest
from kv_protocol.messages import Cleared, Removed, Stored, unpack
from worker_connector.eviction import HIGH, LOW, NORMAL, POLICIES, LeastRecentlyUsed, Prioritised
from worker_connector.ledger import CPU, GPU, Change, Ledger, Slot, SlotState


def chunk(number: int) -> bytes:
    return sha256(str(number).encode()).digest()[:16]


def make(slots: int) -> Ledger:
    ledger = Ledger(LeastRecentlyUsed())
    ledger.set_capacity(slots)
    return ledger


def store(ledger: Ledger, number: int) -> Slot:
    slot = ledger.reserve(chunk(number))
    assert slot is not None
    ledger.commit(slot)
    return slot


def replay(changes: list[Change], view: dict[str, set[bytes]]) -> None:
    for change in changes:
        tier = view.setdefault(change.tier, set())
        match change:
            case Stored():
                added = set(unpack(change.chunks))
                assert not added & tier, "stored twice"
                tier |= added
            case Removed():
                gone = set(unpack(change.chunks))
                assert gone <= tier, "removed what was not there"
                tier -= gone
            case Cleared():
                tier.clear()


def test_a_chunk_is_visible_only_after_its_save_is_complete() -> None:
    ledger = make(2)
    slot = ledger.reserve(chunk(1))
    assert slot is not None
    assert ledger.holds(chunk(1))
    assert ledger.lookup(chunk(1)) is None
    assert ledger.take_changes() == []
    ledger.commit(slot)
    assert ledger.lookup(chunk(1)) is slot
    assert ledger.take_changes() == [Stored(CPU, chunk(1))]


def test_a_chunk_gets_one_slot() -> None:
    ledger = make(3)
    store(ledger, 1)
    assert ledger.reserve(chunk(1)) is None
    ledger.check()


def test_least_recently_used_goes_first_and_touch_counts() -> None:
    ledger = make(3)
    for number in (1, 2, 3):
        store(ledger, number)
    ledger.touch([chunk(1)])
    store(ledger, 4)
    assert ledger.lookup(chunk(2)) is None
    assert ledger.lookup(chunk(1)) is not None
    assert ledger.evictions == 1


def test_pinned_kept_and_saving_slots_are_not_evicted() -> None:
    ledger = make(3)
    pinned, kept = store(ledger, 1), store(ledger, 2)
    ledger.pin(pinned)
    assert ledger.keep([chunk(2)]) == 1
    assert ledger.reserve(chunk(3)) is not None
    assert ledger.reserve(chunk(4)) is None
    ledger.unpin(pinned)
    assert ledger.reserve(chunk(4)) is not None
    assert ledger.lookup(kept.chunk) is kept
    assert ledger.keep([chunk(2)], keep=False) == 1
    assert ledger.reserve(chunk(5)) is not None
    ledger.check()


def test_a_spared_victim_ends_the_search() -> None:
    ledger = make(1)
    store(ledger, 1)
    assert ledger.reserve(chunk(2), spare={chunk(1)}) is None
    assert ledger.lookup(chunk(1)) is not None


@pytest.mark.parametrize("way", ["forget", "clear"])
def test_a_slot_in_use_is_hidden_at_once_and_reused_only_after(way: str) -> None:
    ledger = make(1)
    slot = store(ledger, 1)
    ledger.pin(slot)
    if way == "forget":
        ledger.forget(chunk(1))
    else:
        ledger.clear_cpu()
    assert ledger.lookup(chunk(1)) is None
    assert ledger.content()[CPU] == []
    assert ledger.reserve(chunk(2)) is None, "the slot's bytes would change under a load"
    ledger.check()
    ledger.unpin(slot)
    assert ledger.reserve(chunk(2)) is not None
    ledger.check()


def test_a_save_that_is_forgotten_on_its_way_never_becomes_visible() -> None:
    ledger = make(1)
    slot = ledger.reserve(chunk(1))
    assert slot is not None
    ledger.clear_cpu()
    assert ledger.reserve(chunk(2)) is None
    ledger.commit(slot)
    assert ledger.content()[CPU] == []
    assert ledger.reserve(chunk(2)) is not None
    ledger.check()


def test_an_abandoned_save_frees_its_slot() -> None:
    ledger = make(1)
    slot = ledger.reserve(chunk(1))
    assert slot is not None
    ledger.abandon(slot)
    assert not ledger.holds(chunk(1))
    assert ledger.take_changes() == []
    store(ledger, 1)
    ledger.check()


def test_capacity_is_fixed_while_slots_are_in_use() -> None:
    ledger = make(1)
    store(ledger, 1)
    with pytest.raises(RuntimeError, match="in use"):
        ledger.set_capacity(2)


def test_gpu_changes_are_reported_once() -> None:
    ledger = make(0)
    ledger.gpu_stored([chunk(1), chunk(2), chunk(1)])
    ledger.gpu_removed([chunk(2), chunk(3)])
    ledger.gpu_cleared()
    assert ledger.take_changes() == [
        Stored(GPU, chunk(1) + chunk(2)),
        Removed(GPU, chunk(2)),
        Cleared(GPU),
    ]
    ledger.check()


def test_dropping_the_oldest_from_a_record_costs_the_same_however_long_it_is() -> None:
    def seconds(most: int) -> float:
        ledger = make(1)
        ledger.add_tier("disk")
        ledger.stored("disk", [number.to_bytes(16, "big") for number in range(most)], most)
        ledger.take_changes()
        began = time.process_time()
        ledger.stored("disk", [number.to_bytes(16, "big") for number in range(most, 2 * most)], most)
        assert ledger.counts()["disk"] == most
        return (time.process_time() - began) / most

    assert seconds(200_000) < 5 * max(seconds(2_000), seconds(5_000))


class LedgerMachine(RuleBasedStateMachine):
    """Random use, against a plain model of what must be visible; every step checks every invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = make(6)
        self.saving: list[Slot] = []
        self.pinned: list[Slot] = []
        self.ready: set[bytes] = set()
        self.gpu: set[bytes] = set()
        self.seen: dict[str, set[bytes]] = {CPU: set(), GPU: set()}
        self.random = random.Random(0)

    @rule(number=st.integers(0, 11))
    def reserve(self, number: int) -> None:
        held = set(self.ledger.content()[CPU])
        # Every sixth name is the beginning of a chunk, which nobody outside may see.
        slot = self.ledger.reserve(chunk(number), tokens=int(number % 6 == 0))
        self.ready -= held - set(self.ledger.content()[CPU])
        if slot is not None:
            busy = Counter(each.index for each in [*self.saving, *self.pinned])
            assert slot.index not in busy, "a slot in use was given away"
            self.saving.append(slot)

    @precondition(lambda self: self.saving)
    @rule(at=st.integers(0, 20), commit=st.booleans())
    def end_save(self, at: int, *, commit: bool) -> None:
        slot = self.saving.pop(at % len(self.saving))
        if commit:
            if not slot.forgotten and not slot.hidden:
                self.ready.add(slot.chunk)
            self.ledger.commit(slot)
        else:
            self.ledger.abandon(slot)

    @rule(number=st.integers(0, 11))
    def pin(self, number: int) -> None:
        if (slot := self.ledger.lookup(chunk(number))) is not None:
            self.ledger.pin(slot)
            self.pinned.append(slot)

    @precondition(lambda self: self.pinned)
    @rule(at=st.integers(0, 20))
    def unpin(self, at: int) -> None:
        self.ledger.unpin(self.pinned.pop(at % len(self.pinned)))

    @rule(number=st.integers(0, 11), keep=st.booleans())
    def keep(self, number: int, *, keep: bool) -> None:
        self.ledger.keep([chunk(number)], keep=keep)

    @rule(numbers=st.lists(st.integers(0, 11), max_size=4))
    def touch(self, numbers: list[int]) -> None:
        self.ledger.touch(chunk(number) for number in numbers)

    @rule(number=st.integers(0, 11))
    def forget(self, number: int) -> None:
        self.ledger.forget(chunk(number))
        self.ready.discard(chunk(number))

    @rule()
    def clear(self) -> None:
        self.ledger.clear_cpu()
        self.ready.clear()

    @rule(numbers=st.lists(st.integers(0, 11), max_size=4))
    def gpu_stored(self, numbers: list[int]) -> None:
        self.ledger.gpu_stored(chunk(number) for number in numbers)
        self.gpu |= {chunk(number) for number in numbers}

    @rule(numbers=st.lists(st.integers(0, 11), max_size=4))
    def gpu_removed(self, numbers: list[int]) -> None:
        self.ledger.gpu_removed(chunk(number) for number in numbers)
        self.gpu -= {chunk(number) for number in numbers}

    @rule()
    def gpu_cleared(self) -> None:
        self.ledger.gpu_cleared()
        self.gpu.clear()

    @rule()
    def read_changes(self) -> None:
        replay(self.ledger.take_changes(), self.seen)
        assert self.seen == {CPU: self.ready, GPU: self.gpu}, "a reader of the changes sees something else"

    @invariant()
    def is_consistent(self) -> None:
        self.ledger.check()
        assert set(self.ledger.content()[CPU]) == self.ready
        assert self.ledger.counts() == {CPU: len(self.ready), GPU: len(self.gpu)}
        expected = RunningDigest()
        for each in self.gpu:
            expected.add(each)
        assert self.ledger.digests()[GPU] == expected.take()
        assert all(slot.state is SlotState.SAVING for slot in self.saving)


LedgerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestLedgerStress = LedgerMachine.TestCase


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(4, 8))
def test_random_use_with_priorities_breaks_no_policy(name: str, seed: int) -> None:
    rng = random.Random(seed)
    ledger = Ledger(Prioritised(POLICIES[name]))
    ledger.set_capacity(rng.choice([2, 7, 20]))
    saving: list[Slot] = []
    loading: list[Slot] = []
    for _ in range(600):
        action, wanted = rng.random(), chunk(rng.randrange(30))
        if action < 0.4 and (slot := ledger.reserve(wanted, priority=rng.choice([LOW, NORMAL, HIGH]))) is not None:
            saving.append(slot)
        elif action < 0.7 and saving:
            ledger.commit(saving.pop(rng.randrange(len(saving))))
        elif action < 0.8 and (slot := ledger.lookup(wanted)) is not None:
            ledger.pin(slot)
            loading.append(slot)
        elif action < 0.9 and loading:
            ledger.unpin(loading.pop(rng.randrange(len(loading))))
        elif action < 0.96:
            ledger.raise_priority([wanted], rng.choice([LOW, NORMAL, HIGH]))
        else:
            ledger.forget(wanted)
        ledger.check()
        ledger._policy.check()
        assert ledger._policy.victim() not in {slot.chunk for slot in loading if not slot.forgotten}
