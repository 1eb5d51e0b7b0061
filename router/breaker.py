"""The circuit breaker: keeps a worker out while requests to it fail, and finds out when they would not.

What counts against a worker is what only a worker can be blamed for: no connection, no answer in time, a connection
that broke, and 502, 503 and 504. It opens when ``failures`` of them came in a row, or when they are half of the last
``WINDOW`` outcomes. It stays open for a while, then lets one request try; each failed try doubles the time, up to
sixteen times. A 500 may be the fault of the request: it is a suspicion, and as many of those in a row only have the
worker asked for a token of its own (see router.probe).

Requests that were under way when the breaker opened or closed say nothing about the worker as it is now: each outcome
carries the ``generation`` in which its request began, and one of another generation is ignored. So the end of a worker
with 300 requests in flight is one event, not 300.
"""

from typing import Literal

WINDOW = 20
_MASK = (1 << WINDOW) - 1
_LONGEST_DOUBLING = 4


class Breaker:
    """Of one worker. Every call is O(1); while all is well, one comparison."""

    __slots__ = (
        "_closed_until",
        "_failures",
        "_history",
        "_limit",
        "_seconds",
        "_suspicions",
        "_trying",
        "badness",
        "generation",
    )

    def __init__(self, failures: int, seconds: float) -> None:
        self.configure(failures, seconds)
        self.generation = 0
        self._failures = 0
        self._suspicions = 0
        self._history = 0
        self.badness = 0
        """How often in a row it opened; 0 while closed."""
        self._closed_until = 0.0
        self._trying = False

    def configure(self, failures: int, seconds: float) -> None:
        """Other limits from now on; what was counted stays."""
        self._limit, self._seconds = failures, seconds

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if not self.badness:
            return "closed"
        return "half-open" if self._trying else "open"

    def allows(self, now: float) -> bool:
        return not self.badness or (now >= self._closed_until and not self._trying)

    def begin(self) -> int:
        """A request is sent; while open, it is the one that tries. The generation to tell with its outcome."""
        if self.badness:
            self._trying = True
        return self.generation

    def succeeded(self, generation: int | None = None) -> None:
        if generation is not None and generation != self.generation:
            return
        if self.badness:
            self._close()
        elif self._history or self._suspicions:
            self._failures = self._suspicions = 0
            self._history = (self._history << 1) & _MASK

    def abandoned(self, generation: int | None = None) -> None:
        """The request ended without saying anything about the worker."""
        if generation is None or generation == self.generation:
            self._trying = False

    def failed(self, now: float, generation: int | None = None) -> None:
        if generation is not None and generation != self.generation:
            return
        self._failures += 1
        self._history = ((self._history << 1) | 1) & _MASK
        if self.badness:
            if now >= self._closed_until:
                self._open(now)
            else:
                self._trying = False  # sent although it was open, for want of a better worker
        elif self._failures >= self._limit or self._history.bit_count() >= max(self._limit, WINDOW // 2):
            self._open(now)

    def suspected(self, generation: int | None = None) -> bool:
        """The worker answered 500. Whether it should now be asked if it works at all; ``convicted`` or ``acquitted`` has
        to follow."""
        if generation is not None and generation != self.generation:
            return False
        self._suspicions += 1
        return self.badness > 0 or self._suspicions >= self._limit

    def convicted(self, now: float) -> None:
        """It was asked, and does not work."""
        self._open(now)

    def acquitted(self) -> None:
        """It was asked, and works: the requests were at fault."""
        self._suspicions = 0
        if self.badness:
            self._close()

    def _open(self, now: float) -> None:
        self._closed_until = now + self._seconds * (1 << min(self.badness, _LONGEST_DOUBLING))
        self.badness += 1
        self.generation += 1
        self._trying = False

    def _close(self) -> None:
        self._failures = self._suspicions = self._history = self.badness = 0
        self.generation += 1
        self._trying = False
