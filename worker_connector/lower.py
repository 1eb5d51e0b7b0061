"""The lower tiers as the scheduler half sees them: what is fetched from disk and remote stores, and what is written there.

Chunks move between a lower tier and the CPU tier only; from there they are loaded like any other. So a request whose
chunks lie below waits until they were fetched, the engine steps on meanwhile, and whatever goes wrong ends in a shorter
hit:

- ``bring`` is asked before the request is first scheduled, to look its chunks up and to fetch them ahead, and then whenever
  the engine asks what can be loaded. It says whether there is something to wait for (``worker_connector.fetches``).
- A fetch reserves slots, which are invisible until every rank has verified what it read. A copy that is missing or bad is
  taken out of the record, and the next tier is asked for it.
- A chunk is written down once it is ready in the CPU tier: at once (``through``), or when slots run short (``back``).
  Its slot is pinned meanwhile. Where writing cannot keep up, chunks stay unwritten; nothing waits. So is a prompt's tail,
  of which nobody outside hears. It stays below when the chunk is whole: others may go on differently.

Chunks computed under a LoRA adapter stay above: their hash binds the adapter's name, not its content.

What is below belongs to a generation of the weights. Every job names the one it was planned in; with another generation
the record starts empty, and what becomes of jobs of the one before changes nothing but who may have their slots.

Everything here runs under the ledger's lock, and on the engine's thread but for what others may call: ``begin_drop``,
``may_be_found`` and ``rename``.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from worker_connector.estimate import Estimator
from worker_connector.fetches import Fetches
from worker_connector.ledger import CPU, Ledger, Slot, SlotState
from worker_connector.pins_below import DISK, PinsBelow
from worker_connector.plan import Piece, TierJob, TierKind, TierResult
from worker_connector.request_state import RequestState
from worker_connector.stats import Stats
from worker_connector.waits import Asks, Wanted

OVERDUE_SECONDS = 60.0
"""An unacknowledged job keeps an idle engine stepping for no longer than this."""
PAUSE_SECONDS = 1.0
"""Where all of a fetch or of a write failed, that is not tried again for so long: a tier that is full is still read."""
WRITES_AT_ONCE = 4
"""Jobs of writes to one tier that may be under way."""
WRITE_SECONDS = 30.0
"""Nobody waits for a write, so it may take longer than a fetch."""
JOB_BYTES = 128 << 20
"""What one job moves on one rank, or one chunk if that is more: a job's time limit then fits it."""
# fmt: off
_STORE_WIDE = frozenset({
    "timeout", "unreachable", "paused", "busy", "closed", "auth", "noperm", "tls", "config", "loading", "script", "clients",
    "files", "resources", "scanning", "throttled", "server", "moving", "clusterdown", "masterdown", "stale",
    "readonly", "read_only", "full", "quota", "misconf", "noreplicas",
})
# fmt: on
"""Causes that say nothing about the chunk."""
_SLACK = 64
_ANNOUNCED = 0
"""In the place of a job's number: that job is still to be planned."""
_FAILED = -1
"""In that place too: a job failed, and another one is to be planned in a while."""
EMPTY_AGAIN_SECONDS = 5.0
"""What could not be deleted is tried again after so long."""

Writes = Literal["through", "back", "none"]


@dataclass(frozen=True, kw_only=True)
class TierRules:
    """How one lower tier is used. ``deadline`` bounds one fetch in seconds, ``most`` the chunks kept on record;
    ``second_touch`` writes only what was used again after it came in; ``listed``: all of it is put on record; ``lossy``: it keeps
    no exact copies, so chunks that are not exact may be written there, and nowhere else."""

    name: str
    deadline: float = 2.0
    writes: Writes = "through"
    second_touch: bool = False
    most: int = 2_000_000
    listed: bool = True
    lossy: bool = False


@dataclass(slots=True)
class _Job:
    job: TierJob
    slots: list[Slot]
    began: float
    result: TierResult = field(default_factory=lambda: TierResult(0))


