"""Which chunk a full tier gives up.

A policy orders the chunks that may go; the ledger tells it what comes, is used, is held (pinned by a transfer or by an
operator, so not to be evicted), is released again, and goes.
"""

from collections import OrderedDict
from typing import Protocol


class EvictionPolicy(Protocol):
    """Every call is O(1) unless a policy says otherwise. A held chunk is never a victim."""

    def add(self, chunk: bytes) -> None:
        """A chunk came in and may be evicted from now on."""

    def touch(self, chunk: bytes) -> None:
        """A chunk was used."""

    def hold(self, chunk: bytes) -> None:
        """A chunk must not be evicted until it is released."""

    def release(self, chunk: bytes) -> None:
        """A held chunk may be evicted again; this counts as a use."""

    def discard(self, chunk: bytes) -> None:
        """A chunk is gone, held or not."""

    def victim(self) -> bytes | None:
        """The chunk to evict next, which the caller then discards; None when every chunk is held."""


class LeastRecentlyUsed:
    """Evicts the chunk whose last use is longest ago.

    A prompt's chunks are useful only together with all that come before them, so callers touch them from the last to
    the first: the tail then goes before the head.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def add(self, chunk: bytes) -> None:
        self._order[chunk] = None

    def touch(self, chunk: bytes) -> None:
        if chunk in self._order:
            self._order.move_to_end(chunk)

    def hold(self, chunk: bytes) -> None:
        self._order.pop(chunk, None)

    def release(self, chunk: bytes) -> None:
        self._order[chunk] = None

    def discard(self, chunk: bytes) -> None:
        self._order.pop(chunk, None)

    def victim(self) -> bytes | None:
        return next(iter(self._order), None)


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LeastRecentlyUsed}
"""Policies by the name that the setting ``eviction_policy`` gives them."""
