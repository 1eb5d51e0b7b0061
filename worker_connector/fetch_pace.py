"""How long a fetch from one lower tier takes, from what fetches took.

A tier fetches one job after the other. A job's time on the ranks tells the bandwidth; what passed beyond that and the jobs
in front of it, between its planning and its acknowledgement, is latency: mostly the engine's steps.
"""

from worker_connector.estimate import PROBE_SECONDS, Median

_SMALL_BYTES = 256 << 10


class FetchPace:
    """One tier's. Bytes are one rank's: ranks work side by side. ``jobs`` and ``nbytes`` are under way."""

    def __init__(self) -> None:
        self.jobs = 0
        self.nbytes = 0
        self._seconds_per_byte = Median()
        self._latency = Median()
        self._measured = -PROBE_SECONDS
        self._busy_until = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second; 0 where unknown."""
        return 1 / self._seconds_per_byte.value if self._seconds_per_byte.value else 0.0

    def is_known(self, now: float) -> bool:
        """Whether it was measured lately."""
        return now - self._measured <= PROBE_SECONDS

    def front(self, now: float) -> float:
        """Seconds until what is under way is fetched."""
        # What ended early or was withdrawn keeps nobody waiting, so no more than what is still under way takes.
        return max(0.0, min(self._busy_until - now, self.nbytes * self._seconds_per_byte.value))

    def seconds(self, nbytes: int, now: float, *, behind: bool = True) -> float:
        """Predicted time until ``nbytes`` that are asked for now are there, ``behind`` what is under way or not counting that."""
        front = self.front(now) if behind else 0.0
        return self._latency.value + front + nbytes * self._seconds_per_byte.value

    def sent(self, nbytes: int, now: float) -> float:
        """A job begins; how many seconds of other jobs are in front of it."""
        front = self.front(now)
        self._busy_until = now + front + nbytes * self._seconds_per_byte.value
        self.jobs += 1
        self.nbytes += nbytes
        return front

    def ended(self, nbytes: int) -> None:
        """A job of so many bytes is over, or will not begin."""
        self.jobs -= 1
        self.nbytes -= nbytes

    def observe(self, nbytes: int, running: float, elapsed: float, front: float, now: float) -> None:
        """A job brought ``nbytes`` in ``running`` seconds of the ranks' time, and was acknowledged ``elapsed`` after it was
        planned behind ``front`` seconds of others."""
        if nbytes >= _SMALL_BYTES and running > 0:
            self._seconds_per_byte.add(running / nbytes)
            self._latency.add(max(0.0, elapsed - running - front))
            self._measured = now
