import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from router.breaker import WINDOW, Breaker
from router.errors import ConnectFailed
from router.retries import RESERVE_PER_S, WINDOW_S, RetryBudget, backoff
from router.upstream import Timeouts, Upstream
from tests.support.simulated_worker import SimulatedWorker, chat_body, run, running_gateway, until

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = json.dumps(chat_body("hello")).encode()
WHOLE = CHAT + b"content-length: %d\r\n\r\n" % len(BODY) + BODY

# The breaker.


def test_outcomes_of_before_say_nothing_about_now() -> None:
    """The end of a worker with many requests in flight is one event."""
    breaker = Breaker(3, 10)
    flights = [breaker.begin() for _ in range(300)]
    for flight in flights:
        breaker.failed(0, flight)
    assert breaker.badness == 1
    assert not breaker.allows(9.9)
    assert breaker.allows(10)
    trial = breaker.begin()
    breaker.succeeded(flights[0])
    breaker.abandoned(flights[0])
    assert breaker.state == "half-open", "who began before the breaker opened cannot close it, or end the trial"
    breaker.succeeded(trial)
    assert breaker.state == "closed"
    breaker.failed(11, trial)
    assert breaker.allows(11)


def test_half_of_the_last_outcomes_open_it_too() -> None:
    breaker = Breaker(5, 10)
    for number in range(2 * WINDOW):
        if breaker.state != "closed":
            break
        breaker.failed(0, breaker.begin()) if number % 2 else breaker.succeeded(breaker.begin())
    assert breaker.state == "open"
    steady = Breaker(5, 10)
    for number in range(1000):
        steady.failed(0, steady.begin()) if number % 4 == 0 else steady.succeeded(steady.begin())
    assert steady.state == "closed"


def test_requests_sent_for_want_of_a_better_worker_do_not_keep_it_out_longer() -> None:
    breaker = Breaker(1, 10)
    breaker.failed(0, breaker.begin())
    for _ in range(50):
        breaker.failed(5, breaker.begin())
    assert breaker.allows(10)
    breaker.failed(10, breaker.begin())
    assert not breaker.allows(29.9)
    assert breaker.allows(30)


def test_suspicions_alone_open_nothing() -> None:
    breaker = Breaker(3, 10)
    asked = [breaker.suspected(breaker.begin()) for _ in range(4)]
    assert asked == [False, False, True, True]
    assert breaker.state == "closed"
    breaker.acquitted()
    assert not breaker.suspected(breaker.begin())
    breaker.succeeded(breaker.begin())
    assert [breaker.suspected(breaker.begin()) for _ in range(3)] == [False, False, True]
    breaker.convicted(0)
    assert not breaker.allows(9)
    assert breaker.allows(10)
    breaker.begin()
    assert breaker.suspected(breaker.generation), "a 500 to the one that tries has the worker asked at once"
    assert breaker.state == "half-open"
    breaker.acquitted()
    assert breaker.state == "closed"


# Retries.


def test_the_budget_is_a_reserve_and_a_share_of_what_was_sent() -> None:
    budget = RetryBudget(0.2)
    assert sum(budget.take(0.0) for _ in range(1000)) == RESERVE_PER_S * WINDOW_S
    taken = 0
    for step in range(1, 601):
        budget.requests += 100
        taken += sum(budget.take(step / 10) for _ in range(100))
    assert taken == pytest.approx(0.2 * 60_000 + RESERVE_PER_S * 60, rel=0.05)
    assert budget.exhausted > 40_000
    quiet = RetryBudget(0.2)
    quiet.requests += 10**6
    assert quiet.allows(3600.0)
    assert sum(quiet.take(3600.0) for _ in range(100_000)) < 1000, "an hour ago counts for nothing"
    none = RetryBudget(0.0)
    none.requests = 1000
    assert not none.take(10.0)


def test_backoff_is_random_and_bounded() -> None:
    rng = random.Random(1)
    waits = [backoff(attempt, 0.05, rng) for attempt in range(1, 40) for _ in range(20)]
    assert max(waits) <= 1.0
    assert max(backoff(1, 0.05, rng) for _ in range(100)) <= 0.05
    assert len(set(waits)) > 700


