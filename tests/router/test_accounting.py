"""Outcomes against simulated workers: whose they are, and whether prompts were counted as the worker counts them."""

import asyncio
from typing import Any

import pytest

from kv_protocol.messages import Admitted
from router import app, pipeline
from router.pool_prompts import PoolPrompts
from router.prompt import PromptBuilder
from router.prompt_ids import PromptIds
from router.workers import Worker
from tests.support.simulated_worker import (
    CHUNK,
    RunningGateway,
    SimulatedWorker,
    chat_body,
    prompt_tokens,
    run,
    running_gateway,
    until,
)

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"
CHAT = "/v1/chat/completions"


class BytesBuilder(PromptBuilder):
    """Tokenizes as the simulated worker does."""

    def __init__(self) -> None:
        self.memory = None
        self.renders_by_heart = 0
        self._by_heart = None

    def chat(self, body: dict[str, Any]) -> list[int]:
        return prompt_tokens(body)

    async def chat_async(self, body: dict[str, Any]) -> PromptIds:
        return PromptIds.of(self.chat(body))

    def completion(self, body: dict[str, Any]) -> list[list[int]]:
        return [prompt_tokens(body)]

    async def completion_async(self, body: dict[str, Any]) -> list[PromptIds]:
        return [PromptIds.of(ids) for ids in self.completion(body)]


async def tokenizing(gateway: RunningGateway) -> tuple[PoolPrompts, Worker]:
    """Let the router tokenize for worker a, and send it token ids."""
    prompts, worker = gateway.gateway.prompts["simulated"], gateway.gateway.registry.workers[0]
    prompts.builder, prompts._fault = BytesBuilder(), ""
    await prompts.check(worker)
    assert worker.parity == "exact"
    worker.takes_token_ids = True
    return prompts, worker


def test_simulated_token_counts_are_sampled_and_a_difference_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SAMPLE_EVERY", 4)
    monkeypatch.setattr(app, "RECHECK_S", 0.0)

    async def scenario() -> None:
        simulated = await SimulatedWorker().start()
        simulated.admit = {}
        async with running_gateway(simulated) as gateway:
            prompts, worker = await tokenizing(gateway)

            async def counts(result: str) -> float:
                return await gateway.metric(f'warmroute_router_token_counts_total{{result="{result}",worker="a"}}')

            for _ in range(8):
                await gateway.chat(TEXT)
            as_text = [b"prompt_token_ids" not in body for _, _, body in simulated.served(CHAT)]
            assert as_text == [False, False, False, True] * 2
            assert (await counts("equal"), await counts("different")) == (8, 0)

            simulated.extra_tokens = 1
            for _ in range(4):
                await gateway.chat(TEXT)
            await until(lambda: worker.parity == "mismatch")
            assert (await counts("equal"), await counts("different")) == (11, 1)
            await gateway.chat(TEXT)
            assert b"prompt_token_ids" not in simulated.served(CHAT)[-1][2]
            assert (await gateway.get("/admin/requests"))["requests"][0]["tokenized_by"] == "worker"

            simulated.extra_tokens = 0
            await prompts.check(worker)
            await gateway.chat(TEXT)
            assert (await gateway.get("/admin/requests"))["requests"][0]["tokenized_by"] == "router"

    run(scenario())


def test_simulated_a_removed_worker_no_longer_decides_who_tokenizes() -> None:
    async def scenario() -> None:
        odd, other = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(odd, other) as gateway:
            prompts, worker = await tokenizing(gateway)
            odd.extra_tokens = 1
            await prompts.check(worker)
            assert (worker.parity, prompts.by) == ("mismatch", "worker")
            await gateway.client.delete("/admin/workers", params={"worker": "a"})
            assert prompts.by == "router"

    run(scenario())


def test_simulated_outcomes_of_one_id_used_twice_at_once_are_nobodys() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.hold_head.clear()
        worker.admit = {"gpu": 0}
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            headers = {"x-request-id": "same"}
            asking = []
            for text in (TEXT, "cold", TEXT):
                body = chat_body(text)
                asking.append(asyncio.create_task(gateway.client.post(CHAT, json=body, headers=headers)))
                await until(lambda: len(worker.served(CHAT)) == len(asking))
            worker.hold_head.set()
            await asyncio.gather(*asking)
            await until(lambda: len(worker.served(CHAT)) == 3)
            await asyncio.sleep(0.1)
            assert (await gateway.worker("a"))["predictions"] == {"exact": 0, "over": 0, "under": 0}
            assert (await gateway.worker("a"))["trust"] == 1

    run(scenario())


def test_simulated_copies_of_several_prompts_are_not_judged() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            ids = list(TEXT.encode())
            for n, judged in ((2, 0), (1, 1)):
                body = {"model": "simulated", "prompt": [ids, [7] * CHUNK], "n": n}
                request_id = f"n{n}"
                await gateway.client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
                for _ in range(2 * n):
                    worker.publish(Admitted(request_id, CHUNK, {}))
                await asyncio.sleep(0.1)
                assert (await gateway.worker("a"))["predictions"]["over"] == judged

    run(scenario())


def test_simulated_prompts_go_where_they_fit() -> None:
    async def scenario() -> None:
        short, long = SimulatedWorker(), SimulatedWorker()
        short.max_model_len = 50
        async with running_gateway(await short.start(), await long.start()) as gateway:
            for _ in range(3):
                assert (await gateway.chat("x" * 60)).headers["x-warmroute-worker"] == "b"
            assert {(await gateway.chat("x" * 40)).headers["x-warmroute-worker"] for _ in range(12)} == {"a", "b"}

    run(scenario())
