"""The names of what was evicted, remembered for a while."""

from itertools import islice

_BITS = (1 << 60) - 1  # Python keeps such integers in 32 bytes, and a chunk's hash in twice as many
_SHARE = 8


class Ghosts:
    """Chunks from the longest gone to the last. Two may be taken for one, once in 2^60. Every operation is O(1),
    amortised.

    A plain dictionary takes half the memory of an ordered one, but finding its first entry costs as much as was deleted
    before it; so the first eighth is looked up at once.
    """

    def __init__(self) -> None:
        self._order: dict[int, None] = {}
        self._first: dict[int, None] = {}  # from back to front

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, chunk: bytes) -> bool:
        return hash(chunk) & _BITS in self._order

    def add(self, chunk: bytes) -> None:
        """``chunk`` is not there."""
        self._order[hash(chunk) & _BITS] = None

    def remove(self, chunk: bytes) -> None:
        """``chunk`` is there."""
        name = hash(chunk) & _BITS
        del self._order[name]
        self._first.pop(name, None)

    def forget_oldest(self) -> None:
        """There is at least one."""
        if not self._first:
            names = list(islice(self._order, 1 + len(self._order) // _SHARE))
            self._first = dict.fromkeys(reversed(names))
        name, _ = self._first.popitem()
        del self._order[name]
