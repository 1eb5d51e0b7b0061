"""The worker half: copies bytes between the KV cache and the slab, and decides nothing.

``Copier`` knows the addresses. ``Transfers`` runs copies on two threads, one for loads and one for saves, so that a
load never queues behind a save. What the engine's thread may rely on:

- ``load`` and ``save`` only enqueue. On a GPU the copies run on a stream of their own, after everything that the engine
  had enqueued on its stream until then; the engine's stream never waits for them.
- ``settle`` returns when the named saves have read their blocks, or have failed because they took too long.
- ``take`` hands over what ended since the last call. Every load is reported exactly once, finished or failed.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import memmove
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from worker_connector.plan import MAX_SAMPLES, LoadJob, Sample, SaveJob, Span, WorkerReport
from worker_connector.regions import Region, SlotLayout

_log = logging.getLogger("vllm.warmroute.movers")

_SETTLE_SECONDS = 5.0


class Copier:
    """Copies spans between a KV cache and a slab, both given as flat ``uint8`` tensors.

    ``cache`` is the cache's whole allocation, ``slab`` holds slots of ``layout.slot_bytes``. Both must outlive the
    copier. Consecutive blocks of a region are one copy.
    """

    def __init__(self, cache: torch.Tensor, slab: torch.Tensor, layout: SlotLayout) -> None:
        self._cache = cache
        self._slab = slab
        self._layout = layout
        self._on_host = cache.device.type == "cpu"
        self._cache_start, self._slab_start = cache.data_ptr(), slab.data_ptr()
        self._blocks = [_blocks_within(cache.numel(), regions) for regions in layout.regions]
        self._pages = [_host_pages(cache, slab, layout, group) for group in range(len(layout.regions))]

    def nbytes(self, spans: Iterable[Span]) -> int:
        """Bytes that copying ``spans`` moves."""
        return sum(len(span.blocks) * self._layout.block_bytes(span.group) for span in spans)

    def to_cache(self, span: Span) -> None:
        """Copy a span's bytes from its slot into its blocks. An ``IndexError`` if the cache lacks one of them."""
        self._check(span)
        for in_cache, in_slab, count in self._pieces(span):
            if self._on_host:
                memmove(self._cache_start + in_cache, self._slab_start + in_slab, count)
            else:
                source = self._slab[in_slab : in_slab + count]
                self._cache[in_cache : in_cache + count].copy_(source, non_blocking=True)

    def to_slab(self, span: Span) -> None:
        """Copy a span's blocks into its slot. An ``IndexError`` if the cache lacks one of them."""
        self._check(span)
        if pages := self._pages[span.group]:
            blocks, end = np.array(span.blocks), span.at + len(span.blocks)
            for in_cache, in_slab in pages:
                np.take(in_cache, blocks, out=in_slab[span.slot, span.at : end], mode="clip")
            return
        for in_cache, in_slab, count in self._pieces(span):
            if self._on_host:
                memmove(self._slab_start + in_slab, self._cache_start + in_cache, count)
            else:
                source = self._cache[in_cache : in_cache + count]
                self._slab[in_slab : in_slab + count].copy_(source, non_blocking=True)

    def _check(self, span: Span) -> None:
        # Neither of the ways to copy does: they would read and write what belongs to others.
        if max(span.blocks, default=0) >= self._blocks[span.group]:
            raise IndexError(f"block {max(span.blocks)} of a KV cache of {self._blocks[span.group]} blocks")

    def _pieces(self, span: Span) -> Iterator[tuple[int, int, int]]:
        """Runs of bytes: offset in the cache, offset in the slab, length."""
        base = span.slot * self._layout.slot_bytes
        regions, starts = self._layout.regions[span.group], self._layout.starts[span.group]
        for first, done, count in _runs(span.blocks):
            for region, start in zip(regions, starts, strict=True):
                in_cache = region.offset + first * region.block_stride
                in_slab = base + start + (span.at + done) * region.nbytes
                if region.block_stride == region.nbytes:
                    yield in_cache, in_slab, count * region.nbytes
                    continue
                for at in range(count):
                    yield in_cache + at * region.block_stride, in_slab + at * region.nbytes, region.nbytes


