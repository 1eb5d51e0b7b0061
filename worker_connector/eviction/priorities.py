"""Chunks of low priority go before all others, and those of high priority after them."""

from collections.abc import Callable

from worker_connector.eviction.base import EvictionPolicy

LOW, NORMAL, HIGH = -1, 0, 1


class Prioritised:
    """Three orders of one policy: the victim is that of the lowest priority that has one. A chunk is of normal priority until
    ``set`` says otherwise. ``make`` gives a policy of its own for each priority.

    Costs one look-up on top of the policy's own.
    """

    def __init__(self, make: Callable[[], EvictionPolicy]) -> None:
        self._orders = {level: make() for level in (LOW, NORMAL, HIGH)}
        self._normal = self._orders[NORMAL]
        self._levels: dict[bytes, int] = {}
        self._high = 0

    def set(self, chunk: bytes, level: int, *, held: bool = False) -> None:
        """Give a chunk that was added another priority. Within it, the chunk is placed as if it had just come. ``held`` tells
        whether it is held now."""
        before = self._levels.get(chunk, NORMAL)
        if level == before:
            return
        self._orders[before].discard(chunk)
        self._note(chunk, level)
        order = self._orders[level]
        order.add(chunk)
        if held:
            order.hold(chunk)

    def level(self, chunk: bytes) -> int:
        """A chunk's priority."""
        return self._levels.get(chunk, NORMAL)

    @property
    def high(self) -> int:
        """How many chunks have high priority."""
        return self._high

    def __bool__(self) -> bool:
        """Whether any chunk is not of normal priority."""
        return bool(self._levels)

    def add(self, chunk: bytes) -> None:
        self._order(chunk).add(chunk)

    def touch(self, chunk: bytes) -> None:
        self._order(chunk).touch(chunk)

    def refresh(self, chunk: bytes) -> None:
        self._order(chunk).refresh(chunk)

    def hold(self, chunk: bytes) -> None:
        self._order(chunk).hold(chunk)

    def release(self, chunk: bytes) -> None:
        self._order(chunk).release(chunk)

    def discard(self, chunk: bytes) -> None:
        self._order(chunk).discard(chunk)
        self._note(chunk, NORMAL)

    def victim(self) -> bytes | None:
        for level in (LOW, NORMAL, HIGH) if self._levels else (NORMAL,):
            if (chunk := self._orders[level].victim()) is not None:
                return chunk
        return None

    def order(self) -> list[bytes]:
        return [chunk for level in (LOW, NORMAL, HIGH) for chunk in self._orders[level].order()]

    def check(self) -> None:
        for order in self._orders.values():
            order.check()
        assert NORMAL not in self._levels.values(), "a normal chunk is on record"
        assert self._high == sum(level == HIGH for level in self._levels.values()), (
            "chunks of high priority are miscounted"
        )

    def _order(self, chunk: bytes) -> EvictionPolicy:
        return self._orders[self._levels[chunk]] if chunk in self._levels else self._normal

    def _note(self, chunk: bytes, level: int) -> None:
        before = self._levels.pop(chunk, NORMAL)
        self._high += (level == HIGH) - (before == HIGH)
        if level != NORMAL:
            self._levels[chunk] = level
