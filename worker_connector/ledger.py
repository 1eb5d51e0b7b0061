"""The ledger: the only record of which chunk is in which tier of this engine.

The ``gpu`` tier is a set of chunks, mirrored from the engine's own prefix cache. The ``cpu`` tier has a fixed number of
slots, and a chunk's slot has the same number in every rank's slab. A slot's life::

    free ── reserve ──► saving ── commit ──► ready ── evict / forget ──► free
                          └────── abandon ─────────────────────────────►

A lower tier (disk, remote) is a set of chunks too: what the ranks acknowledged, and what look-ups and scans found. It may be
wrong, since others share such tiers and they evict by themselves: what is fetched from one is verified, and what is not
found is taken out.

Only a ready chunk is visible: to lookups and, unless its slot is hidden, in ``content``, in the digests and in the changes that reports carry. Loads
pin ready slots. A slot that is forgotten while a save or a load still uses its bytes is invisible at once and becomes
free when the last of them ends, so bytes never change under a transfer.

``lock`` guards everything here: the engine thread writes, the report server's thread reads. Every call takes it.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from enum import Enum

from kv_protocol.digests import RunningDigest, SetDigest
from kv_protocol.messages import Cleared, Removed, Stored, pack
from worker_connector.eviction import HIGH, NORMAL, EvictionPolicy, Expiring, Prioritised

Change = Stored | Removed | Cleared

GPU = "gpu"
CPU = "cpu"
MOST_APPROXIMATE = 1 << 16
"""Chunks that are remembered as not exact beyond those that are held: more than pass through an engine's cache before their
last block is evicted from it."""
HIGH_SHARE = 0.5
"""Share of the cpu tier's slots that chunks of high priority may have; beyond it a chunk is of normal priority."""


class SlotState(Enum):
    SAVING = "saving"
    READY = "ready"


class Slot:
    """One chunk's place in the slab.

    ``missing`` tells, for each KV-cache group, how many of the chunk's first blocks the slot does not hold: a sliding
    window may have passed them before the chunk was full. A ``hidden`` slot is no chunk to anybody outside: it holds
    the beginning of one, a tail of so many ``tokens``. A ``confined`` chunk is not for lower tiers; an ``approximate`` one was
    decoded from a lossy copy, or computed on top of one, and is not for tiers that keep exact copies.
    """

    __slots__ = (
        "approximate",
        "chunk",
        "confined",
        "forgotten",
        "index",
        "kept",
        "missing",
        "pins",
        "priority",
        "state",
        "tokens",
    )

    def __init__(self, chunk: bytes, index: int, missing: tuple[int, ...], *, tokens: int, confined: bool) -> None:
        self.approximate = False
        self.chunk = chunk
        self.confined = confined
        self.index = index
        self.missing = missing
        self.priority = NORMAL
        self.state = SlotState.SAVING
        self.tokens = tokens
        self.pins = 0
        self.kept = False
        self.forgotten = False

    @property
    def hidden(self) -> bool:
        """Whether it holds a tail."""
        return bool(self.tokens)


