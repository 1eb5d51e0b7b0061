"""Spans between KV cache and slab, as calls of the native core.

A ``RegionSet`` of the cache is one native view; a span's share of it is one native span, whose packed form is the
``[region][block][page]`` of its slot. So a batch of spans is one call for every set of every group in it, which for most
models is one call. Bytes are copied as they are: the element type does not matter here.
"""

import logging
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from worker_connector import native
from worker_connector.errors import NativeError
from worker_connector.plan import Span
from worker_connector.regions import RegionSet, SlotLayout

BATCH_BYTES = 32 << 20
"""What is copied between two looks at the clock: a few milliseconds' worth."""

_log = logging.getLogger("vllm.warmroute.copier")

_calibrating = threading.Lock()


class Receipt(NamedTuple):
    """Checksums of the pages that one call copied, per span ``[region][block]``; valid when the copies are done."""

    spans: Sequence[Span]
    region_set: int
    sums: Any


class Lane:
    """One direction of copying: its native context. The thread that copies opens it; only one thread at a time may use
    it, which the context sees to."""

    def __init__(self, open_context: Callable[[], native.Context], *, on_host: bool) -> None:
        self.on_host = on_host
        self._open_context = open_context
        self._context: native.Context | None = None

    @property
    def context(self) -> native.Context:
        self.open()
        assert self._context is not None
        return self._context

    def open(self) -> None:
        """Set up what copying takes, if that has not been done. A ``NativeError`` says what is in the way."""
        if self._context is None:
            self._context = self._open_context()
            if not self.on_host:
                self._calibrate(self._context)

    def _calibrate(self, context: native.Context) -> None:
        # One at a time: the directions share the link that is measured.
        with _calibrating:
            try:
                loads, saves = context.calibrate()
            except NativeError as error:
                _log.warning("Transfers go on with the usual choice of copy engine or kernel: %s", error)
            else:
                _log.info("Pages use the copy engines from %d bytes (loads) and %d bytes (saves)", loads, saves)

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.close()


class _Part(NamedTuple):
    """A region set, ready to be copied: its native view, and where its packed form is in a slot."""

    view: native.View
    start: int
    nbytes: int
    regions: int


