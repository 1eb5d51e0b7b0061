"""A slot's raw bytes to the packed form of an encoding, and back.

The packed form is the encoded units of each ``Part`` of the slot's geometry, one part behind the other, each
``[layer][block][head]``; docs/chunk-object.md specifies it. Units of blocks that the slot lacks are zero, whatever is in
their place, and are not decoded. After decoding every byte of the slot is determined: what no layer uses, and the blocks
that are lacking, are zero.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from worker_connector import codecs
from worker_connector.errors import ConfigurationError, NativeError
from worker_connector.kv_geometry import Gap, Part, SlotGeometry
from worker_connector.native import Context, Encoding, Span, View

_ENCODED = tuple(encoding for encoding in Encoding if encoding is not Encoding.RAW)


class SlotCodec:
    """The encodings that suit a geometry. Threads may use it at the same time: each call has a native context to itself, and
    there are as many as there were calls at once. ``close`` ends them, when no thread uses it any more."""

    def __init__(self, geometry: SlotGeometry) -> None:
        self.geometry = geometry
        self.reasons: dict[Encoding, str | None] = {encoding: self._why_not(encoding) for encoding in _ENCODED}
        self.packed_bytes: dict[Encoding, int] = {
            encoding: sum(_part_bytes(encoding, part) for part in geometry.parts)
            for encoding in _ENCODED
            if self.reasons[encoding] is None
        }
        for encoding, size in list(self.packed_bytes.items()):
            if size >= geometry.payload_bytes:
                del self.packed_bytes[encoding]
                self.reasons[encoding] = f"{size} bytes would take the place of {geometry.payload_bytes}"
        self._lock = threading.Lock()
        self._contexts: list[Context] = []

    def _why_not(self, encoding: Encoding) -> str | None:
        reasons = (codecs.why_not(encoding, part.unit, self.geometry.cache_dtype) for part in self.geometry.parts)
        return next((reason for reason in reasons if reason is not None), None)

    def check(self, encoding: Encoding, setting: str) -> None:
        """Pass only an encoding that suits.

        Raises:
            ConfigurationError: it does not; the text names the setting, the reason and what suits.
        """
        if encoding is Encoding.RAW or (reason := self.reasons[encoding]) is None:
            return
        suitable = ["raw", *(codecs.name_of(other) for other in self.packed_bytes), "zstd", "lz4"]
        raise ConfigurationError(
            f"{setting} is {codecs.name_of(encoding)}, which does not suit this engine's KV cache: {reason}. "
            f"Set {setting} to one of {', '.join(suitable)}"
        )

    def encode(self, slot: memoryview, missing: Sequence[int], encoding: Encoding, out: memoryview) -> None:
        """Write the packed form of a slot, of which so many blocks are missing of each group, to ``out``.

        Raises:
            Incompressible: exp12 cannot hold it; what was written is undefined.
            NativeError: something does not fit, or the library failed.
        """
        with self._context() as context:
            self._move(slot, missing, encoding, out, context.gather)
        room = np.frombuffer(out, np.uint8)
        for part, start, size in self._packed(encoding):
            lacking = _lacking(missing, part)
            if lacking:
                units = room[start : start + size].reshape(len(part.places), part.blocks, -1)
                units[:, :lacking] = 0

    def decode(self, packed: memoryview, slot: memoryview, missing: Sequence[int], encoding: Encoding) -> None:
        """Fill a slot from a packed form, which must not overlap it.

        Raises:
            NativeError: no encoder writes such bytes, or the library failed; the slot's content is undefined.
        """
        with self._context() as context:
            self._move(slot, missing, encoding, packed, context.scatter)
        room = np.frombuffer(slot, np.uint8)
        for gap in self.geometry.gaps:
            _zero(room, gap)
        for lacking, pages in zip(missing, self.geometry.pages, strict=bool(missing)):
            for start, nbytes in pages:
                room[start : start + lacking * nbytes] = 0

    def close(self) -> None:
        for context in self._contexts:
            context.close()

    def _move(
        self,
        slot: memoryview,
        missing: Sequence[int],
        encoding: Encoding,
        packed: memoryview,
        call: Callable[..., None],
    ) -> None:
        if slot.nbytes < self.geometry.payload_bytes or packed.nbytes != self.packed_bytes.get(encoding):
            raise NativeError(f"{packed.nbytes} bytes of {encoding.name} do not belong to a slot of {slot.nbytes}")
        base, form = _address(slot), _address(packed)
        for part, start, size in self._packed(encoding):
            lacking = _lacking(missing, part)
            if lacking < part.blocks:
                view = _view(part, base, slot.nbytes)
                span = Span(form + start, size, part.blocks - lacking, lacking, part.blocks)
                call(view, range(lacking, part.blocks), [span], encoding=encoding)

    def _packed(self, encoding: Encoding) -> Iterable[tuple[Part, int, int]]:
        """Each part with the place and the size of its units in the packed form."""
        at = 0
        for part in self.geometry.parts:
            size = _part_bytes(encoding, part)
            yield part, at, size
            at += size

    @contextmanager
    def _context(self) -> Iterator[Context]:
        with self._lock:
            context = self._contexts.pop() if self._contexts else None
        context = context or Context("cpu", threads=1)
        try:
            yield context
        finally:
            with self._lock:
                self._contexts.append(context)


def _part_bytes(encoding: Encoding, part: Part) -> int:
    return part.units * codecs.unit_bytes(encoding, part.unit)


def _lacking(missing: Sequence[int], part: Part) -> int:
    return missing[part.group] * part.split if missing else 0


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def _view(part: Part, base: int, size: int) -> View:
    return View(
        [base + place for place in part.places],
        begin=base,
        end=base + size,
        block_stride=part.block_stride,
        block_count=part.blocks,
        content_bytes=part.content_bytes,
        head_stride=part.head_stride,
        token_stride=part.token_stride,
        heads=part.heads,
        tokens=part.tokens,
        dtype=part.element,
        k=part.k,
        v=part.v,
    )


def _zero(room: Any, gap: Gap) -> None:
    last = gap.start + (gap.times - 1) * gap.stride + gap.size
    if last > len(room):
        raise NativeError(f"{gap} is not in a slot of {len(room)} bytes")
    every = np.lib.stride_tricks.as_strided(room[gap.start :], (gap.times, gap.size), (gap.stride, 1))
    every[...] = 0