class Ledger:
    """Which chunk is where. See the module's text for the life of a slot. ``ttl`` seconds after its save a chunk of the cpu
    tier is of no use any more; 0 for never."""

    def __init__(self, policy: EvictionPolicy, ttl: float = 0.0, clock: Callable[[], float] = time.time) -> None:
        self.lock = threading.RLock()
        self._ttl = ttl
        self._clock = clock
        self._priorities = policy if isinstance(policy, Prioritised) else None
        self._expiring = Expiring(policy, clock) if ttl else None
        self.capacity = 0
        self.evictions = 0
        self.version = 0
        """Another number whenever something is in another place than before."""
        self.pinned: Container[bytes] = frozenset()
        """Chunks to keep from eviction as they come in."""
        self._policy: EvictionPolicy = self._expiring or policy
        self._gpu: set[bytes] = set()
        self._slots: dict[bytes, Slot] = {}
        self._forgotten: set[Slot] = set()
        self._free: list[int] = []
        self._ready = 0
        self._lower: dict[str, OrderedDict[bytes, None]] = {}
        self._lower_tails: dict[str, OrderedDict[bytes, None]] = {}
        self._approximate: dict[bytes, None] = {}
        self._digests = {GPU: RunningDigest(), CPU: RunningDigest()}
        self._changes: list[tuple[type[Change], str, list[bytes]]] = []

    def set_capacity(self, slots: int) -> None:
        """Give the cpu tier its slots. Once, before the first save.

        Raises:
            RuntimeError: the tier has slots in use.
        """
        with self.lock:
            if self._slots or self._forgotten:
                raise RuntimeError("the cpu tier cannot change its size while slots are in use")
            self.capacity = slots
            self._free = list(range(slots - 1, -1, -1))

    # ---- cpu tier: saves ----------------------------------------------------------------------------------------

    def reserve(
        self,
        chunk: bytes,
        missing: tuple[int, ...] = (),
        spare: Container[bytes] = frozenset(),
        *,
        tokens: int = 0,
        confined: bool = False,
        approximate: bool = False,
        priority: int = NORMAL,
    ) -> Slot | None:
        """A slot to save ``chunk`` into, or a tail of so many ``tokens``, evicting another chunk if none is free; None when
        every slot is in use, the next victim is in ``spare``, or the chunk has a slot already. O(1)."""
        with self.lock:
            if chunk in self._slots:
                return None
            if not self._free:
                self._evict_one(spare)
            if not self._free:
                return None
            slot = Slot(chunk, self._free.pop(), missing, tokens=tokens, confined=confined)
            slot.approximate = approximate
            slot.priority = priority
            self._slots[chunk] = slot
            self.version += 1
            return slot

    def commit(self, slot: Slot) -> None:
        """The save of ``slot`` is complete in every rank: its chunk becomes visible. O(1)."""
        with self.lock:
            slot.state = SlotState.READY
            self.version += 1
            if slot.approximate:
                self.mark_approximate((slot.chunk,))
            if slot.forgotten:
                self._free_if_unused(slot)
                return
            self._policy.add(slot.chunk)
            if slot.priority != NORMAL:
                self._rank(slot, slot.priority)
            if slot.chunk in self.pinned:
                slot.kept = True
                self._policy.hold(slot.chunk)
            if self._expiring is not None:
                self._expiring.expire(slot.chunk, self._clock() + self._ttl)
            if not slot.hidden:
                self._ready += 1
                self._digests[CPU].add(slot.chunk)
                self._note(Stored, CPU, slot.chunk)

    def abandon(self, slot: Slot) -> None:
        """The save of ``slot`` failed: the slot is free again. O(1)."""
        with self.lock:
            slot.state = SlotState.READY
            self.version += 1
            if not slot.forgotten:
                del self._slots[slot.chunk]
                slot.forgotten = True
                self._forgotten.add(slot)
            self._free_if_unused(slot)

    def expire(self, most: int = 64) -> None:
        """Drop chunks of the cpu tier that have outlived their time, ``most`` at once."""
        if self._expiring is not None:
            with self.lock:
                for chunk in self._expiring.expired(most):
                    self.forget(chunk)

    # ---- cpu tier: lookups and loads ----------------------------------------------------------------------------

    def lookup(self, chunk: bytes) -> Slot | None:
        """The chunk's slot if its bytes can be loaded now. O(1)."""
        slot = self._slots.get(chunk)
        return slot if slot is not None and slot.state is SlotState.READY else None

    def holds(self, chunk: bytes) -> bool:
        """Whether the cpu tier has the chunk or is saving it. O(1)."""
        return chunk in self._slots

    def pin(self, slot: Slot) -> None:
        """Keep a ready slot's bytes as they are until ``unpin``; pins are counted. O(1)."""
        with self.lock:
            slot.pins += 1
            if not slot.forgotten:
                self._policy.hold(slot.chunk)

    def unpin(self, slot: Slot) -> None:
        """Undo one ``pin``. O(1)."""
        with self.lock:
            slot.pins -= 1
            if slot.forgotten:
                self._free_if_unused(slot)
            elif not slot.pins and not slot.kept:
                self._policy.release(slot.chunk)

    def touch(self, chunks: Iterable[bytes]) -> None:
        """Count a use of each chunk, in this order."""
        with self.lock:
            for chunk in chunks:
                self._policy.touch(chunk)

    def raise_priority(self, chunks: Iterable[bytes], priority: int) -> None:
        """A request of that priority uses these chunks: none of them has a lower one from now on. O(1) each, and O(1) for
        all where no chunk has another than the normal one."""
        priorities = self._priorities
        if priorities is None or not (priorities or priority > NORMAL):
            return
        with self.lock:
            for chunk in chunks:
                slot = self.lookup(chunk)
                if slot is not None and priorities.level(chunk) < priority:
                    self._rank(slot, priority)

    def refresh(self, chunks: Iterable[bytes]) -> None:
        """Put each chunk, in this order, behind what came in meanwhile, without counting a use."""
        with self.lock:
            for chunk in chunks:
                self._policy.refresh(chunk)

    def keep(self, chunks: Iterable[bytes], *, keep: bool = True) -> int:
        """Protect ready chunks from eviction, or with ``keep=False`` no longer; the number that changed."""
        with self.lock:
            slots = [slot for chunk in chunks if (slot := self.lookup(chunk)) is not None and slot.kept is not keep]
            for slot in slots:
                slot.kept = keep
                if keep:
                    self._policy.hold(slot.chunk)
                elif not slot.pins:
                    self._policy.release(slot.chunk)
            return len(slots)

    def forget(self, chunk: bytes) -> bool:
        """Drop a chunk from the cpu tier; whether it was there. O(1)."""
        with self.lock:
            slot = self._slots.pop(chunk, None)
            if slot is None:
                return False
            if slot.state is SlotState.READY:
                self._hide(slot)
                if not slot.hidden:
                    self._note(Removed, CPU, chunk)
            self._retire(slot)
            return True

    def clear_cpu(self) -> None:
        """Empty the cpu tier. Slots in use by a transfer are reused only after it."""
        with self.lock:
            slots = list(self._slots.values())
            self._slots.clear()
            for slot in slots:
                if slot.state is SlotState.READY:
                    self._hide(slot)
                self._retire(slot)
            self.version += 1
            self._changes.append((Cleared, CPU, []))

    # ---- gpu tier -----------------------------------------------------------------------------------------------

    def gpu_stored(self, chunks: Iterable[bytes]) -> None:
        """The engine's prefix cache has these chunks now. O(1) each."""
        with self.lock:
            for chunk in chunks:
                if chunk not in self._gpu:
                    self._gpu.add(chunk)
                    self._digests[GPU].add(chunk)
                    self._note(Stored, GPU, chunk)

    def gpu_removed(self, chunks: Iterable[bytes]) -> None:
        """The engine's prefix cache lost these chunks. O(1) each."""
        with self.lock:
            for chunk in chunks:
                if chunk in self._gpu:
                    self._gpu.remove(chunk)
                    self._digests[GPU].discard(chunk)
                    self._note(Removed, GPU, chunk)

    def gpu_cleared(self) -> None:
        """The engine's prefix cache was emptied."""
        with self.lock:
            self._gpu.clear()
            self._digests[GPU].clear()
            self.version += 1
            self._changes.append((Cleared, GPU, []))
            self._approximate = dict.fromkeys(self._approximate_slots())

    # ---- approximate chunks -------------------------------------------------------------------------------------

    @property
    def has_approximate(self) -> bool:
        """Whether this engine may have KV that is not exact."""
        return bool(self._approximate)

    def mark_approximate(self, chunks: Iterable[bytes]) -> None:
        """KV of these chunks, in the engine's cache or in a slot, is not exact. What is computed behind them is not either,
        so this is remembered by chunk and outlasts the slot: parts of a chunk may stay in the engine's cache unseen."""
        with self.lock:
            for chunk in chunks:
                self._approximate.pop(chunk, None)
                self._approximate[chunk] = None
            if len(self._approximate) > 2 * MOST_APPROXIMATE:
                self._forget_approximate()

    def first_approximate(self, chunks: Sequence[bytes]) -> int:
        """The position of the first of these chunks whose KV may not be exact; their number if there is none."""
        known = self._approximate
        return next((at for at, chunk in enumerate(chunks) if chunk in known), len(chunks)) if known else len(chunks)

    def _approximate_slots(self) -> list[bytes]:
        return [slot.chunk for slot in self._slots.values() if slot.approximate]

    def _forget_approximate(self) -> None:
        """Keep what is held, and of the rest what was marked last."""
        held = self._gpu | set(self._approximate_slots())
        spare = len(self._approximate) - MOST_APPROXIMATE
        oldest = [chunk for chunk in self._approximate if chunk not in held][:spare]
        for chunk in oldest:
            del self._approximate[chunk]

    # ---- lower tiers --------------------------------------------------------------------------------------------

    def add_tier(self, tier: str) -> None:
        """There is a lower tier of that name, below those added before."""
        with self.lock:
            self._lower[tier] = OrderedDict()
            self._lower_tails[tier] = OrderedDict()
            self._digests[tier] = RunningDigest()

    def stored(self, tier: str, chunks: Iterable[bytes], most: int = 1 << 62) -> None:
        """A lower tier has these chunks. Of more than ``most``, those that were named longest ago are dropped from the
        record, not from the tier. O(1) each."""
        with self.lock:
            held = self._lower[tier]
            for chunk in chunks:
                if chunk in held:
                    held.move_to_end(chunk)
                    continue
                held[chunk] = None
                self._digests[tier].add(chunk)
                self._note(Stored, tier, chunk)
                if len(held) > most:
                    self.removed(tier, (next(iter(held)),))

    def tails_stored(self, tier: str, tails: Iterable[bytes], most: int = 1 << 62) -> None:
        """A lower tier has these tails, of which nobody outside hears. As ``stored`` otherwise."""
        with self.lock:
            held = self._lower_tails[tier]
            for tail in tails:
                held[tail] = None
                held.move_to_end(tail)
                self.version += 1
                if len(held) > most:
                    held.popitem(last=False)

    def removed(self, tier: str, chunks: Iterable[bytes]) -> None:
        """A lower tier does not have these chunks or tails. O(1) each."""
        with self.lock:
            held, tails = self._lower[tier], self._lower_tails[tier]
            for chunk in chunks:
                if tails.pop(chunk, 0) is None:
                    self.version += 1
                if chunk in held:
                    del held[chunk]
                    self._digests[tier].discard(chunk)
                    self._note(Removed, tier, chunk)

    def cleared(self, tier: str) -> None:
        """A lower tier was emptied of this engine's chunks."""
        with self.lock:
            self._lower[tier].clear()
            self._lower_tails[tier].clear()
            self._digests[tier].clear()
            self.version += 1
            self._changes.append((Cleared, tier, []))

    def below(self, chunk: bytes) -> list[str]:
        """The lower tiers that have a chunk, the fastest first. O(tiers)."""
        return [tier for tier, held in self._lower.items() if chunk in held]

    def tail_below(self, tail: bytes) -> list[str]:
        """The lower tiers that have a tail, the fastest first. O(tiers)."""
        return [tier for tier, held in self._lower_tails.items() if tail in held]

    def newest(self, tier: str, most: int) -> list[bytes]:
        """Up to ``most`` chunks of a lower tier, those that were named last first. O(most)."""
        with self.lock:
            return [chunk for chunk, _ in zip(reversed(self._lower[tier]), range(most), strict=False)]

    def hottest(self) -> list[bytes]:
        """The visible chunks of the cpu tier, those that would be evicted last first. O(chunks)."""
        with self.lock:
            chunks = self._policy.order()
        # Without the lock: the engine does not wait for a million chunks.
        return [chunk for chunk in reversed(chunks) if (slot := self.lookup(chunk)) is not None and not slot.hidden]

    @property
    def free_slots(self) -> int:
        """Slots that nothing has to be evicted for."""
        return len(self._free)

    # ---- what others see ----------------------------------------------------------------------------------------

    def in_gpu(self, chunk: bytes) -> bool:
        """Whether the engine's prefix cache has the whole chunk. O(1)."""
        return chunk in self._gpu

    @property
    def has_changes(self) -> bool:
        """Whether ``take_changes`` has something to hand over."""
        return bool(self._changes)

    def take_changes(self) -> list[Change]:
        """Every visible change since the last call, in order."""
        with self.lock:
            taken, self._changes = self._changes, []
        return [_message(kind, tier, chunks) for kind, tier, chunks in taken]

    def content(self) -> dict[str, list[bytes]]:
        """The visible chunks of each tier. O(chunks)."""
        with self.lock:
            lower = {tier: list(held) for tier, held in self._lower.items()}
            return {GPU: list(self._gpu), CPU: [slot.chunk for slot in self._visible_slots()], **lower}

    def counts(self) -> dict[str, int]:
        """The number of visible chunks in each tier. O(1)."""
        return {GPU: len(self._gpu), CPU: self._ready, **{tier: len(held) for tier, held in self._lower.items()}}

    def digests(self) -> dict[str, SetDigest]:
        """The digest of each tier's visible chunks. O(1)."""
        with self.lock:
            return {tier: digest.take() for tier, digest in self._digests.items()}

    def check(self) -> None:
        """Assert every invariant. O(capacity + chunks)."""
        with self.lock:
            slots = [*self._slots.values(), *self._forgotten]
            indices = [slot.index for slot in slots] + self._free
            assert sorted(indices) == list(range(self.capacity)), "a slot is lost or has two owners"
            ready = list(self._visible_slots())
            assert self._ready == len(ready), "ready slots are miscounted"
            for chunk, slot in self._slots.items():
                assert slot.chunk == chunk, "a slot is filed under another chunk"
                assert not slot.forgotten, "a forgotten slot is still filed"
                assert slot.pins >= 0, "a slot was unpinned too often"
                assert slot.state is SlotState.READY or not slot.pins, "a slot is pinned while it is being saved"
            for slot in self._forgotten:
                assert slot.forgotten, "a slot is retired but not forgotten"
                assert slot.pins or slot.state is SlotState.SAVING, "an unused slot was not freed"
            for tier, chunks in self.content().items():
                expected = RunningDigest()
                for chunk in chunks:
                    expected.add(chunk)
                assert expected.take() == self._digests[tier].take(), f"the digest of {tier} is wrong"

    # ---- inside -------------------------------------------------------------------------------------------------

    def _visible_slots(self) -> Iterable[Slot]:
        return (slot for slot in self._slots.values() if slot.state is SlotState.READY and not slot.hidden)

    def _rank(self, slot: Slot, priority: int) -> None:
        priorities = self._priorities
        if priorities is None:
            return
        if priority == HIGH and priorities.high >= self.capacity * HIGH_SHARE:
            priority = NORMAL
        priorities.set(slot.chunk, priority, held=bool(slot.pins or slot.kept))

    def _evict_one(self, spare: Container[bytes]) -> None:
        chunk = self._policy.victim()
        if chunk is not None and chunk not in spare:
            self.evictions += 1
            self.forget(chunk)

    def _hide(self, slot: Slot) -> None:
        self._policy.discard(slot.chunk)
        if not slot.hidden:
            self._ready -= 1
            self._digests[CPU].discard(slot.chunk)

    def _retire(self, slot: Slot) -> None:
        self.version += 1
        slot.forgotten = True
        self._forgotten.add(slot)
        self._free_if_unused(slot)

    def _free_if_unused(self, slot: Slot) -> None:
        if not slot.pins and slot.state is SlotState.READY:
            self._forgotten.discard(slot)
            self._free.append(slot.index)

    def _note(self, kind: type[Change], tier: str, chunk: bytes) -> None:
        self.version += 1
        if self._changes and self._changes[-1][:2] == (kind, tier):
            self._changes[-1][2].append(chunk)
        else:
            self._changes.append((kind, tier, [chunk]))


def _message(kind: type[Change], tier: str, chunks: list[bytes]) -> Change:
    return Cleared(tier=tier) if kind is Cleared else kind(tier=tier, chunks=pack(chunks))  # type: ignore[call-arg]
