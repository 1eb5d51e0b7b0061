"""Digests of a set of chunk hashes, cheap to keep and to compare.

A set is split into 16 partitions by the first four bits of each hash; a partition's digest is the number of its
hashes and the XOR of them. Splitting lets a reader check a part of a large index against the worker's own figure
without walking all of it.
"""

from collections.abc import Iterable

import msgspec

from kv_protocol.hashing import HASH_BYTES

PARTITIONS = 16


class SetDigest(msgspec.Struct, frozen=True):
    """Counts and XORs of a set's partitions, as sent on the wire."""

    counts: tuple[int, ...]
    xors: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != PARTITIONS or [len(xor) for xor in self.xors] != [HASH_BYTES] * PARTITIONS:
            raise ValueError(f"a digest has {PARTITIONS} counts and {PARTITIONS} XORs of {HASH_BYTES} bytes")

    @property
    def count(self) -> int:
        return sum(self.counts)


def partition_of(chunk: bytes) -> int:
    """Which of the 16 partitions a hash belongs to."""
    return chunk[0] >> 4


def xor_of(chunks: Iterable[bytes]) -> bytes:
    """XOR of hashes; sixteen zero bytes for none."""
    value = 0
    for chunk in chunks:
        value ^= int.from_bytes(chunk, "little")
    return value.to_bytes(HASH_BYTES, "little")


class RunningDigest:
    """The digest of a set that changes one hash at a time. Every call is O(1)."""

    __slots__ = ("_counts", "_xors")

    def __init__(self) -> None:
        self.clear()

    def add(self, chunk: bytes) -> None:
        """Count a hash that was not in the set."""
        self._change(chunk, 1)

    def discard(self, chunk: bytes) -> None:
        """Uncount a hash that was in the set."""
        self._change(chunk, -1)

    def clear(self) -> None:
        self._counts = [0] * PARTITIONS
        self._xors = [0] * PARTITIONS

    def take(self) -> SetDigest:
        """The digest as of now."""
        return SetDigest(tuple(self._counts), tuple(value.to_bytes(HASH_BYTES, "little") for value in self._xors))

    def _change(self, chunk: bytes, by: int) -> None:
        part = chunk[0] >> 4
        self._counts[part] += by
        self._xors[part] ^= int.from_bytes(chunk, "little")
