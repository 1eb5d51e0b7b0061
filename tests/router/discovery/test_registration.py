"""A worker that registers itself."""

import asyncio
import sys

import httpx

from router.config import WorkerSpec
from router.discovery.registration import Registration, _watch
from tests.support.simulated_worker import SimulatedWorker, run, running_gateway, until


def test_simulated_a_worker_keeps_its_lease_and_leaves_without_loss() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(admin_token="t") as one, running_gateway(admin_token="t") as two:
            urls = [f"http://127.0.0.1:{gateway.port}/" for gateway in (one, two)]
            spec = WorkerSpec.parse(worker.spec("self"))
            stop = asyncio.Event()
            keeping = asyncio.create_task(Registration([spec], urls, ttl=0.9, token="t").run(stop))
            for gateway in (one, two):
                registry = gateway.gateway.registry
                await until(lambda registry=registry: registry.get("self") and registry.get("self").up)
            await asyncio.sleep(1.5)
            assert one.gateway.registry.get("self") is not None
            worker.hold_head.clear()
            asking = asyncio.create_task(one.chat("x"))
            await until(lambda: worker.served("/v1/chat/completions"))
            stop.set()
            await keeping
            await until(lambda: getattr(one.gateway.registry.get("self"), "draining", True))
            worker.hold_head.set()
            assert (await asking).status_code == 200
            await until(lambda: not len(one.gateway.registry) and not len(two.gateway.registry))
        await worker.kill()

    run(scenario())


def test_simulated_a_worker_that_is_not_well_is_not_registered() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.status = 503
        async with running_gateway() as gateway, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{gateway.port}"
            gateways = [url, "http://127.0.0.1:9", "http://[::1", "http://127.0.0.1:99999", "gateway:8080"]
            registration = Registration([WorkerSpec.parse(worker.spec("self"))], gateways, ttl=5)
            assert await registration.renew(client) == 0
            worker.status = 200
            assert await registration.renew(client) == 1, "one gateway that is away does not keep it from the other"
            assert gateway.gateway.registry.get("self") is not None
            stop = asyncio.Event()
            stop.set()
            await registration.run(stop)
            await until(lambda: gateway.gateway.registry.get("self") is None)
        await worker.kill()

    run(scenario())


def test_the_end_of_the_engines_process_is_heard_once() -> None:
    """Its descriptor stays readable: a loop that goes on watching it does not sleep while the gateways are told."""

    class Counted(asyncio.Event):
        heard = 0

        def set(self) -> None:
            self.heard += 1
            super().set()

    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
        stop = Counted()
        assert _watch(process.pid, stop)
        process.kill()
        await stop.wait()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert stop.heard == 1
        await process.wait()
        assert not _watch(process.pid, stop), "it is gone"

    run(scenario())
