"""Rotation: to the bit against the oracle, and in a model against computing everything anew.

A chunk is compiled behind the system prompt and reused further on. What that implies is a mask: the chunk saw a system
prompt right before it, and no other chunk. Under that mask, a full prefill must give the same keys, values and hidden
states in every layer.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native import abi, contents, layouts, numerics, oracle
from tests.native.attention_model import Array, Model, Rope, Run, causal
from tests.native.cases import drawn, noise, parts, same, spans, stage, views
from tests.native.layouts import BF16, BYTES, F16, F32, F64, Shape, View
from tests.native.rig import Rig

FLOATS = (F32, F16, BF16, F64)
EVERYTHING = 2**31 - 1


@st.composite
def rotations(draw: st.DrawFn, view: View) -> oracle.Rotation | None:
    """Some pairs somewhere in K, turned by any angles; None where K has no pair."""
    element = layouts.ELEMENT_BYTES[view.dtype]
    width = view.k_bytes // element
    if width < 2:
        return None
    count = draw(st.integers(1, width // 2))
    first = draw(st.integers(0, width - 2 * count))
    angles = np.random.default_rng(draw(st.integers(0, 99))).uniform(-(2**20), 2**20, count)
    return oracle.Rotation(
        tuple(np.cos(angles)), tuple(np.sin(angles)), first * element, interleaved=draw(st.booleans())
    )


@drawn(45)
@given(st.data())
def test_a_scatter_rotates_as_the_oracle(rigs: list[Rig], data: st.DataObject) -> None:
    """Raw and encoded, in any layout; every byte that is not a rotated element is as without rotation."""
    rig = rigs[data.draw(st.integers(0, 1))]
    view = data.draw(views(FLOATS).filter(lambda view: view.dtype != BYTES))
    rotation = data.draw(rotations(view))
    if rotation is None:
        return
    encoding = data.draw(st.sampled_from([abi.RAW, *abi.ENCODINGS.values()]))
    if rig.unit_bytes(view, encoding) < 0:
        encoding = abi.RAW
    chosen = data.draw(spans(view, repeats=False))
    tokens = max(len(span.blocks) for span in chosen) * view.tokens
    part = data.draw(parts(view, tokens=tokens, whole_spans=encoding != abi.RAW))
    style = data.draw(st.sampled_from(["normal", "rare special", "outliers", "constant", "special"]))
    made = stage(rig, view, [oracle.encoded_bytes(view, part, span, encoding) for span in chosen], seed=1)
    source, whole = contents.image(view, 2, style), replace(part, first_token=0, token_count=EVERYTHING)
    try:
        for span, memory, image in zip(chosen, made.packed, made.packed_images, strict=True):
            gather = oracle.gather if encoding == abi.RAW else oracle.gather_encoded
            gather(source, view, whole, span, image, **({} if encoding == abi.RAW else {"encoding": encoding}))
            memory.fill(image)
    except numerics.Incompressible:
        return
    for span, image in zip(chosen, made.packed_images, strict=True):
        if encoding == abi.RAW:
            oracle.scatter(made.cache_image, view, part, span, image)
        else:
            oracle.scatter_encoded(made.cache_image, view, part, span, image, encoding=encoding)
        oracle.rotate_blocks(made.cache_image, view, part, span.blocks, rotation)
    both = list(zip(chosen, made.packed, strict=True))
    assert rig.scatter(view, made.cache, part, both, encoding, rotation=rotation).status == abi.OK, rig.explain()
    made.check(of="rotated scatter: ")


@drawn(45)
@given(st.data())
def test_rotating_in_place_is_that_of_the_oracle(rigs: list[Rig], data: st.DataObject) -> None:
    rig = rigs[data.draw(st.integers(0, 1))]
    view = data.draw(views(FLOATS).filter(lambda view: view.dtype != BYTES))
    rotation = data.draw(rotations(view))
    if rotation is None:
        return
    blocks = list(data.draw(st.permutations(range(view.blocks))))[: data.draw(st.integers(1, view.blocks))]
    part = data.draw(parts(view, tokens=len(blocks) * view.tokens))
    image = contents.image(
        view, data.draw(st.integers(0, 9)), data.draw(st.sampled_from(["normal", "special", "bits"]))
    )
    memory = rig.memory(image, "cache")
    assert rig.rotate(view, memory, part, blocks, rotation) == abi.OK, rig.explain()
    oracle.rotate_blocks(image, view, part, blocks, rotation)
    same(memory.fetch(), image, "cache")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_pairs(rigs: list[Rig], dtype: int) -> None:
    """Whole vectors, and every rest of one."""
    view = layouts.dense("LBNHC", Shape(layers=1, blocks=1, heads=2, tokens=2, k=142, v=2, dtype=dtype))
    element, part, rig = layouts.ELEMENT_BYTES[dtype], oracle.whole(view, 1), rigs[0]
    angles = np.random.default_rng(2).uniform(-50, 50, 71)
    image = contents.image(view, 5, "normal")
    memory = rig.memory(image, "cache")
    for count in range(1, 71):
        for interleaved in (False, True):
            turned = oracle.Rotation(tuple(np.cos(angles[:count])), tuple(np.sin(angles[:count])), element, interleaved)
            assert rig.rotate(view, memory, part, [0], turned) == abi.OK, rig.explain()
            oracle.rotate_blocks(image, view, part, [0], turned)
            same(memory.fetch(), image, f"{count} pairs")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_errors_are_within_the_stated_bound(rigs: list[Rig], dtype: int, interleaved: bool) -> None:
    """Against the exact rotation of the stored elements, by longer arithmetic."""
    view = layouts.dense("BLNHC", Shape(layers=2, blocks=3, heads=2, tokens=8, k=128, v=16, dtype=dtype))
    image = contents.image(view, 3, "outliers")
    angles = np.random.default_rng(1).uniform(-1000, 1000, 64)
    rotation = oracle.Rotation(tuple(np.cos(angles)), tuple(np.sin(angles)), 0, interleaved)
    part = oracle.whole(view, 3)
    left, right = (
        np.arange(64) * (2 if interleaved else 1),
        np.arange(64) * 2 + 1 if interleaved else np.arange(64, 128),
    )
    epsilon = np.longdouble(2.0) ** (-52 if dtype == F64 else -22)
    for rig in rigs:
        memory = rig.memory(image, "cache")
        assert rig.rotate(view, memory, part, [0, 1, 2], rotation) == abi.OK
        after = memory.fetch()
        for unit, _ in oracle.unit_places(view, part, oracle.Span((0, 1, 2), 0, 3), 0):
            before_k, after_k = (
                numerics.widen(oracle.read_half(each, view, unit, "k"), dtype).astype(np.longdouble)
                for each in (image, after)
            )
            x, y = before_k[:, left], before_k[:, right]
            c, s = np.cos(angles).astype(np.longdouble), np.sin(angles).astype(np.longdouble)
            for exact, got in ((x * c - y * s, after_k[:, left]), (y * c + x * s, after_k[:, right])):
                bound = (abs(x) + abs(y)) * epsilon + half_spacing(got, dtype)
                assert np.all(abs(got - exact) <= bound)


def half_spacing(values: Array, dtype: int) -> Array:
    mantissa, least = {F64: (52, -1074), F32: (23, -149), F16: (10, -24), BF16: (7, -133)}[dtype]
    if dtype in {F32, F64}:
        return np.zeros_like(values)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), np.longdouble(2.0) ** -200)))
    return 2.0 ** (np.maximum(exponent - mantissa, least) - 1)


VIEW = layouts.dense("LBHNC", Shape(layers=2, blocks=4, heads=2, tokens=4, k=8, v=8))


def turn(count: int, **fields: int) -> oracle.Rotation:
    return replace(oracle.Rotation((0.6,) * count, (0.8,) * count), **fields)


@pytest.mark.parametrize(
    ("view", "rotation", "status"),
    [
        (VIEW, turn(4, offset=2), abi.INVALID),
        (VIEW, turn(5), abi.INVALID),
        (VIEW, turn(4, offset=-2), abi.INVALID),
        (VIEW, turn(3, offset=1), abi.INVALID),
        (VIEW, turn(1, offset=16), abi.INVALID),
        (VIEW, turn(1, offset=2**31 - 2), abi.INVALID),
        (replace(VIEW, dtype=BYTES), turn(4), abi.UNSUPPORTED),
    ],
)
def test_rotations_that_cannot_be_are_refused(rig: Rig, view: View, rotation: oracle.Rotation, status: int) -> None:
    span, part = oracle.Span((1, 2), 0, 2), oracle.whole(VIEW, 2)
    made = stage(rig, VIEW, [oracle.packed_bytes(VIEW, part, span)], seed=1)
    assert rig.rotate(view, made.cache, part, [1, 2], rotation) == status
    assert rig.scatter(view, made.cache, part, [(span, made.packed[0])], rotation=rotation).status == status
    made.check()


@pytest.mark.parametrize(
    ("part", "blocks"),
    [
        (oracle.whole(VIEW, 2), (1, 4)),
        (oracle.whole(VIEW, 2), (-1, 0)),
        (replace(oracle.whole(VIEW, 2), first_head=1), (0, 1)),
        (replace(oracle.whole(VIEW, 2), heads=3), (0, 1)),
    ],
)
def test_rotating_outside_is_refused_and_nothing_is_written(
    rig: Rig, part: oracle.Range, blocks: tuple[int, ...]
) -> None:
    image = noise(1, VIEW.size)
    memory = rig.memory(image, "cache")
    assert rig.rotate(VIEW, memory, part, blocks, turn(4)) in {abi.OUT_OF_BOUNDS, abi.INVALID}
    same(memory.fetch(), image, "cache")


# In a model.

BLOCK = 4
SYSTEM, CHUNKS, QUESTION = 8, (12, 8, 12), 5
HEAD_SIZE = 16

ROPES = {
    "neox": Rope(HEAD_SIZE),
    "interleaved": Rope(HEAD_SIZE, interleaved=True),
    "partial": Rope(8),
    "partial, interleaved": Rope(8, interleaved=True),
    "trailing, as in MLA": Rope(6, first=10, interleaved=True),
    "a base per layer": Rope(HEAD_SIZE, bases=(10000.0, 1e6)),
}


@dataclass(frozen=True)
class Reuse:
    """A prompt of a system prompt, chunks and a question; each chunk's keys and values as compiled behind the system
    prompt alone; and a full prefill under the mask that reusing them implies."""

    model: Model
    system: Run
    compiled: list[Run]
    full: Run
    starts: tuple[int, ...]
    own: tuple[slice, ...]
    """Where the chunks are in ``full``."""
    tokens: list[int]


def reuse(rope: Rope, *, anchored: bool = True) -> Reuse:
    """With ``anchored``, each chunk sees a private copy of the system prompt right before it. Without, it sees the system
    prompt where that is: not what was compiled, except for the first chunk."""
    model, rng = Model(rope, head_size=HEAD_SIZE), np.random.default_rng(7)
    system = rng.integers(0, 50, SYSTEM).tolist()
    chunks = [rng.integers(0, 50, size).tolist() for size in CHUNKS]
    question = rng.integers(0, 50, QUESTION).tolist()

    def compile_chunk(chunk: list[int]) -> Run:
        tokens = system + chunk
        run = model.run(tokens, np.arange(len(tokens), dtype=float), causal(len(tokens)))
        return Run(run.keys[:, SYSTEM:], run.values[:, SYSTEM:], run.hidden[SYSTEM:])

    starts = tuple(int(start) for start in SYSTEM + np.cumsum([0, *CHUNKS]))
    tokens, positions, parts_of, visible = list(system), list(range(SYSTEM)), [("system", SYSTEM)], {}
    for at, chunk in enumerate(chunks):
        if anchored:
            tokens += system
            positions += range(starts[at] - SYSTEM, starts[at])
            parts_of.append((f"copy {at}", SYSTEM))
        tokens += chunk
        positions += range(starts[at], starts[at] + len(chunk))
        parts_of.append((f"chunk {at}", len(chunk)))
        visible[f"chunk {at}"] = {f"copy {at}" if anchored else "system"}
    tokens += question
    positions += range(starts[-1], starts[-1] + QUESTION)
    parts_of.append(("question", QUESTION))
    visible["question"] = {"system", *(f"chunk {at}" for at in range(len(chunks)))}
    owner = [name for name, size in parts_of for _ in range(size)]
    mask = causal(len(tokens)) & np.array(
        [[seen == by or seen in visible.get(by, set()) for seen in owner] for by in owner]
    )
    full = model.run(tokens, np.array(positions, float), mask)
    alone = model.run(system, np.arange(SYSTEM, dtype=float), causal(SYSTEM))
    own = tuple(slice(owner.index(f"chunk {at}"), owner.index(f"chunk {at}") + size) for at, size in enumerate(CHUNKS))
    return Reuse(model, alone, [compile_chunk(chunk) for chunk in chunks], full, starts, own, tokens)


def view_of(model: Model, order: str, dtype: int) -> View:
    blocks = 2 * (SYSTEM + sum(CHUNKS)) // BLOCK
    return layouts.dense(
        order,
        Shape(
            layers=model.layers,
            blocks=blocks,
            heads=model.kv_heads,
            tokens=BLOCK,
            k=HEAD_SIZE,
            v=HEAD_SIZE,
            dtype=dtype,
        ),
    )


def stored(values: Array, dtype: int) -> numerics.Array:
    return numerics.narrow(values if dtype == F64 else values.astype(np.float32), dtype)


def write(image: oracle.Bytes, view: View, blocks: list[int], keys: Array, values: Array) -> None:
    for layer in range(len(view.layers)):
        for at, block in enumerate(blocks):
            rows = slice(at * BLOCK, (at + 1) * BLOCK)
            for head in range(view.heads):
                for name, source in (("k", keys), ("v", values)):
                    bits = stored(source[layer, rows, head], view.dtype)
                    oracle.write_half(image, view, (layer, block, head), name, bits)


def read(image: oracle.Bytes, view: View, blocks: list[int], name: str) -> Array:
    """``[layer, token, head, element]``."""
    found = np.zeros((len(view.layers), len(blocks) * BLOCK, view.heads, HEAD_SIZE))
    for layer in range(len(view.layers)):
        for at, block in enumerate(blocks):
            for head in range(view.heads):
                bits = oracle.read_half(image, view, (layer, block, head), name)
                found[layer, at * BLOCK : (at + 1) * BLOCK, head] = numerics.widen(bits, view.dtype)
    return found


def layer_groups(rope: Rope, view: View) -> list[tuple[int, View]]:
    """Layers with one base are moved together: (one of them, their view)."""
    kinds = len(rope.bases)
    return [(first, replace(view, layers=view.layers[first::kinds])) for first in range(kinds)]


def shift(rope: Rope, view: View, layer: int, distance: int) -> oracle.Rotation:
    angles = distance * rope.frequencies(layer)
    element = layouts.ELEMENT_BYTES[view.dtype]
    return oracle.Rotation(tuple(np.cos(angles)), tuple(np.sin(angles)), rope.first * element, rope.interleaved)


def moved(rig: Rig, made: Reuse, view: View, *, in_place: bool) -> list[tuple[Array, Array]]:
    """Every chunk's keys and values as the library moves them from where they were compiled to where they are reused:
    through a packed form, rotated on the way, or copied as they are and then rotated where they lie."""
    rope, found, image = made.model.rope, [], noise(1, view.size)
    for at, run in enumerate(made.compiled):
        count = CHUNKS[at] // BLOCK
        blocks = np.random.default_rng(at).permutation(view.blocks).tolist()
        old, new = blocks[:count], blocks[count : 2 * count]
        write(image, view, old, run.keys, run.values)
        cache = rig.memory(image, "cache")
        for layer, group in layer_groups(rope, view):
            part, span = oracle.whole(group, count), oracle.Span(tuple(old), 0, count)
            packed = rig.memory(noise(2, oracle.packed_bytes(group, part, span)), "packed")
            assert rig.gather(group, cache, part, [(span, packed)]).status == abi.OK, rig.explain()
            turned, target = shift(rope, view, layer, made.starts[at] - SYSTEM), replace(span, blocks=tuple(new))
            fused = None if in_place else turned
            assert rig.scatter(group, cache, part, [(target, packed)], rotation=fused).status == abi.OK, rig.explain()
            if in_place:
                assert rig.rotate(group, cache, part, new, turned) == abi.OK, rig.explain()
        after = cache.fetch()
        found.append((read(after, view, new, "k"), read(after, view, new, "v")))
    return found


@pytest.mark.parametrize("name", ROPES)
def test_the_first_layer_equals_a_full_prefill(rigs: list[Rig], name: str) -> None:
    """T1: keys and values of layer 0 depend on token and position alone, so no mask matters."""
    made = reuse(ROPES[name])
    tokens = [token for at in range(len(CHUNKS)) for token in made.tokens[made.own[at]]]
    positions = np.arange(SYSTEM, SYSTEM + len(tokens), dtype=float)
    plain = made.model.run(tokens, positions, causal(len(tokens)))
    view = view_of(made.model, "BLHNC", F64)
    for rig in rigs:
        for in_place in (False, True):
            moved_chunks = moved(rig, made, view, in_place=in_place)
            keys = np.concatenate([keys[0] for keys, _ in moved_chunks])
            values = np.concatenate([values[0] for _, values in moved_chunks])
            assert np.abs(keys - plain.keys[0]).max() < 1e-12
            assert np.abs(values - plain.values[0]).max() < 1e-12


def furthest(made: Reuse, found: list[tuple[Array, Array]]) -> float:
    """The largest difference to the full prefill in any layer of any chunk."""
    return max(
        float(max(np.abs(keys - made.full.keys[:, own]).max(), np.abs(values - made.full.values[:, own]).max()))
        for own, (keys, values) in zip(made.own, found, strict=True)
    )


@pytest.mark.parametrize("order", ["LBHNC", "BLNHC"])
@pytest.mark.parametrize("name", ROPES)
def test_all_layers_equal_a_full_prefill_under_the_mask_of_the_reuse(rigs: list[Rig], name: str, order: str) -> None:
    """T2, and the same of the question's hidden states, computed on top of the cache."""
    made = reuse(ROPES[name])
    view = view_of(made.model, order, F64)
    for rig in rigs:
        for in_place in (False, True):
            found = moved(rig, made, view, in_place=in_place)
            assert furthest(made, found) < 1e-11
            assert np.abs(answer(made, found) - made.full.hidden[-QUESTION:]).max() < 1e-11


