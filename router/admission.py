"""Admission: how many requests are served at once, how many wait and how long, and how many bytes of bodies are held."""

import asyncio

from router.errors import Busy
from router.queue import NOBODY, Claim, FairQueue, Turn


class Admission:
    """Requests beyond ``max_in_flight`` wait in a fair queue, for ``queue_timeout`` seconds at most."""

    def __init__(self, max_in_flight: int, max_queue: int, queue_timeout: float, max_bytes: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._max_bytes = max_bytes
        self._queue = FairQueue()
        self.in_flight = 0
        self.bytes = 0
        self.displaced = 0

    def resize(self, max_in_flight: int, max_queue: int, queue_timeout: float, max_bytes: int) -> None:
        """Other limits from now on. Who is in stays in; who waits enters as far as there is more room."""
        self._max_in_flight, self._max_queue = max_in_flight, max_queue
        self._queue_timeout, self._max_bytes = queue_timeout, max_bytes
        while self.in_flight < max_in_flight and self._next():
            self.in_flight += 1

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def queued_by_tenant(self) -> dict[str, int]:
        return self._queue.by_tenant

    def enter_now(self) -> bool:
        """Take a place if one is free and nobody waits for it; leave() gives it back."""
        if self.in_flight < self._max_in_flight and not self._queue.size:
            self.in_flight += 1
            return True
        return False

    async def enter(self, claim: Claim = NOBODY) -> None:
        """Take a place; leave() gives it back.

        Raises:
            Busy: the queue is full, another request had a better claim, or the wait took too long.
        """
        if self.enter_now():
            return
        if len(self._queue) >= self._max_queue and not self._make_room(claim):
            raise self._full()
        await self._wait(claim)

    def leave(self) -> None:
        """Give the place to whose turn it is."""
        if not self._queue.size or self.in_flight > self._max_in_flight or not self._next():
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

    def _next(self) -> bool:
        turn = self._queue.pop()
        if turn is None:
            return False
        turn.future.set_result(None)
        return True

    def _make_room(self, claim: Claim) -> bool:
        turn = self._queue.displace(claim) if self._max_queue else None
        if turn is None:
            return False
        self.displaced += 1
        turn.future.set_exception(self._full())
        return True

    async def _wait(self, claim: Claim) -> None:
        turn = self._queue.add(claim, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self._queue_timeout):
                await turn.future
        except TimeoutError as error:
            self._abandon(turn)
            raise Busy(
                f"waited {self._queue_timeout:g} s in the queue: try again later", retry_after=self._retry_after()
            ) from error
        except BaseException:
            self._abandon(turn)
            raise

    def _abandon(self, turn: Turn) -> None:
        future = turn.future
        if future.cancelled():
            self._queue.discard(turn)
        elif future.exception() is None:
            self.leave()  # the place came in the same instant

    def _full(self) -> Busy:
        return Busy(
            f"{self.in_flight} requests are being served and {self.queued} wait: try again later",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        return min(self._queue_timeout, 1 + len(self._queue) / self._max_in_flight)
