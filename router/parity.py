"""Checks a PromptBuilder against a worker's own /tokenize, probe by probe."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from router.errors import InvalidRequest, Unrenderable
from router.prompt import PromptBuilder, tokenize_request
from router.splice import Kind

Tokenize = Callable[[dict[str, Any]], Awaitable[list[int]]]
_CONTEXT = 4


@dataclass(frozen=True)
class Mismatch:
    """Where the first difference is. ``ours`` and ``theirs`` are the ids around ``position``, None where refused."""

    probe: str
    position: int
    ours: list[int] | None
    theirs: list[int] | None

    def __str__(self) -> str:
        return f"probe {self.probe!r}, token {self.position}: here {self.ours}, worker {self.theirs}"


@dataclass(frozen=True)
class Parity:
    """``compared`` probes gave ids on both sides; ``skipped`` ones were left to the worker or refused by both."""

    compared: int
    skipped: int
    mismatch: Mismatch | None = None

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.mismatch is None


async def check_parity(builder: PromptBuilder, tokenize: Tokenize) -> Parity:
    """Run the fixed probes one after another and stop at the first that differs.

    ``tokenize`` posts a body to the worker's /tokenize and returns the ids; it raises InvalidRequest when the worker
    answers 4xx, and whatever else it raises ends the check. A probe only the worker refuses is a mismatch: ids sent in
    its place would make it answer what it should refuse.
    """
    compared = skipped = 0
    for name, kind, body in probes():
        ours = _ours(builder, kind, body)
        if ours is None:
            skipped += 1
            continue
        try:
            theirs: list[int] | None = await tokenize(tokenize_request(body, kind))
        except InvalidRequest:
            theirs = None
        if ours != theirs:
            return Parity(compared, skipped, _difference(name, ours, theirs))
        compared += 1
    return Parity(compared, skipped)


def _ours(builder: PromptBuilder, kind: Kind, body: dict[str, Any]) -> list[int] | None:
    try:
        return builder.chat(body) if kind == "chat" else builder.completion(body)[0]
    except Unrenderable:
        return None


def _difference(name: str, ours: list[int], theirs: list[int] | None) -> Mismatch:
    if theirs is None:
        return Mismatch(name, 0, ours[:_CONTEXT], None)
    pairs = zip(ours, theirs, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
    around = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return Mismatch(name, at, ours[around], theirs[around])


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <now> & later, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_01",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "days": [1, 2.5, null]}'},
        }
    ],
}
_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "  4, of course.\n"},
    {"role": "user", "content": "And\ttimes ten?  "},
]
_TEXTS = {
    "plain": "The quick brown fox jumps over 13 lazy dogs.",
    "spaces": "  a  b\n\n\n c\t\td   \r\n ",
    "unicode": "naïve e\u0301 Ångström 中文 日本語 한국어 العربية हिन्दी ไทย 👩‍👩‍👧‍👦 🇨🇭 \u200b\ufeff\u2028",
    "code": "for i in range(10):\n    print(f'{i:>3}')  # 0x1F\n\t}\n",
    "numbers": "3.14159 1e-9 1_000_000 2024-01-02 ①②③ ½",
    "markup": "<s>[INST] </s><|im_start|>user<|im_end|><|endoftext|><bos>{{ x }}{% y %}",
    "rare": "\x00\x01\x7f \U0001f9ea \U0010fffd \ue000 ﬁ ﷽",
    "long": "lorem ipsum dolor sit amet, " * 40,
}


def probes() -> Iterator[tuple[str, Kind, dict[str, Any]]]:
    """Name, endpoint and body of every probe, always the same ones in the same order."""
    for name, text in _TEXTS.items():
        yield f"completion/{name}", "completions", {"prompt": text}
        yield f"chat/{name}", "chat", {"messages": [{"role": "user", "content": text}]}
    yield "completion/bare", "completions", {"prompt": _TEXTS["plain"], "add_special_tokens": False}
    for name, messages, extra in _conversations():
        yield f"chat/{name}", "chat", {"messages": messages, **extra}


def _conversations() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    system = {"role": "system", "content": "You are terse.\nAlways."}
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": ""}, {"type": "text", "text": " second "}]
    thought = {"role": "assistant", "content": "Four.", "reasoning_content": "2+2 is 4."}
    answer = {"role": "tool", "tool_call_id": "call_01", "content": '{"temp": 21.5, "sky": "☀"}'}
    yield "turns", _TURNS, {}
    yield "system", [system, *_TURNS], {}
    yield "developer", [{"role": "developer", "content": "Be kind."}, *_TURNS], {}
    yield "parts", [{"role": "user", "content": parts}], {}
    yield "system parts", [{"role": "system", "content": parts}, *_TURNS], {}
    yield "empty", [{"role": "user", "content": ""}], {}
    yield "name", [{"role": "user", "content": "hi", "name": "alice"}], {}
    yield "tools", _TURNS, {"tools": _TOOLS}
    yield "tool call", [_TURNS[0], _CALL, answer, _TURNS[2]], {"tools": _TOOLS}
    yield "tool call, no tools", [_TURNS[0], _CALL, answer], {}
    yield "tool parts", [_TURNS[0], _CALL, {**answer, "content": parts}], {"tools": _TOOLS}
    yield "reasoning", [_TURNS[0], thought, _TURNS[2]], {}
    yield "no generation prompt", _TURNS, {"add_generation_prompt": False}
    resume = {"add_generation_prompt": False, "continue_final_message": True}
    yield "continue", _TURNS[:2], resume
    yield "continue parts", [_TURNS[0], {"role": "assistant", "content": parts}], resume
    yield "thinking off", _TURNS, {"chat_template_kwargs": {"enable_thinking": False, "unknown": 1}}
    yield "reasoning effort", _TURNS, {"reasoning_effort": "high"}
    yield "documents", _TURNS, {"documents": [{"title": "T", "text": "body"}]}
    yield "special tokens", _TURNS, {"add_special_tokens": True}
