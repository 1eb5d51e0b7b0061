"""What others do, on the same memory in the same run: torch's indexing, one copy per block, a Triton gather."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.measure import apart
from benchmarks.gpu.transfers import KIB, MIB, Bench

TOTAL = 128 * MIB
SINGLE_COPIES = 4096


def baselines(bench: Bench) -> list[dict[str, Any]]:
    """GB/s of each for pages of several sizes, both ways."""
    found = []
    for page in (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 2 * MIB):
        for name, make in (("torch index", _indexing), ("copy per block", _copies), ("triton", _triton)):
            for load in (True, False):
                found.append({"name": name, "page": page, "direction": "load" if load else "save"})
                try:
                    nbytes, work = make(bench, page, load)
                    rate = bench.rate(nbytes, work, rounds=3)
                except Exception as error:  # noqa: BLE001 - a baseline that is not there is told, not fatal
                    found[-1]["missing"] = f"{type(error).__name__}: {error}"[:200]
                else:
                    found[-1] |= {"gbps": rate / 1e9, "ratio": rate / bench.peak["load" if load else "save"]}
    return found


def _parts(bench: Bench, page: int) -> tuple[Any, Any, list[int]]:
    count = TOTAL // page
    cache = bench.memory.cache[:TOTAL].view(torch.int64).view(count, page // 8)
    host = bench.memory.host[:TOTAL].view(torch.int64).view(count, page // 8)
    return cache, host, apart(count)


def _indexing(bench: Bench, page: int, load: bool) -> tuple[int, Callable[[], None]]:
    cache, host, order = _parts(bench, page)
    index = torch.tensor(order, device=bench.device)

    def save() -> None:
        host.copy_(torch.index_select(cache, 0, index), non_blocking=True)

    def fetch() -> None:
        cache.index_copy_(0, index, host.to(bench.device, non_blocking=True))

    return TOTAL, fetch if load else save


def _copies(bench: Bench, page: int, load: bool) -> tuple[int, Callable[[], None]]:
    cache, host, order = _parts(bench, page)
    order = order[:SINGLE_COPIES]

    def work() -> None:
        for at, block in enumerate(order):
            if load:
                cache[block].copy_(host[at], non_blocking=True)
            else:
                host[at].copy_(cache[block], non_blocking=True)

    return len(order) * page, work


def _triton(bench: Bench, page: int, load: bool) -> tuple[int, Callable[[], None]]:
    from benchmarks.gpu.triton_gather import move_pages  # noqa: PLC0415 - Triton may be missing

    cache, host, order = _parts(bench, page)
    index = torch.tensor(order, device=bench.device)
    words, count = page // 8, len(order)
    block = min(1024, words)

    def work() -> None:
        move_pages[(16,)](cache, host, index, count, words, LOAD=load, BLOCK=block, num_warps=8)

    return TOTAL, work
