"""Whether a disk tier is written to. A full or read-only disk is still read."""

import errno
import threading
import time

_SHORTEST, _LONGEST = 1.0, 60.0
_SHUTTING = {errno.ENOSPC: "full", errno.EDQUOT: "quota", errno.EROFS: "read_only"}


class Gate:
    """Open until a write fails in a way that the next one would too; then tried again after pauses that double, from a
    second to a minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pause = _SHORTEST
        self._due = float("inf")
        self._opened = float("-inf")
        self.cause = ""
        self.reason = ""
        self.size = 0

    @property
    def is_open(self) -> bool:
        return not self.cause

    @property
    def is_due(self) -> bool:
        """Whether it is time to find out if writing is possible again."""
        return time.monotonic() >= self._due

    def judge(self, error: OSError, size: int) -> bool:
        """Shut if ``error``, met when writing ``size`` bytes, is one of these; whether it is."""
        cause = _SHUTTING.get(error.errno or 0)
        if cause is None:
            return False
        with self._lock:
            if time.monotonic() - self._opened > _LONGEST:
                self._pause = _SHORTEST
            self.reason = f"{error.strerror or cause}; what is there is still read"
            self.cause, self.size = cause, size
            self._defer()
        return True

    def still_shut(self) -> None:
        with self._lock:
            self._defer()

    def open(self) -> None:
        with self._lock:
            self.cause = self.reason = ""
            self._due = float("inf")
            self._opened = time.monotonic()

    def _defer(self) -> None:
        self._due = time.monotonic() + self._pause
        self._pause = min(_LONGEST, 2 * self._pause)
