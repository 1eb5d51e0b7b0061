"""Who wants which worker.

Each *origin* (the settings, the admin API, every name, every set of pods) claims workers by URL; a worker is there while any origin
claims it, and is described as the first of them says, in the order of ``origins``. A worker nobody claims any more is
drained, then removed; claimed again before that, it goes on as if nothing had happened, with its cache still known.
Removing a worker by hand overrules every claim until all claims of it have ended. An origin may also *hold* a worker, its
own or another's: no request goes there, and what is known of it is kept.
"""

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping

from router.config import WorkerSpec
from router.discovery.names import NOT_READY
from router.errors import ConfigError, Conflict
from router.workers import Registry, Worker

SETTINGS = "settings"
ADMIN = "admin"
POLL_S = 0.1

_log = logging.getLogger(__name__)


class Membership:
    """Keeps the registry as the claims say. ``patience`` is how long, in seconds, a worker nobody claims may finish;
    ``departing`` is told of workers that get no further request because they leave or are drained."""

    def __init__(
        self,
        registry: Registry,
        *,
        add: Callable[[WorkerSpec], Worker],
        remove: Callable[[Worker], None],
        patience: Callable[[], float],
        departing: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._add = add
        self._remove = remove
        self._patience = patience
        self._departing = departing
        self._claims: dict[str, dict[str, WorkerSpec]] = {}
        self._held: dict[str, dict[str, str]] = {}
        self._removed: frozenset[str] = frozenset()
        self._drained: frozenset[str] = frozenset()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self.problems: dict[str, str] = {}
        """Why a claimed worker is not there, by URL."""

    def claim(self, origin: str, specs: Iterable[WorkerSpec]) -> None:
        """What an origin wants from now on, in whole; takes effect with ``settle``."""
        self._claims[origin] = {spec.url: spec for spec in specs}

    def hold(self, origin: str, held: Mapping[str, str]) -> None:
        """Which URLs an origin wants no request sent to, and why; takes effect with ``settle``."""
        self._held[origin] = dict(held)

    def release(self, origin: str) -> None:
        self._claims.pop(origin, None)
        self._held.pop(origin, None)

    def overrule(self, *, removed: Iterable[str], drained: Iterable[str]) -> None:
        """URLs that operators took out, or drain; takes effect with ``settle``."""
        self._removed = frozenset(removed)
        self._drained = frozenset(drained)

    @property
    def origins(self) -> list[str]:
        """By rank: the settings, the admin API, then names."""
        return sorted(
            self._claims,
            key=lambda origin: ((SETTINGS, ADMIN).index(origin) if origin in (SETTINGS, ADMIN) else 2, origin),
        )

    def origin_of(self, url: str) -> list[str]:
        """Who claims a worker."""
        return [origin for origin in self.origins if url in self._claims[origin]]

    def leaving(self, url: str) -> bool:
        """Whether a worker finishes what it has because nobody claims it any more."""
        return url in self._leaving

    def drained(self, url: str) -> bool:
        """Whether operators drain a worker, and can take it back."""
        return url in self._drained

    def settle(self, *, at_once: str = "", replaced: Container[str] = ()) -> None:
        """Make the registry as the claims say. ``at_once`` is a URL that is not drained first; at those ``replaced``
        another worker is now than before. O(workers)."""
        wanted = self._wanted()
        for worker in self._registry.workers:
            spec = wanted.get(worker.spec.url)
            if spec is None:
                self._let_go(worker, at_once=worker.spec.url in (at_once, *self._removed))
            elif spec != worker.spec or spec.url in replaced:
                self._drop(worker)
            else:
                self._keep(worker)
        self._add_missing(wanted)
        held = {url: why for origin in self.origins for url, why in self._held.get(origin, {}).items()}
        for worker in self._registry.workers:
            self._mark(worker, held.get(worker.spec.url, ""))

    def _mark(self, worker: Worker, held: str) -> None:
        url, departed = worker.spec.url, worker.departing
        leaves = url in self._drained or url in self._leaving
        worker.held = held
        worker.draining = leaves or bool(held)
        worker.departing = leaves or held not in ("", NOT_READY)
        if worker.departing and not departed:
            self._departing(worker)

    def close(self) -> list[asyncio.Task[None]]:
        """Stop waiting for workers that leave; the tasks to be awaited."""
        tasks = list(self._leaving.values())
        for task in tasks:
            task.cancel()
        return tasks

    def _wanted(self) -> Mapping[str, WorkerSpec]:
        wanted: dict[str, WorkerSpec] = {}
        for origin in reversed(self.origins):
            wanted.update(self._claims[origin])
        return {url: spec for url, spec in wanted.items() if url not in self._removed}

    def _add_missing(self, wanted: Mapping[str, WorkerSpec]) -> None:
        present = {worker.spec.url for worker in self._registry.workers}
        said, self.problems = self.problems, {}
        for url, spec in wanted.items():
            if url in present:
                continue
            try:
                self._add(spec)
            except (Conflict, ConfigError) as error:
                why = self.problems[url] = str(error)
                if said.get(url) != why:
                    _log.error("worker %s from %s is left out: %s", spec.title, self.origin_of(url), why)

    def _let_go(self, worker: Worker, *, at_once: bool) -> None:
        if at_once:
            self._drop(worker)
        elif worker.spec.url not in self._leaving:
            _log.info("worker %s is named nowhere any more: it finishes what it has and is removed", worker.name)
            self._leaving[worker.spec.url] = asyncio.create_task(self._finish(worker))

    def _keep(self, worker: Worker) -> None:
        if (task := self._leaving.pop(worker.spec.url, None)) is not None:
            task.cancel()
            _log.info("worker %s is back", worker.name)

    def _drop(self, worker: Worker) -> None:
        if (task := self._leaving.pop(worker.spec.url, None)) is not None and task is not asyncio.current_task():
            task.cancel()
        self._remove(worker)

    async def _finish(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience()
        while (worker.load.in_flight or worker.hands_over) and loop.time() < deadline:  # noqa: ASYNC110 - a count, nobody signals it
            await asyncio.sleep(POLL_S)
        self._drop(worker)
        if self.problems:
            self.settle()  # one that was left out may have waited for this one's name
