"""What was logged lately, so that what fails again and again does not fill the log."""

import threading
import time

REPEAT_SECONDS = 60.0


class Said:
    """Thread-safe."""

    def __init__(self, repeat_seconds: float = REPEAT_SECONDS) -> None:
        self._repeat = repeat_seconds
        self._lock = threading.Lock()
        self._at: dict[str, float] = {}

    def anew(self, cause: str) -> bool:
        """Whether a cause was not said within the last minute; it counts as said then."""
        now = time.monotonic()
        with self._lock:
            known = self._at.get(cause)
            if known is not None and now - known < self._repeat:
                return False
            self._at[cause] = now
            return True
