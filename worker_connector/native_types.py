"""What calls of the native core are about, as the C structs that it takes: made once, used for many calls."""

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from struct import error as StructError  # noqa: N812 - it is an exception
from typing import Any, NamedTuple, Self

from worker_connector.errors import NativeRefusal
from worker_connector.native_memory import memory_of

ALL_TOKENS = 2**31 - 1


class Status(IntEnum):
    """``wr_status``."""

    OK = 0
    INVALID = -1
    OUT_OF_BOUNDS = -2
    UNSUPPORTED = -3
    INCOMPRESSIBLE = -4
    NO_MEMORY = -5
    DEVICE = -6
    CORRUPT = -7


class Encoding(IntEnum):
    """``wr_encoding``; docs/kv-codecs.md specifies them."""

    RAW = 0
    FP8 = 1
    K16_V8 = 2
    EXP12 = 3
    INT8 = 4


class ElementType(IntEnum):
    """``wr_dtype``."""

    BYTES = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    F64 = 4


class Route(IntEnum):
    """``wr_path``: how the CUDA backend moves bytes."""

    AUTO = 0
    COPY_ENGINE = 1
    KERNEL = 2
    STAGED = 3


class InstructionSet(IntEnum):
    """``wr_isa``."""

    BEST = 0
    PORTABLE = 1
    AVX2 = 2
    AVX512 = 3
    NEON = 4


class Granted(IntFlag):
    """What ``Context.allocate`` could give."""

    LOCKED = 1
    HUGE = 2
    TRANSPARENT = 4
    BOUND = 8


_VIEW = Struct("=QQQqqq10i")
_RANGE = Struct("=6i")
_ROTATION = Struct("=QQiiii")


class View:
    """Where KV bytes are: ``wr_view``. ``layers`` are the addresses of each layer's block 0, head 0, token 0; all that is
    touched lies in ``[begin, end)``. Strides and offsets are in bytes. Made once and used for many calls.

    Raises:
        NativeRefusal: a value does not fit its field.
    """

    __slots__ = (
        "_layers",
        "_packed",
        "address",
        "block_count",
        "device",
        "heads",
        "layer_count",
        "owner",
        "tokens",
        "whole",
    )

    def __init__(
        self,
        layers: Sequence[int],
        *,
        begin: int,
        end: int,
        block_stride: int,
        block_count: int,
        content_bytes: int,
        head_stride: int = 0,
        token_stride: int = 0,
        heads: int = 1,
        tokens: int = 1,
        dtype: ElementType = ElementType.BYTES,
        k: tuple[int, int] = (0, 0),
        v: tuple[int, int] = (0, 0),
        device: str | None = None,
    ) -> None:
        """``k`` and ``v`` are (offset, bytes) within a token's content. ``device``, if given, must be the context's."""
        self.owner: Any = None
        self._layers = array_of("Q", layers)
        self.layer_count, self.block_count = len(self._layers), block_count
        self.heads, self.tokens, self.device = heads, tokens, device
        counts = (self.layer_count, block_count, heads, tokens, content_bytes, int(dtype), *k, *v)
        strides = (block_stride, head_stride, token_stride)
        self._packed = packed(_VIEW, self._layers.buffer_info()[0], begin, end, *strides, *counts)
        self.address = self._packed.buffer_info()[0]
        self.whole = Range(heads)

    @classmethod
    def of_bytes(
        cls,
        layers: Sequence[int],
        *,
        begin: int,
        end: int,
        block_stride: int,
        block_count: int,
        page_bytes: int,
        device: str | None = None,
    ) -> Self:
        """A cache whose pages are plain bytes: nothing about their inside is known, so they move whole."""
        return cls(
            layers,
            begin=begin,
            end=end,
            block_stride=block_stride,
            block_count=block_count,
            content_bytes=page_bytes,
            device=device,
        )

    @classmethod
    def of_arrays(
        cls, layers: Sequence[Any], *, dtype: ElementType | None = None, value_elements: int | None = None
    ) -> Self:
        """Of one array or tensor ``[block, head, token, content]`` per layer, in any order of strides; all layers alike.
        The last ``value_elements`` of the content are V, half of them if it is not said. The view keeps the arrays.

        Raises:
            NativeRefusal: shapes, strides, element types or devices differ, or content is not contiguous.
        """
        memories = [memory_of(layer, contiguous=False) for layer in layers]
        if not memories or any(len(each.shape) != 4 for each in memories):
            raise NativeRefusal("a cache is given as one array [block, head, token, content] per layer")
        first = memories[0]
        if any(each.alike != first.alike for each in memories):
            raise NativeRefusal("the layers of one view have the same shape, strides, element type and device")
        blocks, heads, tokens, content = first.shape
        size = first.element_bytes
        if content > 1 and first.strides[3] != size:
            raise NativeRefusal(
                f"a token's content lies apart: its elements are {first.strides[3]} bytes from each other"
            )
        values = content // 2 if value_elements is None else value_elements
        keys = content - values
        view = cls(
            [each.address for each in memories],
            begin=min(each.begin for each in memories),
            end=max(each.end for each in memories),
            block_stride=first.strides[0],
            head_stride=first.strides[1],
            token_stride=first.strides[2],
            block_count=blocks,
            heads=heads,
            tokens=tokens,
            content_bytes=content * size,
            dtype=ElementType[first.dtype] if dtype is None else dtype,
            k=(0, keys * size),
            v=(keys * size, values * size),
            device=first.device,
        )
        view.owner = layers
        return view


