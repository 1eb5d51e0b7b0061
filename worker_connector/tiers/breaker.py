"""When a store is left alone, and when it is tried again.

closed ── a failure ──► open ── pause over and a ping answered ──► trial ── one operation succeeded ──► closed
                          ▲                                          └── it failed: a longer pause ──► open

The first failure opens it: with a threshold, every request up to it would pay a deadline. A blip costs little, because
the first pause is short; pauses double up to a bound and are shortened at random, so that the workers of a fleet do not
come back to a store all at once. A breaker that closed and soon opens again goes on with the pauses where it was.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

CLOSED, OPEN, TRIAL = "closed", "open", "trial"


@dataclass(frozen=True, kw_only=True)
class Pauses:
    """Seconds."""

    first: float = 0.25
    longest: float = 30.0


class Breaker:
    """Thread-safe. What is admitted gets a ticket and hands it back with its result; tickets of an earlier state are void."""

    def __init__(
        self,
        pauses: Pauses = Pauses(),
        clock: Callable[[], float] = time.monotonic,
        share: Callable[[], float] = random.random,
    ) -> None:
        self._pauses = pauses
        self._clock = clock
        self._share = share
        self._lock = threading.Lock()
        self._state = CLOSED
        self._round = 0
        self._trying = False
        self._next_pause = pauses.first
        self._closed_at = float("-inf")
        self.openings = 0
        self.cause = ""
        self.text = ""

    @property
    def state(self) -> str:
        return self._state

    def admit(self) -> int | None:
        """A ticket, or None while the store is left alone."""
        with self._lock:
            if self._state == OPEN or (self._state == TRIAL and self._trying):
                return None
            self._trying = self._state == TRIAL
            return self._round

    def succeeded(self, ticket: int) -> bool:
        """True when this closed the breaker."""
        with self._lock:
            if ticket != self._round or self._state != TRIAL:
                return False
            self._enter(CLOSED)
            self._closed_at = self._clock()
            return True

    def failed(self, ticket: int, cause: str, text: str) -> bool:
        """True when this opened the breaker."""
        with self._lock:
            if ticket != self._round or self._state == OPEN:
                return False
            was_stable = self._state == CLOSED and self._clock() - self._closed_at > self._next_pause
            if was_stable:
                self._next_pause = self._pauses.first
            self._enter(OPEN)
            self.openings += 1
            self.cause, self.text = cause, text
            return True

    def forgone(self, ticket: int) -> None:
        """The operation ended without telling anything of the store."""
        with self._lock:
            if ticket == self._round:
                self._trying = False

    def pause(self) -> float:
        """Seconds to wait before the next ping; each call in a row doubles it."""
        with self._lock:
            pause = self._next_pause
            self._next_pause = min(2 * pause, self._pauses.longest)
            return pause * (0.5 + 0.5 * self._share())

    def answered(self) -> None:
        """A ping was answered: one operation may try."""
        with self._lock:
            if self._state == OPEN:
                self._enter(TRIAL)

    def still_failing(self, cause: str, text: str) -> bool:
        """A ping failed. True when the cause is another one than before."""
        with self._lock:
            changed = cause != self.cause
            self.cause, self.text = cause, text
            return changed

    def _enter(self, state: str) -> None:
        self._state = state
        self._round += 1
        self._trying = False
