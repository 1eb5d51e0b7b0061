"""Admin and public endpoints against simulated workers."""

import asyncio
from typing import Any

import httpx
import pytest

from router.api.admin import describe
from router.app import create_app
from router.config import load
from tests.support.simulated_worker import (
    CHUNK,
    RunningGateway,
    SimulatedWorker,
    chat_body,
    run,
    running_gateway,
    until,
)

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


def test_simulated_models_are_merged() -> None:
    async def scenario() -> None:
        a, b, c = SimulatedWorker(), SimulatedWorker(), SimulatedWorker("other")
        a.loras, b.max_model_len = ["adapter"], 500
        async with running_gateway(*[await worker.start() for worker in (a, b, c)]) as gateway:
            models = await gateway.get("/v1/models")
            assert models["object"] == "list"
            cards = {card["id"]: card for card in models["data"]}
            assert set(cards) == {"simulated", "adapter", "other"}
            assert cards["adapter"]["parent"] == "simulated"
            assert cards["simulated"]["max_model_len"] == 500
            assert (await gateway.get("/v1/models/other"))["id"] == "other"
            missing = await gateway.client.get("/v1/models/absent")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
            for _ in range(4):
                assert (await gateway.chat("x", model="adapter")).headers["x-warmroute-worker"] == "a"
                assert (await gateway.chat("x", model="other")).headers["x-warmroute-worker"] == "c"
            nameless = {"messages": [{"role": "user", "content": "x"}]}
            answer = await gateway.client.post("/v1/chat/completions", json=nameless)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")

    run(scenario())


def test_simulated_workers_come_and_go() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a) as gateway:
            client = gateway.client
            added = await client.post(
                "/admin/workers", json={"url": b.url, "reports": f"127.0.0.1:{b.report_port}", "name": "late"}
            )
            assert added.status_code == 201
            again = await client.post("/admin/workers", json={"url": b.url})
            assert (again.status_code, again.json()["error"]["param"]) == (409, "url")
            wrong = await client.post("/admin/workers", json={"url": "ftp://x"})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "url")
            unknown = await client.post("/admin/workers", json={"url": b.url, "nmae": "x"})
            assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "nmae")
            await until(lambda: getattr(gateway.gateway.registry.get("late"), "synced", False))

            drained = await client.post("/admin/workers/drain", json={"worker": "a"})
            assert drained.json()["draining"]
            assert {(await gateway.chat("x")).headers["x-warmroute-worker"] for _ in range(4)} == {"late"}
            await client.post("/admin/workers/drain", json={"worker": "a", "drain": False})

            removed = await client.delete("/admin/workers", params={"worker": "late"})
            assert removed.json() == {"removed": "late"}
            assert {(await gateway.chat("x")).headers["x-warmroute-worker"] for _ in range(4)} == {"a"}
            assert (await client.delete("/admin/workers", params={"worker": "late"})).status_code == 404
            await until(lambda: not b.readers)
            await b.kill()

    run(scenario())


def test_simulated_removal_lets_running_requests_finish() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        a.hold_head.clear()
        async with running_gateway(a, b, policy="round-robin") as gateway:
            asking = asyncio.create_task(gateway.chat("x"))
            await until(lambda: a.served("/v1/chat/completions"))
            await gateway.client.delete("/admin/workers", params={"worker": "a"})
            a.hold_head.set()
            assert (await asking).headers["x-warmroute-worker"] == "a"

    run(scenario())


def test_simulated_dry_run_explains_and_leaves_no_trace() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a, b) as gateway:
            chunks = a.hashes(TEXT)
            b.store("gpu", chunks[:2])
            b.store("cpu", chunks[2:3])
            await until(lambda: gateway.gateway.index.sizes("b")["cpu"])
            for body in (chat_body(TEXT), {"model": "simulated", "prompt": TEXT}):
                answer = (await gateway.client.post("/admin/route", json=body)).json()
                assert (answer["worker"], answer["prompt_tokens"]) == ("b", len(TEXT))
                assert answer["reason"] == f"longest hit: {3 * CHUNK} of {len(TEXT)} tokens"
                hits = {item["worker"]: item["hit_tokens_by_tier"] for item in answer["candidates"]}
                assert hits["b"] == {"gpu": 2 * CHUNK, "cpu": CHUNK, "disk": 0, "remote": 0}
                assert sum(hits["a"].values()) == 0
            assert not a.served("/v1/chat/completions") + b.served("/v1/chat/completions")
            assert (await gateway.get("/admin/requests"))["requests"] == []
            bad = await gateway.client.post("/admin/route", content=b"{")
            assert bad.status_code == 400

    run(scenario())


