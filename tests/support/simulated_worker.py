"""A simulated worker: OpenAI endpoints and a report port on one event loop, without an engine.

Its "model" answers with a fixed number of words; its "cache" is what the test puts there. It tokenizes by bytes, one
token per byte of the prompt, so that hashes can be computed by hand.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from kv_protocol.digests import RunningDigest
from kv_protocol.hashing import chunk_hashes, root_hash
from kv_protocol.identity import Identity
from kv_protocol.messages import (
    Admitted,
    Bye,
    Call,
    Cleared,
    Digest,
    FrameDecoder,
    Heartbeat,
    Hello,
    Message,
    Open,
    Removed,
    Reply,
    Snapshot,
    SnapshotEnd,
    Stored,
    TierInfo,
    encode,
    pack,
)
from router.app import Gateway, create_app
from router.reload import Sources
from router.server import make_server

CHUNK = 16
_REQUEST_LINE = re.compile(rb"([A-Z]+) (\S+) HTTP/1.1\r\n")


class SimulatedWorker:
    """Behaviour is set by attributes, at any time; what happened can be read from others."""

    def __init__(self, model: str = "simulated", *, reports: bool = True, heartbeat: float = 0.1) -> None:
        self.model = model
        self.with_reports = reports
        self.heartbeat = heartbeat
        self.chunk_size = CHUNK
        self.words = 4
        self.pause = 0.0
        self.first_pause = 0.0
        self.padding = b""
        self.status = 200
        self.fail_next = 0
        self.die_after: int | None = None
        self.hold_head = asyncio.Event()
        self.hold_head.set()
        self.hold_body = asyncio.Event()
        """Unset, a stream stops after each word."""
        self.hold_body.set()
        self.max_model_len = 100_000
        self.loras: list[str] = []
        self.takes_ids = True
        self.cached_tokens: int | None = None
        self.admit: dict[str, int] | None = None
        self.silent = False
        self.extra_tokens = 0
        self.model_list: tuple[int, bytes] | None = None
        self.raw_answer: list[bytes] = []
        self.extra_headers: list[tuple[str, str]] = []
        self.prefill_speed = 1000.0
        self.uncached_tokens = 0

        self.generating = {"/v1/chat/completions", "/v1/completions"}

        self.pages: dict[str, Any] = {}
        """More that it answers to GET: JSON, or text as bytes."""

        self.calls: list[Call] = []
        self.operate: Callable[[Call], Reply | None] = lambda call: Reply(call.id, {"operation": call.operation})
        """Answers control requests; with None, never."""

        self.methods: list[str] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.aborted = 0
        self.sent_bytes = 0
        self.connections = 0
        self.epoch = 0
        self.tiers: dict[str, set[bytes]] = {"gpu": set(), "cpu": set()}
        self.readers: set[asyncio.StreamWriter] = set()
        self.opened = 0
        self._handlers: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self.port = self.report_port = 0

    async def start(self) -> "SimulatedWorker":
        self.epoch += 1
        http = await asyncio.start_server(self._http, "127.0.0.1", self.port)
        self.port = http.sockets[0].getsockname()[1]
        self._servers = [http]
        if self.with_reports:
            reports = await asyncio.start_server(self._report, "127.0.0.1", self.report_port)
            self.report_port = reports.sockets[0].getsockname()[1]
            self._servers.append(reports)
        return self

    async def kill(self) -> None:
        """End as a killed process does: every connection is reset, nobody listens."""
        for server in self._servers:
            server.close()
        for task in tuple(self._handlers):
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        self._servers = []

    async def restart(self) -> None:
        """Come back on the same ports, cold and as another process."""
        for chunks in self.tiers.values():
            chunks.clear()
        await self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spec(self, name: str = "") -> str:
        reports = f"127.0.0.1:{self.report_port}" if self.with_reports else "none"
        return f"{self.url},reports={reports}" + (f",name={name}" if name else "")

    def served(self, path: str) -> list[tuple[str, dict[str, str], bytes]]:
        return [request for request in self.requests if request[0] == path]

    # The ledger.

    def hashes(self, text: str, *, lora: str = "", cache_salt: str = "") -> list[bytes]:
        root = root_hash(chunk_size=self.chunk_size, model=self.model, lora=lora, cache_salt=cache_salt)
        return chunk_hashes(root, list(text.encode()), self.chunk_size)

    def store(self, tier: str, chunks: Iterable[bytes]) -> None:
        fresh = [chunk for chunk in chunks if chunk not in self.tiers[tier]]
        self.tiers[tier].update(fresh)
        self.publish(Stored(tier, pack(fresh)))

    def remove(self, tier: str, chunks: Iterable[bytes]) -> None:
        gone = [chunk for chunk in chunks if chunk in self.tiers[tier]]
        self.tiers[tier].difference_update(gone)
        self.publish(Removed(tier, pack(gone)))

    def clear(self, tier: str) -> None:
        self.tiers[tier].clear()
        self.publish(Cleared(tier))

    def publish(self, message: Message) -> None:
        for writer in self.readers:
            writer.write(encode(message))

    def publish_digest(self) -> None:
        digests = {}
        for tier, chunks in self.tiers.items():
            running = RunningDigest()
            for chunk in chunks:
                running.add(chunk)
            digests[tier] = running.take()
        self.publish(Digest(digests))

    def reset_readers(self) -> None:
        for writer in tuple(self.readers):
            writer.transport.abort()

    async def _report(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._own()
        try:
            decoder = FrameDecoder()
            opening: Open | None = None
            while data := await reader.read(65536):
                for message in decoder.feed(data):
                    match message:
                        case Open():
                            opening = message
                            self._hello(writer, watch=message.watch)
                        case Call() if opening is not None:
                            self.calls.append(message)
                            if (reply := self.operate(message)) is not None:
                                writer.write(encode(reply))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.readers.discard(writer)
            writer.transport.abort()

    def _hello(self, writer: asyncio.StreamWriter, *, watch: bool) -> None:
        self.opened += 1
        tiers = [TierInfo(name, 100_000, 1024) for name in self.tiers]
        identity = Identity("weights", "bf16", "LBNHC", ())
        writer.write(
            encode(Hello(f"epoch-{self.epoch}", self.model, self.chunk_size, 4, identity, tiers, max_model_len=4096))
        )
        if not watch:
            return
        for tier, chunks in self.tiers.items():
            writer.write(encode(Snapshot(tier, pack(chunks))))
        writer.write(encode(SnapshotEnd()))
        self.readers.add(writer)
        task = asyncio.create_task(self._beat(writer))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while writer in self.readers and not writer.is_closing():
            if not self.silent:
                held = {tier: len(chunks) for tier, chunks in self.tiers.items()}
                writer.write(encode(Heartbeat(0, 0, self.uncached_tokens, 0.1, self.prefill_speed, held, {})))
            await asyncio.sleep(self.heartbeat)

    def say_bye(self, reason: str) -> None:
        for writer in tuple(self.readers):
            writer.write(encode(Bye(reason)))
            writer.close()

    # The HTTP server.

    def _own(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._own()
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line = _REQUEST_LINE.match(head)
        assert line is not None, head
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (part.partition(":") for part in head.decode().split("\r\n")[1:] if part)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = line[2].decode()
        self.requests.append((path, headers, body))
        self.methods.append(line[1].decode())
        if line[1] == b"POST" and path.partition("?")[0] in self.generating:
            return await self._watch_client(reader, self._answer(writer, headers, body))
        if path == "/v1/models" and self.model_list is not None:
            status, content = self.model_list
            self._head(writer, status, "application/json", len(content))
            writer.write(content)
            return True
        self._json(writer, *self._control(path, body))
        return True

    async def _watch_client(self, reader: asyncio.StreamReader, answering: Any) -> bool:
        """Answer, and notice at once when the other side goes away."""
        answer = asyncio.create_task(answering)
        hangup = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((answer, hangup), return_when=asyncio.FIRST_COMPLETED)
            if _is_next_request(hangup):
                await asyncio.wait((answer,))
            if answer.done() and (answer.exception() is None or self.die_after is not None):
                return await answer
            self.aborted += 1
            return False
        finally:
            answer.cancel()
            hangup.cancel()
            await asyncio.gather(answer, hangup, return_exceptions=True)
            if _is_next_request(hangup):
                reader._buffer[:0] = hangup.result()  # type: ignore[attr-defined] # it was only looked at

    def _control(self, path: str, body: bytes) -> tuple[int, Any]:
        cards = [{"id": self.model, "object": "model", "max_model_len": self.max_model_len, "root": ""}]
        cards += [{"id": lora, "object": "model", "parent": self.model, "root": "/lora"} for lora in self.loras]
        if path in self.pages:
            return 200, self.pages[path]
        match path:
            case "/health":
                return (200 if self.status < 500 else self.status), {}
            case "/v1/models":
                return 200, {"object": "list", "data": cards}
            case "/version":
                return 200, {"version": "0.0-simulated"}
            case "/tokenize":
                tokens = self.tokenize(json.loads(body))
                return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": self.max_model_len}
        return 404, {"error": {"message": "not found", "type": "NotFound", "code": 404}}

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
        if self.raw_answer:
            for part in self.raw_answer:
                writer.write(part)
                await asyncio.sleep(0.01)
            return False
        body = json.loads(raw)
        if self.fail_next or self.status != 200:
            self.fail_next = max(0, self.fail_next - 1)
            self._json(writer, self.status if self.status != 200 else 503, {"error": {"message": "simulated failure"}})
            return True
        await self.hold_head.wait()
        await asyncio.sleep(self.first_pause)
        tokens = self.tokenize(body)
        if self.admit is not None:
            self.publish(Admitted("chatcmpl-" + headers.get("x-request-id", "none"), len(tokens), self.admit))
        if body.get("stream"):
            return await self._stream(writer, headers, tokens)
        return self._whole(writer, headers, tokens)

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        """What it makes of a request; ``extra_tokens`` more than it should, where it tokenizes itself."""
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        return prompt_tokens(body) + ([0] * self.extra_tokens if given is None else [])

    def _usage(self, tokens: list[int]) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": len(tokens), "completion_tokens": self.words}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage

    def _whole(self, writer: asyncio.StreamWriter, headers: dict[str, str], tokens: list[int]) -> bool:
        content = " ".join(f"word{number}" for number in range(self.words)) + self.padding.decode()
        answer = {
            "id": "chatcmpl-" + headers.get("x-request-id", "none"),
            "object": "chat.completion",
            "model": self.model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            "usage": self._usage(tokens),
        }
        if self.die_after is not None:
            data = json.dumps(answer).encode()
            self._head(writer, 200, "application/json", len(data))
            writer.write(data[: self.die_after])
            raise ConnectionResetError
        self._json(writer, 200, answer)
        return True

    async def _stream(self, writer: asyncio.StreamWriter, headers: dict[str, str], tokens: list[int]) -> bool:
        self._head(writer, 200, "text/event-stream; charset=utf-8", None)
        for number in range(self.words):
            if self.die_after == number:
                writer.write(b"5\r\ndata:\r\n")
                await writer.drain()
                writer.close()
                raise ConnectionResetError
            delta = {"content": f"word{number} " + self.padding.decode()}
            event = {"id": "chatcmpl-" + headers.get("x-request-id", "none"), "choices": [{"index": 0, "delta": delta}]}
            await self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(self.pause)
            await self.hold_body.wait()
        usage = {"id": "chatcmpl-" + headers.get("x-request-id", "none"), "choices": [], "usage": self._usage(tokens)}
        await self._chunk(writer, b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    async def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.sent_bytes += len(data)
        writer.write(b"%x\r\n" % len(data) + data + b"\r\n")
        await writer.drain()

    def _json(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._head(writer, status, "application/json", len(data))
        writer.write(data)

    def _head(self, writer: asyncio.StreamWriter, status: int, kind: str, length: int | None) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", "server: simulated", "X-Simulated: yes"]
        lines += [f"{name}: {value}" for name, value in self.extra_headers]
        lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
        writer.write("\r\n".join([*lines, "", ""]).encode())


def _is_next_request(hangup: "asyncio.Task[bytes]") -> bool:
    return hangup.done() and not hangup.cancelled() and hangup.exception() is None and bool(hangup.result())


def prompt_tokens(body: dict[str, Any]) -> list[int]:
    """Token ids as the simulated worker sees them: one per byte, of the prompt or of all messages' contents."""
    ids = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
    if ids is not None:
        return list(ids)
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return [item for item in prompt if isinstance(item, int)]
    if prompt is not None:
        return list(prompt.encode())
    return list("".join(str(message.get("content") or "") for message in body["messages"]).encode())


