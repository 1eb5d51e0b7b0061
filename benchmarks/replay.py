"""Replay a trace through the router's own choosing code, on a virtual clock.

    python -m benchmarks.replay TRACE --workers 8 --blocks 4096 --speed 1 --policy longest-hit --json -

Requests arrive when the trace says, whatever became of those before (an open loop). Policies, index and load are the
router's; the workers are modelled (``benchmarks/fleet_model.py``) and say what they stored and removed when a step
ends, and their load once a second. ``--policy all`` prints a table of every policy, among them ``dynamo``, a model of
that router's formula.

``reuse`` is prompt blocks found in the chosen worker's cache over all prompt blocks; ``ttft_ms`` is from arrival to the
first token, without network and router; ``load_spread`` is the tokens computed by the busiest worker over the mean;
``decisions_per_s`` counts look-up and choice together, in wall time.
"""

import argparse
import heapq
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import msgspec

from benchmarks.dynamo_model import DynamoModel
from benchmarks.fleet_model import Job, ModelledWorker, Outcome, Rates
from benchmarks.traces import BLOCK_TOKENS, Request, read_trace, resample
from kv_protocol.identity import Identity
from kv_protocol.messages import Heartbeat, Hello, TierInfo
from router.breaker import Breaker
from router.config import PolicyName, Settings, WorkerSpec
from router.index import NO_HIT, Hit, Index
from router.policies import Query, candidate, make_policy
from router.upstream import Timeouts, Upstream
from router.workers import Flight, Worker

HEARTBEAT_S = 1.0
POLICIES = (*get_args(PolicyName), "dynamo")


class Run(msgspec.Struct, frozen=True):
    """One replay's conditions."""

    policy: str
    workers: int = 8
    blocks: int = 4096
    speed: float = 1.0
    routers: int = 1
    seed: int = 1
    settings: dict[str, Any] = {}
    rates: Rates = Rates()


class Result(msgspec.Struct, frozen=True):
    """One replay's figures; times in milliseconds."""

    policy: str
    reuse: float
    ttft_ms: dict[str, float]
    load_spread: float
    decisions_per_s: int
    requests: int
    workers: int
    blocks: int
    speed: float


class Chooser(Protocol):
    """The router's side: it knows of workers only what they report."""

    def choose(self, request: Request, now: float) -> int:
        """The number of the worker; the request counts as sent to it."""
        ...

    def happened(self, worker: int, outcome: Outcome, now: float) -> None:
        """A worker's reports and responses arrive."""
        ...

    def heartbeat(self, worker: int, model: ModelledWorker, now: float) -> None:
        """A worker says how loaded it is."""
        ...


class RouterChooser:
    """A policy of the router, with the router's own index and workers."""

    def __init__(self, run: Run) -> None:
        self._index = Index()
        self._workers = [_worker(number, run) for number in range(run.workers)]
        self._names = [worker.name for worker in self._workers]
        self._flights: dict[int, tuple[Worker, Flight]] = {}
        self._policy = make_policy(Settings.model_validate({"policy": run.policy, "seed": run.seed, **run.settings}))
        for name in self._names:
            self._index.open(name)

    def choose(self, request: Request, now: float) -> int:
        hits = self._index.lookup(request.whole, self._names) if self._policy.uses_hits else {}
        candidates = [candidate(worker, _in_tokens(hits.get(worker.name, NO_HIT))) for worker in self._workers]
        query = Query("model", request.input_tokens, hashes={_NAMESPACE: [request.whole]})
        worker = self._policy.choose(query, candidates).worker
        cached = hits.get(worker.name, NO_HIT).total * BLOCK_TOKENS
        flight = Flight(now, max(0, request.input_tokens - cached))
        worker.load.sent(flight)
        flight.due = worker.load.uncached_tokens
        self._flights[id(request)] = worker, flight
        return self._names.index(worker.name)

    def happened(self, worker: int, outcome: Outcome, now: float) -> None:
        name = self._names[worker]
        self._index.removed(name, "gpu", outcome.removed)
        self._index.stored(name, "gpu", outcome.stored)
        for job in outcome.first:
            if mine := self._flights.get(id(job.request)):
                sent_to, flight = mine
                sent_to.load.computed(flight)
                if self._policy.learns:
                    flight.first_at = now
                    sent_to.answered(flight)
        for job in outcome.finished:
            if mine := self._flights.pop(id(job.request), None):
                mine[0].load.finished(mine[1])

    def heartbeat(self, worker: int, model: ModelledWorker, now: float) -> None:
        beat = Heartbeat(
            running=model.running,
            waiting=model.waiting,
            uncached_tokens=model.uncached_tokens,
            gpu_usage=model.usage,
            prefill_speed=model.rates.prefill,
            held_chunks={"gpu": len(model.cache)},
            load_bandwidth={},
        )
        self._workers[worker].beat(beat, now)


