"""Prompts built here against a real worker: its /tokenize, and what it does with ids that travel with the request."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.errors import InvalidRequest, Unrenderable
from router.parity import check_parity, probes
from router.prompt import PromptBuilder, splice_token_ids, tokenize_request
from router.splice import without_messages
from tests.router.prompt_samples import random_chat, random_text
from tests.support.engine import Engine

pytestmark = pytest.mark.engine

CHATS = 300


@pytest.fixture(scope="module")
def engine(small_engine: Engine) -> Engine:
    return small_engine


@pytest.fixture(scope="module")
def builder(small_model: str) -> PromptBuilder:
    return PromptBuilder.load(small_model, max_model_len=32_768)


def tokens(engine: Engine, body: dict[str, Any]) -> list[int] | None:
    response = engine.post("/tokenize", body)
    return response.json()["tokens"] if response.status_code == 200 else None


def test_parity_check_passes(engine: Engine, builder: PromptBuilder) -> None:
    async def tokenize(body: dict[str, Any]) -> list[int]:
        async with httpx.AsyncClient(base_url=engine.url, timeout=60) as client:
            response = await client.post("/tokenize", json=body)
        if response.status_code != 200:
            raise InvalidRequest(response.text)
        ids: list[int] = response.json()["tokens"]
        return ids

    result = asyncio.run(check_parity(builder, tokenize))
    assert result.ok, result.mismatch
    assert result.compared == len(list(probes())) - result.skipped > 30


def test_random_chats_equal_tokenize(engine: Engine, builder: PromptBuilder) -> None:
    rng, seen = random.Random(2024), Counter[str]()
    for _ in range(CHATS):
        body = random_chat(rng)
        try:
            ours: list[int] | None = builder.chat(json.loads(json.dumps(body)))
        except (Unrenderable, InvalidRequest):
            ours = None
        theirs = tokens(engine, tokenize_request(body, "chat"))
        if ours is not None:
            assert ours == theirs, body
        seen["equal" if ours is not None else "refused" if theirs is None else "left"] += 1
    print(dict(seen))
    assert seen["equal"] > CHATS // 2


def test_random_prompts_equal_tokenize(engine: Engine, builder: PromptBuilder) -> None:
    rng = random.Random(7)
    for _ in range(100):
        body = {"prompt": random_text(rng, 40) + "x", "add_special_tokens": rng.random() < 0.5}
        assert builder.completion(body) == [tokens(engine, tokenize_request(body, "completions"))], body


def answer(engine: Engine, path: str, raw: bytes) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    response = httpx.post(engine.url + path, content=raw, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_chats_carry_their_ids(engine: Engine, builder: PromptBuilder) -> None:
    settings = {"model": "small", "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    for name, kind, body in probes():
        if kind == "completions" or "reasoning_effort" in body or "tools" in body:
            continue
        raw = json.dumps({**settings, **body}, ensure_ascii=False).encode()
        ids = builder.chat(body)
        plain = answer(engine, "/v1/chat/completions", raw)
        carried = answer(engine, "/v1/chat/completions", splice_token_ids(raw, ids, "chat"))
        assert plain["prompt_token_ids"] == carried["prompt_token_ids"] == ids, name
        assert plain["choices"][0]["token_ids"] == carried["choices"][0]["token_ids"], name
        assert plain["choices"][0]["message"] == carried["choices"][0]["message"], name


def test_a_conversation_that_grows_is_tokenized_as_the_worker_does(engine: Engine, builder: PromptBuilder) -> None:
    async def both(body: dict[str, Any]) -> None:
        ids = await builder.chat_async(body)
        assert ids.tolist() == tokens(engine, tokenize_request(body, "chat"))

    rng, messages = random.Random(9), [{"role": "system", "content": "word\nWord é " * 600}]
    for turn in range(12):
        messages += [{"role": ("user", "assistant")[turn % 2], "content": random_text(rng, 60)}]
        asyncio.run(both({"messages": messages}))
    assert builder.figures()["tokens_remembered"] > 10_000


def test_chats_go_without_their_messages(engine: Engine, builder: PromptBuilder) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é 中文 <|im_end|> 2+2?"}]
    for extra in ({}, {"n": 2, "seed": 5, "temperature": 0.8}, {"logprobs": True, "top_logprobs": 2, "stop": ["zz"]}):
        body = {"model": "small", "max_tokens": 6, "temperature": 0, "messages": talk, **extra}
        lean = without_messages(body, [json.dumps(builder.chat(body)).encode()])
        assert lean is not None
        plain = answer(engine, "/v1/chat/completions", json.dumps(body).encode())
        carried = answer(engine, "/v1/chat/completions", lean)
        assert plain["choices"] == carried["choices"], extra
        assert plain["usage"]["prompt_tokens"] == carried["usage"]["prompt_tokens"]


def test_carried_ids_are_the_ones_used(engine: Engine) -> None:
    body = b'{"model":"small","max_tokens":1,"return_token_ids":true,"messages":[{"role":"user","content":"x"}]}'
    result = answer(engine, "/v1/chat/completions", splice_token_ids(body, [5, 6, 7], "chat"))
    assert result["prompt_token_ids"] == [5, 6, 7]


def test_completions_carry_their_ids(engine: Engine, builder: PromptBuilder) -> None:
    settings = {"model": "small", "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    texts = ["The quick brown fox", "naïve 中文 👩‍👩‍👧‍👦", "<|im_start|>user\n"]
    for body in (
        {"prompt": texts[0]},
        {"prompt": texts},
        {"prompt": texts[1], "truncate_prompt_tokens": 5},
        {"prompt": texts[1], "truncate_prompt_tokens": 5, "truncation_side": "right"},
        {"prompt": [[5, 6, 7, 8], [9, 10]], "truncate_prompt_tokens": 3},
        {"prompt": [5, 6, 7]},
    ):
        raw = json.dumps({**settings, **body}).encode()
        ids = builder.completion(body)
        plain = answer(engine, "/v1/completions", raw)
        carried = answer(engine, "/v1/completions", splice_token_ids(raw, ids, "completions"))
        for result in (plain, carried):
            assert [choice["prompt_token_ids"] for choice in result["choices"]] == ids, body
        assert [c["text"] for c in plain["choices"]] == [c["text"] for c in carried["choices"]], body


def test_a_different_models_builder_is_found_out(engine: Engine, small_model: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((Path(small_model) / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")

    async def tokenize(body: dict[str, Any]) -> list[int]:
        found = await asyncio.to_thread(tokens, engine, body)
        if found is None:
            raise InvalidRequest("refused")
        return found

    result = asyncio.run(check_parity(PromptBuilder.load(tmp_path), tokenize))
    assert result.mismatch is not None
    assert result.mismatch.probe.startswith("chat/")
