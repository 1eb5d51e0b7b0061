"""The queue of requests that wait for a place: urgent ones first, and tenants in turn.

Within one priority places are given by start-time fair queueing: a request starts, in virtual time, when the one before
it of the same tenant ends, or now if the tenant has none waiting, and takes as long as its size divided by the tenant's
weight. The request that starts first goes first. So a tenant that sends ten times as much waits longer, not the others;
with a single tenant it is first come, first served.

A full queue makes room for who has a better claim: a more urgent request takes the place of the last one of the least
urgent, and a tenant with fewer waiting takes that of the last one of whoever has most.
"""

import asyncio
import heapq
from collections import deque
from itertools import count
from typing import NamedTuple

BYTES_PER_UNIT = 8192
"""A body of this many bytes is twice the work of an empty one, as far as the queue is concerned."""


class Claim(NamedTuple):
    """Who asks for a place, how urgently (smaller is more), with which share, and for how much."""

    tenant: str = ""
    priority: int = 0
    weight: float = 1.0
    bytes: int = 0

    @property
    def cost(self) -> float:
        return (1 + self.bytes / BYTES_PER_UNIT) / self.weight


NOBODY = Claim()


class Turn:
    """One request that waits; ``future`` is done when its turn has come."""

    __slots__ = ("claim", "future", "start")

    def __init__(self, claim: Claim, start: float, future: asyncio.Future[None]) -> None:
        self.claim = claim
        self.start = start
        self.future = future

    @property
    def waits(self) -> bool:
        return not self.future.done()


class _Level:
    """The requests of one priority."""

    __slots__ = ("_ends", "_heap", "_order", "_virtual", "size", "waiting")

    def __init__(self) -> None:
        self.size = 0
        self._heap: list[tuple[float, int, Turn]] = []
        self._order = count()
        self._virtual = 0.0
        self._ends: dict[str, float] = {}
        self.waiting: dict[str, deque[Turn]] = {}

    def add(self, claim: Claim, future: asyncio.Future[None]) -> Turn:
        start = max(self._virtual, self._ends.get(claim.tenant, 0.0))
        self._ends[claim.tenant] = start + claim.cost
        turn = Turn(claim, start, future)
        heapq.heappush(self._heap, (start, next(self._order), turn))
        self.waiting.setdefault(claim.tenant, deque()).append(turn)
        self.size += 1
        return turn

    def pop(self) -> Turn | None:
        while self._heap:
            start, _, turn = heapq.heappop(self._heap)
            if turn.waits:
                self._virtual = start
                self.forget(turn)
                return turn
        return None

    def forget(self, turn: Turn) -> None:
        """It waits no more; what the heap still holds of it is passed over. O(waiting of its tenant)."""
        self.size -= 1
        line = self.waiting[turn.claim.tenant]
        if line[0] is turn:
            line.popleft()
        else:
            line.remove(turn)
        if not line:
            del self.waiting[turn.claim.tenant]

    def compact(self) -> None:
        """Drop what is to be passed over, once it is more than what waits."""
        if len(self._heap) > 2 * self.size + 64:
            self._heap = [entry for entry in self._heap if entry[2].waits]
            heapq.heapify(self._heap)

    def longest(self) -> deque[Turn]:
        return max(self.waiting.values(), key=len)


class FairQueue:
    """Who waits. Adding and taking is O(log waiting)."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self.size = 0

    def __len__(self) -> int:
        return self.size

    @property
    def by_tenant(self) -> dict[str, int]:
        """How many of each tenant wait. O(tenants)."""
        counts: dict[str, int] = {}
        for level in self._levels.values():
            for tenant, line in level.waiting.items():
                counts[tenant] = counts.get(tenant, 0) + len(line)
        return counts

    def add(self, claim: Claim, future: asyncio.Future[None]) -> Turn:
        """Stand in line."""
        self.size += 1
        return self._levels.setdefault(claim.priority, _Level()).add(claim, future)

    def pop(self) -> Turn | None:
        """Whose turn it is, taken out of the queue; None when nobody waits."""
        for priority in sorted(self._levels) if self.size else ():
            # Requests that were cancelled stand here until their tasks had the time to say so.
            if (turn := self._levels[priority].pop()) is not None:
                self._left(priority)
                return turn
        return None

    def discard(self, turn: Turn) -> None:
        """Leave before the turn has come. The future must be done, and the turn not popped."""
        priority = turn.claim.priority
        self._levels[priority].forget(turn)
        self._left(priority)

    def displace(self, claim: Claim) -> Turn | None:
        """The request that has to make room for this one, taken out of the queue; None when none has."""
        if not self.size or (last := max(self._levels)) < claim.priority:
            return None
        level = self._levels[last]
        line = level.longest()
        if last == claim.priority and len(line) <= len(level.waiting.get(claim.tenant, ())) + 1:
            return None
        turn = next((turn for turn in reversed(line) if turn.waits), None)
        if turn is not None:
            level.forget(turn)
            self._left(last)
        return turn

    def _left(self, priority: int) -> None:
        self.size -= 1
        level = self._levels[priority]
        if level.size:
            level.compact()
        else:
            del self._levels[priority]