def answer(made: Reuse, chunks: list[tuple[Array, Array]]) -> Array:
    """The question's hidden states, from the system prompt's cache and the chunks'."""
    keys = np.concatenate([made.system.keys, *(keys for keys, _ in chunks)], axis=1)
    values = np.concatenate([made.system.values, *(values for _, values in chunks)], axis=1)
    past = Run(keys, values, made.system.hidden)
    seen = keys.shape[1]
    mask = np.concatenate([np.ones((QUESTION, seen), bool), causal(QUESTION)], axis=1)
    positions = np.arange(made.starts[-1], made.starts[-1] + QUESTION, dtype=float)
    return made.model.run(made.tokens[-QUESTION:], positions, mask, past).hidden


@pytest.mark.parametrize("name", ROPES)
def test_a_prefill_that_ignores_the_changed_distance_differs(rigs: list[Rig], name: str) -> None:
    """These tests can fail: a mask that lets a chunk see the system prompt where it is, not where it was compiled, and
    keys that are not rotated at all."""
    made = reuse(ROPES[name], anchored=False)
    view = view_of(made.model, "LBHNC", F64)
    found = moved(rigs[0], made, view, in_place=False)
    assert furthest(made, found) > 0.01
    right = reuse(ROPES[name])
    assert furthest(right, [(run.keys, run.values) for run in right.compiled]) > 0.01
    # The first chunk lies where it was compiled: there both masks say the same.
    assert np.abs(found[0][0] - made.full.keys[:, made.own[0]]).max() < 1e-11


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("name", ROPES)
def test_short_types_stay_within_their_roundings(rigs: list[Rig], name: str, dtype: int) -> None:
    """The same with a cache in bf16: what differs from the full prefill is the rounding of the stored elements, turned,
    and of the results; so of values one rounding, and of the question's hidden states about what any such cache loses."""
    made = reuse(ROPES[name])
    view = view_of(made.model, "BLHNC", dtype)
    unit = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-23}[dtype]
    for rig in rigs:
        found = moved(rig, made, view, in_place=False)
        for own, run, (keys, values) in zip(made.own, made.compiled, found, strict=True):
            assert np.all(np.abs(values - made.full.values[:, own]) <= np.abs(values) * unit + 1e-7)
            of_pair = pair_magnitude(made.model.rope, run.keys)
            assert np.all(np.abs(keys - made.full.keys[:, own]) <= (of_pair + np.abs(keys)) * unit * 1.001 + 1e-7)
        assert all(
            np.array_equal(fused, in_place)
            for pair, other in zip(found, moved(rig, made, view, in_place=True), strict=True)
            for fused, in_place in zip(pair, other, strict=True)
        )
        exact = made.full.hidden[-QUESTION:]
        rounded = [
            tuple(
                numerics.widen(stored(each[:, own], dtype), dtype).astype(float)
                for each in (made.full.keys, made.full.values)
            )
            for own in made.own
        ]
        least = np.abs(answer(made, rounded) - exact).mean()
        assert np.abs(answer(made, found) - exact).mean() < 3 * least


def pair_magnitude(rope: Rope, keys: Array) -> Array:
    """|x| + |y| of each element's pair; of elements outside, nothing beyond their own rounding."""
    half, last = rope.rotary // 2, rope.first + rope.rotary
    total = np.zeros_like(keys)
    rotary = np.abs(keys[..., rope.first : last])
    if rope.interleaved:
        total[..., rope.first : last] = np.repeat(rotary[..., 0::2] + rotary[..., 1::2], 2, axis=-1)
    else:
        total[..., rope.first : last] = np.tile(rotary[..., :half] + rotary[..., half:], 2)
    return total
