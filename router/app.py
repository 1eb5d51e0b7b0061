"""The gateway: every part made and wired, started and stopped; and the ASGI application around it."""

import asyncio
import gc
import hmac
import logging
import random
from collections.abc import Coroutine, MutableMapping
from typing import Any

from kv_protocol.messages import Admitted
from router import loop_lag
from router.access import PROBES, TENANT, make_access, shown_key
from router.access_metrics import AccessState
from router.accounting import Accounting, Decision
from router.admission import Admission
from router.breaker import Breaker
from router.client import Client, Headers, Receive, Scope, Send
from router.clients import client_type
from router.config import Settings, WorkerSpec
from router.control import Control
from router.cross_origin import share_with_origins
from router.dashboard.board import Board
from router.dialects import DIALECTS
from router.discovery_metrics import DiscoveryState
from router.endpoints import find, is_page
from router.errors import ApiError, ClientGone
from router.event_watcher import EventWatcher
from router.health import Monitor
from router.history import History
from router.index import Index
from router.metrics import Metrics
from router.observe import observed
from router.pipeline import PATHS, Pipeline
from router.policies import make_policy
from router.policy_metrics import PolicyState
from router.pool_prompts import PoolPrompts
from router.probe import works
from router.prompt_metrics import PromptState
from router.reload import Sources
from router.reports import Sweeper, Watcher
from router.sent_memory import SentMemory, ask_cache
from router.siblings import Siblings
from router.stored import StoredResponses
from router.surface import Surface
from router.tls import worker_context
from router.tracing import Tracer
from router.turns import Turns
from router.upstream import Timeouts, Upstream
from router.warmup import Warmup, read_prompts
from router.workers import Registry, Worker

RECHECK_S = 30.0
"""Shortest time between two comparisons of one worker's tokenization that its own counts ask for."""
GC_THRESHOLDS = (20_000, 20, 50)
"""Objects made before the collector looks at the young ones, and how many looks before it goes further."""
_LOOK_S = 0.02
FIRST_CHECK_S = 20.0
"""Longest wait at start for workers to be checked and tokenizers to be loaded."""

_log = logging.getLogger(__name__)


