"""A simulated worker: an OpenAI-compatible server that behaves as vLLM with the connector does, without an engine.

    python -m benchmarks.simulated_worker --port 9001 --reports 9101 [--gpu-chunks 2000] [--cpu-chunks 8000] …

Its cache has two tiers, least recently used chunks first to go: ``gpu``, and ``cpu`` behind it, which gets a copy of
whatever is computed. In one process several may share a third, ``remote``, as workers do that write back: a chunk comes
there when ``flush`` asks for it, begun with the engine's next step; a prompt's chunks are looked up there, and only what a
worker wrote or found itself is on its record. Prompts are computed one after the other at a stated rate, less what the cache holds; answers are
decoded side by side. Reports go out through the connector's own report server. It tokenizes by bytes, one token each, or
takes the token ids that come with a request.

Faults, of the next requests by ``POST /simulate {"fault": NAME, "times": N}``, or of one by the header
``x-simulated-fault: NAME``: ``FAULTS`` lists them. ``{"reports": "lie"}`` reports chunks that are not there,
``{"reports": "stall"}`` ends heartbeats. ``GET /simulate`` says what happened so far.
"""

import argparse
import asyncio
import json
import socket
import struct
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_protocol.digests import RunningDigest, SetDigest
from kv_protocol.hashing import chunk_hashes, root_hash
from kv_protocol.identity import Identity
from kv_protocol.messages import Admitted, Heartbeat, Hello, Message, Removed, Stored, TierInfo, pack
from tests.support.simulated_worker import SimulatedWorker
from worker_connector.report_server import Operation, ReportServer, Timing

FAULTS = {
    "hang-head": "takes the request and never answers",
    "hang-body": "begins its answer and never ends it",
    "reset": "resets the connection in the middle of its answer",
    "truncate": "closes the connection in the middle of its answer",
    "half-closed": "closes its sending side without an answer, and goes on listening",
    "garbage": "answers with bytes that are no HTTP",
    "bad-chunk": "breaks the chunked encoding in the middle of its answer",
    "too-long": "promises more bytes than it sends",
    "too-short": "sends more bytes than it promised",
    "500": "answers 500",
    "503": "answers 503",
    "slow": "sends its answer a few bytes at a time",
}
_LIE_CHUNKS = 100
_SHARED_CHUNKS = 1_000_000
_WRITTEN_AT_ONCE = 64
_cached: ContextVar[int] = ContextVar("cached tokens of the request that this task answers")


class Ledger:
    """What the simulated cache holds, and the reports of it: the source of a ReportServer. A lock orders everything."""

    def __init__(self, gpu_chunks: int, cpu_chunks: int, shared: set[bytes] | None = None) -> None:
        self.lock = threading.Lock()
        self.capacity = {"gpu": gpu_chunks, "cpu": cpu_chunks}
        self.tiers: dict[str, OrderedDict[bytes, None]] = {"gpu": OrderedDict(), "cpu": OrderedDict()}
        self.shared = shared if shared is not None else set[bytes]()
        if shared is not None:
            self.capacity["remote"] = _SHARED_CHUNKS
            self.tiers["remote"] = OrderedDict()
        self.load = Heartbeat(0, 0, 0, 0.0, 0.0, {}, {})
        self._digests = {tier: RunningDigest() for tier in self.tiers}

    def use(self, chunks: list[bytes]) -> tuple[dict[str, int], list[Message]]:
        """A prompt of these chunks is computed: its hit in chunks by tier, and what there is to report. Caller locks."""
        hit = self._hit(chunks)
        found = chunks[: sum(hit.values())]
        changes = self.record([chunk for chunk in found if chunk in self.shared])
        for tier in ("gpu", "cpu"):
            changes += self._keep(tier, chunks)
        return hit, changes

    def record(self, chunks: list[bytes]) -> list[Message]:
        """The worker learns that the remote tier has these. Caller locks."""
        return self._keep("remote", chunks) if chunks else []

    def lacking(self) -> list[bytes]:
        """What the remote tier lacks of the cpu tier, what was used last first. Caller locks."""
        return [chunk for chunk in reversed(self.tiers["cpu"]) if chunk not in self.shared]

    def take_changes(self) -> Iterable[Message]:
        return ()

    def content(self) -> Mapping[str, list[bytes]]:
        return {tier: list(chunks) for tier, chunks in self.tiers.items()}

    def digests(self) -> Mapping[str, SetDigest]:
        return {tier: digest.take() for tier, digest in self._digests.items()}

    def heartbeat(self) -> Heartbeat:
        return self.load

    def _hit(self, chunks: list[bytes]) -> dict[str, int]:
        gpu = next((at for at, chunk in enumerate(chunks) if chunk not in self.tiers["gpu"]), len(chunks))
        hit = {"gpu": gpu, "cpu": 0} | ({"remote": 0} if "remote" in self.tiers else {})
        for chunk in chunks[gpu:]:
            tier = "cpu" if chunk in self.tiers["cpu"] else "remote" if chunk in self.shared else ""
            if not tier:
                break
            hit[tier] += 1
        return hit

    def _keep(self, tier: str, chunks: list[bytes]) -> list[Message]:
        """The last chunks of a prompt go before its first."""
        held, digest = self.tiers[tier], self._digests[tier]
        kept = chunks[: self.capacity[tier]]
        fresh = [chunk for chunk in dict.fromkeys(kept) if chunk not in held]
        for chunk in reversed(kept):
            held[chunk] = None
            held.move_to_end(chunk)
        gone = [held.popitem(last=False)[0] for _ in range(len(held) - self.capacity[tier])]
        for chunk in fresh:
            digest.add(chunk)
        for chunk in gone:
            digest.discard(chunk)
        messages: list[Message] = [Removed(tier, pack(gone))] if gone else []
        return messages + ([Stored(tier, pack(fresh))] if fresh else [])