def test_simulated_dry_run_does_not_take_a_turn() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a, b, policy="round-robin") as gateway:
            for _ in range(3):
                assert (await gateway.client.post("/admin/route", json=chat_body("x"))).json()["worker"] == "a"
            assert (await gateway.chat("x")).headers["x-warmroute-worker"] == "a"

    run(scenario())


def test_simulated_contents_of_one_worker() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(lambda: gateway.gateway.index.sizes("a")["gpu"])
            seen = await gateway.get("/admin/index", worker="a")
            assert seen["contents"] == {"gpu": sorted(chunk.hex() for chunk in worker.tiers["gpu"]), "cpu": []}
            assert (await gateway.client.get("/admin/index", params={"worker": "z"})).status_code == 404

    run(scenario())


def test_simulated_recent_requests_are_bounded() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), recent_requests=3) as gateway:
            ids = [(await gateway.chat("x")).headers["x-request-id"] for _ in range(5)]
            seen = (await gateway.get("/admin/requests"))["requests"]
            assert [item["request_id"] for item in seen] == ids[:1:-1]
            assert (await gateway.get("/admin/requests", id=ids[0]))["requests"] == []

    run(scenario())


async def admin(gateway: RunningGateway, **headers: str) -> httpx.Response:
    return await gateway.client.get("/admin/workers", headers=headers)


def test_simulated_admin_token() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), admin_token="secret") as gateway:
            refused = await admin(gateway)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_token")
            assert (await admin(gateway, authorization="Bearer wrong")).status_code == 401
            assert (await admin(gateway, authorization="Bearer secret")).status_code == 200
            assert (await gateway.chat("x")).status_code == 200
            assert (await gateway.client.get("/metrics")).status_code == 200

    run(scenario())


def test_simulated_admin_is_closed_where_others_can_reach_it() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), host="0.0.0.0") as gateway:
            refused = await admin(gateway)
            assert refused.status_code == 403
            assert "--admin-token" in refused.json()["error"]["message"]
            assert (await gateway.chat("x")).status_code == 200

    run(scenario())


def test_simulated_admin_without_token_answers_to_localhost_only() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            assert (await admin(gateway, host="evil.example")).status_code == 403

    run(scenario())


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/health", 405)])
def test_simulated_other_paths_answer_error_objects(method: str, path: str, status: int) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), pass_through=False) as gateway:
            answer = await gateway.client.request(method, path)
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run(scenario())


def test_simulated_metrics_name_every_family() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            await gateway.chat("x")
            assert (
                await gateway.metric('warmroute_router_requests_total{model="simulated",status="200",worker="a"}') == 1
            )
            await gateway.chat("x", model="nobody")
            assert (
                await gateway.metric('warmroute_router_rejected_requests_total{code="model_not_found",status="404"}')
                == 1
            )
            assert await gateway.metric('warmroute_router_worker_up{worker="a"}') == 1

    run(scenario())


def test_simulated_other_servers_work_too() -> None:
    """Under a server that is not ours the client's leaving is learned from ``receive``."""

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        app = create_app(load({"workers": [worker.spec("a")]}, {}))
        await app.gateway.start()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/chat/completions", json=chat_body("x"))
            assert answer.status_code == 200
            assert describe(app.gateway.registry.workers[0])["in_flight"] == 0
        messages: Any = iter([{"type": "http.request", "body": b"{}"}])
        worker.hold_head.clear()

        async def receive() -> Any:
            if (message := next(messages, None)) is not None:
                return {"type": "http.request", "body": httpx.Request("POST", "/", json=chat_body("x")).content}
            await until(lambda: len(worker.served("/v1/chat/completions")) == 2)
            return {"type": "http.disconnect"} if message is None else message

        async def send(_: Any) -> None:
            raise AssertionError("nothing can be sent to a client that left")

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        await until(lambda: worker.aborted == 1)
        await app.gateway.close()
        await worker.kill()

    run(scenario())


def test_simulated_admin_bodies_are_bounded_and_faults_named() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start(), max_body_bytes=4096) as gateway:
            kind = {"content-type": "application/json"}
            for content, status in ((b"x" * 5000, 413), (b"{", 400), (b'"\xff"', 400), (b"[" * 4000, 400)):
                answer = await gateway.client.post("/admin/workers", content=content, headers=kind)
                assert (answer.status_code, answer.json()["error"]["param"]) == (status, None)

    run(scenario())


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "a b", "127.0.0.1@evil.example", "[::1"])
def test_simulated_admin_without_token_answers_to_this_machines_names_only(host: str) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            answer = await gateway.client.get("/admin/workers", headers={"host": host})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_closed")
            for own in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
                assert (await gateway.client.get("/admin/workers", headers={"host": own})).status_code == 200

    run(scenario())