class Gateway:
    """All parts of one router process. Make it, ``start`` it in a running event loop, ``close`` it there."""

    def __init__(self, settings: Settings, sources: Sources | None = None, siblings: Siblings | None = None) -> None:
        self.settings = settings
        self.registry = Registry()
        self.index = Index()
        self.history = History()
        self.sent = SentMemory(self.index)
        self.admission = Admission(
            settings.max_in_flight, settings.max_queue, settings.queue_timeout, settings.max_bodies_bytes
        )
        self.metrics = Metrics(self.registry, self.index, self.admission)
        self.accounting = Accounting(settings.recent_requests, self.metrics, self._distrusted, self._miscounted)
        self.prompts: dict[str, PoolPrompts] = {}
        self.policy = make_policy(settings)
        self.access = make_access(settings.api_keys_file, settings.api_keys.get_secret_value())
        self.draining = False
        self.board = Board(self)
        self.pipeline = Pipeline(
            settings=settings,
            registry=self.registry,
            index=self.index,
            policy=self.policy,
            admission=self.admission,
            accounting=self.accounting,
            metrics=self.metrics,
            sent=self.sent,
            prompts=self.prompts,
            surface=Surface(StoredResponses(self.registry), self.accounting),
            access=self.access,
            suspected=self._suspected,
            seen=self.board.prompts,
        )
        self.metrics.add(PromptState(self.prompts))
        self.metrics.add(AccessState(self.access, self.admission, self.pipeline.retries))
        self.metrics.add(PolicyState(lambda: self.policy, lambda: self.registry.workers))
        self._rng = random.Random(settings.seed)  # noqa: S311 - spreads reconnects
        self._turns = Turns()
        self._watchers: dict[str, Watcher] = {}
        self._event_watchers: dict[str, EventWatcher] = {}
        self._monitors: dict[str, Monitor] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()
        self.control = Control(self, sources, siblings)
        self._warmup = self._make_warmup()
        self.metrics.add(DiscoveryState(lambda: self.control.watches))
        endpoint = settings.otlp_traces_endpoint
        self._tracer = Tracer(endpoint, settings.trace_ratio) if endpoint else None
        self.observe()

    def observe(self) -> None:
        """Have requests logged and traced as the settings say."""
        self.handle = observed(self.pipeline.handle, access_log=self.settings.access_log, tracer=self._tracer)

    async def start(self) -> None:
        """Start watching the workers; returns when each was checked once, or after ``FIRST_CHECK_S``."""
        self._spawn(Sweeper(self.index, audit_entries=self.settings.verify_entries, wrong=self._miscarried).run())
        if self.access is not None and self.settings.api_keys_file:
            self._spawn(self.access.watch(self.settings.config_interval))
        self.pipeline.chooser.clock = asyncio.get_running_loop().time
        self._spawn(loop_lag.watch(self.metrics.loop_lag))
        if self.board.enabled:
            self._spawn(self.board.timeline.run())
        try:
            async with asyncio.timeout(FIRST_CHECK_S):
                await self.control.start()
                await asyncio.gather(*(monitor.checked.wait() for monitor in self.monitors))
                await asyncio.gather(*(self._loaded(model) for model in tuple(self._loading)))
                await self._listed()
        except TimeoutError:
            _log.warning("serving before every worker was checked")

    async def _listed(self) -> None:
        """Wait until the caches of the workers that are up are known, or cannot be: a gateway that began without would
        send every prompt to the wrong worker for a moment, and a rolling restart is made of such moments."""
        while any(  # noqa: ASYNC110 - plain state, nobody signals it
            worker.up and worker.spec.report_address is not None and not (worker.synced or worker.reports_error)
            for worker in self.registry.workers
        ):
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """Stop every task and close every connection."""
        await self.control.close()
        tasks = [task for tasks in self._tasks.values() for task in tasks] + list(self._others)
        tasks += self._loading.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self.registry.workers:
            worker.upstream.close()
        if self._tracer is not None:
            await self._tracer.close()

    def add_worker(self, spec: WorkerSpec) -> Worker:
        """Add a worker and start to watch it.

        Raises:
            Conflict: its name or URL is taken.
        """
        settings = self.settings
        breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        worker = Worker(spec, self._upstream(spec), breaker)
        self.registry.add(worker)
        monitor = self._monitors[worker.name] = Monitor(
            worker,
            self.registry,
            interval=settings.health_interval,
            timeout=settings.health_timeout,
            models_interval=settings.models_interval,
            came_up=self._qualify,
        )
        self._tasks[worker.name] = [asyncio.create_task(monitor.run())]
        if spec.report_address is not None:
            watcher = self._watchers[worker.name] = self._watcher(worker)
            self._tasks[worker.name].append(asyncio.create_task(watcher.run()))
        elif spec.has_events:
            events = self._event_watchers[worker.name] = self._event_watcher(worker)
            self._tasks[worker.name].append(asyncio.create_task(events.run()))
        return worker

    def remove_worker(self, worker: Worker) -> None:
        """Send nothing more to a worker and forget it; requests it is serving are finished."""
        self.registry.remove(worker.name)
        self._watchers.pop(worker.name, None)
        self._event_watchers.pop(worker.name, None)
        self._monitors.pop(worker.name, None)
        tasks = self._tasks.pop(worker.name, [])
        for task in tasks:
            task.cancel()
        worker.gone = True
        worker.follow(None)
        self.sent.forget(worker)
        self.index.drop(worker.name)
        for prompts in self.prompts.values():
            prompts.forget(worker)
        if self._warmup is not None:
            self._warmup.forget(worker)
        self._spawn(self._retire(worker))

    @property
    def monitors(self) -> tuple[Monitor, ...]:
        """One for each worker."""
        return tuple(self._monitors.values())

    def _upstream(self, spec: WorkerSpec) -> Upstream:
        key = spec.key.get_secret_value() or self.settings.worker_api_key.get_secret_value()
        # Files are read again for each worker that is added, so that they can be replaced.
        tls = worker_context(self.settings) if spec.url.startswith("https:") else None
        return Upstream(spec.title, spec.url, self.timeouts(), key=key, tls=tls)

    def timeouts(self) -> Timeouts:
        settings = self.settings
        return Timeouts(settings.connect_timeout, settings.first_byte_timeout, settings.idle_timeout)

    def shows_admin_token(self, headers: Headers) -> bool:
        token = self.settings.admin_token.get_secret_value().encode()
        given = shown_key(headers)
        return bool(token) and given is not None and hmac.compare_digest(given, token)

    def _watcher(self, worker: Worker) -> Watcher:
        return Watcher(
            worker,
            self.index,
            self._turns,
            token=self.settings.report_token.get_secret_value(),
            heartbeat=self.settings.report_heartbeat,
            most_chunks=self.settings.max_worker_chunks,
            admitted=self._admitted,
            lost=self._lost,
            rng=self._rng,
            history=self.history,
            speaks=self.sent.forget,
        )

    def _event_watcher(self, worker: Worker) -> EventWatcher:
        return EventWatcher(
            worker,
            self.index,
            self._turns,
            self.sent,
            history=self.history,
            most_blocks=self.settings.max_worker_chunks,
            rng=self._rng,
        )

    async def _retire(self, worker: Worker) -> None:
        for _ in range(round(self.settings.drain_timeout * 10)):
            if not worker.load.in_flight:
                break
            await asyncio.sleep(0.1)
        worker.upstream.close()
        if self.registry.get(worker.name) is None:  # another may have come by that name
            self.metrics.forget(worker.name)
            self.history.forget(worker.name)

    def _admitted(self, worker: Worker, message: Admitted) -> None:
        self.accounting.admitted(worker, message)

    def _lost(self, worker: Worker) -> None:
        if monitor := self._monitors.get(worker.name):
            monitor.nudge()

    def _distrusted(self, worker: Worker) -> None:
        _log.warning("worker %s reused less than predicted again and again: its cache is listed again", worker.name)
        if worker.assumes:
            worker.relisted("trust")
            self.sent.begin(worker)
        if events := self._event_watchers.get(worker.name):
            events.nudge()
        elif watcher := self._watchers.get(worker.name):
            watcher.relist("trust")

    def _suspected(self, worker: Worker) -> None:
        """A worker answers 500 again and again: see whether it works at all, or its requests are at fault."""
        if worker.name not in self._asked:
            self._asked.add(worker.name)
            self._spawn(self._ask(worker))

    async def _ask(self, worker: Worker) -> None:
        try:
            if await works(worker):
                worker.breaker.acquitted()
                return
            worker.breaker.convicted(asyncio.get_running_loop().time())
            _log.warning(
                "worker %s answers 500, to a prompt of one letter too: it is kept out for a while", worker.name
            )
        finally:
            self._asked.discard(worker.name)

    def _miscarried(self, name: str) -> None:
        _log.error("the index does not hold of worker %s what was counted in: its cache is listed again", name)
        if watcher := self._watchers.get(name):
            watcher.relist("audit")
        elif worker := self.registry.get(name):
            worker.relisted("audit")
            self.sent.begin(worker)
            if events := self._event_watchers.get(name):
                events.nudge()

    def _miscounted(self, worker: Worker, decision: Decision, tokens: int) -> None:
        """A worker counted other prompt tokens than were counted here: compare its tokenization at once."""
        now = asyncio.get_running_loop().time()
        pool = self.registry.pools.get(decision.model)
        prompts = self.prompts.get(pool.base) if pool is not None else None
        if prompts is not None and decision.endpoint in DIALECTS:
            prompts.dialects.distrust(decision.endpoint, worker.name, decision.prompt_tokens, tokens)
            return
        if prompts is None or now < worker.recheck_after:
            return
        worker.recheck_after = now + RECHECK_S
        _log.warning(
            "worker %s counted %d prompt tokens of request %s, here they are %d: its tokenization is compared again",
            *(worker.name, tokens, decision.request_id, decision.prompt_tokens),
        )
        worker.parity = "unchecked"
        self._spawn(prompts.check(worker))

    async def _assume(self, worker: Worker) -> None:
        """Set out anew with a worker that does not report its cache: what was known was another process's."""
        base = next((card.id for card in worker.models.values() if not card.parent), "")
        unsaid = self.settings.assumed_cache_tokens
        if worker.source == "routed":
            self.sent.begin(worker)
        cache = await ask_cache(worker.upstream, worker.spec, unsaid)
        room = min(cache.tokens // cache.chunk_size, self.settings.max_worker_chunks) if unsaid else 0
        worker.assume((base, cache.chunk_size), room)
        if worker.hello is None:
            self.sent.begin(worker)
        if (events := self._event_watchers.get(worker.name)) is not None:
            events.nudge()

    async def _qualify(self, worker: Worker) -> None:
        if not worker.epochs:
            await self._assume(worker)
        for model in [card.id for card in worker.models.values() if not card.parent]:
            await self._loaded(model)
            prompts = self.prompts[model]
            await prompts.check(worker)
            worker.takes_token_ids = (
                self.settings.forward_token_ids and worker.parity == "exact" and await prompts.probe_token_ids(worker)
            )
        if self._warmup is not None:
            self._spawn(self._warmup.run(worker))

    def _make_warmup(self) -> Warmup | None:
        """Of several processes, one warms workers up.

        Raises:
            ConfigError: the prompts cannot be used.
        """
        path = self.settings.warmup_prompts
        if not path or self.control.siblings.number:
            return None
        read_prompts(path)
        return Warmup(path, self.settings.first_byte_timeout, lambda result: self.metrics.warmups.labels(result).inc())

    async def _loaded(self, model: str) -> None:
        """Wait until the model's tokenizer is loaded; the first to ask loads it."""
        if model not in self._loading:
            self.prompts[model] = PoolPrompts(model)
            self._loading[model] = asyncio.create_task(self._load(model))
        await asyncio.shield(self._loading[model])

    async def _load(self, model: str) -> None:
        pool = self.registry.pools.get(model)
        root = pool.root if pool is not None else ""
        limit = max((worker.max_model_len(model) for worker in pool.workers), default=0) if pool is not None else 0
        settings = self.settings
        where = settings.tokenizer or root
        await self.prompts[model].load(where, settings.chat_template, limit, settings.prompt_memory_bytes)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)


