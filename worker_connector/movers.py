"""The worker half: copies bytes between the KV cache and the slab, and decides nothing.

``Transfers`` runs the copies of a ``Copier`` on two threads, one for loads and one for saves, so that a load never
queues behind a save; what saves are compared with is compared on a third, so that no save queues behind that. What the
engine's thread may rely on:

- ``load`` and ``save`` only enqueue. On a GPU the copies run on a stream of their own, after everything that the engine
  had enqueued on its stream until then; the engine's stream never waits for them.
- ``settle`` returns when the named saves have read their blocks, or have failed because they took too long.
- ``take`` hands over what ended since the last call. Every load is reported exactly once, finished or failed, and only
  when nothing of it is under way any more.
- A slot that a transfer writes is not touched by another, and one that a load reads is not written. The scheduler half
  sees to that; a job that would break it is not run but reported as failed.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from worker_connector.copier import Copier, Lane, Receipt
from worker_connector.errors import ConnectorError
from worker_connector.placement import roam
from worker_connector.plan import MAX_SAMPLES, Comparison, LoadJob, Sample, SaveJob, Span, WorkerReport

_log = logging.getLogger("vllm.warmroute.movers")

START_SECONDS = 60.0
"""Longest wait for the movers' threads to be ready; calibrating a busy GPU takes some of it."""

_SETTLE_SECONDS = 5.0

_PORTIONS_AHEAD = 2


class Stream:
    """Order between the engine's work on the cache and copies of it. This one is for a cache in host memory, where the
    engine's work is done when it returns."""

    handle = 0
    """The ``cudaStream_t`` to copy on; 0 where there is none."""

    def mark(self) -> Any:
        """A point in the engine's work, as of now, on the engine's thread."""
        return None

    def begin(self, after: Any) -> None:
        """Order the copies that follow, on this thread, after a mark."""

    def pace(self) -> None:
        """Called between the portions of a transfer: return when few enough of them are under way, so that one that is
        late can still be ended, and the driver's queue never fills up and stalls whoever launches next."""

    def finish(self) -> None:
        """Return when this thread's copies are done."""

    def close(self) -> None:
        """Undo what this thread set up."""


class CudaStream(Stream):
    """The same for a cache on a GPU: copies run on a stream of their own, of high priority, so that a copy of small
    pages does not queue behind the engine's next forward. Waiting for them sleeps: it takes no core from the engine."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device, priority=-1)
        self.handle = int(self._stream.cuda_stream)
        self._portions: deque[Any] = deque()

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def begin(self, after: Any) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)
        self._stream.wait_event(after)

    def pace(self) -> None:
        self._portions.append(self._end())
        if len(self._portions) > _PORTIONS_AHEAD:
            self._portions.popleft().synchronize()

    def finish(self) -> None:
        self._portions.clear()
        self._end().synchronize()

    def _end(self) -> Any:
        """The end of what the stream has now; waiting for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event


def stream_for(device: torch.device) -> Stream:
    """The kind of stream that orders copies of a cache on ``device``."""
    return CudaStream(device) if device.type == "cuda" else Stream()


