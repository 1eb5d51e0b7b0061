"""Every kind of request on real engines, through the real gateway: what is predicted is what happens."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.test_fleet import words
from tests.support.engine import Engine, start_engine, wait_ready
from tests.support.gateway import Gateway, serve_gateway

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNK = 64
FLAGS = ("--dtype", "float32", "--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
KEEPING = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
LONG = words("surface", 400)
TOOL = {
    "name": "weather",
    "description": "Weather <now> in °C",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich", "days": [1, 2.5, None]}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "21 °C"}]}

MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "user", "content": LONG}]},
    "system": {
        "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "S. " + LONG}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "T. " + LONG},
            {"role": "assistant", "content": [{"type": "text", "text": "See."}, CALL]},
            {"role": "user", "content": [RESULT, {"type": "text", "text": "And tomorrow?"}]},
        ],
        "tools": [TOOL],
    },
    "later system": {
        "messages": [
            {"role": "user", "content": "L. " + LONG},
            {"role": "assistant", "content": "Yes."},
            {"role": "system", "content": "Mind."},
            {"role": "user", "content": "Go on."},
        ]
    },
    "thinking": {"messages": [{"role": "user", "content": "D. " + LONG}], "thinking": {"type": "disabled"}},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "text": {"input": "R. " + LONG},
    "instructions": {"input": "Hi", "instructions": "I. " + LONG},
    "items": {
        "input": [
            {"role": "developer", "content": "V. " + LONG},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"role": "assistant", "content": "Warm."},
            {"role": "user", "content": "And now?"},
        ]
    },
    "tools": {
        "input": [
            {"role": "user", "content": "F. " + LONG},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Zürich"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "21 °C"},
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": TOOL["input_schema"]}],
    },
    "effort": {"input": "E. " + LONG, "reasoning": {"effort": "low"}},
}


@dataclass
class Surface:
    engines: dict[str, Engine]
    plain: Gateway
    """Sends bodies as they came, so that what workers count is their own."""
    forwarding: Gateway
    """Sends token ids along."""


@pytest.fixture(scope="module")
def surface(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    workspace: Path = tmp_path_factory.mktemp("surface")
    connector = {"chunk_size": CHUNK}
    with (
        start_engine(small_model, workspace, connector=connector, flags=FLAGS, environment=KEEPING) as a,
        start_engine(small_model, workspace, connector=connector, flags=FLAGS, environment=KEEPING) as b,
    ):
        engines = {"a": a, "b": b}
        flags = ["--tokenizer", small_model]
        for name, engine in engines.items():
            wait_ready(engine)
            flags += ["--worker", f"{engine.url},reports={engine.reports},name={name}"]
            engine.post("/v1/completions", {"model": "small", "prompt": "warm up " * 300, "max_tokens": 2})
        with (
            serve_gateway(workspace / "1", [*flags, "--no-forward-token-ids"]) as plain,
            serve_gateway(workspace / "2", flags) as forwarding,
        ):
            for gateway in (plain, forwarding):
                gateway.wait_for(
                    "/admin/workers",
                    lambda seen: all(
                        w["cache_source"] == "connector" and w["tokenization"]["parity"] == "exact"
                        for w in seen["workers"]
                    ),
                )
            forwarding.wait_for(
                "/admin/workers", lambda seen: all(w["tokenization"]["takes_token_ids"] for w in seen["workers"])
            )
            yield Surface(engines, plain, forwarding)


def post(gateway: Gateway, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = httpx.post(gateway.url + path, json={"model": "small", **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def at_once(gateway: Gateway, path: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Their load spreads them over the workers, where one after another chance would."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: post(gateway, path, body), bodies))


def decided(gateway: Gateway, answer: httpx.Response) -> dict[str, Any]:
    """What is on record of a request, once its outcome is."""
    identifier = answer.headers["x-request-id"]
    found = gateway.wait_for(
        f"/admin/requests?id={identifier}",
        lambda seen: seen["requests"] and seen["requests"][0]["outcome"] != "running",
    )
    return dict(found["requests"][0])


def settled(gateway: Gateway, worker: str) -> None:
    """Wait until the worker's reports have been quiet: what the last request left is known."""
    before = -1
    while (now := gateway.get("/admin/index")["workers"][worker]["chunks"]) != before:
        before = now
        httpx.get(gateway.url + "/health")
        time.sleep(0.3)


