"""How a worker is chosen: the one interface every policy has."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from router.index import Hit
from router.workers import Worker


class Query(NamedTuple):
    """What a policy may know of a request. ``prompt_tokens`` is 0 where the prompt was not tokenized."""

    model: str
    prompt_tokens: int


class Candidate(NamedTuple):
    """A worker that can take the request. ``hit_tokens`` as far as its index is believed; ``load`` in tokens, as
    ``Worker.weight``; ``prefill_speed`` in tokens per second, 0 where unknown."""

    worker: Worker
    hit_tokens: int
    load: int
    in_flight: int
    prefill_speed: float


class Choice(NamedTuple):
    """The worker, and why, for people."""

    worker: Worker
    reason: str


class Policy(Protocol):
    """Stateless but for counters and the random source; called on the event loop."""

    name: str
    uses_hits: bool

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, of which there is at least one. O(candidates log candidates)."""
        ...


def candidate(worker: Worker, hit: Hit) -> Candidate:
    """What policies see of a worker that holds ``hit`` tokens of the prompt."""
    return Candidate(worker, worker.believed(hit.total), worker.weight, worker.load.in_flight, worker.prefill_speed)


def pick(candidates: Iterable[Candidate], rng: random.Random) -> Candidate:
    """The least loaded; among equals, one at random."""
    ranked = list(candidates)
    least = min((c.load, c.in_flight) for c in ranked)
    equal = [c for c in ranked if (c.load, c.in_flight) == least]
    return equal[0] if len(equal) == 1 else rng.choice(equal)


def short(tokens: int) -> str:
    """Tokens for people: 950, 33k."""
    return f"{tokens:,}" if tokens < 10_000 else f"{tokens / 1000:,.0f}k"
