"""The path of a request, travelled once, in this order: admit, parse, tokenize, hash, look up, choose, forward, stream
back, account. Each step is a module; this one leads through them."""

import asyncio
import copy
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import msgspec

from kv_protocol.hashing import root_hash
from router.access import CREDENTIALS, Access, Visit
from router.accounting import Accounting, Decision
from router.admission import Admission
from router.client import Client, Headers
from router.config import Settings
from router.errors import (
    ApiError,
    BadGateway,
    ClientGone,
    ConnectFailed,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from router.forward import RETRYABLE, Delivery, forward
from router.index import NO_HIT, Hit, Index
from router.metrics import Metrics
from router.parse import Request, forwarded_headers, parse_request, request_id_of
from router.policies import Candidate, Choice, Policy, Query, candidate
from router.pool_prompts import PoolPrompts, Tokenized
from router.queue import NOBODY
from router.retries import RetryBudget, backoff
from router.splice import LEAN_FROM, Kind, can_carry_ids, ids_of, splice, with_prompt, without_messages
from router.surface import HOT, Surface, target_of, unscored_prompt
from router.workers import Flight, Pool, Registry, Worker, least_bad

PATHS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_RETRY_AFTER_S = 1.0
SAMPLE_EVERY = 64
"""Of this many requests to a worker that could carry token ids, one travels as text: the length the worker then reports
shows whether it still tokenizes as the router does."""

_log = logging.getLogger(__name__)

Namespace = tuple[str, int]


class Plan(msgspec.Struct, eq=False):
    """A request as far as it does not depend on the worker. ``hashes`` holds each prompt's chunks, by what a worker's
    chunk hashes descend from."""

    request: Request
    pool: Pool
    tokenized: Tokenized
    prompt_tokens: int
    hashes: dict[Namespace, list[list[bytes]]] = {}


class Routed(NamedTuple):
    """A choice, and what the index says of every candidate: its hit summed over the request's prompts."""

    choice: Choice
    hits: dict[str, Hit]
    candidates: Sequence[Candidate]


class Journey(msgspec.Struct, eq=False):
    """One request under way: its client, its plan, what is put on record, and which workers failed it so far."""

    client: Client
    plan: Plan
    decision: Decision
    started: float
    visit: Visit | None = None
    failures: dict[str, UpstreamError] = {}


class Pipeline:
    """Shared by all requests; every member is the gateway's."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        index: Index,
        policy: Policy,
        admission: Admission,
        accounting: Accounting,
        metrics: Metrics,
        prompts: dict[str, PoolPrompts],
        surface: Surface,
        access: Access | None = None,
        suspected: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        self._access = access
        self._suspected = suspected
        self.retries = RetryBudget(settings.retry_ratio)
        self._rng = random.Random(settings.seed)  # noqa: S311 - spreads retries
        self._settings = settings
        self._registry = registry
        self._index = index
        self._policy = policy
        self._admission = admission
        self._accounting = accounting
        self._metrics = metrics
        self._prompts = prompts
        self._surface = surface

    def reconfigure(self, settings: Settings, policy: Policy) -> None:
        """Work by other settings from the next request on."""
        self._settings, self._policy = settings, policy
        self.retries.ratio = settings.retry_ratio

    async def handle(self, client: Client, kind: Kind) -> None:
        """Serve one request, whatever becomes of it."""
        request_id = request_id_of(client.scope["headers"])
        with client:
            try:
                if self._access is None:
                    await self._admit(client, kind, request_id)
                else:
                    await self._admit_tenant(client, kind, request_id, self._access)
            except ClientGone:
                pass
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()
                if not client.gone:
                    await self._stop(client, request_id)
            except ApiError as error:
                self._metrics.rejected.labels(error.status, error.code or error.type).inc()
                await client.fail(error, request_id)
            except Exception:  # noqa: BLE001 - one request must not end the router
                _log.exception("request %s failed inside the router", request_id)
                if client.started:
                    client.hang_up()
                else:
                    await client.fail(
                        ApiError("the router failed; its log says why", code="internal_error"), request_id
                    )

    async def _stop(self, client: Client, request_id: str) -> None:
        """The gateway ends, and this request outlasted the time it was given to finish."""
        if client.started and not client.finished:
            client.hang_up()
        elif not client.started:
            await client.fail(Unavailable("the gateway is stopping: try again", retry_after=_RETRY_AFTER_S), request_id)

    async def plan(self, request: Request) -> Plan:
        """Tokenize and hash.

        Raises:
            ApiError: the model is unknown, the prompt is too long or malformed.
        """
        pool = self._pool(request)
        if request.kind not in HOT and (unscored := unscored_prompt(request.kind, pool)) is not None:
            return Plan(request, pool, unscored, 0)
        prompts = self._prompts.get(pool.base) or PoolPrompts(pool.base)
        tokenized = await prompts.tokenize(request.kind, request.body, partial(self._worth_asking, pool))
        prompts_seen = len(tokenized.prompts)
        self._metrics.tokenized_by(pool.model, tokenized.by).inc(prompts_seen or 1)
        if prompts_seen == 1:
            longest = tokens = len(tokenized.prompts[0])
        else:
            lengths = [len(ids) for ids in tokenized.prompts]
            longest, tokens = max(lengths, default=0), sum(lengths)
        self._check_context(request, pool, longest)
        return Plan(request, pool, tokenized, tokens)

    def choose(self, plan: Plan, exclude: Mapping[str, object], policy: Policy | None = None) -> Routed | None:
        """Look up and choose; None when no worker is left that can take the request."""
        workers = self._takers(plan, exclude)
        if not workers:
            return None
        hits = self._look_up(plan, workers)
        candidates = [candidate(worker, hits[worker.name]) for worker in workers]
        policy = policy or self._policy
        tiers = partial(self.tiers, plan) if policy.uses_tiers else None
        query = Query(plan.pool.model, plan.prompt_tokens, plan.request.headers, plan.hashes, tiers)
        return Routed(policy.choose(query, candidates), hits, candidates)

    async def explain(self, kind: Kind, raw: bytes) -> tuple[Plan, Routed | None]:
        """What would be done with a request, leaving no trace in counters or policy.

        Raises:
            ApiError: the request would be refused.
        """
        plan = await self.plan(parse_request(kind, raw, [], "dry-run"))
        return plan, self.choose(plan, {}, copy.deepcopy(self._policy))

    async def _admit_tenant(self, client: Client, kind: Kind, request_id: str, access: Access) -> None:
        visit = access.enter(client.scope["headers"], client.declared_length)
        try:
            await self._admit(client, kind, request_id, visit)
        finally:
            visit.leave()

    async def _admit(self, client: Client, kind: Kind, request_id: str, visit: Visit | None = None) -> None:
        started = time.perf_counter()
        settings = self._settings
        headers = forwarded_headers(
            client.scope["headers"], most=settings.max_headers, most_bytes=settings.max_header_bytes
        )
        if visit is not None:
            headers = [header for header in headers if header[0] not in CREDENTIALS]
        if not self._admission.enter_now():
            await self._admission.enter(visit.claim if visit is not None else NOBODY)
        held = 0
        try:
            held = self._admission.hold(min(client.declared_length, settings.max_body_bytes))
            if (here := client.take_body(settings.max_body_bytes)) is not None:
                raw = here
            else:

                def hold(size: int) -> None:
                    nonlocal held
                    held += self._admission.hold(max(0, size - held))

                raw = await client.read_body(settings.max_body_bytes, settings.body_timeout, hold)
            if kind in HOT:
                request = parse_request(kind, raw, headers, request_id)
            else:
                request = await self._surface.read(client, kind, raw, headers, request_id, tenant=_tenant_of(visit))
            if visit is not None:
                visit.tenant.bind(request)
            await self._serve(client, request, started, visit)
        finally:
            self._admission.free(held)
            self._admission.leave()

    async def _serve(self, client: Client, request: Request, started: float, visit: Visit | None) -> None:
        parsed = time.perf_counter()
        plan = await self.plan(request)
        if visit is not None:
            visit.prompt(plan.prompt_tokens, request)
        decision = Decision(
            request.request_id,
            time.time(),
            request.kind,
            plan.pool.model,
            tokenized_by=plan.tokenized.by,
            prompt_tokens=plan.prompt_tokens,
        )
        client.decision = decision
        self.retries.requests += 1
        journey = Journey(client, plan, decision, started, visit)
        while (routed := self._next(journey)) is not None:
            if not journey.failures:
                self._metrics.routing.observe(time.perf_counter() - parsed)
            try:
                await self._send(journey, routed)
            except UpstreamError as error:
                journey.failures[error.worker] = error
                if isinstance(error, UpstreamTimeout):
                    break  # what took this long here would take as long elsewhere
                if not self._may_repeat(journey, routed.choice.worker, error):
                    break
                await asyncio.sleep(backoff(len(journey.failures), self._settings.retry_backoff, self._rng))
            else:
                return
        raise self._nobody(plan.pool, journey.failures)

    def _may_repeat(self, journey: Journey, worker: Worker, error: UpstreamError) -> bool:
        """Whether the retry is within the budget. It is free where it adds no load: nothing was sent, or the worker
        that failed is out and another is well."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, ConnectFailed):
            return True
        if not journey.plan.request.repeatable:
            return False
        out = not worker.available(now)
        if out and any(other.available(now) for other in journey.plan.pool.workers):
            return True
        return self.retries.take(now)

    def _next(self, journey: Journey) -> Routed | None:
        within = len(journey.failures) <= self._settings.retries
        return self.choose(journey.plan, journey.failures) if within else None

    async def _send(self, journey: Journey, routed: Routed) -> None:
        worker, hit = routed.choice.worker, routed.hits[routed.choice.worker.name]
        decision = journey.decision
        flight = Flight(asyncio.get_running_loop().time(), max(0, journey.plan.prompt_tokens - hit.total))
        self._decided(journey, routed, hit)
        generation = worker.breaker.begin()
        worker.load.sent(flight)
        if self._policy.learns and hit.gpu == hit.total and journey.plan.request.body.get("stream") is True:
            flight.due = worker.load.uncached_tokens
        outcome = "abandoned"
        try:
            delivery = await self._forward(journey, worker, flight, generation)
            if flight.due and delivery.status == 200:
                worker.answered(flight)
            outcome = self._delivered(worker, journey.plan.pool, decision, delivery, generation)
            if journey.plan.request.kind == "responses":
                self._surface.delivered(journey.client, worker, decision)
        except UpstreamError as error:
            outcome = "failed"
            self._failed(worker, error, generation)
            raise
        finally:
            worker.load.finished(flight)
            decision.outcome = outcome
            decision.duration_s = time.perf_counter() - journey.started
            self._metrics.of_worker(worker.name).ended(decision)
            if outcome == "abandoned":
                worker.breaker.abandoned(generation)
                self._metrics.abandoned.labels(worker.name).inc()
            self._accounting.finished(decision)

    async def _forward(self, journey: Journey, worker: Worker, flight: Flight, generation: int) -> Delivery:
        plan, decision = journey.plan, journey.decision

        def first_byte(status: int) -> None:
            if status < 500 and worker.breaker.badness:
                worker.breaker.succeeded(generation)  # a long answer need not end to tell that the worker is back
            decision.ttft_s = time.perf_counter() - journey.started
            worker.load.computed(flight)
            if flight.due:
                flight.first_at = asyncio.get_running_loop().time()

        def may_retry() -> bool:
            others = {**journey.failures, worker.name: None}
            return (
                len(journey.failures) < self._settings.retries
                and plan.request.repeatable
                and self.retries.allows(asyncio.get_running_loop().time())
                and bool(_fitting(plan, self._available(plan.pool, others)))
            )

        if plan.request.kind == "responses":
            self._surface.watch(journey.client, worker)
        head, body = self._upstream_request(journey.client, plan, worker)
        return await forward(
            journey.client,
            worker.upstream,
            head,
            body,
            extra=self._extra_headers(worker, decision),
            may_retry=may_retry,
            first_byte=first_byte,
            meter=journey.visit.meter if journey.visit is not None else None,
        )

    def _decided(self, journey: Journey, routed: Routed, hit: Hit) -> None:
        plan, decision, worker = journey.plan, journey.decision, routed.choice.worker
        decision.worker = worker.name
        decision.reason = routed.choice.reason
        self._metrics.decided(decision.reason)
        if journey.failures:
            decision.reason += f"; after {', '.join(journey.failures)} failed"
        decision.predicted_hit_tokens = hit.total
        decision.missing = _first_missing(plan, worker, hit)
        decision.outcome = "running"
        decision.attempts += 1
        known = worker.hello is not None and plan.prompt_tokens > 0
        tolerance = worker.hello.chunk_size * len(plan.tokenized.prompts) if known and worker.hello else 0
        prompts = len(plan.tokenized.prompts) or 1
        if prompts > 1 and plan.request.body.get("n") not in (None, 1):
            prompts = 0  # each prompt is admitted once per copy, in any order
        self._accounting.sent(decision, worker, prompts=prompts, tolerance=tolerance)
        series = self._metrics.of_worker(worker.name)
        series.prompt_tokens.inc(plan.prompt_tokens)
        series.predicted.inc(hit.total)

    def _delivered(self, worker: Worker, pool: Pool, decision: Decision, delivery: Delivery, generation: int) -> str:
        decision.status = delivery.status
        decision.cached_tokens = delivery.cached_tokens
        decision.parts = delivery.parts
        series = self._metrics.of_worker(worker.name)
        series.answered(pool.model, delivery.status)
        if delivery.broken is not None:
            self._metrics.broken.labels(worker.name).inc()
            self._failed(worker, delivery.broken, generation)
            return "broken"
        if delivery.status < 500:
            worker.breaker.succeeded(generation)
        elif delivery.status in RETRYABLE:
            worker.breaker.failed(asyncio.get_running_loop().time(), generation)
        elif worker.breaker.suspected(generation):
            self._suspected(worker)
        if decision.ttft_s is not None:
            series.ttft.observe(decision.ttft_s)
        return "served"

    def _failed(self, worker: Worker, error: UpstreamError, generation: int) -> None:
        self._metrics.failures.labels(worker.name, type(error).__name__).inc()
        worker.breaker.failed(asyncio.get_running_loop().time(), generation)
        if isinstance(error.__cause__, ConnectionRefusedError):
            worker.mark_down(str(error))
        _log.warning("%s", error)

    def _upstream_request(self, client: Client, plan: Plan, worker: Worker) -> tuple[bytes, bytes]:
        request = plan.request
        body = self._body_for(plan, worker)
        headers = [*request.headers, (b"x-request-id", request.request_id.encode("ascii"))]
        if worker.rank_header:
            headers.append(worker.rank_header)
        return worker.upstream.request_head(request.method, target_of(client), headers, len(body)), body

    def _body_for(self, plan: Plan, worker: Worker) -> bytes:
        """The body with token ids where the worker was seen to take them, else as it came."""
        request, tokenized = plan.request, plan.tokenized
        if tokenized.by != "router" or worker.parity != "exact" or not self._settings.forward_token_ids:
            return request.raw
        if not can_carry_ids(request.body, request.kind):
            return request.raw
        completion = request.kind == "completions"
        takes = _is_text(request.body.get("prompt")) if completion else worker.takes_token_ids
        if not takes:
            return request.raw
        worker.sent_ids += 1
        if not worker.sent_ids % SAMPLE_EVERY:
            return request.raw
        several = completion and isinstance(request.body["prompt"], list)
        encoded = ids_of(tokenized.prompts, several=several)
        if len(request.raw) >= LEAN_FROM:
            lean = (with_prompt if completion else without_messages)(request.body, encoded)
            if lean is not None:
                return lean
        return splice(request.raw, encoded, request.kind, given="kv_transfer_params" in request.body)

    def _extra_headers(self, worker: Worker, decision: Decision) -> Headers:
        headers = [(b"x-request-id", decision.request_id.encode("ascii"))]
        if self._settings.response_headers:
            headers += [
                (b"x-warmroute-worker", worker.header_name),
                (b"x-warmroute-hit-tokens", b"%d" % decision.predicted_hit_tokens),
                (b"x-warmroute-reason", decision.reason.encode("ascii", "replace")),
            ]
        return headers

    def _pool(self, request: Request) -> Pool:
        pools = self._registry.pools
        if request.model in pools:
            return pools[request.model]
        bases = [pool for pool in pools.values() if not pool.lora]
        if not request.model:
            if len(bases) == 1:
                return bases[0]
            raise InvalidRequest("model is required: more than one is served", param="model")
        if self._registry.undescribed or not len(self._registry):
            raise Unavailable(
                f"no worker serving {request.model!r} has come up yet", param="model", retry_after=_RETRY_AFTER_S
            )
        raise ModelNotFound(f"the model {request.model!r} is not served here; GET /v1/models lists them", param="model")

    def _available(self, pool: Pool, exclude: Mapping[str, object] | tuple[()]) -> list[Worker]:
        now = asyncio.get_running_loop().time()
        return [worker for worker in pool.workers if worker.name not in exclude and worker.available(now)]

    def _takers(self, plan: Plan, exclude: Mapping[str, object]) -> list[Worker]:
        """The available workers whose context the prompt fits, as far as both are known; where every breaker is open,
        the least bad ones."""
        if only := plan.request.only:
            # Whether it drains or fails, nobody else has what is asked for.
            return [worker for worker in plan.pool.workers if worker.name == only not in exclude and worker.up]
        available = self._available(plan.pool, exclude) or least_bad(plan.pool.workers, exclude)
        return _fitting(plan, available)

    def _worth_asking(self, pool: Pool) -> list[Worker]:
        """Workers that can tokenize, where anything is gained from it: hits to compare."""
        workers = self._available(pool, ()) if self._policy.uses_hits else []
        known = any(worker.namespace is not None for worker in workers)
        return [worker for worker in workers if known and worker.has_tokenize]

    def _check_context(self, request: Request, pool: Pool, longest: int) -> None:
        if pool.longest and longest >= pool.longest:
            raise ContextTooLong(
                f"this model's context is {pool.longest} tokens, and the prompt alone has {longest}",
                param="messages" if request.kind == "chat" else "prompt",
            )

    def _look_up(self, plan: Plan, workers: Sequence[Worker]) -> dict[str, Hit]:
        groups: dict[Namespace, list[str]] = {}
        hits = {worker.name: NO_HIT for worker in workers}
        first = workers[0].namespace
        if first is not None and len(plan.tokenized.prompts) == 1 and all(w.namespace == first for w in workers):
            size = first[1]
            found = self._index.lookup(self._hashes(plan, first)[0], list(hits))
            for name, hit in found.items():
                if hit.total:
                    hits[name] = Hit(hit.gpu * size, hit.total * size)
            return hits
        for worker in workers:
            if (namespace := worker.namespace) is not None:
                groups.setdefault(namespace, []).append(worker.name)
        for namespace, names in groups.items():
            for chunks in self._hashes(plan, namespace):
                for name, hit in self._index.lookup(chunks, names).items():
                    size = namespace[1]
                    hits[name] = Hit(hits[name].gpu + hit.gpu * size, hits[name].total + hit.total * size)
        return hits

    def _hashes(self, plan: Plan, namespace: Namespace) -> list[list[bytes]]:
        if namespace not in plan.hashes:
            root = _root(*namespace, plan.pool.lora, plan.request.cache_salt)
            plan.hashes[namespace] = [ids.chunks(root, namespace[1]) for ids in plan.tokenized.prompts]
        return plan.hashes[namespace]

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

    def _nobody(self, pool: Pool, failures: Mapping[str, UpstreamError]) -> ApiError:
        last = list(failures.values())[-1] if failures else None
        if last is not None and not all(isinstance(error, ConnectFailed) for error in failures.values()):
            timed_out = isinstance(last, UpstreamTimeout)
            return BadGateway(str(last), status=504 if timed_out else 502)
        reasons = "; ".join(f"{worker.name}: {_why_not(worker)}" for worker in pool.workers)
        return Unavailable(
            f"no worker serving {pool.model!r} can take the request ({reasons})", retry_after=_RETRY_AFTER_S
        )


@lru_cache(maxsize=1024)
def _root(model: str, size: int, lora: str, cache_salt: str) -> bytes:
    return root_hash(chunk_size=size, model=model, lora=lora, cache_salt=cache_salt)


def _first_missing(plan: Plan, worker: Worker, hit: Hit) -> str:
    """The first chunk, in hexadecimal, that a worker lacks of a request of one prompt; empty where it lacks none."""
    namespace = worker.namespace
    hashes = plan.hashes.get(namespace) if namespace is not None else None
    if namespace is None or not hashes or len(hashes) > 1:
        return ""
    held = hit.total // namespace[1]
    return hashes[0][held].hex() if held < len(hashes[0]) else ""


def _fitting(plan: Plan, workers: list[Worker]) -> list[Worker]:
    pool = plan.pool
    if plan.prompt_tokens < pool.shortest:
        return workers
    longest = max(map(len, plan.tokenized.prompts), default=0)
    return [worker for worker in workers if not (room := worker.context(pool.model, pool.base)) or longest < room]


def _why_not(worker: Worker) -> str:
    if not worker.up:
        return worker.down_reason
    if worker.draining:
        return "draining"
    if worker.breaker.state != "closed":
        return "kept out after failures"
    return "failed this request, or has too short a context for it"


def _tenant_of(visit: Visit | None) -> str:
    return visit.tenant.name if visit is not None else ""


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(one, str) for one in prompt))
