"""Longest hit, until saturated.

The worker that holds the most of a prompt keeps the request, until it is so far ahead of the least loaded worker that
waiting there would cost more than a hit saves: until its lead in uncached tokens in flight passes
``saturation_seconds`` of its own prefill speed. Then the worker with the next longest hit is asked the same question;
the least loaded one leads nobody, so there always is an answer. Among equal hits, which include no hit at all, the
least loaded worker takes the request.
"""

import random
from collections.abc import Sequence

from router.policies.base import Candidate, Choice, Query, pick, short

DEFAULT_PREFILL_SPEED = 8000.0
"""Tokens per second assumed of a worker that has not measured its own."""


class LongestHit:
    name = "longest-hit"
    uses_hits = True

    def __init__(
        self, rng: random.Random, saturation_seconds: float = 2.0, saturation_tokens: int | None = None
    ) -> None:
        self._rng = rng
        self._seconds = saturation_seconds
        self._tokens = saturation_tokens

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        longest = max(c.hit_tokens for c in candidates)
        least = min(c.load for c in candidates)
        if not longest:
            best = pick(candidates, self._rng)
            return Choice(best.worker, f"no hit; least loaded: {short(best.load)} tokens, {best.in_flight} in flight")
        passed: Candidate | None = None
        for hit in sorted({c.hit_tokens for c in candidates}, reverse=True):
            best = pick([c for c in candidates if c.hit_tokens == hit], self._rng)
            if best.load - least <= self.limit(best):
                return Choice(best.worker, _reason(query, best, passed, least))
            passed = passed or best
        raise AssertionError("the least loaded worker leads nobody")

    def limit(self, candidate: Candidate) -> float:
        """The lead in tokens that a worker may have over the least loaded one."""
        if self._tokens is not None:
            return self._tokens
        return self._seconds * (candidate.prefill_speed or DEFAULT_PREFILL_SPEED)


def _reason(query: Query, chosen: Candidate, passed: Candidate | None, least: int) -> str:
    held = f"{chosen.hit_tokens:,} of {query.prompt_tokens:,} tokens"
    if passed is None:
        return f"longest hit: {held}"
    lead = short(passed.load - least)
    return f"saturated: {passed.worker.name} leads by {lead} uncached tokens; next best holds {held}"
