"""The worker half of the lower tiers: moves whole chunks between slots and stores, and decides nothing.

Each tier has one thread that fetches and one that writes; the stores read and write in parallel behind them. What is
fetched is verified in its slot before it is reported; a copy that is bad is handed to ``discard``. Every job is answered
exactly once, its time limit after its turn came at the latest, and after the answer nothing touches its slots any more.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from worker_connector.chunk_object import (
    HEADER_BYTES,
    Codec,
    Expected,
    Header,
    ObjectKey,
    Section,
    open_object,
    seal,
)
from worker_connector.errors import BadObject, ConnectorError, StoreUnavailable
from worker_connector.native import Encoding
from worker_connector.plan import Piece, TierJob, TierResult
from worker_connector.tiers.base import Outcome, Sink, Source, Status, Store, pages
from worker_connector.tiers.said import Said

BATCH_PIECES = 16
"""Objects per call of a store: so many headers, and compressed payloads, are in memory at once."""
_DISCARD_SECONDS = 2.0
_PAGE_SECONDS = 10.0

_log = logging.getLogger("vllm.warmroute.tiers")


class Shape(NamedTuple):
    """What this rank's chunks are like. ``partial`` tells of each section whether blocks may be missing of it."""

    identity: bytes
    rank: int
    ranks: int
    layout: str
    dtype: str
    tokens: int
    sections: tuple[Section, ...]
    partial: tuple[bool, ...]
    payload_bytes: int

    def key(self, chunk: bytes) -> ObjectKey:
        """The name of this rank's object of a chunk."""
        groups = sum(1 << section.group for section in self.sections)
        return ObjectKey(self.identity, chunk, self.rank, self.ranks, groups)

    def wanted(self, chunk: bytes) -> Expected:
        """What a fetched object has to be. Of sections that may lack blocks, all may be missing."""
        most = [section.blocks if partly else 0 for section, partly in zip(self.sections, self.partial, strict=True)]
        return self._expected(chunk, most)

    def held(self, piece: Piece) -> Expected:
        """What a slot holds."""
        return self._expected(piece.chunk, piece.missing or [0] * len(self.sections))

    def _expected(self, chunk: bytes, missing: Sequence[int]) -> Expected:
        sections = tuple(
            section._replace(missing=lacking) for section, lacking in zip(self.sections, missing, strict=True)
        )
        sizes = {Encoding.RAW: self.payload_bytes}
        return Expected(self.key(chunk), self.layout, self.dtype, self.tokens, sections, sizes)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One lower tier of this rank: its store, and how objects are written to it. ``ttl`` in seconds, 0 for ever."""

    store: Store
    codec: Codec = field(default_factory=Codec)
    level: int = 1
    ttl: int = 0


class TierMovers:
    """``slots`` is the slab's memory, ``slot_bytes`` each. It must outlive this object."""

    def __init__(self, tiers: Mapping[str, Tier], slots: memoryview, slot_bytes: int, shape: Shape) -> None:
        self._tiers = dict(tiers)
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._shape = shape
        self._changed = threading.Condition()
        self._results: dict[int, TierResult] = {}
        self._fetches = 0
        self._stop = threading.Event()
        self._said = Said()
        self._bad = 0
        self._threads = {
            (name, reads): ThreadPoolExecutor(1, f"warmroute-{name}-{'fetch' if reads else 'write'}")
            for name in tiers
            for reads in (True, False)
        }

    def submit(self, jobs: Iterable[TierJob]) -> None:
        """Begin jobs. Returns at once."""
        for job in jobs:
            fetches = job.kind == "fetch"
            with self._changed:
                self._fetches += fetches
            self._threads[job.tier, fetches].submit(self._run, job)

    @property
    def has_results(self) -> bool:
        """Whether ``take`` has something to hand over. Takes no lock: what ends just now is told in the next step."""
        return bool(self._results)

    def take(self) -> dict[int, TierResult]:
        """Results by job since the last call."""
        with self._changed:
            results, self._results = self._results, {}
        return results

    def take_lost(self) -> dict[str, set[bytes]]:
        """Chunks of this engine that a store gave up by itself since the last call, by tier. After ``take``: what was written
        and lost since then is told in the same report."""
        own, lost = self._shape.identity, {}
        for name, tier in self._tiers.items():
            if units := tier.store.take_lost():
                lost[name] = {unit[len(own) :] for unit in units if unit.startswith(own)}
        return {name: chunks for name, chunks in lost.items() if chunks}

    def wait_for_fetches(self, seconds: float) -> None:
        """Return when a fetch ended or none is under way, after ``seconds`` at the latest."""
        if self._fetches:
            with self._changed:
                self._changed.wait_for(lambda: self._results or not self._fetches, seconds)

    def close(self) -> None:
        """End the threads once what they do is done; what is queued is dropped. Stores are closed."""
        self._stop.set()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        for tier in self._tiers.values():
            tier.store.close()
        for thread in self._threads.values():
            thread.shutdown(wait=True)

    # ---- on the tiers' threads ----------------------------------------------------------------------------------

    def _run(self, job: TierJob) -> None:
        began = time.monotonic()
        result = TierResult()
        try:
            self._do(job, began + job.deadline, result)
        except StoreUnavailable as error:
            _blame(result, job.pieces, error.cause)
        except ConnectorError as error:
            _log.error("Tier %s: %s", job.tier, error)
            _blame(result, job.pieces, "failed")
        except Exception:  # noqa: BLE001 - a failed move is an outcome, whatever its cause
            _log.exception("Tier %s: a %s of %d chunks failed", job.tier, job.kind, len(job.pieces))
            _blame(result, job.pieces, "failed")
        result.seconds = time.monotonic() - began
        with self._changed:
            self._results[job.job] = result
            self._fetches -= job.kind == "fetch"
            self._changed.notify_all()

    def _do(self, job: TierJob, deadline: float, result: TierResult) -> None:
        tier = self._tiers[job.tier]
        if job.kind == "drop":
            self._drop(tier.store, job.pieces, deadline)
            return
        move = self._fetch if job.kind == "fetch" else self._write
        for start in range(0, len(job.pieces), BATCH_PIECES):
            batch = job.pieces[start : start + BATCH_PIECES]
            try:
                move(tier, batch, deadline, result)
            except StoreUnavailable as error:
                _blame(result, job.pieces[start:], error.cause)
                return

    def _fetch(self, tier: Tier, pieces: Sequence[Piece], deadline: float, result: TierResult) -> None:
        headers = [bytearray(HEADER_BYTES) for _ in pieces]
        rooms = [self._slot(piece.slot) for piece in pieces]
        keys = [str(self._shape.key(piece.chunk)) for piece in pieces]
        sinks = [Sink(header, room) for header, room in zip(headers, rooms, strict=True)]
        try:
            outcomes = tier.store.get(keys, sinks, deadline)
        finally:
            for sink in sinks:
                sink.end()
        bad: dict[str, str] = {}
        for piece, key, outcome, header, room in zip(pieces, keys, outcomes, headers, rooms, strict=True):
            if not outcome.ok:
                result.failed[piece.chunk] = _cause(outcome)
                continue
            try:
                found = open_object(header, room, self._shape.wanted(piece.chunk), outcome.size)
            except BadObject as error:
                result.failed[piece.chunk] = "bad"
                bad[key] = str(error)
                continue
            result.nbytes += found.object_bytes
            if any(lacking := _lacking(found)):
                result.missing[piece.chunk] = lacking
        if bad:
            self._discard(tier.store, bad)

    def _write(self, tier: Tier, pieces: Sequence[Piece], deadline: float, result: TierResult) -> None:
        size = self._shape.payload_bytes
        sealed = [
            seal(self._shape.held(piece), self._slot(piece.slot)[:size], tier.codec, ttl=tier.ttl, level=tier.level)
            for piece in pieces
        ]
        sources = [Source(each.header, each.payload) for each in sealed]
        keys = [str(self._shape.key(piece.chunk)) for piece in pieces]
        try:
            outcomes = tier.store.put(keys, sources, deadline, tier.ttl)
        finally:
            for source in sources:
                source.end()
        for piece, outcome, each in zip(pieces, outcomes, sealed, strict=True):
            if outcome.ok:
                result.nbytes += each.size
            else:
                result.failed[piece.chunk] = _cause(outcome)

    def _drop(self, store: Store, pieces: Sequence[Piece], deadline: float) -> None:
        if pieces:
            store.delete([str(self._shape.key(piece.chunk)) for piece in pieces], deadline)
            return
        for page in pages(store, self._stop, _PAGE_SECONDS):
            own = [entry.key for entry in page.entries if self._is_own(entry.key)]
            if own:
                store.delete(own, time.monotonic() + _PAGE_SECONDS)

    def _is_own(self, key: str) -> bool:
        try:
            parsed = ObjectKey.parse(key)
        except ValueError:
            return False
        return parsed == self._shape.key(parsed.chunk)

    def _discard(self, store: Store, bad: Mapping[str, str]) -> None:
        key, reason = next(iter(bad.items()))
        self._bad += len(bad)
        if self._said.anew(store.name):
            _log.error("%s: the copy %s is bad and is discarded: %s (%d so far)", store.name, key, reason, self._bad)
        try:
            store.discard(list(bad), next(iter(bad.values())), time.monotonic() + _DISCARD_SECONDS)
        except StoreUnavailable as error:
            _log.warning("Bad copies stay: %s", error)

    def _slot(self, index: int) -> memoryview:
        start = index * self._slot_bytes
        return self._slots[start : start + self._slot_bytes]


def _blame(result: TierResult, pieces: Iterable[Piece], cause: str) -> None:
    for piece in pieces:
        result.failed.setdefault(piece.chunk, cause)


def _cause(outcome: Outcome) -> str:
    return "missing" if outcome.status is Status.MISSING else outcome.cause or "failed"


def _lacking(header: Header) -> tuple[int, ...]:
    return tuple(section.missing for section in header.sections)