def check_twice(gateway: Gateway, path: str, body: dict[str, Any], counted: Any) -> None:
    first = post(gateway, path, body)
    record = decided(gateway, first)
    assert record["tokenized_by"] == "router", record
    assert record["prompt_tokens"] == counted(first.json()["usage"])
    settled(gateway, record["worker"])
    second = post(gateway, path, body)
    again = decided(gateway, second)
    assert again["worker"] == record["worker"]
    assert again["predicted_hit_tokens"] >= (record["prompt_tokens"] - 1) // CHUNK * CHUNK - CHUNK > 0
    actual = again["cached_tokens"] if again["actual_hit_tokens"] is None else sum(again["actual_hit_tokens"].values())
    assert 0 <= actual - again["predicted_hit_tokens"] < 2 * CHUNK, again


def messages_tokens(usage: dict[str, Any]) -> int:
    members = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(usage.get(member) or 0 for member in members)


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("ids", [False, True])
def test_messages(surface: Surface, name: str, ids: bool) -> None:
    gateway = surface.forwarding if ids else surface.plain
    body = {"max_tokens": 4, "temperature": 0, **MESSAGES[name]}
    check_twice(gateway, "/v1/messages", body, messages_tokens)


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("ids", [False, True])
def test_responses(surface: Surface, name: str, ids: bool) -> None:
    gateway = surface.forwarding if ids else surface.plain
    body = {"max_output_tokens": 4, "temperature": 0, **RESPONSES[name]}
    check_twice(gateway, "/v1/responses", body, lambda usage: usage["input_tokens"])


def test_answers_are_those_of_the_worker_itself(surface: Surface) -> None:
    for path, body in (
        ("/v1/messages", {"max_tokens": 8, "temperature": 0, **MESSAGES["tools"]}),
        ("/v1/responses", {"max_output_tokens": 8, "temperature": 0, **RESPONSES["tools"]}),
    ):
        own = surface.engines["a"].post(path, {"model": "small", **body}).raise_for_status().json()
        for gateway in (surface.plain, surface.forwarding):
            routed = post(gateway, path, body).json()
            assert texts(routed) == texts(own)


def texts(answer: dict[str, Any]) -> list[str]:
    parts = answer.get("content") or [part for item in answer["output"] for part in item["content"]]
    return [part["text"] for part in parts]


def test_dialects_share_what_they_have_in_common(surface: Surface) -> None:
    chat = [{"role": "user", "content": "X. " + words("shared", 300)}]
    first = post(surface.plain, "/v1/chat/completions", {"messages": chat, "max_tokens": 2})
    settled(surface.plain, first.headers["x-warmroute-worker"])
    second = post(surface.plain, "/v1/messages", {"messages": chat, "max_tokens": 2})
    assert second.headers["x-warmroute-worker"] == first.headers["x-warmroute-worker"]
    assert int(second.headers["x-warmroute-hit-tokens"]) >= 3 * CHUNK
    assert decided(surface.plain, second)["actual_hit_tokens"]


def test_counting_tokens(surface: Surface) -> None:
    body = MESSAGES["tools"]
    counted = post(surface.plain, "/v1/messages/count_tokens", body).json()["input_tokens"]
    explained = httpx.post(
        surface.plain.url + "/admin/route?endpoint=messages", json={"model": "small", **body}, timeout=30
    ).json()
    assert explained["prompt_tokens"] == counted


