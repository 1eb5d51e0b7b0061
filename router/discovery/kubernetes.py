"""Workers found by watching the Kubernetes API: the pods that a label selector matches.

List, then watch from the version that was listed; the watch ends after ``watch_seconds``, by the server's clock or, if
nothing is heard, by ours, and goes on from the version that was heard last, bookmarks included. Where the server does not
know that version any more (410), everything is listed again and compared. What was found last stays while the API
cannot be asked. Needs ``list`` and ``watch`` on ``pods`` in one namespace, and nothing else.

The client library finds the credentials, reads a token again that was refused, and speaks TLS; it is imported when the
first pods are looked for. It is opened anew after every failure, so that certificates and files that were replaced count.
"""

import asyncio
import logging
import math
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from router.discovery.names import PodSpec
from router.discovery.pods import Found, Metadata, Pod, Pods
from router.errors import UNDECODABLE, ConfigError, RouterError

BACKOFF_S = (0.1, 10.0)
UNANSWERED_S = 0.5
"""Longest pause where nobody answered: asking again costs the API nothing."""
CALM_S = 1.0
"""A watch that ended sooner than this without a word counts as failed."""
PATIENCE_S = 5.0
"""How much longer than the server should a watch is waited for."""
PAGE = 500
"""Pods asked for at once."""
MOST_BYTES = 16 << 20
"""Longest event: etcd's objects are smaller."""
_GONE = 410
_RESUMES = 3
"""How often in a row a watch may fail to go on before everything is listed again."""
_USER = re.compile(r'User "([^"]+)"')

_log = logging.getLogger(__name__)