class DisturbedServer(ReportServer):
    """A report server that can fall silent."""

    stalled = False

    def _broadcast(self, messages: Iterable[Message]) -> None:
        if not self.stalled:
            super()._broadcast(messages)


class CachingWorker(SimulatedWorker):
    """A simulated worker with a cache, timing and faults. Prompt tokens per second, seconds per answered word."""

    def __init__(
        self,
        *,
        chunk_size: int = 256,
        gpu_chunks: int = 2000,
        cpu_chunks: int = 8000,
        prefill: float = 40_000.0,
        decode: float = 0.01,
        report_timing: Timing | None = None,
        shared: set[bytes] | None = None,
    ) -> None:
        super().__init__(reports=False)
        self.chunk_size = chunk_size
        self.pause = decode
        self.prefill_speed = prefill
        self.ledger = Ledger(gpu_chunks, cpu_chunks, shared)
        self.write_seconds = 0.0002
        self._flushing: deque[bytes] = deque()
        self._told = False
        self._running = 0
        self.faults: list[str] = []
        self.faulted = 0
        self._report_timing = report_timing
        self._reports: DisturbedServer | None = None
        self._prefilling = asyncio.Lock()

    async def start(self) -> "CachingWorker":
        await super().start()
        self._reports = DisturbedServer(
            *("127.0.0.1", self.report_port, "", self._hello_message(), self.ledger, self._operations()),
            timing=self._report_timing,
        )
        await asyncio.to_thread(self._reports.start)
        self.report_port = self._reports.address[1]
        return self

    async def kill(self) -> None:
        await super().kill()
        if self._reports is not None:
            await asyncio.to_thread(self._reports.close)

    def spec(self, name: str = "") -> str:
        return f"{self.url},reports=127.0.0.1:{self.report_port}" + (f",name={name}" if name else "")

    def refuse(self) -> None:
        """Listen no more; what is open is reset. ``listen`` undoes it."""
        for server in self._servers:
            server.close()
        for task in tuple(self._handlers):
            task.cancel()

    async def listen(self) -> None:
        self._servers = [await asyncio.start_server(self._http, "127.0.0.1", self.port)]

    def _hello_message(self) -> Hello:
        identity = Identity("simulated", "bf16", "LBNHC", ())
        tiers = [TierInfo(tier, capacity, 1) for tier, capacity in self.ledger.capacity.items()]
        return Hello(f"simulated-{uuid4()}", self.model, self.chunk_size, 16, identity, tiers, max_model_len=100_000)

    # Handing over.

    def _operations(self) -> dict[str, Operation]:
        return {"flush": self._flush, "stats": self._stats} if "remote" in self.ledger.tiers else {}

    def _flush(self, arguments: dict[str, Any]) -> dict[str, Any]:
        del arguments
        with self.ledger.lock:
            lacking = self.ledger.lacking()
            self._flushing = deque(lacking)
            self._told = bool(lacking)
            return {"tier": "remote", "chunks": len(lacking), "present": 0, "refused": 0, "queued": ["remote"]}

    def _stats(self, arguments: dict[str, Any]) -> dict[str, Any]:
        del arguments
        with self.ledger.lock:
            held = {tier: len(chunks) for tier, chunks in self.ledger.tiers.items()}
            unwritten = {"remote": {"bandwidth": 0.0, "unwritten": len(self._flushing)}}
            return {"held_chunks": held, "tiers": unwritten, "queued": int(self._told)}

    def _step(self) -> None:
        """A request came: the engine begins what it was told while it slept."""
        if self._told:
            self._told = False
            task = asyncio.create_task(self._write())
            self._handlers.add(task)
            task.add_done_callback(self._handlers.discard)

    async def _write(self) -> None:
        while self._flushing:
            await asyncio.sleep(self.write_seconds * min(_WRITTEN_AT_ONCE, len(self._flushing)))
            with self.ledger.lock:
                written = [self._flushing.popleft() for _ in range(min(_WRITTEN_AT_ONCE, len(self._flushing)))]
                self.ledger.shared.update(written)
                if self._reports is not None:
                    self._reports.publish(self.ledger.record(written))

    # Requests.

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
        fault = headers.get("x-simulated-fault", "")
        if not fault and self.faults:
            fault = self.faults.pop(0)
        body = json.loads(raw)
        if fault:
            self.faulted += 1
            return await self._fail(fault, writer, headers, body)
        tokens = self.tokenize(body)
        self._running += 1
        try:
            # The client asks without an id of its own where nobody routes.
            request_id = headers.get("x-request-id", "none")
            _cached.set(await self._compute(tokens, request_id, str(body.get("cache_salt") or "")))
            if body.get("stream"):
                return await self._stream(writer, headers, tokens)
            return self._whole(writer, headers, tokens)
        finally:
            self._running -= 1
            self._say_load()

    def _say_load(self) -> None:
        with self.ledger.lock:
            held = {tier: len(content) for tier, content in self.ledger.tiers.items()}
            self.ledger.load = Heartbeat(self._running, 0, self.uncached_tokens, 0.0, self.prefill_speed, held, {})

    def _usage(self, tokens: list[int]) -> dict[str, Any]:
        return super()._usage(tokens) | {"prompt_tokens_details": {"cached_tokens": _cached.get()}}

    async def _compute(self, tokens: list[int], request_id: str, salt: str) -> int:
        """Wait for the prompt's turn, compute what is not cached; the tokens that were."""
        root = root_hash(chunk_size=self.chunk_size, model=self.model, lora="", cache_salt=salt)
        chunks = chunk_hashes(root, tokens, self.chunk_size)
        self.uncached_tokens += len(tokens)
        self._step()
        try:
            async with self._prefilling:
                hits = self._take(chunks, request_id, len(tokens))
                self._say_load()
                await asyncio.sleep((len(tokens) - sum(hits.values())) / self.prefill_speed)
        finally:
            self.uncached_tokens -= len(tokens)
        return sum(hits.values())

    def _take(self, chunks: list[bytes], request_id: str, prompt_tokens: int) -> dict[str, int]:
        with self.ledger.lock:
            hit, changes = self.ledger.use(chunks)
            tokens = {tier: min(count * self.chunk_size, prompt_tokens - 1) for tier, count in hit.items()}
            if self._reports is not None:
                self._reports.publish([Admitted("chatcmpl-" + request_id, prompt_tokens, tokens), *changes])
        return tokens

    # Faults.

    async def _fail(self, fault: str, writer: asyncio.StreamWriter, headers: dict[str, str], body: Any) -> bool:
        match fault:
            case "hang-head":
                await asyncio.Event().wait()
            case "half-closed":
                writer.write_eof()
                await asyncio.Event().wait()
            case "garbage":
                writer.write(b"\x16\x03\x01\x02\0 this is no HTTP\r\n\r\n")
                await writer.drain()
                return False
            case "500" | "503":
                self._json(writer, int(fault), {"error": {"message": "simulated failure", "code": int(fault)}})
                return True
            case _:
                return await self._break_off(fault, writer, self.events(headers, body), bool(body.get("stream")))
        return False

    async def _break_off(self, fault: str, writer: asyncio.StreamWriter, events: list[bytes], stream: bool) -> bool:
        whole = b"".join(events)
        kind = "text/event-stream; charset=utf-8" if stream else "application/json"
        half = b"".join(events[:2]) if stream else whole[: len(whole) // 2]
        if fault in ("too-long", "too-short"):
            self._head(writer, 200, kind, len(whole) + (10 if fault == "too-long" else -10))
            writer.write(whole)
            await writer.drain()
            return False
        self._head(writer, 200, kind, None if stream else len(whole))
        if fault == "slow":
            return await self._dribble(writer, whole, chunked=stream)
        writer.write(b"%x\r\n%s\r\n" % (len(half), half) if stream else half)
        await writer.drain()
        await asyncio.sleep(0.02)
        if fault == "hang-body":
            await asyncio.Event().wait()
        elif fault == "bad-chunk":
            writer.write(b"no number\r\n")
            await writer.drain()
        elif fault == "reset":
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    async def _dribble(self, writer: asyncio.StreamWriter, whole: bytes, *, chunked: bool) -> bool:
        for at in range(0, len(whole), 41):
            piece = whole[at : at + 41]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            await asyncio.sleep(0.002)
        if chunked:
            writer.write(b"0\r\n\r\n")
        return True

    def events(self, headers: dict[str, str], body: Any) -> list[bytes]:
        """The bytes of a sound answer: the events of a stream, or one whole."""
        request_id = "chatcmpl-" + headers["x-request-id"]
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "word " * 20}, "finish_reason": "stop"}
            return [json.dumps({"id": request_id, "object": "chat.completion", "choices": [choice]}).encode()]
        deltas = [{"id": request_id, "choices": [{"index": 0, "delta": {"content": f"word{n} "}}]} for n in range(4)]
        return [b"data: " + json.dumps(delta).encode() + b"\n\n" for delta in deltas] + [b"data: [DONE]\n\n"]

    # Control.

    def _control(self, path: str, body: bytes) -> tuple[int, Any]:
        if path != "/simulate":
            return super()._control(path, body)
        if body:
            wish = json.loads(body)
            if wish.get("fault", "500") not in FAULTS:
                return 400, {"error": f"faults are {', '.join(FAULTS)}"}
            if "fault" in wish:
                self.faults[:] = [wish["fault"]] * int(wish.get("times", 1))
            self._disturb_reports(str(wish.get("reports", "")))
        held = {tier: len(chunks) for tier, chunks in self.ledger.tiers.items()}
        return 200, {
            "requests": len(self.requests),
            "aborted": self.aborted,
            "faulted": self.faulted,
            "connections": len(self._handlers),
            "chunks": held,
        }

    def _disturb_reports(self, how: str) -> None:
        if self._reports is None or not how:
            return
        if how == "stall":
            self._reports.stalled = True
            return
        invented = [number.to_bytes(16, "little") for number in range(_LIE_CHUNKS)]
        with self.ledger.lock:
            self._reports.publish([Stored("gpu", pack(invented))])


