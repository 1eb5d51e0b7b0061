"""The chunk index: which worker holds which chunk in which tier.

One dictionary from chunk hash to the set of its holders (``router.holders``), cut into 256 *parts* by the first byte of
the hash, so that none is so large that growing it stops the event loop. A worker has a *slot*. ``gpu`` is tier 0, so the
masks of "which workers hold it in gpu" and "which hold it behind the gpu" are one shift apart, and a look-up walks a
prompt's chunks once, for all workers together; where a chunk has the same holders as the one before it, as most have,
nothing is to be done.

Dropping a worker, or clearing a tier, takes effect at once: its bits are *doomed*, never read again, and swept out of
the parts in bounded steps. A slot is given to another worker only after it has been swept.

Memory: a chunk that one worker holds takes some 100 bytes, whatever the number of workers; see docs/performance.md.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

from kv_protocol.digests import SetDigest
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.messages import TIERS
from router.column import PARTS, Column
from router.errors import TooManyChunks
from router.holders import WIDTH, Holders, dense, encode, single, slots_of, tiers_of, with_tiers, without, words_of

_TIER = {name: number for number, name in enumerate(TIERS)}
_COMPACT_PARTS = 8
_COMPACT_ENTRIES = 1024
_SWOLLEN_BYTES = 66
"""Of a dictionary, for each entry. One that only grew has at most 61; one in which entries come and go is doubled in size
whenever its room for new ones is used up, and half of that can be had back."""
_GROUPS = 64
"""Sets of workers asked about that are kept prepared."""


class Hit(NamedTuple):
    """Chunks a worker need not compute: the run in ``gpu`` from the start, and that run continued in other tiers."""

    gpu: int
    total: int


NO_HIT = Hit(0, 0)
_hit: Callable[[tuple[int, int]], Hit] = partial(tuple.__new__, Hit)


class Index:
    """Not thread-safe: everything happens on the event loop, between two awaits."""

    def __init__(self) -> None:
        self._parts: list[dict[bytes, Holders]] = [{} for _ in range(PARTS)]
        self._slots: dict[str, int] = {}
        self._columns: dict[str, tuple[Column, ...]] = {}
        self._limits: dict[str, int] = {}
        self._free: list[int] = []
        self._slot_count = 0
        self._singles: dict[Holders, Holders] = {}
        self._doomed = 0
        self._sweep = _Sweep(0, 0, [])
        self._audit: _Audit | None = None
        self._audited = 0
        self._compacted = 0
        self._groups: dict[tuple[str, ...], _Group] = {}

    def open(self, worker: str, limit: int | None = None) -> None:
        """Give a worker a slot; it holds nothing yet, and may come to hold ``limit`` chunks, each counted once for every
        tier it is in. O(1).

        Raises:
            ValueError: the worker is in the index already.
        """
        if worker in self._slots:
            raise ValueError(f"worker {worker} is in the index already: drop it first")
        slot = self._slots[worker] = self._free.pop() if self._free else self._new_slot()
        singles = [None, *(self._share(single(slot, tiers)) for tiers in range(1, 1 << WIDTH))]
        self._columns[worker] = tuple(Column(slot, number, singles) for number in range(WIDTH))
        if limit is not None:
            self._limits[worker] = limit
        self._groups.clear()

    def drop(self, worker: str) -> None:
        """Forget a worker. O(1) now; its entries are swept later."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        del self._columns[worker]
        self._limits.pop(worker, None)
        self._doom(_slot_mask(slot))

    def stored(self, worker: str, tier: str, chunks: Iterable[bytes]) -> None:
        """Chunks are in a tier. O(chunks), about 0.5 µs each; one known already changes nothing.

        Raises:
            TooManyChunks: the worker holds more than its limit now; whoever hears it drops the worker.
        """
        column = self._column(worker, tier)
        parts, grown, slot, bit = self._parts, column.grown, column.slot, column.bit
        fresh: list[bytes] = []
        for chunk in chunks:
            part = parts[chunk[0]]
            held = part.get(chunk)
            # Alone with it before, alone with it after: the usual case.
            after = grown.get(held) or with_tiers(held, slot, bit)  # type: ignore[arg-type] # None is in grown
            if after != held:
                part[chunk] = after
                fresh.append(chunk)
        column.add(fresh)
        if worker in self._limits and self.size(worker) > self._limits[worker]:
            raise TooManyChunks(f"more than {self._limits[worker]:,} chunks")

    def removed(self, worker: str, tier: str, chunks: Iterable[bytes]) -> None:
        """Chunks left a tier. O(chunks), about 0.5 µs each; one not known changes nothing."""
        column = self._column(worker, tier)
        parts, shrunk, singles = self._parts, column.shrunk, self._singles
        gone: list[bytes] = []
        for chunk in chunks:
            part = parts[chunk[0]]
            held = part.get(chunk)
            if held is None:
                continue
            after = shrunk[held] if held in shrunk else without(held, column.mask)
            if after == held:
                continue
            _put(part, chunk, after, singles)
            gone.append(chunk)
        column.discard(gone)

    def cleared(self, worker: str, tier: str) -> None:
        """A tier was emptied. O(1) now; its entries are swept later, at the latest by the next change to the tier."""
        if worker not in self._slots or tier not in _TIER:
            return
        column = self._columns[worker][_TIER[tier]]
        if column.count:
            column.clear()
            self._doom(column.mask)

    def is_swept(self, worker: str) -> bool:
        """Whether no entry is left from a tier that was cleared. O(1)."""
        return worker not in self._slots or not self._doomed & _slot_mask(self._slots[worker])

    def sweep(self, entries: int) -> bool:
        """Remove doomed bits from at most ``entries`` entries; whether some are left. O(entries)."""
        if not self._sweep.bits:
            if not self._doomed:
                return False
            self._sweep = _Sweep(self._doomed, -1, [])
        self._sweep_some(entries)
        return bool(self._doomed)

    def lookup(self, hashes: Iterable[bytes], workers: Sequence[str], tokens: int = 1) -> dict[str, Hit]:
        """Every worker's hit for a prompt's chunks, each counted as so many tokens. Workers not in the index have no hit.

        O(workers + chunks of the longest hit + changes of holders along it · workers): about 0.1 µs per chunk that is
        held like the one before it, and 0.5 µs more at 16 workers, 1 µs at 1,000, for one that is not. What depends on
        the workers alone is kept for sets of workers asked about again.
        """
        key = tuple(workers)
        group = self._groups.get(key) or self._prepare(key)
        hits = group.misses.copy()
        gpu, behind, parts = group.gpu, group.behind, self._parts
        since = dict.fromkeys(slots_of(behind), 0) if behind else {}
        last: Holders | None = 0
        depth = 0  # in tokens
        for chunk in hashes:
            held = parts[chunk[0]].get(chunk)
            if held != last:
                if held is None:
                    break
                mask = held if type(held) is int else dense(held)
                if group.hidden:
                    mask &= ~group.hidden
                # Mostly all stay, and those behind the gpu in the cpu tier.
                out = mask >> 1 & behind ^ behind if behind else 0
                if out or gpu & mask != gpu:
                    gpu, behind = _part_ways(group.names, hits, since, depth, gpu, behind, mask, out)
                    if not gpu and not behind:
                        return hits
                last = held
            depth += tokens
        if depth:
            _finish(group.names, hits, since, depth, gpu, behind)
        return hits

    def tiers(self, worker: str, hashes: Sequence[bytes]) -> dict[str, int]:
        """A worker's hit as chunks by the fastest tier each would come from. O(chunks)."""
        counts = dict.fromkeys(TIERS, 0)
        slot = self._slots.get(worker)
        if slot is None:
            return counts
        hit = self.lookup(hashes, [worker])[worker]
        counts["gpu"] = hit.gpu
        hidden = self._doomed >> slot * WIDTH
        for chunk in islice(hashes, hit.gpu, hit.total):
            held = (tiers_of(self._parts[chunk[0]][chunk], slot) & ~hidden) >> 1
            counts[TIERS[(held & -held).bit_length()]] += 1
        return counts

    def verify(self, worker: str, digests: dict[str, SetDigest]) -> list[str]:
        """Compare a worker's own digests with the running ones kept of it; the tiers that differ, best none. O(1).
        That the running ones are those of the contents is what ``audit`` looks after."""
        return [
            tier
            for tier, column in zip(TIERS, self._columns[worker], strict=True)
            if not _agree(column, digests.get(tier))
        ]

    def audit(self, entries: int) -> list[str]:
        """Recount about ``entries`` entries; the workers of which not as many chunks are there as were counted in.

        The parts are recounted in turn, each as it was at one moment. O(entries), and O(workers) where a part begins.
        """
        wrong: set[str] = set()
        while entries > 0:
            if self._audit is None:
                self._audit = self._begin_audit(self._audited)
                entries -= len(self._columns) + 1
            taken = self._audit.count(entries)
            entries -= taken
            if not self._audit.values:
                wrong |= self._audit.wrong(self._columns)
                self._audit = None
                self._audited = (self._audited + 1) % PARTS
                if not self._audited:
                    break
        return sorted(wrong)

    def compact(self) -> None:
        """Make the next part smaller that chunks coming and going have swollen, if one of the next few is. O(entries of
        one part): below 2 ms at 10 million entries."""
        for _ in range(_COMPACT_PARTS):
            self._compacted = (self._compacted + 1) % PARTS
            part = self._parts[self._compacted]
            if len(part) >= _COMPACT_ENTRIES and sys.getsizeof(part) > _SWOLLEN_BYTES * len(part):
                self._parts[self._compacted] = dict(part)
                return

    @property
    def audited(self) -> int:
        """Parts recounted in the present round, of 256. O(1)."""
        return self._audited

    def size(self, worker: str) -> int:
        """Chunks held, each counted once for every tier it is in. O(1)."""
        return sum(column.count for column in self._columns[worker]) if worker in self._columns else 0

    def sizes(self, worker: str) -> dict[str, int]:
        """Chunks held, by tier. O(1)."""
        if worker not in self._columns:
            return dict.fromkeys(TIERS, 0)
        return {tier: column.count for tier, column in zip(TIERS, self._columns[worker], strict=True)}

    def contents(self, worker: str) -> dict[str, set[bytes]]:
        """Every chunk a worker holds, by tier. O(entries)."""
        held: dict[str, set[bytes]] = {tier: set() for tier in TIERS}
        slot = self._slots.get(worker)
        if slot is None:
            return held
        hidden = self._doomed >> slot * WIDTH
        for part in self._parts:
            for chunk, holders in part.items():
                bits = tiers_of(holders, slot) & ~hidden
                for number, tier in enumerate(TIERS):
                    if bits >> number & 1:
                        held[tier].add(chunk)
        return held

    def __len__(self) -> int:
        """Entries: chunks that some worker holds, and doomed ones not swept yet. O(1)."""
        return sum(map(len, self._parts))

    def check(self) -> None:
        """Verify every invariant. O(entries · holders).

        Raises:
            AssertionError: one does not hold; the text names it.
        """
        slots = list(self._slots.values())
        assert len(set(slots)) == len(slots), "two workers share a slot"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not set(slots) & set(self._free), "a free slot is in use"
        assert all(slot < self._slot_count for slot in slots + self._free), "a slot was never given out"
        assert self._columns.keys() == self._slots.keys(), "a worker has a slot and no columns, or columns and no slot"
        free = sum(_slot_mask(slot) for slot in self._free)
        assert not self._doomed & free, "a free slot is doomed"
        assert not self._sweep.bits & ~self._doomed, "a bit is swept that is not doomed"
        owned = sum(_slot_mask(slot) for slot in slots) | self._doomed
        holdings: dict[int, list[tuple[bytes, int]]] = {}
        for number, part in enumerate(self._parts):
            for chunk, held in part.items():
                assert len(chunk) == HASH_BYTES, "a chunk hash has 16 bytes"
                assert chunk[0] == number, "a chunk is in the wrong part"
                assert held, "an entry without a holder was kept"
                assert encode(words_of(held)) == held, "a set is not in its one form"
                assert not dense(held) & ~owned, "an entry names a slot nobody has"
                for word in words_of(held):
                    holdings.setdefault(word >> WIDTH, []).append((chunk, word))
        for worker, slot in self._slots.items():
            hidden = self._doomed >> slot * WIDTH
            for column in self._columns[worker]:
                assert column.slot == slot, f"a column of {worker} is another slot's"
                shown = column.bit & ~hidden
                column.check([chunk for chunk, word in holdings.get(slot, ()) if word & shown])
        for key, group in self._groups.items():
            assert group == self._group(key), "what is kept of a set of workers is out of date"

    def _new_slot(self) -> int:
        self._slot_count += 1
        return self._slot_count - 1

    def _share(self, held: Holders) -> Holders:
        """The one object kept for a set of one holder, of which there are millions of uses. Bounded by the slots."""
        return self._singles.setdefault(held, held)

    def _column(self, worker: str, tier: str) -> Column:
        column = self._columns[worker][_TIER[tier]]
        while self._doomed & column.mask:
            self.sweep(1 << 30)
        return column

    def _doom(self, bits: int) -> None:
        self._doomed |= bits
        self._groups.clear()

    def _prepare(self, key: tuple[str, ...]) -> "_Group":
        if len(self._groups) >= _GROUPS:
            self._groups.clear()
        group = self._groups[key] = self._group(key)
        return group

    def _group(self, key: tuple[str, ...]) -> "_Group":
        names = {self._slots[worker]: worker for worker in key if worker in self._slots}
        every = sum(1 << slot * WIDTH for slot in names)
        gpu = every & ~self._doomed
        hidden = self._doomed & every * ((1 << WIDTH) - 1)
        return _Group(dict.fromkeys(key, NO_HIT), names, gpu, every ^ gpu, hidden)

    def _sweep_some(self, entries: int) -> None:
        sweep = self._sweep
        while entries > 0:
            if not sweep.pending:
                if sweep.part + 1 == PARTS:
                    self._finish_sweep()
                    return
                sweep = self._sweep = _Sweep(sweep.bits, sweep.part + 1, list(self._parts[sweep.part + 1]))
                entries -= 1
                continue
            chunks = sweep.pending[-entries:]
            del sweep.pending[-entries:]
            entries -= len(chunks)
            _strip(self._parts[sweep.part], chunks, sweep.bits, self._singles)

    def _finish_sweep(self) -> None:
        self._doomed &= ~self._sweep.bits
        self._groups.clear()
        used = set(self._slots.values()) | set(self._free)
        swept = [s for s in range(self._slot_count) if s not in used and not self._doomed & _slot_mask(s)]
        # The lowest are given out first: they make the smallest sets.
        self._free = sorted(self._free + swept, reverse=True)
        self._sweep = _Sweep(0, 0, [])

    def _begin_audit(self, part: int) -> "_Audit":
        expected = {
            (column.slot, number): column.counts[part]
            for columns in self._columns.values()
            for number, column in enumerate(columns)
        }
        return _Audit(list(self._parts[part].values()), self._doomed, expected)