class RunningGateway:
    """A gateway serving on this event loop, and a client for it."""

    def __init__(
        self, gateway: Gateway, port: int, client: httpx.AsyncClient, stop: Callable[[], None] = lambda: None
    ) -> None:
        self.stop = stop
        self.gateway = gateway
        self.port = port
        self.client = client

    async def chat(self, text: str, **members: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=chat_body(text, **members))

    async def get(self, path: str, **parameters: Any) -> Any:
        response = await self.client.get(path, params=parameters)
        return response.raise_for_status().json()

    async def worker(self, name: str) -> dict[str, Any]:
        workers = (await self.get("/admin/workers"))["workers"]
        return next(dict(item) for item in workers if item["name"] == name)

    async def metric(self, line: str) -> float:
        """The value of the series written as ``line``."""
        text = (await self.client.get("/metrics")).text
        return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)


def chat_body(text: str, **members: Any) -> dict[str, Any]:
    return {"model": "simulated", "messages": [{"role": "user", "content": text}], **members}


@asynccontextmanager
async def running_gateway(
    *workers: SimulatedWorker, file: Path | None = None, **settings: Any
) -> AsyncIterator[RunningGateway]:
    """Serve with these workers, named a, b, …; they are killed at the end. A ``file`` of settings names them itself."""
    names = [chr(ord("a") + number) for number in range(len(workers))]
    specs = [worker.spec(name) for worker, name in zip(workers, names, strict=True)]
    quick = {"health_interval": 0.1, "report_heartbeat": 0.4, "seed": 1, "drain_timeout": 1}
    named = {} if file is not None else {"workers": specs}
    sources = Sources({**named, "port": 0, **quick, **settings}, {}, str(file) if file is not None else None)
    server = make_server(app := create_app(sources.load(), sources), app.gateway.settings)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or serving.done())
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            watched = [w for w in app.gateway.registry.workers if w.spec.report_address is not None and w.up]
            await until(lambda: all(worker.synced for worker in watched))
            yield RunningGateway(app.gateway, port, client, lambda: setattr(server, "should_exit", True))
    finally:
        server.should_exit = True
        await serving
        for worker in workers:
            await worker.kill()


def kernel_buffers() -> int:
    """Bytes that the kernel holds at most on the way from a worker to a client that does not read."""
    most = [int(Path(f"/proc/sys/net/ipv4/tcp_{way}mem").read_text().split()[2]) for way in "rw"]
    return most[0] + 2 * most[1]


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something to come true; a busy machine may take its time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are plain state, nobody signals them
            await asyncio.sleep(0.005)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; anything left over is an error."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.gather(*left, return_exceptions=True)

    asyncio.run(bounded())
