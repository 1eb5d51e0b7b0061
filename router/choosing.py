"""The hash, look-up and choose steps: what every worker holds of a prompt, and which of them gets the request."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import msgspec

from kv_protocol.hashing import root_hash
from router.index import NO_HIT, Hit, Index
from router.parse import Request
from router.policies import Candidate, Choice, Policy, Query, candidate
from router.pool_prompts import Tokenized
from router.workers import Pool, Worker, least_bad

Namespace = tuple[str, int]


class Plan(msgspec.Struct, eq=False):
    """A request as far as it does not depend on the worker. ``hashes`` holds each prompt's chunks, by what a worker's
    chunk hashes descend from."""

    request: Request
    pool: Pool
    tokenized: Tokenized
    prompt_tokens: int
    hashes: dict[Namespace, list[list[bytes]]] = {}


class Routed(msgspec.Struct, eq=False):
    """A choice, and what the index says of every candidate: its hit summed over the request's prompts."""

    choice: Choice
    hits: dict[str, Hit]
    candidates: Sequence[Candidate]


class Chooser:
    """Shared by all requests. ``clock`` is the event loop's."""

    def __init__(self, index: Index, policy: Policy) -> None:
        self._index = index
        self.policy = policy
        self.clock: Callable[[], float] = lambda: asyncio.get_running_loop().time()

    def choose(self, plan: Plan, exclude: Mapping[str, object], policy: Policy | None = None) -> Routed | None:
        """Look up and choose; None when no worker is left that can take the request."""
        workers = self._takers(plan, exclude)
        if not workers:
            return None
        hits = self._look_up(plan, workers)
        candidates = [candidate(worker, hits[worker.name]) for worker in workers]
        policy = policy or self.policy
        tiers = partial(self.tiers, plan) if policy.uses_tiers else None
        query = Query(plan.pool.model, plan.prompt_tokens, plan.request.headers, plan.hashes, tiers)
        return Routed(policy.choose(query, candidates), hits, candidates)

    def available(self, pool: Pool, exclude: Mapping[str, object] | tuple[()] = ()) -> list[Worker]:
        """The pool's workers that take requests."""
        now = self.clock()
        return [
            worker
            for worker in pool.workers
            if worker.up
            and not worker.draining
            and (not worker.breaker.badness or worker.breaker.allows(now))
            and worker.name not in exclude
        ]

    def chunks(self, plan: Plan, namespace: Namespace) -> list[bytes]:
        """The chunks of a request's first prompt; empty where its tokens are not known."""
        hashes = self._hashes(plan, namespace)
        return hashes[0] if hashes else []

    def tiers(self, plan: Plan, worker: Worker) -> dict[str, int]:
        """A worker's hit in tokens by tier. O(chunks)."""
        totals: dict[str, int] = {}
        if (namespace := worker.namespace) is None:
            return totals
        for chunks in self._hashes(plan, namespace):
            for tier, held in self._index.tiers(worker.name, chunks).items():
                totals[tier] = totals.get(tier, 0) + held * namespace[1]
        return totals

    def _takers(self, plan: Plan, exclude: Mapping[str, object]) -> list[Worker]:
        """The available workers whose context the prompt fits, as far as both are known; where every breaker is open,
        the least bad ones."""
        if only := plan.request.only:
            # Whether it drains or fails, nobody else has what is asked for.
            return [worker for worker in plan.pool.workers if worker.name == only not in exclude and worker.up]
        available = self.available(plan.pool, exclude) or least_bad(plan.pool.workers, exclude)
        return fitting(plan, available) if plan.prompt_tokens >= plan.pool.shortest else available

    def _look_up(self, plan: Plan, workers: Sequence[Worker]) -> dict[str, Hit]:
        first = workers[0].namespace
        if first is None or len(plan.tokenized.prompts) != 1:
            return self._look_up_each(plan, workers)
        names = []
        for worker in workers:
            if worker.namespace != first:
                return self._look_up_each(plan, workers)
            names.append(worker.name)
        return self._index.lookup(self._hashes(plan, first)[0], names, first[1])

    def _look_up_each(self, plan: Plan, workers: Sequence[Worker]) -> dict[str, Hit]:
        """Of several prompts, or among workers whose hashes descend from different things."""
        groups: dict[Namespace, list[str]] = {}
        hits = {worker.name: NO_HIT for worker in workers}
        for worker in workers:
            if (namespace := worker.namespace) is not None:
                groups.setdefault(namespace, []).append(worker.name)
        for namespace, names in groups.items():
            for chunks in self._hashes(plan, namespace):
                for name, hit in self._index.lookup(chunks, names, namespace[1]).items():
                    hits[name] = Hit(hits[name].gpu + hit.gpu, hits[name].total + hit.total)
        return hits

    @staticmethod
    def _hashes(plan: Plan, namespace: Namespace) -> list[list[bytes]]:
        hashes = plan.hashes.get(namespace)
        if hashes is None:
            root = _root(*namespace, plan.pool.lora, plan.request.cache_salt)
            hashes = [ids.chunks(root, namespace[1]) for ids in plan.tokenized.prompts]
            plan.hashes[namespace] = hashes
        return hashes


def fitting(plan: Plan, workers: list[Worker]) -> list[Worker]:
    """Those of the workers whose context is known to have room for the longest prompt, or is not known."""
    pool = plan.pool
    longest = max(map(len, plan.tokenized.prompts), default=0)
    return [worker for worker in workers if not (room := worker.context(pool.model, pool.base)) or longest < room]


def first_missing(plan: Plan, worker: Worker, hit: Hit) -> str:
    """The first chunk, in hexadecimal, that a worker lacks of a request of one prompt; empty where it lacks none."""
    namespace = worker.namespace
    hashes = plan.hashes.get(namespace) if namespace is not None else None
    if namespace is None or not hashes or len(hashes) > 1:
        return ""
    held = hit.total // namespace[1]
    return hashes[0][held].hex() if held < len(hashes[0]) else ""


@lru_cache(maxsize=1024)
def _root(model: str, size: int, lora: str, cache_salt: str) -> bytes:
    return root_hash(chunk_size=size, model=model, lora=lora, cache_salt=cache_salt)
