"""Keeping blocks of an engine's KV cache from being given to other requests."""

from collections.abc import Sequence
from typing import Any


class EngineBlocks:
    """By the counts of use that the engine keeps of its blocks itself. On the engine's thread only; ``manager`` is vLLM's
    KVCacheManager, or its BlockPool."""

    def __init__(self, manager: Any) -> None:
        self._pool = getattr(manager, "block_pool", manager)

    def hold(self, blocks: Sequence[int]) -> None:
        """Count a use of each block."""
        self._pool.touch([self._pool.blocks[block] for block in blocks])

    def let_go(self, blocks: Sequence[int]) -> None:
        """End that use of each; those of no other use can be given to other requests, the last first."""
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])
