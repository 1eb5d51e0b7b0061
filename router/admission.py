"""Admission: how many requests are served at once, how many wait and how long, and how many bytes of bodies are held."""

import asyncio
from collections import deque

from router.errors import Busy


class Admission:
    """Requests beyond ``max_in_flight`` wait in order of arrival."""

    def __init__(self, max_in_flight: int, max_queue: int, queue_timeout: float, max_bytes: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._max_bytes = max_bytes
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_flight = 0
        self.bytes = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Take a place; leave() gives it back.

        Raises:
            Busy: the queue is full, or the wait took too long.
        """
        if self.in_flight < self._max_in_flight and not self._waiting:
            self.in_flight += 1
            return
        if len(self._waiting) >= self._max_queue:
            raise Busy(
                f"{self.in_flight} requests are being served and {self.queued} wait: try again later",
                retry_after=self._retry_after(),
            )
        await self._wait()

    def leave(self) -> None:
        """Give the place to whoever has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    def hold(self, size: int) -> int:
        """Count body bytes and return how many; free() gives them back.

        Raises:
            Busy: all bodies together would take too much memory.
        """
        if self.bytes + size > self._max_bytes:
            raise Busy("request bodies take all the memory set aside for them: try again later", retry_after=1)
        self.bytes += size
        return size

    def free(self, size: int) -> None:
        self.bytes -= size

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._queue_timeout):
                await turn
        except TimeoutError as error:
            self._abandon(turn)
            raise Busy(
                f"waited {self._queue_timeout:g} s in the queue: try again later", retry_after=self._retry_after()
            ) from error
        except BaseException:
            self._abandon(turn)
            raise

    def _abandon(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.leave()  # the place came in the same instant
        elif turn in self._waiting:
            self._waiting.remove(turn)

    def _retry_after(self) -> float:
        return min(self._queue_timeout, 1 + len(self._waiting) / self._max_in_flight)
