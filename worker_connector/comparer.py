"""How much slots differ: the worker's side of the shadow check."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from worker_connector.plan import Comparison

_FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Caches that are bytes to PyTorch, by vLLM's name of their type."""
_PORTION = 1 << 20
"""Elements looked at together, so that large chunks take little memory."""


class Comparer:
    """``slab`` are the slots' bytes, ``nbytes`` of which count in each; ``dtype`` is that of the KV cache's elements, None
    where there are several: bytes are compared then."""

    def __init__(self, slab: torch.Tensor, slot_bytes: int, nbytes: int, dtype: torch.dtype | None) -> None:
        self._slab = slab
        self._slot_bytes = slot_bytes
        self._nbytes = nbytes
        self._dtype = dtype if dtype is not None and dtype.is_floating_point else None

    def compare(self, comparisons: Iterable[Comparison]) -> dict[int, float]:
        """The difference of each pair, by the slot that holds the chunk: see ``difference``."""
        return {each.held: difference(self._values(each.held), self._values(each.again)) for each in comparisons}

    def _values(self, slot: int) -> torch.Tensor:
        start = slot * self._slot_bytes
        content = self._slab[start : start + self._nbytes]
        return content if self._dtype is None else content.view(self._dtype)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference as a share of the larger norm, between 0 and 2; of bytes, whether any differs. Values that
    are no finite numbers differ wholly, unless they are so in the same places."""
    if not one.dtype.is_floating_point:
        return float(not torch.equal(one, other))
    apart = whole = others = 0.0
    for a, b in _portions(one, other):
        if not torch.equal(a.isfinite(), b.isfinite()):
            return 2.0
        here, there = (each.nan_to_num(0.0, 0.0, 0.0) for each in (a, b))
        apart += _square(here - there)
        whole += _square(here)
        others += _square(there)
    largest = max(whole, others)
    return math.sqrt(apart / largest) if largest else 0.0


def dtype_of(caches: Mapping[str, torch.Tensor], cache_dtype: str = "") -> torch.dtype | None:
    """The type of the cache's elements, which vLLM calls ``cache_dtype``; None where layers have different ones."""
    found = {cache.dtype for cache in caches.values()}
    if found == {torch.uint8}:
        return _FP8.get(cache_dtype, torch.uint8)
    return found.pop() if len(found) == 1 else None


def _portions(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for a, b in zip(one.split(_PORTION), other.split(_PORTION), strict=True):
        yield a.double(), b.double()


def _square(values: torch.Tensor) -> float:
    return float(torch.dot(values, values))