def test_simulated_retries_stop_at_the_budget() -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(2)]
        settings = {"breaker_failures": 10_000, "retry_ratio": 0.0, "retry_backoff": 0, "seed": 3}
        async with running_gateway(*workers, **settings) as gateway:
            for worker in workers:
                worker.fail_next = 1
            answer = await gateway.chat("hello")
            assert answer.status_code == 503, "the worker's own answer, as there is no budget to try another"
            assert sum(len(worker.served("/v1/chat/completions")) for worker in workers) == 1
        workers = [await SimulatedWorker().start() for _ in range(2)]
        async with running_gateway(*workers, **{**settings, "retry_ratio": 0.2}) as gateway:
            for worker in workers:
                worker.fail_next = 1
            assert (await gateway.chat("hello")).status_code == 503, "both were tried"
            assert (await gateway.chat("hello")).status_code == 200
            assert await gateway.metric("warmroute_router_retries_total") == 1

    run(scenario())


# Who is at fault.


def test_simulated_a_client_whose_requests_crash_takes_no_worker_out() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        poison = b"poison"
        answer = worker._answer

        async def crash(writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
            if poison in raw:
                worker._json(writer, 500, {"error": {"message": "simulated crash"}})
                return True
            return await answer(writer, headers, raw)

        worker._answer = crash  # type: ignore[method-assign]
        async with running_gateway(worker, await SimulatedWorker().start(), breaker_failures=3) as gateway:
            for _ in range(20):
                await gateway.chat("poison")
            await asyncio.sleep(0.05)
            for name in "ab":
                assert (await gateway.worker(name))["breaker"] == "closed"
            assert worker.served("/v1/completions"), "it was asked whether it works"

    run(scenario())


def test_simulated_a_worker_that_answers_500_to_everything_is_kept_out() -> None:
    async def scenario() -> None:
        broken, well = await SimulatedWorker().start(), await SimulatedWorker().start()
        settings = {"breaker_failures": 3, "breaker_seconds": 60, "policy": "round-robin", "health_interval": 60}
        async with running_gateway(broken, well, **settings) as gateway:
            broken.status = 500
            breaker = gateway.gateway.registry.workers[0].breaker
            for _ in range(12):
                await gateway.chat("hello")
            await until(lambda: breaker.state == "open")
            assert [(await gateway.chat("hello")).status_code for _ in range(6)] == [200] * 6

    run(scenario())


def test_simulated_never_are_all_workers_kept_out() -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(2)]
        settings = {"breaker_failures": 2, "breaker_seconds": 60, "retries": 0, "health_interval": 60}
        async with running_gateway(*workers, policy="round-robin", **settings) as gateway:
            for worker in workers:
                worker.status = 503
            for _ in range(8):
                assert (await gateway.chat("hello")).status_code == 503
            states = [worker.breaker.state for worker in gateway.gateway.registry.workers]
            assert "closed" not in states
            for worker in workers:
                worker.status = 200
            assert (await gateway.chat("hello")).status_code == 200, "the least bad serves"
            assert (await gateway.chat("hello")).headers["x-warmroute-worker"] in "ab"
            assert "closed" in [worker.breaker.state for worker in gateway.gateway.registry.workers]

    run(scenario())


def test_a_worker_that_accepts_no_connection_is_given_up_in_time() -> None:
    async def scenario() -> None:
        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            upstream = Upstream("w", f"http://127.0.0.1:{full.getsockname()[1]}", Timeouts(0.2, 9, 9))
            started = time.monotonic()
            with pytest.raises(ConnectFailed, match="accepted no connection within"):
                await upstream.fetch("GET", "/health", timeout=9)
            assert time.monotonic() - started < 7
            upstream.close()
        finally:
            for item in (full, *fillers):
                item.close()

    run(scenario())


def test_simulated_a_long_answer_closes_the_breaker_with_its_first_byte() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        settings = {"breaker_failures": 1, "breaker_seconds": 60, "health_interval": 60}
        async with running_gateway(worker, **settings) as gateway:
            worker.fail_next = 1
            await gateway.chat("hello")
            breaker = gateway.gateway.registry.workers[0].breaker
            assert breaker.state == "open"
            worker.words, worker.pause = 1000, 0.01
            body = chat_body("hello", stream=True)
            async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                await anext(answer.aiter_bytes())
                await until(lambda: breaker.state == "closed", 5)

    run(scenario())


# Attack shapes: what arrives is answered, or hung up on in time; nobody else notices.


