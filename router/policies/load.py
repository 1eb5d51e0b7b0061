"""Policies that look at load alone."""

import random
from collections.abc import Sequence

from router.policies.base import Candidate, Choice, Query, pick, short


class LeastLoaded:
    """The worker with the least load in tokens."""

    name = "least-loaded"
    uses_hits = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        del query
        best = pick(candidates, self._rng)
        return Choice(best.worker, f"least loaded: {short(best.load)} tokens, {best.in_flight} in flight")


class RoundRobin:
    """Each worker of a model in turn, by name."""

    name = "round-robin"
    uses_hits = False

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        names = sorted(candidates, key=lambda c: c.worker.name)
        last = self._last.get(query.model, "")
        chosen = next((c for c in names if c.worker.name > last), names[0])
        self._last[query.model] = chosen.worker.name
        return Choice(chosen.worker, "round robin")
