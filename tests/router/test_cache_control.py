"""Control of caches through the gateway, against simulated workers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kv_protocol.messages import Call, Reply, unpack
from router import cache_command, cache_control
from router.cli import app
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, chat_body, run, running_gateway, until

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


async def post(gateway: RunningGateway, operation: str, body: Any = None, **options: Any) -> dict[str, Any]:
    answer = await gateway.client.post(f"/admin/cache/{operation}", json=body, params=options)
    assert answer.status_code == 200, answer.text
    return {entry["worker"]: entry for entry in answer.json()["workers"]}


def last(worker: SimulatedWorker) -> tuple[str, dict[str, Any], list[bytes]]:
    call = worker.calls[-1]
    arguments = dict(call.arguments)
    return call.operation, arguments, unpack(arguments.pop("chunks", b""))


def test_simulated_a_prompt_is_named_to_each_worker_by_its_own_hashes() -> None:
    async def scenario() -> None:
        a, b, other = SimulatedWorker(), SimulatedWorker(), SimulatedWorker("other")
        b.chunk_size = 32
        for worker in (a, b, other):
            await worker.start()
        async with running_gateway(a, b, other) as gateway:
            entries = await post(gateway, "pin", chat_body(TEXT), seconds=60)
            assert entries.keys() == {"a", "b"}
            assert entries["a"]["result"] == {"operation": "pin"}
            assert last(a) == ("pin", {"seconds": 60.0}, a.hashes(TEXT))
            assert last(b) == ("pin", {"seconds": 60.0}, b.hashes(TEXT))
            assert not other.calls
            second = "another prompt which fills one chunk at least"
            several = {"model": "simulated", "prompt": [list(TEXT.encode()), list(second.encode())]}
            await post(gateway, "move", several, tier="disk", worker="a")
            assert last(a)[1:] == ({"tier": "disk"}, a.hashes(TEXT) + a.hashes(second))
            await post(gateway, "lookup", chat_body(TEXT, cache_salt="s"))
            assert last(a)[2] == a.hashes(TEXT, cache_salt="s")
            short = await post(gateway, "pin", chat_body("x"))
            assert "does not fill one chunk of 16" in short["a"]["error"]

    run(scenario())


def test_simulated_chunks_and_everything_go_to_all_workers() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker("other").start()
        async with running_gateway(a, b) as gateway:
            chunks = a.hashes(TEXT)
            await post(gateway, "warm", {"chunks": [chunk.hex() for chunk in chunks]}, tier="remote")
            for worker in (a, b):
                assert last(worker) == ("warm", {"tier": "remote"}, chunks)
            await post(gateway, "clear", tier="cpu")
            assert last(b) == ("clear", {"tier": "cpu"}, [])
            assert "chunks" not in b.calls[-1].arguments
            await post(gateway, "warm")
            assert last(b)[1] == {"newest": cache_control.EVERYTHING}
            await post(gateway, "warm", newest=5, worker="b")
            assert last(b)[1] == {"newest": 5}
            assert last(a)[1] == {"newest": cache_control.EVERYTHING}
            for operation in ("lookup", "pin", "move", "clear", "unpin", "warm"):
                await post(gateway, operation, tag="red")
                assert last(a) == (operation, {"tag": "red"}, [])
            for operation in ("stats", "pins", "tags", "unpin"):
                await post(gateway, operation)
                assert last(a) == (operation, {}, [])

    run(scenario())


def test_simulated_a_look_up_is_summed_up() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        chunks = a.hashes(TEXT)
        held = [["gpu", "cpu"], ["disk"], [], *[["cpu"]] * (len(chunks) - 3)]
        a.operate = lambda call: Reply(call.id, dict(zip([chunk.hex() for chunk in chunks], held, strict=True)))
        async with running_gateway(a) as gateway:
            entry = (await post(gateway, "lookup", chat_body(TEXT), ask=True))["a"]
            assert (entry["chunks"], entry["hit_chunks"]) == (len(chunks), 2)
            assert entry["held"] == {"gpu": 1, "cpu": len(chunks) - 2, "disk": 1}
            assert list(entry["result"].values()) == held

    run(scenario())


def test_simulated_workers_that_fail_are_entries_and_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_control, "DEADLINE_S", 0.5)

    async def scenario() -> None:
        good, mute, silent, dead, refusing = [await SimulatedWorker(reports=n != 1).start() for n in range(5)]
        silent.operate = lambda _: None
        refusing.operate = lambda call: Reply(call.id, error="clear: there is no tier 'disk' here")
        async with running_gateway(good, mute, silent, dead, refusing) as gateway:
            await dead.kill()
            began = asyncio.get_running_loop().time()
            entries = await post(gateway, "clear", tier="disk")
            assert asyncio.get_running_loop().time() - began < 10
            assert entries["a"]["result"] == {"operation": "clear"}
            assert entries["b"]["error"] == "it has no report port"
            assert "no answer within 0.5 s" in entries["c"]["error"]
            assert entries["d"]["error"]
            assert "no tier 'disk'" in entries["e"]["error"]
            await until(lambda: gateway.gateway.registry.workers[3].namespace is None)
            asked = await post(gateway, "lookup", chat_body(TEXT), worker="d")
            assert "not known" in asked["d"]["error"]

    run(scenario())


@pytest.mark.parametrize(
    ("operation", "body", "options", "status", "text"),
    [
        ("pin", None, {}, 400, "needs a request body"),
        ("pin", {}, {}, 400, "names neither"),
        ("clear", {}, {}, 400, "names neither"),
        ("clear", {"chunks": []}, {}, 400, "list of digests"),
        ("clear", {"chunks": ["zz"]}, {}, 400, "hexadecimal"),
        ("clear", {"chunks": ["ab"]}, {}, 400, "32 hexadecimal digits"),
        ("clear", {"chunks": [7]}, {}, 400, "hexadecimal"),
        ("clear", {"chunks": ["00" * 16], "model": "simulated"}, {}, 400, "stands alone"),
        ("clear", {"chunks": ["00" * 16] * 60_001}, {}, 400, "too many"),
        ("clear", {"model": "simulated"}, {}, 400, "messages"),
        ("clear", chat_body(TEXT, model="absent"), {}, 404, "absent"),
        ("clear", None, {"seconds": 5}, 400, "clear does not take seconds"),
        ("clear", None, {"tier": "gpu"}, 400, "tier"),
        ("clear", None, {"worker": "nobody"}, 404, "there are: a"),
        ("clear", None, {"wroker": "a"}, 400, "wroker"),
        ("stats", {"chunks": ["00" * 16]}, {}, 400, "takes no body"),
        ("warm", {"chunks": ["00" * 16]}, {"newest": 3}, 400, "not more than one"),
        ("pin", {"chunks": ["00" * 16]}, {"seconds": "nan"}, 400, "seconds"),
        ("clear", {"chunks": ["00" * 16]}, {"tag": "red"}, 400, "not more than one"),
        ("clear", None, {"tag": ""}, 400, "tag"),
        ("stats", None, {"tag": "red"}, 400, "does not take tag"),
        ("explode", None, {}, 400, "operation"),
    ],
)
def test_simulated_what_cannot_be_meant_reaches_no_worker(
    operation: str, body: Any, options: dict[str, Any], status: int, text: str
) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        async with running_gateway(a) as gateway:
            answer = await gateway.client.post(f"/admin/cache/{operation}", json=body, params=options)
            error = answer.json()["error"]
            assert (answer.status_code, text in json.dumps(error)) == (status, True), error
            assert not a.calls

    run(scenario())


def test_simulated_the_admin_token_guards_it() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        async with running_gateway(a, admin_token="t0ken") as gateway:
            assert (await gateway.client.post("/admin/cache/clear")).status_code == 401
            assert not a.calls
            headers = {"authorization": "Bearer t0ken"}
            assert (await gateway.client.post("/admin/cache/clear", headers=headers)).status_code == 200
            assert [call.operation for call in a.calls] == ["clear"]

    run(scenario())


def test_simulated_lower_tiers_count_like_any_other() -> None:
    async def scenario() -> None:
        a, b = SimulatedWorker(), SimulatedWorker()
        for worker in (a, b):
            worker.tiers |= {"disk": set(), "remote": set()}
            await worker.start()
        async with running_gateway(a, b, policy="least-ttft") as gateway:
            index, chunks = gateway.gateway.index, a.hashes(TEXT)
            b.store("cpu", chunks[:1])
            b.store("disk", chunks[1:3])
            b.store("remote", chunks)
            b.publish_digest()
            await until(lambda: index.sizes("b") == {"gpu": 0, "cpu": 1, "disk": 2, "remote": len(chunks)})
            await until(lambda: gateway.gateway.registry.workers[1].digests_checked)
            assert gateway.gateway.registry.workers[1].digest_mismatches == 0
            answer = (await gateway.client.post("/admin/explain", json=chat_body(TEXT))).json()
            held = next(item for item in answer["candidates"] if item["worker"] == "b")["hit_tokens_by_tier"]
            assert held == {"gpu": 0, "cpu": 16, "disk": 32, "remote": 16 * (len(chunks) - 3)}
            assert answer["worker"] == "b"
            assert [tier["name"] for tier in (await gateway.worker("b"))["reports"]["tiers"]] == [*a.tiers]
            assert await gateway.metric('warmroute_router_worker_chunks{tier="disk",worker="b"}') == 2
            b.clear("disk")
            await until(lambda: index.sizes("b")["disk"] == 0)

    run(scenario())


def test_a_call_that_is_answered_late_is_over() -> None:
    async def scenario() -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]
        cache_control_deadline, cache_control.DEADLINE_S = cache_control.DEADLINE_S, 0.2
        try:
            assert await cache_control.ask_worker(address, "stats", {}, "") == (None, "no answer within 0.2 s")
        finally:
            cache_control.DEADLINE_S = cache_control_deadline
            server.close()

    run(scenario())


def test_a_summary_counts_the_run_from_the_start() -> None:
    assert cache_control.summary({}) == {"chunks": 0, "hit_chunks": 0, "held": {}}
    assert cache_control.summary({"a": ["cpu"], "b": [], "c": ["cpu"]}) == {
        "chunks": 3,
        "hit_chunks": 1,
        "held": {"cpu": 2},
    }


def answer_as_a_worker(call: Call) -> Reply:
    """What a worker with a disk says."""
    if call.operation == "stats":
        counts = {"capacity_chunks": {"cpu": 100, "disk": 9000}, "failed_saves": {"disk": 3}}
        disk = {"bandwidth": 2.5e9, "serving": True, "writing": "full", "scanned": False}
        held = {"gpu": 1, "cpu": 20, "disk": 3000}
        return Reply(call.id, {"counts": counts, "held_chunks": held, "tiers": {"disk": disk}})
    if call.operation == "tags":
        return Reply(call.id, {"count": 1, "tags": {"[red]": 12}})
    if call.operation == "pins":
        pins = [
            {"chunk": "ab" * 16, "expires_in_s": 61.2, "held": True},
            {"chunk": "cd" * 16, "expires_in_s": None, "held": False},
        ]
        return Reply(call.id, {"count": 2, "pins": pins})
    if call.operation == "lookup":
        given = call.arguments["chunks"]
        digests = given if isinstance(given, list) else [chunk.hex() for chunk in unpack(given)]
        return Reply(call.id, {digest: ["cpu", "disk"] for digest in digests})
    return Reply(call.id, {"removed": 1234, "tiers": {"disk": 1234}, "queued": ["disk"]})


async def command(*arguments: str, status: int = 0) -> str:
    """What ``warmroute cache`` prints."""
    result = await asyncio.to_thread(CliRunner(env={"COLUMNS": "160"}).invoke, app, ["cache", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_simulated_the_command_asks_a_gateway_or_a_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        a.operate = b.operate = answer_as_a_worker
        file = tmp_path / "request.json"
        file.write_text(json.dumps(chat_body(TEXT)))
        async with running_gateway(a, b, admin_token="t0ken") as gateway:
            at_gateway = ["--url", f"http://127.0.0.1:{gateway.port}", "--token", "t0ken"]
            at_worker = ["--worker", f"127.0.0.1:{a.report_port}"]

            chunks = len(a.hashes(TEXT))
            shown = json.loads(await command("lookup", str(file), "--json", *at_gateway))
            assert [entry["hit_chunks"] for entry in shown["workers"]] == [chunks, chunks]
            assert [entry["held"] for entry in shown["workers"]] == [{"cpu": chunks, "disk": chunks}] * 2
            assert f"{chunks}" in await command("lookup", str(file), "--at", "b", *at_gateway)
            assert "│ cpu  │    20 │" in (await command("stats", *at_worker)).replace("┃", "│")
            told = await command("stats", *at_gateway)
            assert all(text in told for text in ("3,000", "9,000", "2,500", "takes nothing: full, not listed yet"))
            told = await command("pins", *at_worker)
            assert all(text in told for text in ("ab" * 16, "61 s", "never", "not yet"))
            told = await command("clear", "--all", "--tier", "disk", *at_gateway)
            assert "1,234" in told
            assert "disk" in told
            assert a.calls[-1].arguments == {"tier": "disk"}
            await command("lookup", "--chunk", "ab" * 16, "--ask", *at_worker)
            assert a.calls[-1].arguments == {"chunks": ["ab" * 16], "ask": True}
            await command("warm", *at_worker)
            assert a.calls[-1].arguments == {"newest": cache_control.EVERYTHING}
            await command("pin", str(file), "--for", "60", *at_gateway)
            assert a.calls[-1].arguments["seconds"] == 60
            await command("unpin", "--all", *at_gateway)
            await command("move", str(file), "--tier", "disk", *at_gateway)
            assert last(a) == ("move", {"tier": "disk"}, a.hashes(TEXT))

            assert "[red]" in await command("tags", *at_gateway)
            await command("clear", "--tag", "red", *at_gateway)
            assert a.calls[-1].arguments == {"tag": "red"}
            await command("warm", "--tag", "red", *at_worker)
            assert a.calls[-1].arguments == {"tag": "red"}

    run(scenario())


def test_simulated_the_command_asks_nobody_where_it_was_not_told_enough(tmp_path: Path) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        file = tmp_path / "request.json"
        file.write_text(json.dumps(chat_body(TEXT)))
        async with running_gateway(a, b, admin_token="t0ken") as gateway:
            at_gateway = ["--url", f"http://127.0.0.1:{gateway.port}", "--token", "t0ken"]
            at_worker = ["--worker", f"127.0.0.1:{a.report_port}"]
            assert "--all" in await command("clear", *at_gateway, status=2)
            assert "--all" in await command("clear", str(file), "--all", *at_gateway, status=2)
            assert "knows no prompts" in await command("lookup", str(file), *at_worker, status=2)
            assert "WARMROUTE_ADMIN_TOKEN" in await command("stats", *at_gateway[:2], status=2)
            assert "cannot read" in await command("pin", str(tmp_path / "absent"), *at_gateway, status=2)
            assert "not more than one" in await command("pin", str(file), "--chunk", "ab" * 16, *at_gateway, status=2)
            assert "one of them" in await command("stats", "--at", "a", *at_worker, status=2)
            assert "no gateway answers" in await command("stats", "--url", "http://127.0.0.1:9", status=2)
            assert not a.calls
            b.operate = lambda call: Reply(call.id, error="unpin: no [red]")
            assert "b: unpin: no [red]" in await command("unpin", "--all", *at_gateway, status=1)

    run(scenario())


def test_what_looks_like_markup_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report port's IPv6 address, and why a tier takes nothing."""

    class Answered(cache_command.Target):
        def ask(self, operation: str, *_: Any) -> list[dict[str, Any]]:
            answer = answer_as_a_worker(Call(1, operation, {}))
            answer.result.get("tiers", {}).get("disk", {})["writing"] = "[full]"
            return [
                {"worker": "[fd00::1]:5571", "result": answer.result},
                {"worker": "[fd00::2]:5571", "error": "[no]"},
            ]

    monkeypatch.setenv("COLUMNS", "160")
    for operation in ("stats", "pins", "tags"):
        status = cache_command.run(operation, Answered(url=""), "", [], {}, as_json=False)
        said = capsys.readouterr().out
        assert status == 1
        assert "[fd00::1]:5571 " in said
        assert "[fd00::2]:5571: [no]" in said
        assert operation != "stats" or "[full]" in said
