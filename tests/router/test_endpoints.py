"""The table of paths, and what the gateway does with each of them."""

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from router.endpoints import BY_LOAD, OWN, PROMPTS, REFUSED, REFUSED_BELOW, Endpoint, find, response_id
from router.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound
from tests.support.simulated_worker import RunningGateway, run, running_gateway, until
from tests.support.surface_worker import BytesBuilder, SurfaceWorker

TEXT = "the quick brown fox jumps over the lazy dog, again and again and again" * 2


def test_every_path_is_served_in_one_way() -> None:
    parts = [set(PROMPTS), set(BY_LOAD), set(REFUSED), set(OWN)]
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("path", [*REFUSED, *(start + "x" for start in REFUSED_BELOW if start != "/admin/")])
@pytest.mark.parametrize("spelling", [str, str.upper, lambda path: path + "/", lambda path: path + "//"])
def test_paths_that_control_a_worker_are_refused_however_written(path: str, spelling: Any) -> None:
    for method in ("GET", "POST"):
        with pytest.raises((NotFound, InvalidRequest)):
            find(spelling(path), method)


@pytest.mark.parametrize(
    "path", ["//pause", "/v1/../pause", "/./pause", "/v1/x/..", "/pause\\x", "/v1/\x00", "pause", "/a b", "/v1//models"]
)
def test_paths_that_can_be_read_in_two_ways_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        find(path, "GET")


def test_paths_are_found() -> None:
    assert find("/v1/models", "GET") is None
    assert find("/admin/workers", "GET") is None
    assert find("/v1/messages", "POST") == Endpoint("messages", "cache")
    assert find("/v1/responses/resp_1", "HEAD").kind == "stored"  # type: ignore[union-attr]
    assert find("/v1/responses/resp_1/input_items", "GET").routing == "owner"  # type: ignore[union-attr]
    assert find("/v1/anything/else", "PUT").repeatable is False  # type: ignore[union-attr]
    with pytest.raises(NotFound):
        find("/v1/anything/else", "PUT", pass_through=False)
    with pytest.raises(MethodNotAllowed):
        find("/v1/embeddings", "GET")
    assert [response_id(f"/v1/responses/{rest}") for rest in ("a", "a/cancel", "a/b/c", "A/", "")] == [*"aaaA", ""]
    assert find("/V1/Responses/a/", "GET").kind == "stored"  # type: ignore[union-attr] # whoever's response it is


def test_every_route_of_vllm_is_decided() -> None:
    """Whatever the installed engine registers is in the table, or passed through on purpose."""
    vllm = pytest.importorskip("vllm", reason="needs vLLM (CPU build)", exc_type=ImportError)
    entrypoints = Path(vllm.__file__).parent / "entrypoints"
    found = set()
    for source in entrypoints.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        found |= set(re.findall(r"router\.(?:get|post|put|delete|websocket)\(\s*\"(/[^\"]*)\"", text))
        found |= set(re.findall(r"add_api_route\(\s*\"(/[^\"]*)\"", text))
    assert len(found) > 50
    known = {*PROMPTS, *BY_LOAD, *REFUSED, *OWN}
    stored = {path for path in found if path.startswith("/v1/responses/{")}
    below = {path for path in found if any(path.startswith(start) for start in REFUSED_BELOW)}
    passed = {
        "/tokenizer_info",
        "/generative_scoring",
        "/v1/systemone",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
    }
    assert sorted(found - known - stored - below - passed) == []


def running(*workers: SurfaceWorker, **settings: Any) -> Any:
    return running_gateway(*workers, **settings)


async def two() -> tuple[SurfaceWorker, SurfaceWorker]:
    first, second = SurfaceWorker(), SurfaceWorker()
    await first.start()
    await second.start()
    return first, second


async def tokenizing(gateway: RunningGateway) -> None:
    """Let the router tokenize for all workers, and send them token ids."""
    prompts = gateway.gateway.prompts["simulated"]
    prompts.builder, prompts._fault = BytesBuilder(), ""
    for worker in gateway.gateway.registry.workers:
        worker.parity, worker.takes_token_ids = "exact", True
        await prompts.dialects.check(worker, prompts.builder)


PROMPT_BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"max_tokens": 8, "messages": [{"role": "user", "content": TEXT}]},
    "/v1/responses": {"input": TEXT},
    "/inference/v1/generate": {"token_ids": list(TEXT.encode()), "sampling_params": {}},
}


