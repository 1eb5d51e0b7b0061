"""The chunk index: which worker holds which chunk in which tier.

One dictionary from chunk hash to a bit mask, split into the 16 partitions of ``kv_protocol.digests``. A worker has a
*slot*; in a mask, bit ``slot * 4 + tier`` says that the slot's worker holds the chunk in that tier. ``gpu`` is tier 0,
so the masks of "which workers hold it in gpu" and "which hold it behind the gpu" are one shift apart, and a lookup
walks a prompt's chunks once, for all workers together.

Dropping a worker, or clearing a tier, takes effect at once: its bits are *doomed*, never read again, and swept out of
the dictionaries in bounded steps. A slot is given to another worker only after it has been swept.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from kv_protocol.digests import PARTITIONS, RunningDigest, SetDigest, partition_of, xor_of
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.messages import TIERS

_WIDTH = len(TIERS)
_TIER = {name: number for number, name in enumerate(TIERS)}


class Hit(NamedTuple):
    """Chunks a worker need not compute: the run in ``gpu`` from the start, and that run continued in other tiers."""

    gpu: int
    total: int


NO_HIT = Hit(0, 0)


class Index:
    """Not thread-safe: everything happens on the event loop, between two awaits."""

    def __init__(self) -> None:
        self._parts: list[dict[bytes, int]] = [{} for _ in range(PARTITIONS)]
        self._slots: dict[str, int] = {}
        self._digests: dict[str, list[RunningDigest]] = {}
        self._free: list[int] = []
        self._slot_count = 0
        self._doomed = 0
        self._sweep = _Sweep(0, 0, [])
        self._next_part: dict[str, int] = {}

    def open(self, worker: str) -> None:
        """Give a worker a slot; it holds nothing yet. O(1).

        Raises:
            ValueError: the worker is in the index already.
        """
        if worker in self._slots:
            raise ValueError(f"worker {worker} is in the index already: drop it first")
        self._slots[worker] = self._free.pop() if self._free else self._new_slot()
        self._digests[worker] = [RunningDigest() for _ in TIERS]
        self._next_part[worker] = 0

    def drop(self, worker: str) -> None:
        """Forget a worker. O(1) now; its entries are swept later."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        del self._digests[worker], self._next_part[worker]
        self._doomed |= _slot_mask(slot)

    def stored(self, worker: str, tier: str, chunks: Iterable[bytes]) -> None:
        """Chunks are in a tier. O(chunks), about 0.5 µs each; one known already changes nothing."""
        bit, digest = self._target(worker, tier)
        parts = self._parts
        for chunk in chunks:
            part = parts[chunk[0] >> 4]
            mask = part.get(chunk, 0)
            if not mask & bit:
                part[chunk] = mask | bit
                digest.add(chunk)

    def removed(self, worker: str, tier: str, chunks: Iterable[bytes]) -> None:
        """Chunks left a tier. O(chunks); one not known changes nothing."""
        bit, digest = self._target(worker, tier)
        for chunk in chunks:
            part = self._parts[chunk[0] >> 4]
            mask = part.get(chunk, 0)
            if mask & bit:
                _put(part, chunk, mask & ~bit)
                digest.discard(chunk)

    def cleared(self, worker: str, tier: str) -> None:
        """A tier was emptied. O(1) now; its entries are swept later, at the latest by the next change to the tier."""
        slot = self._slots.get(worker)
        if slot is None or tier not in _TIER:
            return
        self._doomed |= 1 << (slot * _WIDTH + _TIER[tier])
        self._digests[worker][_TIER[tier]].clear()

    def sweep(self, entries: int) -> bool:
        """Remove doomed bits from at most ``entries`` entries; whether some are left. O(entries)."""
        if not self._sweep.bits:
            if not self._doomed:
                return False
            self._sweep = _Sweep(self._doomed, -1, [])
        self._sweep_some(entries)
        return bool(self._doomed)

    def lookup(self, hashes: Sequence[bytes], workers: Sequence[str]) -> dict[str, Hit]:
        """Every worker's hit for a prompt's chunks. O(chunks of the longest hit + workers), about 0.1 µs per chunk
        while no worker drops out. Workers not in the index have no hit."""
        slots = {self._slots[worker]: worker for worker in workers if worker in self._slots}
        hits = dict.fromkeys(workers, NO_HIT)
        if not slots:
            return hits
        ends = self._walk(hashes, slots)
        for slot, worker in slots.items():
            hits[worker] = ends[slot]
        return hits

    def tiers(self, worker: str, hashes: Sequence[bytes]) -> dict[str, int]:
        """A worker's hit as chunks by the fastest tier each would come from. O(chunks)."""
        counts = dict.fromkeys(TIERS, 0)
        slot = self._slots.get(worker)
        if slot is None:
            return counts
        hit = self.lookup(hashes, [worker])[worker]
        counts["gpu"] = hit.gpu
        for chunk in islice(hashes, hit.gpu, hit.total):
            held = (self._visible(chunk) >> (slot * _WIDTH + 1)) & 0b111
            counts[TIERS[1 + (held & -held).bit_length() - 1]] += 1
        return counts

    def verify(self, worker: str, digests: dict[str, SetDigest], entries: int) -> list[str]:
        """Compare a worker's own digests with what the index holds of it; the tiers that differ, best none.

        The running digests are compared in whole, in O(1). Then partitions are recounted from their real contents,
        in turn: as many as have ``entries`` entries together, and at least one. O(entries).
        """
        wrong = [tier for number, tier in enumerate(TIERS) if not self._agrees(worker, number, digests.get(tier))]
        for part in self._partitions_in_turn(worker, entries):
            wrong += [tier for tier, digest in digests.items() if not self._recount(worker, tier, part, digest)]
        return sorted(set(wrong), key=lambda tier: _TIER.get(tier, _WIDTH))

    def sizes(self, worker: str) -> dict[str, int]:
        """Chunks held, by tier. O(1)."""
        if worker not in self._slots:
            return dict.fromkeys(TIERS, 0)
        return {tier: digest.take().count for tier, digest in zip(TIERS, self._digests[worker], strict=True)}

    def contents(self, worker: str) -> dict[str, set[bytes]]:
        """Every chunk a worker holds, by tier. O(entries)."""
        held: dict[str, set[bytes]] = {tier: set() for tier in TIERS}
        slot = self._slots.get(worker)
        if slot is None:
            return held
        for part in self._parts:
            for chunk, mask in part.items():
                bits = (mask & ~self._doomed) >> (slot * _WIDTH)
                for number, tier in enumerate(TIERS):
                    if bits >> number & 1:
                        held[tier].add(chunk)
        return held

    def __len__(self) -> int:
        """Entries: chunks that some worker holds, and doomed ones not swept yet. O(1)."""
        return sum(map(len, self._parts))

    def check(self) -> None:
        """Verify every invariant. O(entries).

        Raises:
            AssertionError: one does not hold; the text names it.
        """
        slots = list(self._slots.values())
        assert len(set(slots)) == len(slots), "two workers share a slot"
        assert not set(slots) & set(self._free), "a free slot is in use"
        owned = sum(_slot_mask(slot) for slot in slots)
        for number, part in enumerate(self._parts):
            for chunk, mask in part.items():
                assert len(chunk) == HASH_BYTES, "a chunk hash has 16 bytes"
                assert partition_of(chunk) == number, "a chunk is in the wrong partition"
                assert mask, "an entry without a holder was kept"
                assert not mask & ~(owned | self._doomed), "an entry names a slot nobody has"
        for worker in self._slots:
            self._check_digests(worker)

    def _check_digests(self, worker: str) -> None:
        held = self.contents(worker)
        for tier, digest in zip(TIERS, self._digests[worker], strict=True):
            fresh = RunningDigest()
            for chunk in held[tier]:
                fresh.add(chunk)
            assert fresh.take() == digest.take(), f"the digest of {worker}'s {tier} tier is not that of its contents"

    def _new_slot(self) -> int:
        self._slot_count += 1
        return self._slot_count - 1

    def _target(self, worker: str, tier: str) -> tuple[int, RunningDigest]:
        number = _TIER[tier]
        bit = 1 << (self._slots[worker] * _WIDTH + number)
        while self._doomed & bit:
            self.sweep(1 << 30)
        return bit, self._digests[worker][number]

    def _visible(self, chunk: bytes) -> int:
        return self._parts[chunk[0] >> 4].get(chunk, 0) & ~self._doomed

    def _walk(self, hashes: Sequence[bytes], slots: Iterable[int]) -> dict[int, Hit]:
        """Two masks travel along the chunks: who still has everything in gpu, and who left gpu and has had everything
        behind it since. Masks use each slot's gpu bit."""
        parts, visible = self._parts, ~self._doomed
        every = sum(1 << slot * _WIDTH for slot in slots)
        gpu, behind = every & visible, every & ~visible
        gpu_ends: dict[int, int] = {}
        ends: dict[int, Hit] = {}
        # A slot whose gpu tier is doomed starts behind the gpu.
        _note(gpu_ends, behind, 0)
        depth = 0
        for depth, chunk in enumerate(hashes):
            mask = parts[chunk[0] >> 4].get(chunk, 0)
            if not behind and mask & gpu == gpu:
                continue
            mask &= visible
            others = mask >> 1 | mask >> 2 | mask >> 3
            fallen = gpu & ~mask
            if fallen:
                _note(gpu_ends, fallen, depth)
                gpu &= mask
                behind |= fallen
            out = behind & ~others
            if out:
                _finish(ends, gpu_ends, out, depth)
                behind &= others
                if not gpu | behind:
                    return ends
        depth = len(hashes)
        _note(gpu_ends, gpu, depth)
        _finish(ends, gpu_ends, gpu | behind, depth)
        return ends

    def _sweep_some(self, entries: int) -> None:
        sweep = self._sweep
        while entries > 0:
            if not sweep.pending:
                if sweep.part + 1 == PARTITIONS:
                    self._finish_sweep()
                    return
                sweep = self._sweep = _Sweep(sweep.bits, sweep.part + 1, list(self._parts[sweep.part + 1]))
                entries -= 1
                continue
            chunks = sweep.pending[-entries:]
            del sweep.pending[-entries:]
            entries -= len(chunks)
            _strip(self._parts[sweep.part], chunks, sweep.bits)

    def _finish_sweep(self) -> None:
        used = set(self._slots.values()) | set(self._free)
        done = self._sweep.bits
        self._doomed &= ~done
        self._free += [
            slot for slot in range(self._slot_count) if slot not in used and not self._doomed & _slot_mask(slot)
        ]
        self._sweep = _Sweep(0, 0, [])

    def _agrees(self, worker: str, number: int, digest: SetDigest | None) -> bool:
        own = self._digests[worker][number].take()
        return own == digest if digest is not None else own.count == 0

    def _partitions_in_turn(self, worker: str, entries: int) -> list[int]:
        first = self._next_part[worker]
        chosen: list[int] = []
        for step in range(PARTITIONS):
            part = (first + step) % PARTITIONS
            entries -= len(self._parts[part])
            if chosen and entries < 0:
                break
            chosen.append(part)
        self._next_part[worker] = (first + len(chosen)) % PARTITIONS
        return chosen

    def _recount(self, worker: str, tier: str, part: int, digest: SetDigest) -> bool:
        if tier not in _TIER:
            return True
        bit = 1 << (self._slots[worker] * _WIDTH + _TIER[tier])
        if self._doomed & bit:
            return digest.counts[part] == 0
        held = [chunk for chunk, mask in self._parts[part].items() if mask & bit]
        return len(held) == digest.counts[part] and xor_of(held) == digest.xors[part]


class _Sweep(NamedTuple):
    """A pass over all partitions: the bits it removes, the partition it is in, the entries still to visit there."""

    bits: int
    part: int
    pending: list[bytes]


def _slot_mask(slot: int) -> int:
    return ((1 << _WIDTH) - 1) << slot * _WIDTH


def _put(part: dict[bytes, int], chunk: bytes, mask: int) -> None:
    if mask:
        part[chunk] = mask
    else:
        del part[chunk]


def _strip(part: dict[bytes, int], chunks: list[bytes], bits: int) -> None:
    for chunk in chunks:
        mask = part.get(chunk, 0)
        if mask & bits:
            _put(part, chunk, mask & ~bits)


def _slots_of(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield (low.bit_length() - 1) // _WIDTH
        mask ^= low


def _note(gpu_ends: dict[int, int], mask: int, depth: int) -> None:
    for slot in _slots_of(mask):
        gpu_ends[slot] = depth


def _finish(ends: dict[int, Hit], gpu_ends: dict[int, int], mask: int, depth: int) -> None:
    for slot in _slots_of(mask):
        ends[slot] = Hit(gpu_ends[slot], depth)
