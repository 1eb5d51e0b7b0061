"""The request path against simulated workers: choosing, admission, bad input."""

import asyncio
import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.errors import ApiError, InvalidRequest
from router.parse import parse_request, read_headers, request_id_of
from tests.support.simulated_worker import (
    CHUNK,
    RunningGateway,
    SimulatedWorker,
    chat_body,
    run,
    running_gateway,
    until,
)

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


async def error_of(
    gateway: RunningGateway, raw: bytes, path: str = "/v1/chat/completions"
) -> tuple[int, dict[str, Any]]:
    answer = await gateway.client.post(path, content=raw)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error


def test_simulated_requests_go_to_the_longest_hit() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a, b) as gateway:
            chunks = a.hashes(TEXT)
            a.store("gpu", chunks[:1])
            b.store("gpu", chunks[:1])
            b.store("cpu", chunks[1:4])
            await until(lambda: gateway.gateway.index.sizes("b")["cpu"] == 3)
            answer = await gateway.chat(TEXT)
            assert answer.headers["x-warmroute-worker"] == "b"
            assert answer.headers["x-warmroute-hit-tokens"] == str(4 * CHUNK)
            assert answer.headers["x-warmroute-reason"] == f"longest hit: {4 * CHUNK} of {len(TEXT)} tokens"

    run(scenario())


def test_simulated_salt_and_lora_have_their_own_cache() -> None:
    async def scenario() -> None:
        worker = SimulatedWorker()
        worker.loras = ["adapter"]
        async with running_gateway(await worker.start()) as gateway:
            worker.store("gpu", worker.hashes(TEXT)[:2])
            worker.store("gpu", worker.hashes(TEXT, cache_salt="pepper")[:3])
            worker.store("gpu", worker.hashes(TEXT, lora="adapter")[:4])
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"] == 9)

            async def hit(**members: Any) -> int:
                return int((await gateway.chat(TEXT, **members)).headers["x-warmroute-hit-tokens"])

            assert await hit() == 2 * CHUNK
            assert await hit(cache_salt="pepper") == 3 * CHUNK
            assert await hit(cache_salt="other") == 0
            assert await hit(model="adapter") == 4 * CHUNK

    run(scenario())


def test_simulated_completions_with_ids_text_and_several_prompts() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            whole = len(TEXT) // CHUNK * CHUNK

            async def hit(prompt: Any) -> str:
                body = {"model": "simulated", "prompt": prompt}
                answer = await gateway.client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.headers["x-warmroute-hit-tokens"]

            ids = list(TEXT.encode())
            assert await hit(TEXT) == str(whole)
            assert await hit(ids) == str(whole)
            assert await hit([ids, ids[:CHUNK], [7] * CHUNK]) == str(whole + CHUNK)

    run(scenario())


def test_simulated_load_counts_from_the_moment_of_sending() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        for worker in (a, b):
            worker.hold_head.clear()
        async with running_gateway(a, b) as gateway:
            asking = [asyncio.create_task(gateway.chat(TEXT * 20 + str(n))) for n in range(6)]
            await until(lambda: len(a.served("/v1/chat/completions")) + len(b.served("/v1/chat/completions")) == 6)
            assert len(a.served("/v1/chat/completions")) == 3
            loads = [worker.load for worker in gateway.gateway.registry.workers]
            assert all(load.in_flight == 3 for load in loads)
            for worker in (a, b):
                worker.hold_head.set()
            await asyncio.gather(*asking)
            assert all(load.in_flight == 0 and load.uncached_tokens == 0 for load in loads)

    run(scenario())


def test_simulated_queue_is_bounded_and_in_order() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.hold_head.clear()
        limits = {"max_in_flight": 1, "max_queue": 2, "queue_timeout": 20}
        async with running_gateway(worker, **limits) as gateway:
            asking = []
            for number in range(3):
                asking.append(asyncio.create_task(gateway.chat(f"request {number}")))
                await until(lambda n=number: gateway.gateway.admission.queued == n)
            refused = await gateway.chat("one too many")
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            worker.hold_head.set()
            assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 3
            sent = [json.loads(body)["messages"][0]["content"] for _, _, body in worker.served("/v1/chat/completions")]
            assert sent == [f"request {number}" for number in range(3)]
            assert gateway.gateway.admission.in_flight == 0

    run(scenario())


def test_simulated_wait_in_the_queue_is_bounded() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.hold_head.clear()
        async with running_gateway(worker, max_in_flight=1, queue_timeout=0.2) as gateway:
            first = asyncio.create_task(gateway.chat("first"))
            await until(lambda: gateway.gateway.admission.in_flight == 1)
            assert (await gateway.chat("second")).status_code == 429
            worker.hold_head.set()
            assert (await first).status_code == 200
            assert (await gateway.chat("third")).status_code == 200

    run(scenario())


def test_simulated_bodies_are_bounded_together() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, max_body_bytes=4096, max_bodies_bytes=2048) as gateway:
            assert (await gateway.chat("x" * 3000)).status_code == 429
            assert (await gateway.chat("x" * 100)).status_code == 200
            assert gateway.gateway.admission.bytes == 0

    run(scenario())