class DynamoChooser:
    """Dynamo's formula; it hears of blocks as they are stored and removed, and counts load by itself."""

    def __init__(self, run: Run) -> None:
        self._index = Index()
        self._names = [f"worker-{number}" for number in range(run.workers)]
        self._model = DynamoModel(self._names, self._index, run.seed)
        self._sent: dict[int, int] = {}
        for name in self._names:
            self._index.open(name)

    def choose(self, request: Request, now: float) -> int:
        del now
        name = self._model.choose(request)
        hit = self._index.lookup(request.whole, [name])[name].total
        self._sent[id(request)] = self._model.sent(name, request, hit)
        return self._names.index(name)

    def happened(self, worker: int, outcome: Outcome, now: float) -> None:
        del now
        name = self._names[worker]
        self._index.removed(name, "gpu", outcome.removed)
        self._index.stored(name, "gpu", outcome.stored)
        for job in outcome.first:
            if id(job.request) in self._sent:
                self._model.first_token(name, self._sent[id(job.request)])
        for job in outcome.finished:
            if self._sent.pop(id(job.request), None) is not None:
                self._model.finished(name, job.request)

    def heartbeat(self, worker: int, model: ModelledWorker, now: float) -> None:
        """Its formula has no place for it."""


class Replicas:
    """Several routers that share the workers and know nothing of each other; requests go to them in turn."""

    def __init__(self, choosers: Sequence[Chooser]) -> None:
        self._choosers = choosers
        self._turn = 0

    def choose(self, request: Request, now: float) -> int:
        self._turn += 1
        return self._choosers[self._turn % len(self._choosers)].choose(request, now)

    def happened(self, worker: int, outcome: Outcome, now: float) -> None:
        for chooser in self._choosers:
            chooser.happened(worker, outcome, now)

    def heartbeat(self, worker: int, model: ModelledWorker, now: float) -> None:
        for chooser in self._choosers:
            chooser.heartbeat(worker, model, now)


