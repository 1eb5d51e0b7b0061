"""Turns: what keeps a flood of reports from standing between requests.

All report streams together apply at most ``CHUNKS`` chunks in one turn of the event loop; whoever has more waits, first
come, first served. A thousand workers that list anew at the same time take a while; requests meanwhile wait for one turn.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

CHUNKS = 512
"""About a quarter of a millisecond."""
LISTINGS = 8
"""Snapshots taken in side by side: what waits of the others stays in the sockets."""


class Turns:
    """Shared by everything that changes the index on one event loop."""

    def __init__(self, chunks: int = CHUNKS) -> None:
        self.chunks = chunks
        self.listings = asyncio.Semaphore(LISTINGS)
        self._left = chunks
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._renewing = False

    async def take(self, chunks: int) -> None:
        """Wait until this many chunks may be applied, which is to be done before the next ``await``. O(1); does not
        give up control while the present turn has room."""
        if self._left <= 0 or self._waiting:
            granted = asyncio.get_running_loop().create_future()
            self._waiting.append((chunks, granted))
            await granted
            return
        self._spend(chunks)

    def slices(self, data: Sequence[bytes] | bytes, width: int) -> range:
        """Where to cut ``data``, of ``width`` elements a chunk, so that each piece fits a turn."""
        return range(0, len(data), self.chunks * width)

    def _spend(self, chunks: int) -> None:
        self._left -= chunks
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        """Called in the next turn of the loop; those who waited run in the one after it."""
        self._left, self._renewing = self.chunks, False
        while self._waiting and self._left > 0:
            chunks, granted = self._waiting.popleft()
            if not granted.done():
                self._spend(chunks)
                granted.set_result(None)
