"""Policies that look at load alone, or at nothing."""

import random
from collections.abc import Sequence

from router.policies.base import Candidate, Choice, Query, pick, short


class LeastLoaded:
    """The worker with the least load in tokens."""

    name = "least-loaded"
    uses_hits = uses_tiers = learns = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        del query
        return least_loaded(candidates, self._rng)


class PowerOfTwo:
    """The less loaded of two workers drawn at random: nearly as even as looking at all of them, and routers that know
    the same choose differently."""

    name = "power-of-two"
    uses_hits = uses_tiers = learns = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        del query
        drawn = candidates if len(candidates) < 3 else self._rng.sample(candidates, 2)
        best = pick(drawn, self._rng)
        others = [c for c in drawn if c is not best]
        beside = f" against {short(others[0].load)} at {others[0].worker.name}" if others else ""
        return Choice(best.worker, f"less loaded of two: {short(best.load)} tokens{beside}")


class RoundRobin:
    """Each worker of a model in turn, by name."""

    name = "round-robin"
    uses_hits = uses_tiers = learns = False

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        names = sorted(candidates, key=lambda c: c.worker.name)
        last = self._last.get(query.model, "")
        chosen = next((c for c in names if c.worker.name > last), names[0])
        self._last[query.model] = chosen.worker.name
        return Choice(chosen.worker, "round robin")


class Random:
    """Any worker, each as likely."""

    name = "random"
    uses_hits = uses_tiers = learns = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        del query
        return Choice(self._rng.choice(candidates).worker, "at random")


def least_loaded(candidates: Sequence[Candidate], rng: random.Random, why: str = "") -> Choice:
    """The choice by load, with the reason; ``why`` goes before it."""
    best = pick(candidates, rng)
    return Choice(best.worker, f"{why}least loaded: {short(best.load)} tokens, {best.in_flight} in flight")
