"""The path of a request, travelled once, in this order: admit, parse, tokenize, hash, look up, choose, forward, stream
back, account. Each step is a module; this one leads through them."""

import asyncio
import copy
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from router.access import Access, Visit
from router.accounting import Accounting, Decision
from router.admission import Admission
from router.body_memory import BodyMemory
from router.choosing import Chooser, Plan, Routed, first_missing, fitting
from router.client import Client, Headers
from router.config import Settings
from router.dashboard.prefixes import Hashes
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
from router.index import Hit, Index
from router.metrics import Metrics, WorkerSeries
from router.parse import Arrival, Request, parse_request, read_headers
from router.policies import Policy
from router.pool_prompts import PoolPrompts
from router.queue import NOBODY
from router.retries import RetryBudget, backoff
from router.sent_memory import SentMemory
from router.splice import LEAN_FROM, Kind, can_carry_ids, ids_of, parts_without_messages, splice, with_prompt
from router.surface import HOT, Surface, target_of, unscored_prompt
from router.workers import Flight, Pool, Registry, Worker

PATHS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_RETRY_AFTER_S = 1.0
MOST_BODY_BYTES = 128 << 20
"""Kept of bodies at most; a quarter of what is kept of prompts where that is less."""
SAMPLE_EVERY = 64
"""Of this many requests to a worker that could carry token ids, one travels as text: the length the worker then reports
shows whether it still tokenizes as the router does."""

_log = logging.getLogger(__name__)


class Journey(msgspec.Struct, eq=False):
    """One request under way: its client, its plan, what is put on record, and which workers failed it so far."""

    client: Client
    plan: Plan
    decision: Decision
    started: float
    visit: Visit | None = None
    failures: dict[str, UpstreamError] = {}


