"""Memory to move, and the time that moving it takes by the device's own clock."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker_connector import native
from worker_connector.native_types import ElementType, Rotation, View

GIB = 1 << 30


@dataclass
class Memory:
    """A cache on the GPU and page-locked memory, both full of numbers like a KV cache's."""

    cache: Any
    host: Any

    @classmethod
    def of(cls, size: int, device: Any) -> "Memory":
        cache = torch.empty(size, dtype=torch.uint8, device=device)
        numbers = cache.view(torch.bfloat16)
        for at in range(0, numbers.numel(), 1 << 27):
            numbers[at : at + (1 << 27)].normal_()
        with native.Context(device) as context:
            slab = context.allocate(size)
        host = torch.frombuffer(slab.view(), dtype=torch.uint8)[:size]
        host.copy_(cache)
        return cls(cache, host)


def once(stream: Any, work: Callable[[], None]) -> float:
    """Seconds between two events around the work, which is enqueued on the stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        begin.record(stream)
        work()
        end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def seconds(stream: Any, work: Callable[[], None], *, rounds: int = 5, warm: int = 1) -> float:
    """The median of a few."""
    for _ in range(warm):
        once(stream, work)
    return statistics.median(once(stream, work) for _ in range(rounds))


def pages(memory: Memory, page: int, count: int, layers: int = 1) -> View:
    """Plain pages of one size, one behind the other, ``count`` in each layer."""
    base = memory.cache.data_ptr()
    return View(
        [base + layer * count * page for layer in range(layers)],
        begin=base,
        end=base + memory.cache.numel(),
        block_stride=page,
        block_count=count,
        content_bytes=page,
        head_stride=page,
        token_stride=page,
    )


def llama(memory: Memory, blocks: int) -> View:
    """Llama-3.1-8B in bf16, 16 tokens to a block, layers outermost: 32 MiB in 256 tokens."""
    layers, heads, tokens, content = 32, 8, 16, 512
    page = heads * tokens * content
    base = memory.cache.data_ptr()
    assert layers * blocks * page <= memory.cache.numel()
    return View(
        [base + layer * blocks * page for layer in range(layers)],
        begin=base,
        end=base + memory.cache.numel(),
        block_stride=page,
        head_stride=tokens * content,
        token_stride=content,
        block_count=blocks,
        heads=heads,
        tokens=tokens,
        content_bytes=content,
        dtype=ElementType.BF16,
        k=(0, 256),
        v=(256, 256),
    )


def rotation(distance: int, pairs: int = 64, base: float = 500000.0) -> Rotation:
    angles = distance * base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return Rotation(angles.cos().tolist(), angles.sin().tolist())


def apart(count: int, seed: int = 0) -> list[int]:
    """Block ids of which no two that follow each other are neighbours in the cache, but by chance."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def spans(memory: Memory, sizes: Sequence[int], blocks: int) -> list[tuple[int, ...]]:
    """One packed form behind the other in host memory."""
    found, at = [], memory.host.data_ptr()
    for size in sizes:
        found.append((at, size, blocks, 0, blocks, 0))
        at += size
    return found
