"""Forwarding against simulated workers: bytes, failures, disconnects, back-pressure."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from router import serve
from router.forward import _whole_events
from tests.support.simulated_worker import (
    RunningGateway,
    SimulatedWorker,
    chat_body,
    kernel_buffers,
    run,
    running_gateway,
    until,
)


async def direct(worker: SimulatedWorker, body: dict[str, Any], request_id: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=worker.url, timeout=10) as client:
        return await client.post("/v1/chat/completions", json=body, headers={"x-request-id": request_id})


@pytest.mark.parametrize("stream", [False, True])
def test_simulated_status_headers_and_bytes_are_the_workers_own(stream: bool) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.extra_headers = [("X-Twice", "one"), ("X-Twice", "two"), ("Keep-Alive", "timeout=5")]
        async with running_gateway(worker) as gateway:
            body = chat_body("hello", stream=stream)
            expected = await direct(worker, body, "same")
            answer = await gateway.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "same"})
            assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
            own = [h for h in answer.headers.multi_items() if not h[0].startswith(("x-warmroute", "x-request-id"))]
            dropped = ("keep-alive", "transfer-encoding")
            assert [h for h in own if h[0] not in dropped] == [
                h for h in expected.headers.multi_items() if h[0] not in dropped
            ]
            assert "keep-alive" not in answer.headers
            assert answer.headers["x-request-id"] == "same"

    run(scenario())


def test_simulated_request_reaches_the_worker_as_it_came() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            raw = b'{ "model":"simulated",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}] , "x": 1.50 }'
            headers = {
                "authorization": "Bearer key",
                "x-own": "1",
                "connection": "x-hop",
                "x-hop": "2",
                "te": "trailers",
            }
            await gateway.client.post("/v1/chat/completions?a=b%20c", content=raw, headers=headers)
            path, seen, body = worker.requests[-1]
            assert (path, body) == ("/v1/chat/completions?a=b%20c", raw)
            assert (seen["authorization"], seen["x-own"]) == ("Bearer key", "1")
            assert not {"x-hop", "te", "connection"} & seen.keys()
            assert seen["x-request-id"]

    run(scenario())


def test_simulated_response_headers_can_be_switched_off() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), response_headers=False) as gateway:
            headers = (await gateway.chat("hi")).headers
            assert not [name for name in headers if name.startswith("x-warmroute")]
            assert headers["x-request-id"]

    run(scenario())


def test_simulated_death_within_a_stream_ends_it_with_an_error_event() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.die_after = 2
        async with running_gateway(worker) as gateway:
            answer = await gateway.chat("hello", stream=True)
            events = [line[6:] for line in answer.text.split("\n\n") if line]
            assert all(line.startswith("data: ") for line in answer.text.split("\n\n") if line)
            assert [set(json.loads(event)) for event in events] == [{"id", "choices"}, {"id", "choices"}, {"error"}]
            error = json.loads(events[-1])["error"]
            assert error["code"] == "worker_failed"
            assert "worker a" in error["message"]
            assert len(worker.served("/v1/chat/completions")) == 1
            assert (await gateway.get("/admin/requests"))["requests"][0]["outcome"] == "broken"

    run(scenario())


def test_simulated_death_within_a_whole_response_is_a_502() -> None:
    async def scenario() -> None:
        dying, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        dying.die_after = 20
        async with running_gateway(dying, other, policy="round-robin") as gateway:
            answer = await gateway.chat("hello")
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "worker_failed"
            assert not other.served("/v1/chat/completions")

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_simulated_killed_worker_before_the_first_byte_is_replaced(stream: bool) -> None:
    async def scenario() -> None:
        dying, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        dying.hold_head.clear()
        async with running_gateway(dying, other, policy="round-robin") as gateway:
            asking = asyncio.create_task(gateway.chat("hello", stream=stream))
            await until(lambda: dying.served("/v1/chat/completions"))
            await dying.kill()
            answer = await asking
            assert answer.status_code == 200
            assert answer.headers["x-warmroute-worker"] == "b"
            assert "after a failed" in answer.headers["x-warmroute-reason"]

    run(scenario())


def test_simulated_requests_leave_a_dead_worker_at_once() -> None:
    async def scenario() -> None:
        dying, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(dying, other, policy="round-robin") as gateway:
            await dying.kill()
            began = asyncio.get_running_loop().time()
            answers = [await gateway.chat("hello") for _ in range(6)]
            assert asyncio.get_running_loop().time() - began < 8
            assert {answer.headers["x-warmroute-worker"] for answer in answers} == {"b"}
            assert not (await gateway.worker("a"))["healthy"]

    run(scenario())


@pytest.mark.parametrize("status", [502, 503, 504])
def test_simulated_gateway_statuses_are_retried_elsewhere(status: int) -> None:
    async def scenario() -> None:
        failing, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(failing, other, policy="round-robin", health_interval=60) as gateway:
            failing.status = status
            answer = await gateway.chat("hello")
            assert (answer.status_code, answer.headers["x-warmroute-worker"]) == (200, "b")

    run(scenario())


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_simulated_other_statuses_pass_through(status: int) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=60) as gateway:
            worker.status = status
            answer = await gateway.chat("hello")
            assert answer.status_code == status
            assert answer.json() == {"error": {"message": "simulated failure"}}

    run(scenario())


def test_simulated_failures_open_the_breaker_and_success_closes_it() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        settings = {"breaker_failures": 3, "breaker_seconds": 0.3, "health_interval": 60}
        async with running_gateway(worker, **settings) as gateway:
            worker.status = 504
            assert [(await gateway.chat("hello")).status_code for _ in range(4)] == [504] * 4, "the last worker serves"
            assert (await gateway.worker("a"))["breaker"] == "open"
            worker.status = 200
            assert (await gateway.chat("hello")).status_code == 200
            assert (await gateway.worker("a"))["breaker"] == "closed"

    run(scenario())


def test_simulated_first_byte_and_idle_deadlines() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.hold_head.clear()
        async with running_gateway(worker, first_byte_timeout=0.3, idle_timeout=0.3) as gateway:
            answer = await gateway.chat("hello")
            assert answer.status_code == 504
            worker.hold_head.set()
            worker.pause = 30
            answer = await gateway.chat("hello", stream=True)
            assert "sent nothing more in time" in answer.text
            await until(lambda: worker.aborted == 2)

    run(scenario())


def test_simulated_connect_deadline() -> None:
    async def scenario() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            worker = await SimulatedWorker().start()
            async with running_gateway(worker, connect_timeout=0.3, health_interval=60) as gateway:
                gateway.gateway.registry.workers[0].upstream.close_idle()
                gateway.gateway.registry.workers[0].upstream._port = full.getsockname()[1]
                began = asyncio.get_running_loop().time()
                answer = await gateway.chat("hello")
                assert answer.status_code == 503
                assert asyncio.get_running_loop().time() - began < 8
            for filler in fillers:
                filler.close()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_simulated_disconnect_aborts_upstream_at_once(stream: bool) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        if stream:
            worker.pause = 30
        else:
            worker.hold_head.clear()
        async with running_gateway(worker) as gateway:
            async with open_request(gateway, chat_body("hello", stream=stream)) as (reader, _):
                await until(lambda: worker.served("/v1/chat/completions"))
                if stream:
                    await reader.readuntil(b"word0")
            began = asyncio.get_running_loop().time()
            await until(lambda: worker.aborted == 1)
            assert asyncio.get_running_loop().time() - began < 5
            load = gateway.gateway.registry.workers[0].load
            await until(lambda: load.in_flight == 0 and load.uncached_tokens == 0)
            assert gateway.gateway.admission.in_flight == 0
            assert (await gateway.get("/admin/requests"))["requests"][0]["outcome"] == "abandoned"
            worker.pause = 0
            worker.hold_head.set()
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_slow_client_slows_its_worker_and_memory_stays_bounded() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        most = kernel_buffers() + (4 << 20)
        worker.words, worker.padding = 400, b"x" * (2 * most // 400)
        async with (
            running_gateway(worker) as gateway,
            open_request(gateway, chat_body("hello", stream=True), receive_buffer=1 << 16) as (reader, _),
        ):
            await until(lambda: worker.sent_bytes > 0)
            sent = -1
            while sent != worker.sent_bytes:
                sent = worker.sent_bytes
                await asyncio.sleep(0.2)
            assert sent < most, "the worker must have been stopped when the kernel's buffers were full"
            [connection] = gateway.gateway.registry.workers[0].upstream._busy
            assert connection.buffered < 1 << 20
            total, data = 0, b""
            while not data.endswith(b"0\r\n\r\n"):
                data = await reader.read(1 << 20)
                total += len(data)
            assert total > 400 * len(worker.padding)

    run(scenario())


def test_simulated_client_that_never_reads_is_let_go() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.words, worker.padding = 400, b"x" * (2 * kernel_buffers() // 400)
        async with (
            running_gateway(worker, client_timeout=0.3) as gateway,
            open_request(gateway, chat_body("hello", stream=True), receive_buffer=1 << 16),
        ):
            await until(lambda: worker.aborted == 1)

    run(scenario())


def test_simulated_large_whole_response() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.padding = b"x" * (5 << 20)
        async with running_gateway(worker) as gateway:
            answer = await gateway.chat("hello")
            assert answer.json()["choices"][0]["message"]["content"].endswith("x" * 100)

    run(scenario())


def test_simulated_connections_are_kept_and_a_closed_one_is_replaced() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=60) as gateway:
            for _ in range(5):
                await gateway.chat("hello")
            assert worker.connections <= 2
            [kept] = gateway.gateway.registry.workers[0].upstream._idle
            kept._transport.pause_reading()  # so that the close goes unnoticed until a request is sent
            for task in tuple(worker._handlers):
                if "_http" in repr(task):
                    task.cancel()
            await asyncio.sleep(0.05)
            kept._transport.resume_reading()
            assert (await gateway.chat("hello")).status_code == 200

    run(scenario())


@pytest.mark.parametrize(
    ("data", "whole", "rest"),
    [
        (b"data: 1\n\ndata: 2\n\n", b"data: 1\n\ndata: 2\n\n", b""),
        (b"data: 1\n\ndata: 2", b"data: 1\n\n", b"data: 2"),
        (b"data: 1\r\n\r\ndata: 2\r\n", b"data: 1\r\n\r\n", b"data: 2\r\n"),
        (b"data", b"", b"data"),
        (b"x" * 300_000, b"x" * 300_000, b""),
    ],
)
def test_events_are_passed_on_whole(data: bytes, whole: bytes, rest: bytes) -> None:
    assert _whole_events(data) == (whole, rest)


@asynccontextmanager
async def open_request(
    gateway: RunningGateway, body: dict[str, Any], *, receive_buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", gateway.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 12)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVENTS_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "content"),
    [
        ([JSON_HEAD + b"content-length: 2\r\n\r\n{}surplus"], 200, b"{}"),
        ([JSON_HEAD + b"content-length: 2\r\n\r\n{}", b"surplus"], 200, b"{}"),
        ([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + JSON_HEAD + b"content-length: 2\r\n\r\n{}"], 200, b"{}"),
        ([JSON_HEAD + b'content-length: 5017\r\n\r\n"cached_tokens": ' + b"9" * 5000], 200, b"9"),
        ([b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n"], 502, b"999"),
        ([b"HTTP/1.1 042 What\r\ncontent-length: 0\r\n\r\n"], 502, b"42"),
        ([b"no http\r\n\r\n"], 502, b"no HTTP response"),
        ([JSON_HEAD + b"content-length: 9\r\n\r\n{}"], 502, b"not complete"),
    ],
)
def test_simulated_odd_responses_are_passed_on_or_named(sent: list[bytes], status: int, content: bytes) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=60) as gateway:
            worker.raw_answer = sent
            headers = {"x-request-id": "mine"}
            answer = await gateway.client.post("/v1/chat/completions", json=chat_body("x"), headers=headers)
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
            assert content in answer.content
            worker.raw_answer = []
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_events_of_a_promised_length_end_with_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.raw_answer = [EVENTS_HEAD + b"content-length: 100\r\n\r\ndata: a\n\n"]
        async with running_gateway(worker) as gateway:
            with pytest.raises(httpx.RemoteProtocolError):
                await gateway.chat("x", stream=True)
            assert (await gateway.get("/admin/requests"))["requests"][0]["outcome"] == "broken"

    run(scenario())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_simulated_requests_that_outlast_the_stop_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        streaming, waiting = await SimulatedWorker().start(), await SimulatedWorker().start()
        streaming.pause = 30
        waiting.hold_head.clear()
        async with httpx.AsyncClient(timeout=15) as client, AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(running_gateway(streaming, waiting, policy="round-robin"))
            url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
            stream = asyncio.create_task(client.post(url, json=chat_body("x", stream=True)))
            await until(lambda: streaming.served("/v1/chat/completions"))
            whole = asyncio.create_task(client.post(url, json=chat_body("x")))
            await until(lambda: waiting.served("/v1/chat/completions"))
            stopping = asyncio.create_task(stack.pop_all().aclose())
            assert "the gateway is stopping" in (await stream).text.split("\n\n")[-2]
            answer = await whole
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker_available")
            await stopping

    run(scenario())
    assert "Traceback" not in caplog.text


def test_hangup_reads_files_again_or_stops_like_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGHUP)
    done: list[object] = []
    monkeypatch.setattr(signal, "raise_signal", done.append)
    part = SimpleNamespace(ask_reload=lambda: done.append("read again"))
    app: Any = SimpleNamespace(gateway=SimpleNamespace(control=part, access=part))
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        serve._on_hangup(app, files=False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        serve._on_hangup(app, files=False)
        os.kill(os.getpid(), signal.SIGHUP)
        assert done == [signal.SIGTERM]
        serve._on_hangup(app, files=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert done[1:] == ["read again", "read again"]
    finally:
        signal.signal(signal.SIGHUP, before)
