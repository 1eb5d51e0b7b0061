"""The gateway's start."""

import asyncio
from typing import Any

from router.app import create_app
from router.config import load
from tests.support.simulated_worker import SimulatedWorker, run


class SlowToList(SimulatedWorker):
    """Its report port lets a router wait."""

    def _hello(self, writer: asyncio.StreamWriter, *, watch: bool) -> None:
        asyncio.get_running_loop().call_later(0.4, lambda: super(SlowToList, self)._hello(writer, watch=watch))


async def started(*specs: str) -> list[Any]:
    """Each worker as it is known when the gateway has started."""
    gateway = create_app(load({"workers": list(specs)}, {})).gateway
    await gateway.start()
    try:
        return [(worker.up, worker.synced, worker.reports_error) for worker in gateway.registry.workers]
    finally:
        await gateway.close()


def test_a_gateway_has_started_when_it_knows_the_workers_caches() -> None:
    async def scenario() -> None:
        worker = await SlowToList().start()
        worker.store("gpu", worker.hashes("warm " * 40))
        assert await started(worker.spec()) == [(True, True, "")]
        await worker.kill()

    run(scenario())


def test_a_report_port_that_cannot_be_reached_holds_nobody_up() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker(reports=False).start()
        (up, synced, error), down = await started(f"{worker.url},reports=127.0.0.1:9", "http://127.0.0.1:9")
        assert (up, synced) == (True, False)
        assert error
        assert not down[0]
        await worker.kill()

    run(scenario())
