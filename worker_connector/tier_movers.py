"""The worker half of the lower tiers: moves chunks and tails between slots and stores, and decides nothing.

Each tier has one thread that fetches and one that writes; the stores read and write in parallel behind them. What is
fetched is verified in its slot before it is reported, by the store's thread that read it, while others still read; a copy
that is bad is handed to ``discard``. Every job is answered exactly once, its time limit after its turn came at the latest,
and after the answer nothing touches its slots any more.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from kv_protocol.identity import in_generation
from worker_connector.chunk_object import (
    HEADER_BYTES,
    Check,
    Codec,
    Expected,
    Header,
    ObjectKey,
    Sealed,
    Section,
    read_header,
    seal,
    unpack,
    unpack_in_place,
    verify,
)
from worker_connector.codecs import LOSSLESS
from worker_connector.compression import Compression
from worker_connector.errors import (
    BadObject,
    ConfigurationError,
    ConnectorError,
    Corrupt,
    Incompressible,
    StoreUnavailable,
)
from worker_connector.native import Encoding
from worker_connector.pins_below import Keeper
from worker_connector.plan import Piece, TierJob, TierResult
from worker_connector.slot_codec import SlotCodec
from worker_connector.tails import Runs, gather, spread, tail_identity, tail_shape
from worker_connector.tier_figures import state_of
from worker_connector.tiers.base import Outcome, Sink, Source, Status, Store, pages
from worker_connector.tiers.said import Said

BATCH_PIECES = 128
"""Objects per call of a store: so many headers are in memory at once. Between two calls a store has nothing to do."""
MADE_BYTES = 64 << 20
"""Payloads that are encoded or compressed ahead of a call of a store, unless that is less than four."""
_OF_USE_TO_OTHERS = frozenset({Check.CODEC, Check.LAYOUT})
_DISCARD_SECONDS = 2.0
_EVERYTHING = (Piece(b"", -1),)
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

    def of(self, generation: str) -> "Shape":
        """The same of a generation of weights."""
        return self._replace(identity=in_generation(self.identity, generation))

    def key(self, chunk: bytes) -> ObjectKey:
        """The name of this rank's object of a chunk."""
        groups = sum(1 << section.group for section in self.sections)
        return ObjectKey(self.identity, chunk, self.rank, self.ranks, groups)

    def wanted(self, chunk: bytes, packed: Mapping[Encoding, int] | None = None) -> Expected:
        """What a fetched object has to be; ``packed`` is the size of its packed form in each encoding other than raw that is
        read. Of sections that may lack blocks, all may be missing."""
        most = [section.blocks if partly else 0 for section, partly in zip(self.sections, self.partial, strict=True)]
        return self._expected(chunk, most, packed)

    def held(self, piece: Piece, packed: Mapping[Encoding, int] | None = None) -> Expected:
        """What a slot holds."""
        return self._expected(piece.chunk, piece.missing or [0] * len(self.sections), packed)

    def _expected(self, chunk: bytes, missing: Sequence[int], packed: Mapping[Encoding, int] | None) -> Expected:
        sections = tuple(
            section._replace(missing=lacking) for section, lacking in zip(self.sections, missing, strict=True)
        )
        sizes = {**(packed or {}), Encoding.RAW: self.payload_bytes}
        return Expected(self.key(chunk), self.layout, self.dtype, self.tokens, sections, sizes)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One lower tier of this rank: its store, and how objects are written to it. ``ttl`` in seconds, 0 for ever.
    ``takes_lossy``: also what others wrote there in a lossy encoding is read."""

    store: Store
    codec: Codec = field(default_factory=Codec)
    takes_lossy: bool = False
    level: int = 1
    ttl: int = 0


class _Examination:
    """What is to become of an object that is fetched into ``block`` and ``room``."""

    def __init__(self, movers: "TierMovers", name: str, piece: Piece, room: memoryview) -> None:
        self.block = bytearray(HEADER_BYTES)
        self.room = room
        self._movers = movers
        self._name = name
        self._piece = piece

    def examine(self, size: int) -> Header | Exception:
        """The header of an object that may be used, or why it may not."""
        try:
            return self._movers.open(self._name, self._piece, self.block, self.room, size)
        except Exception as error:  # noqa: BLE001 - told on the tier's thread, whatever it is
            return error


class TierMovers:
    """``slots`` is the slab's memory, ``slot_bytes`` each; it must outlive this object. ``slot_codec`` has the encodings that
    suit this engine, None where only raw chunks are read and written; it is closed with this object. ``runs`` tells where the
    blocks lie in a slot; without it there are no tails.

    Raises:
        ConfigurationError: a tier's codec does not suit this engine.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        slots: memoryview,
        slot_bytes: int,
        shape: Shape,
        slot_codec: SlotCodec | None = None,
        *,
        runs: Runs | None = None,
    ) -> None:
        self._runs = runs
        packed = slot_codec.packed_bytes if slot_codec is not None else {}
        for name, tier in tiers.items():
            if slot_codec is not None:
                slot_codec.check(tier.codec.encoding, f"{name}_codec")
            elif tier.codec.encoding is not Encoding.RAW:
                raise ConfigurationError(f"{name}_codec is {tier.codec}, and nothing is known of what a slot holds")
        self._codec = slot_codec
        self._readable = {
            name: {kind: size for kind, size in packed.items() if kind in LOSSLESS or tier.takes_lossy}
            for name, tier in tiers.items()
        }
        self._unread: set[str] = set()
        self._rooms: dict[tuple[str, int], bytearray] = {}
        self._spare: list[bytearray] = []
        self._tiers = dict(tiers)
        self._keepers = {name: Keeper() for name in tiers}
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._shape = shape
        self._generation = ""
        self._changed = threading.Condition()
        self._results: dict[int, TierResult] = {}
        self._fetches = 0
        self._stop = threading.Event()
        self._said = Said()
        self._bad: Counter[str] = Counter()
        self._threads = {
            (name, reads): ThreadPoolExecutor(1, f"warmroute-{name}-{'fetch' if reads else 'write'}")
            for name in tiers
            for reads in (True, False)
        }

    def submit(self, jobs: Iterable[TierJob]) -> None:
        """Begin jobs. Returns at once."""
        for job in jobs:
            self._generation = job.generation
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
        """Chunks of this engine's generation that a store gave up by itself since the last call, by tier. After ``take``: what was written
        and lost since then is told in the same report."""
        own, lost = self._shape.of(self._generation).identity, {}
        both = (own, tail_identity(own))
        for name, tier in self._tiers.items():
            if units := tier.store.take_lost():
                lost[name] = {unit[len(own) :] for unit in units if unit.startswith(both)}
        return {name: chunks for name, chunks in lost.items() if chunks}

    def stores(self) -> dict[str, dict[str, Any]]:
        """Each tier's state on this rank."""
        return {name: state_of(tier.store) for name, tier in self._tiers.items()}

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
        if self._codec is not None:
            self._codec.close()

    # ---- on the tiers' threads ----------------------------------------------------------------------------------

    def _run(self, job: TierJob) -> None:
        began = time.monotonic()
        result = TierResult()
        try:
            self._of(job.generation)._do(job, began + job.deadline, result)  # noqa: SLF001 - its own kind
        except StoreUnavailable as error:
            _blame(result, job.pieces or _EVERYTHING, error.cause)
        except ConnectorError as error:
            _log.error("Tier %s: %s", job.tier, error)
            _blame(result, job.pieces or _EVERYTHING, "failed")
        except Exception:  # noqa: BLE001 - a failed move is an outcome, whatever its cause
            _log.exception("Tier %s: a %s of %d chunks failed", job.tier, job.kind, len(job.pieces))
            _blame(result, job.pieces or _EVERYTHING, "failed")
        if job.kind == "drop" and result.failed and self._said.anew(f"drop {job.tier}"):
            _log.error(
                "Tier %s: %s could not be deleted (%s): nothing of that is fetched until it is, which is tried again",
                job.tier,
                f"{len(result.failed)} chunks" if job.pieces else "everything",
                next(iter(result.failed.values())),
            )
        result.seconds = time.monotonic() - began
        with self._changed:
            self._results[job.job] = result
            self._fetches -= job.kind == "fetch"
            self._changed.notify_all()

    def _do(self, job: TierJob, deadline: float, result: TierResult) -> None:
        tier = self._tiers[job.tier]
        if job.kind == "drop":
            self._drop(tier.store, job.pieces, deadline, result)
            return
        if job.kind in ("pin", "unpin"):
            keep = self._keepers[job.tier].pin if job.kind == "pin" else self._keepers[job.tier].unpin
            keep(tier.store, [str(self._shape.key(piece.chunk)) for piece in job.pieces])
            return
        move = self._fetch if job.kind == "fetch" else self._write
        most = self._at_once(job.kind, tier)
        for start in range(0, len(job.pieces), most):
            batch = job.pieces[start : start + most]
            try:
                move(job.tier, batch, deadline, result)
            except StoreUnavailable as error:
                _blame(result, job.pieces[start:], error.cause)
                return

    def _of(self, generation: str) -> Self:
        """These movers, which share everything but what objects are called."""
        movers = copy(self)
        movers._shape = self._shape.of(generation)  # noqa: SLF001 - its own kind
        return movers

    def _at_once(self, kind: str, tier: Tier) -> int:
        if kind == "fetch" or tier.codec == Codec():
            return BATCH_PIECES
        return min(BATCH_PIECES, max(4, MADE_BYTES // self._shape.payload_bytes))

    def _fetch(self, name: str, pieces: Sequence[Piece], deadline: float, result: TierResult) -> None:
        store = self._tiers[name].store
        keys = [self._key(piece) for piece in pieces]
        examinations = [_Examination(self, name, piece, self._slot(piece.slot)) for piece in pieces]
        sinks = [Sink(each.block, each.room, examine=each.examine) for each in examinations]
        try:
            outcomes = store.get(keys, sinks, deadline)
        finally:
            for sink in sinks:
                sink.end()
        unfit: dict[str, BadObject] = {}
        for piece, key, outcome, sink, each in zip(pieces, keys, outcomes, sinks, examinations, strict=True):
            if not outcome.ok:
                result.failed[piece.chunk] = _cause(outcome)
                continue
            found = sink.finding or each.examine(outcome.size)
            if isinstance(found, Header):
                _accept(result, piece.chunk, found)
            elif isinstance(found, BadObject):
                result.failed[piece.chunk] = self._fault(name, found)
                unfit[key] = found
            elif isinstance(found, Exception):
                raise found
        if unfit:
            self._clear_away(store, unfit)

    def _clear_away(self, store: Store, unfit: Mapping[str, BadObject]) -> None:
        """Have nobody meet again what is of use to nobody: bad copies, and those that have expired."""
        if expired := [key for key, error in unfit.items() if error.check is Check.EXPIRED]:
            with suppress(StoreUnavailable):
                store.delete(expired, time.monotonic() + _DISCARD_SECONDS)
        kept = {Check.EXPIRED, *_OF_USE_TO_OTHERS}
        if bad := {key: str(error) for key, error in unfit.items() if error.check not in kept}:
            self._discard(store, bad)

    def open(self, name: str, piece: Piece, block: bytearray, room: memoryview, size: int) -> Header:
        """The header of an object that was read into ``block`` and ``room``, which is then its slot's raw content. On any
        thread.

        Raises:
            BadObject: nothing of it may be used.
        """
        if piece.tokens:
            return self._open_tail(piece, block, room, size)
        wanted = self._shape.wanted(piece.chunk, self._readable[name])
        header = read_header(block)
        verify(header, wanted, size)
        if header.codec.encoding is Encoding.RAW or self._codec is None:
            unpack_in_place(header, room)
            return header
        packed = unpack(header, room)
        try:
            if header.codec.compression is not Compression.NONE:
                self._codec.decode(packed, room, _lacking(header), header.codec.encoding)
            else:
                with self._aside(packed) as aside:
                    self._codec.decode(aside, room, _lacking(header), header.codec.encoding)
        except Corrupt as error:
            raise BadObject(Check.DECODING, str(error)) from error
        return header

    def _open_tail(self, piece: Piece, block: bytearray, room: memoryview, size: int) -> Header:
        shape, runs = self._shape_of(piece), self._runs
        assert runs is not None, "a tail has a shape where it has places only"
        header = read_header(block)
        verify(header, shape.wanted(piece.chunk), size)
        unpack_in_place(header, room)
        spread(room, runs, [section.blocks for section in shape.sections])
        return header

    def _shape_of(self, piece: Piece) -> Shape:
        """What a piece's object is like.

        Raises:
            Corrupt: it is a tail that this engine cannot have.
        """
        if not piece.tokens:
            return self._shape
        if self._runs is None:
            raise Corrupt("a tail is to be moved, and nothing is known of where blocks lie in a slot")
        try:
            return tail_shape(self._shape, piece.tokens)
        except ValueError as error:
            raise Corrupt(f"there is no such tail: {error}") from error

    def _key(self, piece: Piece) -> str:
        return str(self._shape_of(piece).key(piece.chunk))

    @contextmanager
    def _aside(self, packed: memoryview) -> Iterator[memoryview]:
        """A copy, in memory that is used again; there is as much of it as threads decode at once."""
        with self._changed:
            room = self._spare.pop() if self._spare else bytearray()
        if len(room) < packed.nbytes:
            room = bytearray(packed.nbytes)
        aside = memoryview(room)[: packed.nbytes]
        np.copyto(np.frombuffer(aside, np.uint8), np.frombuffer(packed, np.uint8))
        try:
            yield aside
        finally:
            with self._changed:
                self._spare.append(room)

    def _fault(self, name: str, error: BadObject) -> str:
        """A word for an object that is not used. One that has expired counts as missing: not every store deletes it itself."""
        if error.check is Check.EXPIRED:
            return "missing"
        if error.check not in _OF_USE_TO_OTHERS:
            return "bad"
        if name not in self._unread:
            self._unread.add(name)
            _log.warning(
                "Tier %s has objects of engines with other settings, which this one does not read and computes instead: "
                "%s. To take lossy ones from an exact tier, set accept_lossy",
                name,
                error,
            )
        return str(error.check)

    def _write(self, name: str, pieces: Sequence[Piece], deadline: float, result: TierResult) -> None:
        tier = self._tiers[name]
        sources = [self._source(name, piece, number, result) for number, piece in enumerate(pieces)]
        keys = [self._key(piece) for piece in pieces]
        try:
            outcomes = tier.store.put(keys, sources, deadline, tier.ttl)
        finally:
            for source in sources:
                source.end()
        for piece, outcome, source in zip(pieces, outcomes, sources, strict=True):
            if outcome.ok:
                result.nbytes += source.size
            else:
                result.failed[piece.chunk] = _cause(outcome)

    def _source(self, name: str, piece: Piece, number: int, result: TierResult) -> Source:
        """The object of a slot, the ``number``-th of its call of the store. What is stored as it is gets its header, for which
        all of it is read, when the store's turn comes to it."""
        tier, slot = self._tiers[name], self._slot(piece.slot)
        if piece.tokens:
            sealed = self._seal_tail(name, piece, number)
            return Source(sealed.header, sealed.payload)
        if tier.codec != Codec():
            sealed = self._seal(name, piece, number, result)
            return Source(sealed.header, sealed.payload)
        header, payload = bytearray(HEADER_BYTES), slot[: self._shape.payload_bytes]
        held = self._shape.held(piece)

        def prepare() -> None:
            header[:] = seal(held, payload, tier.codec, ttl=tier.ttl).header

        return Source(header, payload, prepare=prepare)

    def _seal(self, name: str, piece: Piece, number: int, result: TierResult) -> Sealed:
        """The encoded or compressed object of a slot."""
        tier, slot = self._tiers[name], self._slot(piece.slot)
        kind, compression = tier.codec
        held, options = self._shape.held(piece), {"ttl": tier.ttl, "level": tier.level}
        if kind is not Encoding.RAW and self._codec is not None:
            held = self._shape.held(piece, self._codec.packed_bytes)
            room = self._room(f"{name} write", number, self._codec.packed_bytes[kind])
            try:
                self._codec.encode(slot, piece.missing, kind, room)
                return seal(held, room, tier.codec, **options)
            except Incompressible:
                result.incompressible += 1
        return seal(held, slot[: self._shape.payload_bytes], Codec(Encoding.RAW, compression), **options)

    def _seal_tail(self, name: str, piece: Piece, number: int) -> Sealed:
        """The object of a tail: raw, whatever the tier's encoding, since that is not for parts of slots."""
        tier, shape, runs = self._tiers[name], self._shape_of(piece), self._runs
        assert runs is not None, "a tail has a shape where it has places only"
        room = self._room(f"{name} tail", number, shape.payload_bytes)
        gather(self._slot(piece.slot), runs, [section.blocks for section in shape.sections], room)
        codec = Codec(Encoding.RAW, tier.codec.compression)
        return seal(shape.held(piece), room, codec, ttl=tier.ttl, level=tier.level)

    def _room(self, use: str, number: int, size: int) -> memoryview:
        """Memory of one thread that is used again: to touch so much for the first time costs more than to fill it."""
        room = self._rooms.get((use, number))
        if room is None or len(room) < size:
            room = self._rooms[use, number] = bytearray(size)
        return memoryview(room)[:size]

    def _drop(self, store: Store, pieces: Sequence[Piece], deadline: float, result: TierResult) -> None:
        if pieces:
            outcomes = store.delete([self._key(piece) for piece in pieces], deadline)
            kept = [(piece, each) for piece, each in zip(pieces, outcomes, strict=True) if _is_kept(each)]
            result.failed.update((piece.chunk, _cause(each)) for piece, each in kept)
            return
        for page in pages(store, self._stop, _PAGE_SECONDS):
            own = [entry.key for entry in page.entries if self._is_own(entry.key)]
            gone = store.delete(own, time.monotonic() + _PAGE_SECONDS) if own else []
            result.failed.update((b"", _cause(outcome)) for outcome in gone if _is_kept(outcome))

    def _is_own(self, key: str) -> bool:
        try:
            parsed = ObjectKey.parse(key)
        except ValueError:
            return False
        own = self._shape.key(parsed.chunk)
        return parsed in (own, own._replace(identity=tail_identity(own.identity)))

    def _discard(self, store: Store, bad: Mapping[str, str]) -> None:
        key, reason = next(iter(bad.items()))
        self._bad[store.name] += len(bad)
        if self._said.anew(store.name):
            _log.error(
                "%s: the copy %s is bad and is discarded: %s (%d so far)",
                store.name,
                key,
                reason,
                self._bad[store.name],
            )
        try:
            store.discard(list(bad), next(iter(bad.values())), time.monotonic() + _DISCARD_SECONDS)
        except StoreUnavailable as error:
            _log.warning("Bad copies stay: %s", error)

    def _slot(self, index: int) -> memoryview:
        start = index * self._slot_bytes
        return self._slots[start : start + self._slot_bytes]


def _accept(result: TierResult, chunk: bytes, found: Header) -> None:
    result.nbytes += found.object_bytes
    if any(lacking := _lacking(found)):
        result.missing[chunk] = lacking
    if not found.codec.is_lossless:
        result.lossy.add(chunk)


def _blame(result: TierResult, pieces: Iterable[Piece], cause: str) -> None:
    for piece in pieces:
        result.failed.setdefault(piece.chunk, cause)


def _is_kept(outcome: Outcome) -> bool:
    """Whether an object that was to be deleted may still be there."""
    return not outcome.ok and outcome.status is not Status.MISSING


def _cause(outcome: Outcome) -> str:
    return "missing" if outcome.status is Status.MISSING else outcome.cause or "failed"


def _lacking(header: Header) -> tuple[int, ...]:
    return tuple(section.missing for section in header.sections)