class Attempt(Delivery, eq=False, kw_only=True):
    """One try to have a journey's request served by a worker."""

    pipeline: "Pipeline"
    journey: Journey
    worker: Worker
    flight: Flight
    generation: int
    computed: bool = False

    def begun(self) -> None:
        worker, journey, flight = self.worker, self.journey, self.flight
        self.computed = self.status < 400
        if self.status < 500 and worker.breaker.badness:
            worker.breaker.succeeded(self.generation)  # a long answer need not end to tell that the worker is back
        journey.decision.ttft_s = time.perf_counter() - journey.started
        worker.load.computed(flight)
        if flight.due:
            flight.first_at = self.pipeline.clock()

    def may_retry(self) -> bool:
        return self.pipeline.may_retry(self.journey, self.worker)


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
        sent: SentMemory,
        prompts: dict[str, PoolPrompts],
        surface: Surface,
        access: Access | None = None,
        suspected: Callable[[Worker], None] = lambda _: None,
        seen: deque[Hashes] | None = None,
    ) -> None:
        self._access = access
        self._suspected = suspected
        self._seen: deque[Hashes] = seen if seen is not None else deque(maxlen=0)
        self.retries = RetryBudget(settings.retry_ratio)
        self._rng = random.Random(settings.seed)  # noqa: S311 - spreads retries
        self._settings = settings
        self._registry = registry
        self.chooser = Chooser(index, policy)
        self._bodies = BodyMemory(min(settings.prompt_memory_bytes // 4, MOST_BODY_BYTES))
        self._admission = admission
        self._accounting = accounting
        self._metrics = metrics
        self._sent = sent
        self._prompts = prompts
        self._surface = surface

    def reconfigure(self, settings: Settings, policy: Policy) -> None:
        """Work by other settings from the next request on."""
        self._settings, self.chooser.policy = settings, policy
        self.retries.ratio = settings.retry_ratio

    async def handle(self, client: Client, kind: Kind) -> None:
        """Serve one request, whatever becomes of it."""
        arrival = read_headers(client.scope["headers"], keyed=self._access is not None)
        with client:
            try:
                await self._admit(client, kind, arrival)
            except ClientGone:
                pass
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()
                if not client.gone:
                    await self._stop(client, arrival.request_id)
            except ApiError as error:
                self._metrics.rejected.labels(error.status, error.code or error.type).inc()
                await client.fail(error, arrival.request_id)
            except Exception:  # noqa: BLE001 - one request must not end the router
                _log.exception("request %s failed inside the router", arrival.request_id)
                if client.started:
                    client.hang_up()
                else:
                    await client.fail(
                        ApiError("the router failed; its log says why", code="internal_error"), arrival.request_id
                    )

    async def _stop(self, client: Client, request_id: str) -> None:
        """The gateway ends, and this request outlasted the time it was given to finish."""
        if client.started and not client.finished:
            client.hang_up()
        elif not client.started:
            await client.fail(Unavailable("the gateway is stopping: try again", retry_after=_RETRY_AFTER_S), request_id)

    async def plan(self, request: Request) -> Plan:
        """Tokenize.

        Raises:
            ApiError: the model is unknown, the prompt is too long or malformed.
        """
        pool = self._registry.pools.get(request.model) or self._pool(request)
        if request.kind not in HOT and (unscored := unscored_prompt(request.kind, pool)) is not None:
            return Plan(request, pool, unscored, 0)
        prompts = self._prompts.get(pool.base) or PoolPrompts(pool.base)
        tokenized = prompts.at_once(request)
        if tokenized is None:
            tokenized = await prompts.tokenize(request.kind, request.body, partial(self._worth_asking, pool))
        prompts_seen = len(tokenized.prompts)
        self._metrics.tokenized_by(pool.model, tokenized.by).value += prompts_seen or 1
        if prompts_seen == 1:
            longest = tokens = len(tokenized.prompts[0])
        else:
            lengths = [len(ids) for ids in tokenized.prompts]
            longest, tokens = max(lengths, default=0), sum(lengths)
        if pool.longest and longest >= pool.longest:
            raise _too_long(request, pool, longest)
        return Plan(request, pool, tokenized, tokens)

    async def explain(self, kind: Kind, raw: bytes) -> tuple[Plan, Routed | None]:
        """What would be done with a request, leaving no trace in counters or policy.

        Raises:
            ApiError: the request would be refused.
        """
        plan = await self.plan(parse_request(kind, raw, [], "dry-run"))
        return plan, self.chooser.choose(plan, {}, copy.deepcopy(self.chooser.policy))

    async def _admit(self, client: Client, kind: Kind, arrival: Arrival) -> None:
        started = time.perf_counter()
        settings, admission = self._settings, self._admission
        visit = self._access.enter(arrival) if self._access is not None else None
        try:
            arrival.check(settings.max_headers, settings.max_header_bytes)
            if not admission.enter_now():
                await admission.enter(visit.claim if visit is not None else NOBODY)
            held = 0
            try:
                held = admission.hold(min(arrival.length, settings.max_body_bytes))
                raw = client.take_body(settings.max_body_bytes)
                if raw is None:

                    def hold(size: int) -> None:
                        nonlocal held
                        held += admission.hold(max(0, size - held))

                    raw = await client.read_body(settings.max_body_bytes, settings.body_timeout, hold)
                await self._serve(client, kind, arrival, raw, started, visit)
            finally:
                admission.free(held)
                admission.leave()
        finally:
            if visit is not None:
                visit.leave()

    async def _serve(  # noqa: PLR0917 - called once, and a request's way is no place to wrap things up
        self, client: Client, kind: Kind, arrival: Arrival, raw: bytes, started: float, visit: Visit | None
    ) -> None:
        if kind in HOT:
            request = parse_request(kind, raw, arrival.headers, arrival.request_id, self._bodies)
        else:
            request = await self._surface.read(client, kind, raw, arrival, tenant=_tenant_of(visit))
        if visit is not None:
            visit.tenant.bind(request)
        parsed = time.perf_counter()
        plan = await self.plan(request)
        if visit is not None:
            visit.prompt(plan.prompt_tokens, request)
        decision = client.decision = Decision(
            request.request_id,
            time.time(),
            kind,
            plan.pool.model,
            tokenized_by=plan.tokenized.by,
            prompt_tokens=plan.prompt_tokens,
        )
        self.retries.requests += 1
        journey = Journey(client, plan, decision, started, visit)
        failures = journey.failures
        while len(failures) <= self._settings.retries and (routed := self.chooser.choose(plan, failures)) is not None:
            if not failures:
                self._metrics.routing.observe(time.perf_counter() - parsed)
            try:
                await self._send(journey, routed)
            except UpstreamError as error:
                failures[error.worker] = error
                if isinstance(error, UpstreamTimeout):
                    break  # what took this long here would take as long elsewhere
                if not self._may_repeat(journey, routed.choice.worker, error):
                    break
                await asyncio.sleep(backoff(len(failures), self._settings.retry_backoff, self._rng))
            else:
                return
        raise self._nobody(plan.pool, failures)

    @property
    def clock(self) -> Callable[[], float]:
        """The event loop's."""
        return self.chooser.clock

    def may_retry(self, journey: Journey, worker: Worker) -> bool:
        """Whether a worker's refusal may be answered by asking another one."""
        plan = journey.plan
        return (
            len(journey.failures) < self._settings.retries
            and plan.request.repeatable
            and self.retries.allows(self.clock())
            and bool(fitting(plan, self.chooser.available(plan.pool, {**journey.failures, worker.name: None})))
        )

    def _may_repeat(self, journey: Journey, worker: Worker, error: UpstreamError) -> bool:
        """Whether the retry is within the budget. It is free where it adds no load: nothing was sent, or the worker
        that failed is out and another is well."""
        now = self.clock()
        if isinstance(error, ConnectFailed):
            return True
        if not journey.plan.request.repeatable:
            return False
        out = not worker.available(now)
        if out and any(other.available(now) for other in journey.plan.pool.workers):
            return True
        return self.retries.take(now)

    async def _send(self, journey: Journey, routed: Routed) -> None:
        worker, plan, decision = routed.choice.worker, journey.plan, journey.decision
        hit = routed.hits[worker.name]
        series = self._metrics.of_worker(worker.name)
        self._decided(journey, routed, hit, series)
        attempt = Attempt(
            pipeline=self,
            journey=journey,
            worker=worker,
            flight=Flight(self.clock(), max(0, plan.prompt_tokens - hit.total)),
            generation=worker.breaker.begin(),
            meter=journey.visit.meter if journey.visit is not None else None,
        )
        worker.load.sent(attempt.flight)
        assumed = self._assume_held(plan, worker) if worker.assumes else ()
        if self.chooser.policy.learns and hit.gpu == hit.total and plan.request.body.get("stream") is True:
            attempt.flight.due = worker.load.uncached_tokens
        outcome = "abandoned"
        try:
            await self._forward(journey, attempt)
            outcome = self._delivered(attempt, series)
        except UpstreamError as error:
            outcome = "failed"
            self._failed(worker, error, attempt.generation)
            raise
        finally:
            worker.load.finished(attempt.flight)
            if assumed and not attempt.computed:
                self._sent.unsent(worker, assumed)
            decision.outcome = outcome
            decision.duration_s = time.perf_counter() - journey.started
            series.ended(decision)
            if outcome == "abandoned":
                worker.breaker.abandoned(attempt.generation)
                self._metrics.abandoned.labels(worker.name).inc()
            if decision.cached_tokens is not None:
                self._accounting.finished(decision)

    async def _forward(self, journey: Journey, attempt: Attempt) -> None:
        plan, worker, client = journey.plan, attempt.worker, journey.client
        request = plan.request
        if request.kind == "responses":
            self._surface.watch(client, worker)
        body = self._body_for(plan, worker)
        named = (b"x-request-id", request.request_id.encode("ascii"))
        headers = [*request.headers, named]
        if worker.rank_header:
            headers.append(worker.rank_header)
        head = worker.upstream.request_head(request.method, target_of(client), headers, sum(map(len, body)))
        await forward(
            client, worker.upstream, head, body, extra=self._extra_headers(named, journey, worker), delivery=attempt
        )

    def _assume_held(self, plan: Plan, worker: Worker) -> Sequence[bytes]:
        prompts = plan.hashes.get(worker.namespace) if worker.namespace is not None else None
        return self._sent.sent(worker, prompts) if prompts else ()

    def _decided(self, journey: Journey, routed: Routed, hit: Hit, series: WorkerSeries) -> None:
        plan, decision, worker = journey.plan, journey.decision, routed.choice.worker
        decision.worker = worker.name
        decision.reason = routed.choice.reason
        self._metrics.decided(decision.reason)
        if journey.failures:
            decision.reason += f"; after {', '.join(journey.failures)} failed"
        decision.predicted_hit_tokens = hit.total
        decision.missing = first_missing(plan, worker, hit)
        decision.outcome = "running"
        decision.attempts += 1
        prompts = len(plan.tokenized.prompts)
        tolerance = worker.namespace[1] * prompts if worker.namespace is not None and plan.prompt_tokens else 0
        # Of several prompts each is admitted once per copy, in any order.
        tellers = prompts or 1 if prompts < 2 or plan.request.body.get("n") in (None, 1) else 0
        self._accounting.sent(decision, worker, tellers, tolerance)
        self._seen.append(plan.hashes)
        series.prompt_tokens.value += plan.prompt_tokens
        series.predicted.value += hit.total

    def _delivered(self, attempt: Attempt, series: WorkerSeries) -> str:
        journey, worker, status = attempt.journey, attempt.worker, attempt.status
        plan, decision = journey.plan, journey.decision
        if attempt.flight.due and status == 200:
            worker.answered(attempt.flight)
        decision.status = status
        decision.cached_tokens = attempt.cached_tokens
        decision.parts = attempt.parts
        series.answered(plan.pool.model, status)
        if attempt.broken is not None:
            self._metrics.broken.labels(worker.name).inc()
            self._failed(worker, attempt.broken, attempt.generation)
            outcome = "broken"
        else:
            self._judge(worker, status, attempt.generation)
            if decision.ttft_s is not None:
                series.ttft.observe(decision.ttft_s)
            outcome = "served"
        if plan.request.kind == "responses":
            self._surface.delivered(journey.client, worker, decision)
        return outcome

    def _judge(self, worker: Worker, status: int, generation: int) -> None:
        """What the status of an answer says of the worker."""
        if status < 500:
            worker.breaker.succeeded(generation)
        elif status in RETRYABLE:
            worker.breaker.failed(self.clock(), generation)
        elif worker.breaker.suspected(generation):
            self._suspected(worker)

    def _failed(self, worker: Worker, error: UpstreamError, generation: int) -> None:
        self._metrics.failures.labels(worker.name, type(error).__name__).inc()
        worker.breaker.failed(self.clock(), generation)
        if isinstance(error.__cause__, ConnectionRefusedError):
            worker.mark_down(str(error))
        _log.warning("%s", error)

    def _body_for(self, plan: Plan, worker: Worker) -> Sequence[bytes]:
        """The body with token ids where the worker was seen to take them, else as it came; in pieces."""
        request, tokenized = plan.request, plan.tokenized
        if tokenized.by != "router" or worker.parity != "exact" or not self._settings.forward_token_ids:
            return (request.raw,)
        if not can_carry_ids(request.body, request.kind):
            return (request.raw,)
        completion = request.kind == "completions"
        takes = _is_text(request.body.get("prompt")) if completion else worker.takes_token_ids
        if not takes:
            return (request.raw,)
        worker.sent_ids += 1
        if not worker.sent_ids % SAMPLE_EVERY:
            return (request.raw,)
        several = completion and isinstance(request.body["prompt"], list)
        encoded = ids_of(tokenized.prompts, several=several)
        if len(request.raw) >= LEAN_FROM:
            if request.plain is not None and (parts := parts_without_messages(request.body, encoded)) is not None:
                return parts
            if completion and (lean := with_prompt(request.body, encoded)) is not None:
                return (lean,)
        return (splice(request.raw, encoded, request.kind, given="kv_transfer_params" in request.body),)

    def _extra_headers(self, named: tuple[bytes, bytes], journey: Journey, worker: Worker) -> Headers:
        if not self._settings.response_headers:
            return [named]
        decision = journey.decision
        return [
            named,
            (b"x-warmroute-worker", worker.header_name),
            (b"x-warmroute-hit-tokens", b"%d" % decision.predicted_hit_tokens),
            (b"x-warmroute-reason", decision.reason.encode("ascii", "replace")),
        ]

    def _pool(self, request: Request) -> Pool:
        pools = self._registry.pools
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

    def _worth_asking(self, pool: Pool) -> list[Worker]:
        """Workers that can tokenize, where anything is gained from it: hits to compare."""
        workers = self.chooser.available(pool) if self.chooser.policy.uses_hits else []
        known = any(worker.namespace is not None for worker in workers)
        return [worker for worker in workers if known and worker.has_tokenize]

    def _nobody(self, pool: Pool, failures: Mapping[str, UpstreamError]) -> ApiError:
        last = list(failures.values())[-1] if failures else None
        if last is not None and not all(isinstance(error, ConnectFailed) for error in failures.values()):
            timed_out = isinstance(last, UpstreamTimeout)
            return BadGateway(str(last), status=504 if timed_out else 502)
        reasons = "; ".join(f"{worker.name}: {_why_not(worker)}" for worker in pool.workers)
        return Unavailable(
            f"no worker serving {pool.model!r} can take the request ({reasons})", retry_after=_RETRY_AFTER_S
        )


def _why_not(worker: Worker) -> str:
    if not worker.up:
        return worker.down_reason
    if worker.draining:
        return "draining"
    if worker.breaker.state != "closed":
        return "kept out after failures"
    return "failed this request, or has too short a context for it"


def _too_long(request: Request, pool: Pool, longest: int) -> ContextTooLong:
    return ContextTooLong(
        f"this model's context is {pool.longest} tokens, and the prompt alone has {longest}",
        param="messages" if request.kind == "chat" else "prompt",
    )


def _tenant_of(visit: Visit | None) -> str:
    return visit.tenant.name if visit is not None else ""


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(one, str) for one in prompt))