class LowerTiers:
    """See the module's text. ``tiers`` are the fastest first; ``chunk_bytes`` is what a chunk takes on one rank."""

    def __init__(
        self,
        ledger: Ledger,
        tiers: Sequence[TierRules],
        *,
        ranks: int,
        groups: int,
        chunk_size: int,
        chunk_bytes: int,
        may_load: bool,
        may_save: bool,
        patience: float,
        stats: Stats,
        estimator: Estimator,
        load_or_compute: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._tiers = {rules.name: rules for rules in tiers}
        self._ranks = ranks
        self._chunk_bytes = chunk_bytes
        self._job_pieces = max(1, JOB_BYTES // max(1, chunk_bytes))
        self._may_load = may_load
        self._may_save = may_save
        self._stats = stats
        self._clock = clock
        self.fetches = Fetches(
            ledger,
            self._tiers,
            self,
            groups=groups,
            chunk_size=chunk_size,
            chunk_bytes=chunk_bytes,
            job_pieces=self._job_pieces,
            patience=patience,
            stats=stats,
            estimator=estimator,
            load_or_compute=load_or_compute,
            clock=clock,
        )
        self._jobs: dict[int, _Job] = {}
        self._unwritten: dict[str, OrderedDict[bytes, Slot]] = {name: OrderedDict() for name in self._tiers}
        self._writing: dict[str, set[bytes]] = {name: set() for name in self._tiers}
        self._leaving: dict[str, set[bytes]] = {name: set() for name in self._tiers}
        self._urgent: dict[str, set[bytes]] = {name: set() for name in self._tiers}
        self._paused: dict[tuple[str, TierKind], float] = {}
        self.generation = ""
        self._emptying: dict[str, int] = {}
        self._dropping: dict[str, dict[bytes, int]] = {name: {} for name in self._tiers}
        self._empty_again: dict[str, float] = {}
        self._drop_again: dict[str, float] = {}
        self.pins_below = PinsBelow()
        self._next_job = 0
        self._outbox: list[TierJob] = []
        for name in self._tiers:
            ledger.add_tier(name)

    def __bool__(self) -> bool:
        """Whether there is a lower tier."""
        return bool(self._tiers)

    @property
    def names(self) -> list[str]:
        """The lower tiers, the fastest first."""
        return list(self._tiers)

    @property
    def asks(self) -> Asks | None:
        """Who looks up chunks in the lower tiers, if anybody does."""
        return self.fetches.asks

    @asks.setter
    def asks(self, asks: Asks | None) -> None:
        self.fetches.asks = asks

    @property
    def may_write(self) -> bool:
        """Whether this engine writes to lower tiers."""
        return self._may_save

    @property
    def has_work(self) -> bool:
        """Whether the next plan has something for a lower tier."""
        return (
            bool(self._outbox or self.pins_below)
            or self.fetches.has_work
            or any(self._may_write(name) for name in self._tiers)
        )

    @property
    def fetch_room(self) -> int:
        """How many more chunks may be fetched for nobody, so that each job ends in its time."""
        return max(0, 2 * self._job_pieces - self.fetches.under_way)

    def is_expected(self) -> bool:
        """Whether something is to be sent, or under way and not overdue."""
        horizon = self._clock() - OVERDUE_SECONDS
        return self.has_work or any(job.began > horizon for job in self._jobs.values())

    def bandwidth(self) -> dict[str, float]:
        """Bytes per second that fetches from each tier were measured to have, over all ranks; 0 where unknown."""
        return {name: self._ranks * pace.bandwidth for name, pace in self.fetches.paces.items()}

    # ---- requests -----------------------------------------------------------------------------------------------

    def bring(self, state: RequestState, first: int, *, ahead: bool = False) -> bool:
        """Look up and fetch what the request lacks in the CPU tier from chunk ``first`` on; whether to wait for it.
        ``ahead``: the engine does not wait yet, and may find the beginning in its own cache. O(1) while nothing changed."""
        return self._may_load and self.fetches.bring(state, first, ahead=ahead)

    def origins(self, request_id: str, chunks: Iterable[bytes]) -> dict[str, int]:
        """How many tokens of these chunks were fetched for a request, by tier."""
        return self.fetches.origins(request_id, chunks)

    def served(self, request_id: str) -> None:
        """The engine gave a request its blocks: what it waited for may be evicted once it is loaded."""
        self.fetches.served(request_id)

    def forget(self, request_id: str) -> None:
        """The engine is done with a request."""
        self.fetches.forget(request_id)

    def may_fetch(self, tier: str, chunk: bytes) -> bool:
        """Whether a tier may be asked for a chunk that is on its record."""
        return not self._is_paused(tier, "fetch") and tier not in self._emptying and chunk not in self._dropping[tier]

    def fetch(self, tier: str, pairs: Sequence[tuple[Piece, Slot]]) -> int:
        """Plan a fetch; its number."""
        return self._send(tier, "fetch", pairs)

    def withdraw(self, number: int) -> bool:
        """Forget a job that was not sent; whether there was such a one."""
        job = next((job for job in self._outbox if job.job == number), None)
        if job is None:
            return False
        self._outbox.remove(job)
        del self._jobs[number]
        return True

    # ---- writes -------------------------------------------------------------------------------------------------

    def committed(self, slots: Iterable[Slot]) -> None:
        """These chunks are ready in the CPU tier: they may be written below. O(tiers) each."""
        for slot in slots if self._may_save else ():
            if slot.confined or slot.forgotten or (slot.tokens and not self.fetches.unit):
                continue
            for name, rules in self._tiers.items():
                if rules.writes != "none" and not rules.second_touch:
                    self._remember(name, slot)

    def touched(self, chunks: Iterable[bytes]) -> None:
        """These chunks were used again."""
        for name, rules in self._tiers.items() if self._may_save else ():
            if not rules.second_touch or rules.writes == "none":
                continue
            for chunk in chunks:
                slot = self._ledger.lookup(chunk)
                if slot is not None and not slot.confined and (not slot.tokens or self.fetches.unit):
                    self._remember(name, slot)

    def _remember_above(self, tier: str, slot: Slot) -> None:
        """What had to come from a slower tier goes to the faster ones that lack it."""
        for name, rules in self._tiers.items() if self._may_save else ():
            if name == tier:
                return
            if rules.writes != "none" and not rules.second_touch:
                self._remember(name, slot)

    def _remember(self, tier: str, slot: Slot) -> None:
        if self._is_too_exact(tier, slot):
            return
        if not self._is_below(tier, slot) and slot.chunk not in self._writing[tier]:
            self._unwritten[tier][slot.chunk] = slot
            self._drop_forgotten(tier)

    def _drop_forgotten(self, tier: str) -> None:
        """Chunks that left before they were written need not be remembered. Amortized O(1)."""
        unwritten = self._unwritten[tier]
        if len(unwritten) > 2 * self._ledger.capacity + _SLACK:
            for slot in [slot for slot in unwritten.values() if slot.forgotten]:
                del unwritten[slot.chunk]
                self._urgent[tier].discard(slot.chunk)
                self._leave(tier, slot)

    def _is_too_exact(self, tier: str, slot: Slot) -> bool:
        """Whether a chunk would be taken for an exact copy there, and is none. A tail always would: it is kept raw."""
        return slot.approximate and (bool(slot.tokens) or not self._tiers[tier].lossy)

    def _is_below(self, tier: str, slot: Slot) -> bool:
        """Whether a tier has what a slot holds, as far as is known."""
        return tier in (self._ledger.tail_below(slot.chunk) if slot.tokens else self._ledger.below(slot.chunk))

    def _may_write(self, tier: str) -> bool:
        if not self._unwritten[tier] or self._is_paused(tier, "write"):
            return False
        under_way = sum(job.job.tier == tier and job.job.kind == "write" for job in self._jobs.values())
        if under_way >= min(WRITES_AT_ONCE, max(1, self._ledger.capacity // (2 * len(self._tiers)))):
            return False
        return self._writes_now(tier) or bool(self._leaving[tier] or self._urgent[tier])

    def _writes_now(self, tier: str) -> bool:
        """Whether chunks that nobody asked to move are written: with write-back, when slots run short."""
        return self._tiers[tier].writes != "back" or self._ledger.free_slots < max(1, self._ledger.capacity // 4)

    def _is_asked_for(self, tier: str, chunk: bytes) -> bool:
        return chunk in self._leaving[tier] or chunk in self._urgent[tier]

    def _write(self, tier: str) -> None:
        """Plan one job of writes, of the chunks that came in first. Half of the slots stay unpinned."""
        room = min(self._job_pieces, max(1, self._ledger.capacity // (2 * WRITES_AT_ONCE * len(self._tiers))))
        unwritten = self._unwritten[tier]
        pairs: list[tuple[Piece, Slot]] = []
        all_of_them = self._writes_now(tier)
        while unwritten and len(pairs) < room:
            if not (all_of_them or self._is_asked_for(tier, next(iter(unwritten)))):
                break  # those that move or are handed over come first
            chunk, slot = unwritten.popitem(last=False)
            self._urgent[tier].discard(chunk)
            if slot.forgotten or slot.state is not SlotState.READY or self._is_below(tier, slot):
                self._leave(tier, slot)
                continue
            self._ledger.pin(slot)
            pairs.append((Piece(chunk, slot.index, slot.missing, slot.tokens), slot))
        if pairs:
            self._writing[tier].update(piece.chunk for piece, _ in pairs)
            self._send(tier, "write", pairs)

    # ---- steps --------------------------------------------------------------------------------------------------

    def plan_step(self) -> list[TierJob]:
        """What the workers have to do for the lower tiers."""
        if self._empty_again or self._drop_again:
            self._delete_again(self._clock())
        self.fetches.plan_step()
        for kind, chunks in self.pins_below.take() if self.pins_below and DISK in self._tiers else ():
            self._send(DISK, kind, [(Piece(chunk, -1), None) for chunk in chunks])
        for name in self._tiers:
            if self._may_write(name):
                self._write(name)
        outbox, self._outbox = self._outbox, []
        return outbox

    def absorb(self, results: Mapping[int, TierResult], lost: Mapping[str, set[bytes]]) -> None:
        """What the workers did."""
        for number, result in results.items():
            job = self._jobs.get(number)
            if job is None:
                continue
            job.result.merge(result)
            if job.result.ranks >= self._ranks:
                self._end(self._jobs.pop(number))
        # Last: what was written and evicted since the last report is gone.
        for tier, chunks in lost.items():
            self._ledger.removed(tier, chunks)

    def begin_drop(self, tier: str, chunks: Sequence[bytes] = ()) -> None:
        """Have nothing of a tier, or nothing of these chunks, found or fetched from now on. ``drop`` is to follow."""
        self._take_off_record(tier, chunks)
        if chunks:
            self._dropping[tier].update(dict.fromkeys(chunks, _ANNOUNCED))
        else:
            self._emptying[tier] = _ANNOUNCED
            self._empty_again.pop(tier, None)

    def drop(self, tier: str, chunks: Sequence[bytes] = (), generation: str | None = None) -> None:
        """Delete a tier's copies: of these chunks, or all of this engine's identity, in this generation if it still is that one.
        Until all are gone nothing is fetched from there, and look-ups do not find what is yet to be deleted; what fails is
        tried again."""
        if generation not in (None, self.generation):
            return
        self.begin_drop(tier, chunks)
        number = self._next_job + 1
        if chunks:
            self._dropping[tier].update(dict.fromkeys(chunks, number))
        else:
            self._unwritten[tier].clear()
            self._urgent[tier].clear()
            self._leaving[tier] &= self._writing[tier]
            self._emptying[tier] = number
        self._send(tier, "drop", [(Piece(chunk, -1), None) for chunk in chunks])

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Delete every tier's copies of these chunks, also those that are being written."""
        for tier, writing in self._writing.items():
            if there := [chunk for chunk in chunks if chunk in writing or tier in self._ledger.below(chunk)]:
                self.drop(tier, there)

    def _delete_again(self, now: float) -> None:
        for name in [name for name, due in self._empty_again.items() if due <= now]:
            self.drop(name)
        for name in [name for name, due in self._drop_again.items() if due <= now]:
            del self._drop_again[name]
            if chunks := [chunk for chunk, job in self._dropping[name].items() if job == _FAILED]:
                self.drop(name, chunks)

    def may_be_found(self, tier: str, chunks: Iterable[bytes]) -> list[bytes]:
        """Those of a tier's chunks that are not about to be deleted."""
        dropping = self._dropping[tier]
        return [] if tier in self._emptying else [chunk for chunk in chunks if chunk not in dropping]

    def enter(self, generation: str) -> None:
        """The weights are another generation: nothing that is below is of use, and nothing of it is deleted, since others
        may have the weights of before. What is above has to be dropped too."""
        self.generation = generation
        for name in self._tiers:
            self._ledger.cleared(name)
            self._unwritten[name].clear()
            self._urgent[name].clear()
            self._leaving[name] &= self._writing[name]
            self._dropping[name].clear()
        self.pins_below.begin_again()
        self._emptying.clear()
        self._empty_again.clear()
        self._drop_again.clear()
        self.fetches.clear()

    def rename(self, generation: str) -> None:
        """The weights that this engine has are called so by others too. What is above stays, and is written below by that
        name. O(slots)."""
        self.enter(generation)
        self.committed(filter(None, map(self._ledger.lookup, self._ledger.content()[CPU])))

    def promote(self, tier: str, chunks: Sequence[bytes], *, evict: bool = False) -> int:
        """Fetch chunks into the CPU tier without a request for them, as far as slots are free or, with ``evict``, can be
        made free; how many will be."""
        wanted = [Wanted(tier, chunk) for chunk in self.may_be_found(tier, chunks) if not self._ledger.holds(chunk)]
        wanted = wanted if evict else wanted[: self._ledger.free_slots]
        return self.fetches.start(None, wanted, frozenset(chunks))

    def demote(self, tier: str, chunks: Iterable[bytes]) -> int:
        """Write chunks of the CPU tier to a lower tier now, and drop each when every rank has written it; of what is there
        already, drop it at once. How many chunks leave or will."""
        leaving = 0
        for chunk in chunks if self._may_save else ():
            slot = self._ledger.lookup(chunk)
            if slot is None or slot.hidden or slot.confined or slot.kept or self._is_too_exact(tier, slot):
                continue
            leaving += 1
            if tier in self._ledger.below(chunk):
                self._ledger.forget(chunk)
                continue
            self._leaving[tier].add(chunk)
            if chunk not in self._writing[tier]:
                self._unwritten[tier][chunk] = slot
                self._unwritten[tier].move_to_end(chunk, last=False)
        return leaving

    def may_hand_over(self, tier: str, chunk: bytes) -> bool:
        """Whether a lower tier lacks a chunk of the CPU tier that may be written there. O(tiers)."""
        slot = self._ledger.lookup(chunk)
        if slot is None or slot.hidden or slot.confined or not self._may_save or self._is_too_exact(tier, slot):
            return False
        return tier not in self._ledger.below(chunk)

    def hand_over(self, tier: str, chunks: Sequence[bytes]) -> None:
        """Write chunks of the CPU tier to a lower tier before all others, the first of them first, whenever chunks are
        written there otherwise. Nothing leaves the CPU tier."""
        for chunk in reversed(chunks):
            slot = self._ledger.lookup(chunk)
            if slot is not None and chunk not in self._writing[tier] and self.may_hand_over(tier, chunk):
                self._urgent[tier].add(chunk)
                self._unwritten[tier][chunk] = slot
                self._unwritten[tier].move_to_end(chunk, last=False)

    def unwritten(self, tier: str) -> int:
        """Chunks handed over that are not there yet, and all that are being written. O(1)."""
        return len(self._urgent[tier]) + len(self._writing[tier])

    def check(self) -> None:
        """Assert every invariant."""
        self.fetches.check()
        for name, chunks in self._writing.items():
            jobs = [job.job for job in self._jobs.values() if (job.job.tier, job.job.kind) == (name, "write")]
            assert chunks == {piece.chunk for job in jobs for piece in job.pieces}, "a chunk is written by no job"
            emptying = self._emptying.get(name)
            known = emptying in (None, _ANNOUNCED) or emptying in self._jobs
            assert known or name in self._empty_again, "a tier is barred for ever"
            dropping = set(self._dropping[name].values()) - {_ANNOUNCED}
            assert dropping <= ({_FAILED} if name in self._drop_again else set()) | self._jobs.keys(), (
                "a chunk is barred for ever"
            )
            assert self._urgent[name] <= self._unwritten[name].keys(), "a chunk is urgent and is not to be written"
            assert self._leaving[name] <= chunks | self._unwritten[name].keys(), "a chunk leaves without being written"

    # ---- inside -------------------------------------------------------------------------------------------------

    def _send(self, tier: str, kind: TierKind, pairs: Sequence[tuple[Piece, Slot | None]]) -> int:
        self._next_job += 1
        seconds = self._tiers[tier].deadline if kind == "fetch" else WRITE_SECONDS
        job = TierJob(self._next_job, tier, kind, [piece for piece, _ in pairs], seconds, self.generation)
        slots = [slot for _, slot in pairs if slot is not None]
        self._jobs[job.job] = _Job(job, slots, self._clock())
        self._outbox.append(job)
        return job.job

    def _end(self, ended: _Job) -> None:
        job, result = ended.job, ended.result
        if job.kind == "fetch":
            self._end_fetch(ended)
        elif job.kind == "write":
            self._end_write(ended)
        elif job.kind == "drop" and job.generation == self.generation:
            self._end_drop(job, result)
        for cause in result.failed.values() if job.kind in ("fetch", "write") else ():
            self._stats.tier_failed(job.tier, job.kind, cause)
        if result.failed and len(result.failed) == len(job.pieces) and _STORE_WIDE & set(result.failed.values()):
            self._paused[job.tier, job.kind] = self._clock() + PAUSE_SECONDS

    def _is_paused(self, tier: str, kind: TierKind) -> bool:
        return self._paused.get((tier, kind), 0.0) > self._clock()

    def _end_drop(self, job: TierJob, result: TierResult) -> None:
        if not job.pieces and self._emptying.get(job.tier) == job.job:
            # Where some rank has no slots, no rank ever fetches.
            self._end_emptying(job.tier, emptied=not result.failed or not self._ledger.capacity)
        dropping, chunks = self._dropping[job.tier], [piece.chunk for piece in job.pieces]
        for chunk in chunks:
            if dropping.get(chunk) != job.job:
                continue
            if chunk in result.failed and self._ledger.capacity:
                dropping[chunk] = _FAILED
                self._drop_again[job.tier] = self._clock() + EMPTY_AGAIN_SECONDS
            else:
                del dropping[chunk]
        self._take_off_record(job.tier, chunks)

    def _end_emptying(self, tier: str, *, emptied: bool) -> None:
        if emptied:
            del self._emptying[tier]
        else:
            self._empty_again[tier] = self._clock() + EMPTY_AGAIN_SECONDS

    def _end_fetch(self, ended: _Job) -> None:
        job, result = ended.job, ended.result
        for slot in self.fetches.ended(job.job, result):
            self._remember_above(job.tier, slot)
        if job.generation == self.generation:
            gone = [chunk for chunk, cause in result.failed.items() if cause not in _STORE_WIDE]
            self._ledger.removed(job.tier, gone)
        fetched = len(ended.slots) - len(result.failed)
        self._stats.loaded(job.tier, fetched, result.nbytes * self._ranks, result.seconds)

    def _end_write(self, ended: _Job) -> None:
        job, result = ended.job, ended.result
        self._writing[job.tier].difference_update(piece.chunk for piece in job.pieces)
        for slot in ended.slots:
            self._ledger.unpin(slot)
        done = [slot for slot in ended.slots if slot.chunk not in result.failed]
        written = [slot.chunk for slot in done]
        if job.generation == self.generation:
            most = self._tiers[job.tier].most
            self._ledger.stored(job.tier, [slot.chunk for slot in done if not slot.tokens], most)
            self._ledger.tails_stored(job.tier, [slot.chunk for slot in done if slot.tokens], most)
        else:
            # Meanwhile these chunks may have come anew, or their weights have got another name.
            self.committed(filter(None, (self._ledger.lookup(piece.chunk) for piece in job.pieces)))
        for slot in ended.slots:
            self._leave(job.tier, slot)
        if result.incompressible:
            self._stats.add("incompressible_chunks", result.incompressible, job.tier)
        self._stats.saved(job.tier, len(written), result.nbytes * self._ranks, result.seconds)

    def _take_off_record(self, tier: str, chunks: Sequence[bytes]) -> None:
        """These chunks, or all, are deleted. Said when that begins, and when it has ended: a look-up in between may have found
        some. What is written later is put on record later, since ranks delete and write in the order of the jobs."""
        if chunks:
            self._ledger.removed(tier, chunks)
        else:
            self._ledger.cleared(tier)

    def _leave(self, tier: str, slot: Slot) -> None:
        """Nothing more is done to have a chunk in a tier: if it is there and was to move there, it leaves the CPU tier."""
        if slot.chunk not in self._leaving[tier]:
            return
        self._leaving[tier].discard(slot.chunk)
        if tier in self._ledger.below(slot.chunk) and not slot.kept and self._ledger.lookup(slot.chunk) is slot:
            self._ledger.forget(slot.chunk)
