"""How fast a worker answers, learned from what it delivered.

A first token takes a fixed part, and the tokens due up to it (those ahead of it and its own) over the worker's speed.
Long ones teach the speed: it is the median of the latest. Short ones teach the fixed part: a short prompt often waits
for the step that is under way, so it is the lower quartile of the latest. A pause, another router's burst or a client
that stalled moves neither.
"""

from collections import deque

DEFAULT_SPEED = 8000.0
"""Tokens per second assumed of a worker of which nothing is known."""
LONG_TOKENS = 2048
"""From this many tokens on, an observation says more of the speed than of the fixed part."""
KEPT = 63
ENOUGH = 9
"""Observations from which on they are believed."""
DEFAULT_BANDWIDTH = {"cpu": 20e9, "disk": 3e9, "remote": 1e9}
"""Bytes per second assumed of a tier from which nothing was loaded yet."""


class Pace:
    """One worker's. Times in seconds, speeds in tokens per second; bounded memory."""

    def __init__(self) -> None:
        self._speeds: deque[float] = deque(maxlen=KEPT)
        self._fixed: deque[float] = deque(maxlen=KEPT)
        self.learned_speed = 0.0
        self.fixed = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A first token came after ``seconds``, with ``tokens`` due up to it. O(kept)."""
        if tokens >= LONG_TOKENS:
            # The fixed part is at most half of a long one: a worker that has become quicker shows.
            self._speeds.append(tokens / max(seconds - self.fixed, seconds / 2, 1e-6))
            if len(self._speeds) >= ENOUGH:
                self.learned_speed = sorted(self._speeds)[len(self._speeds) // 2]
        elif self.learned_speed:
            self._fixed.append(max(0.0, seconds - tokens / self.learned_speed))
            if len(self._fixed) >= ENOUGH:
                self.fixed = sorted(self._fixed)[len(self._fixed) // 4]

    def speed(self, reported: float) -> float:
        """What is believed: what was observed, or else what the worker reports, or else a guess."""
        return self.learned_speed or reported or DEFAULT_SPEED
