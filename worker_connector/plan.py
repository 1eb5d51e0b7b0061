"""What the scheduler half tells the workers each step, and what they answer.

All of it is plain data, pickled by the engine on its way between processes. A ``Span`` names blocks by the engine's
block ids; ranks turn it into byte copies of their own share.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

TierKind = Literal["fetch", "write", "drop", "pin", "unpin"]

MAX_SAMPLES = 64
"""Most transfer measurements in one report."""


@dataclass(slots=True)
class Span:
    """Blocks of one KV-cache group, in order, at block positions ``at``, ``at + 1``, … of a slot."""

    slot: int
    group: int
    at: int
    blocks: list[int]


@dataclass(slots=True)
class LoadJob:
    """Fill a parked request's ``blocks`` from slots. ``refused``: do not copy, only report the load as failed.
    ``deadline`` is in seconds from the moment the worker gets the job."""

    request_id: str
    spans: list[Span]
    deadline: float
    blocks: list[int] = field(default_factory=list)
    refused: bool = False


@dataclass(slots=True)
class Comparison:
    """Two slots of one chunk: ``held`` is that of the cache, ``again`` was computed again."""

    held: int
    again: int


@dataclass(slots=True)
class SaveJob:
    """Copy blocks that this step's forward fills, or that were full before it, into slots; then tell how much the slots of
    each comparison differ."""

    job: int
    spans: list[Span]
    compare: list[Comparison] = field(default_factory=list)


@dataclass(slots=True)
class Piece:
    """One chunk on its way between a slot and a lower tier. ``missing`` are the blocks that the slot lacks at the front of
    each KV-cache group, empty where it lacks none. Of a tail, the beginning of a chunk, ``tokens`` says how many it has."""

    chunk: bytes
    slot: int
    missing: tuple[int, ...] = ()
    tokens: int = 0


@dataclass(slots=True)
class TierJob:
    """Chunks between slots and a lower tier: ``fetch`` fills slots, ``write`` reads them, ``drop`` deletes the tier's
    copies, all of this engine's identity where it names none; ``pin`` and ``unpin`` keep copies from the tier's own eviction or no
    longer, where it can (``unpin`` without names: all). ``deadline`` is in seconds from when its turn comes, ``generation``
    that of the weights whose KV it moves: a job keeps the one it was planned in, on every rank and whenever it runs."""

    job: int
    tier: str
    kind: TierKind
    pieces: list[Piece]
    deadline: float
    generation: str = ""


@dataclass(slots=True)
class TierResult:
    """What became of a ``TierJob`` on so many ranks. ``failed`` tells why, by chunk, in one word, and by the empty name of a
    job that names no chunk; ``missing`` what fetched
    chunks turned out to lack, ``lossy`` which of them are no exact copies; ``incompressible`` counts chunks that were written
    raw for that reason; ``nbytes`` and ``seconds`` are those of the slowest rank."""

    ranks: int = 1
    failed: dict[bytes, str] = field(default_factory=dict)
    missing: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    lossy: set[bytes] = field(default_factory=set)
    incompressible: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def merge(self, other: "TierResult") -> None:
        """Add what became of the same job on other ranks."""
        self.ranks += other.ranks
        self.failed |= other.failed
        for chunk, lacking in other.missing.items():
            mine = self.missing.get(chunk, lacking)
            self.missing[chunk] = tuple(map(max, mine, lacking))
        self.lossy |= other.lossy
        self.incompressible += other.incompressible
        self.nbytes = max(self.nbytes, other.nbytes)
        self.seconds = max(self.seconds, other.seconds)


@dataclass(slots=True)
class StepPlan:
    """One engine step. ``settle``: saves that must have read their blocks before this step's forward, because the
    blocks have other owners from now on. ``idle``: no forward runs, so waiting for a load delays nobody. ``step``: a
    number to return when the step has run, so that it can be timed; 0 for none."""

    loads: list[LoadJob] = field(default_factory=list)
    save: SaveJob | None = None
    settle: list[int] = field(default_factory=list)
    idle: bool = False
    step: int = 0
    tiers: list[TierJob] = field(default_factory=list)


PLAIN = StepPlan()
"""The plan of a step in which there is nothing to do. Nobody may change it."""


@dataclass(slots=True)
class Sample:
    """One transfer on one rank: bytes copied, and seconds from its start to its end."""

    nbytes: int
    seconds: float


@dataclass(slots=True)
class WorkerReport:
    """What ranks did since their last report. ``saved`` counts ranks per job. ``failed_loads`` names the slots whose
    bytes could not be used: none when a load only came too late. ``damaged`` are those of them whose bytes were not the
    ones that were saved. ``tiers`` are results by job, ``lost`` the chunks that a lower tier of some rank gave up, by
    tier. ``compared`` are the largest differences on any rank, by job and slot, ``stores`` the state of ranks' stores by
    rank and tier, told when it has changed."""

    saved: Counter[int] = field(default_factory=Counter)
    failed_saves: set[int] = field(default_factory=set)
    failed_loads: dict[str, set[int]] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    loads: list[Sample] = field(default_factory=list)
    saves: list[Sample] = field(default_factory=list)
    step: int = 0
    tiers: dict[int, TierResult] = field(default_factory=dict)
    lost: dict[str, set[bytes]] = field(default_factory=dict)
    compared: dict[int, dict[int, float]] = field(default_factory=dict)
    stores: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def merge(self, other: "WorkerReport") -> None:
        """Add another rank's report to this one."""
        self.saved.update(other.saved)
        self.failed_saves |= other.failed_saves
        for request_id, slots in other.failed_loads.items():
            self.failed_loads[request_id] = self.failed_loads.get(request_id, set()) | slots
        self.damaged |= other.damaged
        self.loads += other.loads
        self.saves += other.saves
        self.step = max(self.step, other.step)
        for job, result in other.tiers.items():
            if job in self.tiers:
                self.tiers[job].merge(result)
            else:
                self.tiers[job] = result
        for tier, chunks in other.lost.items():
            self.lost[tier] = self.lost.get(tier, set()) | chunks
        self.stores |= other.stores
        for job, found in other.compared.items():
            mine = self.compared.setdefault(job, {})
            mine |= {slot: max(value, mine.get(slot, 0.0)) for slot, value in found.items()}

    def __bool__(self) -> bool:
        told = (
            self.saved
            or self.failed_saves
            or self.failed_loads
            or self.damaged
            or self.loads
            or self.saves
            or self.step
        )
        return bool(told or self.tiers or self.lost or self.compared or self.stores)
