"""Workers that leave hand their hottest chunks over: asked by the router, and by themselves."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kv_protocol.identity import Identity
from kv_protocol.messages import Call, Hello, Reply, TierInfo
from router import drain_command, handover
from router.drain_command import Leave
from router.handover import hand_over
from tests.support.simulated_worker import SimulatedWorker, run, running_gateway, until
from tests.worker_connector.scripted_engine import CHUNK, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector.lower import TierRules
from worker_connector.operations import Operations
from worker_connector.pins import Pins
from worker_connector.report_server import ReportServer, Timing
from worker_connector.tags import Tags


class Connected:
    """The connector's scheduler half, its report port and its stores, with an engine that steps when it is asked for a token."""

    def __init__(self, *, writes: Any = "back", steps: int = 500) -> None:
        self.engine = TieredEngine(rules=(TierRules(name="remote", writes=writes),), slots=64)
        planner = self.engine.planner
        pins, tags = Pins(planner.ledger, lambda: self.engine.now), Tags(planner.ledger)
        self.operations = Operations(planner.ledger, planner.lower, pins, tags)
        hello = Hello("e", "m", CHUNK, 4, Identity("w", "bf16", "LBNHC", ()), [TierInfo("cpu", 64, 1)])
        table = self.operations.table()
        self.server = ReportServer("127.0.0.1", 0, "secret", hello, planner, table, timing=Timing(heartbeat=0.05))
        self.steps = steps
        self.woken = 0
        self._stepping = threading.Lock()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.server.address
        return host, port

    def serve(self, name: str, number: int, chunks: int) -> None:
        self.engine.serve(name, prompt(number, chunks * CHUNK + 1))
        self._step(200)

    async def wake(self) -> None:
        self.woken += 1
        await asyncio.to_thread(self._step, self.steps)

    def _step(self, most: int) -> None:
        with self._stepping:
            for _ in range(most):
                if self.operations.has_queued:
                    self.operations.run_queued()
                self.engine.step()
                if not self.operations.is_expected and not self.engine.planner.has_unfinished_transfers():
                    return

    def held(self, tier: str) -> int:
        return len(self.engine.ledger.content()[tier])


@contextmanager
def connected(**options: Any) -> Iterator[Connected]:
    made = Connected(**options)
    made.server.start()
    try:
        yield made
    finally:
        made.server.close()


@pytest.mark.parametrize("writes", ["back", "none"])
def test_a_real_scheduler_half_hands_everything_over(writes: str) -> None:
    async def scenario(worker: Connected) -> None:
        outcome = await hand_over(worker.address, worker.wake, token="secret", seconds=20)
        assert (outcome.result, outcome.tier, outcome.chunks, outcome.left) == ("done", "remote", 8, 0)
        assert str(outcome).startswith("8 of 8 chunks handed to the remote tier")
        assert worker.woken, "an engine that sleeps begins nothing by itself"
        assert (worker.held("remote"), worker.held("cpu")) == (8, 8)
        again = await hand_over(worker.address, worker.wake, token="secret", seconds=20)
        assert (again.result, again.chunks) == ("done", 0)

    with connected(writes=writes) as worker:
        worker.serve("a", 1, 5)
        worker.serve("b", 2, 3)
        assert worker.held("remote") == 0
        run(scenario(worker))


def test_what_the_store_refuses_is_tried_again_until_the_deadline() -> None:
    async def scenario(worker: Connected) -> None:
        worker.engine.fail = lambda *_: "full"
        outcome = await hand_over(worker.address, worker.wake, token="secret", seconds=1.5)
        assert outcome.result == "late"
        assert (outcome.chunks, worker.held("remote")) == (4, 0)
        assert "1.5 s" in outcome.why
        worker.engine.fail = lambda *_: ""
        worker.engine.now += 5  # the store's pause is over
        outcome = await hand_over(worker.address, worker.wake, token="secret", seconds=20)
        assert (outcome.result, worker.held("remote")) == ("done", 4)

    with connected() as worker:
        worker.serve("a", 1, 4)
        run(scenario(worker))


def test_a_worker_that_cannot_hand_over_says_why() -> None:
    async def scenario() -> None:
        async def nothing() -> None:
            pass

        worker = await SimulatedWorker().start()
        address = ("127.0.0.1", worker.report_port)
        worker.operate = lambda call: Reply(call.id, error="there is no lower tier here")
        outcome = await hand_over(address, nothing, seconds=5)
        assert (outcome.result, outcome.why) == ("impossible", "there is no lower tier here")
        await worker.kill()
        outcome = await hand_over(address, nothing, seconds=5)
        assert outcome.result == "impossible"

    run(scenario())


