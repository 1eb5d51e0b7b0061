"""A policy that runs beside the active one and changes nothing: how often would it have chosen otherwise, and what would
have come of it, as far as can be predicted?"""

from collections.abc import Sequence

import msgspec

from router.policies.base import Candidate, Choice, Policy, Query
from router.policies.least_ttft import predict


class Comparison(msgspec.Struct):
    """Sums over all decisions. The gain is what the shadow's choices were predicted to save, in seconds to first token
    and in prompt tokens reused; what they were predicted to lose is summed apart."""

    policy: str
    same: int = 0
    other: int = 0
    failed: int = 0
    saved_seconds: float = 0.0
    lost_seconds: float = 0.0
    saved_tokens: int = 0
    lost_tokens: int = 0


class Shadowed:
    """The active policy, watched by another."""

    def __init__(self, active: Policy, shadow: Policy) -> None:
        self.name = active.name
        self.uses_hits = active.uses_hits or shadow.uses_hits
        self.uses_tiers = True
        self.learns = True
        self.comparison = Comparison(shadow.name)
        self._active = active
        self._shadow = shadow

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        choice = self._active.choose(query, candidates)
        try:
            self._compare(query, candidates, choice)
        except Exception:  # noqa: BLE001 - what only watches must not fail a request
            self.comparison.failed += 1
        return choice

    def _compare(self, query: Query, candidates: Sequence[Candidate], choice: Choice) -> None:
        comparison = self.comparison
        rival = self._shadow.choose(query, candidates).worker
        if rival is choice.worker:
            comparison.same += 1
            return
        comparison.other += 1
        numbers = {id(candidate.worker): number for number, candidate in enumerate(candidates)}
        first, second = numbers[id(choice.worker)], numbers[id(rival)]
        ours, theirs = candidates[first], candidates[second]
        predictions = predict(query, candidates)
        gain = predictions[first].total - predictions[second].total
        comparison.saved_seconds += max(gain, 0.0)
        comparison.lost_seconds += max(-gain, 0.0)
        comparison.saved_tokens += max(theirs.hit_tokens - ours.hit_tokens, 0)
        comparison.lost_tokens += max(ours.hit_tokens - theirs.hit_tokens, 0)
