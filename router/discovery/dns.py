"""Workers found by DNS: every address of a name is one, looked up again and again.

What was found last stays while look-ups fail or find nothing: a name server's trouble is not the workers'. An address
is given up only after it was missing from ``MISSING`` answers in a row, because some servers hand out a few addresses
of many in turn; whether it still answers is the health check's to say.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from router.config import DEFAULT_REPORT_PORT, WorkerSpec
from router.discovery.names import DnsSpec
from router.errors import ConfigError, RouterError

MISSING = 3
"""Answers in a row that an address must be missing from."""

Endpoint = tuple[str, int]
Resolve = Callable[[DnsSpec], Awaitable[list[Endpoint]]]

_log = logging.getLogger(__name__)


class LookupFailed(RouterError):
    """A name could not be resolved; the text says why."""


class NameWatch:
    """Looks one name up. ``found`` is given the workers whenever they changed."""

    def __init__(
        self,
        spec: DnsSpec,
        found: Callable[[list[WorkerSpec]], None],
        *,
        interval: float,
        timeout: float,
        resolve: Resolve | None = None,
    ) -> None:
        self.spec = spec
        self.interval = interval
        self.timeout = timeout
        self.error = "not looked up yet"
        self.looked_up = asyncio.Event()
        self.answered_at: float | None = None
        """When the name was last resolved, by the loop's clock."""
        self._found = found
        self._resolve = resolve or (resolve_srv if spec.kind == "srv" else AddressResolver())
        self._missing: dict[Endpoint, int] = {}

    @property
    def endpoints(self) -> list[Endpoint]:
        """The addresses believed in, sorted."""
        return sorted(self._missing)

    @property
    def counts(self) -> tuple[int, int]:
        """Addresses that are workers, and none that are held."""
        return len(self._missing), 0

    async def run(self) -> None:
        """Look up until cancelled."""
        while True:
            await self.look_up()
            await asyncio.sleep(self.interval)

    async def look_up(self) -> None:
        """Look up once; whatever goes wrong is noted in ``error``."""
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._resolve(self.spec)
            self._take(set(answer)) if answer else self._failed("the name has no address")
        except TimeoutError:
            self._failed(f"no answer within {self.timeout:g} s")
        except (LookupFailed, OSError, UnicodeError) as error:
            self._failed(str(error))
        except Exception as error:  # noqa: BLE001 - whatever a name server sends, it must not end the watch
            _log.debug("looking up %s", self.spec.title, exc_info=True)
            self._failed(f"{type(error).__name__}: {error}")
        self.looked_up.set()

    def describe(self) -> dict[str, Any]:
        """For the admin endpoints."""
        return {
            "name": self.spec.title,
            "workers": [f"{host}:{port}" for host, port in self.endpoints],
            "error": self.error,
        }

    def _failed(self, why: str) -> None:
        if self.error != why:
            kept = f"; its last {len(self._missing)} workers are kept" if self._missing else ""
            _log.warning("looking up %s failed: %s%s", self.spec.title, why, kept)
        self.error = why

    def _take(self, answer: set[Endpoint]) -> None:
        self.answered_at = asyncio.get_running_loop().time()
        before = set(self._missing)
        for endpoint in before - answer:
            self._missing[endpoint] += 1
        self._missing = {at: missed for at, missed in self._missing.items() if missed < MISSING}
        self._missing.update(dict.fromkeys(answer, 0))
        after = set(self._missing)
        if self.error or before != after:
            _log.info("%s names %d workers", self.spec.title, len(after))
            self._found([worker for endpoint in self.endpoints for worker in self._workers(endpoint)])
        self.error = ""

    def _workers(self, endpoint: Endpoint) -> list[WorkerSpec]:
        try:
            return _workers(self.spec, *endpoint)
        except ValueError:
            _log.warning("%s names %s:%d, which is no worker's address", self.spec.title, *endpoint)
            return []


def _workers(spec: DnsSpec, host: str, port: int) -> list[WorkerSpec]:
    shown = f"[{host}]" if ":" in host else host
    reports = "none" if spec.reports == "none" else f"{shown}:{spec.reports or DEFAULT_REPORT_PORT}"
    url = f"http://{shown}:{port}"
    return WorkerSpec.all_of({"url": url, "reports": reports} | ({"dp": spec.dp} if spec.dp > 1 else {}))


class AddressResolver:
    """A and AAAA records, as this machine resolves names (search domains, /etc/hosts).

    The system's resolver cannot be interrupted, so it runs in a daemon thread of its own, and a look-up that is still
    under way when the next one is due is waited for instead of being asked again.
    """

    def __init__(self) -> None:
        self._pending: asyncio.Future[list[str]] | None = None

    async def __call__(self, spec: DnsSpec) -> list[Endpoint]:
        """Raises:
        LookupFailed: the name is not known, or nobody could tell.
        """
        if self._pending is None or self._pending.done():
            self._pending = _in_daemon_thread(spec.name, spec.port)
        return [(host, spec.port) for host in await asyncio.shield(self._pending)]


def _in_daemon_thread(name: str, port: int) -> asyncio.Future[list[str]]:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, awaited or not

    def settle(result: list[str] | None, error: str) -> None:
        if not answer.done():
            answer.set_exception(LookupFailed(error)) if result is None else answer.set_result(result)

    def work() -> None:
        result, why = None, ""
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            result = sorted({str(item[4][0]) for item in found})
        except (OSError, UnicodeError) as error:
            why = str(error)
        with suppress(RuntimeError):  # the loop ended meanwhile
            loop.call_soon_threadsafe(settle, result, why)

    threading.Thread(target=work, name=f"look-up of {name}", daemon=True).start()
    return answer


async def resolve_srv(spec: DnsSpec) -> list[Endpoint]:
    """The targets of a name's SRV records and their ports; needs the extra ``srv``.

    Raises:
        LookupFailed: as above.
    """
    try:
        import dns.asyncresolver  # noqa: PLC0415 - an extra
        import dns.exception  # noqa: PLC0415
    except ImportError as error:
        raise LookupFailed("dns+srv:// needs dnspython: pip install 'warmroute[srv]'") from error
    try:
        answer = await dns.asyncresolver.resolve(spec.name, "SRV", search=True)
    except dns.exception.DNSException as error:
        raise LookupFailed(str(error) or type(error).__name__) from error
    return sorted({(record.target.to_text(omit_final_dot=True), record.port) for record in answer})


def check_srv(specs: list[DnsSpec]) -> None:
    """Raises:
    ConfigError: SRV records are asked for, and what resolves them is not installed.
    """
    import importlib.util  # noqa: PLC0415 - only at start

    if any(spec.kind == "srv" for spec in specs) and importlib.util.find_spec("dns") is None:
        raise ConfigError("discover: dns+srv:// needs dnspython: pip install 'warmroute[srv]'")
