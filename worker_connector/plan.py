"""What the scheduler half tells the workers each step, and what they answer.

All of it is plain data, pickled by the engine on its way between processes. A ``Span`` names blocks by the engine's
block ids; ranks turn it into byte copies of their own share.
"""

from collections import Counter
from dataclasses import dataclass, field

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
class SaveJob:
    """Copy blocks that this step's forward fills, or that were full before it, into slots."""

    job: int
    spans: list[Span]


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
    ones that were saved."""

    saved: Counter[int] = field(default_factory=Counter)
    failed_saves: set[int] = field(default_factory=set)
    failed_loads: dict[str, set[int]] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    loads: list[Sample] = field(default_factory=list)
    saves: list[Sample] = field(default_factory=list)
    step: int = 0

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

    def __bool__(self) -> bool:
        return bool(self.saved or self.failed_saves or self.failed_loads or self.loads or self.saves or self.step)
