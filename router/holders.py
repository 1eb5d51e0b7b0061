"""Sets of (worker, tier) pairs, as small as they can be: an index has millions of them.

A worker is a *slot*, a tier a bit of four. Two forms, told apart by their type:

- *dense*, an ``int``: bit ``slot * 4 + tier``. Quick to combine, and small while slots are few.
- *sparse*, ``bytes``: a little-endian uint32 *word*, ``slot << 4 | tiers``, for each holder, by slot.

A set is sparse if, and only if, it names a slot of ``DENSE_SLOTS`` or above and has at most ``SPARSE_HOLDERS`` holders.
So fleets of up to 64 workers have nothing but dense sets; among a thousand workers a chunk that three of them hold takes
48 bytes and not 560; and equal sets have equal forms. The empty set is ``None``: nobody keeps it.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import compress, count

Holders = int | bytes

WIDTH = 4
"""Bits of a slot."""
DENSE_SLOTS = 64
SPARSE_HOLDERS = 8
_DENSE_LIMIT = 1 << DENSE_SLOTS * WIDTH
_TIERS = (1 << WIDTH) - 1
_UNPACKERS = {size * 4: struct.Struct(f"<{size}I").unpack for size in range(1, SPARSE_HOLDERS + 1)}
_FEW = 4
_IS_ONE = bytes(character == ord("1") for character in range(256))


def single(slot: int, tiers: int) -> Holders:
    """The set of one holder; ``tiers`` are its four bits, at least one of them set."""
    return encode([slot << WIDTH | tiers])


def encode(words: Sequence[int]) -> Holders:
    """The set of these words, which ascend. O(words)."""
    if words[-1] >> WIDTH < DENSE_SLOTS or len(words) > SPARSE_HOLDERS:
        return sum((word & _TIERS) << (word >> WIDTH) * WIDTH for word in words)
    return struct.pack(f"<{len(words)}I", *words)


def words_of(held: Holders) -> Sequence[int]:
    """Every holder's word, ascending. O(holders) when sparse, O(slots) when dense."""
    if isinstance(held, bytes):
        words: tuple[int, ...] = _UNPACKERS[len(held)](held)
        return words
    # Written in base 16, a digit is a slot.
    return [slot << WIDTH | int(digit, 16) for slot, digit in enumerate(f"{held:x}"[::-1]) if digit != "0"]


def dense(held: Holders) -> int:
    """The same set as a mask, whatever its form. O(holders)."""
    if isinstance(held, int):
        return held
    mask = 0
    for word in _UNPACKERS[len(held)](held):
        mask |= (word & _TIERS) << (word >> WIDTH) * WIDTH
    return mask


def tiers_of(held: Holders, slot: int) -> int:
    """The tiers in which a slot's worker holds the chunk, as four bits. O(holders) when sparse, else O(1)."""
    if isinstance(held, int):
        return held >> slot * WIDTH & _TIERS
    return next((word & _TIERS for word in _UNPACKERS[len(held)](held) if word >> WIDTH == slot), 0)


def with_tiers(held: Holders, slot: int, tiers: int) -> Holders:
    """The set with these tiers of a slot added. O(holders) when sparse, else O(1)."""
    if isinstance(held, int) and (slot < DENSE_SLOTS or held >= _DENSE_LIMIT):
        return held | tiers << slot * WIDTH
    words = list(words_of(held))
    at = bisect_left(words, slot << WIDTH)
    if at < len(words) and words[at] >> WIDTH == slot:
        words[at] |= tiers
    else:
        words.insert(at, slot << WIDTH | tiers)
    return encode(words)


def without(held: Holders, gone: int) -> Holders | None:
    """The set without the pairs of a mask; None when nothing is left. O(holders) when sparse, else O(slots)."""
    if isinstance(held, bytes):
        words = [word & ~(gone >> (word >> WIDTH) * WIDTH & _TIERS) for word in _UNPACKERS[len(held)](held)]
        words = [word for word in words if word & _TIERS]
        return encode(words) if words else None
    mask = held & ~gone
    if mask < _DENSE_LIMIT or _holders(mask) > SPARSE_HOLDERS:
        return mask or None
    return encode(words_of(mask))


def slots_of(mask: int) -> Iterable[int]:
    """The slots whose first bit is set in a mask of first bits. O(bits set) when they are few, else O(slots)."""
    if mask.bit_count() > _FEW + (mask.bit_length() >> 7):
        return compress(count(), f"{mask:x}"[::-1].encode().translate(_IS_ONE))
    slots = []
    while mask:
        top = mask.bit_length() - 1
        slots.append(top // WIDTH)
        mask ^= 1 << top
    return slots


def _holders(mask: int) -> int:
    digits = f"{mask:x}"
    return len(digits) - digits.count("0")
