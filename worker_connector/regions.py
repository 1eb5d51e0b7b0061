"""Where a block's bytes are: any vLLM KV-cache layout as byte regions of one buffer.

vLLM keeps the whole KV cache in one allocation and describes it by ``KVCacheTensor``s: the page of layer ``l`` and
block ``b`` starts at ``offset + l·layer_stride + b·block_stride``. A region is a run of bytes per block,
``(offset, block_stride, nbytes)``; a group's blocks are a list of regions, the same for every block:

- block outermost (BLHNC, BLNHC, BHLNC): one region, the whole packed block;
- page compact (LBHNC, LBNHC): one region per layer, its page;
- head outside block (LHBNC): one region per layer and head.

Which of them holds follows from the strides alone, so no layout names are needed. Kernel blocks smaller than manager
blocks only subdivide a page. Layers that share a page appear once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from worker_connector.errors import UnsupportedCache

SLOT_ALIGNMENT = 4096
"""Slots start on a memory page, which disks and network cards can take as they are."""


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes ``[offset + b·block_stride, + nbytes)`` of the buffer belong to block ``b``."""

    offset: int
    block_stride: int
    nbytes: int


def group_regions(cache: Any) -> list[list[Region]]:
    """The regions of each group of a ``KVCacheConfig``.

    Raises:
        UnsupportedCache: the cache is not one allocation, or a layer has no place in it.
    """
    sizes = {tensor.size for tensor in cache.kv_cache_tensors}
    if len(sizes) != 1:
        raise UnsupportedCache("the KV cache is not one allocation")
    (size,) = sizes
    regions = [list(dict.fromkeys(_regions_of(cache, group))) for group in cache.kv_cache_groups]
    for group in regions:
        for region in group:
            end = region.offset + (cache.num_blocks - 1) * region.block_stride + region.nbytes
            if end > size or region.nbytes <= 0:
                raise UnsupportedCache(f"{region} does not fit a KV cache of {size} bytes")
    return regions


def _regions_of(cache: Any, group: Any) -> Iterator[Region]:
    placed = 0
    for tensor in cache.kv_cache_tensors:
        for index, layer in enumerate(tensor.layers):
            if layer in group.layer_names:
                placed += 1
                yield from _layer_regions(cache, group, tensor, index)
    if placed != len(group.layer_names):
        raise UnsupportedCache(f"{len(group.layer_names) - placed} layers have no place in the KV cache")


def _layer_regions(cache: Any, group: Any, tensor: Any, index: int) -> Iterator[Region]:
    stride = tensor.block_stride
    spec = layer_spec(group, tensor.layers[index])
    heads_apart = tensor.layer_stride < spec.page_size_bytes <= stride and len(tensor.layers) > 1
    if heads_apart or stride * cache.num_blocks == tensor.size:
        yield Region(0, stride, stride)
        return
    offset = tensor.offset + index * tensor.layer_stride
    if stride >= spec.page_size_bytes:
        yield Region(offset, stride, spec.page_size_bytes)
        return
    run = spec.num_states * spec.state_content_size_bytes
    for head in range(spec.num_heads):
        yield Region(offset + head * stride * cache.num_blocks, stride, run)


def layer_spec(group: Any, layer: str) -> Any:
    """The ``KVCacheSpec`` of one layer of a group."""
    spec = group.kv_cache_spec
    return getattr(spec, "kv_cache_specs", {}).get(layer, spec)


@dataclass(frozen=True, slots=True)
class RegionSet:
    """Regions of a group that lie alike, so that one description with a list of addresses stands for all of them.
    ``start`` is where their pages begin in a slot: ``[region][block][page]``, without gaps."""

    offsets: tuple[int, ...]
    block_stride: int
    page_bytes: int
    start: int

    def blocks_within(self, size: int) -> int:
        """How many blocks all of them have in a cache of ``size`` bytes."""
        room = size - max(self.offsets) - self.page_bytes
        return room // self.block_stride + 1 if room >= 0 else 0


class SlotLayout:
    """Where each group's blocks lie inside a slot: group by group, region by region, block by block, so that
    consecutive blocks of a region are consecutive bytes in the slot as they are in the cache. Regions of one stride
    and size stand together, in the order in which they were given: a ``RegionSet`` of ``sets``."""

    def __init__(self, regions: Sequence[Sequence[Region]], blocks_per_chunk: Sequence[int]) -> None:
        self.regions = [_by_kind(group) for group in regions]
        self.blocks_per_chunk = list(blocks_per_chunk)
        self.starts: list[list[int]] = []
        self.sets: list[list[RegionSet]] = []
        at = 0
        for group, blocks in zip(self.regions, self.blocks_per_chunk, strict=True):
            starts = []
            for region in group:
                starts.append(at)
                at += region.nbytes * blocks
            self.starts.append(starts)
            self.sets.append(list(_sets(group, starts)))
        self.payload_bytes = at
        self.slot_bytes = -(-at // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def block_bytes(self, group: int) -> int:
        """Bytes one block of a group takes on this rank."""
        return sum(region.nbytes for region in self.regions[group])

    def pages(self, group: int) -> int:
        """Pages of a group's part of a slot: its regions times its blocks."""
        return len(self.regions[group]) * self.blocks_per_chunk[group]


def _by_kind(regions: Sequence[Region]) -> list[Region]:
    kinds: dict[tuple[int, int], list[Region]] = {}
    for region in regions:
        kinds.setdefault((region.block_stride, region.nbytes), []).append(region)
    return [region for alike in kinds.values() for region in alike]


def _sets(regions: Sequence[Region], starts: Sequence[int]) -> Iterator[RegionSet]:
    for (stride, nbytes), alike in groupby(
        zip(regions, starts, strict=True), key=lambda pair: (pair[0].block_stride, pair[0].nbytes)
    ):
        members = list(alike)
        yield RegionSet(tuple(region.offset for region, _ in members), stride, nbytes, members[0][1])
