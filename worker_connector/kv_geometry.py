"""Where K and V of every layer, block, head and token are inside a slot, so that they can be encoded.

Raw chunks need none of this: a slot's bytes are the cache's (``regions``). An encoding needs to know which of them are
elements of one token and head, and which of those K. vLLM describes its cache by ``KVCacheTensor``s, which give the page of
layer ``l`` and block ``b``, and by the physical order of the axes, which gives the strides inside a page; this is the same
arithmetic as its ``compute_layout_strides``. Read from its objects by field name, so nothing here imports vLLM.

What a page holds, by the fields of its spec:

- content of K and V side by side, ``head_size`` and ``head_size_v`` elements (what attention backends do on GPUs), or of a
  latent that is all K (MLA);
- ``rows``: elements of which only the row is known that they share. Backends that keep K and V in two slots of heads
  arrange them as their kernels want, and so does the engine on processors, where a head's page is its K and then its V.

Anything else cannot be described, and is kept raw.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from worker_connector.codecs import ELEMENT_BYTES, Unit, element_named
from worker_connector.errors import UnsupportedCache
from worker_connector.native_types import ElementType
from worker_connector.regions import Region, SlotLayout, layer_spec

ORDERS = frozenset({"LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"})
"""Physical orders of the axes layer, block, head, token and content, outermost first."""


@dataclass(frozen=True, slots=True)
class Part:
    """Layers of one group that lie alike. ``places`` is where in a slot each one's block 0, head 0, token 0 begins; strides
    and sizes are in bytes, ``k`` and ``v`` are (offset, bytes) within a token's content. There are ``split`` blocks for
    each of the engine's, which are what a slot may lack."""

    group: int
    places: tuple[int, ...]
    block_stride: int
    head_stride: int
    token_stride: int
    blocks: int
    heads: int
    tokens: int
    content_bytes: int
    element: ElementType
    k: tuple[int, int]
    v: tuple[int, int]
    split: int = 1
    rows: bool = False

    @property
    def unit(self) -> Unit:
        size = ELEMENT_BYTES[self.element]
        return Unit(self.element, self.tokens, self.k[1] // size, self.v[1] // size, self.content_bytes, rows=self.rows)

    @property
    def units(self) -> int:
        """Units of one slot."""
        return len(self.places) * self.blocks * self.heads


class Gap(NamedTuple):
    """Bytes of a slot that no layer uses: ``size`` of them at ``start``, and so ``times`` altogether, ``stride`` from each other."""

    start: int
    size: int
    stride: int
    times: int


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """All of a slot. ``pages`` is, for each group, where its pages begin and their size, ``[region][block]``.
    ``payload_bytes`` is the raw size, ``cache_dtype`` the engine's setting."""

    parts: tuple[Part, ...]
    gaps: tuple[Gap, ...]
    pages: tuple[tuple[tuple[int, int], ...], ...]
    payload_bytes: int
    cache_dtype: str = "auto"


def describe_slot(
    cache: Any,
    layout: SlotLayout,
    *,
    cache_dtype: str = "auto",
    on_processor: bool = False,
    splits: Mapping[str, int] | None = None,
) -> SlotGeometry:
    """What a slot of ``layout`` holds. ``cache`` is the ``KVCacheConfig``; ``on_processor`` tells that attention runs on
    the host, ``splits`` into how many blocks the backend divides a block, by layer. Milliseconds, once.

    Raises:
        UnsupportedCache: it cannot be told which bytes are whose.
    """
    order = getattr(cache.kv_cache_layout, "name", cache.kv_cache_layout)
    if order not in ORDERS:
        raise UnsupportedCache(f"the order of the KV cache's axes is {order!r}, which is not known")
    parts: list[Part] = []
    for index, group in enumerate(cache.kv_cache_groups):
        slots = _Slots(layout, index)
        way = _Way(cache, group, order, on_processor, splits or {})
        parts += _joined([_layer(way, slots, place) for place in _places(cache, group)])
    gaps = tuple(gap for index in range(len(cache.kv_cache_groups)) for gap in _gaps(parts, layout, index))
    pages = tuple(
        tuple((start, region.nbytes) for region, start in zip(regions, starts, strict=True))
        for regions, starts in zip(layout.regions, layout.starts, strict=True)
    )
    return SlotGeometry(tuple(parts), gaps, pages, layout.payload_bytes, cache_dtype)


class _Way(NamedTuple):
    """How the cache is laid out."""

    cache: Any
    group: Any
    order: str
    on_processor: bool
    splits: Mapping[str, int]


class _Place(NamedTuple):
    layer: str
    tensor: Any
    at: int


class _Slots:
    """Where bytes of a group's blocks are in a slot."""

    def __init__(self, layout: SlotLayout, group: int) -> None:
        self.group = group
        self.blocks = layout.blocks_per_chunk[group]
        self._regions = sorted(
            zip(layout.regions[group], layout.starts[group], strict=True), key=lambda pair: pair[0].offset
        )
        self._offsets = np.array([region.offset for region, _ in self._regions])

    def of(self, address: int, nbytes: int) -> tuple[int, Region]:
        """The place of bytes of block 0, and its region."""
        at = int(np.searchsorted(self._offsets, address, "right")) - 1
        region, start = self._regions[max(at, 0)]
        inside = address - region.offset
        if not 0 <= inside <= region.nbytes - nbytes:
            raise UnsupportedCache(f"bytes {address} to {address + nbytes} of block 0 are in no page")
        return start + inside, region


def _places(cache: Any, group: Any) -> Iterator[_Place]:
    """The group's layers, each page once."""
    seen = set()
    for tensor in cache.kv_cache_tensors:
        for index, layer in enumerate(tensor.layers):
            address = tensor.offset + index * tensor.layer_stride
            if layer in group.layer_names and address not in seen:
                seen.add(address)
                yield _Place(layer, tensor, index)


class _Page(NamedTuple):
    """The inside of a page: counts, and which bytes of a token's content are what."""

    heads: int
    tokens: int
    content: int
    element: ElementType
    k: tuple[int, int]
    v: tuple[int, int]
    rows: bool


def _layer(way: _Way, slots: _Slots, place: _Place) -> Part:
    spec, split = layer_spec(way.group, place.layer), way.splits.get(place.layer, 1)
    page = _divided(_page(spec, on_processor=way.on_processor), way.order, split)
    head, token = _strides(way.order, page, place.tensor, way.cache.num_blocks)
    if way.on_processor and spec.head_size_v:
        page, token = _in_halves(page, token)
    first = place.tensor.offset + place.at * place.tensor.layer_stride
    run = (page.tokens - 1) * token + page.content
    found = [slots.of(first + number * head, run) for number in range(page.heads)]
    base, region = found[0]
    head_stride = found[1][0] - base if page.heads > 1 else run
    if any(
        at != base + number * head_stride or other.nbytes != region.nbytes for number, (at, other) in enumerate(found)
    ):
        raise UnsupportedCache(f"the heads of {place.layer} do not lie evenly in a slot")
    if split > 1 and region.nbytes != page.heads * page.tokens * page.content * split:
        raise UnsupportedCache(f"the blocks of {place.layer} are divided, and their pages are not dense")
    return Part(
        slots.group,
        (base,),
        region.nbytes // split,
        head_stride,
        token,
        slots.blocks * split,
        page.heads,
        page.tokens,
        page.content,
        page.element,
        page.k,
        page.v,
        split,
        page.rows,
    )


def _page(spec: Any, *, on_processor: bool) -> _Page:
    element = element_named(str(spec.dtype))
    size = ELEMENT_BYTES[element]
    tokens, content = int(spec.num_states), int(spec.state_content_size_bytes)
    slots, heads = int(spec.num_heads), int(spec.num_kv_heads)
    keys, values = int(spec.head_size) * size, int(spec.head_size_v) * size
    if tokens <= 0 or content % size or getattr(spec.kv_quant_mode, "value", spec.kv_quant_mode):
        raise UnsupportedCache("pages hold more than plain elements")
    if slots == heads and content == keys + values:
        if on_processor:
            return _Page(heads, tokens, content, element, (0, content), (0, 0), rows=True)
        return _Page(heads, tokens, content, element, (0, keys), (keys if values else 0, values), rows=False)
    if slots == 2 and keys == values and content == heads * keys:
        return _Page(slots, tokens, content, element, (0, content), (0, 0), rows=True)
    raise UnsupportedCache(
        f"pages of {slots} times {tokens} times {content} bytes are not {heads} heads of {keys} bytes of K and {values} of V"
    )


def _strides(order: str, page: _Page, tensor: Any, blocks: int) -> tuple[int, int]:
    """Bytes from head to head and from token to token in the cache."""
    if order.endswith("NHC"):
        return page.content, page.heads * page.content
    if order == "LHBNC":
        return tensor.block_stride * blocks, page.content
    if order == "BHLNC":
        return tensor.layer_stride * len(tensor.layers), page.content
    return page.tokens * page.content, page.content


def _divided(page: _Page, order: str, split: int) -> _Page:
    """The page of one of the ``split`` blocks that make one of the engine's."""
    if split > 1 and (page.tokens % split or order in {"LHBNC", "BHLNC"}):
        raise UnsupportedCache(f"blocks of {page.tokens} tokens are divided by {split} in the order {order}")
    return page._replace(tokens=page.tokens // split)


def _in_halves(page: _Page, token: int) -> tuple[_Page, int]:
    """A head's K and then its V, each with rows of half the content."""
    if token != page.content or page.content % (2 * ELEMENT_BYTES[page.element]):
        raise UnsupportedCache("on processors, the heads of a page are expected to be outside its tokens")
    half = page.content // 2
    return page._replace(tokens=2 * page.tokens, content=half, k=(0, half)), half


def _joined(found: Sequence[Part]) -> list[Part]:
    """Parts that differ in nothing but their places as one, in the order of the first of each."""
    kinds: dict[Part, list[int]] = {}
    for part in found:
        kinds.setdefault(replace(part, places=()), []).extend(part.places)
    return [replace(part, places=tuple(places)) for part, places in kinds.items()]


def _gaps(parts: Sequence[Part], layout: SlotLayout, group: int) -> Iterator[Gap]:
    """What the group's layers leave of its pages. Refuses layers that overlap."""
    own = [part for part in parts if part.group == group]
    runs = np.concatenate([_runs(part) for part in own]) if own else np.empty((0, 2), np.int64)
    runs = runs[np.argsort(runs[:, 0])]
    if (runs[1:, 0] < runs[:-1, 1]).any():
        raise UnsupportedCache(f"layers of KV-cache group {group} share a part of their bytes")
    blocks = layout.blocks_per_chunk[group]
    for region, start in zip(layout.regions[group], layout.starts[group], strict=True):
        end = start + region.nbytes
        inside = runs[(runs[:, 0] >= start) & (runs[:, 0] < end)]
        edges = [start, *inside.flatten().tolist(), end]
        for begin, until in zip(edges[::2], edges[1::2], strict=True):
            if until > begin:
                yield Gap(begin, until - begin, region.nbytes, blocks)


def _runs(part: Part) -> Any:
    """Beginnings and ends of all contents of the part's blocks that are one of the engine's blocks, the first."""
    begins = np.array(part.places, np.int64)
    for count, stride in (
        (part.split, part.block_stride),
        (part.heads, part.head_stride),
        (part.tokens, part.token_stride),
    ):
        begins = np.add.outer(begins, np.arange(count, dtype=np.int64) * stride).flatten()
    return np.stack([begins, begins + part.content_bytes], 1)