class Fleet:
    """The modelled workers and the virtual clock."""

    def __init__(self, run: Run, chooser: Chooser) -> None:
        self._run = run
        self._chooser = chooser
        self._models = [ModelledWorker(run.blocks, run.rates) for _ in range(run.workers)]
        self._due: list[tuple[float, int]] = []
        self._next_beat = 0.0
        self.jobs: list[Job] = []
        self.choosing_s = 0.0

    def serve(self, requests: Sequence[Request]) -> None:
        """Every request from its arrival to its last token. O(requests log requests + steps)."""
        for request in requests:
            at = request.at / self._run.speed
            self._advance(at)
            began = time.perf_counter()
            number = self._chooser.choose(request, at)
            self.choosing_s += time.perf_counter() - began
            self.jobs.append(self._models[number].submit(request, at))
            heapq.heappush(self._due, (self._models[number].next_event, number))
        self._advance(math.inf)

    def load_spread(self) -> float:
        computed = [model.computed_tokens for model in self._models]
        return max(computed) * len(computed) / sum(computed) if sum(computed) else 1.0

    def _advance(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            at, number = heapq.heappop(self._due)
            model = self._models[number]
            if at != model.next_event:
                continue  # its steps were cut short by a request that came
            self._beat(at)
            self._chooser.happened(number, model.advance(), at)
            if model.next_event < math.inf:
                heapq.heappush(self._due, (model.next_event, number))
        if until < math.inf:
            self._beat(until)

    def _beat(self, now: float) -> None:
        while self._next_beat <= now:
            for number, model in enumerate(self._models):
                self._chooser.heartbeat(number, model, self._next_beat)
            self._next_beat += HEARTBEAT_S


def replay(requests: Sequence[Request], run: Run) -> Result:
    """Figures of one replay.

    Raises:
        ValueError: a request does not fit a worker.
    """
    choosers = [_chooser(msgspec.structs.replace(run, seed=run.seed + number)) for number in range(run.routers)]
    fleet = Fleet(run, choosers[0] if run.routers == 1 else Replicas(choosers))
    fleet.serve(requests)
    return Result(
        policy=run.policy,
        reuse=round(_reuse(fleet.jobs), 4),
        ttft_ms=_spread_of([1000 * (job.first_token - job.arrived) for job in fleet.jobs]),
        load_spread=round(fleet.load_spread(), 3),
        decisions_per_s=round(len(fleet.jobs) / fleet.choosing_s) if fleet.choosing_s else 0,
        requests=len(fleet.jobs),
        workers=run.workers,
        blocks=run.blocks,
        speed=run.speed,
    )


def _chooser(run: Run) -> Chooser:
    return DynamoChooser(run) if run.policy == "dynamo" else RouterChooser(run)


def table(results: Sequence[Result]) -> str:
    """Results under each other, for people."""
    lines = [f"{'policy':<14}{'reuse':>7}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'spread':>8}{'decisions/s':>13}"]
    for item in results:
        times = "".join(f"{item.ttft_ms[name]:>9,.0f}" for name in ("mean", "p50", "p90", "p99"))
        lines.append(f"{item.policy:<14}{item.reuse:>7.3f}{times}{item.load_spread:>8.2f}{item.decisions_per_s:>13,}")
    return "\n".join(lines)


def _reuse(jobs: Sequence[Job]) -> float:
    blocks = sum(len(job.request.blocks) for job in jobs)
    return sum(job.cached_blocks for job in jobs) / blocks if blocks else 0.0


def _spread_of(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    if not ranked:
        return dict.fromkeys(("mean", "p50", "p90", "p99"), 0.0)
    at = {name: ranked[min(len(ranked) - 1, int(len(ranked) * share))] for name, share in _SHARES.items()}
    return {name: round(value, 1) for name, value in ({"mean": sum(ranked) / len(ranked)} | at).items()}


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def _in_tokens(hit: Hit) -> Hit:
    return Hit(hit.gpu * BLOCK_TOKENS, hit.total * BLOCK_TOKENS)


def _worker(number: int, run: Run) -> Worker:
    spec = WorkerSpec(url=f"http://worker-{number}:8000", name=f"worker-{number}")
    worker = Worker(spec, Upstream(spec.title, spec.url, Timeouts(1, 1, 1)), Breaker(5, 5))
    worker.up = worker.synced = True
    tier = TierInfo("gpu", run.blocks, BLOCK_TOKENS << 17)
    worker.hello = Hello("epoch", "model", BLOCK_TOKENS, BLOCK_TOKENS, _IDENTITY, [tier])
    return worker


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4096, help="blocks of 512 tokens in a worker's cache")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than recorded requests arrive")
    parser.add_argument("--policy", default="longest-hit", choices=(*POLICIES, "all"))
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="a setting of the router")
    parser.add_argument("--routers", type=int, default=1, help="router replicas that share the workers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resample", type=int, metavar="SEED", help="conversations at other times, in another order")
    parser.add_argument("--limit", type=int, help="only so many requests from the start")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    rates = Rates()
    parser.add_argument("--prefill-rate", type=float, default=rates.prefill, help="prompt tokens per second")
    parser.add_argument("--step-s", type=float, default=rates.step, help="seconds that every step takes")
    parser.add_argument("--decode-s", type=float, default=rates.decode, help="seconds more per request that decodes")
    parser.add_argument("--batch-tokens", type=int, default=rates.batch_tokens, help="most tokens in a step")
    return parser


def _runs(arguments: argparse.Namespace) -> list[Run]:
    rates = Rates(arguments.prefill_rate, arguments.step_s, arguments.decode_s, arguments.batch_tokens)
    settings = dict(_setting(item) for item in arguments.set)
    policies = POLICIES if arguments.policy == "all" else (arguments.policy,)
    a = arguments
    return [Run(policy, a.workers, a.blocks, a.speed, a.routers, a.seed, settings, rates) for policy in policies]


def _setting(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set takes SETTING=VALUE, got {item!r}")
    return name.replace("-", "_"), value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        requests = read_trace(arguments.trace)[: arguments.limit]
        if arguments.resample is not None:
            requests = resample(requests, arguments.resample)
        results = [replay(requests, run) for run in _runs(arguments)]
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        figures = [msgspec.to_builtins(result) for result in results]
        text = json.dumps(figures if arguments.policy == "all" else figures[0], indent=2)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    if arguments.json != "-":
        print(table(results))
    return 0


_NAMESPACE = ("model", BLOCK_TOKENS)
_IDENTITY = Identity("modelled", "bfloat16", "none", ())


if __name__ == "__main__":
    sys.exit(main())
