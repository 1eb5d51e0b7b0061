"""Queues in the order of coming or of use."""

from collections import OrderedDict


class FirstInFirstOut:
    """Evicts the chunk that came first, used or not."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._held: set[bytes] = set()

    def add(self, chunk: bytes) -> None:
        if chunk in self._held:
            return
        self._order[chunk] = None
        self._order.move_to_end(chunk)

    def touch(self, chunk: bytes) -> None:
        pass

    def refresh(self, chunk: bytes) -> None:
        if chunk in self._order:
            self._order.move_to_end(chunk)

    def hold(self, chunk: bytes) -> None:
        if chunk in self._order:
            del self._order[chunk]
            self._held.add(chunk)

    def release(self, chunk: bytes) -> None:
        if chunk in self._held:
            self._held.remove(chunk)
            self._order[chunk] = None

    def discard(self, chunk: bytes) -> None:
        self._order.pop(chunk, None)
        self._held.discard(chunk)

    def victim(self) -> bytes | None:
        return next(iter(self._order), None)

    def order(self) -> list[bytes]:
        return [*self._order, *self._held]

    def check(self) -> None:
        assert self._held.isdisjoint(self._order), "a held chunk may be evicted"


class LeastRecentlyUsed(FirstInFirstOut):
    """Evicts the chunk whose last use is longest ago."""

    def touch(self, chunk: bytes) -> None:
        self.refresh(chunk)
