import asyncio
import copy
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import conversation
from router.errors import ConfigError, InvalidRequest, Unrenderable
from router.prompt import PromptBuilder, _Pending, can_carry_ids, splice_token_ids, tokenize_request
from router.splice import with_prompt, without_messages
from tests.router.prompt_samples import TEMPLATES, make_tokenizers, random_chat, random_text
from tests.router.vllm_reference import Reference, Refused

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def builder(kinds: dict[str, Path]) -> PromptBuilder:
    return PromptBuilder.load(kinds["bytes"])


def with_template(path: Path, directory: Path, template: str) -> Path:
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (directory / name).write_bytes((path / name).read_bytes())
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def fresh(body: dict[str, Any]) -> Any:
    return json.loads(json.dumps(body))


def outcome(call: Any, body: dict[str, Any]) -> Any:
    try:
        return call(fresh(body))
    except (Refused, InvalidRequest, Unrenderable) as error:
        return type(error)
    except ValueError:  # pydantic's ValidationError
        return Refused


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.usefixtures("vllm")
def test_random_chats_equal_vllm(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = {"gemma": "gemma", "llama": "bytes-split", "mistral": "metaspace"}.get(name, "bytes")
    path = with_template(kinds[tokenizer], tmp_path / "m", TEMPLATES[name])
    ours, theirs, seen = PromptBuilder.load(path), Reference(path), Counter[str]()
    rng = random.Random(name)
    for _ in range(200):
        body = random_chat(rng)
        found, expected = outcome(ours.chat, body), outcome(theirs.chat, body)
        if isinstance(found, list):
            assert found == expected, body
            assert found == outcome(theirs.tokenize_chat, tokenize_request(fresh(body), "chat")), body
        elif found is InvalidRequest:
            assert expected is Refused, body
        seen["rendered" if isinstance(found, list) else "refused" if expected is Refused else "left"] += 1
    assert seen["rendered"] > 80
    assert seen["left"] < 60


@pytest.mark.usefixtures("vllm")
def test_random_completions_equal_vllm(kinds: dict[str, Path]) -> None:
    rng = random.Random(1)
    for name in ("bytes-split", "wordpiece", "unigram"):
        limit = 60
        ours = PromptBuilder.load(kinds[name], max_model_len=limit)
        theirs = Reference(kinds[name], max_model_len=limit)
        rendered = 0
        for _ in range(120):
            body = random_completion(rng)
            found, expected = outcome(ours.completion, body), outcome(theirs.completion, body)
            if isinstance(found, list) and max(map(len, found)) <= limit:
                assert found == expected, (name, body)
                rendered += 1
            elif found is InvalidRequest:
                assert expected is Refused, body
        assert rendered > 40


def random_completion(rng: random.Random) -> dict[str, Any]:
    texts = [random_text(rng, 12) for _ in range(rng.randrange(1, 4))]
    ids = [[rng.randrange(300) for _ in range(rng.randrange(1, 30))] for _ in range(2)]
    odd = rng.choice([[1, "a"], ["a", 1], [[1], 2], [True, 1], [1.0], None, "", [], [[]], 5, [-1], {"a": 1}])
    body: dict[str, Any] = {"prompt": rng.choice([texts[0], texts[0], texts, ids, ids[0], odd])}
    if rng.random() < 0.4:
        body["truncate_prompt_tokens"] = rng.choice([-1, 1, 4, 10, 10, 59, 60, 61, 0])
        body["max_tokens"] = rng.choice([0, 5])
        if rng.random() < 0.5:
            body["truncation_side"] = rng.choice(["left", "right", None])
    flags = (("suffix", "x"), ("echo", True), ("add_special_tokens", False))
    return body | {key: value for key, value in flags if rng.random() < 0.15}


@pytest.mark.usefixtures("vllm")
def test_truncated_chats_equal_vllm(kinds: dict[str, Path]) -> None:
    ours, theirs = PromptBuilder.load(kinds["bytes"], max_model_len=500), Reference(kinds["bytes"], max_model_len=500)
    for keep in (-1, 1, 7, 499):
        for side in (None, "left", "right"):
            for limit in ({}, {"max_tokens": 9}, {"max_completion_tokens": 9}):
                text = "one two three 中文 " * 60
                body = {"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": keep, **limit}
                body |= {"truncation_side": side} if side else {}
                assert ours.chat(body) == theirs.chat(body), body


@pytest.mark.usefixtures("vllm")
def test_named_templates_and_the_workers_template_flag(kinds: dict[str, Path], tmp_path: Path) -> None:
    path = with_template(kinds["bytes"], tmp_path / "m", "default {{ messages[0].content }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools | tojson }}")
    tools = [{"type": "function", "function": {"name": "f"}}]
    for body in ({"messages": [USER]}, {"messages": [USER], "tools": tools}):
        assert PromptBuilder.load(path).chat(body) == Reference(path).chat(body)
        literal = "{{ messages | length }}"
        ours, theirs = PromptBuilder.load(path, literal), Reference(path, chat_template=literal)
        assert ours.chat(body) == theirs.chat(body) == PromptBuilder.load(kinds["bytes"]).tokenizer.encode("1")
    assert PromptBuilder.load(path, "tool_use").render({"messages": [USER]}) == "tools null"
    (tmp_path / "t.jinja").write_text("file")
    assert PromptBuilder.load(path, str(tmp_path / "t.jinja")).render({"messages": [USER]}) == "file"
    with pytest.raises(ConfigError, match="neither a file"):
        PromptBuilder.load(path, "missing")


def test_server_settings_are_repeated(kinds: dict[str, Path], tmp_path: Path) -> None:
    source = "{{ enable_thinking }} {{ tools is none }} {{ messages[0].content is string }}"
    path = with_template(kinds["bytes"], tmp_path / "m", source)
    settings = {
        "default_template_kwargs": {"enable_thinking": "maybe"},
        "drop_tools_when_tool_choice_none": True,
        "content_format": "openai",
    }
    ours = PromptBuilder.load(path, **settings)
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    assert ours.render({"messages": [USER], **tools, "tool_choice": "none"}) == "maybe True False"
    assert ours.render({"messages": [USER], **tools, "chat_template_kwargs": {"enable_thinking": 1}}) == "1 False False"
    unset = {"chat_template_kwargs": {"enable_thinking": None}}
    assert ours.render({"messages": [USER], **unset}) == "maybe True False"


def test_multimodal_models_prefer_the_processors_template(kinds: dict[str, Path], tmp_path: Path) -> None:
    path = with_template(kinds["bytes"], tmp_path / "m", "tokenizer")
    (path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert PromptBuilder.load(path).render({"messages": [USER]}) == "tokenizer"
    (path / "preprocessor_config.json").write_text("{}")
    ours = PromptBuilder.load(path)
    assert ours.render({"messages": [USER]}) == "processor"
    assert ours.render({"messages": [USER], "tools": [{"function": {"name": "f"}}]}) == "tokenizer"


def test_models_that_vllm_encodes_itself_are_left_to_it(kinds: dict[str, Path], tmp_path: Path) -> None:
    for model in ({"model_type": "gpt_oss"}, {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "llama"}):
        path = with_template(kinds["bytes"], tmp_path / str(len(model)), "x")
        (path / "config.json").write_text(json.dumps(model))
        with pytest.raises(Unrenderable, match="without a chat template"):
            PromptBuilder.load(path).chat({"messages": [USER]})


@pytest.mark.usefixtures("vllm")
def test_known_part_members_are_vllms() -> None:
    from vllm.renderers import chat_utils

    assert conversation._PART_KEYS == chat_utils._KNOWN_CONTENT_PART_FIELDS
    assert conversation._MEDIA_KEYS == chat_utils._MEDIA_CONTENT_PART_KEYS


def test_the_body_is_not_changed(builder: PromptBuilder) -> None:
    rng = random.Random(2)
    for _ in range(100):
        body = random_chat(rng)
        before = copy.deepcopy(body)
        outcome(lambda _, body=body: builder.chat(body), {})
        assert repr(body) == repr(before)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [USER, 5]}, "messages[1]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, USER, {"role": "user", "content": 5}]}, "messages[2].content"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0].tool_calls[0]"),
    ({"messages": [USER], "tools": {}}, "tools"),
    ({"messages": [USER], "tools": []}, "tools"),
    ({"messages": [USER], "tools": [1]}, "tools[0]"),
    ({"messages": [USER], "chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"messages": [USER], "documents": "x"}, "documents"),
    ({"messages": [USER], "documents": [{"a": 1}]}, "documents"),
    ({"messages": [USER], "add_generation_prompt": []}, "add_generation_prompt"),
    (
        {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    ({"messages": [USER], "truncation_side": "top"}, "truncation_side"),
    (
        {"messages": [USER], "kv_transfer_params": {"prompt_token_ids": [1, -1]}},
        "kv_transfer_params.prompt_token_ids",
    ),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_wrong_types_name_the_field(builder: PromptBuilder, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        builder.chat(body)
    assert caught.value.param == param
    assert param in str(caught.value)
    with pytest.raises(InvalidRequest):
        asyncio.run(builder.chat_async(body))


@pytest.mark.usefixtures("vllm")
def test_what_is_refused_here_vllm_refuses_too(kinds: dict[str, Path]) -> None:
    theirs = Reference(kinds["bytes"])
    for body, _ in WRONG:
        if "kv_transfer_params" not in body:
            assert outcome(theirs.chat, body) is Refused, body


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        (5, "prompt"),
        ([1, -1], "prompt[1]"),
        ([[1], [{}]], "prompt[1][0]"),
    ],
)
def test_wrong_prompts_name_the_field(builder: PromptBuilder, prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(builder.completion_async({"prompt": prompt}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "developer", "content": "x", "tools": []}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {}}]}]},
        {"chat_template": "{{ x }}"},
        {"chat_template_kwargs": {"chat_template": "{{ x }}"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"add_special_tokens": "yes"},
        {"add_generation_prompt": 1},
        {"continue_final_message": True},
        {"reasoning_effort": "colossal"},
        {"reasoning_effort": ["low"]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": 5}}]},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": "5"},
        {"truncate_prompt_tokens": 5, "truncation_side": "left"},
    ],
)
def test_what_only_the_worker_can_tell_is_unrenderable(builder: PromptBuilder, change: dict[str, Any]) -> None:
    with pytest.raises(Unrenderable):
        builder.chat({"messages": [USER], **change})


