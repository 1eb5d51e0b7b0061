"""What the latest prompts begin with, as a tree, and which workers hold it in which tier.

Of a prompt only its chunk hashes are kept, which say nothing of its text. Prompts that begin alike share a branch; a
branch is as long as all its prompts agree. What one prompt alone goes on with is no branch.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from router.index import Index

KEPT = 128
"""Prompts remembered."""
MOST_CHUNKS = 1024
"""Chunks looked at of one prompt."""
MOST_NODES = 40
MOST_HOLDERS = 8
_DEPTH = 4
_BRANCHES = 5
_NODES_AT_ONCE = 8

Hashes = Mapping[tuple[str, int], Sequence[Sequence[bytes]]]


class Prompt(msgspec.Struct, array_like=True):
    """One prompt: the model and the chunk size its hashes descend from, and its chunks."""

    model: str
    chunk_size: int
    chunks: list[bytes]


class Node(msgspec.Struct):
    """A branch: the chunks from ``start`` to ``end`` of a path, and how many of the latest prompts have them."""

    path: Prompt
    depth: int
    start: int
    end: int
    prompts: int


def paths(seen: Iterable[Hashes]) -> list[Prompt]:
    """The latest prompts, latest last."""
    return [
        Prompt(model, size, list(chunks[:MOST_CHUNKS]))
        for hashes in tuple(seen)
        for (model, size), prompts in hashes.items()
        for chunks in prompts
        if chunks
    ]


def tree(of: Sequence[Prompt]) -> list[Node]:
    """Branches in depth-first order, those of the most prompts first; at most ``MOST_NODES``."""
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for path in of:
        groups.setdefault((path.model, path.chunk_size), []).append(path)
    nodes: list[Node] = []
    for members in sorted(groups.values(), key=len, reverse=True):
        for node in _branches(members, 0, 0):
            nodes.append(node)
            if len(nodes) == MOST_NODES:
                return nodes
    return nodes


def _branches(members: Sequence[Prompt], start: int, depth: int) -> Iterator[Node]:
    by_next: dict[bytes, list[Prompt]] = {}
    for path in members:
        if len(path.chunks) > start:
            by_next.setdefault(path.chunks[start], []).append(path)
    shared = [branch for branch in by_next.values() if len(branch) > 1 or not depth]
    for branch in sorted(shared, key=len, reverse=True)[: _BRANCHES if depth else MOST_NODES]:
        end = _common(branch, start)
        longest = max(branch, key=lambda path: len(path.chunks))
        yield Node(longest, depth, start, end, len(branch))
        if depth + 1 < _DEPTH and len(branch) > 1:
            yield from _branches(branch, end, depth + 1)


def _common(branch: Sequence[Prompt], start: int) -> int:
    """How far all paths agree. Equal hashes mean equal chunks before them, so a bisection finds it."""
    low, high = start + 1, min(len(path.chunks) for path in branch)
    while low < high:
        middle = (low + high + 1) // 2
        if len({path.chunks[middle - 1] for path in branch}) == 1:
            low = middle
        else:
            high = middle - 1
    return low


async def described(index: Index, nodes: Sequence[Node], workers: Mapping[tuple[str, int], list[str]]) -> list[Any]:
    """Every branch with the workers that hold the most of its path, and in which tiers. ``workers`` are those that name
    chunks alike. O(branches · (chunks + workers)), in portions."""
    found = []
    for number, node in enumerate(nodes):
        if number and not number % _NODES_AT_ONCE:
            await asyncio.sleep(0)
        path = node.path
        found.append(
            {
                "id": path.chunks[node.end - 1].hex(),
                "model": path.model,
                "depth": node.depth,
                "start_tokens": node.start * path.chunk_size,
                "end_tokens": node.end * path.chunk_size,
                "prompts": node.prompts,
            }
            | _holders(index, node, workers.get((path.model, path.chunk_size), []))
        )
    return found


def _holders(index: Index, node: Node, workers: Sequence[str]) -> dict[str, Any]:
    size, chunks = node.path.chunk_size, node.path.chunks[: node.end]
    hits = index.lookup(chunks, workers)
    holding = [name for name in workers if hits[name].total > node.start]
    holding.sort(key=lambda name: (-hits[name].total, -hits[name].gpu, name))
    holders = [
        {
            "worker": name,
            "tokens": hits[name].total * size,
            "tiers": {tier: count * size for tier, count in index.tiers(name, chunks).items() if count},
        }
        for name in holding[:MOST_HOLDERS]
    ]
    return {"holders": holders, "more_holders": len(holding) - len(holders)}
