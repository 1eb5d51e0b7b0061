"""``warmroute register``: runs beside a worker and keeps its lease at the gateways while the worker is well."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

import httpx

from router.config import WorkerSpec

TIMEOUT_S = 5.0
RENEWALS = 3
"""How often a lease is renewed within its time, so that two renewals may fail."""

NOT_YET_S = 1.0
"""How long it waits where nothing could be renewed: while the engine loads its model, say."""

TROUBLE = (httpx.HTTPError, httpx.InvalidURL, ExceptionGroup)
"""What httpx raises where nobody answers, or the URL cannot be; a group of exceptions for a port that cannot."""

_log = logging.getLogger(__name__)


class Registration:
    """The leases of an engine: of one worker, or one for each data-parallel rank. ``ttl`` in seconds."""

    def __init__(self, workers: Sequence[WorkerSpec], gateways: Sequence[str], *, ttl: float, token: str = "") -> None:
        self._workers = workers
        self._gateways = [url.rstrip("/") for url in gateways]
        self._ttl = ttl
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._said: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Renew until ``stop`` is set, then take the worker out."""
        async with httpx.AsyncClient(timeout=min(TIMEOUT_S, self._ttl / RENEWALS)) as client:
            while not stop.is_set():
                pause = self._ttl / RENEWALS
                if not await self.renew(client):
                    pause = min(pause, NOT_YET_S)
                try:
                    async with asyncio.timeout(pause):
                        await stop.wait()
                except TimeoutError:
                    continue
            await asyncio.gather(*(self._end(client, *each) for each in self._each()))

    def _each(self) -> list[tuple[str, WorkerSpec]]:
        return [(gateway, worker) for gateway in self._gateways for worker in self._workers]

    async def renew(self, client: httpx.AsyncClient) -> int:
        """Renew every lease if the engine is well; how many could be."""
        if not await self._well(client):
            return 0
        return sum(await asyncio.gather(*(self._renew(client, *each) for each in self._each())))

    async def _well(self, client: httpx.AsyncClient) -> bool:
        try:
            status = (await client.get(f"{self._workers[0].url.partition('#')[0]}/health")).status_code
            why = "" if status == httpx.codes.OK else f"/health answered {status}"
        except TROUBLE as error:
            why = str(error) or type(error).__name__
        self._say("the worker", f"is not well, its leases are not renewed: {why}" if why else "")
        return not why

    async def _renew(self, client: httpx.AsyncClient, gateway: str, worker: WorkerSpec) -> bool:
        try:
            answer = await client.post(f"{gateway}/admin/workers", json=_body(worker, self._ttl), headers=self._headers)
            why = "" if answer.is_success else f"answered {answer.status_code}: {answer.text[:300]}"
        except TROUBLE as error:
            why = str(error) or type(error).__name__
        self._say(gateway, f"did not take the registration: {why}" if why else "")
        return not why

    async def _end(self, client: httpx.AsyncClient, gateway: str, worker: WorkerSpec) -> None:
        """A lease of no time: the gateway drains the worker, and no request is lost."""
        try:
            await client.post(f"{gateway}/admin/workers", json=_body(worker, 0.001), headers=self._headers)
        except TROUBLE as error:
            _log.warning("%s could not be told that the worker leaves: %s", gateway, error)

    def _say(self, who: str, what: str) -> None:
        if self._said.get(who) != what:
            self._said[who] = what
            _log.warning("%s %s", who, what) if what else _log.info("%s: registered", who)


def _body(worker: WorkerSpec, ttl: float) -> dict[str, Any]:
    body = {"url": worker.url, "reports": worker.reports, "name": worker.name, "ttl": ttl}
    key = worker.key.get_secret_value()
    return body | ({"key": key} if key else {})


async def register(
    workers: Sequence[WorkerSpec], gateways: Sequence[str], *, ttl: float, token: str, process: int | None = None
) -> None:
    """Keep an engine's workers registered until SIGTERM or SIGINT, or until the process of that number has ended."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if process is not None and not _watch(process, stop):
        return
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, stop.set)
    await Registration(workers, gateways, ttl=ttl, token=token).run(stop)


def _watch(process: int, stop: asyncio.Event) -> bool:
    """Set ``stop`` when the process ends; False if it has ended."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    except OSError as error:  # a kernel, or a sandbox, without process descriptors
        _log.warning("process %d cannot be watched (%s): its end shows at /health only", process, error.strerror)
        return True
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(descriptor)  # it stays readable, and would keep the loop from sleeping
        os.close(descriptor)
        stop.set()

    loop.add_reader(descriptor, ended)
    return True
