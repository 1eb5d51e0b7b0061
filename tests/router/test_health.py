"""Health checks against simulated workers."""

import logging
from typing import Any

import pytest

from tests.support.simulated_worker import SimulatedWorker, run, running_gateway, until


def down_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if " is down: " in text]


def test_simulated_worker_down_from_the_start_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        worker = await SimulatedWorker(reports=False).start()
        await worker.kill()
        async with running_gateway(worker, health_interval=0.02) as gateway:
            monitor = gateway.gateway._monitors["a"]
            await until(lambda: monitor._failures > 5)
            assert len(down_lines(caplog)) == 1
            assert "worker a is down: worker a cannot be reached" in down_lines(caplog)[0]
            await worker.start()
            await until(lambda: gateway.gateway.registry.workers[0].up)
            await worker.kill()
            await until(lambda: len(down_lines(caplog)) == 2)

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b'{"data": [{"id": "\xff"}]}'), "cannot be read"),
        ((200, b"[" * 50_000), "cannot be read"),
        ((200, b'{"data": []}'), "is empty"),
        ((401, b'{"error": "Unauthorized"}'), "GET /v1/models answered 401"),
    ],
)
def test_simulated_odd_model_lists_are_named_and_asked_for_again(answer: tuple[int, bytes], reason: str) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.model_list = answer
        async with running_gateway(worker, health_interval=0.05) as gateway:
            assert reason in (await gateway.worker("a"))["down_reason"]
            worker.model_list = None
            await until(lambda: gateway.gateway.registry.workers[0].up)

    run(scenario())


def test_a_host_that_is_no_name_is_down_and_not_the_end_of_the_checks() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            body: dict[str, Any] = {"url": "http://a..b:1", "reports": "a..b:2", "name": "odd"}
            assert (await gateway.client.post("/admin/workers", json=body)).status_code == 201
            odd = gateway.gateway.registry.get("odd")
            await until(lambda: odd is not None and "cannot be reached" in odd.down_reason and odd.reports_error)

    run(scenario())


def test_simulated_adapters_loaded_while_a_worker_runs_are_noticed() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=0.02, models_interval=0.05) as gateway:
            inner = gateway.gateway
            parity = inner.registry.workers[0].parity
            assert (await gateway.chat("x", model="late")).status_code == 404
            worker.loras = ["late"]
            await until(lambda: "late" in inner.registry.pools)
            assert (await gateway.chat("x", model="late")).status_code == 200
            assert inner.registry.workers[0].parity == parity, "nothing else was examined again"
            worker.loras = []
            await until(lambda: "late" not in inner.registry.pools)
            worker.model_list = (500, b"")
            await until(lambda: len(worker.served("/v1/models")) > 8)
            assert (await gateway.chat("x")).status_code == 200

    run(scenario())