class ApiTrouble(RouterError):
    """The API did not do what was asked; ``status`` is HTTP's, 0 where there is none."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class _ListMetadata(msgspec.Struct, rename={"next_page": "continue", "version": "resourceVersion"}):
    version: str = ""
    next_page: str | None = None


class _List(msgspec.Struct):
    metadata: _ListMetadata = msgspec.field(default_factory=_ListMetadata)
    items: list[Pod] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Marked(msgspec.Struct):
    metadata: Metadata = msgspec.field(default_factory=Metadata)


class Api:
    """One open client. ``http`` is the library's, which adds address and credentials; ``patience`` bounds every step."""

    def __init__(self, http: Any, namespace: str, selector: str, patience: float) -> None:
        self._http = http
        self.namespace = namespace
        self._selector = selector
        self._patience = patience
        self._path = f"api/v1/namespaces/{namespace}/pods"

    async def pods(self) -> tuple[list[Pod], str]:
        """All pods, and the version they were of.

        Raises:
            ApiTrouble: they could not be listed.
        """
        try:
            return await self._pages(PAGE)
        except ApiTrouble as error:
            if error.status != _GONE:
                raise
            return await self._pages(0)  # the version of the first page was forgotten before the last was asked for

    async def _pages(self, limit: int) -> tuple[list[Pod], str]:
        pods: list[Pod] = []
        after: dict[str, str] = {}
        while True:
            params = {"labelSelector": self._selector, **({"limit": str(limit)} if limit else {}), **after}
            async with asyncio.timeout(self._patience):
                answer = await self._http.get(self._path, params=params)
            if answer.status_code != 200:
                raise self._trouble("list", answer.status_code, answer.content)
            page = msgspec.json.decode(answer.content, type=_List)
            pods += page.items or ()
            if not page.metadata.next_page:
                return pods, page.metadata.version
            after = {"continue": page.metadata.next_page}

    async def watch(self, version: str, seconds: float) -> AsyncGenerator[_Event | None, None]:
        """What happens from a version on, for so many seconds; None once the server has agreed to tell.

        Raises:
            ApiTrouble: the server refused, or went silent.
        """
        params = {
            "labelSelector": self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        loop = asyncio.get_running_loop()
        timeouts = (self._patience, None, self._patience, self._patience)  # to connect, read, write, wait for the pool
        request = self._http.build_request("GET", self._path, params=params, timeout=timeouts)
        async with asyncio.timeout(self._patience):
            answer = await self._http.send(request, stream=True)
        try:
            if answer.status_code != 200:
                async with asyncio.timeout(self._patience):
                    raise self._trouble("watch", answer.status_code, await answer.aread())
            yield None
            deadline = loop.time() + max(1.0, seconds) + PATIENCE_S
            async for line in _lines(answer.aiter_bytes(), deadline):
                yield msgspec.json.decode(line, type=_Event)
        finally:
            await answer.aclose()

    def _trouble(self, verb: str, status: int, body: bytes) -> ApiTrouble:
        try:
            said = msgspec.json.decode(body, type=_Status).message
        except UNDECODABLE:
            said = body[:200].decode(errors="replace")
        if status == 403:
            return ApiTrouble(self._forbidden(verb, said), status)
        if status == 401:
            return ApiTrouble(f"the API does not accept the credentials (401): {said}", status)
        return ApiTrouble(f"the API answered {status} to {verb} pods in namespace {self.namespace}: {said}", status)

    def _forbidden(self, verb: str, said: str) -> str:
        named = _USER.search(said)
        who = named[1] if named else "the gateway's service account"
        return (
            f"{who} may not {verb} pods in namespace {self.namespace} (403). Give it a Role in that namespace with the "
            'rule {apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]}, by a RoleBinding'
        )


async def _lines(parts: AsyncIterator[bytes], deadline: float) -> AsyncIterator[bytes]:
    """Lines of a body, which ends when the server ends it.

    Raises:
        ApiTrouble: it did not end in time, or a line is too long.
    """
    kept = bytearray()
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                part = await anext(parts, None)
        except TimeoutError:
            raise ApiTrouble("the API fell silent within a watch") from None
        if part is None:
            return
        kept += part
        *lines, rest = kept.split(b"\n")
        kept = rest
        if len(kept) > MOST_BYTES:
            raise ApiTrouble(f"an event of a watch is longer than {MOST_BYTES} bytes")
        for line in filter(None, lines):
            yield bytes(line)


class PodWatch:
    """Follows the pods of one selector. ``found`` is given the origin's name and the workers whenever they, or why some are
    held, changed."""

    def __init__(
        self,
        spec: PodSpec,
        found: Callable[[str, Found], None],
        *,
        watch_seconds: float = 60.0,
        timeout: float = 5.0,
        rng: random.Random | None = None,
    ) -> None:
        self.spec = spec
        self.configure(watch_seconds, timeout)
        self.error = "not watched yet"
        self.looked_up = asyncio.Event()
        self.answered_at: float | None = None
        """When the API was last heard, by the loop's clock."""
        self.relists = {"start": 0, "expired": 0, "failed": 0}
        self.pods = Pods(spec)
        self._found = found
        self._rng = rng or random.Random()  # noqa: S311 - spreads reconnects
        self._version = ""
        self._cause = "start"
        self._failures = 0
        self._answered = False
        self._calm_from = 0.0
        self._last: tuple[Any, ...] = ()
        self._said_problems: dict[str, str] = {}

    def configure(self, watch_seconds: float, timeout: float) -> None:
        """How long a watch lasts, and how long an answer is waited for."""
        self._watch_seconds = watch_seconds
        self._timeout = timeout

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                self._calm_from = math.inf
                await self._follow()
            except ApiTrouble as error:
                self._failed(str(error), error.status)
            except TimeoutError:
                self._failed(f"the API did not answer within {self._timeout:g} s")
            except Exception as error:  # noqa: BLE001 - whatever an API server sends, it must not end the watch
                foreseen = _is_foreseen(error)
                if not foreseen:
                    _log.debug("watching %s", self.spec.title, exc_info=True)
                    self._version, self._cause = "", "failed"  # what it was about may have been lost
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                self._failed(why, 0 if foreseen else 200)
            self.looked_up.set()
            await asyncio.sleep(self._pause())

    def describe(self) -> dict[str, Any]:
        """For the admin endpoints."""
        return {
            "name": self.spec.title,
            "workers": list(self.pods.names),
            "held": {name: why for name, why in self.pods.names.items() if why},
            "problems": dict(self.pods.problems),
            "error": self.error,
        }

    @property
    def counts(self) -> tuple[int, int]:
        """Workers that may be used, and those that are held."""
        held = sum(map(bool, self.pods.names.values()))
        return len(self.pods.names) - held, held

    def _pause(self) -> float:
        shortest, longest = BACKOFF_S if self._answered else (BACKOFF_S[0], UNANSWERED_S)
        return min(longest, shortest * 2.0 ** min(self._failures, 16)) * self._rng.uniform(0.5, 1.0)

    async def _follow(self) -> None:
        async with _open(self.spec, self._timeout) as api:
            while True:
                if not self._version:
                    await self._list(api)
                await self._watch(api)

    async def _list(self, api: Api) -> None:
        pods, self._version = await api.pods()
        self.relists[self._cause] += 1
        self.pods.replace(pods)
        self._tell()
        self.answered_at = asyncio.get_running_loop().time()
        self.looked_up.set()
        if not self._version:
            raise ApiTrouble("the API listed pods without a resourceVersion")

    async def _watch(self, api: Api) -> None:
        loop = asyncio.get_running_loop()
        self._calm_from = loop.time() + CALM_S
        async with aclosing(api.watch(self._version, self._watch_seconds)) as events:
            async for event in events:
                if event is not None:
                    self._apply(event)
                    self._calm_from = 0.0
                self._heard()
        if loop.time() < self._calm_from:
            raise ApiTrouble("the API ends every watch at once", 200)
        self._failures = 0

    def _apply(self, event: _Event) -> None:
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise ApiTrouble(f"the API ended the watch ({status.code}): {status.message}", status.code)
        if event.type == "BOOKMARK":
            self._version = msgspec.json.decode(event.object, type=_Marked).metadata.resourceVersion or self._version
            return
        pod = msgspec.json.decode(event.object, type=Pod)
        (self.pods.remove if event.type == "DELETED" else self.pods.put)(pod)
        self._version = pod.metadata.resourceVersion or self._version
        self._tell()

    def _tell(self) -> None:
        found = self.pods.found()
        state = (found.workers, found.held)
        if state != self._last or found.replaced:
            usable, held = self.counts
            _log.info("%s names %d workers, %d of them held", self.spec.title, usable + held, held)
            self._found(self.spec.title, found)
            self._last = state
        for name, why in self.pods.problems.items():
            if self._said_problems.get(name) != why:
                _log.warning("pod %s is no worker: %s", name, why)
        self._said_problems = dict(self.pods.problems)

    def _heard(self) -> None:
        if self.error:
            _log.info("watching %s", self.spec.title)
        self.error = ""
        self.answered_at = asyncio.get_running_loop().time()

    def _failed(self, why: str, status: int = 0) -> None:
        self._answered = bool(status)
        self._failures = 1 if asyncio.get_running_loop().time() > self._calm_from else self._failures + 1
        if status == _GONE:
            self._version, self._cause = "", "expired"
            return
        if self._failures > _RESUMES:
            # What comes back after a while may have forgotten what it said.
            self._version, self._cause = "", "failed"
        if self.error != why:
            kept = f"; the last {len(self.pods.names)} workers are kept" if self.pods.names else ""
            _log.warning("watching %s failed: %s%s", self.spec.title, why, kept)
        self.error = why


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, (OSError, *UNDECODABLE)) or type(error).__module__.startswith("httpx")


