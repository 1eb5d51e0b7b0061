"""Gather and scatter of the native core's CPU backend, against memcpy of the same bytes in the same round.

    python benchmarks/native_cpu.py [--out benchmarks/results/native-cpu.json]

Every figure is (time of memcpy) / (time of the move): 1.0 is as fast as copying as much from one run of bytes to another with
as many threads. ``cpu`` is by processor time, the median of pairs, which other programs disturb little; ``wall`` is by the
clock, best against best. Blocks are scattered at random over a cache that is 16 times as large as what is moved.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from worker_connector import native

MOVED = 16 << 20
SPREAD = 16
LAYERS, HEADS, TOKENS = 32, 8, 16
PAGES = [1 << shift for shift in range(10, 22)]  # 1 KiB to 2 MiB


def views(cache: int, size: int, page: int) -> Iterator[tuple[str, native.View, int]]:
    """Layouts of a cache of ``size`` bytes at an address, with their numbers of blocks."""
    layers = LAYERS if page * LAYERS * 4 <= MOVED else 4
    whole, per_layer = size // page, size // (layers * page)
    ends = {"begin": cache, "end": cache + size}
    yield (
        "one region",
        native.View.of_bytes([cache], block_stride=page, block_count=whole, page_bytes=page, **ends),
        whole,
    )
    bases = [cache + layer * per_layer * page for layer in range(layers)]
    yield (
        "layer first (LBHNC)",
        native.View.of_bytes(bases, block_stride=page, block_count=per_layer, page_bytes=page, **ends),
        per_layer,
    )
    run = page // HEADS
    content = run // TOKENS
    shape = {"heads": HEADS, "tokens": TOKENS, "content_bytes": content, "block_count": per_layer, **ends}
    yield (
        f"head first (LHBNC), runs of a page / {HEADS}",
        native.View(bases, block_stride=run, head_stride=per_layer * run, token_stride=content, **shape),
        per_layer,
    )
    yield (
        f"token first (LBNHC), runs of a page / {HEADS * TOKENS}",
        native.View(bases, block_stride=page, head_stride=content, token_stride=HEADS * content, **shape),
        per_layer,
    )


class Clocks(NamedTuple):
    """Seconds on the wall, and of processor time of all threads."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Clocks:
    began = Clocks(time.perf_counter(), time.process_time())
    work()
    return Clocks(time.perf_counter() - began.wall, time.process_time() - began.cpu)


class Memcpy:
    """One run of bytes to another by the C library's memcpy, a share for each of ``threads``, which wait beforehand."""

    def __init__(self, threads: int) -> None:
        self._threads, self._job = threads, (0, 0, 0)
        self._start, self._done = threading.Barrier(threads), threading.Barrier(threads)
        for index in range(1, threads):
            threading.Thread(target=self._serve, args=(index,), daemon=True).start()

    def copy(self, target: int, source: int, size: int) -> None:
        self._job = (target, source, size // self._threads)
        self._start.wait()
        self._share(0)
        self._done.wait()

    def _share(self, index: int) -> None:
        target, source, share = self._job
        ctypes.memmove(target + share * index, source + share * index, share)

    def _serve(self, index: int) -> None:
        while True:
            self._start.wait()
            self._share(index)
            self._done.wait()


def ratios(pairs: Sequence[tuple[Clocks, Clocks]]) -> dict[str, float]:
    """Of (memcpy, move): the median over rounds by processor time, and the best by the wall against the best."""
    cpu = statistics.median(base.cpu / taken.cpu for base, taken in pairs)
    wall = min(base.wall for base, _ in pairs) / min(taken.wall for _, taken in pairs)
    return {"cpu": round(cpu, 3), "wall": round(wall, 3)}


def measure(
    context: native.Context, cache: native.Slab, packed: native.Slab, threads: int, rounds: int
) -> Iterator[dict[str, object]]:
    random, memcpy = np.random.default_rng(0), Memcpy(threads)
    for page, (layout, view, count) in [
        (size, each) for size in PAGES for each in views(cache.address, cache.size, size)
    ]:
        needed = MOVED // (page * view.layer_count)
        pairs: dict[str, list[tuple[Clocks, Clocks]]] = {"gather": [], "scatter": []}
        for _ in range(rounds):
            blocks = random.permutation(count)[:needed].astype(np.int32)
            source = cache.address + int(random.integers(0, (cache.size - MOVED) >> 21)) * (2 << 20)
            # As in a slab, where each save goes to another slot: what is written to was not used lately.
            first, second = (packed.address + int(place) * MOVED for place in random.permutation(SPREAD)[:2])
            spans = [native.Span(second, MOVED, needed, 0, needed)]
            for name, move, ends in (
                ("gather", context.gather, (first, source)),
                ("scatter", context.scatter, (source, first)),
            ):
                base = timed(lambda ends=ends: memcpy.copy(*ends, MOVED))  # type: ignore[misc]
                taken = timed(lambda move=move, view=view, blocks=blocks, spans=spans: move(view, blocks, spans))  # type: ignore[misc]
                pairs[name].append((base, taken))
        best = min(base.wall for each in pairs.values() for base, _ in each)
        row: dict[str, object] = {"layout": layout, "page": page, "threads": threads}
        row |= {name: ratios(each) for name, each in pairs.items()}
        yield row | {"memcpy_gb_s": round(MOVED / best / 1e9, 2)}


def call_overhead(context: native.Context, cache: native.Slab, packed: native.Slab) -> float:
    """Microseconds of a gather of one byte, which is what Python and the core's checks cost: the best of many thousands."""
    view = native.View.of_bytes(
        [cache.address], begin=cache.address, end=cache.address + 1, block_stride=1, block_count=1, page_bytes=1
    )
    blocks, spans = np.zeros(1, np.int32), [native.Span(packed.address, 1, 1, 0, 1)]
    rounds = timeit.repeat(lambda: context.gather(view, blocks, spans), number=2000, repeat=20)
    return round(min(rounds) / 2000 * 1e6, 2)


def checks(context: native.Context, packed: native.Slab) -> dict[str, float]:
    """GB/s of one thread, best of some rounds: CRC-32C, and the page checksum of the context's threads."""
    memory = np.frombuffer(packed.view(), np.uint8)[: 1 << 20]
    works = {"crc32c": lambda: native.crc32c(memory), "checksum": lambda: context.checksum(memory)}
    return {
        name: round(memory.size / min(timeit.repeat(work, number=1, repeat=200)) / 1e9, 1)
        for name, work in works.items()
    }


def machine() -> dict[str, object]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.release(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    found: list[dict[str, object]] = []
    extra: dict[str, object] = {}
    for threads in options.threads:
        with native.Context("cpu", threads=threads) as context:
            cache, packed = context.allocate(MOVED * SPREAD), context.allocate(MOVED * SPREAD)
            np.frombuffer(cache.view(), np.uint8)[:] = 7
            np.frombuffer(packed.view(), np.uint8)[:] = 9
            for row in measure(context, cache, packed, threads, options.rounds):
                found.append(row)
                print(json.dumps(row), flush=True)
            build, description = context.library.build, context.description
            if threads == 1:
                extra = {"call_us": call_overhead(context, cache, packed), "gb_s": checks(context, packed)}
    result = {
        "command": " ".join(["python", "benchmarks/native_cpu.py", *sys.argv[1:]]),
        "machine": machine(),
        "core": build,
        "instruction_set": description.split(",")[0],
        "moved_bytes": MOVED,
        **extra,
        "ratios": found,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