@asynccontextmanager
async def raw_connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer_to(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """All that comes back until the server closes or is silent."""
    async with raw_connection(port) as (reader, writer):
        writer.write(data)
        answer = b""
        try:
            async with asyncio.timeout(seconds):
                while part := await reader.read(65536):
                    answer += part
        except (TimeoutError, ConnectionError):
            pass
        return answer


SMUGGLED = b"GET /admin/workers HTTP/1.1\r\nhost: localhost\r\n\r\n"


MALFORMED: list[tuple[bytes, str]] = [
    (CHAT + b"content-length: 5\r\ncontent-length: 6\r\n\r\n" + BODY, "two lengths"),
    (CHAT + b"content-length: 5, 6\r\n\r\n" + BODY, "two lengths in one"),
    (CHAT + b"content-length: +5\r\n\r\n{}   ", "signed length"),
    (CHAT + b"content-length: -1\r\n\r\n", "negative length"),
    (CHAT + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, "CL.TE"),
    (CHAT + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED, "TE.CL"),
    (CHAT + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, "other coding"),
    (CHAT + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n", "space before the colon"),
    (CHAT + b"x: a\r\n folded\r\ncontent-length: 0\r\n\r\n", "folded header"),
    (CHAT.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}", "bare LF"),
    (CHAT + b"x: a\rb\r\ncontent-length: 0\r\n\r\n", "bare CR"),
    (CHAT + b"x: a\0b\r\ncontent-length: 0\r\n\r\n", "NUL"),
    (b"POST /v1/chat/completions HTTP/9.9\r\n\r\n", "other version"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "a TLS hello"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
    (CHAT + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n", "endless chunk"),
]


def test_simulated_malformed_http_ends_at_the_gateway() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            answers = await asyncio.gather(*(answer_to(gateway.port, data, 2.0) for data, _ in MALFORMED))
            for answer, (_, what) in zip(answers, MALFORMED, strict=True):
                assert answer.startswith(b"HTTP/1.1 400"), (what, answer)
                assert b"connection: close" in answer, what
                assert answer.count(b"HTTP/1.1") == 1, f"{what}: nothing behind it is taken for a request"
            assert not worker.served("/v1/chat/completions")
            assert (await gateway.chat("hello")).status_code == 200

    run(scenario())


LAST = b"connection: close\r\n"


def test_simulated_headers_beyond_the_bounds_are_431() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            many = b"".join(b"x-%d: v\r\n" % number for number in range(10_000))
            long = b"x-token: " + b"t " * 50_000 + b"\r\n"
            for head in (many, long, b"x" * 100_000 + b": v\r\n"):
                answer = await answer_to(gateway.port, CHAT + head + LAST + b"content-length: 0\r\n\r\n")
                assert b" 431 " in answer.partition(b"\r\n")[0], answer[:200]
            few = b"".join(b"x-%d: v\r\n" % number for number in range(150))
            assert b" 431 " in await answer_to(gateway.port, CHAT + few + LAST + b"content-length: 0\r\n\r\n")
            named = b"connection: " + b"a, " * 10_000 + b"close\r\n"
            answer = await answer_to(gateway.port, CHAT + named + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
            assert not worker.served("/v1/chat/completions")[-1][1].get("connection")

    run(scenario())


def test_simulated_hop_by_hop_headers_end_here() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.extra_headers = [("Connection", "x-hop"), ("x-hop", "1"), ("Keep-Alive", "timeout=5"), ("x-end", "1")]
        async with running_gateway(worker) as gateway:
            headers = {
                "connection": "keep-alive, x-private",
                "x-private": "1",
                "te": "trailers",
                "proxy-authorization": "Basic x",
                "x-warmroute-priority": "0",
                "x-kept": "1",
            }
            answer = await gateway.client.post("/v1/chat/completions", json=chat_body("x"), headers=headers)
            sent = worker.served("/v1/chat/completions")[0][1]
            assert sent["x-kept"] == "1"
            assert not {"connection", "x-private", "te", "proxy-authorization", "keep-alive"} & set(sent)
            assert answer.headers["x-end"] == "1"
            assert not {"x-hop", "keep-alive"} & set(answer.headers)

    run(scenario())


def test_simulated_slow_and_silent_clients_are_hung_up_on() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, body_timeout=0.3) as gateway:

            async def drip(data: bytes) -> float:
                """Send a byte now and then; how long the server bore it."""
                started = time.monotonic()
                async with raw_connection(gateway.port) as (reader, writer):
                    ended = asyncio.create_task(reader.read())
                    for byte in data:
                        writer.write(bytes([byte]))
                        done, _ = await asyncio.wait([ended], timeout=0.05)
                        if done or time.monotonic() - started > 3:
                            break
                    ended.cancel()
                    await asyncio.gather(ended, return_exceptions=True)
                return time.monotonic() - started

            silent = asyncio.create_task(answer_to(gateway.port, b"", 3.0))
            half = asyncio.create_task(answer_to(gateway.port, CHAT + b"content-length: 99\r\n\r\n{", 3.0))
            times = await asyncio.gather(drip(WHOLE), drip(CHAT + b"x-long: " + b"v" * 200), drip(b"\r\n" * 100))
            assert max(times) < 1.5, times
            assert b" 408 " in await silent
            assert b" 408 " in await half
            assert (await gateway.chat("hello")).status_code == 200
            assert gateway.gateway.admission.in_flight == 0
            assert gateway.gateway.admission.bytes == 0

    run(scenario())


# Stopping.


class Fleet:
    """Gateways of which one serves and is replaced by the next, and what stands before them: it sends connections to
    who is ready, and takes them elsewhere that are refused before anything was sent."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.lost: list[str] = []
        self.answered = 0
        self.stop = False

    async def keep_asking(self, *, stream: bool, pause: float) -> None:
        """One client with one connection that it uses again and again, as long as it is let."""
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        body = json.dumps(chat_body("hello", stream=stream)).encode()
        request = CHAT + b"content-length: %d\r\n\r\n" % len(body) + body
        while not self.stop:
            connection = connection or await self._connect()
            try:
                async with asyncio.timeout(10):
                    closes = await self._ask(*connection, request)
                self.answered += 1
            except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
                self.lost.append(repr(error))
                closes = True
            if closes:
                connection[1].close()
                connection = None
            await asyncio.sleep(random.random() * pause)
        if connection is not None:
            connection[1].close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", self.ports[-1])
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bool:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(head)
        if b"content-length:" in head:
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        else:
            rest = await reader.readuntil(b"0\r\n\r\n")
            if b"[DONE]" not in rest:
                raise ValueError(rest)
        return b"connection: close" in head


async def rolling_restart(restarts: int, clients: int = 12) -> Fleet:
    fleet = Fleet()
    worker = await SimulatedWorker().start()
    worker.pause = 0.005
    settings = {"drain_timeout": 10, "drain_idle": 0.5, "drain_delay": 0.2, "health_interval": 1}
    running = running_gateway(workers=[worker.spec("a")], **settings)
    serving = await running.__aenter__()
    fleet.ports.append(serving.port)
    asking = [
        asyncio.create_task(fleet.keep_asking(stream=bool(number % 2), pause=0.02 * (number % 4)))
        for number in range(clients)
    ]
    for _ in range(restarts):
        await asyncio.sleep(0.3)
        following = running_gateway(workers=[worker.spec("a")], **settings)
        fresh = await following.__aenter__()
        fleet.ports.append(fresh.port)
        await running.__aexit__(None, None, None)
        running = following
    await asyncio.sleep(0.3)
    fleet.stop = True
    await asyncio.gather(*asking)
    await running.__aexit__(None, None, None)
    await worker.kill()
    return fleet


def test_simulated_rolling_restarts_lose_no_request() -> None:
    async def scenario() -> None:
        fleet = await rolling_restart(3)
        assert not fleet.lost
        assert fleet.answered > 100

    run(scenario())


def test_simulated_stopping_turns_unready_first_and_tells_clients() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        settings = {"drain_delay": 0.5, "drain_idle": 0.3, "drain_timeout": 5}
        async with running_gateway(worker, **settings) as gateway:
            limits = httpx.Limits(max_keepalive_connections=10)
            async with (
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", limits=limits) as idle,
                raw_connection(gateway.port) as (reader, writer),
            ):
                assert (await idle.get("/ready")).status_code == 200
                writer.write(WHOLE[:30])  # a request on its way when the stop comes
                worker.hold_head.clear()
                held = asyncio.create_task(gateway.chat("held", stream=True))
                await until(lambda: worker.served("/v1/chat/completions"))
                gateway.stop()
                await until(lambda: gateway.gateway.draining)
                ready = await idle.get("/ready")
                assert (ready.status_code, ready.headers["connection"]) == (503, "close")
                await asyncio.sleep(0.6)
                with pytest.raises(OSError):
                    await asyncio.open_connection("127.0.0.1", gateway.port)
                writer.write(WHOLE[30:])
                worker.hold_head.set()
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                assert b"connection: close" in head
                assert (await held).text.rstrip().endswith("data: [DONE]")

    run(scenario())