@asynccontextmanager
async def _open(spec: PodSpec, timeout: float) -> AsyncIterator[Api]:  # noqa: ASYNC109 - covers each step
    """The client, with the credentials of this pod, of ``KUBECONFIG`` or of ``~/.kube/config``.

    Raises:
        ApiTrouble: there are none, or they cannot be used.
    """
    try:
        from lightkube.config.client_adapter import AsyncClient, ConnectionParams  # noqa: PLC0415 - an extra
        from lightkube.config.kubeconfig import KubeConfig  # noqa: PLC0415
        from lightkube.core.exceptions import ConfigError as NoConfig  # noqa: PLC0415
    except ImportError as error:
        raise ApiTrouble("the Kubernetes API needs lightkube: pip install 'warmroute[k8s]'") from error
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request
    try:
        config = KubeConfig.from_env().get()
        assert config is not None, "without a default there is always one"
        http = AsyncClient(config, ConnectionParams(timeout=timeout))  # type: ignore[arg-type] # seconds will do
    except (NoConfig, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ApiTrouble(
            f"no credentials for the Kubernetes API: no service account's token is mounted here, and {error}"
        ) from error
    async with http:
        yield Api(http, spec.namespace or config.namespace, spec.selector, timeout)


def check_kubernetes(selector: str) -> None:
    """Raises:
    ConfigError: pods are asked for, and what talks to the API is not installed.
    """
    import importlib.util  # noqa: PLC0415 - only at start

    if selector and importlib.util.find_spec("lightkube") is None:
        raise ConfigError("kubernetes_selector needs lightkube: pip install 'warmroute[k8s]'")
