"""How much slots differ."""

import pytest

pytest.importorskip("torch", reason="slots are compared with torch")

import torch

from worker_connector.comparer import Comparer, difference, dtype_of
from worker_connector.plan import Comparison
from worker_connector.shadow import DIFFERENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_difference_is_a_share_of_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    one = torch.randn(3 << 20).to(dtype)
    assert difference(one, one.clone()) == 0
    assert difference(one, -one) == pytest.approx(2, rel=1e-3)
    assert difference(one, torch.randn(3 << 20).to(dtype)) == pytest.approx(2**0.5, rel=0.01)
    nudged = one.clone()
    nudged[-1] += 1000
    assert difference(one, nudged) > 0.4, "the last portion was not looked at"
    assert difference(one, (one * 1.01).to(dtype)) < 0.02


def test_values_that_are_no_numbers_must_be_in_the_same_places() -> None:
    one = torch.tensor([1.0, float("nan"), float("inf")])
    assert difference(one, one.clone()) == 0
    assert difference(one, torch.tensor([1.0, 2.0, float("inf")])) == 2
    assert difference(torch.zeros(4), torch.zeros(4)) == 0
    assert difference(torch.zeros(4), torch.ones(4)) == 1


def test_bytes_are_the_same_or_not() -> None:
    one = torch.arange(100, dtype=torch.uint8)
    assert difference(one, one.clone()) == 0
    other = one.clone()
    other[50] ^= 1
    assert difference(one, other) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn, None])
def test_slots_are_compared_without_what_fills_them_up(dtype: torch.dtype | None) -> None:
    slab = torch.randint(0, 100, (4 * 4096,), dtype=torch.uint8)
    slab[4096:8192] = slab[:4096]
    slab[4096 + 4000 : 8192] = 7  # behind the 4,000 bytes that count
    comparer = Comparer(slab, 4096, 4000, dtype)
    assert comparer.compare([Comparison(0, 1)]) == {0: 0.0}
    found = comparer.compare([Comparison(0, 2), Comparison(3, 1)])
    assert set(found) == {0, 3}
    assert min(found.values()) > 0.1


def test_types_of_caches() -> None:
    assert dtype_of({"a": torch.zeros(1), "b": torch.ones(1)}) is torch.float32
    assert dtype_of({"a": torch.zeros(1), "b": torch.ones(1, dtype=torch.uint8)}) is None


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_a_cache_of_fp8_that_was_rounded_otherwise_is_the_same(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.randn(4096)
    one, again = (each.to(dtype).view(torch.uint8) for each in (values, values * (1 + 0.01 * torch.randn(4096))))
    assert not torch.equal(one, again)
    slab = torch.cat([one, again, torch.randn(4096).to(dtype).view(torch.uint8)])
    comparer = Comparer(slab, 4096, 4096, dtype_of({"a": slab, "b": slab}, name))
    assert comparer.compare([Comparison(0, 1)])[0] < DIFFERENT
    assert comparer.compare([Comparison(0, 2)])[0] > 1
