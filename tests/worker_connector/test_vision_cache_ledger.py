"""Room, eviction and agreement of ranks, over random sequences too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_connector.vision_cache_ledger import ALIGNMENT, PATIENCE_STEPS, Arena, VisionLedger
from worker_connector.vision_cache_plan import Grant, VisionReport

UNIT = ALIGNMENT


def kept(ledger: VisionLedger, name: str, units: int = 1, embeds: int = 4) -> Grant:
    grant, _ = ledger.reserve(name, embeds, "image", units * UNIT)
    assert grant is not None
    ledger.absorb(VisionReport(kept={grant.ticket: 1}))
    return grant


def test_the_one_used_longest_ago_goes_first() -> None:
    ledger = VisionLedger(3 * UNIT, 1)
    for name in "abc":
        kept(ledger, name)
    ledger.use("a")
    grant, evicted = ledger.reserve("d", 4, "image", UNIT)
    assert grant is not None
    assert evicted == 1
    assert "b" not in ledger
    assert "a" in ledger
    ledger.check()


def test_what_cannot_fit_evicts_nothing() -> None:
    ledger = VisionLedger(3 * UNIT, 1)
    kept(ledger, "a")
    assert ledger.reserve("b", 4, "image", 4 * UNIT) == (None, 0)
    assert "a" in ledger


def test_an_output_is_there_when_every_rank_has_it() -> None:
    ledger = VisionLedger(3 * UNIT, 2)
    grant, _ = ledger.reserve("a", 4, "image", UNIT)
    assert grant is not None
    ledger.absorb(VisionReport(kept={grant.ticket: 1}))
    assert "a" not in ledger
    assert ledger.reserve("a", 4, "image", UNIT) == (None, 0)
    ledger.absorb(VisionReport(kept={grant.ticket: 1}))
    assert "a" in ledger


def test_one_rank_that_refuses_frees_the_room_of_all() -> None:
    ledger = VisionLedger(3 * UNIT, 2)
    grant, _ = ledger.reserve("a", 4, "image", 3 * UNIT)
    assert grant is not None
    arrived, lost = ledger.absorb(VisionReport(kept={grant.ticket: 1}, refused={grant.ticket}))
    assert not arrived
    assert [entry.identifier for entry in lost] == ["a"]
    assert ledger.take_forgotten() == [grant.ticket]
    assert ledger.used == 0
    assert ledger.absorb(VisionReport(kept={grant.ticket: 1})) == ([], [])


def test_room_that_was_not_needed_is_given_back() -> None:
    ledger = VisionLedger(4 * UNIT, 1)
    grant, _ = ledger.reserve("a", 4, "image", 3 * UNIT)
    assert grant is not None
    ledger.absorb(VisionReport(kept={grant.ticket: 1}, nbytes={grant.ticket: UNIT + 1}))
    assert ledger.used == 2 * UNIT
    ledger.check()


def test_ranks_that_keep_silent_hold_no_room_for_good() -> None:
    ledger = VisionLedger(UNIT, 1)
    grant, _ = ledger.reserve("a", 4, "image", UNIT)
    assert grant is not None
    assert not any(ledger.next_step() for _ in range(PATIENCE_STEPS - 1))
    assert [entry.identifier for entry in ledger.next_step()] == ["a"]
    assert ledger.used == 0
    ledger.check()


def test_word_from_before_a_clear_means_nothing() -> None:
    ledger = VisionLedger(UNIT, 1)
    old, _ = ledger.reserve("a", 4, "image", UNIT)
    assert ledger.clear() == 0
    new, _ = ledger.reserve("a", 4, "image", UNIT)
    assert old is not None
    assert new is not None
    ledger.absorb(VisionReport(kept={old.ticket: 1}))
    assert "a" not in ledger
    ledger.absorb(VisionReport(kept={new.ticket: 1}))
    assert "a" in ledger


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9 * UNIT)), max_size=60))
def test_pieces_never_overlap_and_come_back_whole(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(20 * UNIT)
    pieces: dict[int, int] = {}
    for is_taking, nbytes in steps:
        if is_taking:
            offset = arena.take(nbytes)
            if offset is not None:
                end = offset + nbytes
                assert end <= arena.size
                assert all(end <= start or start + size <= offset for start, size in pieces.items())
                pieces[offset] = nbytes
        elif pieces:
            offset = sorted(pieces)[nbytes % len(pieces)]
            arena.give_back(offset, pieces.pop(offset))
    for offset, nbytes in pieces.items():
        arena.give_back(offset, nbytes)
    assert arena.holes == [(0, arena.size)]


@pytest.mark.parametrize("size", [0, UNIT - 1])
def test_without_room_nothing_is_kept(size: int) -> None:
    ledger = VisionLedger(size, 1)
    assert ledger.reserve("a", 1, "image", 1) == (None, 0)
    ledger.check()