def test_generate_by_ids(surface: Surface) -> None:
    ids = surface.engines["a"].post("/tokenize", {"model": "small", "prompt": "G. " + LONG}).json()["tokens"]
    body = {"token_ids": ids, "sampling_params": {"max_tokens": 3, "temperature": 0}}
    first = post(surface.plain, "/inference/v1/generate", body)
    record = decided(surface.plain, first)
    assert record["prompt_tokens"] == len(ids)
    settled(surface.plain, record["worker"])
    again = decided(surface.plain, post(surface.plain, "/inference/v1/generate", body))
    assert again["worker"] == record["worker"]
    assert again["predicted_hit_tokens"] >= len(ids) // CHUNK * CHUNK - CHUNK
    assert again["actual_hit_tokens"] is not None
    assert 0 <= sum(again["actual_hit_tokens"].values()) - again["predicted_hit_tokens"] < 2 * CHUNK


def test_stored_responses_are_found_by_any_gateway(surface: Surface) -> None:
    bodies = [{"input": f"{number} " + LONG, "max_output_tokens": 2} for number in range(10)]
    made = at_once(surface.plain, "/v1/responses", bodies)
    assert {answer.headers["x-warmroute-worker"] for answer in made} == {"a", "b"}
    for answer in made:
        identifier, worker = answer.json()["id"], answer.headers["x-warmroute-worker"]
        for gateway in (surface.plain, surface.forwarding):
            kept = httpx.get(f"{gateway.url}/v1/responses/{identifier}", timeout=30)
            assert (kept.status_code, kept.json()["id"]) == (200, identifier)
            assert kept.headers["x-warmroute-worker"] == worker
            follow = {"input": "Go on.", "previous_response_id": identifier, "max_output_tokens": 2}
            assert post(gateway, "/v1/responses", follow).headers["x-warmroute-worker"] == worker
    lost = httpx.get(f"{surface.plain.url}/v1/responses/resp_nobody", timeout=30)
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "response_not_found")