class Range:
    """Which part of each block is moved: ``wr_range``. Without more than the number of heads, all of it."""

    __slots__ = ("_packed", "address")

    def __init__(
        self,
        heads: int,
        packed_heads: int | None = None,
        *,
        first_head: int = 0,
        packed_first_head: int = 0,
        first_token: int = 0,
        token_count: int = ALL_TOKENS,
    ) -> None:
        total = heads if packed_heads is None else packed_heads
        self._packed = packed(_RANGE, first_head, heads, packed_first_head, total, first_token, token_count)
        self.address = self._packed.buffer_info()[0]


class _SpanFields(NamedTuple):
    packed: int
    packed_bytes: int
    block_count: int
    packed_first_block: int
    packed_blocks: int
    reserved: int = 0


class Span(_SpanFields):
    """Blocks that belong together, and the packed form of ``packed_bytes`` at ``packed`` that holds them: ``wr_span``.
    ``owner`` is kept as long as the span."""

    owner: Any = None


class Rotation:
    """A rotation of K by one distance: ``wr_rotation``. ``cosines`` and ``sines`` are of (new position - old position)
    times each frequency; ``offset`` is where the rotated elements begin, in bytes into K."""

    __slots__ = ("_cosines", "_packed", "_sines", "address")

    def __init__(
        self, cosines: Iterable[float], sines: Iterable[float], *, offset: int = 0, interleaved: bool = False
    ) -> None:
        self._cosines, self._sines = array("d", cosines), array("d", sines)
        if len(self._cosines) != len(self._sines):
            raise NativeRefusal(f"{len(self._cosines)} cosines and {len(self._sines)} sines")
        tables = (self._cosines.buffer_info()[0], self._sines.buffer_info()[0])
        self._packed = packed(_ROTATION, *tables, len(self._cosines), offset, int(interleaved), 0)
        self.address = self._packed.buffer_info()[0]


def array_of(kind: str, values: Iterable[int]) -> "array[int]":
    try:
        return array(kind, values)
    except (TypeError, OverflowError) as error:
        raise NativeRefusal(f"not a list of numbers that fit the native core: {error}") from error


def packed(form: Struct, *values: int) -> "array[int]":
    """A C struct that stays where it is."""
    try:
        return array("B", form.pack(*values))
    except StructError as error:
        raise NativeRefusal(f"{values} do not fit the native core: {error}") from error
