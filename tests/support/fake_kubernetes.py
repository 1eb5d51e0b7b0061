"""A fake Kubernetes API server: lists and watches pods of one namespace, over real HTTP.

It keeps versions and a history as etcd does, pages lists, sends bookmarks, forgets old versions (410), and can be told to
break: to be forbidding, to cut connections, to fall silent with them open, and to be gone for a while.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
import yaml

Pod = dict[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
NAMESPACE = "ml"
USER = "system:serviceaccount:ml:gateway"


class FakeKubernetes:
    """Behaviour is set by attributes, at any time; what was asked can be read from others."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.version = 100
        self.oldest = 0
        self.history: list[tuple[int, str, Pod]] = []
        self.tokens = {"good"}
        self.forbidden: set[str] = set()
        self.fail_with = 0
        self.gone_by_status = False
        self.gone_while_paging = 0
        self.bookmark_every = 0.2
        self.half_open = False
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.watching = 0
        self.port = 0
        self.tls: tuple[str | None, str | None] = (None, None)
        self._changed = asyncio.Condition()
        self._cut = 0
        self._uids = 0
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    # What happens to pods.

    def add(self, name: str, ip: str = "127.0.0.1", *, ready: bool = True, **members: Any) -> Pod:
        """A pod, running. ``labels``, ``ports`` by name, ``annotations`` and ``uid`` may be given."""
        self._uids += 1
        ports = [{"name": key, "containerPort": number} for key, number in members.get("ports", {}).items()]
        return self._put(
            "ADDED",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": NAMESPACE,
                    "uid": members.get("uid", f"uid-{self._uids}"),
                    "creationTimestamp": f"2026-01-01T00:{self._uids // 60 % 60:02}:{self._uids % 60:02}Z",
                    "labels": members.get("labels", {"app": "vllm"}),
                    "annotations": members.get("annotations"),
                },
                "spec": {"containers": [{"name": "vllm", "ports": ports}], "nodeName": "node"},
                "status": {
                    "phase": "Running",
                    "podIP": ip,
                    "conditions": [
                        {"type": "PodScheduled", "status": "True"},
                        {"type": "Ready", "status": "True" if ready else "False"},
                    ],
                },
            },
        )

    def ready(self, name: str, *, ready: bool) -> None:
        pod = self._copy(name)
        pod["status"]["conditions"][1]["status"] = "True" if ready else "False"
        self._put("MODIFIED", pod)

    def terminate(self, name: str) -> None:
        """As the API server does when a pod is deleted: it stays, with a deadline, until its containers have ended."""
        pod = self._copy(name)
        pod["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z"
        self._put("MODIFIED", pod)

    def set(self, name: str, **status: Any) -> None:
        pod = self._copy(name)
        pod["status"].update(status)
        self._put("MODIFIED", pod)

    def delete(self, name: str) -> None:
        pod = self._copy(name)
        del self.pods[name]
        self._put("DELETED", pod)

    def compact(self) -> None:
        """Forget every version before this one."""
        self.oldest = self.version

    def cut(self) -> None:
        """Break every watch that is open."""
        self._cut += 1
        self._wake()

    def _copy(self, name: str) -> Pod:
        copied: Pod = json.loads(json.dumps(self.pods[name]))
        return copied

    def _put(self, kind: str, pod: Pod) -> Pod:
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        if kind != "DELETED":
            self.pods[pod["metadata"]["name"]] = pod
        self.history.append((self.version, kind, pod))
        self._wake()
        return pod

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._waking = asyncio.create_task(notify())

    # The server.

    async def start(self) -> None:
        cert, key = self.tls
        config = uvicorn.Config(
            self, port=self.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=0,
            ssl_certfile=cert, ssl_keyfile=key,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined] # of older versions
        self._serving = asyncio.create_task(self._server._serve())
        while not self._server.started:  # noqa: ASYNC110 - uvicorn signals it no other way
            await asyncio.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more; open connections break. ``start`` comes back at the same port."""
        assert self._server is not None
        assert self._serving is not None
        self.half_open = False
        self.cut()
        self._server.should_exit = True
        await self._serving

    def kubeconfig(self, path: Path, token: str = "good") -> Path:
        """A file for ``KUBECONFIG``; the token lies beside it, in ``token``."""
        (path.parent / "token").write_text(token)
        config = {
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
            "users": [{"name": "fake", "user": {"tokenFile": str(path.parent / "token")}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        del receive  # it is only asked
        query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode()).items()}
        verb = "watch" if query.get("watch") == "true" else "list"
        self.asked.append((verb, query))
        given = dict(scope["headers"]).get(b"authorization", b"").decode().removeprefix("Bearer ")
        if given not in self.tokens:
            await self._refuse(send, 401, "Unauthorized")
        elif verb in self.forbidden:
            text = (
                f'pods is forbidden: User "{USER}" cannot {verb} resource "pods" in API group "" in the namespace "ml"'
            )
            await self._refuse(send, 403, text)
        elif self.fail_with:
            await self._refuse(send, self.fail_with, "simulated trouble")
        elif scope["path"] != f"/api/v1/namespaces/{NAMESPACE}/pods":
            await self._refuse(send, 404, f"no such path: {scope['path']}")
        elif verb == "list":
            await self._list(send, query)
        else:
            await self._watch(send, query)

    async def _list(self, send: Send, query: dict[str, str]) -> None:
        pods = [self.pods[name] for name in sorted(self.pods) if _matches(self.pods[name], query["labelSelector"])]
        limit, first = int(query.get("limit", 0)), int(query.get("continue", 0))
        if first and self.gone_while_paging:
            self.gone_while_paging -= 1
            await self._refuse(send, 410, "The provided continue parameter is too old")
            return
        metadata = {"resourceVersion": str(self.version)}
        if limit and len(pods) > first + limit:
            metadata["continue"] = str(first + limit)
        items = pods[first : first + limit] if limit else pods
        await _answer(send, 200, {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items})

    async def _watch(self, send: Send, query: dict[str, str]) -> None:
        at, cut = int(query["resourceVersion"]), self._cut
        if at < self.oldest and self.gone_by_status:
            await self._refuse(send, 410, f"too old resource version: {at} ({self.oldest})")
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        if at < self.oldest:
            status = {"kind": "Status", "code": 410, "message": f"too old resource version: {at} ({self.oldest})"}
            await _event(send, "ERROR", status)
            await send({"type": "http.response.body"})
            return
        self.watching += 1
        try:
            await self._follow(send, query, at, cut)
        finally:
            self.watching -= 1

    async def _follow(self, send: Send, query: dict[str, str], at: int, cut: int) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query["timeoutSeconds"])
        while loop.time() < end or self.half_open:
            if self._cut != cut:
                raise ConnectionResetError("cut, as the test wants it")
            for version, kind, pod in [item for item in self.history if item[0] > at and not self.half_open]:
                at = version
                if _matches(pod, query["labelSelector"]):
                    await _event(send, kind, pod)
            if query.get("allowWatchBookmarks") == "true" and not self.half_open:
                mark = {"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": str(at)}}
                await _event(send, "BOOKMARK", mark)
            try:
                async with asyncio.timeout(self.bookmark_every), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                continue
        await send({"type": "http.response.body"})

    async def _refuse(self, send: Send, status: int, message: str) -> None:
        await _answer(send, status, {"kind": "Status", "status": "Failure", "message": message, "code": status})


async def _answer(send: Send, status: int, content: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def _event(send: Send, kind: str, content: Any) -> None:
    line = json.dumps({"type": kind, "object": content}, ensure_ascii=False).encode() + b"\n"
    await send({"type": "http.response.body", "body": line, "more_body": True})


def _matches(pod: Pod, selector: str) -> bool:
    labels = pod["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, _, value in (term.partition("=") for term in selector.split(",")))


@asynccontextmanager
async def fake_kubernetes() -> AsyncIterator[FakeKubernetes]:
    server = FakeKubernetes()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
