"""Whether loading some tokens is faster than computing them.

Loading ``n`` bytes is predicted to take ``latency + (n + bytes already under way) / bandwidth``; computing ``t`` tokens
``t / prefill speed``. All three figures are medians of recent measurements, so that one odd sample (a first step that
compiles kernels, a stalled host) does not decide. Prefill speed is taken from large steps; it falls with the length of
the context, so the prediction favours computing slightly less than it could.

Until both sides are measured, and again when no load was measured for a while, the answer is to load: a decision not
to load would otherwise never be revised.
"""

from collections import deque
from collections.abc import Callable
from statistics import median
from time import monotonic
from typing import Final

WINDOW: Final = 15
"""Measurements a median is taken over."""

MIN_PREFILL_TOKENS: Final = 128
"""Steps with fewer prefill tokens say more about decoding than about prefill."""

MIN_LOAD_BYTES: Final = 64 << 10
"""Smaller transfers measure overhead, not bandwidth."""

PROBE_SECONDS: Final = 30.0
"""A load is tried again when the last measured one is older."""


class Median:
    """The median of the last ``WINDOW`` values; 0 before the first. ``add`` costs O(WINDOW log WINDOW)."""

    __slots__ = ("_values", "value")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.value = 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        self.value = median(self._values)


class Estimator:
    """Measured speeds of one engine. Bytes are one rank's: ranks work side by side."""

    def __init__(self) -> None:
        self._load_bandwidth = Median()
        self._save_bandwidth = Median()
        self._prefill_speed = Median()
        self._latency = Median()
        self._last_load = 0.0

    @property
    def load_bandwidth(self) -> float:
        """Bytes per second per rank, 0 where unknown."""
        return self._load_bandwidth.value

    @property
    def save_bandwidth(self) -> float:
        """Bytes per second per rank, 0 where unknown."""
        return self._save_bandwidth.value

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, 0 where unknown."""
        return self._prefill_speed.value

    @property
    def load_latency(self) -> float:
        """Seconds a load takes besides copying, 0 where unknown."""
        return self._latency.value

    def observe_load(self, nbytes: int, seconds: float) -> None:
        """One rank copied ``nbytes`` in ``seconds``."""
        self._last_load = monotonic()
        if nbytes >= MIN_LOAD_BYTES and seconds > 0:
            self._load_bandwidth.add(nbytes / seconds)

    def observe_save(self, nbytes: int, seconds: float) -> None:
        """One rank copied ``nbytes`` off in ``seconds``."""
        if nbytes >= MIN_LOAD_BYTES and seconds > 0:
            self._save_bandwidth.add(nbytes / seconds)

    def observe_round_trip(self, nbytes: int, seconds: float) -> None:
        """A load of ``nbytes`` took ``seconds`` from its planning to its acknowledgement."""
        if self.load_bandwidth:
            self._latency.add(max(0.0, seconds - nbytes / self.load_bandwidth))

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A step with ``tokens`` prompt tokens took ``seconds``."""
        if tokens >= MIN_PREFILL_TOKENS and seconds > 0:
            self._prefill_speed.add(tokens / seconds)

    def load_seconds(self, nbytes: int) -> float | None:
        """Predicted time to load ``nbytes``; None until it was measured."""
        return self.load_latency + nbytes / self.load_bandwidth if self.load_bandwidth else None

    def compute_seconds(self, tokens: int) -> float | None:
        """Predicted time to compute ``tokens`` prompt tokens; None until it was measured."""
        return tokens / self.prefill_speed if self.prefill_speed else None

    def worth_loading(self, nbytes: int, tokens: int, under_way: int = 0) -> bool:
        """Whether to load ``nbytes`` that hold ``tokens``, while ``under_way`` bytes are still being loaded."""
        load, compute = self.load_seconds(nbytes + under_way), self.compute_seconds(tokens)
        if load is None or compute is None or monotonic() - self._last_load > PROBE_SECONDS:
            return True
        return load < compute


class StepTimer:
    """Learns the prefill speed from the engine's steps. ``clock`` is in seconds."""

    def __init__(self, estimator: Estimator, clock: Callable[[], float]) -> None:
        self._estimator = estimator
        self._clock = clock
        self._steps: deque[tuple[int, float, int]] = deque(maxlen=16)
        self._last_end = 0.0

    def begin(self, step: int, tokens: int) -> int:
        """A step with that number computes so many tokens of prompts: the number to report its end by; 0 where it need not
        be reported."""
        if not tokens:
            return 0
        self._steps.append((step, self._clock(), tokens))
        return step

    def end(self, step: int) -> None:
        """A step ended, and those before it."""
        now = self._clock()
        while self._steps and self._steps[0][0] <= step:
            number, began, tokens = self._steps.popleft()
            if number == step:
                # With steps overlapping, one begins when the one before it ends.
                self._estimator.observe_prefill(tokens, now - max(began, self._last_end))
        if step:
            self._last_end = now
