"""A gather and scatter of pages in Triton, on as many programs as ours has thread blocks: page-locked memory is read and
written by the kernel itself."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def move_pages(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0917
    cache,  # noqa: ANN001
    host,  # noqa: ANN001
    index,  # noqa: ANN001
    count,  # noqa: ANN001
    words,  # noqa: ANN001
    LOAD: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    parts = words // BLOCK
    for item in range(tl.program_id(0), count * parts, tl.num_programs(0)):
        page = (item // parts).to(tl.int64)
        inside = (item % parts) * BLOCK + tl.arange(0, BLOCK)
        there = cache + tl.load(index + page) * words + inside
        here = host + page * words + inside
        if LOAD:
            tl.store(there, tl.load(here))
        else:
            tl.store(here, tl.load(there))


__all__: list[Any] = ["move_pages"]
