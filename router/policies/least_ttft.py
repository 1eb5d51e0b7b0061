"""Least time to first token, of everybody.

For each worker the time to this request's first token is predicted:

    fixed + load / speed + loading + uncached / speed

``load`` is what the worker has to compute before, in tokens (what it has not computed yet, and a share for each request
it decodes); ``loading`` is the part of the hit behind the GPU, by tier, at the bandwidths the worker measured;
``uncached`` is what it holds nothing of. Speed and the fixed part are learned from the worker's own answers
(``router.pace``); until there are some, the worker's report counts, or a guess. Workers whose speeds differ by no more
than measurements of one speed do are taken as equally fast, lest the luckiest measurement draws everybody.

The worker with the least prediction would serve this request best and the next ones worse: seconds of computing delay
whoever comes after, and what they compute evicts what others hold, while seconds of waiting are spent by nobody else.
So computing counts ``compute_weight`` times when workers are compared, among those that are not predicted to be more than
``GIVEN_UP_S`` later than the soonest. Of equals the least loaded is taken, and of those
one at random.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from router.pace import DEFAULT_BANDWIDTH
from router.policies.base import Candidate, Choice, Query, pick
from router.policies.hot import HotPrefixes
from router.workers import Worker

ALIKE = 0.15
"""A speed this close to the mean, as a share of it, is the mean."""
ALIKE_S = 0.02
"""A fixed part this close to the mean, in seconds, is the mean."""
GIVEN_UP_S = 1.0
"""The most that a request waits for the others' sake, in seconds beyond the least prediction."""
SAME_S = 0.001
"""Costs that differ by less, in seconds, are equal."""


class Prediction(NamedTuple):
    """Seconds to a first token, by what they are spent on."""

    fixed: float
    waiting: float
    loading: float
    computing: float

    @property
    def total(self) -> float:
        return self.fixed + self.waiting + self.loading + self.computing

    def cost(self, compute_weight: float) -> float:
        """What the fleet spends on it."""
        return self.fixed + self.waiting + self.loading + compute_weight * self.computing


class LeastTtft:
    name = "least-ttft"
    uses_hits = True
    uses_tiers = True
    learns = True

    def __init__(self, rng: random.Random, compute_weight: float = 4.0) -> None:
        self._rng = rng
        self._weight = compute_weight
        self._hot = HotPrefixes()

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        predictions = predict(query, candidates)
        latest = min(prediction.total for prediction in predictions) + GIVEN_UP_S
        costs = [part.cost(self._weight) if part.total <= latest else math.inf for part in predictions]
        enough = min(costs) + SAME_S
        equal = [candidate for candidate, cost in zip(candidates, costs, strict=True) if cost <= enough]
        chosen = equal[0] if len(equal) == 1 else pick(equal, self._rng)
        if chosen.hit_tokens:
            idle = pick(candidates, self._rng)
            if why := self._hot.copy_instead(query, chosen, idle):
                return Choice(idle.worker, why)
        return Choice(chosen.worker, _reason(query, chosen, predictions[candidates.index(chosen)]))


def predict(query: Query, candidates: Sequence[Candidate]) -> list[Prediction]:
    """The time to the request's first token at each worker. O(candidates)."""
    speeds = _levelled([c.worker.pace.speed(c.prefill_speed) for c in candidates], ALIKE, 0.0)
    fixed = _levelled([c.worker.pace.fixed for c in candidates], 0.0, ALIKE_S)
    return [_predict(query, *parts) for parts in zip(candidates, speeds, fixed, strict=True)]


def _predict(query: Query, candidate: Candidate, speed: float, fixed: float) -> Prediction:
    behind = candidate.hit_tokens - candidate.gpu_tokens
    loading = loading_seconds(query, candidate.worker, behind) if behind > 0 else 0.0
    uncached = max(0, query.prompt_tokens - candidate.hit_tokens)
    return Prediction(fixed, candidate.load / speed, loading, uncached / speed)


def _levelled(values: list[float], share: float, slack: float) -> list[float]:
    mean = sum(values) / len(values)
    near = share * mean + slack
    return [mean if abs(value - mean) <= near else value for value in values]


def loading_seconds(query: Query, worker: Worker, tokens: int) -> float:
    """How long ``tokens`` of a hit take to load from behind the GPU. O(chunks) with several tiers there."""
    if worker.hello is None:
        return 0.0
    behind = [tier.name for tier in worker.hello.tiers if tier.name != "gpu"]
    held = query.tiers(worker) if query.tiers is not None and len(behind) > 1 else {}
    parts = {tier: held[tier] for tier in behind if held.get(tier)} or dict.fromkeys(behind[:1], tokens)
    share = tokens / max(1, sum(parts.values()))
    return share * sum(count * seconds_per_token(worker, tier) for tier, count in parts.items())


def seconds_per_token(worker: Worker, tier: str) -> float:
    """What a token of a tier takes to load, from what the worker reports; 0 where it does not say how big one is."""
    if worker.hello is None:
        return 0.0
    info = next((item for item in worker.hello.tiers if item.name == tier), None)
    if info is None:
        return 0.0
    latest = worker.heartbeat.load_bandwidth.get(tier, 0.0) if worker.heartbeat is not None else 0.0
    bandwidth = max(latest, 0.0) or max(info.load_bandwidth, 0.0) or DEFAULT_BANDWIDTH.get(tier, 1e9)
    return info.chunk_bytes / worker.hello.chunk_size / bandwidth


def _reason(query: Query, chosen: Candidate, prediction: Prediction) -> str:
    parts = {"waiting": prediction.waiting, "loading": prediction.loading, "computing": prediction.computing}
    spent = ", ".join(f"{1000 * seconds:,.0f} {name}" for name, seconds in parts.items() if seconds >= 0.0005)
    held = f"; holds {chosen.hit_tokens:,} of {query.prompt_tokens:,} tokens" if chosen.hit_tokens else ""
    return f"first token in {1000 * prediction.total:,.0f} ms" + (f": {spent}" if spent else "") + held