def test_simulated_everyone_down_is_503_with_retry_after() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            await worker.kill()
            answer = await gateway.chat("anyone?")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "no_worker_available"
            assert (await gateway.client.get("/ready")).status_code == 503
            assert (await gateway.client.get("/health")).status_code == 200

    run(scenario())


def test_simulated_worker_that_never_came_up_is_503_not_404() -> None:
    async def scenario() -> None:
        absent = await SimulatedWorker().start()
        await absent.kill()
        async with running_gateway(absent) as gateway:
            assert (await gateway.chat("hello")).status_code == 503

    run(scenario())


BAD_BODIES: list[tuple[bytes, int, str | None, str | None]] = [
    (b"", 400, None, None),
    (b"{", 400, None, None),
    (b"[]", 400, None, None),
    (b"null", 400, None, None),
    (b'"text"', 400, None, None),
    (b'{"model": "simulated", "messages": "\xff\xfe"}', 400, None, None),
    (b"[" * 100_000, 400, None, None),
    (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, "model", "model_not_found"),
    (b'{"model": 5, "messages": [{"role": "user", "content": "x"}]}', 400, "model", None),
    (b'{"model": ["simulated"], "messages": []}', 400, "model", None),
    (b'{"model": "simulated"}', 400, "messages", None),
    (b'{"model": "simulated", "messages": []}', 400, "messages", None),
    (b'{"model": "simulated", "messages": "hi"}', 400, "messages", None),
    (b'{"model": "simulated", "messages": ["hi"]}', 400, "messages[0]", None),
    (b'{"model": "simulated", "messages": [{"content": "hi"}]}', 400, "messages[0].role", None),
    (
        b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
        400,
        "temperature",
        None,
    ),
    (
        b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "max_tokens": {}}',
        400,
        "max_tokens",
        None,
    ),
    (b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "stream": []}', 400, "stream", None),
    (b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "tools": "all"}', 400, "tools", None),
    (
        b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "cache_salt": ""}',
        400,
        "cache_salt",
        None,
    ),
    (
        b'{"model": "simulated", "messages": [{"role": "user", "content": "x"}], "kv_transfer_params": 1}',
        400,
        "kv_transfer_params",
        None,
    ),
]


def test_simulated_bad_input_is_named_and_survived() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, max_body_bytes=200_000) as gateway:
            for raw, status, param, code in BAD_BODIES:
                seen, error = await error_of(gateway, raw)
                assert (seen, error["param"], error["code"]) == (status, param, code), raw[:100]
            for raw, param in (
                (b'{"model": "simulated"}', "prompt"),
                (b'{"model": "simulated", "prompt": 5}', "prompt"),
            ):
                assert (await error_of(gateway, raw, "/v1/completions"))[1]["param"] == param
            status, error = await error_of(gateway, b"x" * 200_001)
            assert (status, error["code"]) == (413, "request_too_large")
            assert not worker.served("/v1/chat/completions")
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_overlong_prompt() -> None:
    async def scenario() -> None:
        worker = SimulatedWorker()
        worker.max_model_len = 50
        async with running_gateway(await worker.start()) as gateway:
            status, error = await error_of(gateway, json.dumps(chat_body("x" * 50)).encode())
            assert (status, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
            assert "50 tokens" in error["message"]
            assert (await gateway.chat("x" * 49)).status_code == 200

    run(scenario())


def test_simulated_chunked_body_over_the_limit() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), max_body_bytes=4096) as gateway:

            async def parts() -> Any:
                for _ in range(10):
                    yield b"x" * 1000

            answer = await gateway.client.post("/v1/chat/completions", content=parts())
            assert answer.status_code == 413

    run(scenario())


def test_simulated_heads_are_bounded() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), max_header_bytes=4096, max_headers=30) as gateway:
            post = gateway.client.post
            many = await post("/v1/chat/completions", json=chat_body("x"), headers={f"x-{n}": "1" for n in range(40)})
            assert (many.status_code, many.json()["error"]["code"]) == (431, "headers_too_large")
            long = await post("/v1/chat/completions", json=chat_body("x"), headers={"x-long": "1" * 5000})
            assert long.status_code == 431
            for endless in (b"GET / HTTP/1.1\r\nx: ", b"GET /"):
                assert b" 431 " in await raw_answer(gateway, endless + b"a" * 100_000)
            assert b" 400 " in await raw_answer(gateway, b"no http at all\r\n\r\n")
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_body_that_never_comes() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), body_timeout=0.2) as gateway:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
            assert b" 408 " in await raw_answer(gateway, head)
            assert gateway.gateway.admission.in_flight == 0

    run(scenario())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "stream", "cache_salt", "tools", "temperature", "kv_transfer_params", "max_tokens"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["chat", "completions"]),
    st.one_of(st.binary(max_size=60), st.dictionaries(FIELDS, JSON).map(lambda members: json.dumps(members).encode())),
)
def test_parsing_accepts_or_names_the_fault(kind: Any, raw: bytes) -> None:
    try:
        request = parse_request(kind, raw, [], "id")
    except InvalidRequest as error:
        fault = json.loads(error.body())["error"]["message"]
    else:
        fault = ""
        assert isinstance(request.body, dict)
        assert isinstance(request.model, str)
    assert fault or request.raw == raw


