"""The scripted engine with lower tiers, whose stores lose, spoil, delay and refuse what they are given."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, PER_CHUNK, Engine
from worker_connector.lower import TierRules
from worker_connector.plan import Piece, StepPlan, TierJob, TierResult

_HASH = 16
Content = dict[tuple[int, int], dict[int, tuple[int, int]]]
"""A chunk on one rank: (group, position) -> what the block holds."""


@dataclass(eq=False)
class _Under:
    """A job on one rank."""

    rank: int
    delay: int
    job: TierJob


class Question:
    """A look-up that a test answers."""

    def __init__(self, chunks: Sequence[bytes], tails: Sequence[bytes] = ()) -> None:
        self.chunks = list(chunks)
        self.tails = list(tails)
        self.pending = True


class TieredEngine(Engine):
    """``stores`` is what each tier holds, by rank and chunk. ``fail`` gives the cause for which a chunk's move fails on a
    rank, empty for none."""

    def __init__(self, *, rules: Sequence[TierRules] = (TierRules(name="disk"),), **options: Any) -> None:
        super().__init__(tiers=rules, **options)
        self.stores: dict[str, dict[tuple[int, bytes], tuple[tuple[int, ...], Content]]] = {
            each.name: {} for each in rules
        }
        self.fail: Callable[[TierJob, bytes, int], str] = lambda _job, _chunk, _rank: ""
        self.hold_tiers = False
        self.drops_fail = False
        self.under: list[_Under] = []
        self.questions: list[Question] = []
        self.rng = random.Random(1)

    def ask(self, chunks: Sequence[bytes], tails: Sequence[bytes] = ()) -> Question:
        """As what looks chunks up: ``answer`` ends it."""
        self.questions.append(Question(chunks, tails))
        return self.questions[-1]

    def answer(self) -> None:
        """Tell of every question what all ranks' stores hold."""
        for question in self.questions:
            for tier in self.stores:
                found = [chunk for chunk in question.chunks if self.has(tier, chunk)]
                self.planner.ledger.stored(tier, self.planner.lower.may_be_found(tier, found))
                tails = [tail for tail in question.tails if self.has(tier, tail)]
                self.planner.ledger.tails_stored(tier, self.planner.lower.may_be_found(tier, tails))
            question.pending = False
        self.questions.clear()

    def has(self, tier: str, chunk: bytes) -> bool:
        """Whether every rank's store has the chunk."""
        name = _object(chunk, self.planner.lower.generation)
        return all((rank, name) in self.stores[tier] for rank in range(self.ranks))

    def chunks_in(self, tier: str) -> set[bytes]:
        """By their hash, whatever the generation."""
        return {name[:_HASH] for _, name in self.stores[tier]}

    def lose_cpu(self) -> None:
        """Drop everything from the CPU tier, and from nowhere else."""
        self.planner.ledger.clear_cpu()

    def _run_workers(self, plan: StepPlan, output: Any) -> None:
        super()._run_workers(plan, output)
        for job in plan.tiers:
            self.under += [_Under(rank, self.delay(), job) for rank in range(self.ranks)]

    def _absorb(self, plan: StepPlan) -> None:
        if not hasattr(self, "_next_report"):
            self._take_report()
        for each in list(self.under):
            if not self.hold_tiers and each.delay <= 0:
                self.under.remove(each)
                self._end_job(each)
            each.delay -= 1
        super()._absorb(plan)

    def _end_job(self, under: _Under) -> None:
        job, result = under.job, TierResult()
        store = self.stores[job.tier]
        if job.kind == "drop":
            self._drop(under, result)
        for piece in job.pieces if job.kind != "drop" else ():
            cause = self.fail(job, piece.chunk, under.rank)
            name = _object(piece.chunk, job.generation)
            found = store.get((under.rank, name))
            if job.kind == "fetch" and found is None and not cause:
                cause = "missing"
            if cause:
                result.failed[piece.chunk] = cause
            if job.kind == "write" and not cause:
                store[under.rank, name] = (piece.missing, self._read(under.rank, piece))
            if job.kind == "fetch":
                missing, content = found if found is not None and not cause else ((), {})
                self._fill(under.rank, piece.slot, content)
                if any(missing):
                    result.missing[piece.chunk] = missing
        result.nbytes, result.seconds = (1 << 20) * len(job.pieces), 0.001
        reported = self._next_report.tiers.setdefault(job.job, TierResult(0))
        reported.merge(result)

    def _drop(self, under: _Under, result: TierResult) -> None:
        if self.drops_fail:
            result.failed |= dict.fromkeys([piece.chunk for piece in under.job.pieces] or [b""], "unreachable")
            return
        store, named = self.stores[under.job.tier], {piece.chunk for piece in under.job.pieces}
        for rank, name in list(store):
            own = name == _object(name[:_HASH], under.job.generation)
            if rank == under.rank and own and (not named or name[:_HASH] in named):
                del store[rank, name]

    def _read(self, rank: int, piece: Piece) -> Content:
        """Of a tail, what it has; behind it lies what was in the slot before."""
        blocks = piece.tokens // BLOCK or PER_CHUNK
        held = self.slots[rank].items()
        return {(group, at): dict(block) for (slot, group, at), block in held if slot == piece.slot and at < blocks}

    def _fill(self, rank: int, slot: int, content: Content) -> None:
        """What was in the slot is gone; what failed leaves nothing of use."""
        for key in [key for key in self.slots[rank] if key[0] == slot]:
            del self.slots[rank][key]
        for (group, at), held in content.items():
            self.slots[rank][slot, group, at] = dict(held)


def _object(chunk: bytes, generation: str) -> bytes:
    """The name of an object."""
    return chunk + generation.encode()


def spoil(rng: random.Random, causes: Sequence[str], share: float) -> Callable[[TierJob, bytes, int], str]:
    """Fails so large a share of moves, for one of these causes each."""
    return lambda _job, _chunk, _rank: rng.choice(causes) if rng.random() < share else ""


__all__ = ["CHUNK", "TieredEngine", "spoil"]