def test_streams(surface: Surface) -> None:
    client = OpenAI(base_url=surface.forwarding.url + "/v1", api_key="none", max_retries=0, timeout=120)
    events = list(client.responses.create(model="small", input="S. " + LONG, max_output_tokens=5, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    identifier = events[0].response.id  # type: ignore[union-attr]
    assert client.responses.retrieve(identifier).id == identifier
    body = {"model": "small", "max_tokens": 5, "stream": True, **MESSAGES["plain"]}
    lines = httpx.post(surface.forwarding.url + "/v1/messages", json=body, timeout=120).text.splitlines()
    kinds = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: {")]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_a_background_response_is_polled_and_cancelled(surface: Surface) -> None:
    client = OpenAI(base_url=surface.plain.url + "/v1", api_key="none", max_retries=0, timeout=120)
    for _ in range(5):  # a random model may end its answer before it can be cancelled
        made = client.responses.create(model="small", input="B. " + LONG, max_output_tokens=3000, background=True)
        assert made.status == "queued"
        with suppress(BadRequestError):
            assert client.responses.cancel(made.id).status == "cancelled"
            return
    pytest.fail("five answers were over at once")


def test_other_paths(surface: Surface) -> None:
    text = post(surface.plain, "/tokenize", {"prompt": "hello"}).json()
    assert post(surface.plain, "/detokenize", {"tokens": text["tokens"]}).json()["prompt"].endswith("hello")
    rendered = post(surface.plain, "/v1/responses/render", {"input": "hi"}).json()
    assert rendered["token_ids"]
    for path in ("/reset_prefix_cache", "/sleep", "/collective_rpc", "/v1/load_lora_adapter"):
        assert httpx.post(surface.plain.url + path, json={}).status_code == 404
    assert httpx.get(surface.plain.url + "/tokenizer_info").status_code == 404  # the worker's own answer


def test_dialects_were_trusted_throughout(surface: Surface) -> None:
    for gateway in (surface.plain, surface.forwarding):
        metrics = httpx.get(gateway.url + "/metrics", timeout=10).text
        different = [
            line
            for line in metrics.splitlines()
            if line.startswith("warmroute_router_token_counts_total{") and 'result="different"' in line
        ]
        assert all(line.endswith(" 0.0") for line in different), different
        log = gateway.log.read_text()
        assert "requests of small are routed by load" not in log


@dataclass
class Others:
    """Engines of other kinds, each behind a gateway of its own."""

    embedding: Gateway
    ranks: Gateway


@pytest.fixture(scope="module")
def others(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Others]:
    """Started side by side: most of a start keeps one core busy."""
    workspace: Path = tmp_path_factory.mktemp("others")
    pooling = ("--dtype", "float32", "--runner", "pooling", "--convert", "embed")
    parallel = ("--dtype", "float32", "--data-parallel-size", "2")
    with (
        start_engine(small_model, workspace / "e", connector=None, flags=pooling, name="embedder") as embedder,
        start_engine(
            small_model,
            workspace / "r",
            connector={"chunk_size": CHUNK},
            flags=parallel,
            reports_port=two_free_ports(),
        ) as both,
    ):
        wait_ready(embedder)
        wait_ready(both)
        ranks_flags = ["--worker", f"{both.url},reports={both.reports},name=e,dp=2", "--tokenizer", small_model]
        with (
            serve_gateway(workspace / "e", ["--worker", f"{embedder.url},reports=none,name=e"]) as embedding,
            serve_gateway(workspace / "r", ranks_flags) as ranks,
        ):
            ranks.wait_for(
                "/admin/workers", lambda seen: all(w["cache_source"] == "connector" for w in seen["workers"])
            )
            yield Others(embedding, ranks)


def test_pooling_endpoints(others: Others) -> None:
    embedding = others.embedding

    def answered(path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(embedding.url + path, json={"model": "embedder", **body}, timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.headers["x-warmroute-worker"] == "e"
        return dict(answer.json())

    client = OpenAI(base_url=embedding.url + "/v1", api_key="none", max_retries=0, timeout=60)
    assert len(client.embeddings.create(model="embedder", input=["a", "b"]).data) == 2
    assert answered("/pooling", input="a")["data"]
    assert answered("/score", queries="a", documents=["b", "c"])["data"]
    assert answered("/v1/score", queries="a", documents=["b"])["data"]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert len(answered(path, query="a", documents=["b", "c"])["results"]) == 2
    assert answered("/v2/embed", texts=["a"], embedding_types=["float"])["embeddings"]


def two_free_ports() -> int:
    """The first of two ports in a row on which nobody listens."""
    for first in range(21_000, 29_000, 7):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", first))
                other.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first
    raise AssertionError("no two ports in a row are free")


def test_data_parallel_ranks_are_told_apart(others: Others) -> None:
    ranks = others.ranks
    chats = [[{"role": "user", "content": f"{number} " + LONG}] for number in range(6)]
    first = at_once(ranks, "/v1/chat/completions", [{"messages": chat, "max_tokens": 2} for chat in chats])
    assert {answer.headers["x-warmroute-worker"] for answer in first} == {"e#0", "e#1"}
    for worker in ("e#0", "e#1"):
        settled(ranks, worker)
    for chat, before in zip(chats, first, strict=True):
        again = post(ranks, "/v1/chat/completions", {"messages": chat, "max_tokens": 2})
        assert again.headers["x-warmroute-worker"] == before.headers["x-warmroute-worker"]
        record = decided(ranks, again)
        assert record["predicted_hit_tokens"] >= 3 * CHUNK
        assert 0 <= sum(record["actual_hit_tokens"].values()) - record["predicted_hit_tokens"] < 2 * CHUNK
    answer = post(ranks, "/v1/responses", {"input": LONG, "max_output_tokens": 2})
    assert decided(ranks, answer)["tokenized_by"] == "nobody"
