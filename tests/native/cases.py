"""What hypothesis draws: layouts, ranges, block tables and bytes.

Runs are the same every time; ``WARMROUTE_TEST_EXAMPLES=2000`` draws that many others per test instead.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.native import layouts, oracle
from tests.native.layouts import BF16, BYTES, F16, F32, F64, Shape, View
from tests.native.rig import Memory, Place, Rig

EXAMPLES = int(os.environ.get("WARMROUTE_TEST_EXAMPLES", "0"))


def drawn(examples: int) -> settings:
    """Settings of a test: so many examples, or as many as the environment asks for."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def noise(seed: int, size: int) -> oracle.Bytes:
    """Random bytes; none of them tells where it is from."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@st.composite
def shapes(draw: Any, dtypes: tuple[int, ...] = (BYTES, F32, F16, BF16, F64)) -> Shape:
    """Small shapes, with sizes that vector code likes and ones that it does not."""
    size = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 33, 64, 128])
    return Shape(
        layers=draw(st.integers(1, 3)),
        blocks=draw(st.integers(1, 9)),
        heads=draw(st.integers(1, 5)),
        tokens=draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        k=draw(size),
        v=draw(size),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def views(draw: Any, dtypes: tuple[int, ...] = (BYTES, F32, F16, BF16, F64)) -> View:
    """Any layout of any shape."""
    catalogue = layouts.catalogue(draw(shapes(dtypes)))
    return catalogue[draw(st.sampled_from(sorted(catalogue)))]


@st.composite
def parts(draw: Any, view: View, *, tokens: int, whole_spans: bool = False) -> oracle.Range:
    """Some of the heads, somewhere among those of a packed form, and some of ``tokens`` tokens, or past them."""
    heads = draw(st.integers(1, view.heads))
    before, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    first = 0 if whole_spans else draw(st.integers(0, tokens - 1))
    return oracle.Range(
        first_head=draw(st.integers(0, view.heads - heads)),
        heads=heads,
        packed_first_head=before,
        packed_heads=before + heads + behind,
        first_token=first,
        token_count=tokens if whole_spans else draw(st.integers(1, tokens + 1)),
    )


@st.composite
def spans(draw: Any, view: View, *, repeats: bool, even: bool = False) -> list[oracle.Span]:
    """Up to three spans of blocks in any order; with ``even``, all of one length."""
    most = 4 if repeats else max(1, view.blocks // 3)
    count = draw(st.integers(1, 3 if repeats or view.blocks >= 3 else 1))
    lengths = [draw(st.integers(1, most))] * count if even else [draw(st.integers(1, most)) for _ in range(count)]
    everything = st.integers(0, view.blocks - 1)
    total = sum(lengths)
    blocks = (
        draw(st.lists(everything, min_size=total, max_size=total))
        if repeats
        else list(draw(st.permutations(range(view.blocks))))[:total]
    )
    made, at = [], 0
    for length in lengths:
        first, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        made.append(oracle.Span(tuple(blocks[at : at + length]), first, first + length + behind))
        at += length
    return made


@dataclass
class Stage:
    """A cache and packed forms, in memory and as they should be."""

    cache: Memory
    packed: list[Memory]
    cache_image: oracle.Bytes
    packed_images: list[oracle.Bytes]

    def check(self, *, of: str = "") -> None:
        """Compare every byte."""
        same(self.cache.fetch(), self.cache_image, f"{of}cache")
        for at, (memory, image) in enumerate(zip(self.packed, self.packed_images, strict=True)):
            same(memory.fetch(), image, f"{of}packed form {at}")


def stage(rig: Rig, view: View, sizes: list[int], seed: int, shift: int = 0, *, place: Place = "packed") -> Stage:
    """A cache and packed forms of these sizes, full of noise."""
    cache = noise(seed, view.size)
    packed = [noise(seed + 1 + at, size) for at, size in enumerate(sizes)]
    return Stage(rig.memory(cache, "cache"), [rig.memory(each, place, shift) for each in packed], cache, packed)


def same(got: oracle.Bytes, wanted: oracle.Bytes, what: str) -> None:
    """Assert that all bytes are equal, or name the first that is not."""
    if np.array_equal(got, wanted):
        return
    wrong = np.flatnonzero(got != wanted)
    first = int(wrong[0])
    raise AssertionError(
        f"{what}: {wrong.size} of {wanted.size} bytes are wrong, the first at {first}: "
        f"{got[first : first + 8].tolist()} instead of {wanted[first : first + 8].tolist()}"
    )


def narrowed(view: View, **fields: Any) -> View:
    """The view with other fields."""
    return replace(view, **fields)
