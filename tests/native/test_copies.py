"""Raw gather and scatter against the oracle: every byte of the cache, of the packed forms, and around them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native import abi, layouts, oracle
from tests.native.cases import drawn, noise, parts, same, shapes, spans, stage, views
from tests.native.layouts import BF16, BYTES, F16, F32, F64, Shape, View
from tests.native.rig import Place, Rig

DTYPES = {"bytes": BYTES, "f32": F32, "f16": F16, "bf16": BF16, "f64": F64}
SHIFTS = st.sampled_from([0, 1, 4, 8, 16])
PLACES = st.sampled_from(["packed", "staging"])
CATALOGUE = sorted(layouts.catalogue(Shape()))


def check_gather(
    rig: Rig,
    view: View,
    part: oracle.Range,
    chosen: list[oracle.Span],
    seed: int,
    *,
    shift: int = 0,
    place: Place = "packed",
) -> None:
    made = stage(rig, view, [oracle.packed_bytes(view, part, span) for span in chosen], seed, shift, place=place)
    for span, image in zip(chosen, made.packed_images, strict=True):
        oracle.gather(made.cache_image, view, part, span, image)
    outcome = rig.gather(view, made.cache, part, list(zip(chosen, made.packed, strict=True)))
    assert outcome.status == abi.OK, rig.explain()
    made.check(of="gather: ")


def check_scatter(
    rig: Rig,
    view: View,
    part: oracle.Range,
    chosen: list[oracle.Span],
    seed: int,
    *,
    shift: int = 0,
    place: Place = "packed",
) -> None:
    made = stage(rig, view, [oracle.packed_bytes(view, part, span) for span in chosen], seed, shift, place=place)
    for span, image in zip(chosen, made.packed_images, strict=True):
        oracle.scatter(made.cache_image, view, part, span, image)
    outcome = rig.scatter(view, made.cache, part, list(zip(chosen, made.packed, strict=True)))
    assert outcome.status == abi.OK, rig.explain()
    made.check(of="scatter: ")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_layout_and_dtype(rigs: list[Rig], kind: str, dtype: int) -> None:
    view = layouts.catalogue(Shape(dtype=dtype, k=12, v=20))[kind]
    blocks = np.random.default_rng(dtype).permutation(view.blocks).tolist()
    chosen = [oracle.Span(tuple(blocks[:3]), 1, 5), oracle.Span(tuple(blocks[3:5]), 0, 2)]
    heads = max(1, view.heads - 1)
    part = oracle.Range(view.heads - heads, heads, 1, heads + 2, 1, max(1, 2 * view.tokens - 2))
    for rig in rigs:
        check_gather(rig, view, part, chosen, seed=dtype)
        check_scatter(rig, view, part, chosen, seed=dtype)


@drawn(40)
@given(st.data())
def test_any_gather(rig: Rig, data: st.DataObject) -> None:
    view = data.draw(views())
    chosen = data.draw(spans(view, repeats=True))
    part = data.draw(parts(view, tokens=max(len(span.blocks) for span in chosen) * view.tokens))
    check_gather(
        rig, view, part, chosen, data.draw(st.integers(0, 99)), shift=data.draw(SHIFTS), place=data.draw(PLACES)
    )


@drawn(40)
@given(st.data())
def test_any_scatter(rig: Rig, data: st.DataObject) -> None:
    view = data.draw(views())
    chosen = data.draw(spans(view, repeats=False))
    part = data.draw(parts(view, tokens=max(len(span.blocks) for span in chosen) * view.tokens))
    check_scatter(
        rig, view, part, chosen, data.draw(st.integers(0, 99)), shift=data.draw(SHIFTS), place=data.draw(PLACES)
    )


LARGE = Shape(layers=3, blocks=40, heads=8, tokens=16, k=64, v=64)


@pytest.mark.parametrize("order", layouts.ORDERS)
def test_work_that_is_worth_two_threads(rigs: list[Rig], order: str) -> None:
    view = layouts.dense(order, LARGE)
    blocks = np.random.default_rng(5).permutation(LARGE.blocks).tolist()
    chosen = [oracle.Span(tuple(blocks[:16]), 0, 16), oracle.Span(tuple(blocks[16:24]), 3, 16)]
    part = oracle.Range(0, 8, 0, 8, 0, 8 * 16)
    for rig in rigs:
        check_gather(rig, view, part, chosen, seed=1)
        check_scatter(rig, view, part, chosen, seed=2)


def test_large_pages(rig: Rig) -> None:
    # Larger than any cache level, so that stores that go around the caches are taken where there are any.
    page = 3 << 20
    view = layouts.regions([64, 64 + 3 * page], page, page, 3, 64 + 6 * page)
    check_gather(rig, view, oracle.whole(view, 3), [oracle.Span((2, 0, 2), 0, 3)], seed=3)
    check_scatter(rig, view, oracle.whole(view, 2), [oracle.Span((1, 2), 1, 3)], seed=4, shift=16)


@drawn(25)
@given(st.data())
def test_a_chunk_goes_elsewhere_and_comes_back(rig: Rig, data: st.DataObject) -> None:
    """Through another layout of the same shape, to other blocks: what is read there is what was written here."""
    shape = data.draw(shapes())
    here, there = (layouts.dense(data.draw(st.sampled_from(layouts.ORDERS)), shape) for _ in range(2))
    count = data.draw(st.integers(1, shape.blocks))
    source, target = (tuple(data.draw(st.permutations(range(shape.blocks)))[:count]) for _ in range(2))
    cache, other = noise(1, here.size), noise(2, there.size)
    part = oracle.whole(here, count)
    chunk = rig.memory(noise(3, oracle.packed_bytes(here, part, oracle.Span(source, 0, count))), "packed")
    into = rig.memory(other, "cache")
    assert rig.gather(here, rig.memory(cache, "cache"), part, [(oracle.Span(source, 0, count), chunk)]).status == 0
    assert rig.scatter(there, into, part, [(oracle.Span(target, 0, count), chunk)]).status == 0
    arrived = into.fetch()
    for layer in range(shape.layers):
        for read, written in zip(source, target, strict=True):
            for head in range(shape.heads):
                for token in range(shape.tokens):
                    at, came = here.at(layer, read, head, token), there.at(layer, written, head, token)
                    other[came : came + shape.content] = cache[at : at + shape.content]
    same(arrived, other, "cache")


def test_heads_of_two_ranks_make_one_chunk(rig: Rig) -> None:
    """Re-slicing: two ranks of four heads each write one packed form, which four ranks of two heads then read."""
    shape = Shape(heads=4, tokens=8)
    caches = [noise(rank, layouts.dense("LBHNC", shape).size) for rank in range(2)]
    view = layouts.dense("LBHNC", shape)
    span = oracle.Span((1, 4, 2), 0, 3)
    part = oracle.Range(0, 4, 0, 8, 0, 24)
    image = noise(9, oracle.packed_bytes(view, part, span))
    chunk = rig.memory(image, "packed")
    for rank, cache in enumerate(caches):
        of_rank = replace(part, packed_first_head=4 * rank)
        assert rig.gather(view, rig.memory(cache, "cache"), of_rank, [(span, chunk)]).status == abi.OK
        oracle.gather(cache, view, of_rank, span, image)
    same(chunk.fetch(), image, "chunk")
    narrow = layouts.dense("BLNHC", replace(shape, heads=2))
    for rank in range(4):
        of_rank = oracle.Range(0, 2, 2 * rank, 8, 0, 24)
        target = noise(20 + rank, narrow.size)
        memory = rig.memory(target, "cache")
        assert rig.scatter(narrow, memory, of_rank, [(span, chunk)]).status == abi.OK
        oracle.scatter(target, narrow, of_rank, span, image)
        same(memory.fetch(), target, f"cache of rank {rank}")


def test_spans_may_share_a_packed_form(rig: Rig) -> None:
    view = layouts.dense("BLHNC", Shape())
    parts_of_chunk = [oracle.Span((5, 0), 0, 5), oracle.Span((3, 3, 1), 2, 5)]
    part = oracle.whole(view, 2)
    cache, image = noise(1, view.size), noise(2, oracle.packed_bytes(view, part, parts_of_chunk[0]))
    chunk = rig.memory(image, "packed")
    outcome = rig.gather(view, rig.memory(cache, "cache"), part, [(span, chunk) for span in parts_of_chunk])
    assert outcome.status == abi.OK
    for span in parts_of_chunk:
        oracle.gather(cache, view, part, span, image)
    same(chunk.fetch(), image, "chunk")


def test_tokens_past_the_end_of_a_span_are_not_there(rig: Rig) -> None:
    view = layouts.dense("BLHNC", Shape())
    chosen = [oracle.Span((5,), 0, 2), oracle.Span((3, 1, 2), 0, 3)]
    for first, count in [(0, 2**31 - 1), (2**31 - 1, 2**31 - 1), (4, 100), (7, 2**31 - 1), (12, 1), (3, 0)]:
        part = oracle.Range(0, view.heads, 0, view.heads, first, count)
        check_gather(rig, view, part, chosen, seed=1)
        check_scatter(rig, view, part, chosen, seed=2)


def test_groups_that_overlay_each_other_keep_their_blocks(rig: Rig) -> None:
    """Hybrid models: a group writes its own blocks; blocks of the other group, in the same bytes, stay as they are."""
    wide = Shape(layers=3, blocks=6, heads=4, tokens=16)
    for order in layouts.ORDERS:
        for view in layouts.hybrid(order, [wide, replace(wide, layers=1)]):
            check_scatter(rig, view, oracle.whole(view, 2), [oracle.Span((5, 2), 0, 2)], seed=7)


# What must be refused: (what is wrong, changes of the view, of the range, of the span).
VIEW = layouts.dense("LBHNC", Shape(layers=2, blocks=6, heads=3, tokens=4))
PART = oracle.Range(0, 3, 0, 3, 0, 8)
SPAN = oracle.Span((4, 1), 1, 4)
BIG = 1 << 62

OUTSIDE = {
    "block past the last": (VIEW, PART, replace(SPAN, blocks=(4, 6))),
    "block below zero": (VIEW, PART, replace(SPAN, blocks=(4, -1))),
    "least block": (VIEW, PART, replace(SPAN, blocks=(-(2**31), 0))),
    "greatest block": (VIEW, PART, replace(SPAN, blocks=(0, 2**31 - 1))),
    "head past the last": (VIEW, replace(PART, first_head=1), SPAN),
    "head below zero": (VIEW, replace(PART, first_head=-1), SPAN),
    "more heads than there are": (VIEW, replace(PART, heads=4, packed_heads=4), SPAN),
    "heads that overflow": (VIEW, replace(PART, first_head=2**31 - 1, heads=2), SPAN),
    "packed head past the last": (VIEW, replace(PART, packed_first_head=1), SPAN),
    "packed head below zero": (VIEW, replace(PART, packed_first_head=-1, packed_heads=4), SPAN),
    "fewer packed heads": (VIEW, replace(PART, packed_heads=2), SPAN),
    "token below zero": (VIEW, replace(PART, first_token=-1), SPAN),
    "packed block past the last": (VIEW, PART, replace(SPAN, first=3)),
    "packed block below zero": (VIEW, PART, replace(SPAN, first=-1)),
    "fewer packed blocks": (VIEW, PART, replace(SPAN, packed_blocks=2)),
    "least packed blocks": (VIEW, PART, replace(SPAN, packed_blocks=-(2**31))),
    "least packed heads": (VIEW, replace(PART, packed_heads=-(2**31)), SPAN),
    "least heads": (VIEW, replace(PART, heads=-(2**31)), SPAN),
    "packed blocks that overflow": (VIEW, PART, replace(SPAN, first=2**31 - 1)),
    "allocation that ends early": (replace(VIEW, size=VIEW.at(1, 4, 2, 3) + VIEW.content - 1), PART, SPAN),
    "layer before the allocation": (replace(VIEW, layers=(-1, VIEW.layers[1])), PART, SPAN),
    "layer behind the allocation": (replace(VIEW, layers=(0, VIEW.size)), PART, SPAN),
    "layer at the end of memory": (replace(VIEW, layers=(0, BIG)), PART, SPAN),
    "block stride that leaves": (replace(VIEW, block_stride=VIEW.size), PART, SPAN),
    "block stride that overflows": (replace(VIEW, block_stride=BIG), PART, SPAN),
    "block stride that wraps": (replace(VIEW, block_stride=-BIG), PART, SPAN),
    "head stride that overflows": (replace(VIEW, head_stride=BIG), PART, SPAN),
    "token stride that overflows": (replace(VIEW, token_stride=2 * BIG - 1), PART, SPAN),
    "token stride below zero": (replace(VIEW, token_stride=-VIEW.size), PART, SPAN),
}

INVALID = {
    "no heads in the view": (replace(VIEW, heads=0), PART, SPAN),
    "negative content": (replace(VIEW, content=-32), PART, SPAN),
    "unknown dtype": (replace(VIEW, dtype=9), PART, SPAN),
    "K past the content": (replace(VIEW, k_bytes=VIEW.content + 2), PART, SPAN),
    "V past the content": (replace(VIEW, v_offset=VIEW.content), PART, SPAN),
    "negative K": (replace(VIEW, k_offset=-2), PART, SPAN),
    "content that overflows": (replace(VIEW, k_offset=2**31 - 2, k_bytes=2**31 - 2), PART, SPAN),
    "negative count of heads": (VIEW, replace(PART, heads=-1), SPAN),
    "negative count of tokens": (VIEW, replace(PART, token_count=-1), SPAN),
}


def refused(rig: Rig, view: View, part: oracle.Range, span: oracle.Span, *, short: int = 0) -> set[int]:
    """The statuses of a gather and a scatter whose last span is wrong; nothing may have been written."""
    good = oracle.Span((0, 5), 0, 4)
    size = oracle.packed_bytes(VIEW, PART, SPAN)
    made = stage(rig, VIEW, [size, size - short], seed=1)
    both = list(zip([good, span], made.packed, strict=True))
    found = set()
    for call in (rig.gather, rig.scatter):
        for spans_given in (both, both[1:], both[::-1]):
            found.add(call(view, made.cache, part, spans_given).status)
            assert rig.explain()
            made.check(of="refused: ")
    return found


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_what_lies_outside_is_refused_and_nothing_is_written(rigs: list[Rig], wrong: str) -> None:
    for rig in rigs:
        assert refused(rig, *OUTSIDE[wrong]) <= {abi.OUT_OF_BOUNDS, abi.INVALID}


@pytest.mark.parametrize("wrong", INVALID)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(rigs: list[Rig], wrong: str) -> None:
    for rig in rigs:
        assert refused(rig, *INVALID[wrong]) <= {abi.OUT_OF_BOUNDS, abi.INVALID}


def test_a_packed_form_that_is_one_byte_short_is_refused(rig: Rig) -> None:
    assert refused(rig, VIEW, PART, SPAN, short=1) == {abi.OUT_OF_BOUNDS}


def test_an_unknown_encoding_is_refused(rig: Rig) -> None:
    made = stage(rig, VIEW, [oracle.packed_bytes(VIEW, PART, SPAN)], seed=1)
    for encoding in (-1, 5, 99):
        for call in (rig.gather, rig.scatter):
            assert call(VIEW, made.cache, PART, [(SPAN, made.packed[0])], encoding).status < 0
    made.check()


def test_a_batch_of_copies(rig: Rig) -> None:
    rng = np.random.default_rng(3)
    sizes = [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 100_000, 0, 5]
    starts = np.cumsum([0, *(size + 3 for size in sizes)]).tolist()
    source, target = noise(1, starts[-1] + 8), noise(2, starts[-1] + 8)
    for places in (("packed", "cache"), ("cache", "packed")):
        sources, targets = rig.memory(source, places[0]), rig.memory(target, places[1])
        wanted, order = target.copy(), rng.permutation(len(sizes)).tolist()
        status = rig.copy_batch(
            [targets.address + starts[at] for at in order],
            [sources.address + starts[at] for at in order],
            [sizes[at] for at in order],
            loads=places[0] == "packed",
        )
        assert status == abi.OK, rig.explain()
        for at, size in enumerate(sizes):
            wanted[starts[at] : starts[at] + size] = source[starts[at] : starts[at] + size]
        same(targets.fetch(), wanted, "target")
        same(sources.fetch(), source, "source")


def test_an_empty_batch_is_nothing_to_do(rig: Rig) -> None:
    assert rig.copy_batch([], [], [], loads=True) == abi.OK


def test_rig_says_what_it_runs_on(rig: Rig) -> None:
    assert rig.library.wr_abi() == 1
    assert rig.library.wr_build().decode().split()[0] == rig.backend.name.split("-")[0]
    if rig.backend.name.startswith("cpu-"):
        assert rig.backend.name.removeprefix("cpu-") in rig.describe().lower().replace("-", "")