class _Group(NamedTuple):
    """What a look-up needs to know of the workers it is for: the result if nobody has a hit, the workers by slot, who
    starts in gpu and who behind it because its gpu tier is doomed, and the doomed bits of them all."""

    misses: dict[str, Hit]
    names: dict[int, str]
    gpu: int
    behind: int
    hidden: int


class _Sweep(NamedTuple):
    """A pass over all parts: the bits it removes, the part it is in, the entries still to visit there."""

    bits: int
    part: int
    pending: list[bytes]


class _Audit:
    """A recount of one part as it was: holders of the entries still to count, and what was counted in by (slot, tier)."""

    def __init__(self, values: list[Holders], doomed: int, expected: dict[tuple[int, int], int]) -> None:
        self.values = values
        self._doomed = doomed
        self._left = expected

    def count(self, entries: int) -> int:
        """Count some of them; how many."""
        taken = self.values[-entries:]
        del self.values[-entries:]
        left = self._left
        for held in taken:
            shown = without(held, self._doomed) if self._doomed else held
            for word in words_of(shown) if shown is not None else ():
                for number in range(WIDTH):
                    if word >> number & 1:
                        key = word >> WIDTH, number
                        left[key] = left.get(key, 0) - 1
        return len(taken)

    def wrong(self, columns: dict[str, tuple[Column, ...]]) -> set[str]:
        """The workers, of those there are now, that were not counted right."""
        slots = {slot for (slot, _), left in self._left.items() if left}
        return {worker for worker, (first, *_) in columns.items() if first.slot in slots}


