"""Why a hit ended, for requests to come and for requests that were."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.hashing import HASH_BYTES
from router import explain_command, history
from router.explain_command import ExplainError
from router.history import History
from tests.support.simulated_worker import (
    CHUNK,
    RunningGateway,
    SimulatedWorker,
    chat_body,
    run,
    running_gateway,
    until,
)

TEXT = "The quick brown fox jumps over the lazy dog. " * 4


async def ends(gateway: RunningGateway, **members: Any) -> dict[str, Any]:
    answer = await gateway.client.post("/admin/explain", json={**chat_body(TEXT), **members})
    assert answer.status_code == 200, answer.text
    return {end["worker"]: end for end in answer.json()["ends"]}


def test_simulated_what_workers_hold_is_asked_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(20)]
        async with running_gateway(*workers) as gateway:
            index, chunks = gateway.gateway.index, workers[0].hashes(TEXT)
            for worker in workers[:18]:
                worker.store("gpu", chunks[:1])
            await until(lambda: len(index) and all(index.sizes(name)["gpu"] for name in list("abcdefghijklmnopqr")))
            asked = list[str]()
            tiers = index.tiers

            def counted(name: str, hashes: Sequence[bytes]) -> dict[str, int]:
                asked.append(name)
                return tiers(name, hashes)

            monkeypatch.setattr(index, "tiers", counted)
            seen = await ends(gateway)
            assert len(asked) <= 3 * len(workers)  # for the candidates, and for two chunks that are missing
            assert seen["s"]["cause"] == "elsewhere"
            assert seen["s"]["held_now_by"] == {name: ["gpu"] for name in "abcdefghijklmnop"}
            assert seen["s"]["more_holders"] == 2
            assert "at a, b, c, d and 14 more, not at s" in seen["s"]["why"]

    run(scenario())


async def end_of(gateway: RunningGateway, request_id: str) -> dict[str, Any]:
    return dict((await gateway.get("/admin/explain", id=request_id))["end"])


def test_simulated_each_reason_for_a_hits_end() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a, b) as gateway:
            index, chunks = gateway.gateway.index, a.hashes(TEXT)
            seen = await ends(gateway)
            assert seen["a"]["cause"] == "never_stored"
            assert (seen["a"]["held_chunks"], seen["a"]["chunks"]) == (0, len(chunks))

            a.store("gpu", chunks[:4])
            a.store("cpu", chunks[:4])
            await until(lambda: index.sizes("a")["cpu"] == 4)
            seen = await ends(gateway)
            assert (seen["a"]["held_chunks"], seen["a"]["first_missing"]) == (4, chunks[4].hex())
            assert seen["b"]["cause"] == "elsewhere"
            assert seen["b"]["held_now_by"] == {"a": ["gpu"]}

            a.remove("gpu", chunks[2:4])
            a.remove("cpu", chunks[2:4])
            await until(lambda: index.sizes("a")["cpu"] == 2)
            seen = await ends(gateway)
            assert (seen["a"]["cause"], seen["a"]["tier"], seen["a"]["held_chunks"]) == ("evicted", "cpu", 2)
            assert "gave it up" in seen["a"]["why"]

            b.store("gpu", chunks)
            await until(lambda: index.sizes("b")["gpu"] == len(chunks))
            assert (await ends(gateway))["b"]["cause"] == "complete"
            b.clear("gpu")
            await until(lambda: index.sizes("b")["gpu"] == 0)
            cleared = (await ends(gateway))["b"]
            assert (cleared["cause"], cleared["tier"]) == ("cleared", "gpu")

    run(scenario())


def test_simulated_salts_and_adapters_are_named_as_the_reason() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        a.loras = ["adapter"]
        async with running_gateway(a) as gateway:
            a.store("gpu", a.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            salted = (await ends(gateway, cache_salt="s3cret"))["a"]
            assert salted["cause"] == "other_root"
            assert "cache_salt" in salted["why"]
            assert "s3cret" not in json.dumps(salted)
            adapted = (await ends(gateway, model="adapter"))["a"]
            assert (adapted["cause"], "adapters" in adapted["why"]) == ("other_root", True)

    run(scenario())


def test_simulated_unwatched_workers_and_short_prompts() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker(reports=False).start()
        async with running_gateway(a, b, assumed_cache_tokens=0) as gateway:
            assert (await ends(gateway))["b"]["cause"] == "not_watched"
            short = (await ends(gateway, messages=[{"role": "user", "content": "x"}]))["a"]
            assert short["cause"] == "complete"
            assert f"do not fill one chunk of {CHUNK}" in short["why"]

    run(scenario())


def test_simulated_a_worker_that_says_nothing_is_explained_by_what_was_sent() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker(reports=False).start()) as gateway:
            messages = [{"role": "user", "content": TEXT * 9}]
            assert (await ends(gateway, messages=messages))["a"]["cause"] == "never_sent"
            await gateway.chat(TEXT * 9)
            assert (await ends(gateway, messages=messages))["a"]["cause"] == "complete"

    run(scenario())


def test_simulated_a_request_that_was_is_explained_as_of_then() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        async with running_gateway(a) as gateway:
            first = (await gateway.chat(TEXT)).headers["x-request-id"]
            assert (await end_of(gateway, first))["cause"] == "never_stored"
            a.store("gpu", a.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            a.remove("gpu", a.hashes(TEXT))
            await until(lambda: not gateway.gateway.index.sizes("a")["gpu"])
            assert (await end_of(gateway, first))["cause"] == "never_stored", "it was given up afterwards"
            second = (await gateway.chat(TEXT)).headers["x-request-id"]
            assert (await end_of(gateway, second))["cause"] == "evicted"

            a.hold_head.clear()
            asking = asyncio.create_task(gateway.chat("another prompt that is long enough to fill a chunk"))
            await until(lambda: len(a.served("/v1/chat/completions")) == 3)
            other = asyncio.create_task(gateway.chat("another prompt that is long enough to fill a chunk"))
            await until(lambda: len(a.served("/v1/chat/completions")) == 4)
            a.hold_head.set()
            await asking
            burst = (await other).headers["x-request-id"]
            assert (await end_of(gateway, burst))["cause"] == "being_computed"
            missing = await gateway.client.get("/admin/explain", params={"id": "nobody"})
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")

    run(scenario())


def test_simulated_the_command_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        file = tmp_path / "request.json"
        file.write_text(json.dumps(chat_body(TEXT)))
        async with running_gateway(a, b, admin_token="t0ken") as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            request_id = (await gateway.chat(TEXT)).headers["x-request-id"]

            async def command(what: str, *, as_json: bool = False, token: str = "t0ken") -> str:
                options = {"url": url, "token": token, "endpoint": "", "as_json": as_json}
                assert await asyncio.to_thread(explain_command.run, what, **options) == 0
                return capsys.readouterr().out

            assert "would take it: no hit" in await command(str(file))
            shown = json.loads(await command(str(file), as_json=True))
            assert [end["cause"] for end in shown["ends"]] == ["never_stored", "never_stored"]
            assert "took it: no hit" in await command(request_id)
            with pytest.raises(ExplainError, match="no request 'nobody'"):
                await command("nobody")
            with pytest.raises(ExplainError, match="--token"):
                await command(str(file), token="")

    run(scenario())


def test_nobody_there_is_said() -> None:
    with pytest.raises(ExplainError, match="--url"):
        explain_command.run("some-id", url="http://127.0.0.1:9", token="", endpoint="", as_json=False)


hashes = st.lists(st.integers(0, 2**128 - 1).map(lambda n: n.to_bytes(16, "big")), min_size=1, max_size=8)


@given(st.lists(hashes, max_size=20))
def test_a_departure_is_found_where_hashes_are_aligned_and_nowhere_else(reports: list[list[bytes]]) -> None:
    log = History()
    log.began("w", "e")
    gone = set()
    for number, chunks in enumerate(reports):
        log.removed("w", "gpu" if number % 2 else "cpu", b"".join(chunks))
        gone.update(chunks)
    for chunk in gone:
        last = max(number for number, chunks in enumerate(reports) if chunk in chunks)
        found = log.last("w", chunk)
        assert found is not None
        assert found.tier == ("gpu" if last % 2 else "cpu")
    shifted = b"".join(reports[0])[1 : HASH_BYTES + 1] if reports and len(reports[0]) > 1 else b"\xff" * 16
    if shifted not in gone:
        assert log.last("w", shifted) is None


def test_the_history_is_bounded_and_void_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "BUDGET_BYTES", 0)
    log = History()
    log.began("w", "one")
    chunk = bytes(16)
    log.removed("w", "gpu", chunk)
    assert log.last("w", chunk) is not None
    for number in range(1, 2000):
        log.removed("w", "gpu", number.to_bytes(16, "big") * 16)
    assert log._logs["w"].bytes <= history.LEAST_BYTES
    assert log.last("w", chunk) is None
    assert log.last("w", (1999).to_bytes(16, "big")) is not None
    log.began("w", "one")
    assert log.last("w", (1999).to_bytes(16, "big")) is not None, "another stream of the same process"
    log.began("w", "two")
    assert log.last("w", (1999).to_bytes(16, "big")) is None
