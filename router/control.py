"""The control plane of one process: which workers there are, which settings hold, and how both change while it runs."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from router.admin_state import AdminState, Change, Memory, SharedFile, Store
from router.config import Settings, WorkerSpec
from router.discovery.dns import NameWatch
from router.discovery.kubernetes import PodWatch
from router.discovery.membership import ADMIN, SETTINGS, Membership
from router.discovery.names import DnsSpec
from router.discovery.pods import Found
from router.errors import ApiError, ConfigError, Conflict, InvalidRequest
from router.handover import Handovers
from router.policies import make_policy
from router.probe import works
from router.reload import RELOADABLE, Reloader, Sources, changed
from router.siblings import Siblings
from router.totals import CountFiles, Snapshot, render
from router.workers import Worker

if TYPE_CHECKING:
    from router.app import Gateway

TICK_S = 1.0
"""How often leases are looked at, and what other processes changed."""
MAX_TTL_S = 86_400.0
_KEEP_EVERY = 10
_POLICY_SETTINGS = frozenset(
    {
        "compute_weight",
        "policy",
        "policy_header",
        "saturation_seconds",
        "saturation_tokens",
        "seed",
        "session_header",
        "shadow_policy",
    }
)

_log = logging.getLogger(__name__)


class Control:
    """Owns membership, settings and admin state of a gateway. ``start`` and ``close`` it in the gateway's loop."""

    def __init__(
        self,
        gateway: "Gateway",
        sources: Sources | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._gateway = gateway
        self.siblings = siblings or Siblings()
        directory = self.siblings.directory
        self._store: Store = Memory() if directory is None else SharedFile(directory)
        self.membership = Membership(
            gateway.registry,
            add=gateway.add_worker,
            remove=gateway.remove_worker,
            patience=lambda: max(gateway.settings.drain_timeout, gateway.settings.drain_handover),
            departing=self._departing,
        )
        self.reloader = Reloader(gateway.settings, sources or Sources.of(gateway.settings), self._apply)
        self.handovers = Handovers(lambda result: gateway.metrics.handovers.labels(result).inc())
        self.state = AdminState()
        self._names: dict[DnsSpec, tuple[NameWatch, asyncio.Task[None]]] = {}
        self._pods: tuple[PodWatch, asyncio.Task[None]] | None = None
        self._superseded: set[str] = set()
        """Pods that are looked for no more, and stay until those looked for instead are known."""
        self._tasks: list[asyncio.Task[None]] = []
        self._reload_asked = asyncio.Event()

    async def start(self) -> None:
        """Bring the workers in; returns when every name was looked up once, or could not be."""
        self._claim_settings(self._gateway.settings)
        await self.siblings.start(self._on_call)
        self._settle(await self._store.read())
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._watch_file())]
        watches = [watch.looked_up.wait() for watch in self.watches]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._gateway.settings.discovery_timeout * 2):
                await asyncio.gather(*watches)

    async def close(self) -> None:
        """Stop every task."""
        tasks = (
            self._tasks + self.membership.close() + self.handovers.close() + [task for _, task in self._names.values()]
        )
        tasks += [self._pods[1]] if self._pods is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.siblings.files is not None:
            self._snapshot(self.siblings.files)
        await self.siblings.close()

    def ask_reload(self) -> None:
        """Have the configuration file read now, changed or not."""
        self._reload_asked.set()

    # Workers.

    async def add_worker(self, spec: WorkerSpec, ttl: float = 0.0) -> tuple[Worker, bool]:
        """Add a worker, with ``ttl`` for so many seconds; the worker, and whether it is a fresh one.

        Raises:
            Conflict: its name is taken, or its URL and it brings no lease.
            InvalidRequest: ``ttl`` is out of range.
        """
        if not 0 <= ttl <= MAX_TTL_S:
            raise InvalidRequest(f"ttl is a number of seconds up to {MAX_TTL_S:g}", param="ttl")
        registry = self._gateway.registry
        for other in registry.workers:
            same_url = other.spec.url == spec.url
            if (other.name == spec.title and not same_url) or (same_url and not ttl and not self._departed(spec.url)):
                raise Conflict(f"worker {other.name} at {other.spec.url} is there already", param="url")
        before = registry.find(spec.url)
        fresh = before is None or self._departed(spec.url)
        renewed = ttl > 0 and not fresh and self._same(spec)
        await self._change(lambda state: state.with_worker(spec, ttl), tell=not renewed)
        worker = registry.find(spec.url)
        if worker is None:
            raise Conflict(
                self.membership.problems.get(spec.url, f"worker {spec.title} could not be added"), param="url"
            )
        return worker, fresh

    async def remove_worker(self, worker: Worker) -> None:
        """Remove a worker by hand, whoever named it."""
        url = worker.spec.url
        others = any(origin != ADMIN for origin in self.membership.origin_of(url))
        await self._change(lambda state: state.without_worker(url, overrule=others), at_once=url)

    async def drain_worker(self, worker: Worker, *, drain: bool) -> None:
        url = worker.spec.url
        await self._change(lambda state: state.with_drain(url, drain=drain))

    def lease_of(self, url: str) -> dict[str, float] | None:
        """A worker's lease in seconds, None where it has none."""
        entry = self.state.workers.get(url)
        if entry is None or not entry.ttl:
            return None
        return {"ttl": entry.ttl, "expires_in_s": round(max(0.0, entry.until - time.monotonic()), 3)}

    # Settings.

    async def set_overrides(self, given: Mapping[str, Any]) -> None:
        """Change settings at run time, for all processes; None takes an override back.

        Raises:
            InvalidRequest: a setting is unknown, wrong, or read at the start only; nothing has changed.
        """

        def change(state: AdminState) -> AdminState:
            merged = {**state.overrides, **given}
            overrides = {name: value for name, value in merged.items() if value is not None}
            try:
                self.reloader.check(overrides)
            except ConfigError as error:
                self._refused()
                raise InvalidRequest(str(error), code="settings_refused") from error
            return state.replace(overrides=overrides)

        await self._change(change)

    def describe_settings(self) -> dict[str, Any]:
        """Every setting with its value, who said it, and whether it can be changed now; secrets are masked."""
        reloader, settings = self.reloader, self._gateway.settings
        values = settings.model_dump(mode="json")
        sources = reloader.sources
        return {
            "now": time.time(),
            "open_files": open_files(),
            "file": sources.file or None,
            "error": reloader.error or None,
            "changed_at": reloader.changed_at,
            "applied": reloader.applied,
            "refused": reloader.refused,
            "settings": {
                name: {
                    "value": value,
                    "source": sources.origin(name, reloader.overrides, settings),
                    "reloadable": name in RELOADABLE,
                }
                for name, value in values.items()
            },
        }

    def describe_names(self) -> list[dict[str, Any]]:
        """What every DNS name, and the selector of pods, was last seen to name."""
        return [watch.describe() for watch in self.watches]

    @property
    def watches(self) -> "list[NameWatch | PodWatch]":
        """Who looks for workers."""
        pods = [self._pods[0]] if self._pods is not None else []
        return [*(watch for watch, _ in self._names.values()), *pods]

    # What all processes say together.

    async def metrics(self) -> bytes:
        """The text exposition format, of all processes of this gateway."""
        files = self.siblings.files
        if files is None:
            return self._gateway.metrics.render()
        own = self._snapshot(files)
        answers = await self.siblings.ask("metrics")
        snapshots = [own, *(msgspec.convert(answer, Snapshot) for answer in answers.values())]
        living = {snapshot.pid: snapshot for snapshot in snapshots}
        others = files.others(living)
        return await asyncio.to_thread(render, list(living.values()), others)

    async def in_flight(self) -> dict[str, int]:
        """Requests sent and not finished by worker, of all processes."""
        total = self._in_flight()
        for answer in (await self.siblings.ask("in_flight")).values():
            for name, count in answer.items():
                total[name] = total.get(name, 0) + count
        return total

    async def requests(self, limit: int, request_id: str | None = None) -> list[dict[str, Any]]:
        """The latest decisions of all processes, latest first, or those of one request id."""
        found = self._requests(limit, request_id)
        for answer in (await self.siblings.ask("requests", [limit, request_id])).values():
            found += answer
        return sorted(found, key=lambda item: -float(item["at"]))[:limit]

    def _snapshot(self, files: CountFiles) -> Snapshot:
        snapshot = Snapshot(os.getpid(), self.siblings.number, self._gateway.metrics.families())
        files.keep(snapshot)
        return snapshot

    def _in_flight(self) -> dict[str, int]:
        return {worker.name: worker.load.in_flight for worker in self._gateway.registry.workers}

    def _requests(self, limit: int, request_id: str | None) -> list[dict[str, Any]]:
        kept = self._gateway.settings.recent_requests
        recent = self._gateway.accounting.recent(kept if request_id else limit)
        return [msgspec.to_builtins(item) for item in recent if request_id in (None, item.request_id)]

    # How changes come to be.

    async def _change(self, change: Change, *, at_once: str = "", tell: bool = True) -> None:
        self._settle(await self._store.update(change), at_once=at_once)
        if tell:
            await self.siblings.tell("sync")

    def _settle(self, state: AdminState, *, at_once: str = "") -> None:
        """Make this process as the admin state says."""
        before, self.state = self.state, state
        if state.overrides != before.overrides:
            try:
                self.reloader.set(state.overrides)
            except ConfigError:
                _log.exception("settings that another process accepted are refused here")
        self.membership.claim(ADMIN, self._leased(state))
        self.membership.overrule(removed=state.removed, drained=state.drained)
        self.membership.settle(at_once=at_once)

    def _leased(self, state: AdminState) -> list[WorkerSpec]:
        now = time.monotonic()
        return [entry.worker() for entry in state.workers.values() if not entry.expired(now)]

    def _departed(self, url: str) -> bool:
        return self.membership.leaving(url)

    def _same(self, spec: WorkerSpec) -> bool:
        entry = self.state.workers.get(spec.url)
        return entry is not None and entry.worker() == spec

    async def _tick(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            try:
                await self._look_around()
                if self.siblings.files is not None and not ticks % _KEEP_EVERY:
                    self._snapshot(self.siblings.files)  # a process that is killed loses little of what it counted
            except (ApiError, OSError, ValueError) as error:
                _log.warning("the admin state could not be brought up to date: %s", error)

    async def _look_around(self) -> None:
        state = await self._store.read()
        now = time.monotonic()
        gone = self._gone(state)
        if state.without_expired(now) is not state or gone:
            state = await self._store.update(lambda held: _tidied(held, now, gone))
        if state is not self.state or self.membership.problems:
            self._settle(state)

    def _gone(self, state: AdminState) -> set[str]:
        """URLs that operators removed or drain, and that nobody names any more: what comes to be there is another worker.
        None while a name, or the API of Kubernetes, was not heard yet."""
        if any(watch.answered_at is None for watch in self.watches):
            return set()
        unclaimed = {url for url in state.removed | state.drained if not self.membership.origin_of(url)}
        return {url for url in unclaimed - state.workers.keys() if self._gateway.registry.find(url) is None}

    async def _watch_file(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._gateway.settings.config_interval):
                    await self._reload_asked.wait()
            if self._reload_asked.is_set():
                self._reload_asked.clear()
                self.reload()
            elif self.reloader.sources.file:
                self._look_at_file()

    def _look_at_file(self) -> None:
        before = (self.reloader.applied, self.reloader.refused)
        self.reloader.look()
        if (self.reloader.applied, self.reloader.refused) != before:
            self._said()

    def reload(self) -> None:
        """Read the configuration file now; what becomes of it shows in ``describe_settings``."""
        self.reloader.reload()
        self._said()

    def _said(self) -> None:
        result = "refused" if self.reloader.error else "applied"
        self._gateway.metrics.config_changes.labels(result).inc()

    def _refused(self) -> None:
        self.reloader.refused += 1
        self._gateway.metrics.config_changes.labels("refused").inc()

    def _apply(self, wanted: Settings) -> None:
        """Put checked settings into force, in one go."""
        apply_settings(self._gateway, wanted)
        self._claim_settings(wanted)
        self.membership.settle()

    def _claim_settings(self, settings: Settings) -> None:
        self.membership.claim(SETTINGS, settings.workers)
        for spec in [spec for spec in self._names if spec not in settings.discover]:
            _, task = self._names.pop(spec)
            task.cancel()
            if spec.title not in {wanted.title for wanted in settings.discover}:  # else they stay until it is looked up
                self.membership.release(spec.title)
        for spec in settings.discover:
            if spec not in self._names:
                self._names[spec] = self._watch_name(spec)
            watch = self._names[spec][0]
            watch.interval, watch.timeout = settings.discovery_interval, settings.discovery_timeout
        self._claim_pods(settings)

    def _claim_pods(self, settings: Settings) -> None:
        if self._pods is not None and self._pods[0].spec != settings.pods:
            watch, task = self._pods
            task.cancel()
            self._pods = None
            self._superseded.add(watch.spec.title)
        if settings.pods is None:
            self._release_superseded()
        if self._pods is None and settings.pods is not None:
            watch = PodWatch(settings.pods, self._found_pods)
            self._pods = watch, asyncio.create_task(watch.run())
        if self._pods is not None:
            self._pods[0].configure(settings.kubernetes_watch_seconds, settings.discovery_timeout)

    def _departing(self, worker: Worker) -> None:
        """A worker gets no further request: have it hand its hottest chunks over, by one process of this gateway."""
        seconds, address = self._gateway.settings.drain_handover, worker.spec.report_address
        if not seconds or address is None or self.siblings.number or not worker.synced:
            return
        token = self._gateway.settings.report_token.get_secret_value()
        self.handovers.begin(worker, address, lambda: works(worker), token=token, seconds=seconds)

    def _release_superseded(self, by: str = "") -> None:
        for origin in self._superseded - {by}:
            self.membership.release(origin)
        self._superseded.clear()

    def _found_pods(self, origin: str, found: Found) -> None:
        self._release_superseded(origin)
        self.membership.claim(origin, found.workers)
        self.membership.hold(origin, found.held)
        self.membership.settle(replaced=found.replaced)

    def _watch_name(self, spec: DnsSpec) -> tuple[NameWatch, asyncio.Task[None]]:
        def found(workers: list[WorkerSpec]) -> None:
            self.membership.claim(spec.title, workers)
            self.membership.settle()

        settings = self._gateway.settings
        watch = NameWatch(spec, found, interval=settings.discovery_interval, timeout=settings.discovery_timeout)
        return watch, asyncio.create_task(watch.run())

    async def _on_call(self, operation: str, arguments: Any) -> Any:
        """What another process of this gateway asks."""
        match operation:
            case "sync":
                self._settle(await self._store.read())
                return True
            case "metrics" if self.siblings.files is not None:
                return self._snapshot(self.siblings.files)
            case "in_flight":
                return self._in_flight()
            case "requests":
                return self._requests(*arguments)
            case _:
                return await self._gateway.board.on_call(operation, arguments)


def open_files() -> int | None:
    """How many files this process may have open; None where there is no limit, or it cannot be known."""
    try:
        import resource  # noqa: PLC0415 - not on every system
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _tidied(state: AdminState, now: float, gone: set[str]) -> AdminState:
    kept = state.without_expired(now)
    if not (kept.removed | kept.drained) & gone:
        return kept
    return kept.replace(removed=kept.removed - gone, drained=kept.drained - gone)


def apply_settings(gateway: "Gateway", settings: Settings) -> None:
    """Have every part of a gateway work by other settings from now on. Requests under way keep what they began with."""
    policy = gateway.policy
    if _POLICY_SETTINGS & set(changed(gateway.settings, settings)):
        policy = make_policy(settings)  # a fresh one has forgotten whose turn it was
    if settings.log_level != gateway.settings.log_level:
        logging.getLogger().setLevel(settings.log_level.upper())
    gateway.settings = settings
    gateway.policy = policy
    gateway.observe()
    gateway.pipeline.reconfigure(settings, policy)
    gateway.admission.resize(
        settings.max_in_flight, settings.max_queue, settings.queue_timeout, settings.max_bodies_bytes
    )
    for worker in gateway.registry.workers:
        worker.upstream.timeouts = gateway.timeouts()
        worker.breaker.configure(settings.breaker_failures, settings.breaker_seconds)
    for monitor in gateway.monitors:
        monitor.configure(settings.health_interval, settings.health_timeout, settings.models_interval)
