"""Addresses, checked against vLLM's own views of its own allocation."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM (CPU build)")

with warnings.catch_warnings():
    # What vLLM and its libraries warn of on import is not ours to mend.
    warnings.simplefilter("ignore")
    import torch
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheGroupSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
        group_kernel_blocks,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

from worker_connector.copier import Copier
from worker_connector.errors import ConfigurationError, UnsupportedCache
from worker_connector.geometry import Group, describe_groups
from worker_connector.plan import Span
from worker_connector.regions import Region, RegionSet, SlotLayout, group_regions

CHUNK = 64
SERIAL = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)


def full(**fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": torch.bfloat16, **fields}
    )


def sliding(**fields: Any) -> SlidingWindowSpec:
    sizes = {"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": torch.bfloat16, "sliding_window": 40}
    return SlidingWindowSpec(**{**sizes, **fields})


def mla(**fields: Any) -> MLAAttentionSpec:
    return MLAAttentionSpec(
        **{"block_size": 32, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16, **fields}
    )


def mixed_heads() -> UniformTypeKVCacheSpecs:
    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full(), "b": full(num_kv_heads=8)})


def group(spec: Any, *layers: str) -> KVCacheGroupSpec:
    return KVCacheGroupSpec(list(layers), spec)


MODELS: dict[str, list[KVCacheGroupSpec]] = {
    "gqa": [group(full(), "l0", "l1", "l2")],
    "one layer": [group(full(), "l0")],
    "one head": [group(full(num_kv_heads=1), "l0", "l1")],
    "fp8": [group(full(dtype=torch.uint8), "l0", "l1", "l2")],
    "mla": [group(mla(), "l0", "l1", "l2")],
    "padded": [group(full(page_size_padded=40960), "l0", "l1")],
    "hybrid": [group(full(), "f0", "f1"), group(sliding(), "s0", "s1"), group(sliding(), "s2", "s3")],
    "uneven hybrid": [group(full(), "f0", "f1"), group(sliding(), "s0")],
    "mixed heads": [group(mixed_heads(), "a", "b")],
}


@dataclass
class Cache:
    config: Any
    views: dict[str, torch.Tensor]
    buffer: torch.Tensor

    def block(self, layer: str, block: int) -> bytes:
        """The bytes of one block of one layer, as vLLM itself addresses them."""
        view = group_kernel_blocks(self.views[layer], self.config.num_blocks)
        return view[block].contiguous().view(torch.uint8).numpy().tobytes()


def allocate(groups: list[KVCacheGroupSpec], layout: KVCacheLayout, kernel_blocks: list[int] | None = None) -> Cache:
    settings = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        parallel_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(),
        model_config=SimpleNamespace(),
    )
    # vLLM completes the specifications it is given.
    config = get_kv_cache_config_from_groups(settings, deepcopy(groups), 1 << 22)
    views = allocate_kv_cache(config, torch.device("cpu"), layout, kernel_blocks)
    storage = next(iter(views.values())).untyped_storage()
    buffer = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    generator = torch.Generator().manual_seed(1)
    buffer.copy_(torch.randint(0, 256, (buffer.numel(),), dtype=torch.uint8, generator=generator))
    return Cache(config, views, buffer)


def caches() -> Iterator[Any]:
    for name, groups in MODELS.items():
        for layout in KVCacheLayout:
            yield pytest.param(groups, layout, None, id=f"{name}-{layout.name}")
    for layout in (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC):
        yield pytest.param(MODELS["gqa"], layout, [8], id=f"split kernel blocks-{layout.name}")


@pytest.mark.parametrize(("groups", "layout", "kernel_blocks"), list(caches()))
def test_blocks_go_through_a_slot_byte_for_byte(
    groups: list[KVCacheGroupSpec], layout: KVCacheLayout, kernel_blocks: list[int] | None
) -> None:
    try:
        cache = allocate(groups, layout, kernel_blocks)
    except (ValueError, AssertionError) as reason:
        pytest.skip(f"vLLM cannot lay this out: {reason}")
    described = describe_groups(cache.config, SERIAL, CHUNK)
    slots = SlotLayout(group_regions(cache.config), [each.blocks_per_chunk for each in described])
    slab = torch.zeros(3 * slots.slot_bytes, dtype=torch.uint8)
    copier = Copier(cache.buffer, slab, slots)
    for each in described:
        check_round_trip(cache, copier, slab, slots.slot_bytes, each)


def check_round_trip(cache: Cache, copier: Copier, slab: torch.Tensor, slot_bytes: int, described: Group) -> None:
    index, blocks = described.index, described.blocks_per_chunk
    layers = cache.config.kv_cache_groups[index].layer_names
    sources, targets = scattered(blocks, 2), scattered(blocks, 20)
    every = [(name, block) for each in cache.config.kv_cache_groups for name in each.layer_names for block in range(36)]
    before = {place: cache.block(*place) for place in every}
    copier.to_slab([Span(1, index, 0, sources)])
    assert not slab[:slot_bytes].any(), "a save wrote outside its slot"
    assert not slab[2 * slot_bytes :].any(), "a save wrote outside its slot"
    # Only the last blocks come back, as when a load continues in the middle of a chunk.
    copier.to_cache([Span(1, index, 1, targets[1:])])
    expected = dict(before)
    for source, target in zip(sources[1:], targets[1:], strict=True):
        expected |= {(name, target): before[name, source] for name in layers}
    aliased = set(targets[1:])
    for place in every:
        if place[0] in layers or place[1] not in aliased:
            assert cache.block(*place) == expected[place], f"layer {place[0]} block {place[1]} is wrong"


def scattered(count: int, first: int) -> list[int]:
    """Block ids with runs and jumps, forwards and backwards."""
    ids = [first, first + 1, first + 5, first + 4, first + 7, first + 8, first + 9, first + 12]
    return ids[:count]


def test_slot_bytes_are_what_the_blocks_take_rounded_up() -> None:
    cache = allocate(MODELS["gqa"], KVCacheLayout.LBHNC)
    slots = SlotLayout(group_regions(cache.config), [4])
    assert slots.payload_bytes == 4 * 3 * full().page_size_bytes
    assert slots.slot_bytes >= slots.payload_bytes
    assert slots.slot_bytes % 4096 == 0


def test_block_outermost_layouts_are_one_copy_per_run() -> None:
    cache = allocate(MODELS["gqa"], KVCacheLayout.BLHNC)
    assert [len(regions) for regions in group_regions(cache.config)] == [1]


def test_a_cache_of_several_allocations_is_not_supported() -> None:
    cache = allocate(MODELS["gqa"], KVCacheLayout.LBHNC)
    cache.config.kv_cache_tensors.append(SimpleNamespace(size=1, layers=["x"]))
    with pytest.raises(UnsupportedCache, match="one allocation"):
        group_regions(cache.config)


def test_a_layer_without_a_place_is_not_supported() -> None:
    cache = allocate(MODELS["gqa"], KVCacheLayout.LBHNC)
    cache.config.kv_cache_groups[0].layer_names.append("elsewhere")
    with pytest.raises(UnsupportedCache, match="no place"):
        group_regions(cache.config)


def config_of(*groups: KVCacheGroupSpec) -> Any:
    return SimpleNamespace(kv_cache_groups=list(groups))


def test_the_last_token_cannot_be_computed_again_where_its_reach_was_left_behind() -> None:
    assert Group(0, "", 16, 16).can_repeat_last(256)
    assert Group(0, "", 16, 16, window=128).can_repeat_last(256)
    assert not Group(0, "", 16, 16, window=129).can_repeat_last(256)
    assert Group(0, "", 16, 16, local=512).can_repeat_last(256)
    assert not Group(0, "", 16, 16, local=256).can_repeat_last(256)


def test_groups_say_how_far_they_read_back() -> None:
    local = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, attention_chunk_size=128
    )
    whole, window, chunked = describe_groups(
        config_of(group(full(), "a"), group(sliding(), "b"), group(local, "c")), SERIAL, 256
    )
    assert whole.reads_everything
    assert whole.first_needed(1000) == 0
    assert window.first_needed(1000) == 961
    assert window.first_needed(10) == 0
    assert chunked.first_needed(1000) == 896


def test_a_chunk_size_that_blocks_do_not_divide_is_an_error_that_names_good_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"multiple of 48 tokens: set chunk_size to one of 48, 240, 288, 480"):
        describe_groups(config_of(group(full(), "a"), group(sliding(block_size=48), "b")), SERIAL, 256)


@pytest.mark.parametrize(
    ("groups", "parallel", "reason"),
    [
        ([], SERIAL, "no KV cache"),
        (
            [
                group(full(), "a"),
                group(MambaSpec(block_size=16, shapes=((3, 96),), dtypes=(torch.bfloat16,)), "m"),
            ],
            SERIAL,
            "MambaSpec",
        ),
        (MODELS["gqa"], SimpleNamespace(decode_context_parallel_size=2), "decode_context_parallel_size"),
    ],
)
def test_what_cannot_be_stored_exactly_is_not_supported(groups: Any, parallel: Any, reason: str) -> None:
    with pytest.raises(UnsupportedCache, match=reason):
        describe_groups(config_of(*groups), parallel, 256)


def test_regions_of_one_kind_stand_together_in_a_slot_without_gaps() -> None:
    wide, narrow = (
        [Region(at * 4096, 512, 512) for at in range(3)],
        [Region(at * 4096 + 2048, 256, 128) for at in (0, 1)],
    )
    mixed = [wide[0], narrow[0], wide[1], narrow[1], wide[2]]
    slots = SlotLayout([mixed, wide[:1]], [4, 2])
    assert slots.regions == [[*wide, *narrow], wide[:1]]
    assert slots.sets == [
        [RegionSet((0, 4096, 8192), 512, 512, 0), RegionSet((2048, 6144), 256, 128, 3 * 4 * 512)],
        [RegionSet((0,), 512, 512, 3 * 4 * 512 + 2 * 4 * 128)],
    ]
    assert slots.payload_bytes == 3 * 4 * 512 + 2 * 4 * 128 + 2 * 512
    assert [slots.pages(group) for group in (0, 1)] == [20, 2]


@pytest.mark.parametrize(("size", "blocks"), [(2047, 0), (2048, 1), (2047 + 512, 1), (2048 + 3 * 512, 4), (0, 0)])
def test_a_set_of_regions_has_the_blocks_that_lie_wholly_in_the_cache(size: int, blocks: int) -> None:
    assert RegionSet((0, 1536), 512, 512, 0).blocks_within(size) == blocks
