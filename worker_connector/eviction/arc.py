"""Adaptive replacement cache.

Two queues of resident chunks, of those used once (``recent``) and of those used again (``frequent``), each with a queue
of what was evicted from it (its ghosts, of which only hashes are kept). A chunk that comes back while its ghost is known shows which queue
was too short, and moves the share that ``recent`` aims at by the ratio of the ghost queues. (Megiddo and Modha, "ARC: a
self-tuning, low overhead replacement cache", FAST 2003, figure 4.) Two differences follow from the interface: the
victim is chosen before the newcomer is known, so a newcomer's ghost moves the aim for the next victim, and the capacity
is what is resident when a victim is asked for.
"""

from collections import OrderedDict

from worker_connector.eviction.ghosts import Ghosts

_Queue = OrderedDict[bytes, None]


class AdaptiveReplacement:
    """Evicts from the queue that is above its share, the longest unused first."""

    def __init__(self) -> None:
        self._recent: _Queue = OrderedDict()
        self._frequent: _Queue = OrderedDict()
        self._recent_ghosts = Ghosts()
        self._frequent_ghosts = Ghosts()
        self._held: dict[bytes, _Queue] = {}
        self._aim = 0.0
        self._capacity = 0
        self._named: bytes | None = None

    def add(self, chunk: bytes) -> None:
        if self._queue_of(chunk) is not None or chunk in self._held:
            self.refresh(chunk)
            return
        ours, other = len(self._recent_ghosts), len(self._frequent_ghosts)
        if chunk in self._recent_ghosts:
            self._aim = min(self._capacity, self._aim + max(1.0, other / ours))
            self._recent_ghosts.remove(chunk)
            self._frequent[chunk] = None
        elif chunk in self._frequent_ghosts:
            self._aim = max(0.0, self._aim - max(1.0, ours / other))
            self._frequent_ghosts.remove(chunk)
            self._frequent[chunk] = None
        else:
            self._recent[chunk] = None
        self._trim()

    def touch(self, chunk: bytes) -> None:
        if chunk in self._held:
            self._held[chunk] = self._frequent
        elif (queue := self._queue_of(chunk)) is not None:
            del queue[chunk]
            self._frequent[chunk] = None

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
        if (queue := self._queue_of(chunk)) is None:
            return
        if chunk == self._named:
            self._capacity = self._residents()
            self._aim = min(self._aim, self._capacity)
            ghosts = self._recent_ghosts if queue is self._recent else self._frequent_ghosts
            ghosts.add(chunk)
        del queue[chunk]
        self._trim()

    def victim(self) -> bytes | None:
        above = len(self._recent) > self._aim
        first, second = (self._recent, self._frequent) if above else (self._frequent, self._recent)
        self._named = next(iter(first), None) or next(iter(second), None)
        return self._named

    def order(self) -> list[bytes]:
        return [*self._recent, *self._frequent, *self._held]

    def check(self) -> None:
        chunks = [*self._held, *self._recent, *self._frequent]
        assert len(chunks) == len(set(chunks)), "a chunk is in two queues"
        remembered = [chunk for chunk in chunks if chunk in self._recent_ghosts or chunk in self._frequent_ghosts]
        assert not remembered, "a chunk is there and its own ghost"
        assert 0 <= self._aim <= self._capacity, "the aim is out of its range"
        ghosts = len(self._recent_ghosts) + len(self._frequent_ghosts)
        assert ghosts <= self._capacity, "more is remembered than was ever held"

    def _residents(self) -> int:
        return len(self._recent) + len(self._frequent) + len(self._held)

    def _queue_of(self, chunk: bytes) -> _Queue | None:
        for queue in (self._recent, self._frequent):
            if chunk in queue:
                return queue
        return None

    def _trim(self) -> None:
        """Recent chunks and their ghosts are at most the capacity; all ghosts together, too."""
        while self._recent_ghosts and len(self._recent) + len(self._recent_ghosts) > self._capacity:
            self._recent_ghosts.forget_oldest()
        while len(self._recent_ghosts) + len(self._frequent_ghosts) > self._capacity:
            (self._frequent_ghosts or self._recent_ghosts).forget_oldest()
