import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.holders import (
    DENSE_SLOTS,
    SPARSE_HOLDERS,
    Holders,
    dense,
    encode,
    single,
    slots_of,
    tiers_of,
    with_tiers,
    without,
    words_of,
)

SLOTS = st.one_of(st.integers(0, 5), st.integers(DENSE_SLOTS - 2, DENSE_SLOTS + 2), st.integers(0, 1500))
SETS = st.dictionaries(SLOTS, st.integers(1, 15), min_size=1, max_size=3 * SPARSE_HOLDERS)


def made(model: dict[int, int]) -> Holders:
    return encode([slot << 4 | tiers for slot, tiers in sorted(model.items())])


@given(SETS)
def test_a_set_says_what_it_was_made_of(model: dict[int, int]) -> None:
    held = made(model)
    assert [(word >> 4, word & 15) for word in words_of(held)] == sorted(model.items())
    assert all(tiers_of(held, slot) == model.get(slot, 0) for slot in (*model, 0, 7, 64, 1501))
    assert dense(held) == sum(tiers << slot * 4 for slot, tiers in model.items())
    assert isinstance(held, bytes) == (max(model) >= DENSE_SLOTS and len(model) <= SPARSE_HOLDERS)


@given(SETS, st.lists(st.tuples(st.booleans(), SLOTS, st.integers(1, 15)), max_size=40))
def test_equal_sets_have_one_form_however_they_came_about(
    model: dict[int, int], changes: list[tuple[bool, int, int]]
) -> None:
    held: Holders | None = made(model)
    for grows, slot, tiers in changes:
        if grows:
            held = single(slot, tiers) if held is None else with_tiers(held, slot, tiers)
            model[slot] = model.get(slot, 0) | tiers
        elif held is not None:
            held = without(held, tiers << slot * 4)
            model[slot] = model.get(slot, 0) & ~tiers
        model = {slot: tiers for slot, tiers in model.items() if tiers}
        assert held == (made(model) if model else None)


@given(st.sets(st.integers(0, 1500)))
def test_slots_of_a_mask(slots: set[int]) -> None:
    assert sorted(slots_of(sum(1 << slot * 4 for slot in slots))) == sorted(slots)


@pytest.mark.parametrize(("model", "most"), [({700: 1}, 48), ({3: 1, 700: 2, 900: 3}, 48), ({3: 15, 60: 15}, 64)])
def test_small_sets_are_small(model: dict[int, int], most: int) -> None:
    assert made(model).__sizeof__() <= most
