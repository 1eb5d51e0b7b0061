"""S3-FIFO: three queues in order of coming.

Newcomers wait in a *small* queue of a tenth of the chunks. What was used there at least twice by the time it would go
moves to the *main* queue, the rest is evicted and its name remembered by as many *ghosts* as main has chunks. Newcomers
with a ghost go to main at once. Main gives a used chunk another round for each use, up to three. (Yang et al., "FIFO
queues are all you need for cache eviction", SOSP 2023, algorithm 1.)
"""

from collections import OrderedDict

from worker_connector.eviction.ghosts import Ghosts

_SMALL_SHARE = 10
_MOST_USES = 3
_USES_TO_STAY = 2

_Queue = OrderedDict[bytes, int]


class S3Fifo:
    """Evicts what nobody came back for. ``victim`` is O(1) amortised over uses."""

    def __init__(self) -> None:
        self._small: _Queue = OrderedDict()  # with the uses of each chunk
        self._main: _Queue = OrderedDict()
        self._ghosts = Ghosts()
        self._held: dict[bytes, tuple[_Queue, int]] = {}
        self._named: bytes | None = None

    def add(self, chunk: bytes) -> None:
        if self._queue_of(chunk) is not None or chunk in self._held:
            self.refresh(chunk)
        elif chunk in self._ghosts:
            self._ghosts.remove(chunk)
            self._main[chunk] = 0
        else:
            self._small[chunk] = 0

    def touch(self, chunk: bytes) -> None:
        if (queue := self._queue_of(chunk)) is not None:
            queue[chunk] = min(_MOST_USES, queue[chunk] + 1)
        elif chunk in self._held:
            queue, uses = self._held[chunk]
            self._held[chunk] = queue, min(_MOST_USES, uses + 1)

    def refresh(self, chunk: bytes) -> None:
        if (queue := self._queue_of(chunk)) is not None:
            queue.move_to_end(chunk)

    def hold(self, chunk: bytes) -> None:
        if (queue := self._queue_of(chunk)) is not None:
            self._held[chunk] = queue, queue.pop(chunk)

    def release(self, chunk: bytes) -> None:
        if chunk in self._held:
            queue, uses = self._held.pop(chunk)
            queue[chunk] = uses

    def discard(self, chunk: bytes) -> None:
        self._held.pop(chunk, None)
        if (queue := self._queue_of(chunk)) is None:
            return
        del queue[chunk]
        if queue is self._small and chunk == self._named:
            self._ghosts.add(chunk)
            while len(self._ghosts) > max(1, len(self._main)):
                self._ghosts.forget_oldest()

    def victim(self) -> bytes | None:
        self._named = self._next()
        return self._named

    def order(self) -> list[bytes]:
        stays = [(uses >= _USES_TO_STAY, uses, chunk) for chunk, uses in self._small.items()]
        stays += [(True, uses, chunk) for chunk, uses in self._main.items()]
        return [*(chunk for *_, chunk in sorted(stays, key=lambda item: item[:2])), *self._held]

    def check(self) -> None:
        chunks = [*self._held, *self._small, *self._main]
        assert len(chunks) == len(set(chunks)), "a chunk is in two queues"
        assert not any(chunk in self._ghosts for chunk in chunks), "a chunk is there and its own ghost"
        uses = [*self._small.values(), *self._main.values()]
        assert all(0 <= count <= _MOST_USES for count in uses), "uses are counted beyond their range"

    def _next(self) -> bytes | None:
        while self._small or self._main:
            small_is_long = len(self._small) * _SMALL_SHARE >= len(self._small) + len(self._main)
            chunk = self._next_of_small() if self._small and (small_is_long or not self._main) else self._next_of_main()
            if chunk is not None:
                return chunk
        return None

    def _next_of_small(self) -> bytes | None:
        chunk, uses = next(iter(self._small.items()))
        if uses < _USES_TO_STAY:
            return chunk
        del self._small[chunk]
        self._main[chunk] = 0
        return None

    def _next_of_main(self) -> bytes | None:
        chunk, uses = next(iter(self._main.items()))
        if not uses:
            return chunk
        self._main[chunk] = uses - 1
        self._main.move_to_end(chunk)
        return None

    def _queue_of(self, chunk: bytes) -> _Queue | None:
        for queue in (self._small, self._main):
            if chunk in queue:
                return queue
        return None
