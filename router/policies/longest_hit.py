"""Longest hit, until saturated.

The worker that holds the most of a prompt keeps the request, until it is so far ahead of the least loaded worker that
waiting there would cost more than a hit saves: until its lead in uncached tokens in flight passes
``saturation_seconds`` of its own prefill speed. Then the worker with the next longest hit is asked the same question;
the least loaded one leads nobody, so there always is an answer. Among equal hits, which include no hit at all, the
least loaded worker takes the request. A prefix that many requests share is copied before it saturates anybody
(``router.policies.hot``).
"""

import random
from collections.abc import Sequence

from router.policies.base import Candidate, Choice, Query, pick, short
from router.policies.hot import HotPrefixes
from router.policies.load import least_loaded
from router.policies.saturation import Saturation


class LongestHit:
    name = "longest-hit"
    uses_hits = True
    uses_tiers = learns = False

    def __init__(
        self, rng: random.Random, saturation_seconds: float = 2.0, saturation_tokens: int | None = None
    ) -> None:
        self._rng = rng
        self._saturation = Saturation(saturation_seconds, saturation_tokens)
        self._hot = HotPrefixes()

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        least, longest = candidates[0].load, 0
        for each in candidates:
            least = min(least, each.load)
            longest = max(longest, each.hit_tokens)
        if not longest:
            return least_loaded(candidates, self._rng, "no hit; ")
        passed: Candidate | None = None
        hit = longest
        while True:
            best = pick([c for c in candidates if c.hit_tokens == hit], self._rng)
            if best.load - least <= self._saturation.limit(best.prefill_speed):
                return self._or_copy(query, best, candidates, _reason(query, best, passed, least))
            passed = passed or best
            # There is a next one: the least loaded worker leads nobody.
            hit = max([c.hit_tokens for c in candidates if c.hit_tokens < hit])

    def _or_copy(self, query: Query, best: Candidate, candidates: Sequence[Candidate], reason: str) -> Choice:
        idle = pick(candidates, self._rng)
        if idle is best:
            return Choice(best.worker, reason)
        if why := self._hot.copy_instead(query, best, idle):
            return Choice(idle.worker, why)
        return Choice(best.worker, reason)


def _reason(query: Query, chosen: Candidate, passed: Candidate | None, least: int) -> str:
    held = f"{chosen.hit_tokens:,} of {query.prompt_tokens:,} tokens"
    if passed is None:
        return f"longest hit: {held}"
    lead = short(passed.load - least)
    return f"saturated: {passed.worker.name} leads by {lead} uncached tokens; next best holds {held}"