def _agree(column: Column, digest: SetDigest | None) -> bool:
    return column.take() == digest if digest is not None else not column.count


def _slot_mask(slot: int) -> int:
    return ((1 << WIDTH) - 1) << slot * WIDTH


def _put(part: dict[bytes, Holders], chunk: bytes, held: Holders | None, singles: dict[Holders, Holders]) -> None:
    if held is None:
        del part[chunk]
    else:
        part[chunk] = singles.get(held, held)


def _strip(part: dict[bytes, Holders], chunks: list[bytes], bits: int, singles: dict[Holders, Holders]) -> None:
    seen: dict[Holders, Holders | None] = {}
    for chunk in chunks:
        held = part.get(chunk)
        if held is None:
            continue
        if held not in seen:
            seen[held] = without(held, bits)
        if seen[held] != held:
            _put(part, chunk, seen[held], singles)


def _part_ways(  # noqa: PLR0917 - the state of a walk, called for each step of it
    names: dict[int, str],
    hits: dict[str, Hit],
    since: dict[int, int],
    depth: int,
    gpu: int,
    behind: int,
    mask: int,
    out: int,
) -> tuple[int, int]:
    """Take note of who does not hold the chunk at ``depth`` as it held those before; who still has everything in gpu,
    and who left gpu (``since`` tells where) and has had everything behind it ever since. Masks use gpu bits."""
    fallen = gpu & mask ^ gpu
    if out:
        out ^= out & (mask >> 2 | mask >> 3)
        behind ^= out
        if depth and out:
            _finish_behind(names, hits, since, depth, out)
    if fallen:
        gpu ^= fallen
        later = fallen & (mask >> 1 | mask >> 2 | mask >> 3)
        if later:
            since.update(dict.fromkeys(slots_of(later), depth))
            behind |= later
        if depth and fallen != later:
            _finish_gpu(names, hits, depth, fallen ^ later)
    return gpu, behind


def _finish(  # noqa: PLR0917 - as above
    names: dict[int, str], hits: dict[str, Hit], since: dict[int, int], depth: int, gpu: int, behind: int
) -> None:
    if gpu:
        _finish_gpu(names, hits, depth, gpu)
    if behind:
        _finish_behind(names, hits, since, depth, behind)


def _finish_gpu(names: dict[int, str], hits: dict[str, Hit], depth: int, gpu: int) -> None:
    hit = _hit((depth, depth))
    for slot in slots_of(gpu):
        hits[names[slot]] = hit


def _finish_behind(names: dict[int, str], hits: dict[str, Hit], since: dict[int, int], depth: int, out: int) -> None:
    made: dict[int, Hit] = {}
    for slot in slots_of(out):
        gpu = since[slot]
        hits[names[slot]] = made.get(gpu) or made.setdefault(gpu, _hit((gpu, depth)))