async def serve(arguments: argparse.Namespace) -> None:
    worker = CachingWorker(
        chunk_size=arguments.chunk_size,
        gpu_chunks=arguments.gpu_chunks,
        cpu_chunks=arguments.cpu_chunks,
        prefill=arguments.prefill,
        decode=arguments.decode,
    )
    worker.port, worker.report_port = arguments.port, arguments.reports
    worker.words, worker.model = arguments.words, arguments.model
    worker.requests = _Counted()
    worker.methods = _Counted()
    await worker.start()
    print(f"simulated worker at {worker.url}, reports on port {worker.report_port}", flush=True)
    await asyncio.Event().wait()


class _Counted(list[Any]):
    """A list that knows how long it would be, for a process that runs for long."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def append(self, item: Any) -> None:
        del item
        self._count += 1

    def __len__(self) -> int:
        return self._count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--reports", type=int, default=0, help="port of the reports; 0 takes a free one")
    parser.add_argument("--model", default="simulated")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--gpu-chunks", type=int, default=2000)
    parser.add_argument("--cpu-chunks", type=int, default=8000)
    parser.add_argument("--prefill", type=float, default=40_000.0, help="prompt tokens a second")
    parser.add_argument("--decode", type=float, default=0.01, help="seconds for each word of an answer")
    parser.add_argument("--words", type=int, default=20)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
