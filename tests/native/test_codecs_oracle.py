"""Every encoding against the oracle, to the bit: encoded bytes, decoded elements, refusals, and what stays as it was."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native import abi, contents, layouts, numerics, oracle
from tests.native.abi import EXP12, FP8, INT8, K16_V8, RAW
from tests.native.cases import Stage, drawn, noise, parts, same, spans, stage, views
from tests.native.layouts import BF16, BYTES, F16, F32, F64, Shape, View
from tests.native.rig import Rig

EVERYTHING = 2**31 - 1
TAKES = {FP8: (F32, F16, BF16), K16_V8: (F32, F16, BF16), INT8: (F32, F16, BF16), EXP12: (BF16,)}
NAMES = {encoding: name for name, encoding in abi.ENCODINGS.items()}
PAIRS = [pytest.param(e, d, id=f"{NAMES[e]}-{['bytes', 'f32', 'f16', 'bf16'][d]}") for e in TAKES for d in TAKES[e]]


def whole(view: View) -> oracle.Range:
    return oracle.Range(0, view.heads, 0, view.heads, 0, EVERYTHING)


@dataclass
class Encoded:
    """Spans of a cache with content of a style, their packed forms, and what the oracle says of them."""

    stage: Stage
    spans: list[oracle.Span]
    statuses: list[int]

    @property
    def given(self) -> list[tuple[oracle.Span, Any]]:
        return list(zip(self.spans, self.stage.packed, strict=True))


def encode(
    rig: Rig,
    view: View,
    part: oracle.Range,
    chosen: Sequence[oracle.Span],
    encoding: int,
    *,
    style: str = "normal",
    seed: int = 1,
    shift: int = 0,
) -> Encoded:
    """Gather on the rig and in the oracle; compare unless the oracle says that it cannot be done."""
    made = stage(rig, view, [oracle.encoded_bytes(view, part, span, encoding) for span in chosen], seed, shift)
    made.cache_image = contents.image(view, seed, style)
    made.cache.fill(made.cache_image)
    wanted = abi.OK
    try:
        for span, image in zip(chosen, made.packed_images, strict=True):
            oracle.gather_encoded(made.cache_image, view, part, span, image, encoding=encoding)
    except numerics.Incompressible:
        wanted = abi.INCOMPRESSIBLE
    encoded = Encoded(made, list(chosen), [wanted])
    outcome = rig.gather(view, made.cache, part, encoded.given, encoding)
    assert outcome.status == wanted, rig.explain()
    if wanted == abi.OK:
        made.check(of="gather: ")
    else:
        same(made.cache.fetch(), made.cache_image, "cache")
        for memory in made.packed:
            memory.fetch()
    return encoded


def decode(
    rig: Rig,
    view: View,
    part: oracle.Range,
    encoded: Encoded,
    encoding: int,
    *,
    rotation: oracle.Rotation | None = None,
) -> tuple[int, oracle.Bytes]:
    """Scatter into another cache on the rig and in the oracle, and compare: the status, and that cache as it should be."""
    image = noise(77, view.size)
    before = image.copy()
    memory = rig.memory(image, "cache")
    wanted = abi.OK
    try:
        for span, packed in zip(encoded.spans, encoded.stage.packed_images, strict=True):
            oracle.scatter_encoded(image, view, part, span, packed, encoding=encoding)
            if rotation:
                oracle.rotate_blocks(image, view, part, span.blocks, rotation)
    except numerics.Refused:
        wanted = abi.CORRUPT
    outcome = rig.scatter(view, memory, part, encoded.given, encoding, rotation=rotation)
    assert outcome.status == wanted, rig.explain()
    got = memory.fetch()
    if wanted == abi.OK:
        same(got, image, "scatter: cache")
    else:
        blocks = [block for span in encoded.spans for block in span.blocks]
        may_change = oracle.addressed(view, part, blocks)
        same(np.where(may_change, 0, got), np.where(may_change, 0, before), "refused: what is out of range")
    for memory_of_span, packed in zip(encoded.stage.packed, encoded.stage.packed_images, strict=True):
        same(memory_of_span.fetch(), packed, "scatter: packed form")
    return wanted, image


def check_values(view: View, part: oracle.Range, encoded: Encoded, decoded: oracle.Bytes, encoding: int) -> None:
    """What was decoded is within the bounds that the document states of what was encoded."""
    for span in encoded.spans:
        for unit, _ in oracle.unit_places(view, part, span, 0):
            for name in "kv":
                before = oracle.read_half(encoded.stage.cache_image, view, unit, name)
                after = oracle.read_half(decoded, view, unit, name)
                if encoding == EXP12 or (encoding == K16_V8 and name == "k"):
                    assert np.array_equal(before, after)
                elif before.size:
                    check_bounds(before, after, view.dtype, encoding, axis=0 if (encoding, name) == (INT8, "k") else 1)


def check_bounds(before: Any, after: Any, dtype: int, encoding: int, *, axis: int) -> None:
    x, y = (numerics.widen(bits, dtype).astype(np.float64) for bits in (before, after))
    steps = 127 if encoding == INT8 else 448
    finite = np.isfinite(x)
    scale = np.maximum(np.where(finite, np.abs(x), 0).max(axis, keepdims=True) / steps, 2.0**-100) * (1 + 2.0**-24)
    spacing = half_spacing(y, dtype)
    if encoding == INT8:
        bound = (0.5 + 2.0**-14) * scale + spacing
    else:
        bound = (1 + 2.0**-20) * np.maximum(np.abs(x) / 16, scale / 1024) + spacing
    with np.errstate(invalid="ignore"):
        assert np.all((np.abs(y - x) <= bound) | ~finite)
    assert np.array_equal(np.isnan(x), np.isnan(y))
    infinite = np.isinf(x)
    largest = np.broadcast_to(scale * steps, x.shape)[infinite]
    assert np.all(np.isfinite(y[infinite]))
    assert np.array_equal(np.signbit(y[infinite]), np.signbit(x[infinite]))
    assert np.allclose(np.abs(y[infinite]), largest, rtol=2.0**-7, atol=2.0**-24 if dtype == F16 else 0)


def half_spacing(values: Any, dtype: int) -> Any:
    """Half the distance of two neighbours of the type."""
    mantissa, least = {F32: (23, -149), F16: (10, -24), BF16: (7, -133)}[dtype]
    if dtype == F32:
        return np.zeros_like(values) + 2.0**-150 + np.abs(values) * 2.0**-24
    exponent = np.floor(np.log2(np.maximum(np.abs(np.nan_to_num(values)), 2.0**-1000)))
    return 2.0 ** (np.maximum(exponent - mantissa, least) - 1)


def shift_for(rig: Rig, shift: int) -> int:
    """Encoded units need no alignment on a CPU, and 16 bytes on a GPU."""
    return shift & ~15 if rig.on_device else shift


@st.composite
def encoded_views(draw: Any, dtypes: tuple[int, ...]) -> View:
    """Views whose content has gaps and whose halves are in either order, beside those of vLLM."""
    view: View = draw(views(dtypes))
    if not draw(st.booleans()) or view.dtype == BYTES:
        return view
    element = layouts.ELEMENT_BYTES[view.dtype]
    shape = Shape(
        layers=len(view.layers),
        blocks=view.blocks,
        heads=view.heads,
        tokens=view.tokens,
        k=view.k_bytes // element,
        v=view.v_bytes // element,
        dtype=view.dtype,
        gap=element * draw(st.integers(0, 3)),
        swapped=draw(st.booleans()),
    )
    return layouts.dense(draw(st.sampled_from(layouts.ORDERS)), shape)


@pytest.mark.parametrize(("encoding", "dtype"), PAIRS)
@drawn(18)
@given(st.data())
def test_any_content(rigs: list[Rig], encoding: int, dtype: int, data: st.DataObject) -> None:
    rig = rigs[data.draw(st.integers(0, 1))]
    view = data.draw(encoded_views((dtype,)).filter(lambda view: view.dtype == dtype))
    if encoding == K16_V8 and not view.v_bytes:
        assert rig.unit_bytes(view, encoding) == abi.UNSUPPORTED
        return
    style = data.draw(st.sampled_from(contents.STYLES))
    part = replace(data.draw(parts(view, tokens=1, whole_spans=True)), token_count=EVERYTHING)
    chosen = data.draw(spans(view, repeats=False))
    shift = shift_for(rig, data.draw(st.sampled_from([0, 0, 1, 4, 16])))
    encoded = encode(rig, view, part, chosen, encoding, style=style, seed=data.draw(st.integers(0, 999)), shift=shift)
    if encoded.statuses == [abi.OK]:
        status, decoded = decode(rig, view, part, encoded, encoding)
        assert status == abi.OK
        check_values(view, part, encoded, decoded, encoding)


@pytest.mark.parametrize("style", contents.STYLES)
@pytest.mark.parametrize(("encoding", "dtype"), PAIRS)
def test_every_style(rigs: list[Rig], encoding: int, dtype: int, style: str) -> None:
    # Wide enough for vector code with a rest, and work for two threads.
    view = layouts.dense("BLHNC", Shape(layers=2, blocks=3, heads=2, tokens=5, k=72, v=40, dtype=dtype))
    chosen = [oracle.Span((2, 0), 0, 2)]
    for rig in rigs:
        encoded = encode(rig, view, whole(view), chosen, encoding, style=style, seed=3)
        if encoded.statuses == [abi.OK]:
            status, decoded = decode(rig, view, whole(view), encoded, encoding)
            assert status == abi.OK
            check_values(view, whole(view), encoded, decoded, encoding)


@pytest.mark.parametrize(("encoding", "dtype"), PAIRS)
def test_every_width(rigs: list[Rig], encoding: int, dtype: int) -> None:
    """Whole vectors and every rest of one, and a channel or token more than fit what is done at once."""
    for width in [*range(1, 40), 63, 64, 65, 129, 513]:
        shape = Shape(layers=1, blocks=1, heads=1, tokens=9 if width < 100 else 2, k=width, v=width + 1, dtype=dtype)
        view = layouts.dense("LBHNC", shape)
        encoded = encode(rigs[0], view, whole(view), [oracle.Span((0,), 0, 1)], encoding, style="outliers")
        if encoded.statuses == [abi.OK]:
            assert decode(rigs[0], view, whole(view), encoded, encoding)[0] == abi.OK


@pytest.mark.parametrize("kind", sorted(layouts.catalogue(Shape())))
@pytest.mark.parametrize("encoding", list(TAKES), ids=lambda encoding: NAMES[encoding])
def test_every_layout(rigs: list[Rig], encoding: int, kind: str) -> None:
    view = layouts.catalogue(Shape(k=16, v=16))[kind]
    if view.dtype == BYTES or (encoding == K16_V8 and not view.v_bytes):
        assert rigs[0].unit_bytes(view, encoding) == abi.UNSUPPORTED
        return
    heads = max(1, view.heads - 1)
    part = oracle.Range(view.heads - heads, heads, 1, heads + 2, 0, EVERYTHING)
    chosen = [oracle.Span((view.blocks - 1, 0, 2), 1, 4), oracle.Span((1,), 0, 1)]
    for rig in rigs:
        encoded = encode(rig, view, part, chosen, encoding, seed=4)
        assert encoded.statuses == [abi.OK]
        assert decode(rig, view, part, encoded, encoding)[0] == abi.OK


@drawn(50)
@given(st.data())
def test_sizes_of_units(rigs: list[Rig], data: st.DataObject) -> None:
    rig = rigs[0]
    view = data.draw(encoded_views((BYTES, F32, F16, BF16, F64)))
    for encoding in (FP8, K16_V8, EXP12, INT8):
        if view.dtype not in TAKES[encoding] or (encoding == K16_V8 and not view.v_bytes):
            assert rig.unit_bytes(view, encoding) == abi.UNSUPPORTED
        else:
            assert rig.unit_bytes(view, encoding) == numerics.unit_bytes(view, encoding)
            assert rig.unit_bytes(view, encoding) % 16 == 0


VIEW = layouts.dense("LBHNC", Shape(layers=1, blocks=3, heads=2, tokens=4, k=8, v=8))


@pytest.mark.parametrize(
    ("changed", "encodings", "status"),
    [
        ({"k_bytes": 15}, (FP8, K16_V8, EXP12, INT8), abi.UNSUPPORTED),
        ({"v_bytes": 3}, (FP8, K16_V8, EXP12, INT8), abi.UNSUPPORTED),
        ({"k_bytes": 0, "v_bytes": 0}, (FP8, K16_V8, EXP12, INT8), abi.UNSUPPORTED),
        ({"k_bytes": 0}, (K16_V8,), abi.UNSUPPORTED),
        ({"k_bytes": -2}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"k_offset": -2}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"v_offset": 18}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"v_offset": 14}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"v_offset": 2**31 - 2, "v_bytes": 2**31 - 2}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"tokens": -1}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({"content": -32}, (FP8, K16_V8, EXP12, INT8), abi.INVALID),
        ({}, (-1, 5, 2**31 - 1), abi.INVALID),
        ({"dtype": F64}, (FP8, K16_V8, EXP12, INT8), abi.UNSUPPORTED),
        ({"dtype": F16}, (EXP12,), abi.UNSUPPORTED),
        ({"dtype": BYTES}, (FP8, K16_V8, EXP12, INT8), abi.UNSUPPORTED),
    ],
)
def test_units_that_cannot_be(rig: Rig, changed: dict[str, int], encodings: tuple[int, ...], status: int) -> None:
    view = replace(VIEW, **changed)
    for encoding in encodings:
        assert rig.unit_bytes(view, encoding) == status, encoding
        made = stage(rig, VIEW, [4096], seed=1)
        span = oracle.Span((1,), 0, 1)
        for call in (rig.gather, rig.scatter):
            assert call(view, made.cache, whole(VIEW), [(span, made.packed[0])], encoding).status < 0
        made.check()


def test_halves_wider_than_a_tile_are_not_supported(rig: Rig) -> None:
    wide = layouts.dense("LBHNC", Shape(layers=1, blocks=1, heads=1, tokens=1, k=8193, v=0))
    assert rig.unit_bytes(wide, EXP12) == abi.UNSUPPORTED
    assert rig.unit_bytes(wide, FP8) == numerics.unit_bytes(wide, FP8)


@pytest.mark.parametrize("encoding", list(TAKES), ids=lambda encoding: NAMES[encoding])
def test_parts_of_spans_are_refused(rig: Rig, encoding: int) -> None:
    span = oracle.Span((1, 2), 0, 2)
    made = stage(rig, VIEW, [oracle.encoded_bytes(VIEW, whole(VIEW), span, encoding)], seed=1)
    for first, count in [(0, 7), (1, EVERYTHING), (1, 7), (0, 0)]:
        part = replace(whole(VIEW), first_token=first, token_count=count)
        for call in (rig.gather, rig.scatter):
            assert call(VIEW, made.cache, part, [(span, made.packed[0])], encoding).status == abi.INVALID
            made.check()


@pytest.mark.parametrize("encoding", list(TAKES), ids=lambda encoding: NAMES[encoding])
def test_an_encoded_form_that_is_one_byte_short_is_refused(rig: Rig, encoding: int) -> None:
    span = oracle.Span((1, 2), 0, 2)
    made = stage(rig, VIEW, [oracle.encoded_bytes(VIEW, whole(VIEW), span, encoding) - 1], seed=1)
    for call in (rig.gather, rig.scatter):
        assert call(VIEW, made.cache, whole(VIEW), [(span, made.packed[0])], encoding).status == abi.OUT_OF_BOUNDS
        made.check()


# Damage.


@pytest.mark.parametrize(("encoding", "dtype"), PAIRS)
@drawn(25)
@given(st.data())
def test_damaged_units_are_refused_or_decode_as_documented(
    rigs: list[Rig], encoding: int, dtype: int, data: st.DataObject
) -> None:
    rig = rigs[data.draw(st.integers(0, 1))]
    view = layouts.dense(data.draw(st.sampled_from(layouts.ORDERS)), Shape(blocks=2, heads=2, k=24, v=10, dtype=dtype))
    chosen = [oracle.Span((1,), 0, 1), oracle.Span((0,), 1, 2)]
    encoded = encode(rig, view, whole(view), chosen, encoding, seed=data.draw(st.integers(0, 99)))
    image = encoded.stage.packed_images[data.draw(st.integers(0, 1))]
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, image.size - 1))
        image[at] = data.draw(st.sampled_from([0, 1, 0x0D, 0x7B, 0x7F, 0x80, 0xFF, int(image[at]) ^ 1, 0x43]))
    refill(encoded)
    decode(rig, view, whole(view), encoded, encoding)


def refill(encoded: Encoded) -> None:
    for memory, image in zip(encoded.stage.packed, encoded.stage.packed_images, strict=True):
        memory.fill(image)


@pytest.mark.parametrize(("encoding", "dtype"), PAIRS)
def test_noise_is_refused_or_decodes_as_documented(rigs: list[Rig], encoding: int, dtype: int) -> None:
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=1, heads=1, tokens=1, k=6, v=4, dtype=dtype))
    seen = set()
    for rig in rigs:
        for seed in range(40):
            chosen = [oracle.Span((0,), 0, 1)]
            made = stage(rig, view, [numerics.unit_bytes(view, encoding)], seed)
            seen.add(decode(rig, view, whole(view), Encoded(made, chosen, []), encoding)[0])
    assert abi.CORRUPT in seen


@pytest.mark.parametrize(("encoding", "dtype"), [pair for pair in PAIRS if pair.values[0] != EXP12])
def test_scales_at_the_ends_of_their_range(rigs: list[Rig], encoding: int, dtype: int) -> None:
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=1, heads=1, tokens=2, k=256, v=256, dtype=dtype))
    greatest = int(numerics.greatest_scale(encoding, dtype).view(np.uint32))
    of_v = 0 if encoding == K16_V8 else [name for name, _ in numerics.planes(view, encoding)].index("v scales")
    sizes = list(numerics.planes(view, encoding))
    start = sum(size for _, size in sizes[: of_v or 1])
    for rig in rigs:
        for bits in (
            0,
            1,
            0x0D7FFFFF,
            0x0D800000,
            greatest,
            greatest + 1,
            0x7F800000,
            0x7FC00000,
            0x80000000,
            2**32 - 1,
        ):
            encoded = encode(rig, view, whole(view), [oracle.Span((0,), 0, 1)], encoding)
            image = encoded.stage.packed_images[0]
            image[start : start + 4] = np.array([bits], np.uint32).view(np.uint8)
            # Every code there is.
            image[-512:-256], image[-256:] = np.arange(256), np.arange(256)
            refill(encoded)
            status, decoded = decode(rig, view, whole(view), encoded, encoding)
            assert status == (abi.OK if 0x0D800000 <= bits <= greatest else abi.CORRUPT)
            if status == abi.OK:
                values = numerics.widen(oracle.read_half(decoded, view, (0, 0, 0), "v"), dtype)
                assert not np.isinf(values).any(), "a code overflowed"


def test_padding_is_not_looked_at(rig: Rig) -> None:
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=1, heads=1, tokens=3, k=3, v=5))
    for encoding in TAKES:
        encoded = encode(rig, view, whole(view), [oracle.Span((0,), 0, 1)], encoding)
        image = encoded.stage.packed_images[0]
        at, sizes = 0, {"k": 18, "k scales": 12, "v scales": 12, "k codes": 9, "v codes": 15, "content": 0}
        sizes |= {"k scales": 12} if encoding == FP8 else {}
        if encoding == EXP12:
            continue
        for name, size in numerics.planes(view, encoding):
            used = sizes[name]
            assert not image[at + used : at + size].any()
            image[at + used : at + size] = 0xFF
            at += size
        refill(encoded)
        assert decode(rig, view, whole(view), encoded, encoding)[0] == abi.OK


# The lossless encoding.


def exponents(counts: Sequence[int], seed: int = 1) -> Any:
    """bf16 elements of which so many have the exponents 100, 101, …, in random order, with random signs and mantissas."""
    rng = np.random.default_rng(seed)
    found = np.repeat(100 + np.arange(len(counts)), counts).astype(np.uint16)
    rng.shuffle(found)
    return found << 7 | rng.integers(0, 128, found.size, np.uint16) | rng.integers(0, 2, found.size, np.uint16) << 15


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ([256], abi.OK),
        ([16] * 16, abi.OK),  # as many escapes as there is room for
        ([16] * 15 + [8, 8], abi.OK),
        ([16] * 14 + [15, 9, 8], abi.INCOMPRESSIBLE),  # one more
        ([8, 8] + [16] * 15, abi.OK),  # the rare ones come first in the table's order
        ([17] * 13 + [3] * 11 + [2], abi.INCOMPRESSIBLE),
        ([15] * 15 + [14, 3, 14], abi.INCOMPRESSIBLE),
        ([1] * 15 + [241], abi.OK),
        ([14] * 18 + [4], abi.INCOMPRESSIBLE),
    ],
)
def test_as_many_escapes_as_there_is_room_for(rigs: list[Rig], counts: list[int], status: int) -> None:
    assert sum(counts) == 256
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=2, heads=1, tokens=4, k=64, v=0))
    for rig in rigs:
        for seed in range(3):
            made = stage(rig, view, [numerics.unit_bytes(view, EXP12)], seed)
            oracle.write_half(made.cache_image, view, (0, 1, 0), "k", exponents(counts, seed).reshape(4, 64))
            made.cache.fill(made.cache_image)
            span = oracle.Span((1,), 0, 1)
            assert rig.gather(view, made.cache, whole(view), [(span, made.packed[0])], EXP12).status == status
            if status == abi.OK:
                oracle.gather_encoded(made.cache_image, view, whole(view), span, made.packed_images[0], encoding=EXP12)
                made.check()
                assert decode(rig, view, whole(view), Encoded(made, [span], []), EXP12)[0] == abi.OK


@pytest.mark.parametrize(
    ("tokens", "k", "v"),
    [(16, 1024, 1024), (3, 4100, 0), (2, 8192, 1), (130, 64, 63), (9, 1000, 513), (1, 1, 1), (5, 3, 0)],
)
def test_units_of_several_tiles(rigs: list[Rig], tokens: int, k: int, v: int) -> None:
    view = layouts.dense("LBNHC", Shape(layers=1, blocks=2, heads=1, tokens=tokens, k=k, v=v))
    for rig in rigs:
        for style in ("normal", "rare special"):
            encoded = encode(rig, view, whole(view), [oracle.Span((1,), 0, 1)], EXP12, style=style)
            if tokens * k >= 1024:
                assert encoded.statuses == [abi.OK]
            if encoded.statuses == [abi.OK]:
                _, decoded = decode(rig, view, whole(view), encoded, EXP12)
                check_values(view, whole(view), encoded, decoded, EXP12)


def test_every_bf16_survives(rigs: list[Rig]) -> None:
    """All 65536 patterns, each unit with those of 15 exponents: NaNs with their payloads, infinities, denormals, zeros."""
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=18, heads=1, tokens=15, k=256, v=0))
    patterns = np.arange(65536, dtype=np.uint16)
    by_exponent = [patterns[(patterns >> 7 & 0xFF) == exponent] for exponent in range(256)]
    image = noise(1, view.size)
    for block in range(18):
        rows = [by_exponent[min(15 * block + at, 255)] for at in range(15)]
        oracle.write_half(image, view, (0, block, 0), "k", np.stack(rows))
    span = oracle.Span(tuple(range(18)), 0, 18)
    for rig in rigs:
        cache, back = rig.memory(image, "cache"), rig.memory(noise(2, view.size), "cache")
        packed = rig.memory(noise(3, oracle.encoded_bytes(view, whole(view), span, EXP12)), "packed")
        assert rig.gather(view, cache, whole(view), [(span, packed)], EXP12).status == abi.OK
        assert rig.scatter(view, back, whole(view), [(span, packed)], EXP12).status == abi.OK
        same(back.fetch(), image, "cache")


def test_raw_carries_what_is_neither_k_nor_v(rig: Rig) -> None:
    view = layouts.dense("BLNHC", Shape(gap=6, swapped=True))
    made = stage(rig, view, [oracle.packed_bytes(view, whole(view), oracle.Span((2, 4), 0, 2))], seed=1)
    oracle.gather(made.cache_image, view, whole(view), oracle.Span((2, 4), 0, 2), made.packed_images[0])
    outcome = rig.gather(view, made.cache, whole(view), [(oracle.Span((2, 4), 0, 2), made.packed[0])], RAW)
    assert outcome.status == abi.OK
    made.check()


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_every_element_decodes_within_its_bounds(rigs: list[Rig], dtype: int) -> None:
    """All 65536 patterns of the short types, and as many of float32, through both lossy encodings."""
    patterns = np.arange(65536, dtype=np.uint64)
    bits = (patterns << 16 | 0x9A5C if dtype == F32 else patterns).astype(numerics.BITS[dtype]).reshape(256, 256)
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=16, heads=1, tokens=16, k=0, v=256, dtype=dtype))
    view = replace(view, v_offset=0)
    image = noise(1, view.size)
    for block in range(16):
        oracle.write_half(image, view, (0, block, 0), "v", bits[block::16])
    for rig in rigs:
        for encoding in (FP8, INT8):
            span = oracle.Span(tuple(range(16)), 0, 16)
            made = stage(rig, view, [oracle.encoded_bytes(view, whole(view), span, encoding)], seed=2)
            made.cache_image = image
            made.cache.fill(image)
            oracle.gather_encoded(image, view, whole(view), span, made.packed_images[0], encoding=encoding)
            assert rig.gather(view, made.cache, whole(view), [(span, made.packed[0])], encoding).status == abi.OK
            made.check()
            encoded = Encoded(made, [span], [])
            _, decoded = decode(rig, view, whole(view), encoded, encoding)
            check_values(view, whole(view), encoded, decoded, encoding)
