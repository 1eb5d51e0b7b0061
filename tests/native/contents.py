"""KV content of many kinds, as element bits: ordinary, outlying, tiny, huge, special, and plain random."""

import itertools
from functools import lru_cache

import numpy as np

from tests.native import numerics, oracle
from tests.native.cases import noise
from tests.native.layouts import BF16, F16, F32, F64, View
from tests.native.numerics import Array

STYLES = ("normal", "outliers", "mixed sizes", "tiny", "huge", "special", "rare special", "zeros", "constant", "bits")

_SPECIAL_FLOATS = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-100, 2.0**-110, 2.0**-111, -(2.0**-126), 448.0, 127.0, 1.0]
_QUIET = {F32: 0x7F800000, F16: 0x7C00, BF16: 0x7F80, F64: 0x7FF0000000000000}


def bits(rng: np.random.Generator, tokens: int, width: int, dtype: int, style: str) -> Array:
    """``[token, element]`` of a style."""
    kind = numerics.BITS[dtype]
    if style == "bits":
        return rng.integers(0, int(np.iinfo(kind).max), (tokens, width), kind, endpoint=True)
    values = _values(rng, tokens, width, dtype, style)
    with np.errstate(over="ignore"):
        made = numerics.narrow(values.astype(np.float64 if dtype == F64 else np.float32), dtype).astype(kind)
    if "special" in style:
        some = rng.random((tokens, width)) < (0.02 if style == "rare special" else 0.3)
        made = np.where(some, specials(rng, (tokens, width), dtype), made)
    return made


def _values(rng: np.random.Generator, tokens: int, width: int, dtype: int, style: str) -> Array:
    normal = rng.standard_normal((tokens, width))
    largest = 3e38 if dtype == F64 else numerics.LARGEST[dtype]
    if style == "outliers":
        return normal * np.where(rng.random(width) < 0.1, 60.0, 1.0)
    if style == "mixed sizes":
        return normal * 2.0 ** rng.integers(-30, 12, (tokens, 1))
    if style == "tiny":
        return normal * 2.0 ** rng.integers(-149, -90, (tokens, width))
    if style == "huge":
        return np.clip(normal, -1, 1) * largest
    if style in {"zeros", "constant"}:
        return np.full((tokens, width), 0.0 if style == "zeros" else rng.standard_normal())
    return normal


def specials(rng: np.random.Generator, shape: tuple[int, ...], dtype: int) -> Array:
    """NaNs of every sign and payload, infinities, zeros, denormals, the largest and smallest numbers."""
    kind, infinity = numerics.BITS[dtype], _QUIET[dtype]
    sign, mantissa = (int(np.iinfo(kind).max) + 1) // 2, (infinity & -infinity) - 1
    nans = infinity | rng.integers(1, mantissa, shape, np.uint64, endpoint=True)
    denormals = rng.integers(1, mantissa, shape, np.uint64, endpoint=True)
    wide = np.array(_SPECIAL_FLOATS, np.float64 if dtype == F64 else np.float32)
    plain = np.concatenate(
        [numerics.narrow(wide, dtype).astype(np.uint64), np.array([infinity - 1, 1, mantissa + 1], np.uint64)]
    )
    choice = rng.integers(0, 4, shape)
    found = np.where(choice == 0, nans, np.where(choice == 1, denormals, rng.choice(plain, shape)))
    return (found | np.where(rng.random(shape) < 0.5, np.uint64(sign), np.uint64(0))).astype(kind)


@lru_cache(256)  # the same cases run on every backend
def _image(view: View, seed: int, style: str) -> bytes:
    cache, rng = noise(seed, view.size), np.random.default_rng(seed)
    k, v = numerics.halves(view)
    for unit in itertools.product(range(len(view.layers)), range(view.blocks), range(view.heads)):
        for name, half in (("k", k), ("v", v)):
            if half.width:
                made = bits(rng, half.tokens, half.width, view.dtype, style)
                oracle.write_half(cache, view, unit, name, made)
    return cache.tobytes()


def image(view: View, seed: int, style: str) -> oracle.Bytes:
    """A cache whose every unit has content of a style, and whatever is not K or V is noise."""
    return np.frombuffer(_image(view, seed, style), np.uint8).copy()
