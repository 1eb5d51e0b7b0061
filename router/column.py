"""What is counted of the chunks one worker holds in one tier, while they come and go."""

from array import array
from collections.abc import Collection

from kv_protocol.digests import PARTITIONS, SetDigest
from kv_protocol.hashing import HASH_BYTES
from router.holders import WIDTH, Holders

PARTS = 256
_PER_PARTITION = PARTS // PARTITIONS


class Column:
    """A bit of the index. ``slot`` and ``bit`` say which; ``counts`` is by the first byte of the hash; ``grown`` and
    ``shrunk`` lead from each set that holds this worker alone, or nobody, to the one with the bit and without it.
    """

    __slots__ = ("_xors", "bit", "count", "counts", "grown", "mask", "shrunk", "slot")

    def __init__(self, slot: int, tier: int, singles: list[Holders | None]) -> None:
        self.slot = slot
        self.bit = 1 << tier
        self.mask = self.bit << slot * WIDTH
        self.grown = {held: after for tiers, held in enumerate(singles) if (after := singles[tiers | self.bit])}
        self.shrunk = {held: singles[tiers & ~self.bit] for tiers, held in enumerate(singles) if held is not None}
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.counts = array("I", bytes(4 * PARTS))
        self._xors = [0] * PARTITIONS

    def add(self, chunks: Collection[bytes]) -> None:
        """Count chunks that were not there. O(chunks)."""
        counts, xors, number = self.counts, self._xors, int.from_bytes
        for chunk in chunks:
            first = chunk[0]
            counts[first] += 1
            xors[first >> 4] ^= number(chunk, "little")
        self.count += len(chunks)

    def discard(self, chunks: Collection[bytes]) -> None:
        """Uncount chunks that were there. O(chunks)."""
        counts, xors, number = self.counts, self._xors, int.from_bytes
        for chunk in chunks:
            first = chunk[0]
            counts[first] -= 1
            xors[first >> 4] ^= number(chunk, "little")
        self.count -= len(chunks)

    def take(self) -> SetDigest:
        """The digest as of now, as the worker makes its own. O(1)."""
        counts = tuple(sum(self.counts[at : at + _PER_PARTITION]) for at in range(0, PARTS, _PER_PARTITION))
        return SetDigest(counts, tuple(value.to_bytes(HASH_BYTES, "little") for value in self._xors))

    def check(self, held: Collection[bytes]) -> None:
        """Verify that these chunks are what was counted. O(chunks).

        Raises:
            AssertionError: they are not.
        """
        counts, xors = [0] * PARTS, [0] * PARTITIONS
        for chunk in held:
            counts[chunk[0]] += 1
            xors[chunk[0] >> 4] ^= int.from_bytes(chunk, "little")
        assert len(held) == self.count, "a count is not that of the contents"
        assert counts == list(self.counts), "the counts by part are not those of the contents"
        assert xors == self._xors, "a digest is not that of the contents"