class Application:
    """The ASGI application: the two hot endpoints at once, everything else by way of ``rest``."""

    owns_process = False
    """Whether nothing else runs in this process, so that its garbage collector may be tuned."""

    def __init__(self, gateway: Gateway, rest: Any) -> None:
        self.gateway = gateway
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        kind = PATHS.get(scope["path"])
        if kind is not None and scope["method"] == "POST":
            await self.gateway.handle(Client(scope, receive, send), kind)
        else:
            await self._serve_other(scope, receive, send)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            endpoint = find(scope["path"], scope["method"], pass_through=self.gateway.settings.pass_through)
        except ApiError as error:
            await Client(scope, receive, send).fail(error)
            return
        if endpoint is None:
            await self._serve_rest(Client(scope, receive, send), receive, send)
        else:
            made = client_type(endpoint.kind, scope["path"])
            await self.gateway.handle(made(scope, receive, send), endpoint.kind)

    async def _serve_rest(self, client: Client, receive: Receive, send: Send) -> None:
        """Every body is read whole, within the bounds of size and time, before anybody looks at it."""
        settings = self.gateway.settings
        try:
            self._authorize(client.scope)
            parts = [await client.read_body(settings.max_body_bytes, settings.body_timeout)]
        except ClientGone:
            return
        except ApiError as error:
            await client.fail(error)
            return

        async def replay() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": parts.pop()} if parts else await receive()

        # The server sends no body for HEAD, so that whatever answers GET answers it too.
        get = {**client.scope, "method": "GET"} if client.scope["method"] == "HEAD" else client.scope
        await self._rest(get, replay, send)

    def _authorize(self, scope: Scope) -> None:
        """Raises:
        Unauthorized: the path is not open, and the request shows neither key nor admin token. ``/admin`` guards itself, and
        the dashboard's page holds nothing.
        """
        gateway, path = self.gateway, scope["path"]
        if gateway.access is None or path == "/admin" or path.startswith("/admin/") or is_page(path):
            return
        if path in PROBES and (gateway.settings.open_probes or gateway.shows_admin_token(scope["headers"])):
            return
        scope[TENANT] = gateway.access.authenticate(scope["headers"])

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.gateway.start()
                if self.owns_process:
                    _settle()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.gateway.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


class CrossOrigin(Application):
    """The application for web pages of other origins: theirs alone pay for it."""

    def __init__(self, gateway: Gateway, rest: Any) -> None:
        super().__init__(gateway, rest)
        self._shared = share_with_origins(super().__call__, gateway.settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._shared(scope, receive, send)


def _settle() -> None:
    """What was made at the start lasts, so the garbage collector need not go through it again and again; nor through
    the many objects that requests make, nearly all of which go without it, as often as it would."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def create_app(settings: Settings, sources: Sources | None = None, siblings: Siblings | None = None) -> Application:
    """The application for these settings; its lifespan starts and stops the gateway. ``sources`` is where the settings
    came from, to be read again; ``siblings`` the other processes that serve the same port."""
    from router.api import make_rest  # noqa: PLC0415 - the api modules take the gateway's type from here

    gateway = Gateway(settings, sources, siblings)
    if settings.cors_origins:
        return CrossOrigin(gateway, make_rest(gateway))
    return Application(gateway, make_rest(gateway))
