"""S3-FIFO: three queues in order of coming.

Newcomers wait in a *small* queue of a tenth of the chunks. What was used there at least twice by the time it would go
moves to the *main* queue, the rest is evicted and its name remembered by as many *ghosts* as main has chunks. Newcomers
with a ghost go to main at once. Main gives a used chunk another round for each use, up to three. (Yang et al., "FIFO
queues are all you need for cache eviction", SOSP 2023, algorithm 1.)
"""

from collections import OrderedDict

_SMALL_SHARE = 10
_MOST_USES = 3
_USES_TO_STAY = 2

_Queue = OrderedDict[bytes, None]


class S3Fifo:
    """Evicts what nobody came back for. ``victim`` is O(1) amortised over uses."""

    def __init__(self) -> None:
        self._small: _Queue = OrderedDict()
        self._main: _Queue = OrderedDict()
        self._ghosts: _Queue = OrderedDict()
        self._held: dict[bytes, _Queue] = {}
        self._uses: dict[bytes, int] = {}
        self._named: bytes | None = None

    def add(self, chunk: bytes) -> None:
        if self._queue_of(chunk) is not None or chunk in self._held:
            self.refresh(chunk)
        elif chunk in self._ghosts:
            del self._ghosts[chunk]
            self._main[chunk] = None
        else:
            self._small[chunk] = None

    def touch(self, chunk: bytes) -> None:
        if chunk in self._held or self._queue_of(chunk) is not None:
            self._uses[chunk] = min(_MOST_USES, self._uses.get(chunk, 0) + 1)

    def refresh(self, chunk: bytes) -> None:
        if (queue := self._queue_of(chunk)) is not None:
            queue.move_to_end(chunk)

    def hold(self, chunk: bytes) -> None:
        if (queue := self._queue_of(chunk)) is not None:
            del queue[chunk]
            self._held[chunk] = queue

    def release(self, chunk: bytes) -> None:
        if (queue := self._held.pop(chunk, None)) is not None:
            queue[chunk] = None

    def discard(self, chunk: bytes) -> None:
        self._held.pop(chunk, None)
        self._uses.pop(chunk, None)
        if (queue := self._queue_of(chunk)) is None:
            return
        del queue[chunk]
        if queue is self._small and chunk == self._named:
            self._ghosts[chunk] = None
            while len(self._ghosts) > max(1, len(self._main)):
                self._ghosts.popitem(last=False)

    def victim(self) -> bytes | None:
        self._named = self._next()
        return self._named

    def check(self) -> None:
        chunks = [*self._held, *self._small, *self._main, *self._ghosts]
        assert len(chunks) == len(set(chunks)), "a chunk is in two queues"
        residents = self._small.keys() | self._main.keys() | self._held.keys()
        assert self._uses.keys() <= residents, "uses of a chunk that is gone are counted"
        assert all(0 < uses <= _MOST_USES for uses in self._uses.values()), "uses are counted beyond their range"

    def _next(self) -> bytes | None:
        while self._small or self._main:
            small_is_long = len(self._small) * _SMALL_SHARE >= len(self._small) + len(self._main)
            chunk = self._next_of_small() if self._small and (small_is_long or not self._main) else self._next_of_main()
            if chunk is not None:
                return chunk
        return None

    def _next_of_small(self) -> bytes | None:
        chunk = next(iter(self._small))
        if self._uses.get(chunk, 0) < _USES_TO_STAY:
            return chunk
        del self._small[chunk], self._uses[chunk]
        self._main[chunk] = None
        return None

    def _next_of_main(self) -> bytes | None:
        chunk = next(iter(self._main))
        if chunk not in self._uses:
            return chunk
        self._main.move_to_end(chunk)
        if self._uses[chunk] == 1:
            del self._uses[chunk]
        else:
            self._uses[chunk] -= 1
        return None

    def _queue_of(self, chunk: bytes) -> _Queue | None:
        for queue in (self._small, self._main):
            if chunk in queue:
                return queue
        return None
