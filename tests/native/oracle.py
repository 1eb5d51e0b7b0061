"""What the native core must do, in plain Python and NumPy: slow, obvious, and written from the header and
``docs/kv-codecs.md`` alone.

Memory is a NumPy array of ``uint8``; a ``layouts.View`` says where in it things are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tests.native import numerics
from tests.native.layouts import ELEMENT_BYTES, View

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


@dataclass(frozen=True)
class Rotation:
    """What ``wr_rotation`` says, with ``offset`` in bytes into K."""

    cosines: tuple[float, ...]
    sines: tuple[float, ...]
    offset: int = 0
    interleaved: bool = False


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


def unit_places(view: View, part: Range, span: Span, unit: int) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Every unit in range, as (layer, block, head) of the cache, and where its ``unit`` encoded bytes are."""
    for layer in range(len(view.layers)):
        for at, block in enumerate(span.blocks):
            for head in range(part.heads):
                row = (layer * span.packed_blocks + span.first + at) * part.packed_heads + part.packed_first_head
                yield (layer, block, part.first_head + head), (row + head) * unit


def encoded_bytes(view: View, part: Range, span: Span, encoding: int) -> int:
    """Size of the packed form that a span lies in."""
    units = len(view.layers) * span.packed_blocks * part.packed_heads
    return units * numerics.unit_bytes(view, encoding)


def _element_places(view: View, unit: tuple[int, int, int], offset: int, nbytes: int) -> NDArray[np.int64]:
    """Where each byte of a half of a unit is: ``[token, byte]``."""
    layer, block, head = unit
    starts = [view.at(layer, block, head, token) + offset for token in range(view.tokens)]
    return np.array(starts)[:, None] + np.arange(nbytes)


def read_half(cache: Bytes, view: View, unit: tuple[int, int, int], name: str) -> numerics.Array:
    """The bits of K or V of a unit, ``[token, element]``."""
    offset, nbytes = (view.k_offset, view.k_bytes) if name == "k" else (view.v_offset, view.v_bytes)
    raw = cache[_element_places(view, unit, offset, nbytes)]
    return np.ascontiguousarray(raw).view(numerics.BITS[view.dtype]).reshape(view.tokens, -1)


def write_half(cache: Bytes, view: View, unit: tuple[int, int, int], name: str, bits: numerics.Array) -> None:
    """The other way."""
    offset, nbytes = (view.k_offset, view.k_bytes) if name == "k" else (view.v_offset, view.v_bytes)
    raw = np.ascontiguousarray(bits).view(np.uint8).reshape(view.tokens, nbytes)
    cache[_element_places(view, unit, offset, nbytes)] = raw


@lru_cache(1 << 14)  # the same cases run on every backend
def _encoded(view: View, encoding: int, k: bytes, v: bytes) -> bytes:
    kind = numerics.BITS[view.dtype]
    rows = (np.frombuffer(half, kind).reshape(view.tokens, -1) for half in (k, v))
    return numerics.encode(view, encoding, *rows)


@lru_cache(1 << 14)
def _decoded(view: View, encoding: int, unit: bytes) -> tuple[numerics.Array, numerics.Array]:
    return numerics.decode(view, encoding, unit)


def gather_encoded(cache: Bytes, view: View, part: Range, span: Span, packed: Bytes, *, encoding: int) -> None:
    """Cache to encoded packed form; ``numerics.Incompressible`` where a unit is that."""
    size = numerics.unit_bytes(view, encoding)
    for unit, there in unit_places(view, part, span, size):
        k, v = (read_half(cache, view, unit, name).tobytes() for name in "kv")
        packed[there : there + size] = np.frombuffer(_encoded(view, encoding, k, v), np.uint8)


def scatter_encoded(cache: Bytes, view: View, part: Range, span: Span, packed: Bytes, *, encoding: int) -> None:
    """Encoded packed form to cache; ``numerics.Refused`` where a unit is not what an encoder writes."""
    size = numerics.unit_bytes(view, encoding)
    for unit, there in unit_places(view, part, span, size):
        k, v = _decoded(view, encoding, packed[there : there + size].tobytes())
        write_half(cache, view, unit, "k", k)
        write_half(cache, view, unit, "v", v)


def rotate_blocks(cache: Bytes, view: View, part: Range, blocks: Sequence[int], rotation: Rotation) -> None:
    """Rotate K of the tokens in range where it is. A block that is named twice is rotated once."""
    done = set()
    for at, block in enumerate(blocks):
        tokens = [
            token
            for token in range(view.tokens)
            if part.first_token <= at * view.tokens + token < part.first_token + part.token_count
        ]
        for layer in range(len(view.layers)):
            for head in range(part.first_head, part.first_head + part.heads):
                assert (layer, block, head) not in done
                done.add((layer, block, head))
                k = read_half(cache, view, (layer, block, head), "k")
                k[tokens] = turned(view, k[tokens], rotation)
                write_half(cache, view, (layer, block, head), "k", k)


def turned(view: View, k: numerics.Array, rotation: Rotation) -> numerics.Array:
    """K ``[token, element]`` of the view, rotated."""
    return numerics.rotate(
        k,
        view.dtype,
        np.array(rotation.cosines),
        np.array(rotation.sines),
        rotation.offset // ELEMENT_BYTES[view.dtype],
        interleaved=rotation.interleaved,
    )


# Checksums.

_STEP = np.uint64(0x9E3779B97F4A7C15)
_LOW, _MIDDLE = np.uint64(0xFFFFFFFF), np.uint64(16)


def _mixed(words: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    high, low = (words ^ keys) >> np.uint64(32), (words ^ keys) & _LOW
    high = high ^ (low * np.uint64(0x85EBCA77)) >> _MIDDLE & _LOW
    low = low ^ (high * np.uint64(0xC2B2AE3D)) >> _MIDDLE & _LOW
    high = high ^ (low * np.uint64(0x27D4EB2F)) >> _MIDDLE & _LOW
    return high << np.uint64(32) | low


def checksum(data: Bytes | bytes) -> int:
    """The page checksum of ``docs/kv-codecs.md``."""
    raw = bytes(data)
    words = np.frombuffer(raw.ljust(-(-len(raw) // 8) * 8, b"\0"), np.uint64)
    keys = (np.arange(len(words), dtype=np.uint64) + np.uint64(1)) * _STEP
    length = _mixed(np.array([len(raw)], np.uint64), np.zeros(1, np.uint64))
    return (int(_mixed(words, keys).sum(dtype=np.uint64)) + int(length[0])) % 2**64


def page_checksums(view: View, part: Range, span: Span, packed: Bytes, encoding: int) -> list[int]:
    """One for each page of the span, ``[layer][block]``."""
    unit = numerics.unit_bytes(view, encoding)
    found = []
    for layer in range(len(view.layers)):
        for at in range(len(span.blocks)):
            row = (layer * span.packed_blocks + span.first + at) * part.packed_heads + part.packed_first_head
            found.append(checksum(packed[row * unit : (row + part.heads) * unit]))
    return found


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C, bit by bit: the reflected polynomial 0x82F63B78 (RFC 3720, appendix B.4), continued from ``crc``."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = remainder >> 1 ^ 0x82F63B78 * (remainder & 1)  # noqa: PLW2901 - a shift register
        table.append(remainder)
    return table


_CRC_TABLE = _crc_table()


def crc32c_by_table(data: bytes, crc: int = 0) -> int:
    """The same, byte by byte."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
