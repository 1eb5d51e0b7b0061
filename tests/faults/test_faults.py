"""Every fault of a worker, streamed or not, under every policy: nothing hangs, no byte is wrong, the status is right, and
afterwards every count is as it was."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from benchmarks.simulated_worker import FAULTS, CachingWorker
from router.config import policy_names
from tests.support.simulated_worker import RunningGateway, chat_body, run, running_gateway, until
from worker_connector.report_server import Timing

DEADLINE_S = 20.0
QUICK = {
    "first_byte_timeout": 1.0,
    "idle_timeout": 1.0,
    "connect_timeout": 1.0,
    "breaker_failures": 1000,
    "breaker_seconds": 0.05,
}
PATIENT = {"first_byte_timeout": DEADLINE_S, "idle_timeout": DEADLINE_S}
"""Where every answer comes: a machine that is busy for half a second makes no difference."""

# Statuses a client may see: whole, streamed. 200 is the answer of the sound worker, byte for byte, unless said otherwise.
EXPECTED: dict[str, tuple[set[int], set[int]]] = {
    "hang-head": ({504}, {504}),
    "hang-body": ({502, 504}, {200}),
    "reset": ({200, 502}, {200}),
    "truncate": ({200, 502}, {200}),
    "half-closed": ({200}, {200}),
    "garbage": ({200}, {200}),
    "bad-chunk": ({200, 502}, {200}),
    "too-long": ({200, 502}, {200}),
    "too-short": ({200}, {200}),
    "500": ({500}, {500}),
    "503": ({200}, {200}),
    "slow": ({200}, {200}),
    "refuse": ({200}, {200}),
}


class Answer(NamedTuple):
    """What a client got; ``broken`` when the connection ended before the response did."""

    status: int
    kind: str
    content: bytes
    broken: bool


async def ask(gateway: RunningGateway, number: int, *, stream: bool) -> Answer:
    body = chat_body(f"prompt {number} " * 40, stream=stream)
    content = b""
    async with asyncio.timeout(DEADLINE_S):
        headers = {"x-request-id": f"request-{number}"}
        async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            broken = False
            try:
                async for data in response.aiter_raw():
                    content += data
            except httpx.RemoteProtocolError:
                broken = True
            return Answer(response.status_code, response.headers["content-type"], content, broken)


def sound_answers(worker: CachingWorker, number: int, *, stream: bool) -> list[bytes]:
    """The events, or the one whole, that the faulty half of a worker begins to send."""
    return worker.events({"x-request-id": f"request-{number}"}, {"stream": stream})


def check_answer(answer: Answer, fault: str, sent: list[bytes], *, stream: bool) -> None:
    allowed = EXPECTED[fault][stream]
    assert answer.status in allowed, f"{fault}: {answer}"
    if answer.status != 200:
        check_error(answer)
    elif is_from_the_sound_worker(answer.content, stream=stream):
        assert not answer.broken
    elif stream:
        check_broken_stream(answer, sent, fault)
    else:
        whole = b"".join(sent)
        assert fault in ("slow", "too-short"), f"{fault}: a broken answer was passed on as a whole one"
        assert answer.content == (whole if fault == "slow" else whole[:-10])


def check_error(answer: Answer) -> None:
    assert not answer.broken
    assert answer.kind.startswith("application/json")
    assert json.loads(answer.content)["error"]["message"]


def is_from_the_sound_worker(content: bytes, *, stream: bool) -> bool:
    """Complete, and what the worker sends when nothing is wrong with it."""
    if not stream:
        try:
            return "usage" in json.loads(content)
        except ValueError:
            return False
    return b'"usage"' in content and content.endswith(b"data: [DONE]\n\n")


def check_broken_stream(answer: Answer, sent: list[bytes], fault: str) -> None:
    """Whole events as the worker sent them, from the first on; then the error, or the end of the connection."""
    events = [part + b"\n\n" for part in answer.content.split(b"\n\n")]
    tail = events.pop()
    if fault == "slow":
        assert answer.content == b"".join(sent)
        return
    if fault == "too-short":
        assert answer.content == b"".join(sent)[:-10]
        return
    assert tail == b"\n\n", "a part of an event was passed on"
    said = events and b'"error"' in events[-1]
    if said:
        json.loads(events.pop().removeprefix(b"data: "))
    assert said or answer.broken, "a stream that was cut off looks complete"
    assert events == sent[: len(events)]
    assert b"[DONE]" not in answer.content or answer.broken


def all_available(gateway: RunningGateway) -> bool:
    now = asyncio.get_running_loop().time()
    return all(worker.available(now) for worker in gateway.gateway.registry.workers)


async def check_counts(gateway: RunningGateway) -> None:
    """Whatever happened, nothing is left of it."""
    inner = gateway.gateway
    await until(lambda: not any(worker.load.in_flight for worker in inner.registry.workers))
    await until(lambda: not any(worker.upstream._busy for worker in inner.registry.workers))
    assert inner.admission.in_flight == 0
    assert [worker.load.own for worker in inner.registry.workers] == [0, 0]
    for record in inner.accounting.recent(1000):
        assert record.outcome != "running"
        assert record.duration_s is not None


@asynccontextmanager
async def fleet(policy: str, **settings: Any) -> AsyncIterator[tuple[RunningGateway, CachingWorker]]:
    timing = Timing(heartbeat=0.1, digest=0.3)
    workers = [
        await CachingWorker(chunk_size=16, decode=0.0, prefill=1e7, report_timing=timing).start() for _ in range(2)
    ]
    workers[1].faults = workers[0].faults
    async with running_gateway(*workers, policy=policy, **{**QUICK, **settings}) as gateway:
        yield gateway, workers[0]


UNCOUNTED = {"slow", "too-short", "500", "half-closed"}
"""Faults that are none as far as the connection goes; a kept connection may be closed at any time."""


async def check_metrics(gateway: RunningGateway, faults: int) -> None:
    """Every fault of a worker was counted, as a failure or as a broken response; no request is being served."""
    rows = [row.rpartition(" ") for row in (await gateway.client.get("/metrics")).text.splitlines() if row[0] != "#"]
    values = {name: float(value) for name, _, value in rows}
    failures = sum(value for name, value in values.items() if name.startswith("warmroute_router_worker_failures_total"))
    assert failures >= faults
    assert values["warmroute_router_in_flight_requests"] == 0
    assert values['warmroute_router_worker_in_flight_requests{worker="a"}'] == 0


async def meet(gateway: RunningGateway, worker: CachingWorker, fault: str, number: int, *, stream: bool) -> None:
    """Ask once; whichever worker gets the request first fails it."""
    worker.faults.append(fault)
    answer = await ask(gateway, number, stream=stream)
    check_answer(answer, fault, sound_answers(worker, number, stream=stream), stream=stream)
    assert not worker.faults


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("policy", policy_names())
def test_simulated_faults(policy: str, stream: bool) -> None:
    async def scenario() -> None:
        async with fleet(policy) as (gateway, worker):
            tasks = len(asyncio.all_tasks())
            for number, fault in enumerate(FAULTS):
                await meet(gateway, worker, fault, number, stream=stream)
                await check_counts(gateway)
                await until(lambda: all_available(gateway))
            await check_metrics(gateway, len(FAULTS.keys() - UNCOUNTED))
            worker.refuse()
            for number in range(100, 104):
                check_answer(await ask(gateway, number, stream=stream), "refuse", [], stream=stream)
            await worker.listen()
            await until(lambda: all_available(gateway))
            await check_counts(gateway)
            # Each worker serves its kept connections; nothing else may be left running.
            await until(lambda: len(asyncio.all_tasks()) <= tasks + 2 * len(FAULTS))

    run(scenario())


@pytest.mark.parametrize("fault", ["503", "garbage", "half-closed", "truncate"])
def test_simulated_breaker_keeps_a_failing_worker_out_and_takes_it_back(fault: str) -> None:
    async def scenario() -> None:
        async with fleet("round-robin", breaker_failures=3, breaker_seconds=1.0) as (gateway, worker):
            state = gateway.gateway.registry.get("a")
            assert state is not None
            worker.faults = [fault] * 1000
            for number in range(20):
                await ask(gateway, number, stream=True)
                if state.breaker.state == "open":
                    break
            assert state.breaker.state == "open"
            met, opened = worker.faulted, time.monotonic()
            for number in range(20, 30):
                answer = await ask(gateway, number, stream=False)
                assert answer.status == 200
            trials = 1 + int(time.monotonic() - opened)
            assert worker.faulted <= met + trials, "an open breaker lets nothing but trials through"
            worker.faults.clear()
            await asyncio.sleep(1.5)
            for number in range(30, 36):
                assert (await ask(gateway, number, stream=False)).status == 200
            await until(lambda: state.breaker.state == "closed")
            await check_counts(gateway)

    run(scenario())


@pytest.mark.parametrize("fault", ["503", "garbage", "half-closed", "500", "hang-head"])
def test_simulated_when_every_worker_fails_the_client_is_told(fault: str) -> None:
    async def scenario() -> None:
        async with fleet("longest-hit") as (gateway, worker):
            body = chat_body("x")
            headers = {"x-simulated-fault": fault}
            for stream in (False, True):
                async with asyncio.timeout(DEADLINE_S):
                    answer = await gateway.client.post(
                        "/v1/chat/completions", json={**body, "stream": stream}, headers=headers
                    )
                assert answer.status_code in {500, 502, 503, 504}
                assert answer.json()["error"]["message"]
            assert worker.requests
            await check_counts(gateway)
            async with asyncio.timeout(DEADLINE_S):
                while (await gateway.chat("x")).status_code not in {200, 503}:  # noqa: ASYNC110 - nobody signals it
                    await asyncio.sleep(0.1)

    run(scenario())


def test_simulated_a_report_stream_that_lies_is_listed_again_and_costs_no_request() -> None:
    async def scenario() -> None:
        async with fleet("longest-hit", **PATIENT) as (gateway, worker):
            worker._control("/simulate", b'{"reports": "lie"}')
            state = gateway.gateway.registry.get("a")
            assert state is not None
            asking = [asyncio.create_task(ask(gateway, number, stream=bool(number % 2))) for number in range(20)]
            assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
            await until(lambda: state.digest_mismatches >= 1)
            await until(
                lambda: state.synced and gateway.gateway.index.contents("a")["gpu"] == set(worker.ledger.tiers["gpu"])
            )
            await check_counts(gateway)
            gateway.gateway.index.check()

    run(scenario())


def test_simulated_a_report_stream_that_stalls_is_given_up_and_costs_no_request() -> None:
    async def scenario() -> None:
        async with fleet("longest-hit", **PATIENT) as (gateway, worker):
            state = gateway.gateway.registry.get("a")
            assert state is not None
            worker._control("/simulate", b'{"reports": "stall"}')
            async with asyncio.timeout(10):
                number = 0
                while not state.relists and "nothing heard" not in state.reports_error:
                    assert (await ask(gateway, number, stream=False)).status == 200
                    number += 1
            await check_counts(gateway)

    run(scenario())
