"""A hundred pods coming, going and failing under a gateway that watches a fake API server, with requests throughout."""

import asyncio
import random
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.discovery.names import NOT_READY
from tests.support.fake_kubernetes import FakeKubernetes, fake_kubernetes
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until

PODS = 100
EVENTS = 36
PATIENT = 25.0


class Fleet:
    """Simulated workers as pods of a fake API server, and what a gateway should make of them."""

    def __init__(self, server: FakeKubernetes) -> None:
        self.server = server
        self.workers: dict[str, SimulatedWorker] = {}
        self.usable: set[str] = set()
        self.held: set[str] = set()
        self.rng = random.Random(5)
        self._count = 0

    async def add(self) -> None:
        name = f"vllm-{self._count}"
        self._count += 1
        worker = self.workers[name] = await SimulatedWorker(heartbeat=0.5).start()
        self.server.add(name, ports={"http": worker.port, "reports": worker.report_port})
        self.usable.add(name)

    def pick(self) -> str:
        return self.rng.choice(sorted(self.usable))

    def lose_readiness(self) -> None:
        name = self.pick()
        self.server.ready(name, ready=False)
        self.usable.remove(name)
        self.held.add(name)

    def regain_readiness(self) -> None:
        waiting = [name for name in sorted(self.held) if not self.is_terminating(name)]
        for name in waiting[:1]:
            self.server.ready(name, ready=True)
            self.held.remove(name)
            self.usable.add(name)

    def is_terminating(self, name: str) -> bool:
        return "deletionTimestamp" in self.server.pods[name]["metadata"]

    def terminate(self) -> str:
        name = self.pick()
        self.server.terminate(name)
        self.usable.remove(name)
        self.held.add(name)
        return name

    def delete(self) -> str:
        leaving = [name for name in sorted(self.held) if self.is_terminating(name)]
        name = leaving[0] if leaving else self.terminate()
        self.server.delete(name)
        self.held.remove(name)
        return name

    async def close(self) -> None:
        await asyncio.gather(*(worker.kill() for worker in self.workers.values()))


class Load:
    """Clients that ask all the time; what they were answered by, and when it was lost."""

    def __init__(self, running: RunningGateway) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._running = running
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(4)]

    async def _ask(self, number: int) -> None:
        turn = 0
        while True:
            turn += 1
            try:
                answer = await self._running.chat(f"client {number}, turn {turn}. " * 4)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            self.answered += answer.status_code == 200
            if answer.status_code != 200:
                self.failed.append(answer.text)
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[Any]:
    """A fleet, and a gateway that looks for it."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with fake_kubernetes() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
        fleet = Fleet(server)
        pods = {"kubernetes_selector": "app=vllm", "kubernetes_port": "http", "kubernetes_report_port": "reports"}
        try:
            async with running_gateway(
                **{"health_interval": 1.0, "report_heartbeat": 5.0, "policy": "random", **pods, **settings}
            ) as running:
                yield fleet, running
        finally:
            await fleet.close()


def converged(fleet: Fleet, running: RunningGateway) -> bool:
    """Whether the gateway uses and holds exactly the pods it should; others may still be finishing."""
    known = {worker.name: worker for worker in running.gateway.registry.workers}
    used = {name for name, worker in known.items() if not worker.draining}
    return used == fleet.usable and all(name in known and known[name].held for name in fleet.held)


async def settled(fleet: Fleet, running: RunningGateway) -> float:
    """Wait until the gateway's workers are what they should be; the seconds that took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await until(lambda: converged(fleet, running), PATIENT)
    return loop.time() - began


async def disturb(fleet: Fleet) -> None:
    """Something goes wrong between gateway and API."""
    server = fleet.server
    match fleet.rng.choice(["cut", "expire", "expire by status", "away", "trouble"]):
        case "cut":
            server.cut()
        case "expire" | "expire by status" as how:
            server.gone_by_status = how == "expire by status"
            await server.stop()
            fleet.terminate()
            server.compact()
            await server.start()
        case "away":
            await server.stop()
            await asyncio.sleep(0.2)
            await server.start()
        case "trouble":
            server.fail_with = 503
            server.cut()
            await asyncio.sleep(0.3)
            server.fail_with = 0


