"""Health: which workers answer, what they serve, and what each can do."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from router.errors import UNDECODABLE, RouterError, UpstreamError
from router.workers import ModelCard, Registry, Worker

_DESCRIBE_TIMEOUT_S = 5.0
_FAILURES_TO_DOWN = 2

_log = logging.getLogger(__name__)


class _ModelList(msgspec.Struct):
    data: list[ModelCard]


class _NoModels(RouterError):
    """A worker did not say what it serves; the text says why."""


def bases_of(models: dict[str, ModelCard]) -> set[tuple[str, str | None, int | None]]:
    """What tokenization hangs on: the models that are no adapters."""
    return {(card.id, card.root, card.max_model_len) for card in models.values() if not card.parent}


class Monitor:
    """Checks one worker, once per interval. ``checked`` is set after the first time; ``came_up`` is awaited in the background each time it starts to answer."""

    def __init__(
        self,
        worker: Worker,
        registry: Registry,
        *,
        interval: float,
        timeout: float,
        models_interval: float = 30.0,
        came_up: Callable[[Worker], Awaitable[None]],
    ) -> None:
        self._worker = worker
        self._registry = registry
        self.configure(interval, timeout, models_interval)
        self._came_up = came_up
        self._nudged = asyncio.Event()
        self.checked = asyncio.Event()
        self._failures = 0
        self._said_down = False
        self._suspect = False
        self._listed_at = 0.0
        self._qualifying: asyncio.Task[None] | None = None

    def configure(self, interval: float, timeout: float, models_interval: float) -> None:
        """How often to check, how long to wait, how often to look at the model list; in seconds."""
        self._interval = interval
        self._timeout = timeout
        self._models_interval = models_interval

    def nudge(self) -> None:
        """Check now, and if it answers, see again what it serves: it may be another process."""
        self._suspect = True
        self._nudged.set()

    async def run(self) -> None:
        """Check until cancelled."""
        try:
            while True:
                self._nudged.clear()
                await self._check_safely()
                self.checked.set()
                try:
                    async with asyncio.timeout(self._interval):
                        await self._nudged.wait()
                except TimeoutError:
                    pass
                else:
                    await asyncio.sleep(self._interval / 20)  # a nudge asks for haste, not for a storm
        finally:
            if self._qualifying is not None:
                self._qualifying.cancel()

    async def _check_safely(self) -> None:
        try:
            await self.check()
        except Exception:  # noqa: BLE001 - whatever a worker answers, it must not end the checks
            _log.exception("checking worker %s failed", self._worker.name)
            self._failed("its answers could not be understood; the router's log says more")

    async def check(self) -> None:
        """One check: health, and for a worker that was down also what it serves."""
        try:
            answer = await self._worker.upstream.fetch("GET", "/health", timeout=self._timeout)
        except UpstreamError as error:
            self._failed(str(error))
            return
        if answer.status != 200:
            self._failed(f"GET /health answered {answer.status}")
            return
        self._failures = 0
        if not self._worker.up or self._suspect:
            await self._describe()
        elif asyncio.get_running_loop().time() - self._listed_at >= self._models_interval:
            await self._refresh()

    async def _models(self) -> dict[str, ModelCard]:
        """The worker's models by name.

        Raises:
            _NoModels: it does not say.
        """
        self._listed_at = asyncio.get_running_loop().time()
        try:
            answer = await self._worker.upstream.fetch("GET", "/v1/models", timeout=_DESCRIBE_TIMEOUT_S)
            if answer.status != 200:
                raise _NoModels(f"GET /v1/models answered {answer.status}")
            cards = msgspec.json.decode(answer.body, type=_ModelList).data
        except (UpstreamError, *UNDECODABLE) as error:
            raise _NoModels(f"its model list cannot be read: {error}") from error
        if not cards:
            raise _NoModels("its model list is empty")
        return {card.id: card for card in cards}

    async def _refresh(self) -> None:
        """See whether a running worker serves other models: LoRA adapters are loaded and unloaded while it runs."""
        worker = self._worker
        try:
            models = await self._models()
        except _NoModels as error:
            _log.debug("worker %s: %s", worker.name, error)
            return
        if bases_of(models) != bases_of(worker.models):
            self._suspect = True  # another process, or other weights: the next check looks at everything
        if models.keys() != worker.models.keys() or any(
            (models[name].root, models[name].parent) != (worker.models[name].root, worker.models[name].parent)
            for name in models
        ):
            _log.info("worker %s now serves %s", worker.name, ", ".join(models))
            worker.models = models
            self._registry.regroup()

    async def _describe(self) -> None:
        worker = self._worker
        try:
            models = await self._models()
        except _NoModels as error:
            self._failed(str(error))
            return
        self._suspect = False
        worker.models = models
        worker.has_tokenize = True
        worker.engine_version = await self._version()
        was_up, worker.up, worker.down_reason = worker.up, True, ""
        self._said_down = False
        # Another process may answer there now: what was found of the last one is found again.
        worker.parity, worker.takes_token_ids = "unchecked", False
        self._registry.regroup()
        if not was_up:
            _log.info("worker %s is up, serving %s", worker.name, ", ".join(worker.models))
        if self._qualifying is not None:
            self._qualifying.cancel()
        self._qualifying = asyncio.create_task(self._qualify())

    async def _version(self) -> str:
        try:
            answer = await self._worker.upstream.fetch("GET", "/version", timeout=self._timeout)
            return str(msgspec.json.decode(answer.body, type=dict[str, str]).get("version", ""))
        except (UpstreamError, *UNDECODABLE):
            return ""

    async def _qualify(self) -> None:
        try:
            await self._came_up(self._worker)
        except Exception:  # noqa: BLE001 - it still serves; what it could not show stays off
            _log.exception("checking what worker %s can do failed", self._worker.name)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        worker = self._worker
        if worker.up and (self._failures >= _FAILURES_TO_DOWN or "cannot be reached" in reason):
            worker.mark_down(reason)
        if worker.up:
            return
        worker.down_reason = reason
        if not self._said_down:
            self._said_down = True
            _log.warning("worker %s is down: %s; checked again every %g s", worker.name, reason, self._interval)
