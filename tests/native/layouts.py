"""KV-cache layouts as strides: what vLLM lays out, and what lies between its pages.

A layout's name is its physical order, outermost first: L layer, B block, H head, N token, C content. Everything here is
arithmetic on that name; ``test_layouts.py`` compares it with vLLM's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")

BYTES, F32, F16, BF16, F64 = range(5)
ELEMENT_BYTES = {BYTES: 1, F32: 4, F16: 2, BF16: 2, F64: 8}


@dataclass(frozen=True)
class View:
    """One homogeneous set of layers in an allocation of ``size`` bytes. Offsets and strides are in bytes."""

    layers: tuple[int, ...]
    size: int
    block_stride: int
    head_stride: int
    token_stride: int
    blocks: int
    heads: int
    tokens: int
    content: int
    dtype: int
    k_offset: int
    k_bytes: int
    v_offset: int
    v_bytes: int

    def at(self, layer: int, block: int, head: int, token: int) -> int:
        """Where the content of a token and head begins."""
        return self.layers[layer] + block * self.block_stride + head * self.head_stride + token * self.token_stride

    @property
    def page(self) -> int:
        """Bytes of a whole packed page."""
        return self.heads * self.tokens * self.content


@dataclass(frozen=True)
class Shape:
    """The logical size of a set of layers; ``k`` and ``v`` are elements per head and token, with ``gap`` bytes before,
    between and behind them that are neither, and V first where ``swapped``."""

    layers: int = 2
    blocks: int = 6
    heads: int = 3
    tokens: int = 4
    k: int = 8
    v: int = 8
    dtype: int = BF16
    gap: int = 0
    swapped: bool = False

    @property
    def content(self) -> int:
        return (self.k + self.v) * ELEMENT_BYTES[self.dtype] + 3 * self.gap

    @property
    def halves(self) -> tuple[int, int, int, int]:
        """Where K is and how long, and where V is and how long, in bytes."""
        k, v = self.k * ELEMENT_BYTES[self.dtype], self.v * ELEMENT_BYTES[self.dtype]
        if self.swapped:
            return 2 * self.gap + v, k, self.gap, v
        return self.gap, k, 2 * self.gap + k if v else 0, v

    @property
    def page(self) -> int:
        return self.heads * self.tokens * self.content


def strides(order: str, shape: Shape, *, page_bytes: int = 0) -> dict[str, int]:
    """Bytes from one to the next along each axis. Padded pages need L and B outermost, or one head."""
    counts = {"L": shape.layers, "B": shape.blocks, "H": shape.heads, "N": shape.tokens, "C": shape.content}
    innermost_of_grid = max(order.index("L"), order.index("B"))
    found, run = {}, 1
    for place, axis in reversed(list(enumerate(order))):
        if place == innermost_of_grid:
            run = max(run, page_bytes)
        found[axis] = run
        run *= counts[axis]
    return found


def dense(order: str, shape: Shape, *, page_bytes: int = 0, offset: int = 0, tail: int = 0) -> View:
    """A view of an allocation that holds nothing else, but for ``offset`` bytes before and ``tail`` bytes behind."""
    step = strides(order, shape, page_bytes=page_bytes)
    k_offset, k_bytes, v_offset, v_bytes = shape.halves
    outer = shape.layers if order[0] == "L" else shape.blocks
    return View(
        layers=tuple(offset + layer * step["L"] for layer in range(shape.layers)),
        size=offset + outer * step[order[0]] + tail,
        block_stride=step["B"],
        head_stride=step["H"],
        token_stride=step["N"],
        blocks=shape.blocks,
        heads=shape.heads,
        tokens=shape.tokens,
        content=shape.content,
        dtype=shape.dtype,
        k_offset=k_offset,
        k_bytes=k_bytes,
        v_offset=v_offset,
        v_bytes=v_bytes,
    )


def mla(order: str, shape: Shape, **places: int) -> View:
    """Latent attention: one head, all of whose content counts as K."""
    return dense(order, replace(shape, heads=1, k=shape.k + shape.v, v=0), **places)


def kernel_blocks(order: str, shape: Shape, ratio: int) -> View:
    """Manager blocks that the kernels see as ``ratio`` blocks of fewer tokens; each has its own heads and tokens."""
    if order not in {"LBHNC", "LBNHC"} or shape.tokens % ratio:
        raise ValueError(f"{order} with {shape.tokens} tokens cannot be split into {ratio} kernel blocks")
    return dense(order, replace(shape, blocks=shape.blocks * ratio, tokens=shape.tokens // ratio))


def hybrid(order: str, shapes: Iterable[Shape]) -> list[View]:
    """Groups that overlay one allocation, each from its beginning: a block belongs to one group at a time."""
    views = [dense(order, shape) for shape in shapes]
    size = max(view.size for view in views)
    if order[0] == "B":
        stride = max(view.block_stride for view in views)
        views = [replace(view, block_stride=stride) for view in views]
    return [replace(view, size=size) for view in views]


def beside(order: str, shapes: Iterable[Shape]) -> list[View]:
    """Layers of several page sizes in every block: side by side in the block, or one after the other."""
    shapes = list(shapes)
    views, at = [], 0
    whole = sum(shape.layers * shape.page for shape in shapes)
    for shape in shapes:
        view = dense(order, shape, offset=at)
        at += shape.layers * shape.page * (1 if order[0] == "B" else shape.blocks)
        views.append(replace(view, block_stride=whole) if order[0] == "B" else view)
    return [replace(view, size=whole * shapes[0].blocks) for view in views]


def regions(pages: Iterable[int], page_bytes: int, block_stride: int, blocks: int, size: int) -> View:
    """Plain bytes: one page per region and block, at ``pages[l] + b * block_stride``."""
    return View(
        layers=tuple(pages),
        size=size,
        block_stride=block_stride,
        head_stride=page_bytes,
        token_stride=page_bytes,
        blocks=blocks,
        heads=1,
        tokens=1,
        content=page_bytes,
        dtype=BYTES,
        k_offset=0,
        k_bytes=page_bytes,
        v_offset=0,
        v_bytes=0,
    )


def catalogue(shape: Shape) -> dict[str, View]:
    """Every kind of layout of about this shape, by name."""
    found = {order: dense(order, shape, offset=64, tail=32) for order in ORDERS}
    found |= {f"mla-{order}": mla(order, shape) for order in ORDERS}
    padding = -shape.page % 64 + 64
    for order in ("LBHNC", "LBNHC", "BLHNC", "BLNHC"):
        found[f"padded-{order}"] = dense(order, shape, page_bytes=shape.page + padding)
    found |= {f"split-{order}": kernel_blocks(order, shape, 2) for order in ("LBHNC", "LBNHC") if not shape.tokens % 2}
    for order in ORDERS:
        _, found[f"hybrid-{order}"] = hybrid(order, [replace(shape, layers=shape.layers + 1), shape])
    for order in ("LBHNC", "LBNHC", "BLHNC", "BLNHC"):
        found[f"beside-{order}"] = beside(order, [replace(shape, heads=shape.heads + 1), shape])[1]
    page = shape.page
    found["bytes"] = regions([0, page * shape.blocks], page, page, shape.blocks, 2 * page * shape.blocks)
    found["bytes-apart"] = regions([3], page - 1, page + 5, shape.blocks, 3 + (page + 5) * shape.blocks)
    return found
