import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from router.errors import InvalidRequest
from router.pool_prompts import PoolPrompts
from router.prompt_metrics import PromptState
from router.workers import Worker
from tests.router.prompt_samples import make_tokenizers

CALL = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class Stub:
    """A worker that answers /tokenize with as many ids as the request has bytes, and keeps what it was asked."""

    def __init__(self, status: int = 200) -> None:
        self.weight, self.has_tokenize, self.name, self.status = 0, True, "stub", status
        self.upstream = self
        self.asked: list[dict[str, Any]] = []

    async def fetch(self, method: str, path: str, payload: bytes, **_: float) -> Any:
        assert (method, path) == ("POST", "/tokenize")
        self.asked.append(json.loads(payload))
        return SimpleNamespace(status=self.status, body=msgspec.json.encode({"tokens": list(range(7))}))


def loaded(where: Path) -> PoolPrompts:
    prompts = PoolPrompts("m")
    asyncio.run(prompts.load(str(where), "", 0))
    return prompts


def tokenize(prompts: PoolPrompts, kind: Any, body: dict[str, Any], *workers: Stub) -> Any:
    return asyncio.run(prompts.tokenize(kind, body, lambda: [cast("Worker", worker) for worker in workers]))


@pytest.fixture
def tekken(tmp_path: Path) -> Path:
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return tmp_path


def test_a_model_with_mistrals_own_tokenizer_is_tokenized_by_its_worker(tekken: Path) -> None:
    prompts, worker = loaded(tekken), Stub()
    assert prompts.by == "worker"
    assert "mistral-common" in prompts.why_not
    found = tokenize(prompts, "chat", {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, worker)
    assert (found.by, found.prompts[0].tolist()) == ("worker", list(range(7)))
    assert "mistral-common" in found.why
    found = tokenize(prompts, "completions", {"model": "m", "prompt": "hi"}, worker)
    assert (found.by, len(found.prompts[0])) == ("worker", 7)
    assert worker.asked[1] == {"model": "m", "prompt": "hi"}


def test_call_ids_are_as_short_as_vllm_makes_them_for_mistral(tekken: Path) -> None:
    prompts, worker = loaded(tekken), Stub()
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "x", "tool_call_id": CALL["id"]},
    ]
    body = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    before = json.dumps(body)
    assert tokenize(prompts, "chat", body, worker).by == "worker"
    asked = worker.asked[0]["messages"]
    assert asked[0]["tool_calls"][0] == CALL | {"id": "123456789"}
    assert asked[1]["tool_call_id"] == "123456789"
    assert json.dumps(body) == before


def test_call_ids_of_other_models_are_left_alone(tmp_path: Path) -> None:
    prompts, worker = loaded(tmp_path), Stub()
    body = {"messages": [{"role": "tool", "content": "x", "tool_call_id": CALL["id"]}]}
    tokenize(prompts, "chat", body, worker)
    assert worker.asked[0]["messages"] == body["messages"]


@pytest.mark.parametrize("status", [400, 404, 500])
def test_where_the_worker_cannot_tell_either_nobody_does(tekken: Path, status: int) -> None:
    worker = Stub(status)
    found = tokenize(loaded(tekken), "chat", {"messages": [{"role": "user", "content": "x"}]}, worker)
    assert (found.by, found.prompts) == ("nobody", ())
    assert str(status) in found.why or "no /tokenize" in found.why
    assert worker.has_tokenize is (status != 404)
    assert tokenize(loaded(tekken), "chat", {"messages": [{"role": "user", "content": "x"}]}).by == "nobody"


def test_ids_given_need_no_tokenizer(tekken: Path) -> None:
    prompts = loaded(tekken)
    found = tokenize(prompts, "completions", {"prompt": [[1, 2], [3]]})
    assert (found.by, [ids.tolist() for ids in found.prompts]) == ("router", [[1, 2], [3]])
    with pytest.raises(InvalidRequest, match="2\\^32-1"):
        tokenize(prompts, "completions", {"prompt": [2**32]})


def test_what_tokenizing_cost_is_shown(tmp_path: Path) -> None:
    prompts = loaded(make_tokenizers(tmp_path)["bytes"])
    body = {"messages": [{"role": "user", "content": "many words " * 500}]}
    first = tokenize(prompts, "chat", body)
    again = tokenize(prompts, "chat", body)
    assert first.by == "router"
    assert first.prompts[0] == again.prompts[0]
    assert prompts.builder is not None
    figures = prompts.builder.figures()
    assert figures["tokens_remembered"] > len(first.prompts[0]) // 2
    assert figures["tokens_encoded"] + figures["tokens_remembered"] == 2 * len(first.prompts[0])
    assert figures["prompt_memory_bytes"] > 5000
    assert figures["renders_by_heart"] >= 1
    shown = {metric.name: metric.samples for metric in PromptState({"m": prompts, "n": PoolPrompts("n")}).collect()}
    assert shown["warmroute_router_tokens_encoded"][0].value == figures["tokens_encoded"]
    assert len(shown) == len(figures)
