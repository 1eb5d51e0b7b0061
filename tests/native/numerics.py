"""The encodings and the rotation of ``docs/kv-codecs.md``, unit by unit, in NumPy: elements go in and come out as their
bits, encoded units as bytes. Roundings are done by other means than that page's formulas wherever there are others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.native.abi import EXP12, INT8, K16_V8, RAW
from tests.native.layouts import BF16, ELEMENT_BYTES, F16, F32, F64, View

Array = NDArray[Any]

LEAST_SCALE = np.float32(2.0**-100)
BITS = {F32: np.uint32, F16: np.uint16, BF16: np.uint16, F64: np.uint64}
CANONICAL_NAN = {F32: 0x7FC00000, F16: 0x7E00, BF16: 0x7FC0, F64: 0x7FF8000000000000}
LARGEST = {F32: float(np.finfo(np.float32).max), F16: 65504.0, BF16: float.fromhex("0x1.FEp127")}


class Refused(Exception):
    """Bytes that no encoder writes."""


class Incompressible(Exception):
    """Too many escapes."""


@dataclass(frozen=True)
class Half:
    """K or V of a unit: ``tokens`` rows of ``width`` elements."""

    tokens: int
    width: int
    dtype: int


def halves(view: View) -> tuple[Half, Half]:
    size = ELEMENT_BYTES[view.dtype]
    return Half(view.tokens, view.k_bytes // size, view.dtype), Half(view.tokens, view.v_bytes // size, view.dtype)


# Elements.


def widen(bits: Array, dtype: int) -> Array:
    """Exactly, to float64 for F64 and float32 for the others."""
    if dtype == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == F16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float64 if dtype == F64 else np.float32)


def narrow(values: Array, dtype: int) -> Array:
    """To the type's bits, rounding to nearest even; every NaN is the canonical one."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == BF16:
            found = _narrow_bf16(values)
        elif dtype == F16:
            found = values.astype(np.float16).view(np.uint16)
        else:
            found = values.view(BITS[dtype])
    return np.where(np.isnan(values), BITS[dtype](CANONICAL_NAN[dtype]), found)


def _narrow_bf16(values: Array) -> Array:
    """The nearer of the two bf16 neighbours of each magnitude, by their distance in float64."""
    bits = values.view(np.uint32)
    sign, below = (bits >> 31) << 15, (bits & 0x7FFFFFFF) >> 16
    above = below + 1
    magnitude = np.abs(values).astype(np.float64)
    with np.errstate(invalid="ignore"):
        down, up = magnitude - _bf16_as_double(below), _bf16_as_double(above) - magnitude
    upwards = (up < down) | ((up == down) & (above % 2 == 0))
    nearest = np.where(np.isinf(values), below, np.where(upwards, above, below))
    return (nearest | sign).astype(np.uint16)


def _bf16_as_double(bits: Array) -> Array:
    """The value, with 2^128 in place of infinity, as rounding sees it."""
    exponent, mantissa = (bits >> 7).astype(np.int64), (bits & 0x7F).astype(np.float64)
    fraction = np.where(exponent == 0, mantissa, mantissa + 128)
    return np.ldexp(fraction, np.maximum(exponent, 1) - 134)


