"""Restarts every router and every worker, one after the other, under load: what is lost, and what becomes of the hit rate.

    python -m benchmarks.rolling_restart [--clients 8] [--rounds 2] [--json benchmarks/results/rolling_restart.json]

Real routers, a process each, watch a fake Kubernetes API for their workers, and stand behind a plain TCP balancer that
probes ``/ready``. Simulated workers (benchmarks/simulated_worker.py) write back to a tier that they share. A worker leaves
as a pod does: it is marked as terminating, its preStop hook (``warmroute drain``) runs, it is killed, its pod is deleted,
and another pod with an empty cache comes. Clients talk in conversations that grow, half of them streaming, over
connections that are kept, and never repeat a request. A request that is not answered in full is lost.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated_worker import CachingWorker
from router import drain_command
from router.demo_fleet import free_port
from tests.support.fake_kubernetes import FakeKubernetes
from tests.support.tcp_balancer import TcpBalancer
from worker_connector.report_server import Timing

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 64
TURNS = 16
"""Turns after which a conversation ends and another begins."""
AT_ONCE = 5
"""Conversations that each client goes on with, in no order."""
SYSTEM = "You are an assistant of the support desk, and answer with patience. " * 12
PATIENT_S = 60.0


@dataclass
class Answered:
    """One request: when it ended, its phase, its prompt tokens and those of them that were not computed."""

    at: float
    phase: str
    prompt: int
    cached: int


@dataclass
class Tally:
    """What clients saw."""

    answered: list[Answered] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def windows(self, size: int, *phases: str) -> list[float]:
        """Hit rates of ``size`` requests each, in the order they ended."""
        items = [item for item in self.answered if item.phase in phases]
        parts = [items[at : at + size] for at in range(0, len(items) - size + 1, size)]
        return [hit_rate(part) for part in parts]


def hit_rate(items: list[Answered]) -> float:
    return sum(item.cached for item in items) / max(1, sum(item.prompt for item in items))


class Clients:
    """Conversations through the balancer."""

    def __init__(self, port: int, count: int, seed: int = 3) -> None:
        self.tally = Tally()
        self.phase = "warming"
        self._url = f"http://127.0.0.1:{port}"
        self._rng = random.Random(seed)
        self._tasks = [asyncio.create_task(self._talk(number)) for number in range(count)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _talk(self, number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=1, keepalive_expiry=600)
        async with httpx.AsyncClient(base_url=self._url, timeout=30, limits=limits) as client:
            held = [self._begin(self._rng.randrange(TURNS)) for _ in range(AT_ONCE)]
            while True:
                at = self._rng.randrange(AT_ONCE)
                if len(held[at]) > 2 * TURNS:
                    held[at] = self._begin()
                held[at].append({"role": "user", "content": "Tell me more about this order. " * 8})
                text = await self._ask(client, held[at], stream=number % 2 == 0)
                held[at].append({"role": "assistant", "content": text})
                await asyncio.sleep(0.01)

    def _begin(self, turns: int = 0) -> list[dict[str, str]]:
        """A conversation, some turns of which were had elsewhere."""
        messages = [{"role": "system", "content": f"{SYSTEM} Case {self._rng.randrange(1 << 30)}."}]
        for _ in range(turns):
            messages.append({"role": "user", "content": "Tell me more about this order. " * 8})
            messages.append({"role": "assistant", "content": "word " * 4})
        return messages

    async def _ask(self, client: httpx.AsyncClient, messages: list[dict[str, str]], *, stream: bool) -> str:
        body: dict[str, Any] = {"model": "simulated", "messages": messages, "stream": stream}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        phase = self.phase
        try:
            answer = await client.post("/v1/chat/completions", json=body)
            text, usage = (_of_stream if stream else _of_whole)(answer)
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            self.tally.lost.append(f"{phase}: {type(error).__name__}: {error}")
            return ""
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.tally.answered.append(Answered(time.monotonic(), phase, usage["prompt_tokens"], cached))
        return text


def _of_whole(answer: httpx.Response) -> tuple[str, Any]:
    body = answer.raise_for_status().json()
    return body["choices"][0]["message"]["content"], body["usage"]


def _of_stream(answer: httpx.Response) -> tuple[str, Any]:
    lines = [line for line in answer.raise_for_status().text.split("\n") if line.startswith("data: ")]
    if lines[-1] != "data: [DONE]":
        raise ValueError(f"the stream ended with {lines[-1][:200]!r}")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    return text, next(event["usage"] for event in events if event.get("usage"))


class Router:
    """A router process."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self.port = free_port()
        self._kubeconfig = kubeconfig
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        flags = {
            "host": "127.0.0.1",
            "port": self.port,
            "kubernetes-selector": "app=vllm",
            "kubernetes-port": "http",
            "kubernetes-report-port": "reports",
            "health-interval": 0.5,
            "report-heartbeat": 1.0,
            "drain-delay": 0.5,
            "drain-idle": 0.5,
        }
        command = [
            "-m",
            "router.cli",
            "serve",
            *(part for key, value in flags.items() for part in (f"--{key}", str(value))),
        ]
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("WARMROUTE_", "KUBERNETES_"))}
        environ |= {"KUBECONFIG": str(self._kubeconfig), "PYTHONPATH": str(ROOT)}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *command, env=environ, stdout=log, stderr=log
            )

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(PATIENT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def knows(self, name: str) -> bool:
        """Whether it uses a worker and knows its cache."""
        async with httpx.AsyncClient(timeout=5) as client:
            with suppress(httpx.HTTPError):
                answer = await client.get(f"http://127.0.0.1:{self.port}/admin/workers")
                workers = {worker["name"]: worker for worker in answer.json()["workers"]}
                return name in workers and workers[name]["reports"]["synced"] and workers[name]["healthy"]
        return False


class Cluster:
    """Routers, workers, the API that names them, and the balancer before them."""

    def __init__(self, directory: Path, workers: int, routers: int) -> None:
        self.api = FakeKubernetes()
        self.balancer = TcpBalancer()
        self.workers: dict[str, CachingWorker] = {}
        self.shared: set[bytes] = set()
        self.routers: list[Router] = []
        self._directory = directory
        self._sizes = workers, routers
        self._count = 0

    async def start(self) -> None:
        workers, routers = self._sizes
        await self.api.start()
        kubeconfig = self.api.kubeconfig(self._directory / "config")
        for _ in range(workers):
            await self.add_worker()
        self.routers = [Router(kubeconfig, self._directory / f"router-{number}.log") for number in range(routers)]
        await self.balancer.start()
        self.balancer.set(*(router.port for router in self.routers))
        await asyncio.gather(*(router.start() for router in self.routers))
        await self.until(lambda: len(self.balancer.ready) == routers)

    async def close(self) -> None:
        await asyncio.gather(*(router.stop() for router in self.routers))
        await self.balancer.close()
        await asyncio.gather(*(worker.kill() for worker in self.workers.values()))
        await self.api.stop()

    async def add_worker(self) -> str:
        name = f"vllm-{self._count}"
        self._count += 1
        timing = Timing(heartbeat=0.25)
        worker = CachingWorker(chunk_size=CHUNK, prefill=40_000, decode=0.002, report_timing=timing, shared=self.shared)
        self.workers[name] = await worker.start()
        self.api.add(name, ports={"http": worker.port, "reports": worker.report_port})
        return name

    async def restart_router(self, router: Router) -> float:
        """As a rolling update does it; the seconds until it was ready again."""
        began = time.monotonic()
        await router.stop()
        await self.until(lambda: router.port not in self.balancer.ready)
        await router.start()
        await self.until(lambda: router.port in self.balancer.ready)
        return time.monotonic() - began

    async def restart_worker(self, name: str, *, hook: bool = True) -> int:
        """As a rolling update does it, with or without the hook; its exit status."""
        worker = self.workers[name]
        self.api.terminate(name)
        leave = drain_command.Leave(worker.url, ("127.0.0.1", worker.report_port), name, seconds=20, settle=0.5)
        status = await drain_command.drain(leave) if hook else await asyncio.sleep(0.5, 0)
        await worker.kill()
        del self.workers[name]
        self.api.delete(name)
        fresh = await self.add_worker()
        await self.known(fresh)
        return status

    async def known(self, name: str) -> None:
        """Until every router knows a worker and its cache."""
        async with asyncio.timeout(PATIENT_S):
            for router in self.routers:
                while not await router.knows(name):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENT_S):
            while not condition():  # noqa: ASYNC110 - plain state, nobody signals it
                await asyncio.sleep(0.02)


