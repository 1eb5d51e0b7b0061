"""Least frequently used, with ageing.

A chunk's rank is the number of its uses plus the tier's age; the age is the rank of the last victim. Without the age,
what was popular once would stay for ever. Among equal ranks the longest unused goes first. (LFU with dynamic ageing:
Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000; the chunks here are of one size.)
"""

from collections import OrderedDict

from sortedcontainers import SortedDict


class LeastFrequentlyUsed:
    """Evicts the chunk of the lowest rank. O(log r) for r different ranks."""

    def __init__(self) -> None:
        self._age = 0
        self._rank: dict[bytes, int] = {}
        self._ranks: SortedDict[int, OrderedDict[bytes, int]] = SortedDict()  # with the uses of each chunk
        self._held: dict[bytes, tuple[int, int]] = {}
        self._named: bytes | None = None

    def add(self, chunk: bytes) -> None:
        if chunk in self._rank:
            self.refresh(chunk)
        elif chunk not in self._held:
            self._place(chunk, self._age + 1, 1)

    def touch(self, chunk: bytes) -> None:
        if chunk in self._rank:
            _, uses = self._take(chunk)
            self._place(chunk, self._age + uses + 1, uses + 1)
        elif chunk in self._held:
            _, uses = self._held[chunk]
            self._held[chunk] = self._age + uses + 1, uses + 1

    def refresh(self, chunk: bytes) -> None:
        if chunk in self._rank:
            self._ranks[self._rank[chunk]].move_to_end(chunk)

    def hold(self, chunk: bytes) -> None:
        if chunk in self._rank:
            self._held[chunk] = self._take(chunk)

    def release(self, chunk: bytes) -> None:
        if chunk in self._held:
            self._place(chunk, *self._held.pop(chunk))

    def discard(self, chunk: bytes) -> None:
        if chunk in self._rank:
            rank, _ = self._take(chunk)
            if chunk == self._named:
                self._age = rank
        self._held.pop(chunk, None)

    def victim(self) -> bytes | None:
        self._named = next(iter(self._ranks.peekitem(0)[1])) if self._ranks else None
        return self._named

    def order(self) -> list[bytes]:
        placed = [chunk for chunks in self._ranks.values() for chunk in chunks]
        return placed + sorted(self._held, key=lambda chunk: self._held[chunk])

    def check(self) -> None:
        filed = {chunk: rank for rank, chunks in self._ranks.items() for chunk in chunks}
        assert filed == self._rank, "a chunk is filed under another rank"
        assert all(self._ranks.values()), "a rank without chunks was kept"
        assert filed.keys().isdisjoint(self._held), "a held chunk may be evicted"

    def _place(self, chunk: bytes, rank: int, uses: int) -> None:
        self._rank[chunk] = rank
        if (same := self._ranks.get(rank)) is None:
            same = self._ranks[rank] = OrderedDict()
        same[chunk] = uses

    def _take(self, chunk: bytes) -> tuple[int, int]:
        """Rank and uses of a chunk that is placed no more."""
        rank = self._rank.pop(chunk)
        same = self._ranks[rank]
        uses = same.pop(chunk)
        if not same:
            del self._ranks[rank]
        return rank, uses
