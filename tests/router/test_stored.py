"""Responses that workers keep: where they are looked for, and who may see them."""

import asyncio
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from router import stored
from router.errors import NotFound, Unavailable
from router.parse import Request
from router.stored import StoredResponses, id_for
from router.workers import Registry
from tests.support.simulated_worker import RunningGateway, run, running_gateway, until
from tests.support.surface_worker import SurfaceWorker


async def three() -> list[SurfaceWorker]:
    return [await SurfaceWorker().start() for _ in range(3)]  # type: ignore[misc]


async def make(gateway: RunningGateway, **members: Any) -> tuple[str, str]:
    """Id and worker of a response made now."""
    answer = await gateway.client.post("/v1/responses", json={"model": "simulated", "input": "hi", **members})
    assert answer.status_code == 200, answer.text
    if members.get("stream"):
        return answer.text.partition('"id": "')[2].partition('"')[0], answer.headers["x-warmroute-worker"]
    return answer.json()["id"], answer.headers["x-warmroute-worker"]


@pytest.mark.parametrize("stream", [False, True])
def test_simulated_requests_go_to_the_keeper(stream: bool) -> None:
    async def scenario() -> None:
        workers = await three()
        async with running_gateway(*workers, policy="round-robin") as gateway:
            made = [await make(gateway, stream=stream) for _ in range(6)]
            assert {worker for _, worker in made} == {"a", "b", "c"}
            for worker in workers:
                worker.requests.clear()
            for identifier, worker in made:
                for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/input_items"), ("HEAD", "")):
                    answer = await gateway.client.request(method, f"/v1/responses/{identifier}{path}?a=1")
                    assert answer.headers["x-warmroute-worker"] == worker
                    assert answer.status_code == (404 if path == "/input_items" else 200)
                _, again = await make(gateway, previous_response_id=identifier)
                assert again == worker
            asked = [path for worker in workers for path, _, _ in worker.requests if "/v1/responses/" in path]
            assert len(asked) == 4 * len(made), "nobody else was asked"

    run(scenario())


def test_simulated_unknown_ids_are_asked_for() -> None:
    async def scenario() -> None:
        workers = await three()
        async with running_gateway(*workers) as gateway:
            made = [await make(gateway) for _ in range(3)]
            gateway.gateway.pipeline._surface.stored._keepers.clear()
            for identifier, worker in made:
                answer = await gateway.client.get(f"/v1/responses/{identifier}")
                assert (answer.status_code, answer.headers["x-warmroute-worker"]) == (200, worker)
            for path in ("/v1/responses/resp_none", "/v1/responses/" + "x" * 300):
                answer = await gateway.client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")
            body = {"model": "simulated", "input": "hi", "previous_response_id": "resp_none"}
            assert (await gateway.client.post("/v1/responses", json=body)).status_code == 404
            body["previous_response_id"] = 7  # type: ignore[assignment]
            assert (await gateway.client.post("/v1/responses", json=body)).status_code == 400

    run(scenario())


def test_simulated_a_keeper_that_is_gone_is_named() -> None:
    async def scenario() -> None:
        workers = await three()
        async with running_gateway(*workers, policy="round-robin") as gateway:
            identifier, worker = await make(gateway)
            await workers["abc".index(worker)].kill()
            held = gateway.gateway.registry.get(worker)
            assert held is not None
            await until(lambda: not held.up)
            answer = await gateway.client.get(f"/v1/responses/{identifier}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "response_unavailable")
            assert worker in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "1"

    run(scenario())


def test_simulated_a_draining_keeper_still_answers_for_what_it_keeps() -> None:
    async def scenario() -> None:
        workers = await three()
        async with running_gateway(*workers, policy="round-robin") as gateway:
            identifier, worker = await make(gateway)
            await gateway.client.post("/admin/workers/drain", json={"worker": worker})
            answer = await gateway.client.get(f"/v1/responses/{identifier}")
            assert (answer.status_code, answer.headers["x-warmroute-worker"]) == (200, worker)

    run(scenario())


def test_simulated_looking_for_ids_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "ASK_TIMEOUT_S", 0.5)

    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running_gateway(worker) as gateway:
            assert isinstance(worker, SurfaceWorker)
            slow = worker._control

            def control(path: str, body: bytes) -> tuple[int, Any]:
                return slow(path, body)

            worker._control = control  # type: ignore[method-assign]
            answers = await asyncio.gather(*(gateway.client.get(f"/v1/responses/resp_{n}") for n in range(60)))
            assert {answer.status_code for answer in answers} <= {404, 429}

    run(scenario())


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    async def scenario() -> None:
        kept = StoredResponses(Registry(), keep=3)
        for number in range(5):
            kept.learn(f"resp_{number}", "a")
        kept.learn("resp_2", "b")
        kept.learn("resp_5", "a")
        assert list(kept._keepers) == ["resp_4", "resp_2", "resp_5"]
        assert len(kept) == 3

    asyncio.run(scenario())


def test_another_tenants_response_is_not_found() -> None:
    async def scenario() -> None:
        kept = StoredResponses(Registry())
        identifier = id_for("team-a")
        assert identifier != id_for("team-a")
        kept.learn(identifier, "a")
        for tenant, error in (("team-b", NotFound), ("team-a", Unavailable), ("", Unavailable)):
            with pytest.raises(error):
                await kept.place(Request("stored", b"", {}, "", "", "id", []), identifier, tenant)

    asyncio.run(scenario())


@pytest.mark.parametrize("own", [{}, {"request_id": "resp_mine"}])
def test_simulated_with_keys_a_response_is_its_keys_alone(own: dict[str, str], tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        keys = tmp_path / "keys.yaml"
        hashes = {name: "sha256:" + sha256(name.encode() * 8).hexdigest() for name in ("team-a", "team-b")}
        keys.write_text(json.dumps({"keys": [{"name": name, "hash": value} for name, value in hashes.items()]}))
        async with running_gateway(worker, api_keys_file=str(keys)) as gateway:
            stored = gateway.gateway.pipeline._surface.stored
            headers = {name: {"authorization": f"Bearer {name * 8}"} for name in hashes}
            body = {"model": "simulated", "input": "hi", **own}
            made = await gateway.client.post("/v1/responses", json=body, headers=headers["team-a"])
            assert made.status_code == 200, made.text
            sent = json.loads(worker.served("/v1/responses")[-1][2])
            assert sent["request_id"] != "resp_mine"
            worker.kept[sent["request_id"]] = {"id": sent["request_id"]}  # as vLLM names it
            for known in (True, False):
                if not known:
                    stored._keepers.clear()
                path = f"/v1/responses/{sent['request_id']}"
                found = {name: (await gateway.client.get(path, headers=headers[name])).status_code for name in headers}
                assert found == {"team-a": 200, "team-b": 404}
                follow = body | {"previous_response_id": sent["request_id"]}
                other = await gateway.client.post("/v1/responses", json=follow, headers=headers["team-b"])
                assert other.status_code == 404

    run(scenario())
