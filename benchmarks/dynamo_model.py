"""Dynamo's KV router, as its formula: the worker with the least

    prefill_load_scale * max(active_prefill + prompt - credits, 0) + decode

in blocks, with scale and credit 1 and temperature 0. ``active_prefill`` is what was sent to a worker and has no first
token yet; ``credits`` is the prompt's overlap with the worker's cache; ``decode`` is the distinct blocks of the
requests the worker would have in flight with this one. Equal workers are chosen from at random.
"""

import random
from collections import Counter

from benchmarks.traces import BLOCK_TOKENS, Request
from router.index import Index


class _Active:
    """What a worker has in flight, as Dynamo's router counts it."""

    def __init__(self) -> None:
        self.prefill = 0
        self.blocks: Counter[bytes] = Counter()

    def decode_with(self, request: Request) -> int:
        return len(self.blocks) + sum(block not in self.blocks for block in request.blocks)


class DynamoModel:
    """Chooses for ``workers``, by the index it is given."""

    name = "dynamo"

    def __init__(self, workers: list[str], index: Index, seed: int, prefill_load_scale: float = 1.0) -> None:
        self._workers = workers
        self._index = index
        self._rng = random.Random(seed)
        self._scale = prefill_load_scale
        self._active = {worker: _Active() for worker in workers}

    def choose(self, request: Request) -> str:
        """The worker's name. O(workers * blocks)."""
        hits = self._index.lookup(request.whole, self._workers)
        costs = {worker: self._cost(worker, request, hits[worker].total) for worker in self._workers}
        least = min(costs.values())
        return self._rng.choice([worker for worker, cost in costs.items() if cost == least])

    def sent(self, worker: str, request: Request, hit_blocks: int) -> int:
        """Count a request that was sent; the prefill tokens to take back with ``first_token``."""
        active = self._active[worker]
        tokens = max(0, request.input_tokens - hit_blocks * BLOCK_TOKENS)
        active.prefill += tokens
        active.blocks.update(request.blocks)
        return tokens

    def first_token(self, worker: str, tokens: int) -> None:
        self._active[worker].prefill -= tokens

    def finished(self, worker: str, request: Request) -> None:
        active = self._active[worker]
        active.blocks.subtract(request.blocks)
        for block in request.blocks:
            if not active.blocks[block]:
                del active.blocks[block]

    def _cost(self, worker: str, request: Request, hit_blocks: int) -> float:
        active = self._active[worker]
        prefill = max(active.prefill + request.input_tokens - hit_blocks * BLOCK_TOKENS, 0) / BLOCK_TOKENS
        return self._scale * prefill + active.decode_with(request)