def test_a_hundred_pods_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker set follows every event, and no request goes to a pod that terminates."""
    seconds: list[float] = []

    async def scenario() -> None:
        async with served(tmp_path, monkeypatch) as (fleet, running):
            await asyncio.gather(*(fleet.add() for _ in range(PODS)))
            await settled(fleet, running)
            registry = running.gateway.registry
            await until(lambda: all(worker.up for worker in registry.workers), PATIENT)
            load = Load(running)
            asked: dict[str, int] = {}
            for number in range(EVENTS):
                if number % 6 == 5:
                    await disturb(fleet)
                await _one_event(fleet)
                seconds.append(await settled(fleet, running))
                asked |= {
                    name: len(fleet.workers[name].served("/v1/chat/completions")) for name in fleet.held - asked.keys()
                }
                for name in fleet.usable & asked.keys():
                    del asked[name]
            await load.stop()
            later = {name: len(fleet.workers[name].served("/v1/chat/completions")) for name in asked}
            assert later == asked, "a request went to a pod that is not ready, or terminates"
            assert load.answered > EVENTS
            assert not load.failed, load.failed[:3]
            await until(lambda: running.gateway.control.describe_names()[0]["error"] == "", PATIENT)

    asyncio.run(asyncio.wait_for(scenario(), 240))
    print(f"converged in {statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s")
    assert statistics.quantiles(seconds, n=10)[-2] < 5.0  # on a machine that does other work


async def _one_event(fleet: Fleet) -> None:
    match fleet.rng.choice(["come", "go", "terminate", "fail", "recover"]):
        case "come":
            await fleet.add()
        case "go":
            fleet.delete()
        case "terminate":
            fleet.terminate()
        case "fail":
            fleet.lose_readiness()
        case _:
            fleet.regain_readiness()


def test_a_stream_of_a_terminating_pod_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with served(tmp_path, monkeypatch, drain_timeout=0.1) as (fleet, running):
            await fleet.add()
            await settled(fleet, running)
            worker = fleet.workers["vllm-0"]
            await until(lambda: running.gateway.registry.workers[0].up, PATIENT)
            worker.words, worker.pause = 10, 0.1
            asking = asyncio.create_task(running.chat("a long answer", stream=True))
            await until(lambda: worker.served("/v1/chat/completions"), PATIENT)
            fleet.terminate()
            await settled(fleet, running)
            refused = await running.chat("another")
            assert refused.status_code == 503
            answer = await asking
            assert answer.text.endswith("data: [DONE]\n\n")
            assert len(worker.served("/v1/chat/completions")) == 1

    run(scenario())


def test_a_pod_that_is_not_ready_keeps_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with served(tmp_path, monkeypatch) as (fleet, running):
            await fleet.add()
            await settled(fleet, running)
            worker = fleet.workers["vllm-0"]
            chunks = worker.hashes("warm " * 40)
            worker.store("gpu", chunks)
            index = running.gateway.index
            await until(lambda: index.sizes("vllm-0").get("gpu") == len(chunks), PATIENT)
            fleet.lose_readiness()
            await settled(fleet, running)
            assert index.sizes("vllm-0").get("gpu") == len(chunks)
            assert (await running.worker("vllm-0"))["held"] == NOT_READY
            fleet.regain_readiness()
            await settled(fleet, running)
            assert index.sizes("vllm-0").get("gpu") == len(chunks)

    run(scenario())


def test_a_pod_at_anothers_address_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with served(tmp_path, monkeypatch) as (fleet, running):
            await fleet.add()
            await settled(fleet, running)
            first = running.gateway.registry.workers[0]
            pod = fleet.server.pods["vllm-0"]
            fleet.server.delete("vllm-0")
            fleet.server.add(
                "vllm-0", ports={port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            )
            await until(lambda: [w for w in running.gateway.registry.workers if w is not first], PATIENT)
            assert first not in running.gateway.registry.workers
            await until(lambda: running.gateway.registry.workers[0].synced, PATIENT)

    run(scenario())


def test_discovery_shows_in_metrics_and_they_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()

    async def scenario() -> None:
        async with served(tmp_path, monkeypatch) as (fleet, running):
            await fleet.add()
            await fleet.add()
            await settled(fleet, running)
            fleet.lose_readiness()
            await settled(fleet, running)
            source = 'source="k8s:///app=vllm"'
            assert await running.metric(f"warmroute_router_discovery_up{{{source}}}") == 1
            assert await running.metric(f'warmroute_router_discovery_workers{{{source},state="usable"}}') == 1
            assert await running.metric(f'warmroute_router_discovery_workers{{{source},state="held"}}') == 1
            assert await running.metric(f'warmroute_router_discovery_relists_total{{cause="start",{source}}}') == 1
            text = (await running.client.get("/metrics")).text
            names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE warmroute_router_disc")}
            assert len(names) == 4
            assert all(f"`{name}`" in page for name in names)

    run(scenario())


@pytest.mark.parametrize("change", [{"kubernetes_report_port": "none"}, {"kubernetes_selector": "app=vllm,app=vllm"}])
def test_pods_stay_until_those_looked_for_instead_are_known(
    change: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of what is looked for, while the API cannot be asked, takes no worker away."""

    async def scenario() -> None:
        async with served(tmp_path, monkeypatch) as (fleet, running):
            await fleet.add()
            await settled(fleet, running)
            registry, control = running.gateway.registry, running.gateway.control
            await until(lambda: registry.workers[0].up, PATIENT)
            fleet.server.fail_with = 503
            fleet.server.cut()
            assert (await running.client.patch("/admin/config", json=change)).status_code == 200
            await until(lambda: "503" in control.describe_names()[0]["error"], PATIENT)
            assert (await running.chat("x")).status_code == 200
            assert not registry.workers[0].draining
            fleet.server.fail_with = 0
            await until(lambda: control.describe_names()[0]["error"] == "", PATIENT)
            (origin,) = (await running.worker("vllm-0"))["named_by"]
            assert origin == control.describe_names()[0]["name"]
            assert (await running.client.patch("/admin/config", json={"kubernetes_selector": ""})).status_code == 200
            await until(lambda: not registry.workers, PATIENT)

    run(scenario())