class SlotUse:
    """Which slots transfers read and write at this moment. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._readers: Counter[int] = Counter()
        self._writers: set[int] = set()

    def read(self, slots: set[int]) -> set[int]:
        """Begin to read; returns the slots that are being written, and begins nothing if there are any."""
        conflicts = slots & self._writers
        if not conflicts:
            self._readers.update(slots)
        return conflicts

    def write(self, slots: set[int]) -> set[int]:
        """Begin to write; returns the slots that are in use, and begins nothing if there are any."""
        conflicts = slots & (self._writers | self._readers.keys())
        if not conflicts:
            self._writers |= slots
        return conflicts

    def end_read(self, slots: set[int]) -> None:
        for slot in slots:
            assert self._readers[slot] > 0, f"slot {slot} was not being read"
            self._readers[slot] -= 1
            if not self._readers[slot]:
                del self._readers[slot]

    def end_write(self, slots: set[int]) -> None:
        assert slots <= self._writers, "a slot was not being written"
        self._writers -= slots

    def __bool__(self) -> bool:
        return bool(self._readers or self._writers)


@dataclass(slots=True)
class _Load:
    job: LoadJob
    after: Any
    given: float
    slots: set[int]
    conflicts: set[int]


@dataclass(slots=True)
class _Save:
    job: SaveJob
    after: Any
    slots: set[int]
    conflicts: set[int]


class _Abandoned(Exception):
    pass


class Transfers:
    """Runs the plans of one rank, in the process that made it. ``make_stream`` is called once for each direction, ``compare``
    for each comparison of a save that was copied.

    Raises:
        ConnectorError: a mover could not be set up.
    """

    def __init__(
        self,
        copier: Copier,
        make_stream: Callable[[], Stream] = Stream,
        compare: Callable[[Iterable[Comparison]], dict[int, float]] = lambda _: {},
    ) -> None:
        self._copier = copier
        self._compare = compare
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._report = WorkerReport()
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._loading: set[str] = set()
        self._saving: set[int] = set()
        self._given_up: set[int] = set()
        self._slots = SlotUse()
        self._comparing = 0
        self._comparer = ThreadPoolExecutor(1, "warmroute-compare")
        self._loader = _Mover("warmroute-load", make_stream(), copier.loads)
        self._saver = _Mover("warmroute-save", make_stream(), copier.saves)
        try:
            deadline = time.monotonic() + START_SECONDS
            for mover in (self._loader, self._saver):
                mover.wait_ready(deadline)
        except BaseException:
            self.close()
            raise

    def load(self, jobs: Iterable[LoadJob]) -> None:
        """Begin loads. Returns at once."""
        self._check_process()
        for job in jobs:
            slots = set() if job.refused else {span.slot for span in job.spans}
            with self._changed:
                self._loading.add(job.request_id)
                conflicts = self._slots.read(slots)
            load = _Load(job, self._loader.stream.mark(), time.monotonic(), slots, conflicts)
            self._loader.submit(lambda load=load: self._run_load(load))  # type: ignore[misc]

    def save(self, job: SaveJob) -> None:
        """Begin a save of blocks that are full once the engine's work until now is done. Returns at once."""
        self._check_process()
        slots = {span.slot for span in job.spans}
        with self._changed:
            self._saving.add(job.job)
            conflicts = self._slots.write(slots)
        save = _Save(job, self._saver.stream.mark(), slots, conflicts)
        self._saver.submit(lambda: self._run_save(save))

    def expect_others(self, slots: Iterable[int]) -> None:
        """Somebody else writes to these slots from now on, and answers for their bytes until a save fills them again."""
        self._copier.forget(slots)

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
        """End both threads: the copies under way are finished, everything else is dropped. Whether they ended in time;
        if not, they may still be copying."""
        movers = (self._loader, self._saver)
        for mover in movers:
            mover.stop()
        deadline = time.monotonic() + timeout
        ended = [mover.join(max(0.0, deadline - time.monotonic())) for mover in movers]
        with self._changed:
            compared = self._changed.wait_for(lambda: not self._comparing, max(0.0, deadline - time.monotonic()))
        self._comparer.shutdown(wait=compared)
        return compared and all(ended)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "these transfers belong to the process that made them, whose threads a fork does not take along"
            )

    # ---- on the threads -----------------------------------------------------------------------------------------

    def _run_load(self, load: _Load) -> None:
        bad, damaged, sample = self._copy_in(load)
        with self._changed:
            request_id = load.job.request_id
            self._loading.discard(request_id)
            self._finished.add(request_id)
            if not load.conflicts:
                self._slots.end_read(load.slots)
            self._report.damaged |= damaged
            if bad is not None:
                self._failed.add(request_id)
                self._report.failed_loads[request_id] = bad
            elif sample is not None:
                _keep(self._report.loads, sample)
            self._changed.notify_all()

    def _copy_in(self, load: _Load) -> tuple[set[int] | None, set[int], Sample | None]:
        """The slots that failed, or None (no slot fails when the load was refused or late); those whose bytes are not
        as they were saved; a measurement."""
        if load.job.refused:
            return set(), set(), None
        if load.conflicts:
            _log.error("A load of slots %s that a save still writes is refused: a defect", sorted(load.conflicts))
            return load.conflicts, set(), None
        began = time.monotonic()
        spans, stream = load.job.spans, self._loader.stream
        try:
            bad, damaged = self._copy_batches_in(load, stream)
        except _Abandoned as reason:
            _log.warning("%s; its tokens are computed", reason)
            return set(), set(), None
        except Exception:  # noqa: BLE001 - a failed copy is an outcome, whatever its cause
            _log.exception("Loading KV blocks failed; their tokens are computed")
            return load.slots, set(), None
        if bad:
            return bad, damaged, None
        return None, set(), Sample(self._copier.nbytes(spans), time.monotonic() - began)

    def _copy_batches_in(self, load: _Load, stream: Stream) -> tuple[set[int], set[int]]:
        receipts: list[Receipt] = []
        bad: set[int] = set()
        with _ordered(stream, load.after):
            for batch in self._copier.batches(load.job.spans):
                if time.monotonic() - load.given > load.job.deadline:
                    raise _Abandoned(f"A load took longer than {load.job.deadline:.1f} s")
                if self._loader.stopped:
                    raise _Abandoned("The engine shuts down during a load")
                try:
                    receipts += self._copier.to_cache(batch, stream.handle)
                except Exception as error:  # noqa: BLE001 - whatever its cause, some slots may be innocent of it
                    bad |= self._blame(batch, error, stream, receipts)
                stream.pace()
        damaged = self._copier.damaged(receipts)
        if damaged:
            _log.error("The bytes of %d slots are not those that were saved; their tokens are computed", len(damaged))
        return bad | damaged, damaged

    def _blame(self, batch: Sequence[Span], error: Exception, stream: Stream, receipts: list[Receipt]) -> set[int]:
        """The slots of spans that fail on their own, after a batch of them failed. The others are copied."""
        failed: set[int] = set()
        # What the failed call had enqueued may still write checksums to memory that goes with it.
        stream.finish()
        for span in batch:
            try:
                receipts += self._copier.to_cache([span], stream.handle)
            except Exception as again:  # noqa: BLE001 - as above
                failed.add(span.slot)
                error = again
        _log.error("Loading %d slots failed; their tokens are computed", len(failed), exc_info=error)
        return failed

    def _run_save(self, save: _Save) -> None:
        began = time.monotonic()
        job = save.job
        ok = self._copy_out(save)
        sample = Sample(self._copier.nbytes(job.spans), time.monotonic() - began)
        with self._changed:
            self._saving.discard(job.job)
            if not save.conflicts:
                self._slots.end_write(save.slots)
            if job.job in self._given_up:
                self._given_up.discard(job.job)
                ok = False
            if ok:
                _keep(self._report.saves, sample)
            # Its blocks have been read, which is what the engine may wait for.
            if not (ok and job.compare and self._compare_later(job)):
                self._tell_saved(job, ok=ok)
            self._changed.notify_all()

    def _tell_saved(self, job: SaveJob, *, ok: bool) -> None:
        self._report.saved[job.job] += 1
        if not ok:
            self._report.failed_saves.add(job.job)

    def _compare_later(self, job: SaveJob) -> bool:
        """Whether the save's comparisons will be made, and the save told afterwards."""
        try:
            self._comparer.submit(self._run_compare, job)
        except RuntimeError:  # the engine shuts down
            return False
        self._comparing += 1
        return True

    def _run_compare(self, job: SaveJob) -> None:
        compared: dict[int, float] = {}
        try:
            for each in job.compare:
                if not self._saver.stopped:
                    compared |= self._compare([each])
        except Exception:  # noqa: BLE001 - what cannot be compared was saved all the same
            _log.exception("Comparing chunks with what was computed again failed")
        with self._changed:
            self._comparing -= 1
            self._tell_saved(job, ok=True)
            if compared:
                self._report.compared[job.job] = compared
            self._changed.notify_all()

    def _copy_out(self, save: _Save) -> bool:
        """Whether all blocks are in their slots."""
        if save.conflicts:
            _log.error("A save to slots %s that a transfer still uses is refused: a defect", sorted(save.conflicts))
            return False
        try:
            self._copy_batches_out(save, self._saver.stream)
        except _Abandoned:
            return False
        except Exception:  # noqa: BLE001 - as above
            _log.exception("Saving KV blocks failed; they are not cached")
            return False
        return True

    def _copy_batches_out(self, save: _Save, stream: Stream) -> None:
        receipts: list[Receipt] = []
        with _ordered(stream, save.after):
            for batch in self._copier.batches(save.job.spans):
                if self._saver.stopped or save.job.job in self._given_up:
                    raise _Abandoned
                receipts += self._copier.to_slab(batch, stream.handle)
                stream.pace()
        self._copier.record(receipts)


