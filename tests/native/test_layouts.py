"""The tests' own layouts: sound in themselves, and the same as vLLM's."""

import importlib.util
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.native import layouts, oracle
from tests.native.layouts import BF16, BYTES, F32, ORDERS, Shape, View

SHAPE = Shape(layers=2, blocks=6, heads=3, tokens=4, k=8, v=8)
KINDS = sorted(layouts.catalogue(SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_contents_share_a_byte_and_all_lie_inside(kind: str) -> None:
    view = layouts.catalogue(SHAPE)[kind]
    taken = np.zeros(view.size, int)
    span = oracle.Span(tuple(range(view.blocks)), 0, view.blocks)
    for here, _ in oracle.pieces(view, oracle.whole(view, view.blocks), span):
        assert 0 <= here <= view.size - view.content
        taken[here : here + view.content] += 1
    assert taken.max() == 1
    if kind in {*ORDERS, "bytes"}:
        assert taken.sum() == view.size - view.layers[0] - (32 if kind in ORDERS else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_oracle_gathers_it_scatters_back(kind: str) -> None:
    view = layouts.catalogue(SHAPE)[kind]
    cache = np.random.default_rng(1).integers(0, 256, view.size, np.uint8)
    span = oracle.Span(tuple(reversed(range(view.blocks))), 1, view.blocks + 2)
    part = oracle.whole(view, view.blocks)
    packed, back = np.zeros(oracle.packed_bytes(view, part, span), np.uint8), np.zeros(view.size, np.uint8)
    oracle.gather(cache, view, part, span, packed)
    oracle.scatter(back, view, part, span, packed)
    content = oracle.addressed(view, part, span.blocks)
    assert np.array_equal(back, np.where(content, cache, 0))
    first = cache[view.at(0, view.blocks - 1, 0, 0) :][: view.content]
    assert np.array_equal(packed[view.page :][: view.content], first)


# From here on against vLLM, where it is installed.


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """The parts of vLLM that lay out caches."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; only these comparisons need it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from vllm.v1 import kv_cache_interface
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
        from vllm.v1.kv_cache_layout import KVCacheLayout
        from vllm.v1.worker.utils import allocate_kv_cache
    return SimpleNamespace(
        torch=torch,
        specs=kv_cache_interface,
        layouts=KVCacheLayout,
        configure=get_kv_cache_config_from_groups,
        allocate=allocate_kv_cache,
    )


def spec_of(vllm: Any, shape: Shape, **fields: Any) -> Any:
    dtypes = {BYTES: vllm.torch.uint8, BF16: vllm.torch.bfloat16, F32: vllm.torch.float32}
    if shape.v:
        assert shape.k == shape.v
        kind = vllm.specs.FullAttentionSpec
    else:
        kind = vllm.specs.MLAAttentionSpec
    sizes = {"block_size": shape.tokens, "num_kv_heads": shape.heads, "head_size": shape.k}
    return kind(**sizes, dtype=dtypes[shape.dtype], **fields)


SHAPES = {
    "gqa": Shape(layers=3, heads=4, tokens=16, k=64, v=64),
    "one head": Shape(layers=2, heads=1, tokens=16, k=64, v=64),
    "one layer": Shape(layers=1, heads=2, tokens=32, k=128, v=128),
    "fp8": Shape(layers=3, heads=4, tokens=16, k=64, v=64, dtype=BYTES),
    "f32": Shape(layers=2, heads=2, tokens=16, k=16, v=16, dtype=F32),
    "mla": Shape(layers=3, heads=1, tokens=32, k=576, v=0),
}


def stride_cases() -> Iterator[Any]:
    for name, shape in SHAPES.items():
        for order in ORDERS:
            yield pytest.param(order, shape, 0, id=f"{name}-{order}")
            if shape.heads == 1 or "H" not in order[: max(order.index("L"), order.index("B"))]:
                yield pytest.param(order, shape, shape.page + 1024, id=f"{name}-{order}-padded")


@pytest.mark.parametrize(("order", "shape", "page_bytes"), list(stride_cases()))
def test_strides_are_those_of_vllm(vllm: Any, order: str, shape: Shape, page_bytes: int) -> None:
    spec = spec_of(vllm, shape, **({"page_size_padded": page_bytes} if page_bytes else {}))
    theirs = vllm.specs.compute_layout_strides(spec, shape.blocks, shape.layers, vllm.layouts[order])
    ours = layouts.strides(order, shape, page_bytes=page_bytes)
    assert tuple(ours[axis] for axis in "LBHNC") == tuple(theirs)


def allocated(vllm: Any, groups: list[Any], order: str, kernel_blocks: list[int] | None = None) -> tuple[Any, Any]:
    """A configuration and vLLM's views by layer name, of a cache that is really allocated."""
    settings = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: vllm.layouts[order],
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        parallel_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(),
        model_config=SimpleNamespace(),
    )
    config = vllm.configure(settings, groups, 1 << 20)
    return config, vllm.allocate(config, vllm.torch.device("cpu"), vllm.layouts[order], kernel_blocks)


def check_addresses(view: View, theirs: list[Any]) -> None:
    """Our address of every content is that of vLLM's tensors, and both end where the allocation does."""
    assert len(theirs) == len(view.layers)
    for layer, tensor in enumerate(theirs):
        assert tensor.untyped_storage().nbytes() == view.size
        size = tensor.element_size()
        assert (*tensor.shape[:3], tensor.shape[3] * size) == (view.blocks, view.heads, view.tokens, view.content)
        origin, step = tensor.storage_offset() * size, [each * size for each in tensor.stride()[:3]]
        for block in (0, 1, view.blocks - 1):
            for head in range(view.heads):
                for token in (0, 1, view.tokens - 1):
                    at = origin + block * step[0] + head * step[1] + token * step[2]
                    assert view.at(layer, block, head, token) == at, (layer, block, head, token)


def sized(shape: Shape, config: Any) -> Shape:
    return Shape(**{**shape.__dict__, "blocks": config.num_blocks})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SHAPES)
def test_an_allocated_cache_lies_as_ours(vllm: Any, name: str, order: str) -> None:
    shape = SHAPES[name]
    names = [f"l{layer}" for layer in range(shape.layers)]
    config, views = allocated(vllm, [vllm.specs.KVCacheGroupSpec(names, spec_of(vllm, shape))], order)
    view = layouts.dense(order, sized(shape, config))
    check_addresses(view, [views[each] for each in names])


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_padded_pages_lie_as_ours(vllm: Any, order: str) -> None:
    shape = SHAPES["gqa"]
    names = [f"l{layer}" for layer in range(shape.layers)]
    spec = spec_of(vllm, shape, page_size_padded=2 * shape.page)
    config, views = allocated(vllm, [vllm.specs.KVCacheGroupSpec(names, spec)], order)
    view = layouts.dense(order, sized(shape, config), page_bytes=2 * shape.page)
    check_addresses(view, [views[each] for each in names])


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_kernel_blocks_lie_as_ours(vllm: Any, order: str) -> None:
    shape = SHAPES["gqa"]
    names = [f"l{layer}" for layer in range(shape.layers)]
    group = vllm.specs.KVCacheGroupSpec(names, spec_of(vllm, shape))
    config, views = allocated(vllm, [group], order, [shape.tokens // 2])
    view = layouts.kernel_blocks(order, sized(shape, config), 2)
    check_addresses(view, [views[each] for each in names])


@pytest.mark.parametrize("order", ORDERS)
def test_hybrid_groups_overlay_each_other_as_ours(vllm: Any, order: str) -> None:
    wide = SHAPES["gqa"]
    narrow = Shape(**{**wide.__dict__, "layers": 1})
    sliding = vllm.specs.SlidingWindowSpec(
        block_size=wide.tokens,
        num_kv_heads=wide.heads,
        head_size=wide.k,
        dtype=vllm.torch.bfloat16,
        sliding_window=40,
    )
    groups = [
        vllm.specs.KVCacheGroupSpec(["f0", "f1", "f2"], spec_of(vllm, wide)),
        vllm.specs.KVCacheGroupSpec(["s0"], sliding),
    ]
    config, views = allocated(vllm, groups, order)
    first, second = layouts.hybrid(order, [sized(wide, config), sized(narrow, config)])
    check_addresses(first, [views[each] for each in groups[0].layer_names])
    check_addresses(second, [views["s0"]])


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_layers_of_several_page_sizes_lie_as_ours(vllm: Any, order: str) -> None:
    small, large = (Shape(layers=1, heads=heads, tokens=16, k=64, v=64) for heads in (4, 8))
    specs = {"a": spec_of(vllm, small), "b": spec_of(vllm, large)}
    uniform = vllm.specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
    config, views = allocated(vllm, [vllm.specs.KVCacheGroupSpec(["a", "b"], uniform)], order)
    first, second = layouts.beside(order, [sized(small, config), sized(large, config)])
    check_addresses(first, [views["a"]])
    check_addresses(second, [views["b"]])
