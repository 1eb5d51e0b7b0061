"""Workers compute the prompts of a file when they start."""

import json
from pathlib import Path
from typing import Any

import pytest

from router.app import Gateway
from router.config import load
from router.discovery.names import NOT_READY, TERMINATING
from router.errors import ConfigError
from router.warmup import read_prompts
from tests.support.simulated_worker import SimulatedWorker, run, running_gateway, until

SYSTEM = {
    "messages": [{"role": "system", "content": "Be brief."}],
    "max_completion_tokens": 500,
    "stream": True,
    "n": 3,
}


def write(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    return str(path)


def sent(worker: SimulatedWorker) -> list[tuple[str, Any]]:
    return [(path, json.loads(body)) for path, _, body in worker.requests if path.startswith("/v1/c")]


def test_each_line_is_a_request_for_one_token(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", SYSTEM, "a text", {"prompt": [1, 2, 3], "cache_salt": "tenant"})
    assert read_prompts(path) == [
        {"messages": SYSTEM["messages"], "max_tokens": 1},
        {"prompt": "a text", "max_tokens": 1},
        {"prompt": [1, 2, 3], "cache_salt": "tenant", "max_tokens": 1},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"fine"\n{"messages": [', "line 2 is not JSON"),
        (b"secret words", 'line 1 is not JSON: write a request body, or a prompt as "text"'),
        (b"\xff", "line 1 is not JSON"),
        (b"[1, 2]", "line 1 is no prompt"),
        (b"{}", "line 1 is no prompt"),
        (b'{"messages": [], "prompt": "a"}', "line 1 is no prompt"),
        (b'{"prompt": "a", "model": ["secret"]}', "line 1 names a model that is no text"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_without_its_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(str(path))
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        Gateway(load({"warmup_prompts": str(tmp_path / "missing")}))


def test_simulated_workers_are_warmed_up_when_they_come_and_when_they_are_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", SYSTEM, "a text", {"model": "another", "prompt": "not here"})

    async def scenario() -> None:
        worker, plain = await SimulatedWorker().start(), await SimulatedWorker(reports=False).start()
        async with running_gateway(worker, plain, warmup_prompts=path) as gateway:
            await until(lambda: len(sent(worker)) == len(sent(plain)) == 2)
            for each in (worker, plain):
                assert [target for target, _ in sent(each)] == ["/v1/chat/completions", "/v1/completions"]
                assert {(body["model"], body["max_tokens"]) for _, body in sent(each)} == {("simulated", 1)}
            await worker.kill()
            await until(lambda: not gateway.gateway.registry.workers[0].up)
            await worker.restart()
            await until(lambda: len(sent(worker)) == 4)
            await until(lambda: gateway.gateway.registry.workers[0].up)
            assert await gateway.metric('warmroute_router_warmup_prompts_total{result="ok"}') >= 5

    run(scenario())


def test_a_simulated_worker_whose_pod_is_not_ready_yet_is_warmed_up_before_it_is(tmp_path: Path) -> None:
    """The router hears of a restarted engine before the kubelet does; one that leaves is not warmed up."""
    path = write(tmp_path / "prompts.jsonl", "a text", "another")

    async def scenario() -> None:
        worker, leaver = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(worker, leaver, warmup_prompts=path) as gateway:
            await until(lambda: len(sent(worker)) == len(sent(leaver)) == 2)
            members, registry = gateway.gateway.control.membership, gateway.gateway.registry
            members.hold("settings", {leaver.url: TERMINATING, worker.url: NOT_READY})
            members.settle()
            for each in (leaver, worker):
                await each.kill()
            await until(lambda: not any(held.up for held in registry.workers))
            for each in (leaver, worker):
                await each.restart()
            await until(lambda: len(sent(worker)) == 4)
            assert all(held.draining for held in registry.workers)
            await until(lambda: all(held.up and held.synced for held in registry.workers))
            assert len(sent(leaver)) == 2
        await worker.kill()
        await leaver.kill()

    run(scenario())


def test_a_simulated_worker_that_fails_is_not_asked_for_ever(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", *(f"text {number}" for number in range(20)))

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.fail_next = 1000
        async with running_gateway(worker, warmup_prompts=path) as gateway:
            metric = 'warmroute_router_warmup_prompts_total{result="refused"}'
            while await gateway.metric(metric) < 3:
                pass
            await gateway.chat("still served by the gateway")
            assert await gateway.metric(metric) == 3

    run(scenario())
