"""What the native core must do, in plain Python and NumPy: slow, obvious, and written from the header and
``docs/kv-codecs.md`` alone.

Memory is a NumPy array of ``uint8``; a ``layouts.View`` says where in it things are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.native.layouts import View

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Range:
    first_head: int
    heads: int
    packed_first_head: int
    packed_heads: int
    first_token: int
    token_count: int


@dataclass(frozen=True)
class Span:
    """Blocks, and where in a packed form of ``packed_blocks`` blocks they are."""

    blocks: tuple[int, ...]
    first: int
    packed_blocks: int


def whole(view: View, block_count: int) -> Range:
    """The range of all heads and of every token of so many blocks."""
    return Range(0, view.heads, 0, view.heads, 0, block_count * view.tokens)


def packed_bytes(view: View, part: Range, span: Span) -> int:
    """Size of the raw packed form that a span lies in."""
    return len(view.layers) * span.packed_blocks * part.packed_heads * view.tokens * view.content


def pieces(view: View, part: Range, span: Span) -> Iterator[tuple[int, int]]:
    """Where each content is: in the cache, and in the packed form."""
    for layer in range(len(view.layers)):
        for at, block in enumerate(span.blocks):
            for head in range(part.heads):
                for token in range(view.tokens):
                    if part.first_token <= at * view.tokens + token < part.first_token + part.token_count:
                        row = (layer * span.packed_blocks + span.first + at) * part.packed_heads
                        row = (row + part.packed_first_head + head) * view.tokens + token
                        yield view.at(layer, block, part.first_head + head, token), row * view.content


def gather(cache: Bytes, view: View, part: Range, span: Span, packed: Bytes) -> None:
    """Cache to packed form, raw."""
    for here, there in pieces(view, part, span):
        packed[there : there + view.content] = cache[here : here + view.content]


def scatter(cache: Bytes, view: View, part: Range, span: Span, packed: Bytes) -> None:
    """Packed form to cache, raw."""
    for here, there in pieces(view, part, span):
        cache[here : here + view.content] = packed[there : there + view.content]


def addressed(view: View, part: Range, blocks: Sequence[int]) -> NDArray[np.bool_]:
    """Which bytes of the allocation are content of these blocks, in range."""
    mask = np.zeros(view.size, bool)
    for here, _ in pieces(view, part, Span(tuple(blocks), 0, len(blocks))):
        mask[here : here + view.content] = True
    return mask


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C, bit by bit: the reflected polynomial 0x82F63B78 (RFC 3720, appendix B.4)."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