class Copier:
    """Copies spans between a KV cache and a slab, both given as flat ``uint8`` tensors.

    ``cache`` is the cache's whole allocation, ``slab`` holds slots of ``layout.slot_bytes``; for a cache on a GPU it is
    page-locked. Both must outlive the copier. ``threads`` share one copy in host memory. With ``verify``, pages are summed
    up as they are saved, and again as they are loaded.

    Raises:
        NativeError: the native library for the cache's device is missing or cannot work here; the text names the cure.
    """

    def __init__(
        self, cache: torch.Tensor, slab: torch.Tensor, layout: SlotLayout, *, threads: int = 1, verify: bool = False
    ) -> None:
        self._layout = layout
        self._cache, self._slab = cache, slab
        self._slab_start, self._slots = slab.data_ptr(), slab.numel() // layout.slot_bytes if layout.slot_bytes else 0
        self._blocks = [_blocks_within(cache.numel(), sets) for sets in layout.sets]
        self._parts = [
            [_part(cache, kind, blocks, per_chunk) for kind in sets]
            for sets, blocks, per_chunk in zip(layout.sets, self._blocks, layout.blocks_per_chunk, strict=True)
        ]
        on_host = cache.device.type == "cpu"
        self._on_host = on_host
        # A GPU's copies are no work for threads; there the number would mean thread blocks.
        share = threads if on_host else 0
        self.loads = Lane(lambda: native.Context(cache.device, threads=share), on_host=on_host)
        self.saves = Lane(lambda: native.Context(cache.device, threads=share), on_host=on_host)
        self._sums = _SlotSums(self._slots, layout) if verify else None

    def nbytes(self, spans: Iterable[Span]) -> int:
        """Bytes that copying ``spans`` moves."""
        return sum(len(span.blocks) * self._layout.block_bytes(span.group) for span in spans)

    def batches(self, spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
        """``spans`` in order, in portions of about ``BATCH_BYTES``."""
        first = size = 0
        for at, span in enumerate(spans):
            size += len(span.blocks) * self._layout.block_bytes(span.group)
            if size >= BATCH_BYTES:
                yield spans[first : at + 1]
                first, size = at + 1, 0
        if first < len(spans):
            yield spans[first:]

    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        """Copy the spans' bytes from their slots into their blocks; on a GPU, enqueue that on ``stream``.

        Raises:
            IndexError: the cache lacks a block, or the slab a slot; nothing was copied.
            NativeError: the copies failed; blocks may be half written.
        """
        return self._copy(spans, self.loads.context.scatter, stream)

    def to_slab(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        """Copy the spans' blocks into their slots, likewise."""
        return self._copy(spans, self.saves.context.gather, stream)

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Note the checksums of what was saved. The copies are done."""
        if self._sums is not None:
            self._sums.record(receipts)

    def forget(self, slots: Iterable[int]) -> None:
        """Compare no more what these slots hold, until they are saved to: it comes from elsewhere."""
        if self._sums is not None:
            self._sums.forget(slots)

    def damaged(self, receipts: Iterable[Receipt]) -> set[int]:
        """Slots whose bytes were loaded but are not those that were saved. The copies are done."""
        return self._sums.damaged(receipts) if self._sums is not None else set()

    def _copy(self, spans: Sequence[Span], call: Callable[..., None], stream: int) -> list[Receipt]:
        for span in spans:
            self._check(span)
        receipts = []
        for group, members in _by_group(spans):
            blocks = array("i", chain.from_iterable([span.blocks for span in members]))
            for index, part in enumerate(self._parts[group]):
                sums = self._new_sums(len(blocks) * part.regions)
                call(part.view, blocks, self._native_spans(members, part), checksums=sums, stream=stream)
                if sums is not None:
                    receipts.append(Receipt(members, index, sums))
        return receipts

    def _native_spans(self, spans: Sequence[Span], part: _Part) -> list[tuple[int, int, int, int, int, int]]:
        start, slot_bytes = self._slab_start + part.start, self._layout.slot_bytes
        per_chunk = self._layout.blocks_per_chunk[spans[0].group]
        return [
            (start + span.slot * slot_bytes, part.nbytes, len(span.blocks), span.at, per_chunk, 0) for span in spans
        ]

    def _new_sums(self, pages: int) -> Any:
        if self._sums is None:
            return None
        return np.empty(pages, np.int64) if self._on_host else torch.empty(pages, dtype=torch.int64, pin_memory=True)

    def _check(self, span: Span) -> None:
        # The core checks what it is given; that a slot is one of this slab's, only its owner knows.
        blocks, held = span.blocks, self._blocks[span.group]
        if blocks and not 0 <= min(blocks) <= max(blocks) < held:
            raise IndexError(f"block {max(blocks)} of a KV cache of {held} blocks")
        if not 0 <= span.slot < self._slots:
            raise IndexError(f"slot {span.slot} of a slab of {self._slots} slots")
        if not 0 <= span.at <= self._layout.blocks_per_chunk[span.group] - len(blocks):
            raise IndexError(f"blocks {span.at} to {span.at + len(blocks)} of a chunk of group {span.group}")


class _SlotSums:
    """The checksum of every page of every slot, and which slots it is known of."""

    def __init__(self, slots: int, layout: SlotLayout) -> None:
        self._known = [False] * slots
        self._by_set: list[list[Any]] = [
            [np.zeros((slots, len(kind.offsets), blocks), np.int64) for kind in sets]
            for sets, blocks in zip(layout.sets, layout.blocks_per_chunk, strict=True)
        ]

    def record(self, receipts: Iterable[Receipt]) -> None:
        for held, sums, slot in self._pairs(receipts):
            held[...] = sums
            self._known[slot] = True

    def forget(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._known[slot] = False

    def damaged(self, receipts: Iterable[Receipt]) -> set[int]:
        pairs = self._pairs(receipts)
        return {slot for held, sums, slot in pairs if self._known[slot] and not np.array_equal(held, sums)}

    def _pairs(self, receipts: Iterable[Receipt]) -> Iterator[tuple[Any, Any, int]]:
        """What is held of a span, what its copy found, and its slot."""
        for receipt in receipts:
            sums, done = np.asarray(receipt.sums), 0
            for span in receipt.spans:
                held = self._by_set[span.group][receipt.region_set][span.slot, :, span.at : span.at + len(span.blocks)]
                yield held, sums[done : done + held.size].reshape(held.shape), span.slot
                done += held.size


def _by_group(spans: Sequence[Span]) -> Iterator[tuple[int, Sequence[Span]]]:
    groups = {span.group for span in spans}
    if len(groups) == 1:
        yield groups.pop(), spans
        return
    for group in sorted(groups):
        yield group, [span for span in spans if span.group == group]


def _blocks_within(size: int, sets: Sequence[RegionSet]) -> int:
    return min((kind.blocks_within(size) for kind in sets), default=0)


def _device(cache: torch.Tensor) -> str:
    return "cpu" if cache.device.type == "cpu" else f"{cache.device.type}:{cache.device.index or 0}"


def _part(cache: torch.Tensor, kind: RegionSet, blocks: int, per_chunk: int) -> _Part:
    start = cache.data_ptr()
    view = native.View.of_bytes(
        [start + offset for offset in kind.offsets],
        begin=start,
        end=start + cache.numel(),
        block_stride=kind.block_stride,
        block_count=blocks,
        page_bytes=kind.page_bytes,
        device=_device(cache),
    )
    return _Part(view, kind.start, len(kind.offsets) * per_chunk * kind.page_bytes, len(kind.offsets))