class Flushing:
    """Answers ``flush`` and ``stats`` as a worker does that writes at once when a request wakes it."""

    def __init__(self, worker: SimulatedWorker, chunks: int) -> None:
        self.worker = worker
        self.lacking = chunks
        self.asked = 0
        worker.operate = self

    def __call__(self, call: Call) -> Reply:
        woken = bool(self.worker.served("/v1/completions"))
        if call.operation == "flush":
            self.asked += 1
            answer = {"tier": "remote", "chunks": self.lacking, "queued": ["remote"]}
            return Reply(call.id, answer)
        self.lacking = 0 if woken else self.lacking
        return Reply(call.id, {"tiers": {"remote": {"unwritten": self.lacking}}, "queued": int(not woken)})


@pytest.mark.parametrize("answer", [{}, [], {"chunks": 3, "tier": "remote"}, {"chunks": "many", "tier": "remote"}])
def test_an_answer_that_cannot_be_understood_ends_the_handover_and_nothing_else(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call(*_: object) -> Any:
        return answer

    async def wake() -> None:
        pass

    monkeypatch.setattr(handover, "call", call)
    outcome = asyncio.run(hand_over(("127.0.0.1", 1), wake, seconds=5))
    assert outcome.result in ("impossible", "late")
    assert "its answer cannot be understood" in str(outcome)


def test_a_router_has_drained_workers_hand_over() -> None:
    async def scenario() -> None:
        worker, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        flushing, spared = Flushing(worker, 7), Flushing(other, 7)
        async with running_gateway(worker, other, drain_handover=20) as running:
            await running.client.post("/admin/workers/drain", json={"worker": "a"})
            await until(lambda: flushing.lacking == 0, 15)
            done = 'warmroute_router_handovers_total{result="done"}'
            async with asyncio.timeout(15):
                while await running.metric(done) != 1:  # noqa: ASYNC110 - as a scrape sees it
                    await asyncio.sleep(0.02)
            assert (flushing.asked, spared.asked) == (2, 0)
            await running.client.post("/admin/workers/drain", json={"worker": "a", "drain": False})
            assert not running.gateway.registry.find("a").departing  # type: ignore[union-attr]

    run(scenario())


def test_without_the_setting_nobody_is_asked() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        flushing = Flushing(worker, 7)
        async with running_gateway(worker) as running:
            await running.client.post("/admin/workers/drain", json={"worker": "a"})
            assert (await running.worker("a"))["draining"]
            await asyncio.sleep(0.1)
            assert not flushing.asked

    run(scenario())


def test_the_hook_tells_routers_hands_over_and_waits_for_requests(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        flushing = Flushing(worker, 5)
        async with running_gateway(worker) as running:
            router = f"http://127.0.0.1:{running.port}"
            leave = Leave(worker.url, ("127.0.0.1", worker.report_port), "a", routers=[router], seconds=20, settle=0.1)
            assert await drain_command.drain(leave) == 0
            assert (await running.worker("a"))["draining"]
            assert flushing.lacking == 0
            wrong = Leave(worker.url, None, "nobody", routers=[router], seconds=5, settle=0.0)
            assert await drain_command.drain(wrong) == 1

    run(scenario())
    said = capsys.readouterr().err
    assert "5 of 5 chunks handed to the remote tier" in said
    assert "could not be told to send nothing more: it answered 404" in said
    assert "no report port is named" in said


@pytest.mark.parametrize("router", ["http://127.0.0.1:99999", "http://[::1", "router:8080"])
def test_a_router_that_cannot_be_ends_no_hook(router: str, capsys: pytest.CaptureFixture[str]) -> None:
    leave = Leave(router, None, "a", routers=[router], seconds=2, settle=0.0)
    assert asyncio.run(drain_command.drain(leave)) == 1
    assert f"{router} could not be told to send nothing more" in capsys.readouterr().err


def test_the_hook_does_not_wait_beyond_its_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.silent = True  # no heartbeat says that nothing runs
        Flushing(worker, 0)
        leave = Leave(worker.url, ("127.0.0.1", worker.report_port), seconds=1.0, settle=0.0)
        assert await drain_command.drain(leave) == 1
        await worker.kill()

    run(scenario())
    assert "requests are still running" in capsys.readouterr().err


def test_a_failure_without_words_is_named_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refused(*_: Any) -> Any:
        raise ConnectionResetError

    async def scenario() -> None:
        opened: list[asyncio.StreamWriter] = []
        mute = await asyncio.start_server(lambda _, writer: opened.append(writer), "127.0.0.1", 0)
        port = mute.sockets[0].getsockname()[1]
        leave = Leave(f"http://127.0.0.1:{port}", ("127.0.0.1", 1), settle=0.0)
        await drain_command._wake(leave)
        assert await drain_command._wait_idle(leave, asyncio.get_running_loop().time() + 5)
        for writer in opened:
            writer.close()
            await writer.wait_closed()
        mute.close()
        await mute.wait_closed()

    monkeypatch.setattr(drain_command, "CALL_S", 0.05)
    monkeypatch.setattr(drain_command, "connect", refused)
    run(scenario())
    said = capsys.readouterr().err
    assert "to wake it: ReadTimeout" in said
    assert "cannot be known: ConnectionResetError" in said
