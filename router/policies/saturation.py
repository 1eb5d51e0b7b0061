"""When a worker is too far ahead of the least loaded one to take more for the sake of its cache."""

from typing import NamedTuple

from router.pace import DEFAULT_SPEED


class Saturation(NamedTuple):
    """A lead in ``seconds`` of the worker's own prefill, or in ``tokens`` where that is given."""

    seconds: float = 2.0
    tokens: int | None = None

    def limit(self, prefill_speed: float) -> float:
        """The lead in tokens that a worker may have over the least loaded one; its speed is 0 where unknown."""
        if self.tokens is not None:
            return self.tokens
        return self.seconds * (prefill_speed or DEFAULT_SPEED)