def _blocks_within(size: int, regions: Iterable[Region]) -> int:
    """How many blocks all regions have in a cache of so many bytes."""
    return min(((size - region.offset - region.nbytes) // region.block_stride + 1 for region in regions), default=0)


def _host_pages(cache: torch.Tensor, slab: torch.Tensor, layout: SlotLayout, group: int) -> list[tuple[Any, Any]]:
    """Per region, its blocks in the cache as an array of opaque items, and the slab's as one of slots by blocks: so a
    span is one call per region, however its blocks are scattered. Empty where the arrays cannot be made: not in host
    memory, blocks apart, or no slot."""
    regions = layout.regions[group]
    if cache.device.type != "cpu" or any(region.block_stride != region.nbytes for region in regions):
        return []
    if slab.numel() < layout.slot_bytes:
        return []
    held, slots = cache.numpy(), slab.numel() // layout.slot_bytes
    pages: list[tuple[Any, Any]] = []
    for region, start in zip(regions, layout.starts[group], strict=True):
        item, per_chunk = f"V{region.nbytes}", layout.blocks_per_chunk[group]
        blocks = (held.size - region.offset) // region.nbytes
        in_cache = np.ndarray(blocks, item, held, region.offset)
        in_slab = np.ndarray((slots, per_chunk), item, slab.numpy(), start, (layout.slot_bytes, region.nbytes))
        pages.append((in_cache, in_slab))
    return pages


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive block ids: (first block, blocks before it in the span, length)."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[start], start, at - start
            start = at


class Stream:
    """Order between the engine's work on the cache and copies of it. This one is for a cache in host memory, where the
    engine's work is done when it returns."""

    def mark(self) -> Any:
        """A point in the engine's work, as of now, on the engine's thread."""
        return None

    def begin(self, after: Any) -> None:
        """Order the copies that follow, on this thread, after a mark."""

    def finish(self) -> None:
        """Return when this thread's copies are done."""

    def close(self) -> None:
        """Undo what this thread set up."""


class CudaStream(Stream):
    """The same for a cache on a GPU: copies run on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def begin(self, after: Any) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)
        self._stream.wait_event(after)

    def finish(self) -> None:
        self._stream.synchronize()


def stream_for(device: torch.device) -> Stream:
    """The kind of stream that orders copies of a cache on ``device``."""
    return CudaStream(device) if device.type == "cuda" else Stream()


@dataclass(slots=True)
class _Load:
    job: LoadJob
    after: Any
    given: float


class Transfers:
    """Runs the plans of one rank."""

    def __init__(self, copier: Copier, make_stream: Callable[[], Stream] = Stream) -> None:
        self._copier = copier
        self._changed = threading.Condition()
        self._report = WorkerReport()
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._loading: set[str] = set()
        self._saving: set[int] = set()
        self._given_up: set[int] = set()
        self._loader = _Mover("warmroute-load", make_stream())
        self._saver = _Mover("warmroute-save", make_stream())

    def load(self, jobs: Iterable[LoadJob]) -> None:
        """Begin loads. Returns at once."""
        for job in jobs:
            self._loading.add(job.request_id)
            load = _Load(job, self._loader.stream.mark(), time.monotonic())
            self._loader.submit(lambda load=load: self._run_load(load))  # type: ignore[misc]

    def save(self, job: SaveJob) -> None:
        """Begin a save of blocks that are full once the engine's work until now is done. Returns at once."""
        self._saving.add(job.job)
        mark = self._saver.stream.mark()
        self._saver.submit(lambda: self._run_save(job, mark))

    def settle(self, jobs: Iterable[int]) -> None:
        """Return when these saves have read their blocks. Jobs that ended, or were never begun, do not count. What
        takes longer than ``_SETTLE_SECONDS`` is given up: the engine goes on, and the save is reported as failed."""
        waiting = set(jobs) & self._saving
        if not waiting:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: not waiting & self._saving, _SETTLE_SECONDS):
                late = waiting & self._saving
                self._given_up |= late
                _log.error("Saving %d batches of KV blocks is too slow; they are not cached", len(late))

    def wait_for_loads(self, timeout: float) -> None:
        """Return when no load is under way, or after ``timeout`` seconds."""
        if self._loading:
            with self._changed:
                self._changed.wait_for(lambda: not self._loading, timeout)

    @property
    def has_results(self) -> bool:
        """Whether ``take`` has something to hand over. Takes no lock: what ends just now is told in the next step."""
        return bool(self._finished)

    @property
    def has_report(self) -> bool:
        """The same of ``take_report``."""
        return bool(self._report)

    def take(self) -> tuple[set[str], set[str]]:
        """Request ids whose loads ended since the last call, and those of them that failed."""
        with self._changed:
            finished, self._finished = self._finished, set()
            failed, self._failed = self._failed, set()
        return finished, failed

    def take_report(self) -> WorkerReport:
        """What else there is to tell the scheduler half since the last call."""
        with self._changed:
            report, self._report = self._report, WorkerReport()
        return report

    def close(self, timeout: float = 4.0) -> bool:
        """End both threads: copies under way are finished, queued ones dropped. Whether they ended in time."""
        movers = (self._loader, self._saver)
        for mover in movers:
            mover.stop()
        deadline = time.monotonic() + timeout
        ended = [mover.join(max(0.0, deadline - time.monotonic())) for mover in movers]
        return all(ended)

    def _run_load(self, load: _Load) -> None:
        bad, sample = self._copy_in(load)
        with self._changed:
            request_id = load.job.request_id
            self._loading.discard(request_id)
            self._finished.add(request_id)
            if bad is not None:
                self._failed.add(request_id)
                self._report.failed_loads[request_id] = bad
            elif sample is not None:
                _keep(self._report.loads, sample)
            self._changed.notify_all()

    def _copy_in(self, load: _Load) -> tuple[set[int] | None, Sample | None]:
        """The slots that failed (none of them when the load was refused or late), or a measurement."""
        if load.job.refused:
            return set(), None
        began = time.monotonic()
        with _ordered(self._loader.stream, load.after) as outcome:
            for span in load.job.spans:
                if time.monotonic() - load.given > load.job.deadline:
                    _log.warning("A load took longer than %.1f s; its tokens are computed", load.job.deadline)
                    return set(), None
                outcome.slot = span.slot
                self._copier.to_cache(span)
        if outcome.error is not None:
            _log.error("Loading KV blocks failed; their tokens are computed", exc_info=outcome.error)
            return {outcome.slot}, None
        return None, Sample(self._copier.nbytes(load.job.spans), time.monotonic() - began)

    def _run_save(self, job: SaveJob, mark: Any) -> None:
        began = time.monotonic()
        with _ordered(self._saver.stream, mark) as outcome:
            for span in job.spans:
                self._copier.to_slab(span)
        sample = Sample(self._copier.nbytes(job.spans), time.monotonic() - began)
        if outcome.error is not None:
            _log.error("Saving KV blocks failed; they are not cached", exc_info=outcome.error)
        with self._changed:
            self._saving.discard(job.job)
            self._report.saved[job.job] += 1
            if outcome.error is not None or job.job in self._given_up:
                self._given_up.discard(job.job)
                self._report.failed_saves.add(job.job)
            else:
                _keep(self._report.saves, sample)
            self._changed.notify_all()


@dataclass(slots=True)
class _Outcome:
    slot: int = -1
    error: Exception | None = None


@contextmanager
def _ordered(stream: Stream, after: Any) -> Iterator[_Outcome]:
    """Run copies after a mark; when this ends, failed or not, none of them is under way any more."""
    outcome = _Outcome()
    try:
        try:
            stream.begin(after)
            yield outcome
        finally:
            stream.finish()
    except Exception as error:  # noqa: BLE001 - a failed copy is an outcome, whatever its cause
        outcome.error = error


def _keep(samples: list[Sample], sample: Sample) -> None:
    if len(samples) < MAX_SAMPLES:
        samples.append(sample)


class _Mover:
    """A thread that runs what it is given, in order."""

    def __init__(self, name: str, stream: Stream) -> None:
        self.stream = stream
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._work.append(work)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopped = True
            self._work.clear()
            self._wake.notify()

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._work or self._stopped)
                if self._stopped:
                    break
                work = self._work.popleft()
            work()
        self.stream.close()
