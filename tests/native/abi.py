"""The C ABI as ctypes sees it, written from ``csrc/warmroute.h`` alone.

Not the module that the product uses: these tests must reach what that one would refuse.
"""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

OK, INVALID, OUT_OF_BOUNDS, UNSUPPORTED, INCOMPRESSIBLE, NO_MEMORY, DEVICE, CORRUPT = 0, -1, -2, -3, -4, -5, -6, -7
RAW, FP8, K16_V8, EXP12, INT8 = range(5)
ENCODINGS = {"raw": RAW, "fp8": FP8, "k16v8": K16_V8, "exp12": EXP12, "int8": INT8}
PORTABLE, AVX2, AVX512, NEON = 1, 2, 3, 4


class View(Structure):
    _fields_ = (
        ("layers", POINTER(c_uint64)),
        ("begin", c_uint64),
        ("end", c_uint64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("layer_count", c_int32),
        ("block_count", c_int32),
        ("heads", c_int32),
        ("tokens", c_int32),
        ("content_bytes", c_int32),
        ("dtype", c_int32),
        ("k_offset", c_int32),
        ("k_bytes", c_int32),
        ("v_offset", c_int32),
        ("v_bytes", c_int32),
    )


class Range(Structure):
    _fields_ = tuple(
        (name, c_int32)
        for name in ("first_head", "heads", "packed_first_head", "packed_heads", "first_token", "token_count")
    )


class Span(Structure):
    _fields_ = (
        ("packed", c_uint64),
        ("packed_bytes", c_uint64),
        ("block_count", c_int32),
        ("packed_first_block", c_int32),
        ("packed_blocks", c_int32),
        ("reserved", c_int32),
    )


class Rotation(Structure):
    _fields_ = (
        ("cosines", POINTER(c_double)),
        ("sines", POINTER(c_double)),
        ("count", c_int32),
        ("rotary_offset", c_int32),
        ("interleaved", c_int32),
        ("reserved", c_int32),
    )


class Options(Structure):
    _fields_ = (
        ("device", c_int32),
        ("threads", c_int32),
        ("path", c_int32),
        ("isa", c_int32),
        ("reserved", c_int32 * 4),
    )


_VIEW, _RANGE, _SPANS = POINTER(View), POINTER(Range), POINTER(Span)
_BLOCKS, _WORDS, _ROTATION = POINTER(c_int32), POINTER(c_uint64), POINTER(Rotation)

_FUNCTIONS = {
    "wr_abi": (c_int32,),
    "wr_build": (c_char_p,),
    "wr_devices": (c_int32,),
    "wr_open": (c_int32, POINTER(Options), POINTER(c_void_p)),
    "wr_close": (None, c_void_p),
    "wr_explain": (c_char_p, c_void_p),
    "wr_describe": (c_int32, c_void_p, c_char_p, c_size_t),
    "wr_unit_bytes": (c_int64, _VIEW, c_int32),
    "wr_gather": (c_int32, c_void_p, _VIEW, _RANGE, _BLOCKS, _SPANS, c_int32, c_int32, c_void_p, c_void_p),
    "wr_scatter": (c_int32, c_void_p, _VIEW, _RANGE, _BLOCKS, _SPANS, c_int32, c_int32, _ROTATION, c_void_p, c_void_p),
    "wr_rotate": (c_int32, c_void_p, _VIEW, _RANGE, _BLOCKS, c_int32, _ROTATION, c_void_p),
    "wr_copy_batch": (c_int32, c_void_p, _WORDS, _WORDS, _WORDS, c_int64, c_int32, c_void_p),
    "wr_finish": (c_int32, c_void_p, c_void_p),
    "wr_calibrate": (c_int32, c_void_p, _WORDS, _WORDS),
    "wr_checksum": (c_int32, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p),
    "wr_crc32c": (c_uint32, c_uint32, c_void_p, c_size_t),
    "wr_slab_alloc": (c_int32, c_void_p, c_size_t, c_int32, c_int32, c_int32, POINTER(c_void_p), POINTER(c_uint32)),
    "wr_slab_free": (c_int32, c_void_p, c_void_p, c_size_t),
}


def load(path: Path) -> ctypes.CDLL:
    """The library with every function of the header declared; an ``AttributeError`` names one that it lacks."""
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
