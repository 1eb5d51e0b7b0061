import contextlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_connector import compression
from worker_connector.compression import Compression, Undecodable, compress, decompress, require, shuffled, unshuffled
from worker_connector.errors import ConfigurationError

pytest.importorskip("zstandard")
pytest.importorskip("lz4")

BOTH = [Compression.ZSTD, Compression.LZ4]


def kv(elements: int = 100_000) -> bytes:
    """Normally distributed bfloat16 elements."""
    values = np.random.default_rng(1).standard_normal(elements).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize("method", BOTH)
@given(data=st.binary(max_size=3000), repeat=st.integers(1, 50), element=st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_whatever_is_compressed_comes_back(method: Compression, data: bytes, repeat: int, element: int) -> None:
    plain = data * repeat
    made = compress(plain, method, element)
    assert made.data.nbytes <= len(plain)
    assert decompress(made.data, made.compression, made.shuffle, len(plain)) == plain


@given(data=st.binary(max_size=100), element=st.sampled_from([1, 2, 4, 8]))
def test_shuffling_is_undone_and_says_what_it_says(data: bytes, element: int) -> None:
    whole = len(data) // element * element
    plain = b"".join(data[part:whole:element] for part in range(element)) + data[whole:]
    assert shuffled(data, element) == plain
    assert unshuffled(plain, element) == data


def test_kv_shrinks_more_with_its_bytes_sorted() -> None:
    data = kv()
    for method in BOTH:
        sorted_bytes, as_is = compress(data, method, 2), compress(data, method, 1)
        assert sorted_bytes.shuffle == 2
        assert sorted_bytes.data.nbytes < min(0.9 * len(data), as_is.data.nbytes)


def test_shuffling_is_left_out_where_it_does_not_pay() -> None:
    assert compress(b"ab" * 100_000, Compression.LZ4, 8).shuffle in (1, 8)
    text = bytes(range(250)) * 4000
    made = compress(text, Compression.ZSTD, 2)
    assert made.data.nbytes < len(text) // 50


@pytest.mark.parametrize("method", BOTH)
def test_what_does_not_shrink_is_not_copied(method: Compression) -> None:
    noise = np.random.default_rng(2).bytes(1 << 20)
    made = compress(noise, method, 2)
    assert made.compression is Compression.NONE
    assert made.data.obj is noise


@pytest.mark.parametrize("method", BOTH)
def test_samples_that_promise_too_much_are_not_believed(method: Compression) -> None:
    noise = bytearray(np.random.default_rng(3).bytes(4 << 20))
    size = len(noise)
    for start in (0, size // 2 - (64 << 10), size - (64 << 10)):
        noise[start : start + (128 << 10)] = bytes(len(noise[start : start + (128 << 10)]))
    assert len(noise) == size
    made = compress(bytes(noise), method)
    assert made.data.nbytes <= size
    assert decompress(made.data, made.compression, made.shuffle, size) == noise


@pytest.mark.parametrize("method", BOTH)
def test_another_size_is_refused_without_taking_memory_for_it(method: Compression) -> None:
    bomb = compress(bytes(64 << 20), method).data
    assert bomb.nbytes < 1 << 20
    with pytest.raises(Undecodable):
        decompress(bomb, method, 1, 1000)
    with pytest.raises(Undecodable):
        decompress(bomb, method, 1, (64 << 20) + 1)


@pytest.mark.parametrize("method", BOTH)
@given(data=st.binary(max_size=300), size=st.integers(0, 5000))
@settings(deadline=None)
def test_any_bytes_are_survived(method: Compression, data: bytes, size: int) -> None:
    with contextlib.suppress(Undecodable):
        assert decompress(data, method, 1, size).nbytes == size


@pytest.mark.parametrize("method", BOTH)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_flipped_bits_are_survived(method: Compression, place: int, bit: int) -> None:
    plain = b"warm " * 2000
    made = bytearray(compress(plain, method).data)
    made[place % len(made)] ^= 1 << bit
    with contextlib.suppress(Undecodable):
        assert decompress(made, method, 1, len(plain)).nbytes == len(plain)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'warmroute\[zstd\]'"):
        require(Compression.ZSTD)
    require(Compression.NONE)
    compression.require(Compression.LZ4)