@pytest.mark.parametrize("path", PROMPT_BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_simulated_prompts_go_where_they_are_held(path: str, stream: bool) -> None:
    async def scenario() -> None:
        cold, warm = await two()
        warm.store("cpu", warm.hashes(TEXT))
        warm.admit = {"cpu": len(TEXT) // 16 * 16}
        warm.cached_tokens = len(TEXT) // 16 * 16
        async with running(cold, warm) as gateway:
            await tokenizing(gateway)
            body = {"model": "simulated", "stream": stream, **PROMPT_BODIES[path]}
            for _ in range(4):
                answer = await gateway.client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-warmroute-worker"] == "b"
                assert answer.headers["x-warmroute-hit-tokens"] == str(len(TEXT) // 16 * 16)
            assert not cold.served(path)
            recent = (await gateway.get("/admin/requests"))["requests"][0]
            assert recent["endpoint"] == PROMPTS[path]
            assert recent["tokenized_by"] == "router"
            assert recent["prompt_tokens"] == len(TEXT)
            workers = gateway.gateway.registry.workers
            assert workers[1].predictions == {"exact": 4, "over": 0, "under": 0}
            sent = json.loads(warm.served(path)[-1][2])
            if path != "/inference/v1/generate":
                assert sent.pop("kv_transfer_params") == {"prompt_token_ids": list(TEXT.encode())}
            assert sent == body

    run(scenario())


@pytest.mark.parametrize("path", PROMPT_BODIES)
def test_simulated_salts_and_adapters_are_never_credited_with_another_key(path: str) -> None:
    async def scenario() -> None:
        cold, warm = await two()
        for worker in (cold, warm):
            worker.loras = ["adapter"]
        warm.store("gpu", warm.hashes(TEXT))
        async with running(cold, warm) as gateway:
            await tokenizing(gateway)
            for members in ({"cache_salt": "s"}, {"model": "adapter"}):
                body = {"model": "simulated", **PROMPT_BODIES[path], **members}
                answer = await gateway.client.post(path, json=body)
                assert answer.headers["x-warmroute-hit-tokens"] == "0"
            plain = await gateway.client.post(path, json={"model": "simulated", **PROMPT_BODIES[path]})
            assert plain.headers["x-warmroute-hit-tokens"] != "0"

    run(scenario())


@pytest.mark.parametrize(
    ("path", "members", "why"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "media"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "media"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "not known here"),
        ("/inference/v1/generate", {"token_ids": [1] * 64, "features": {}, "content_parts": [{"a": 1}]}, ""),
    ],
)
def test_simulated_what_cannot_be_reproduced_is_not_scored_and_says_why(
    path: str, members: dict[str, Any], why: str
) -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            await tokenizing(gateway)
            body = {"model": "simulated", **members}
            answer = await gateway.client.post(path, json=body)
            assert answer.status_code == 200
            assert answer.headers["x-warmroute-hit-tokens"] == "0"
            recent = (await gateway.get("/admin/requests"))["requests"][0]
            assert recent["tokenized_by"] == "nobody"
            explained = await gateway.client.post(
                "/admin/route", params={"endpoint": PROMPTS[path]}, content=json.dumps(body)
            )
            assert why in explained.json()["why_not_router"]

    run(scenario())


def test_simulated_known_paths_go_by_load() -> None:
    async def scenario() -> None:
        first, second = await two()
        first.uncached_tokens = 50_000
        async with running(first, second) as gateway:
            worker = gateway.gateway.registry.workers[0]
            await until(lambda: worker.load.uncached_tokens == 50_000)
            paths = [path for path in BY_LOAD if "audio" not in path and "count" not in path]
            for path in paths:
                answer = await gateway.client.post(f"{path}?x=1%20&y", json={"model": "simulated", "input": "x"})
                assert answer.status_code == 200
                assert answer.headers["x-warmroute-worker"] == "b"
                if path != "/tokenize":
                    assert answer.json()["path"] == f"{path}?x=1%20&y"
                unknown = await gateway.client.post(path, json={"model": "nope", "input": "x"})
                assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
                assert (await gateway.client.get(path)).status_code == 405
            answered = 'warmroute_router_requests_total{model="simulated",status="200",worker="b"}'
            assert await gateway.metric(answered) == len(paths)

    run(scenario())


def test_simulated_unknown_paths_are_passed_through() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                answer = await gateway.client.request(method, "/v1/some/%C3%BCber%2Fpath?q=%26")
                assert answer.json()["path"] == "/v1/some/%C3%BCber%2Fpath?q=%26"
                assert answer.json()["method"] == method
            head = await gateway.client.head("/v1/some/path")
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) > 0
            again = await gateway.client.head("/v1/models")
            assert (again.status_code, again.content) == (200, b"")
            text = await gateway.client.post("/v1/x", content=b"\xff\x00", headers={"content-type": "application/x"})
            assert text.json()["bytes"] == 2
            broken = await gateway.client.post("/v1/x", content=b"{", headers={"content-type": "application/json"})
            assert broken.status_code == 400

    run(scenario())


def test_simulated_pass_through_can_be_off() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker, pass_through=False) as gateway:
            assert (await gateway.client.get("/v1/some/path")).status_code == 404
            assert (await gateway.client.post("/v1/embeddings", json={"input": "x"})).status_code == 200

    run(scenario())