def test_simulated_fuzzed_bodies_never_harm_the_gateway() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=60) as gateway:
            for raw in _samples():
                answer = await gateway.client.post("/v1/chat/completions", content=raw)
                assert answer.status_code in (200, 400, 404, 502, 503), (raw, answer.text)
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]
            gateway.gateway.registry.workers[0].breaker.succeeded()
            assert (await gateway.chat("still there?")).status_code == 200
            assert gateway.gateway.admission.in_flight == 0

    run(scenario())


def _samples() -> list[bytes]:
    found: list[bytes] = []

    @settings(max_examples=60, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(FIELDS, JSON))
    def collect(members: dict[str, Any]) -> None:
        found.append(json.dumps({"model": "simulated", "messages": [{"role": "user"}], **members}).encode())

    collect()
    return found


def test_request_ids() -> None:
    assert request_id_of([(b"x-request-id", b"mine-1")]) == "mine-1"
    for unfit in (b"", b"a b", b"x" * 129, b"caf\xe9"):
        assert request_id_of([(b"x-request-id", unfit)]) != unfit.decode("latin-1")
    assert request_id_of([]) != request_id_of([])


def test_headers_of_this_hop_stay_here() -> None:
    headers = [(b"host", b"h"), (b"connection", b"x-mine, close"), (b"x-mine", b"1"), (b"x-other", b"2")]
    arrival = read_headers(headers)
    assert arrival.headers == [(b"x-other", b"2")]
    arrival.check(4, 1000)
    with pytest.raises(ApiError, match="more than 3 headers"):
        arrival.check(3, 1000)
    with pytest.raises(ApiError, match="exceed 50 bytes"):
        arrival.check(4, 50)


def test_headers_are_read_in_one_pass() -> None:
    key = (b"authorization", b"bearer  secret ")
    headers = [(b"content-length", b"12"), (b"x-warmroute-priority", b"3"), key, (b"x-api-key", b"other")]
    headers += [(b"x-request-id", b"first"), (b"x-request-id", b"second"), (b"connection", b"a"), (b"connection", b"b")]
    headers += [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    arrival = read_headers(headers, keyed=True)
    assert arrival.headers == [(b"x-warmroute-priority", b"3"), (b"c", b"3")]
    assert (arrival.shown, arrival.priority, arrival.length) == (b"secret", b"3", 12)
    assert arrival.request_id == "first"
    assert b"secret" not in repr(arrival).encode()
    assert key in read_headers(headers).headers, "without keys here it may be the worker's own"
    for length in (b"", b"-1", b"x", "²".encode("latin-1")):
        assert read_headers([(b"content-length", length)]).length == 0


async def raw_answer(gateway: RunningGateway, data: bytes) -> bytes:
    def exchange() -> bytes:
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
            connection.sendall(data)
            return connection.recv(65536)

    return await asyncio.to_thread(exchange)


async def patient_answer(port: int, data: bytes, seconds: float = 3) -> bytes:
    """Everything until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            return await reader.read()
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea",
        b"POST /admin/workers HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n{",
    ],
)
def test_simulated_requests_that_never_end_are_ended(begun: bytes) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), body_timeout=0.3) as gateway:
            assert b" 408 " in await patient_answer(gateway.port, begun)
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_a_body_that_says_it_will_be_too_large_is_refused_before_it_comes() -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{"

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), body_timeout=30) as gateway:
            assert b" 413 " in await raw_answer(gateway, head)
            assert (await gateway.chat("still there?")).status_code == 200

    run(scenario())


def test_simulated_slow_answers_outlive_the_deadline_of_their_request() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.first_pause = 0.7
        async with running_gateway(worker, body_timeout=0.3) as gateway:
            for _ in range(2):
                assert (await gateway.chat("slow")).status_code == 200

    run(scenario())


def test_simulated_bodies_of_unknown_length_are_counted_as_they_come() -> None:
    async def scenario() -> None:
        limits = {"max_body_bytes": 100_000, "max_bodies_bytes": 4096, "body_timeout": 5}
        async with running_gateway(await SimulatedWorker().start(), **limits) as gateway:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            part = b"7d0\r\n" + b"x" * 2000 + b"\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(head + part)
            await until(lambda: gateway.gateway.admission.bytes == 2000)
            writer.write(part * 2)
            assert b" 429 " in await reader.readuntil(b"\r\n")
            await until(lambda: gateway.gateway.admission.bytes == 0)
            writer.transport.abort()

    run(scenario())


@pytest.mark.parametrize("ids", [[2**32], [-1, 5], [10**30]])
def test_simulated_ids_that_are_no_token_ids(ids: list[int]) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            raw = json.dumps({"model": "simulated", "prompt": ids}).encode()
            status, error = await error_of(gateway, raw, "/v1/completions")
            assert (status, error["param"]) == (400, "prompt")
            assert "2^32-1" in error["message"]

    run(scenario())