@contextmanager
def _ordered(stream: Stream, after: Any) -> Iterator[None]:
    """Run copies after a mark; when this ends, failed or not, none of them is under way any more."""
    try:
        stream.begin(after)
        yield
    finally:
        stream.finish()


def _keep(samples: list[Sample], sample: Sample) -> None:
    if len(samples) < MAX_SAMPLES:
        samples.append(sample)


class _Mover:
    """A thread that runs what it is given, in order, with its own side of a copier."""

    def __init__(self, name: str, stream: Stream, lane: Lane) -> None:
        self.stream = stream
        self.stopped = False
        self._lane = lane
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._ready = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait_ready(self, deadline: float) -> None:
        """Return when work can be given; raises what kept the thread from it."""
        with self._wake:
            if not self._wake.wait_for(lambda: self._ready or self._error, max(0.0, deadline - time.monotonic())):
                raise ConnectorError(f"{self._thread.name} was not ready within {START_SECONDS:.0f} s")
            if self._error is not None:
                raise self._error

    def submit(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._work.append(work)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self.stopped = True
            self._work.clear()
            self._wake.notify()

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            roam(on_host=self._lane.on_host)
            self._lane.open()
        except Exception as error:  # noqa: BLE001 - told to whoever waits for the thread
            self._say(error)
            return
        self._say(None)
        while (work := self._next()) is not None:
            work()
        self._lane.close()
        self.stream.close()

    def _say(self, error: Exception | None) -> None:
        with self._wake:
            self._ready, self._error = error is None, error
            self._wake.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._work or self.stopped)
            return None if self.stopped else self._work.popleft()
