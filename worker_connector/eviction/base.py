"""What an eviction policy is told, and what it is asked."""

from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders the chunks that a full tier may give up. Every call is O(1), amortised, unless a policy says otherwise.

    A chunk is *held* while a transfer or an operator keeps it from eviction; a held chunk is never a victim. A prompt's
    chunks are useful only together with all that come before them, so callers name them from the last to the first:
    among equals the tail then goes before the head.
    """

    def add(self, chunk: bytes) -> None:
        """A chunk came in and may be evicted from now on. One that is there already is only refreshed."""

    def touch(self, chunk: bytes) -> None:
        """A chunk was used. Unknown chunks are ignored."""

    def refresh(self, chunk: bytes) -> None:
        """A chunk was not used, but others that need it came in behind it: it should go after them."""

    def hold(self, chunk: bytes) -> None:
        """A chunk must not be evicted until it is released. Unknown and held chunks stay as they are."""

    def release(self, chunk: bytes) -> None:
        """A held chunk may be evicted again; it is placed as ``refresh`` would place it."""

    def discard(self, chunk: bytes) -> None:
        """A chunk is gone, held or not. If ``victim`` named it last, it was evicted, which some policies remember."""

    def victim(self) -> bytes | None:
        """The chunk to evict next, the same until something changes; None when every chunk is held."""

    def order(self) -> list[bytes]:
        """Every chunk, about in the order they would go in if nothing were used any more; held ones last. O(chunks)."""

    def check(self) -> None:
        """Assert every invariant. O(chunks)."""