def test_ids_the_client_sends_are_kept(builder: PromptBuilder) -> None:
    body = {"messages": [USER], "kv_transfer_params": {"prompt_token_ids": [5, 6]}}
    assert builder.chat(body) == [5, 6]
    assert builder.chat({**body, "echo": True}) == builder.chat({"messages": [USER]})
    assert builder.completion({"prompt": [[5, 6], [7]]}) == [[5, 6], [7]]


def test_long_prompts_are_encoded_in_a_thread(kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = PromptBuilder.load(kinds["unigram"])
    main, where = threading.main_thread(), list[bool]()
    finish = _Pending.__call__
    monkeypatch.setattr(
        _Pending, "__call__", lambda self: where.append(threading.current_thread() is main) or finish(self)
    )
    for text in ("short", "word " * 40_000):
        chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
        assert asyncio.run(ours.chat_async(chat)).tolist() == ours.chat(chat)
        completions = asyncio.run(ours.completion_async({"prompt": [text]}))
        assert [ids.tolist() for ids in completions] == ours.completion({"prompt": [text]})
    assert where == [True] * 4 + [False, True] * 2
    many = {"messages": [USER] * 1001}
    assert asyncio.run(ours.chat_async(many)).tolist() == ours.chat(many)
    assert where[8:] == [False, True]


def test_an_id_beyond_every_vocabulary_is_refused(builder: PromptBuilder) -> None:
    with pytest.raises(InvalidRequest, match="token id"):
        builder.completion({"prompt": [1, 2**32]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(["model", "prompt", "kv_transfer_params", "messages", 'a"b', "\\prompt", "x"])
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
SPACES = st.sampled_from(["", " ", "\n\t", "\r\n  "])


@given(st.dictionaries(KEYS, JSON, max_size=5), IDS, SPACES, SPACES, st.booleans())
def test_splicing_changes_one_member_only(
    body: dict[str, Any], ids: list[int], before: str, after: str, escape: bool
) -> None:
    body.pop("kv_transfer_params", None)
    text = before + json.dumps(body, ensure_ascii=escape, separators=("," + after, before + ":" + after)) + after
    chat = splice_token_ids(text.encode(), ids, "chat")
    assert json.loads(chat) == body | {"kv_transfer_params": {"prompt_token_ids": ids}}
    assert chat.startswith(text.rstrip()[:-1].encode())
    completion = splice_token_ids(text.encode(), [ids], "completions")
    assert json.loads(completion) == body | {"prompt": [ids]}


def test_splicing_cuts_the_body_open_at_one_place() -> None:
    body = b' {"model" : "m", "prompt"\t:\n"a \\"prompt\\": b" , "n":1.50, "u":"\xc3\xbc\\u00fc"}\r\n '
    assert splice_token_ids(body, [1, 2], "completions") == body.replace(b'"a \\"prompt\\": b"', b"[1,2]")
    chat = b'{"messages":[{"kv_transfer_params":{}}], "stream":true}\n'
    assert splice_token_ids(chat, [1], "chat") == (
        b'{"messages":[{"kv_transfer_params":{}}], "stream":true,"kv_transfer_params":{"prompt_token_ids":[1]}}\n'
    )
    assert splice_token_ids(b"{ }", [1], "chat") == b'{ "kv_transfer_params":{"prompt_token_ids":[1]}}'.replace(
        b"{ ", b"{ "
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","prompt":"a","n":1.50}',
        b'{"x":{"prompt":"a"},"prompt":"a","n":1.50}',
        b'{"x":{"prompt":"a"},"pr\\u006fmpt":"a","n":1.50}',
        b'{"n":1.50}',
        b'{"prompt":"x","n":1.50,"prompt":{"prompt":"x"}}',
    ],
)
def test_splicing_where_the_place_is_uncertain_keeps_raw_values(body: bytes) -> None:
    spliced = splice_token_ids(body, [1, 2], "completions")
    assert json.loads(spliced) == json.loads(body) | {"prompt": [1, 2]}
    assert b'"n":1.50' in spliced
    assert spliced.count(b'"prompt":[1,2]') == 1


def test_splicing_joins_kv_transfer_params() -> None:
    body = b'{"kv_transfer_params":{"a":1.50,"prompt_token_ids":[9]},"n":1.50}'
    assert splice_token_ids(body, [1], "chat") == (b'{"kv_transfer_params":{"a":1.50,"prompt_token_ids":[1]},"n":1.50}')
    for given_value in (b"null", b"{}"):
        spliced = splice_token_ids(b'{"kv_transfer_params":' + given_value + b',"a":"\\u00fc"}', [1], "chat")
        assert spliced == b'{"kv_transfer_params":{"prompt_token_ids":[1]},"a":"\\u00fc"}'
    repeated = b'{"kv_transfer_params":{"a":1},"kv_transfer_params":{"b":2}}'
    assert msgspec.json.decode(splice_token_ids(repeated, [1], "chat")) == {
        "kv_transfer_params": {"b": 2, "prompt_token_ids": [1]}
    }


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":1} x', b"\xff", b'{"kv_transfer_params":5}'])
def test_splicing_refuses_what_is_no_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        splice_token_ids(body, [1], "chat")


def test_ids_travel_only_where_the_response_stays_the_same() -> None:
    assert can_carry_ids({"messages": []}, "chat")
    assert can_carry_ids({"prompt": "x"}, "completions")
    for body in ({"echo": True}, {"return_prompt_text": True}, {"kv_transfer_params": 5}):
        assert not can_carry_ids(body, "chat")
    for body in ({"echo": True}, {"suffix": "x"}, {"prompt_embeds": "x"}):
        assert not can_carry_ids(body, "completions")


def test_tokenize_requests_say_everything_that_matters() -> None:
    thought = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    body = {
        "model": "m",
        "messages": [thought, {**thought, "reasoning": ""}],
        "documents": [{"a": "b"}],
        "reasoning_effort": "none",
        "chat_template_kwargs": {"k": 1},
        "max_tokens": 5,
    }
    assert tokenize_request(body, "chat") == {
        "model": "m",
        "messages": [
            {"role": "assistant", "content": "x", "reasoning": "why"},
            {"role": "assistant", "content": "x", "reasoning": ""},
        ],
        "chat_template_kwargs": {
            "k": 1,
            "enable_thinking": False,
            "reasoning_effort": "none",
            "documents": [{"a": "b"}],
        },
    }
    assert tokenize_request({"prompt": "x", "max_tokens": 5}, "completions") == {"prompt": "x"}
    for refused in ({"prompt": ["x"]}, {"prompt": "x", "suffix": "y"}, {"prompt": "x", "truncate_prompt_tokens": 5}):
        with pytest.raises(Unrenderable):
            tokenize_request(refused, "completions")


LEAN = {
    "model": "m",
    "messages": [USER, {"role": "assistant", "content": "é"}, USER],
    "stream": True,
    "temperature": 0.5,
}


def test_messages_stay_behind_where_the_ids_say_it_all() -> None:
    body = LEAN | {"stop": ["a", "b"], "stream_options": {"include_usage": True}, "seed": 5, "user": "ü"}
    lean = without_messages(body, [b"[", b"1,2", b"]"])
    assert lean is not None
    expected = body | {"messages": [{"role": "user", "content": ""}]}
    assert json.loads(lean) == expected | {"kv_transfer_params": {"prompt_token_ids": [1, 2]}}


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "none"},
        {"echo": True},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {}},
        {"response_format": {"type": "json_object"}},
        {"kv_transfer_params": {}},
        {"unheard_of": 1},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"seed": 2.0**70},
        {"stop": [["a"]]},
        {"stream_options": {"a": {}}},
        {"logprobs": [1]},
    ],
)
def test_messages_stay_where_the_answer_may_depend_on_more(change: dict[str, Any]) -> None:
    assert without_messages(LEAN | change, [b"[1]"]) is None