def _e4m3_values() -> Array:
    """The finite magnitudes in order: their index is their code."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = _e4m3_values()


def to_e4m3(values: Array) -> Array:
    """The nearest code, the even one of two that are equally near; saturating."""
    wide = np.where(np.isnan(values), np.float32(0), np.minimum(np.abs(values), 448)).astype(np.float64)
    middles = (E4M3[:-1] + E4M3[1:]) / 2
    code = np.searchsorted(middles, wide, side="left")
    tie = (code < len(middles)) & (wide == middles[np.minimum(code, len(middles) - 1)])
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return np.where(np.isnan(values), 0x7F, code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def from_e4m3(codes: Array) -> Array:
    """The values as float32."""
    magnitude = np.append(E4M3, np.nan)[codes & 0x7F]
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


# Encoded units.


def pad16(size: int) -> int:
    return -(-size // 16) * 16


def _plane(data: Array | bytes) -> bytes:
    raw = data if isinstance(data, bytes) else data.tobytes()
    return raw + bytes(pad16(len(raw)) - len(raw))


def unit_bytes(view: View, encoding: int) -> int:
    """Bytes of an encoded unit of a view that the encoding takes."""
    return sum(size for _, size in planes(view, encoding))


def planes(view: View, encoding: int) -> Iterator[tuple[str, int]]:
    """The planes of a unit, by name, with their padded sizes."""
    if encoding == RAW:
        yield "content", view.tokens * view.content
        return
    if encoding == EXP12:
        for half in halves(view):
            for rows in tiles(half):
                n = rows * half.width
                yield "table", 16
                yield "escapes", escape_room(n)
                yield "codes", pad16(-(-n // 2))
                yield "low bytes", pad16(n)
        return
    both = [(name, half) for name, half in zip("kv", halves(view), strict=True) if half.width]
    if encoding == K16_V8:
        yield "k", pad16(view.tokens * view.k_bytes)
        both = both[1:]
    for name, half in both:
        channels = half.width if encoding == INT8 and name == "k" else half.tokens
        yield f"{name} scales", pad16(4 * channels)
    for name, half in both:
        yield f"{name} codes", pad16(half.tokens * half.width)


def _scales(x: Array, axis: int, steps: int) -> Array:
    finite = np.where(np.isfinite(x), np.abs(x), np.float32(0))
    return np.clip(finite.max(axis) / np.float32(steps), LEAST_SCALE, _greatest(F32, steps))


def _scaled(x: Array, scale: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x * (np.float32(1) / scale)


def encode(view: View, encoding: int, k: Array, v: Array) -> bytes:
    """A unit from the bits of its K and V, ``[token, element]``; ``Incompressible`` where that is the answer."""
    if encoding == EXP12:
        return b"".join(
            _encode_tile(rows) for half, bits in zip(halves(view), (k, v), strict=True) for rows in _cut(half, bits)
        )
    both = [(name, widen(bits, view.dtype)) for name, bits in (("k", k), ("v", v)) if bits.size]
    raw = b""
    if encoding == K16_V8:
        raw, both = _plane(k), both[1:]
    scales, codes = b"", b""
    for name, x in both:
        axis = 0 if encoding == INT8 and name == "k" else 1
        scale = _scales(x, axis, 127 if encoding == INT8 else 448)
        y = _scaled(x, np.expand_dims(scale, axis))
        scales += _plane(scale)
        codes += _plane(_to_int8(y) if encoding == INT8 else to_e4m3(y))
    return raw + scales + codes


def _to_int8(y: Array) -> Array:
    rounded = np.rint(np.clip(np.where(np.isnan(y), 0, y), -127, 127))
    return np.where(np.isnan(y), -128, rounded).astype(np.int8)


def decode(view: View, encoding: int, unit: bytes) -> tuple[Array, Array]:
    """The bits of K and V, ``[token, element]``; ``Refused`` where no encoder writes this."""
    if encoding == EXP12:
        return _decode_tiles(view, unit)
    stored, at = {}, 0
    for name, size in planes(view, encoding):
        stored[name] = unit[at : at + size]
        at += size
    found = []
    for name, half in zip("kv", halves(view), strict=True):
        count = half.tokens * half.width
        if not half.width:
            found.append(np.zeros((half.tokens, 0), BITS[view.dtype]))
        elif name in stored:
            found.append(np.frombuffer(stored[name], BITS[view.dtype], count).reshape(half.tokens, half.width))
        else:
            channels = encoding == INT8 and name == "k"
            scale = np.frombuffer(stored[f"{name} scales"], np.float32, half.width if channels else half.tokens)
            codes = np.frombuffer(stored[f"{name} codes"], np.uint8, count).reshape(half.tokens, half.width)
            found.append(_decode_half(encoding, half, np.expand_dims(scale, 0 if channels else 1), codes))
    return found[0], found[1]


def greatest_scale(encoding: int, dtype: int) -> np.float32:
    """The largest scale that an encoder writes."""
    return _greatest(dtype, 127 if encoding == INT8 else 448)


def _greatest(dtype: int, steps: int) -> np.float32:
    scale = np.float32(LARGEST[dtype]) / np.float32(steps)
    with np.errstate(over="ignore"):
        while np.isinf(scale * np.float32(steps)):
            scale = np.nextafter(scale, np.float32(0))
    return np.float32(scale)


def _decode_half(encoding: int, half: Half, scale: Array, codes: Array) -> Array:
    if not np.all((scale >= LEAST_SCALE) & (scale <= greatest_scale(encoding, half.dtype))):
        raise Refused("a scale")
    if encoding != INT8:
        return narrow(scale * from_e4m3(codes), half.dtype)
    signed = codes.view(np.int8)
    values = scale * signed.astype(np.float32)
    return narrow(np.where(signed == -128, np.float32(np.nan), values), half.dtype)


# The lossless encoding.


def escape_room(n: int) -> int:
    return 16 * -(-n // 256)


def tiles(half: Half) -> Iterator[int]:
    """How many tokens each tile of a half has."""
    if half.width:
        most = max(1, 8192 // half.width)
        for first in range(0, half.tokens, most):
            yield min(most, half.tokens - first)


def _cut(half: Half, bits: Array) -> Iterator[Array]:
    first = 0
    for rows in tiles(half):
        yield bits[first : first + rows].reshape(-1)
        first += rows


def _encode_tile(bits: Array) -> bytes:
    exponents = (bits >> 7 & 0xFF).astype(np.uint8)
    low = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
    counts = np.bincount(exponents, minlength=256).tolist()
    table = sorted(sorted(range(256), key=lambda each: (-counts[each], each))[:15])
    code_of = np.full(256, 15, np.uint8)
    code_of[table] = np.arange(15)
    codes = code_of[exponents]
    escaped = exponents[codes == 15].tobytes()
    room = escape_room(bits.size)
    if len(escaped) > room:
        raise Incompressible
    padded = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    pairs = padded[::2] | padded[1::2] << 4
    return bytes([*table, 0]) + escaped.ljust(room, b"\0") + _plane(pairs) + _plane(low)


def _decode_tiles(view: View, unit: bytes) -> tuple[Array, Array]:
    at, found = 0, []
    for half in halves(view):
        rows = []
        for count in tiles(half):
            n = count * half.width
            size = 16 + escape_room(n) + pad16(-(-n // 2)) + pad16(n)
            rows.append(_decode_tile(unit[at : at + size], n))
            at += size
        flat = np.concatenate(rows) if rows else np.zeros(0, np.uint16)
        found.append(flat.reshape(half.tokens, half.width))
    return found[0], found[1]


def _decode_tile(tile: bytes, n: int) -> Array:
    table, room = tile[:16], escape_room(n)
    if table[15] or any(after <= before for before, after in pairwise(table[:15])):
        raise Refused("the table")
    at = 16 + room
    pairs = np.frombuffer(tile, np.uint8, -(-n // 2), at)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:n]
    escapes = np.flatnonzero(codes == 15)
    if len(escapes) > room:
        raise Refused("more escapes than there is room for")
    exponents = np.frombuffer(table, np.uint8)[codes].astype(np.uint16)
    exponents[escapes] = np.frombuffer(tile, np.uint8, len(escapes), 16)
    low = np.frombuffer(tile, np.uint8, n, at + pad16(-(-n // 2))).astype(np.uint16)
    return (low & 0x80) << 8 | exponents << 7 | low & 0x7F


# Rotation.


def rotate(k: Array, dtype: int, cosines: Array, sines: Array, first: int, *, interleaved: bool) -> Array:
    """The bits of K ``[token, element]`` with its pairs, from element ``first`` on, rotated and rounded."""
    kind = np.float64 if dtype == F64 else np.float32
    c, s = np.asarray(cosines).astype(kind), np.asarray(sines).astype(kind)
    pairs = np.arange(len(c))
    left, right = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + len(c))
    rotated = k.copy()
    x, y = widen(k[:, first + left], dtype), widen(k[:, first + right], dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        rotated[:, first + left] = narrow(x * c - y * s, dtype)
        rotated[:, first + right] = narrow(y * c + x * s, dtype)
    return rotated
