"""The page checksum and CRC-32C against the oracle, and against damage."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native import abi, layouts, oracle
from tests.native.cases import EXAMPLES, drawn, noise, parts, spans, stage, views
from tests.native.layouts import Shape
from tests.native.rig import Rig

SIZES = [0, 1, 7, 8, 9, 15, 16, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4096, 4103, 65536]
KINDS = {"raw": abi.RAW, "fp8": abi.FP8, "k16v8": abi.K16_V8, "int8": abi.INT8}


@pytest.mark.parametrize("size", SIZES)
def test_checksum_is_that_of_the_oracle(rigs: list[Rig], size: int) -> None:
    data = noise(size, size)
    for rig in rigs:
        for shift, place in ((0, "packed"), (3, "packed"), (8, "cache")):
            memory = rig.memory(data, place, shift)
            assert rig.checksum(memory) == oracle.checksum(data)
            assert np.array_equal(memory.fetch(), data)


@drawn(40)
@given(st.integers(0, 3000), st.integers(0, 40), st.integers(0, 99))
def test_any_part_of_memory(rig: Rig, size: int, at: int, seed: int) -> None:
    data = noise(seed, size + at + 9)
    assert rig.checksum(rig.memory(data, "packed"), size, at) == oracle.checksum(data[at : at + size])


def test_large_data(rig: Rig) -> None:
    data = noise(1, 3_000_001)
    assert rig.checksum(rig.memory(data, "packed")) == oracle.checksum(data)


@drawn(40)
@given(st.data())
def test_pages_of_a_gather_and_of_a_scatter(rig: Rig, data: st.DataObject) -> None:
    """One for each page, spans after each other, of the heads in range; in both directions and for every encoding."""
    view = data.draw(views())
    name = data.draw(st.sampled_from(sorted(KINDS)))
    encoding = KINDS[name] if rig.unit_bytes(view, KINDS[name]) > 0 else abi.RAW
    chosen = data.draw(spans(view, repeats=False))
    part = data.draw(parts(view, tokens=max(len(span.blocks) for span in chosen) * view.tokens, whole_spans=True))
    made = stage(rig, view, [oracle.encoded_bytes(view, part, span, encoding) for span in chosen], seed=1)
    both = list(zip(chosen, made.packed, strict=True))
    outcome = rig.gather(view, made.cache, part, both, encoding, checksums=True)
    assert outcome.status == abi.OK, rig.explain()
    packed = [memory.fetch() for memory in made.packed]
    wanted = [
        oracle.page_checksums(view, part, span, image, encoding) for span, image in zip(chosen, packed, strict=True)
    ]
    assert outcome.checksums == list(itertools.chain(*wanted))
    again = rig.scatter(view, made.cache, part, both, encoding, checksums=True)
    assert again.status == abi.OK, rig.explain()
    assert again.checksums == outcome.checksums


@pytest.mark.parametrize("page", [8, 65_528, 262_144, 1_000_008, 1_048_576, 2_097_157])
def test_large_pages_that_threads_share(rigs: list[Rig], page: int) -> None:
    view = layouts.regions([64, 64 + 2 * page], page, page, 2, 64 + 4 * page)
    span = oracle.Span((1, 0), 0, 2)
    part = oracle.whole(view, 2)
    for rig in rigs:
        made = stage(rig, view, [oracle.packed_bytes(view, part, span)], seed=page)
        stored = rig.gather(view, made.cache, part, [(span, made.packed[0])], checksums=True)
        oracle.gather(made.cache_image, view, part, span, made.packed_images[0])
        made.check()
        assert stored.checksums == oracle.page_checksums(view, part, span, made.packed_images[0], abi.RAW)
        made.cache.fill(noise(3, view.size))
        loaded = rig.scatter(view, made.cache, part, [(span, made.packed[0])], checksums=True)
        assert loaded.checksums == stored.checksums
        made.cache_image[:64] = noise(3, view.size)[:64]
        made.check()


def test_checksums_of_parts_of_spans_are_refused(rig: Rig) -> None:
    view = layouts.dense("LBHNC", Shape())
    span = oracle.Span((1, 2), 0, 2)
    part = oracle.Range(0, 3, 0, 3, 1, 7)
    made = stage(rig, view, [oracle.packed_bytes(view, part, span)], seed=1)
    for call in (rig.gather, rig.scatter):
        outcome = call(view, made.cache, part, [(span, made.packed[0])], checksums=True)
        assert outcome.status == abi.INVALID
        assert set(outcome.checksums) == {0x5A5A5A5A5A5A5A5A}
        made.check()


def test_a_scatter_tells_damage_in_the_packed_form(rig: Rig) -> None:
    """What a load compares with what the store said: exactly the damaged page differs."""
    view = layouts.dense("BLHNC", Shape(layers=3, blocks=5))
    span = oracle.Span((4, 0, 2), 0, 3)
    part = oracle.whole(view, 3)
    made = stage(rig, view, [oracle.packed_bytes(view, part, span)], seed=1)
    stored = rig.gather(view, made.cache, part, [(span, made.packed[0])], checksums=True).checksums
    image = made.packed[0].fetch()
    for page in range(9):
        damaged = image.copy()
        damaged[page * view.page + 11] ^= 4
        made.packed[0].fill(damaged)
        loaded = rig.scatter(view, made.cache, part, [(span, made.packed[0])], checksums=True).checksums
        assert [at for at in range(9) if loaded[at] != stored[at]] == [page]


def changes(rig: Rig, data: oracle.Bytes, bits: list[int]) -> int:
    """How many of these single-bit flips the checksum does not see."""
    memory, missed = rig.memory(data, "packed"), 0
    original = rig.checksum(memory)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        memory.fill(data)
        missed += rig.checksum(memory) == original
        data[bit // 8] ^= 1 << bit % 8
    return missed


@pytest.mark.parametrize("size", [1, 8, 13, 64, 200])
@pytest.mark.parametrize("content", ["noise", "zeros", "ones"])
def test_every_single_bit_flip_is_seen(rigs: list[Rig], size: int, content: str) -> None:
    data = {"noise": noise(1, size), "zeros": np.zeros(size, np.uint8), "ones": np.full(size, 255, np.uint8)}[content]
    assert not changes(rigs[0], data, list(range(8 * size)))


def test_bit_flips_in_a_large_page_are_seen(rigs: list[Rig]) -> None:
    size = 32768
    sampled = np.random.default_rng(1).choice(8 * size, EXAMPLES or 150, replace=False).tolist()
    assert not changes(rigs[1], noise(2, size), sampled)


def test_all_single_bit_flips_of_a_page_by_the_oracle() -> None:
    """What the backends were held against above: each flip moves the sum, for a whole 4 KiB page."""
    words = noise(3, 4096).view(np.uint64)
    keys = (np.arange(512, dtype=np.uint64) + np.uint64(1)) * oracle._STEP
    mixed = oracle._mixed(words, keys)
    for bit in range(64):
        assert np.all(oracle._mixed(words ^ np.uint64(1 << bit), keys) != mixed)


def test_swapped_words_and_moved_runs_are_seen(rigs: list[Rig]) -> None:
    rng = np.random.default_rng(5)
    data = noise(5, 2048)
    words = data.view(np.uint64)
    for rig in rigs:
        original = rig.checksum(rig.memory(data, "packed"))
        for _ in range(60):
            here, there = rng.choice(256, 2, replace=False)
            swapped = words.copy()
            swapped[[here, there]] = swapped[[there, here]]
            assert rig.checksum(rig.memory(swapped.view(np.uint8), "packed")) != original
        for distance in (8, 16, 64, 128, 512, 1024):
            assert rig.checksum(rig.memory(np.roll(data, distance), "packed")) != original


def test_the_same_flip_in_two_words_is_seen(rigs: list[Rig]) -> None:
    """Bits that cancel in plain sums and parities, in pairs of words."""
    rng = np.random.default_rng(6)
    for content in (np.zeros(1024, np.uint8), noise(6, 1024)):
        original = rigs[0].checksum(rigs[0].memory(content, "packed"))
        for _ in range(200):
            bit, (here, there) = rng.integers(0, 64), rng.choice(128, 2, replace=False)
            damaged = content.copy().view(np.uint64)
            damaged[[here, there]] ^= np.uint64(1) << np.uint64(bit)
            assert rigs[0].checksum(rigs[0].memory(damaged.view(np.uint8), "packed")) != original


def test_lengths_of_zeros_differ(rig: Rig) -> None:
    sums = [rig.checksum(rig.memory(np.zeros(size, np.uint8), "packed")) for size in range(40)]
    assert len(set(sums)) == len(sums)


def test_parts_add_up() -> None:
    """As the document has it, each part with its own word numbers: what threads and thread blocks rely on."""
    data = noise(7, 800)
    words = data.view(np.uint64)
    keys = (np.arange(100, dtype=np.uint64) + np.uint64(1)) * oracle._STEP
    mixed = oracle._mixed(words, keys)
    length = oracle.checksum(b"") + int(oracle._mixed(np.array([800], np.uint64), np.zeros(1, np.uint64))[0])
    order = np.random.default_rng(1).permutation(100)
    parts_sum = sum(int(mixed[order[at : at + 7]].sum(dtype=np.uint64)) for at in range(0, 100, 7))
    assert (parts_sum + length) % 2**64 == oracle.checksum(data)


# CRC-32C.

RFC3720 = {
    "zeros": (bytes(32), 0x8A9136AA),
    "ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "iSCSI read": (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
    "digits": (b"123456789", 0xE3069283),
    "nothing": (b"", 0),
}


@pytest.mark.parametrize("name", RFC3720)
def test_crc32c_of_the_vectors_of_rfc_3720(rigs: list[Rig], name: str) -> None:
    data, crc = RFC3720[name]
    assert oracle.crc32c(data) == oracle.crc32c_by_table(data) == crc
    assert rigs[0].crc32c(data) == crc


@drawn(60)
@given(st.binary(max_size=700), st.integers(0, 700), st.integers(0, 2**32 - 1))
def test_crc32c_continues(rig: Rig, data: bytes, cut: int, start: int) -> None:
    assert rig.crc32c(data, start) == oracle.crc32c_by_table(data, start)
    assert rig.crc32c(data[cut:], rig.crc32c(data[:cut])) == rig.crc32c(data)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 4096, 8191, 24_577, 200_003])
def test_crc32c_of_long_data_at_any_alignment(rigs: list[Rig], size: int) -> None:
    # Long enough for several streams at once.
    data = noise(size, size + 8).tobytes()
    for at in (0, 1, 5):
        assert rigs[0].crc32c(data[at : at + size]) == oracle.crc32c_by_table(data[at : at + size])
