"""The oracle's own arithmetic, held against what others say of the same formats."""

import numpy as np
import pytest

from tests.native import abi, numerics, oracle
from tests.native.layouts import BF16, F16, F32, F64, Shape, dense
from tests.native.numerics import BITS, narrow, to_e4m3, widen

SPECIALS = np.array(
    [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001, 1, 0x807FFFFF, 0x7F7FFFFF],
    np.uint32,
).view(np.float32)


def all_floats(count: int) -> np.ndarray:
    """Random bit patterns, the special ones, and what lies at and around every midpoint of bf16."""
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 2**32, count, np.uint32)
    near = (patterns & 0xFFFF0000) + 0x8000 + rng.integers(-2, 3, count).astype(np.uint32)
    return np.concatenate([SPECIALS, patterns.view(np.float32), near.view(np.float32)])


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_widening_and_narrowing_again_changes_only_nans(dtype: int) -> None:
    bits = np.arange(65536, dtype=np.uint16) if dtype != F32 else all_floats(5000).view(np.uint32)
    values = widen(bits, dtype)
    back = narrow(values, dtype)
    assert np.array_equal(back[~np.isnan(values)], bits[~np.isnan(values)])
    assert set(back[np.isnan(values)].tolist()) == {numerics.CANONICAL_NAN[dtype]}


def test_narrowing_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = all_floats(50_000)
    numbers = values[~np.isnan(values)]
    for dtype, theirs in ((BF16, torch.bfloat16), (F16, torch.float16)):
        expected = torch.from_numpy(numbers.copy()).to(theirs).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(narrow(numbers, dtype), expected)


def test_e4m3_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(numerics.from_e4m3(codes), theirs, equal_nan=True)
    values = all_floats(50_000)
    within = values[np.abs(values) <= 448]
    middles = ((numerics.E4M3[1:] + numerics.E4M3[:-1]) / 2).astype(np.float32)
    within = np.concatenate([within, middles, -middles, np.nextafter(middles, 0), np.nextafter(middles, 448)])
    expected = torch.from_numpy(within.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(to_e4m3(within), expected)


def test_e4m3_is_the_formula_of_the_document() -> None:
    values = np.concatenate([all_floats(20_000), np.linspace(-500, 500, 20_001, dtype=np.float32)])
    assert np.array_equal(to_e4m3(values), np.array([documented_e4m3(float(each)) for each in values], np.uint8))


def documented_e4m3(y: float) -> int:
    if np.isnan(y):
        return 0x7F
    sign, magnitude = (0x80 if np.signbit(np.float32(y)) else 0), abs(y)
    if magnitude >= 448:
        return sign | 0x7E
    if magnitude >= 2.0**-6:
        b = int(np.float32(magnitude).view(np.uint32))
        return sign | ((b + 0x7FFFF + ((b >> 20) & 1)) >> 20) - 960
    return sign | round(magnitude * 2.0**9)


def test_greatest_scales_are_those_of_the_document() -> None:
    documented = {
        (abi.FP8, F32): 0x7B124924,
        (abi.FP8, F16): 0x431236DB,
        (abi.FP8, BF16): 0x7B11B6DB,
        (abi.INT8, F32): 0x7C010203,
        (abi.INT8, F16): 0x4400F1E4,
        (abi.INT8, BF16): 0x7C008102,
    }
    for (encoding, dtype), bits in documented.items():
        assert int(numerics.greatest_scale(encoding, dtype).view(np.uint32)) == bits
    assert int(numerics.LEAST_SCALE.view(np.uint32)) == 0x0D800000


def test_sizes_of_a_known_unit() -> None:
    # Llama-3.1-8B: 16 tokens of 128 elements of K and of V, in bf16.
    view = dense("LBHNC", Shape(tokens=16, k=128, v=128))
    sizes = {name: numerics.unit_bytes(view, encoding) for name, encoding in abi.ENCODINGS.items()}
    assert sizes == {
        "raw": 8192,
        "fp8": 2 * 64 + 2 * 2048,
        "k16v8": 4096 + 64 + 2048,
        "exp12": 2 * (16 + 128 + 1024 + 2048),
        "int8": 512 + 64 + 4096,
    }


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_there_and_back_is_almost_nothing(dtype: int, interleaved: bool) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((5, 16)).astype(np.float64 if dtype == F64 else np.float32)
    k = narrow(values, dtype).astype(BITS[dtype])
    angle = rng.uniform(-100, 100, 6)
    there = numerics.rotate(k, dtype, np.cos(angle), np.sin(angle), 2, interleaved=interleaved)
    back = numerics.rotate(there, dtype, np.cos(angle), -np.sin(angle), 2, interleaved=interleaved)
    bound = {F32: 1e-6, F16: 4e-3, BF16: 4e-2, F64: 1e-15}[dtype] * 4
    assert np.abs(widen(back, dtype) - widen(k, dtype)).max() < bound
    assert np.array_equal(back[:, :2], k[:, :2])
    assert np.array_equal(back[:, 14:], k[:, 14:])


def test_both_crcs_of_the_oracle_agree() -> None:
    data = np.random.default_rng(1).integers(0, 256, 300, np.uint8).tobytes()
    assert oracle.crc32c(data) == oracle.crc32c_by_table(data)
    assert oracle.crc32c_by_table(data[100:], oracle.crc32c(data[:100])) == oracle.crc32c(data)


def test_checksum_is_the_formula_of_the_document() -> None:
    data = np.random.default_rng(3).integers(0, 256, 77, np.uint8)
    assert oracle.checksum(data) == documented_checksum(data.tobytes())
    assert oracle.checksum(b"") == documented_checksum(b"") == 0


def documented_checksum(data: bytes) -> int:
    total = mix(len(data), 0)
    for index in range(-(-len(data) // 8)):
        word = int.from_bytes(data[8 * index : 8 * index + 8], "little")
        total += mix(word, (index + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return total % 2**64


def mix(word: int, key: int) -> int:
    high, low = divmod(word ^ key, 2**32)
    high ^= (low * 0x85EBCA77 >> 16) % 2**32
    low ^= (high * 0xC2B2AE3D >> 16) % 2**32
    high ^= (low * 0x27D4EB2F >> 16) % 2**32
    return high * 2**32 + low
