import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_connector.errors import ConfigurationError
from worker_connector.tiers.placement import Placement

KEYS = [f"w1-{at:032x}" for at in range(20_000)]


def test_keys_are_spread_evenly() -> None:
    placement = Placement(["a", "b", "c", "d"])
    firsts = [placement.order(key)[0] for key in KEYS]
    assert all(4_700 < firsts.count(at) < 5_300 for at in range(4))


def test_weights_are_shares() -> None:
    placement = Placement(["a", "b", "c"], [1.0, 1.0, 2.0])
    firsts = [placement.order(key)[0] for key in KEYS]
    assert 4_700 < firsts.count(0) < 5_300
    assert 9_600 < firsts.count(2) < 10_400


def test_an_added_store_takes_its_share_and_moves_nothing_else() -> None:
    before = Placement(["a", "b", "c", "d"])
    after = Placement(["a", "b", "c", "d", "e"])
    moved = 0
    for key in KEYS:
        old, new = before.order(key), after.order(key)
        assert [each for each in new if each != 4] == old
        moved += new[0] == 4
    assert 3_700 < moved < 4_300  # a fifth


@given(st.permutations(["a", "b", "c", "d", "e"]), st.text(max_size=20))
def test_the_order_of_the_list_does_not_matter(names: list[str], key: str) -> None:
    plain = sorted(names)
    assert [names[at] for at in Placement(names).order(key)] == [plain[at] for at in Placement(plain).order(key)]


def test_the_placement_of_a_key_never_changes() -> None:
    """Objects are found by it: another order would lose what fleets have stored."""
    assert Placement(["a", "b", "c", "d"]).order("key") == [3, 0, 2, 1]
    weighted = Placement(["a", "b"], [1.0, 3.0])
    assert [weighted.order(f"w{at}")[0] for at in range(1, 7)] == [1, 1, 1, 1, 0, 1]


def test_stores_that_are_not_distinct_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a is given twice"):
        Placement(["a", "b", "a"])
    with pytest.raises(ConfigurationError, match="weight above zero"):
        Placement(["a", "b"], [1.0, 0.0])