@pytest.mark.usefixtures("vllm")
def test_a_body_without_its_messages_is_the_same_request_to_vllm(kinds: dict[str, Path]) -> None:
    theirs = Reference(kinds["bytes"])
    ids = theirs.chat(LEAN)
    lean = without_messages(LEAN, [str(ids).encode()])
    assert lean is not None
    assert theirs.chat(json.loads(lean)) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_with_settings_are_known_by_heart_too(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    ours = PromptBuilder.load(with_template(kinds["bytes"], tmp_path / "m", TEMPLATES[name]))
    rng, rendered = random.Random(name), 0
    tools = [[{"type": "function", "function": {"name": f"f{n}", "parameters": {"n": n}}}] for n in range(3)]
    for _ in range(250):
        turns = ("user", "assistant") * 3
        messages = [{"role": role, "content": random_text(rng, 5)} for role in turns[: rng.choice([1, 3, 5])]]
        body: dict[str, Any] = {"messages": messages}
        settings = {
            "tools": rng.choice(tools),
            "add_generation_prompt": False,
            "chat_template_kwargs": {"enable_thinking": rng.choice([True, 1, 1.0, False, "x"])},
            "reasoning_effort": rng.choice(["none", "low"]),
            "documents": [{"text": rng.choice(["a", "b"])}],
            "tool_choice": "none",
            "continue_final_message": True,
        }
        body |= {key: value for key, value in settings.items() if rng.random() < 0.3}
        found, expected = outcome(ours.render, body), outcome(ours.render_in_full, body)
        assert found == expected, body
        rendered += isinstance(found, str)
    assert rendered > 50
    assert len(ours._settings) <= 32
    assert ours.renders_by_heart > 20 or name == "dumping"


def test_a_completion_is_written_anew_around_its_ids() -> None:
    body = {"model": "m", "prompt": "é" * 50, "max_tokens": 5, "stop": "x", "logprobs": 3}
    lean = with_prompt(body, [b"[[1]", b",", b"[2]]"])
    assert lean is not None
    assert json.loads(lean) == body | {"prompt": [[1], [2]]}
    assert with_prompt({"prompt": "x"}, [b"[1]"]) == b'{"prompt":[1]}'
    for change in ({"suffix": "x"}, {"seed": 2.0**64}, {"logit_bias": {"5": 1}}, {"unheard_of": 1}):
        assert with_prompt(body | change, [b"[1]"]) is None
