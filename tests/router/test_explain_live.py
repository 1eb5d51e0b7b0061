"""What a worker is asked itself about a chunk that a hit lacked."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from kv_protocol.messages import Call, Reply
from router import explain_command
from router.explain_live import judge, look
from tests.support.simulated_worker import SimulatedWorker, chat_body, run, running_gateway, until

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"
OPEN = {"tiers": {"remote": {"serving": False, "breaker": "open"}}}
FULL = {"tiers": {"disk": {"serving": True, "writing": "full"}}}
UNLISTED = {"tiers": {"disk": {"scanned": False}, "remote": {}}}
LOST = {"counts": {"evictions": {"cpu": 1200}, "damaged_chunks": {"disk": 1}, "failed_loads": {"remote": 0}}}


@pytest.mark.parametrize(
    ("tiers", "stats", "cause", "text"),
    [
        (["gpu", "disk"], {}, "held", "it is in gpu: it came since"),
        (["disk", "remote"], OPEN, "held_below", "it is in disk, and would be fetched"),
        (
            ["remote"],
            OPEN,
            "tier_failure",
            "it is in remote, which does not serve (remote: its circuit breaker is open)",
        ),
        ([], OPEN, "tier_failure", "it may be in a tier that does not serve"),
        ([], UNLISTED, "not_listed", "disk is still being listed"),
        ([], FULL, "tier_failure", "disk takes nothing (full)"),
        (["disk"], FULL, "held_below", "it is in disk"),
        ([], LOST, "absent", "1,200 evicted (cpu), 1 found damaged (disk)"),
        ([], {}, "absent", "it is in no tier"),
    ],
)
def test_the_likeliest_cause_is_named(tiers: list[str], stats: dict[str, Any], cause: str, text: str) -> None:
    found = judge(tiers, stats)
    assert (found["cause"], found["tiers"]) == (cause, tiers)
    assert text in found["why"]


@pytest.mark.parametrize("answer", [None, 5, {}, {"ab": 1}, {"ab" * 16: 3}])
def test_simulated_an_answer_that_makes_no_sense_is_said_to(answer: Any) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        a.operate = lambda call: Reply(call.id, answer)
        found = await look(("127.0.0.1", a.report_port), b"\xab" * 16, "")
        assert found["cause"] == "unreachable"
        await a.kill()

    run(scenario())


def test_simulated_the_worker_is_asked_only_where_that_is_wished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        a, dead = await SimulatedWorker().start(), await SimulatedWorker().start()

        def answer(call: Call) -> Reply:
            found = {bytes(call.arguments.get("chunks", b"")).hex(): ["remote"]}
            return Reply(call.id, found if call.operation == "lookup" else {"tiers": {}})

        a.operate = answer
        async with running_gateway(a, dead) as gateway:
            assert "live" not in (await gateway.client.post("/admin/explain", json=chat_body(TEXT))).json()["ends"][0]
            assert not a.calls
            await dead.kill()
            params = {"live": "true"}
            ends = (await gateway.client.post("/admin/explain", json=chat_body(TEXT), params=params)).json()["ends"]
            live = {end["worker"]: end.get("live") for end in ends}
            assert live["a"]["cause"] == "held_below"
            assert live.get("b") is None or live["b"]["cause"] == "unreachable"
            assert a.calls[0].arguments == {"chunks": a.hashes(TEXT)[0], "ask": True}
            request_id = (await gateway.chat(TEXT)).headers["x-request-id"]
            file = tmp_path / "request.json"
            file.write_text(json.dumps(chat_body(TEXT)))
            url = f"http://127.0.0.1:{gateway.port}"
            for what in (str(file), request_id):
                options: dict[str, Any] = {"url": url, "token": "", "endpoint": "", "as_json": False, "live": True}
                assert await asyncio.to_thread(explain_command.run, what, **options) == 0
                assert "it is in remote" in " ".join(capsys.readouterr().out.replace("│", " ").split())

    run(scenario())


def test_simulated_the_same_tokens_under_other_names_are_told() -> None:
    async def scenario() -> None:
        a, other, coarse = SimulatedWorker(), SimulatedWorker("other"), SimulatedWorker()
        coarse.chunk_size = 32
        for worker in (a, other, coarse):
            await worker.start()
        async with running_gateway(a, other, coarse) as gateway:
            index = gateway.gateway.index

            async def why() -> str:
                ends = (await gateway.client.post("/admin/explain", json=chat_body(TEXT))).json()["ends"]
                return next(f"{end['cause']}: {end['why']}" for end in ends if end["worker"] == "a")

            assert "never_stored" in await why()
            other.store("cpu", other.hashes(TEXT))
            await until(lambda: index.sizes("b")["cpu"])
            assert "other_root" in (told := await why())
            assert "by b for model 'other', not 'simulated'" in told
            other.clear("cpu")
            coarse.store("gpu", coarse.hashes(TEXT))
            await until(lambda: index.sizes("c")["gpu"] and not index.sizes("b")["cpu"])
            assert "in chunks of 32, not 16" in await why()

    run(scenario())
