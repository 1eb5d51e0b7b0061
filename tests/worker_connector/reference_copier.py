"""The copies between KV cache and slab in torch and numpy: what the movers' native copies are held against, in bytes
and in speed. Only measurements and tests use it."""

from collections.abc import Iterable, Iterator, Sequence
from ctypes import memmove
from typing import Any

import numpy as np
import torch

from worker_connector.plan import Span
from worker_connector.regions import Region, SlotLayout


class ReferenceCopier:
    """Copies spans between a KV cache and a slab, both given as flat ``uint8`` tensors.

    ``cache`` is the cache's whole allocation, ``slab`` holds slots of ``layout.slot_bytes``. Both must outlive the
    copier. Consecutive blocks of a region are one copy.
    """

    def __init__(self, cache: torch.Tensor, slab: torch.Tensor, layout: SlotLayout) -> None:
        self._cache = cache
        self._slab = slab
        self._layout = layout
        self._on_host = cache.device.type == "cpu"
        self._cache_start, self._slab_start = cache.data_ptr(), slab.data_ptr()
        self._blocks = [_blocks_within(cache.numel(), regions) for regions in layout.regions]
        self._pages = [_host_pages(cache, slab, layout, group) for group in range(len(layout.regions))]

    def nbytes(self, spans: Iterable[Span]) -> int:
        """Bytes that copying ``spans`` moves."""
        return sum(len(span.blocks) * self._layout.block_bytes(span.group) for span in spans)

    def to_cache(self, span: Span) -> None:
        """Copy a span's bytes from its slot into its blocks. An ``IndexError`` if the cache lacks one of them."""
        self._check(span)
        for in_cache, in_slab, count in self._pieces(span):
            if self._on_host:
                memmove(self._cache_start + in_cache, self._slab_start + in_slab, count)
            else:
                source = self._slab[in_slab : in_slab + count]
                self._cache[in_cache : in_cache + count].copy_(source, non_blocking=True)

    def to_slab(self, span: Span) -> None:
        """Copy a span's blocks into its slot. An ``IndexError`` if the cache lacks one of them."""
        self._check(span)
        if pages := self._pages[span.group]:
            blocks, end = np.array(span.blocks), span.at + len(span.blocks)
            for in_cache, in_slab in pages:
                np.take(in_cache, blocks, out=in_slab[span.slot, span.at : end], mode="clip")
            return
        for in_cache, in_slab, count in self._pieces(span):
            if self._on_host:
                memmove(self._slab_start + in_slab, self._cache_start + in_cache, count)
            else:
                source = self._cache[in_cache : in_cache + count]
                self._slab[in_slab : in_slab + count].copy_(source, non_blocking=True)

    def _check(self, span: Span) -> None:
        # Neither of the ways to copy does: they would read and write what belongs to others.
        if max(span.blocks, default=0) >= self._blocks[span.group]:
            raise IndexError(f"block {max(span.blocks)} of a KV cache of {self._blocks[span.group]} blocks")

    def _pieces(self, span: Span) -> Iterator[tuple[int, int, int]]:
        """Runs of bytes: offset in the cache, offset in the slab, length."""
        base = span.slot * self._layout.slot_bytes
        regions, starts = self._layout.regions[span.group], self._layout.starts[span.group]
        for first, done, count in _runs(span.blocks):
            for region, start in zip(regions, starts, strict=True):
                in_cache = region.offset + first * region.block_stride
                in_slab = base + start + (span.at + done) * region.nbytes
                if region.block_stride == region.nbytes:
                    yield in_cache, in_slab, count * region.nbytes
                    continue
                for at in range(count):
                    yield in_cache + at * region.block_stride, in_slab + at * region.nbytes, region.nbytes


def _blocks_within(size: int, regions: Iterable[Region]) -> int:
    """How many blocks all regions have in a cache of so many bytes."""
    return min(((size - region.offset - region.nbytes) // region.block_stride + 1 for region in regions), default=0)


def _host_pages(cache: torch.Tensor, slab: torch.Tensor, layout: SlotLayout, group: int) -> list[tuple[Any, Any]]:
    """Per region, its blocks in the cache as an array of opaque items, and the slab's as one of slots by blocks: so a
    span is one call per region, however its blocks are scattered. Empty where the arrays cannot be made: not in host
    memory, blocks apart, or no slot."""
    regions = layout.regions[group]
    if cache.device.type != "cpu" or any(region.block_stride != region.nbytes for region in regions):
        return []
    if slab.numel() < layout.slot_bytes:
        return []
    held, slots = cache.numpy(), slab.numel() // layout.slot_bytes
    pages: list[tuple[Any, Any]] = []
    for region, start in zip(regions, layout.starts[group], strict=True):
        item, per_chunk = f"V{region.nbytes}", layout.blocks_per_chunk[group]
        blocks = (held.size - region.offset) // region.nbytes
        in_cache = np.ndarray(blocks, item, held, region.offset)
        in_slab = np.ndarray((slots, per_chunk), item, slab.numpy(), start, (layout.slot_bytes, region.nbytes))
        pages.append((in_cache, in_slab))
    return pages


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive block ids: (first block, blocks before it in the span, length)."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[start], start, at - start
            start = at
