"""What the two halves of the vision cache tell each other in a step.

A ticket names one output in one place for good: tickets are never given twice, so word of an output that was dropped
meanwhile cannot be taken for word of a later one.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grant:
    """Room for one output: ``[offset, offset + nbytes)`` of every rank's memory."""

    ticket: int
    offset: int
    nbytes: int


@dataclass
class VisionPlan:
    """Scheduler half to ranks. A rank first loads, then forgets, then saves: what it forgets may make room for what it
    saves, and be loaded a last time."""

    loads: dict[str, int] = field(default_factory=dict)
    forget_all: bool = False
    forget: list[int] = field(default_factory=list)
    saves: dict[str, Grant] = field(default_factory=dict)


NOTHING = VisionPlan()
"""The plan of a step without work."""


@dataclass
class VisionReport:
    """Ranks to scheduler half. ``kept`` counts the ranks that have an output now; ``refused`` are outputs that at least
    one rank does not have; ``nbytes`` is how large outputs really were, as far as the rank saw them. ``without_memory``
    are ranks that keep nothing at all."""

    kept: dict[int, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    nbytes: dict[int, int] = field(default_factory=dict)
    without_memory: int = 0

    def merge(self, other: "VisionReport") -> None:
        """Add what another rank, or the same one, says."""
        for ticket, ranks in other.kept.items():
            self.kept[ticket] = self.kept.get(ticket, 0) + ranks
        self.refused |= other.refused
        for ticket, nbytes in other.nbytes.items():
            self.nbytes[ticket] = max(nbytes, self.nbytes.get(ticket, 0))
        self.without_memory += other.without_memory

    def __bool__(self) -> bool:
        return bool(self.kept or self.refused or self.without_memory)