@asynccontextmanager
async def cluster(directory: Path, workers: int = 4, routers: int = 2) -> AsyncIterator[Cluster]:
    made = Cluster(directory, workers, routers)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def roll(
    made: Cluster, clients: Clients, *, requests: int = 300, rounds: int = 1, hook: bool = True
) -> dict[str, Any]:
    """Warm up, measure, restart everything, and say what that did. Hit rates are of ``window`` requests each."""
    tally = clients.tally
    await made.until(lambda: len(tally.answered) >= requests)
    clients.phase = "before"
    await made.until(lambda: sum(item.phase == "before" for item in tally.answered) >= requests)
    clients.phase = "routers"
    ready = [await made.restart_router(router) for _ in range(rounds) for router in made.routers]
    clients.phase = "workers"
    statuses = [await made.restart_worker(name, hook=hook) for _ in range(rounds) for name in list(made.workers)]
    clients.phase = "after"
    end = len(tally.answered) + requests // 3
    await made.until(lambda: len(tally.answered) >= end)
    await clients.stop()
    return _summary(tally, max(120, requests // 4)) | {
        "router_seconds": [round(item, 2) for item in ready],
        "drain_statuses": statuses,
        "shared_chunks": len(made.shared),
    }


def _summary(tally: Tally, window: int) -> dict[str, Any]:
    before = hit_rate([item for item in tally.answered if item.phase == "before"])
    during = tally.windows(window, "routers", "workers", "after")
    return {
        "requests": len(tally.answered),
        "lost": len(tally.lost),
        "why": tally.lost[:5],
        "window": window,
        "windows": len(during),
        "before": round(before, 4),
        "during": round(statistics.mean(during), 4) if during else 0.0,
        "worst_window": round(min(during), 4) if during else 0.0,
        "kept": round(min(during) / before, 4) if during and before else 0.0,
        "routers": [round(rate, 3) for rate in tally.windows(window, "routers")],
        "workers": [round(rate, 3) for rate in tally.windows(window, "workers")],
    }


async def measure(arguments: argparse.Namespace, *, hook: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        async with cluster(Path(directory), arguments.workers, arguments.routers) as made:
            clients = Clients(made.balancer.port, arguments.clients)
            return await roll(made, clients, requests=arguments.requests, rounds=arguments.rounds, hook=hook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=900, help="measured before the restarts begin")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is restarted")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {
        "with_handover": asyncio.run(measure(arguments, hook=True)),
        "without": asyncio.run(measure(arguments, hook=False)),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
