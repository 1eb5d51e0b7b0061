"""The server on the wire: what clients send that no client library would, and what they get."""

import asyncio
import json
import logging
from typing import Any

import pytest

from tests.support.simulated_worker import SimulatedWorker, chat_body, run, running_gateway, until

CHAT = b"/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n"


def request(body: bytes, *, headers: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST %b HTTP/%b\r\nhost: h\r\n%bcontent-length: %d\r\n\r\n"
    return head % (CHAT, version, headers, len(body)) + body


def chat(text: str = "hello", **members: Any) -> bytes:
    return json.dumps(chat_body(text, **members)).encode()


async def converse(port: int, sent: bytes, seconds: float = 1.0) -> bytes:
    """All that comes back until the gateway closes, or for this long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    received = b""
    try:
        async with asyncio.timeout(seconds):
            while data := await reader.read(65536):
                received += data
            received += b"<closed>"
    except TimeoutError:
        pass
    finally:
        writer.transport.abort()
    return received


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_without_a_body_is_answered(method: bytes, offer: bytes) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            offered = b"%b /health HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: %b\r\n\r\n" % (method, offer)
            answer = await converse(gateway.port, offered + HEALTH, 0.5)
            assert answer.count(b"HTTP/1.1 200 OK") == 2, answer

    run(scenario())


@pytest.mark.parametrize("behind", [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000])
@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_what_is_refused_spoils_no_answer_before_it(behind: bytes, pause: float) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.pause = 0.05
        async with running_gateway(worker) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(request(chat(stream=True)) * 2)
            await asyncio.sleep(pause)
            writer.write(behind)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200") == 2, answer
            assert answer.count(b"data: [DONE]") == 2
            assert answer.endswith(b"0\r\n\r\n")

    run(scenario())


def test_a_body_that_is_malformed_is_refused_at_once() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            head = b"POST %b HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT
            answer = await converse(gateway.port, head + b"5\r\nhello\r\nzz\r\n")
            assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 400") == 1, answer
            assert answer.endswith(b"<closed>")

    run(scenario())


def test_http_1_0_gets_no_chunks() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            answer = await converse(gateway.port, request(chat(stream=True), version=b"1.0"))
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"transfer-encoding" not in head
            assert b"connection: close" in head
            assert body.startswith(b"data: {")
            assert body.endswith(b"data: [DONE]\n\n<closed>")
            whole = await converse(gateway.port, request(chat(), version=b"1.0"))
            assert json.loads(whole.partition(b"\r\n\r\n")[2].removesuffix(b"<closed>"))["usage"]

    run(scenario())


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("length", [b"", b"content-length: 1234\r\n"])
def test_a_response_without_a_body_keeps_the_connection(status: bytes, length: bytes) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.raw_answer = [b"HTTP/1.1 %b\r\netag: a\r\n%b\r\n" % (status, length)]
            answer = await converse(gateway.port, request(chat()) + HEALTH, 0.5)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert answer.endswith(b'{"status":"ok"}'), answer

    run(scenario())


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_never_ends_is_answered_once(framing: str) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), body_timeout=0.2) as gateway:
            head = b"POST %b HTTP/1.1\r\nhost: h\r\n" % CHAT
            head += (
                b"content-length: 9\r\n\r\n{"
                if framing == "length"
                else b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
            )
            answer = await converse(gateway.port, head, 2)
            assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 408") == 1, answer
            assert answer.endswith(b"<closed>")

    run(scenario())


def test_a_connection_outlives_a_body_that_was_refused_before_it_was_here() -> None:
    async def scenario() -> None:
        async with running_gateway(
            await SimulatedWorker().start(), body_timeout=0.2, max_body_bytes=100_000
        ) as gateway:
            answer = await converse(gateway.port, request(b"x" * 500_000), 0.8)
            assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 413") == 1, answer
            assert not answer.endswith(b"<closed>")

    run(scenario())


def test_a_client_that_leaves_requests_behind_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.words, worker.pause = 100, 0.02
        async with running_gateway(worker) as gateway:
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(request(chat(stream=True)) * 5)
            await until(lambda: worker.sent_bytes)
            writer.transport.abort()
            await until(lambda: worker.aborted)
            await asyncio.sleep(0.1)
            assert sum(path.encode() == CHAT for path, _, _ in worker.requests) == 1

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert not caplog.records


@pytest.mark.parametrize(
    ("location", "seen"),
    [
        ("http://{own}/v1/chat/completions?a=1", "/v1/chat/completions?a=1"),
        ("HTTP://{own}", "/"),
        ("http://{own}//elsewhere/x", "http://{own}//elsewhere/x"),
        ("http://{own}0/x", "http://{own}0/x"),
        ("https://elsewhere/x", "https://elsewhere/x"),
        ("/x", "/x"),
    ],
)
def test_a_redirection_leads_back_to_the_gateway(location: str, seen: str) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        own = f"127.0.0.1:{worker.port}"
        async with running_gateway(worker) as gateway:
            head = f"HTTP/1.1 307 X\r\nlocation: {location.format(own=own)}\r\ncontent-length: 0\r\n\r\n"
            worker.raw_answer = [head.encode()]
            answer = await gateway.chat("hello")
            assert (answer.status_code, answer.headers["location"]) == (307, seen.format(own=own))

    run(scenario())


LONG_HEAD = b"GET /health HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 300_000 + b"\r\n\r\n"
LONG_BODY = request(b"{" * 300_000, headers=b"connection: close\r\n")


@pytest.mark.parametrize(("sent", "status"), [(LONG_HEAD, 431), (LONG_BODY, 413)])
def test_a_client_that_sends_on_still_gets_its_answer(sent: bytes, status: int) -> None:
    """A connection that is closed while bytes come in is reset, and the answer may be lost with it."""

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), max_body_bytes=100_000) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            for at in range(0, len(sent), 30_000):
                writer.write(sent[at : at + 30_000])
                await asyncio.sleep(0.002)
            async with asyncio.timeout(5):
                answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
            assert answer.count(b"HTTP/1.1") == 1
            writer.close()

    run(scenario())


def test_a_client_that_never_stops_sending_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.server.LINGER_S", 0.2)

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            async with asyncio.timeout(5):
                with pytest.raises(ConnectionError):
                    await send_for_ever(writer)

    run(scenario())


async def send_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"y" * 10_000)
        await writer.drain()
        await asyncio.sleep(0.005)
