"""How a worker is chosen: the one interface every policy has."""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import msgspec

from router.index import Hit
from router.workers import TRUST_FLOOR, Worker

SHARED_SLACK_TOKENS = 512
"""Loads that differ by less are equal among routers that share the workers."""

Hashes = Mapping[tuple[str, int], Sequence[Sequence[bytes]]]
"""Each prompt's chunk hashes, by model name and chunk size."""


class Query(msgspec.Struct, frozen=True, eq=False):
    """What a policy may know of a request. ``prompt_tokens`` is 0 where the prompt was not tokenized; ``tiers`` says
    how many tokens of its hit a worker has in each tier, at a cost of O(chunks)."""

    model: str
    prompt_tokens: int
    headers: Sequence[tuple[bytes, bytes]] = ()
    hashes: Hashes = MappingProxyType({})
    tiers: Callable[[Worker], Mapping[str, int]] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; ``name`` in lower case."""
        return next((value for key, value in self.headers if key == name), None)


class Candidate(msgspec.Struct, frozen=True, eq=False):
    """A worker that can take the request. ``hit_tokens`` as far as its index is believed, ``gpu_tokens`` those of them
    that need not be loaded; ``load`` in tokens, as ``Worker.weight``; ``prefill_speed`` in tokens per second, 0 where
    unknown."""

    worker: Worker
    hit_tokens: int
    load: int
    in_flight: int
    prefill_speed: float
    gpu_tokens: int = 0


class Choice(msgspec.Struct, frozen=True):
    """The worker, and why, for people."""

    worker: Worker
    reason: str


class Policy(Protocol):
    """Called on the event loop; keeps no more than counters, recent prefixes and the random source."""

    name: str
    uses_hits: bool
    """Whether it compares hits: if not, prompts need not be tokenized for it."""
    uses_tiers: bool
    """Whether it asks ``Query.tiers``."""
    learns: bool
    """Whether it predicts times, which the workers' answers then have to teach."""

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, of which there is at least one. O(candidates log candidates)."""
        ...


def candidate(worker: Worker, hit: Hit) -> Candidate:
    """What policies see of a worker that holds ``hit`` tokens of the prompt."""
    gpu, total = hit
    if worker.trust < TRUST_FLOOR:
        total = worker.believed(total)
        gpu = min(gpu, total)
    return Candidate(worker, total, worker.weight, worker.load.in_flight, worker.prefill_speed, gpu)


def pick(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """The least loaded; among equals, one at random. Where other routers send to the same workers, loads that are nearly
    equal count as equal: by the same reports all of them would take the same worker until the next heartbeat."""
    best = candidates[0]
    if best.worker.load.shared:
        most = min([c.load for c in candidates]) + SHARED_SLACK_TOKENS
        return rng.choice([c for c in candidates if c.load <= most])
    equal = 0
    load, in_flight = best.load, best.in_flight
    for each in candidates:
        if each.load < load or (each.load == load and each.in_flight < in_flight):
            best, load, in_flight, equal = each, each.load, each.in_flight, 1
        elif each.load == load and each.in_flight == in_flight:
            equal += 1
            if equal > 1 and rng.random() * equal < 1:  # the n-th of equals with a chance of 1/n
                best = each
    return best


def short(tokens: int) -> str:
    """Tokens for people: 950, 33k."""
    return f"{tokens:,}" if tokens < 10_000 else f"{tokens / 1000:,.0f}k"