def test_simulated_worker_control_never_reaches_a_worker() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            before = {path for path, _, _ in worker.requests}
            for path in REFUSED:
                for sent in (path, path + "/", path.replace("e", "%65"), path.upper(), f"/v1/..{path}", f"/{path}"):
                    answer = await raw_request(gateway.port, "POST", sent)
                    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), (sent, answer)
            assert {path for path, _, _ in worker.requests} == before
            said = (await gateway.client.post("/collective_rpc", json={})).json()["error"]
            assert said["code"] == "not_proxied"
            assert "any method" in said["message"]

    run(scenario())


async def raw_request(port: int, method: str, target: str, headers: str = "", body: bytes = b"") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {target} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n{headers}"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


@pytest.mark.parametrize("path", [*PROMPT_BODIES, "/v1/embeddings", "/v1/some/path"])
def test_simulated_chunked_bodies_are_served(path: str) -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:

            async def pieces() -> Any:
                body = json.dumps({"model": "simulated", **PROMPT_BODIES.get(path, {})}).encode()
                for at in range(0, len(body), 40):
                    yield body[at : at + 40]

            answer = await gateway.client.post(path, content=pieces(), headers={"content-type": "application/json"})
            assert answer.status_code == 200
            assert json.loads(worker.served(path)[0][2])["model"] == "simulated"

    run(scenario())


def test_simulated_failures_are_retried_only_where_they_may_be() -> None:
    async def scenario() -> None:
        first, second = await two()
        async with running(first, second, policy="round-robin") as gateway:
            first.status = second.status = 503
            for path in ("/v1/embeddings", "/v1/some/path"):
                first.requests.clear()
                second.requests.clear()
                answer = await gateway.client.post(path, json={"model": "simulated"})
                assert answer.status_code in (502, 503)
                assert len(first.served(path)) + len(second.served(path)) == (2 if path == "/v1/embeddings" else 1)

    run(scenario())


def test_simulated_errors_have_the_shape_of_their_dialect() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            body = {"model": "nope", **PROMPT_BODIES["/v1/messages"]}
            for path in ("/v1/messages", "/v1/messages/count_tokens"):
                answer = await gateway.client.post(path, json=body)
                assert answer.status_code == 404
                assert answer.json()["type"] == "error"
                assert "nope" in answer.json()["error"]["message"]
            assert (await gateway.client.get("/v1/messages")).status_code == 405

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_simulated_a_stream_that_breaks_off_ends_with_an_event_its_sdk_raises(path: str) -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        worker.die_after = 2
        async with running(worker) as gateway:
            body = {"model": "simulated", "stream": True, **PROMPT_BODIES[path]}
            text = (await gateway.client.post(path, json=body)).text
            last = text.rstrip().split("\n\n")[-1]
            assert last.startswith("event: error\ndata: ")
            said = json.loads(last.partition("data: ")[2])
            assert said["type"] == "error"
            assert said["error"]["code"] == "worker_failed"

    run(scenario())


def test_simulated_official_clients_work() -> None:
    openai = pytest.importorskip("openai")

    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            url = f"http://127.0.0.1:{gateway.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
                made = await client.responses.create(model="simulated", input="hi")
                assert (await client.responses.retrieve(made.id)).id == made.id
                assert (await client.responses.cancel(made.id)).status == "cancelled"
                worker.die_after = 2
                stream = await client.responses.create(model="simulated", input="hi", stream=True)
                with pytest.raises(openai.APIError):
                    async for _ in stream:
                        pass

    run(scenario())


def test_simulated_a_worker_that_counts_otherwise_is_not_translated_for() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        worker.counts_messages, worker.extra_tokens = True, 3
        async with running(worker) as gateway:
            await tokenizing(gateway)
            answer = await gateway.client.post(
                "/v1/messages", json={"model": "simulated", **PROMPT_BODIES["/v1/messages"]}
            )
            assert answer.status_code == 200
            assert (await gateway.get("/admin/requests"))["requests"][0]["tokenized_by"] == "nobody"
            assert b"kv_transfer_params" not in worker.served("/v1/messages")[-1][2]

    run(scenario())


