"""Several real processes on one port, in front of simulated workers."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.config import load
from router.demo_fleet import free_port
from router.errors import ConfigError
from router.processes import Supervisor
from tests.support.simulated_worker import SimulatedWorker, chat_body, run


class Gateway:
    """A gateway of several processes, and what can be seen of it from outside."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    @property
    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    async def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Over a connection of its own, so that any process may answer."""
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as client:
            return await client.request(method, path, **arguments)

    async def every_process(self, path: str, count: int = 2) -> dict[int, Any]:
        """The answer of each process."""
        answers: dict[int, Any] = {}
        async with asyncio.timeout(20):
            while len(answers) < count:
                number = await self._numbered(path, answers)
                assert number < count
        return answers

    async def _numbered(self, path: str, answers: dict[int, Any]) -> int:
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as client:  # one connection: one process
            number = int((await client.get("/admin/workers")).json()["process"]["number"])
            answers[number] = (await client.get(path)).json()
            return number

    async def served(self) -> float:
        text = (await self.ask("GET", "/metrics")).text
        found = re.findall(r"^warmroute_router_requests_total\{.*\} (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))


@asynccontextmanager
async def gateway(tmp_path: Path, *workers: SimulatedWorker, flags: tuple[str, ...] = ()) -> AsyncIterator[Gateway]:
    port, log = free_port(), tmp_path / "gateway.log"
    command = [sys.executable, "-m", "router.cli", "serve", "--port", str(port), "--processes", "2", *flags]
    for worker, name in zip(workers, "abc", strict=False):
        command += ["--worker", worker.spec(name)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting is quick
            command, stdout=output, stderr=output, env=environment
        )
    shown = Gateway(process, port, log)
    try:
        async with asyncio.timeout(40):
            while log.read_bytes().count(b"Application startup complete") < 2:
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)
        yield shown
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 20)
        except subprocess.TimeoutExpired:
            process.kill()
        for worker in workers:
            await worker.kill()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def leftovers(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("warmroute-*"))


async def until_true(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.05)


@pytest.mark.slow
def test_processes_share_the_port_their_figures_and_what_operators_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        late = await SimulatedWorker().start()
        async with gateway(tmp_path, a, b) as shown:
            for number in range(1, 13):
                answer = await shown.ask("POST", "/v1/chat/completions", json=chat_body("x"))
                assert answer.status_code == 200
                if not number % 4:
                    assert await shown.served() == number
            gauges = (await shown.ask("GET", "/metrics")).text
            assert {'worker_up{process="0",worker="a"} 1.0', 'worker_up{process="1",worker="a"} 1.0'} == set(
                re.findall(r"^warmroute_router_(worker_up\{.*worker=\"a\"\} \S+)$", gauges, re.MULTILINE)
            )

            body = {"url": late.url, "reports": "none", "name": "late"}
            assert (await shown.ask("POST", "/admin/workers", json=body)).status_code == 201
            await shown.ask("POST", "/admin/workers/drain", json={"worker": "a"})
            await shown.ask("DELETE", "/admin/workers", params={"worker": "b"})
            await shown.ask("PATCH", "/admin/config", json={"policy": "round-robin"})
            for workers in (await shown.every_process("/admin/workers")).values():
                seen = {item["name"]: item["draining"] for item in workers["workers"]}
                assert seen == {"a": True, "late": False}
            for config in (await shown.every_process("/admin/config")).values():
                assert config["settings"]["policy"]["value"] == "round-robin"

            before = await shown.served()
            victim = shown.children[0]
            os.kill(victim, signal.SIGKILL)
            await until_true(lambda: len(shown.children) == 2 and victim not in shown.children)
            assert await shown.served() == before
            for workers in (await shown.every_process("/admin/workers")).values():
                assert {item["name"]: item["draining"] for item in workers["workers"]} == {"a": True, "late": False}
            ids = [(await shown.ask("POST", "/v1/chat/completions", json=chat_body("x"))).headers["x-request-id"]]
            found = (await shown.ask("GET", "/admin/requests", params={"id": ids[0]})).json()["requests"]
            assert [item["request_id"] for item in found] == ids
            assert await shown.served() == before + 1
        assert shown.process.returncode == 0
        assert not leftovers(tmp_path)
        await late.kill()

    run(scenario())


@pytest.mark.slow
def test_stopping_lets_requests_of_every_process_finish(tmp_path: Path) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        a.pause = 0.3
        async with gateway(tmp_path, a) as shown:
            body = chat_body("x", stream=True)
            asking = [asyncio.create_task(shown.ask("POST", "/v1/chat/completions", json=body)) for _ in range(8)]
            await until_true(lambda: len(a.served("/v1/chat/completions")) == 8)
            shown.process.terminate()
            for answer in await asyncio.gather(*asking):
                assert answer.status_code == 200
                assert answer.text.endswith("data: [DONE]\n\n")
            await asyncio.to_thread(shown.process.wait, 10)
            assert shown.process.returncode == 0

    run(scenario())


@pytest.mark.slow
def test_a_hangup_has_every_process_read_the_file_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        file = tmp_path / "router.yaml"
        file.write_text(f"workers: ['{a.spec('a')}']\nconfig_interval: 600\n")
        async with gateway(tmp_path, flags=("--config", str(file))) as shown:
            file.write_text(f"workers: ['{a.spec('a')}', '{b.spec('b')}']\nconfig_interval: 600\n")
            shown.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(10):
                while True:
                    seen = await shown.every_process("/admin/workers")
                    if all([item["name"] for item in one["workers"]] == ["a", "b"] for one in seen.values()):
                        break
            file.write_text("workers: [\n")
            shown.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(10):
                while not all(one["error"] for one in (await shown.every_process("/admin/config")).values()):
                    pass
            assert (await shown.ask("POST", "/v1/chat/completions", json=chat_body("x"))).status_code == 200
        assert shown.process.returncode == 0
        await a.kill()
        await b.kill()

    run(scenario())


@pytest.mark.slow
def test_no_process_outlives_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        async with gateway(tmp_path, a) as shown:
            children = shown.children
            assert len(children) == 2
            shown.process.kill()
            await until_true(lambda: not any(map(alive, children)))
            assert not leftovers(tmp_path)

    run(scenario())


def test_a_port_that_another_gateway_serves_is_refused() -> None:
    with_one = Supervisor(lambda *_: None, count=2, host="127.0.0.1", port=0, drain_timeout=1)
    with_one._bind_all()
    for one in (child.sockets[0] for child in with_one._children):
        one.listen()
    second = Supervisor(lambda *_: None, count=2, host="127.0.0.1", port=with_one._port, drain_timeout=1)
    with pytest.raises(ConfigError, match="in use"):
        second._bind_all()
    for child in with_one._children:
        child.sockets[0].close()


@pytest.mark.parametrize("said", ["4", 4, ["4"]])
def test_a_number_of_workers_is_answered_with_the_right_name(said: Any) -> None:
    with pytest.raises(ConfigError, match="set processes"):
        load({"workers": said}, {})


def test_processes_that_die_again_and_again_are_waited_for_ever_longer() -> None:
    supervisor = Supervisor(lambda *_: None, count=1, host="127.0.0.1", port=0, drain_timeout=1)
    child = supervisor._children[0]
    pauses = []
    for _ in range(9):
        child.started = 0.0
        supervisor._ended(child, 1, 1.0)
        pauses.append(child.due - 1.0)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    supervisor._ended(child, 1, 100.0)
    assert child.due == 100.0
