"""Retries: how many the fleet can bear, and how long to wait before one.

A budget like Finagle's: each request earns ``ratio`` of a retry and each second ``RESERVE_PER_S``, and what is not spent
fades with ``WINDOW_S``. While few requests fail, every one of them may be tried again; when most fail, because the
fleet is overloaded, retries add no more than ``ratio`` to its load.
"""

import math
import random

RESERVE_PER_S = 10.0
WINDOW_S = 10.0
LONGEST_BACKOFF_S = 1.0


class RetryBudget:
    """``requests`` is counted up by whoever sends one; all else is worked out when a retry is wanted."""

    __slots__ = ("_at", "_level", "_seen", "exhausted", "ratio", "requests", "taken")

    def __init__(self, ratio: float, now: float = 0.0) -> None:
        self.ratio = ratio
        self._level = RESERVE_PER_S * WINDOW_S if ratio else 0.0
        self._at = now
        self._seen = 0
        self.requests = 0
        self.taken = 0
        self.exhausted = 0

    def allows(self, now: float) -> bool:
        """Whether one more retry is within the budget."""
        self._earn(now)
        return self._level >= 1

    def take(self, now: float) -> bool:
        """Spend one retry; False, and nothing spent, when none is left."""
        if not self.allows(now):
            self.exhausted += 1
            return False
        self._level -= 1
        self.taken += 1
        return True

    def _earn(self, now: float) -> None:
        elapsed = now - self._at
        if not self.ratio or elapsed <= 0:
            return
        per_second = self.ratio * (self.requests - self._seen) / elapsed + RESERVE_PER_S
        kept = math.exp(-elapsed / WINDOW_S)
        self._level = self._level * kept + per_second * WINDOW_S * (1 - kept)
        self._seen, self._at = self.requests, now


def backoff(attempt: int, base: float, rng: random.Random) -> float:
    """Seconds to wait before the ``attempt``-th retry, from 1 on: anything up to ``base`` doubled each time, at random,
    so that requests which failed together do not come back together."""
    return rng.random() * min(LONGEST_BACKOFF_S, base * (1 << min(attempt - 1, 10)))
