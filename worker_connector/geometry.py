"""What a chunk is made of in this engine: its KV-cache groups and the blocks of each.

Everything is read from the fields of vLLM's ``KVCacheConfig`` by name, so nothing here imports vLLM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import Any

from worker_connector.errors import ConfigurationError, UnsupportedCache

_FULL = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_WINDOWED = frozenset({"SlidingWindowSpec"})
_LOCAL = frozenset({"ChunkedLocalAttentionSpec"})
_UNIFORM = "UniformTypeKVCacheSpecs"


@dataclass(frozen=True, slots=True)
class Group:
    """One KV-cache group. ``window`` is how many tokens back its layers read, 0 for all of them; ``local`` is the
    length of chunked-local attention, 0 where there is none."""

    index: int
    kind: str
    block_size: int
    blocks_per_chunk: int
    window: int = 0
    local: int = 0

    @property
    def reads_everything(self) -> bool:
        return not self.window and not self.local

    def first_needed(self, tokens: int) -> int:
        """The first token whose KV is still read once ``tokens`` tokens are computed."""
        if self.window:
            return max(0, tokens - self.window + 1)
        return tokens // self.local * self.local if self.local else 0

    def can_repeat_last(self, tokens: int) -> bool:
        """Whether the blocks still read after ``tokens`` tokens are enough to compute the last of them again."""
        return self.first_needed(tokens - 1) // self.block_size == self.first_needed(tokens) // self.block_size


def describe_groups(cache: Any, parallel: Any, chunk_size: int) -> tuple[Group, ...]:
    """The groups of a ``KVCacheConfig``, in the order of its block tables. ``parallel`` is the ``ParallelConfig``.

    Raises:
        UnsupportedCache: a group's state cannot be stored chunk by chunk.
        ConfigurationError: a group's block size does not divide ``chunk_size``.
    """
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedCache(f"{name} spreads each block's tokens over ranks")
    if not cache.kv_cache_groups:
        raise UnsupportedCache("the model has no KV cache")
    groups = tuple(_describe(index, group, chunk_size) for index, group in enumerate(cache.kv_cache_groups))
    unit = lcm(*(group.block_size for group in groups))
    if chunk_size % unit:
        sizes = ", ".join(str(unit * factor) for factor in _nearest_factors(chunk_size, unit))
        raise ConfigurationError(
            f"chunk_size is {chunk_size}, but the engine's KV-cache blocks need a multiple of {unit} tokens: set "
            f"chunk_size to one of {sizes}"
        )
    return groups


def _nearest_factors(chunk_size: int, unit: int) -> list[int]:
    near = max(1, chunk_size // unit)
    return sorted({1, near, near + 1, 2 * near})


def _describe(index: int, group: Any, chunk_size: int) -> Group:
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        raise UnsupportedCache(f"KV-cache group {index} is kept outside the GPU's block pool")
    spec = group.kv_cache_spec
    members = list(spec.kv_cache_specs.values()) if type(spec).__name__ == _UNIFORM else [spec]
    kind = _common_kind(index, members)
    window, local = _reach(members)
    block_size = spec.block_size
    return Group(index, kind, block_size, max(1, chunk_size // block_size), window, local)


def _common_kind(index: int, members: Iterable[Any]) -> str:
    kinds = {type(member).__name__ for member in members}
    for family in (_FULL, _WINDOWED, _LOCAL):
        if kinds <= family:
            return min(kinds)
    raise UnsupportedCache(f"KV-cache group {index} is of kind {', '.join(sorted(kinds))}")


def _reach(members: list[Any]) -> tuple[int, int]:
    name = type(members[0]).__name__
    if name in _WINDOWED:
        return max(spec.sliding_window + getattr(spec, "extra_retained_tokens", 0) for spec in members), 0
    if name in _LOCAL:
        return 0, max(spec.attention_chunk_size for spec in members)
    return 0, 0
