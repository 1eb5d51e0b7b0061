"""Translations against vLLM's own conversion and renderer, without a server."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router.errors import InvalidRequest, Unrenderable
from router.prompt import PromptBuilder
from router.translate import Dialect, Translator
from tests.router.prompt_samples import TEMPLATES, make_tokenizers, random_text
from tests.router.vllm_reference import Reference, Refused

STRICT_SYSTEM = """{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{%- endif %}
{{- '<' + m.role + '>' + (m.reasoning_content or '') + (m.content or '') }}
{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if enable_thinking is defined and not enable_thinking %}<nothink>{%- endif %}
{%- if add_generation_prompt %}<assistant>{%- endif %}"""
PARTS = """{%- for m in messages %}<{{ m.role }}>{%- if m.content is string %}{{ m.content }}{%- else %}
{%- for part in m.content %}[{{ part.text }}]{%- endfor %}{%- endif %}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{%- endif %}{%- endfor %}
{%- if reasoning_effort == 'high' %}<deep>{%- endif %}{%- if add_generation_prompt %}<assistant>{%- endif %}"""
ALL_TEMPLATES = {**TEMPLATES, "strict": STRICT_SYSTEM, "parts": PARTS}


class Both:
    """The translation and vLLM's own, over one tokenizer and template."""

    def __init__(self, model: Path, template: str) -> None:
        self.builder = PromptBuilder.load(model, template, max_model_len=4096)
        self.translator = Translator(self.builder)
        self._reference = Reference(model, chat_template=template, max_model_len=4096)

    def ours(self, dialect: Dialect, body: dict[str, Any]) -> list[int] | None:
        try:
            return self.builder.chat(self.translator.chat_body(dialect, json.loads(json.dumps(body))))
        except (Unrenderable, InvalidRequest):
            return None

    def theirs(self, dialect: Dialect, body: dict[str, Any]) -> list[int] | None:
        try:
            rendered = self._messages(body) if dialect == "messages" else self._responses(body)
        except Refused:
            return None
        return rendered

    def text(self, ids: list[int] | None) -> tuple[list[int] | None, str]:
        return ids, "" if ids is None else self._reference.tokenizer.decode(ids)

    def _messages(self, body: dict[str, Any]) -> list[int]:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

        online = self._reference._online
        try:
            request = AnthropicMessagesRequest.model_validate({"model": "m", "max_tokens": 3000, **body})
            chat = Serving.to_chat_completion_request(
                request,
                merge_inline_system=Serving._should_merge_inline_system(online),
                disabled_thinking_effort=self._disabled_effort(),
            )
        except (ValueError, TypeError, AttributeError) as error:  # its validators fail on some types
            raise Refused(str(error)) from error
        chat.tool_choice = "none"  # asks for no tool parser
        return self._reference._ids(self._rendered(online.render_chat(chat)))[0]

    def _disabled_effort(self) -> Any:
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

        serving = Serving.__new__(Serving)
        serving.online_renderer = self._reference._online
        serving.model_config = self._reference._online.model_config
        return asyncio.run(serving._probe_disabled_thinking_effort())

    async def _rendered(self, rendering: Any) -> Any:
        result = await rendering
        if not isinstance(result, tuple):
            raise Refused(str(result))
        return result[1]

    def _responses(self, body: dict[str, Any]) -> list[int]:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        try:
            request = ResponsesRequest.model_validate({"model": "m", **body})
        except (ValueError, TypeError, AttributeError) as error:  # its validators fail on some types
            raise Refused(str(error)) from error

        async def rendered() -> Any:
            result = await self._reference._online.render_responses(request)
            if not hasattr(result, "engine_input"):
                raise Refused(str(result))
            return [result.engine_input]

        return self._reference._ids(rendered())[0]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("translate"))


@pytest.fixture(scope="module")
def made() -> dict[str, Both]:
    return {}


@pytest.fixture(params=ALL_TEMPLATES)
def both(request: pytest.FixtureRequest, vllm: None, kinds: dict[str, Path], made: dict[str, Both]) -> Both:
    del vllm
    if request.param not in made:
        made[request.param] = Both(kinds["bytes-split"], ALL_TEMPLATES[request.param])
    return made[request.param]


TOOL = {
    "name": "weather",
    "description": "Weather <now> in °C",
    "input_schema": {"properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich", "days": [1, 2.5, None]}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "21 °C"}]}
USER = {"role": "user", "content": "How warm is it?"}

MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "system": {"system": "Be brief.", "messages": [USER]},
    "system blocks": {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc=1"},
            {"type": "text", "text": "You are terse.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "\nAlways."},
        ],
        "messages": [USER],
    },
    "billing header in a string": {"system": "x-anthropic-billing-header: a\nrest", "messages": [USER]},
    "later system": {
        "system": "First.",
        "messages": [USER, {"role": "assistant", "content": "Warm."}, {"role": "system", "content": "Mind."}, USER],
    },
    "only later system": {
        "messages": [USER, {"role": "system", "content": [{"type": "text", "text": "Mind."}]}, USER],
    },
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b "}]}]
    },
    "one part": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    "empty part": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}]}]
    },
    "tools": {"messages": [USER], "tools": [TOOL]},
    "tool call": {
        "messages": [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}],
        "tools": [TOOL],
    },
    "tool call with words": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Look it up.", "signature": "s"},
                    {"type": "text", "text": "Let me see."},
                    CALL,
                ],
            },
            {"role": "user", "content": [RESULT, {"type": "text", "text": "And tomorrow?"}]},
        ],
        "tools": [{**TOOL, "strict": True}],
    },
    "string result": {
        "messages": [
            USER,
            {"role": "assistant", "content": [CALL]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "no"}]},
        ]
    },
    "redacted": {
        "messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER]
    },
    "thinking disabled": {"messages": [USER], "thinking": {"type": "disabled"}},
    "thinking enabled": {"messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 2048}},
    "effort": {"messages": [USER], "output_config": {"effort": "high"}},
    "effort and disabled": {
        "messages": [USER],
        "output_config": {"effort": "high"},
        "thinking": {"type": "disabled"},
    },
    "template arguments": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
}
FUNCTION = {
    "type": "function",
    "name": "weather",
    "description": "Weather <now>",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
RESPONSES: dict[str, dict[str, Any]] = {
    "text": {"input": "How warm is it?"},
    "instructions": {"input": "Hi", "instructions": "Be brief."},
    "empty instructions": {"input": "Hi", "instructions": ""},
    "items": {
        "input": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"role": "assistant", "content": "Warm."},
            {"type": "message", "role": "user", "content": "And now?"},
        ]
    },
    "own output": {
        "input": [
            USER,
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Warm.", "annotations": []}],
            },
            USER,
        ]
    },
    "tool call": {
        "input": [
            USER,
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Zürich"}'},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}", "namespace": "sky"},
            {"type": "function_call_output", "call_id": "c1", "output": "21 °C"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "blue"}]},
        ],
        "tools": [FUNCTION],
    },
    "custom call": {
        "input": [
            USER,
            {"type": "custom_tool_call", "call_id": "c1", "name": "sh", "input": 'echo "é"'},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "é"},
        ]
    },
    "unfinished": {
        "input": [
            USER,
            {
                "type": "message",
                "role": "assistant",
                "status": "incomplete",
                "content": [{"type": "output_text", "text": "It is"}],
            },
        ]
    },
    "system and words": {"input": [{"role": "system", "content": "Terse."}, USER], "instructions": "Kind."},
    "effort": {"input": "Hi", "reasoning": {"effort": "high"}},
    "no effort": {"input": "Hi", "reasoning": {"effort": "none"}},
    "truncated": {"input": "word " * 6000, "truncation": "auto"},
    "truncated with room": {"input": "word " * 6000, "truncation": "auto", "max_output_tokens": 40},
    "template arguments": {"input": "Hi", "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_become_the_same_prompt(both: Both, name: str) -> None:
    ours, theirs = both.ours("messages", MESSAGES[name]), both.theirs("messages", MESSAGES[name])
    assert both.text(ours) == both.text(theirs)


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_become_the_same_prompt(both: Both, name: str) -> None:
    ours, theirs = both.ours("responses", RESPONSES[name]), both.theirs("responses", RESPONSES[name])
    assert both.text(ours) == both.text(theirs)


def random_blocks(rng: random.Random, role: str) -> Any:
    if rng.random() < 0.4:
        return random_text(rng, 20)
    return [rng.choice(_BLOCKS[role])(rng) for _ in range(rng.randrange(4))]


def text_block(rng: random.Random) -> dict[str, Any]:
    return {"type": "text", "text": random_text(rng, 12), **rng.choice([{}, {"cache_control": {"type": "ephemeral"}}])}


def result_block(rng: random.Random) -> dict[str, Any]:
    content = rng.choice([None, random_text(rng, 10), [], [text_block(rng) for _ in range(2)], [{"type": "image"}]])
    return {"type": "tool_result", "tool_use_id": rng.choice(["toolu_1", "x"]), "content": content, "is_error": False}


def call_block(rng: random.Random) -> dict[str, Any]:
    given = rng.choice([{}, {"a": random_text(rng, 5)}, {"z": [1, 2.5, None, {"é": True}], "b": 1e300}])
    return {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": given}


_BLOCKS: dict[str, list[Any]] = {
    "user": [text_block, text_block, result_block],
    "assistant": [text_block, call_block, lambda rng: {"type": "thinking", "thinking": random_text(rng, 8)}],
    "system": [text_block, lambda _: {"type": "text", "text": "x-anthropic-billing-header: 1"}],
}
_ODD: list[Any] = [None, "", 0, 1.5, True, [], {}, [{}], {"type": "text"}, [1], "x-anthropic-billing-header: a\nb"]


def random_messages(rng: random.Random) -> dict[str, Any]:
    roles = [rng.choice(["user", "assistant", "user", "assistant", "system"]) for _ in range(rng.randrange(1, 6))]
    body: dict[str, Any] = {"messages": [{"role": role, "content": random_blocks(rng, role)} for role in roles]}
    if rng.random() < 0.4:
        body["system"] = random_blocks(rng, "system")
    if rng.random() < 0.3:
        body["tools"] = [TOOL, {**TOOL, "name": "b", **rng.choice([{}, {"strict": False}, {"defer_loading": True}])}]
    if rng.random() < 0.2:
        body["thinking"] = rng.choice([{"type": "disabled"}, {"type": "adaptive"}])
    if rng.random() < 0.2:
        body["output_config"] = {"effort": rng.choice(["low", "max", None])}
    return body


def random_items(rng: random.Random) -> dict[str, Any]:
    items = [rng.choice(_ITEMS)(rng) for _ in range(rng.randrange(1, 6))]
    body: dict[str, Any] = {"input": rng.choice([items, items, items, random_text(rng, 30)])}
    if rng.random() < 0.3:
        body["instructions"] = random_text(rng, 10)
    if rng.random() < 0.3:
        body["tools"] = [FUNCTION, {"type": "function", "name": "b", "defer_loading": True, "parameters": None}]
    if rng.random() < 0.2:
        body["reasoning"] = rng.choice([{}, {"effort": "low"}, {"effort": None, "summary": "auto"}])
    return body


def input_texts(rng: random.Random) -> Any:
    return rng.choice([random_text(rng, 15), [{"type": "input_text", "text": random_text(rng, 9)} for _ in range(2)]])


_ITEMS: list[Any] = [
    lambda rng: {"role": rng.choice(["user", "system", "developer"]), "content": input_texts(rng)},
    lambda rng: {"type": "message", "role": "user", "content": input_texts(rng), "status": "completed"},
    lambda rng: {"role": "assistant", "content": random_text(rng, 9)},
    lambda rng: {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": random_text(rng, 9)} for _ in range(rng.randrange(1, 3))],
        **rng.choice([{}, {"id": "m", "status": "in_progress"}]),
    },
    lambda rng: {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": random_text(rng, 5)}],
    },
    lambda rng: {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": random_text(rng, 5)}]},
    lambda rng: {
        "type": "function_call",
        "call_id": "c",
        "name": "f",
        "arguments": rng.choice(['{"b":1,"a":2}', "", "x"]),
    },
    lambda rng: {"type": "function_call_output", "call_id": "c", "output": input_texts(rng)},
    lambda rng: {"type": "custom_tool_call", "call_id": "c", "name": "sh", "input": random_text(rng, 5)},
]


def spoilt(rng: random.Random, value: Any) -> Any:
    """A copy with one member somewhere replaced by something else, dropped or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: spoilt(rng, value[key])} if rng.random() < 0.8 else {**value, key: rng.choice(_ODD)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], spoilt(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_ODD)


@pytest.mark.parametrize("dialect", ["messages", "responses"])
def test_random_bodies_become_the_same_prompt_or_none(both: Both, dialect: Dialect, request: Any) -> None:
    rng, seen = random.Random(request.node.name), Counter[str]()
    make = random_messages if dialect == "messages" else random_items
    for number in range(40):
        body = make(rng)
        if number % 3 == 0:
            key = rng.choice(list(body))
            body[key] = spoilt(rng, body[key])
        ours, theirs = both.ours(dialect, body), both.theirs(dialect, body)
        # What a worker refuses by its types it refuses with ids in it too.
        if ours is not None and (theirs is not None or number % 3):
            assert both.text(ours) == both.text(theirs), body
        seen["equal" if ours == theirs else "left" if ours is None else "refused"] += 1
    print(dict(seen))
    assert seen["equal"] > 10


def test_what_the_worker_alone_knows_is_left_to_it() -> None:
    class AnyModel:
        def render(self, body: dict[str, Any]) -> str:
            return str(body)

        def template_source(self, *, with_tools: bool) -> str:
            return f"{with_tools}"

    translator = Translator(AnyModel())
    image = {"type": "image", "source": {"type": "base64", "data": "x"}}
    left: list[tuple[Dialect, dict[str, Any]]] = [
        ("messages", {"messages": [{"role": "user", "content": [image]}]}),
        ("messages", {"messages": [{"role": "user", "content": [{**RESULT, "content": [image]}]}]}),
        ("messages", {"messages": [{"role": "assistant", "content": [{**CALL, "id": None}]}]}),
        ("messages", {"messages": [USER], "tools": []}),
        ("messages", {"messages": [USER], "tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("messages", {"messages": [{"role": "system", "content": [{"type": "tool_removal"}]}]}),
        ("messages", {"messages": "x"}),
        ("responses", {"input": "x", "previous_response_id": "resp_1"}),
        ("responses", {"input": "x", "prompt": {"id": "p"}}),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("responses", {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}),
        ("responses", {}),
    ]
    for dialect, body in left:
        with pytest.raises(Unrenderable):
            translator.chat_body(dialect, body)
