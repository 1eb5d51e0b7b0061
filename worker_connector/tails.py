"""Tails: the beginning of a prompt's last chunk, in whole blocks, as it is kept in lower tiers.

A tail's object has an identity of its own, derived from that of whole chunks, so no listing, look-up or reader takes one for
the other; its sections have as many blocks as it has, and only their bytes. In a slot those blocks lie where they lie in a
whole chunk: ``gather`` brings them together for the payload, ``spread`` puts them in their places.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from kv_protocol.hashing import HASH_BYTES
from worker_connector.chunk_object import Section
from worker_connector.regions import SlotLayout

if TYPE_CHECKING:
    from worker_connector.tier_movers import Shape

Runs = Sequence[Sequence[tuple[int, int]]]
"""Of each group, where in a slot the blocks of each region begin, one behind the other, and the bytes of one."""

_TAG = b"tail\0"


def tail_identity(identity: bytes) -> bytes:
    """The identity of tails of an engine whose whole chunks have this one."""
    return sha256(identity + _TAG).digest()[:HASH_BYTES]


def runs_of(layout: SlotLayout) -> Runs:
    """Where blocks lie in slots of this layout."""
    groups = zip(layout.starts, layout.regions, strict=True)
    return [[(start, region.nbytes) for start, region in zip(*group, strict=True)] for group in groups]


def tail_shape(shape: "Shape", tokens: int) -> "Shape":
    """What tails of so many tokens are like, in an engine whose whole chunks are like ``shape``.

    Raises:
        ValueError: no tail has so many tokens.
    """
    if not 0 < tokens < shape.tokens or any(tokens % section.block_tokens for section in shape.sections):
        raise ValueError(f"{tokens} tokens are no whole blocks at the beginning of {shape.tokens}")
    sections = tuple(_beginning(section, tokens) for section in shape.sections)
    nbytes = sum(section.raw_bytes for section in sections)
    identity = tail_identity(shape.identity)
    return shape._replace(identity=identity, tokens=tokens, sections=sections, payload_bytes=nbytes)


def _beginning(section: Section, tokens: int) -> Section:
    blocks = tokens // section.block_tokens
    return section._replace(blocks=blocks, raw_bytes=section.raw_bytes // section.blocks * blocks)


def gather(slot: memoryview, runs: Runs, blocks: Sequence[int], out: memoryview) -> None:
    """Write the first so many blocks of each group of a slot to ``out``, which has their size. O(regions) copies."""
    for start, at, size in _moves(runs, blocks):
        out[at : at + size] = slot[start : start + size]


def spread(slot: memoryview, runs: Runs, blocks: Sequence[int]) -> None:
    """Undo ``gather`` in the slot itself, at whose beginning the bytes lie. What lies behind the blocks stays undefined."""
    # From the last to the first: each place is at or behind the bytes that belong there, and those before are still needed.
    for start, at, size in reversed(list(_moves(runs, blocks))):
        if start != at:
            slot[start : start + size] = slot[at : at + size]


def _moves(runs: Runs, blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Place in the slot, place when gathered, and size of each region's blocks."""
    at = 0
    for group, count in zip(runs, blocks, strict=True):
        for start, nbytes in group:
            yield start, at, count * nbytes
            at += count * nbytes