def test_simulated_responses_that_are_counted_otherwise_are_no_longer_translated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from router import pipeline

    monkeypatch.setattr(pipeline, "SAMPLE_EVERY", 1)

    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        worker.extra_tokens = 3
        async with running(worker) as gateway:
            await tokenizing(gateway)
            body = {"model": "simulated", "input": TEXT}
            by = []
            for _ in range(2):
                await gateway.client.post("/v1/responses", json=body)
                by.append((await gateway.get("/admin/requests"))["requests"][0]["tokenized_by"])
            assert by == ["router", "nobody"]

    run(scenario())


def test_simulated_ranks_are_workers_of_their_own() -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker(reports=False).start()
        async with running(worker) as gateway:
            await gateway.client.post("/admin/workers/drain", json={"worker": "a"})
            for rank in (0, 1):
                added = await gateway.client.post(
                    "/admin/workers", json={"url": f"{worker.url}#{rank}", "reports": "none"}
                )
                assert added.status_code == 201, added.text
            await until(lambda: sum(w.up for w in gateway.gateway.registry.workers) == 3)
            seen = set()
            for _ in range(12):
                answer = await gateway.client.post(
                    "/v1/chat/completions",
                    json={"model": "simulated", "messages": [{"role": "user", "content": "x"}]},
                    headers={"x-data-parallel-rank": "7"},
                )
                sent = worker.served("/v1/chat/completions")[-1][1]
                assert answer.headers["x-warmroute-worker"].endswith("#" + sent["x-data-parallel-rank"])
                seen.add(sent["x-data-parallel-rank"])
            assert seen == {"0", "1"}

    run(scenario())


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0"])
@pytest.mark.parametrize("framing", ["length", "chunked", "late"])
def test_simulated_offers_of_another_protocol_are_served_as_http_1(offer: str, framing: str) -> None:
    async def scenario() -> None:
        worker = await SurfaceWorker().start()
        async with running(worker) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            body = json.dumps({"model": "simulated", "input": "x"}).encode()
            head = b"POST /v1/embeddings HTTP/1.1\r\nhost: h\r\nconnection: Upgrade, HTTP2-Settings\r\n"
            head += b"upgrade: " + offer.encode() + b"\r\nhttp2-settings: AAMAAABk\r\n"
            if framing == "chunked":
                head += b"transfer-encoding: chunked\r\n\r\n"
                body = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
            else:
                head += b"content-length: %d\r\n\r\n" % len(body)
            follow = b"GET /v1/models HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
            if framing == "late":
                writer.write(head)
                await asyncio.sleep(0.05)
                writer.write(body[:5])
                await asyncio.sleep(0.05)
                writer.write(body[5:] + follow)
            else:
                writer.write(head + body + follow)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert answer.count(b"HTTP/1.1 200") == 2, answer
            _, sent, received = worker.served("/v1/embeddings")[0]
            assert json.loads(received)["input"] == "x"
            assert not {"upgrade", "http2-settings"} & sent.keys()

    run(scenario())


def test_simulated_audio_forms_pass_through_unchanged() -> None:
    async def scenario() -> None:
        first, second = SurfaceWorker(), SurfaceWorker("whisper")
        await first.start()
        await second.start()
        async with running(first, second) as gateway:
            audio = bytes(range(256)) * 4000
            for path in ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/other"):
                answer = await gateway.client.post(
                    path, data={"model": "whisper", "language": "de"}, files={"file": ("a.wav", audio, "audio/wav")}
                )
                assert answer.headers["x-warmroute-worker"] == "b"
                _, headers, body = second.served(path)[0]
                assert audio in body
                assert headers["content-type"].startswith("multipart/form-data; boundary=")
            unknown = await gateway.client.post(
                "/v1/audio/transcriptions", data={"model": "no"}, files={"file": ("a", b"x")}
            )
            assert unknown.status_code == 404
            neither = await gateway.client.post("/v1/audio/transcriptions", files={"file": ("a", b"x")})
            assert (neither.status_code, neither.json()["error"]["param"]) == (400, "model")

    run(scenario())


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/", "", "*", "/v1/responses", "/v1/responses/", "/v1/models/", "/\u00e9", "/%", "/admin"]
)
def test_odd_paths_are_served_or_refused(path: str, method: str) -> None:
    with suppress(ApiError):
        found = find(path, method)
        assert found is None or isinstance(found, Endpoint)
