"""A body decoded with the help of what was seen before is the body that decoding the whole of it gives."""

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router import body_memory
from router.body_memory import BodyMemory
from router.conversation import plain_texts

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def short_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "SHORTEST", 40)


def whole(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def seen(memory: BodyMemory, raw: bytes) -> None:
    body = whole(raw)
    if isinstance(body, dict) and plain_texts(body.get("messages")) is not None:
        memory.learn(raw, body, (memory.decode(raw) or ({}, 0))[1])
        memory.check()


def agrees(memory: BodyMemory, raw: bytes) -> bool:
    """Whether it was decoded from memory; either way it must not differ."""
    remembered, expected = memory.decode(raw), whole(raw)
    if remembered is None:
        return False
    made, known = remembered
    assert made == expected, raw
    assert list(made) == list(expected), raw
    assert 0 < known < len(raw)
    return True


def turns(count: int, salt: str = "") -> list[dict[str, str]]:
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} 'é' \n" + (salt or "x") * 30}
        for i in range(count)
    ]


def body(messages: list[dict[str, str]], **members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": messages, "max_tokens": 5, **members}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_conversation_that_goes_on_is_decoded_from_memory(separators: tuple[str, str]) -> None:
    memory, messages = BodyMemory(LIMIT), turns(9)
    hits = 0
    for end in range(3, 10):
        raw = json.dumps(body(messages[:end]), separators=separators).encode()
        hits += agrees(memory, raw)
        seen(memory, raw)
    assert hits >= 5
    other = json.dumps(body([*messages[:-1], {"role": "user", "content": "else"}], stream=True), separators=separators)
    assert agrees(memory, other.encode())
    early = json.dumps(body([{"role": "user", "content": "else"}, *messages[1:]]), separators=separators)
    assert not agrees(memory, early.encode())


# What follows a known beginning: everything that could mean something else behind the stand-in.
ENDS = st.one_of(
    st.sampled_from(
        [
            b"]}",
            b',{"role":"user","content":"z"}]}',
            b",]}",
            b"]",
            b",",
            b"",
            b"}",
            b"]]}",
            b'],"messages":[{"role":"user","content":"z"}]}',
            b'],"\\u006dessages":[1]}',
            b'],"messages":[]}',
            b'],"messages":null}',
            b'],"messages":["x","y"]}',
            b'],"messages":{"a":1},"b":2}',
            b'],"x":{"messages":[1]}}',
            b'],"a":1,"a":2}',
            b' , \n{"role":"user","content":[1,2]} \t] , "n" : 1e400}',
            b',"text",7,null,[[]],{}]}',
            b",\xff]}",
            b',"\\ud800"]}',
            b'],"max_tokens":NaN}',
            b"]} x",
            b'"}]}',
            b',{"role":"user"',
        ]
    ),
    st.binary(max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda v: st.lists(v) | st.dictionaries(st.text(max_size=3), v),
        max_leaves=6,
    ).map(lambda value: b"," + json.dumps(value).encode() + b"]}"),
)
HEADS = st.sampled_from(
    [
        b'{"model":"m","messages":[',
        b'{ "messages" : [ ',
        b'{"messages":3,"messages":[',
        b'{"text":"\\"messages\\":[","messages":[',
        b'{"x":{"messages":[]},"messages":[',
        b'{"x":[{"messages":[',
        b'{"tools":[{"a":[1,2]}],"messages":[',
        b'{"\\u006dessages":[',
        b'[{"messages":[',
    ]
)
TEXTS = st.text(max_size=40) | st.sampled_from(
    ['{"role": "user"}, {"a": 1}', '"},{"', '"messages":[', "}, {" * 9, "\\", "x" * 60]
)


@settings(max_examples=600, deadline=None)
@given(HEADS, st.lists(TEXTS, min_size=2, max_size=5), st.booleans(), st.lists(ENDS, min_size=1, max_size=4))
@example(b'{"messages":[', ["x" * 60, "y", "z"], True, [b",]}"])
def test_whatever_follows_is_taken_as_it_is(head: bytes, texts: list[str], compact: bool, ends: list[bytes]) -> None:
    memory = BodyMemory(LIMIT)
    messages = [{"role": "user", "content": text} for text in texts]
    joint = b"," if compact else b", "
    inner = joint.join(json.dumps(message).encode() for message in messages)
    for first in (b"]}", b"]}}", b"]}]}", b"]}]"):
        seen(memory, head + inner + first)
    cut = joint.join(json.dumps(message).encode() for message in messages[:-1])
    for end in ends:
        for beginning in (inner, cut):
            agrees(memory, head + beginning + end)
            agrees(memory, head + beginning + b"," + end)
            seen(memory, head + beginning + end)


def test_random_damage_is_never_overlooked() -> None:
    rng, memory, messages = random.Random(7), BodyMemory(LIMIT), turns(6)
    raw = json.dumps(body(messages)).encode()
    seen(memory, raw)
    assert agrees(memory, raw)
    hits = 0
    for _ in range(3000):
        at = rng.randrange(len(raw))
        damaged = (
            raw[:at]
            + rng.choice([b"", bytes([rng.randrange(256)]), b"]", b"}", b'"', b","])
            + raw[at + rng.randrange(3) :]
        )
        hits += agrees(memory, damaged)
    assert hits > 100, "damage behind what is known, which is not always damage"


def test_nobody_guesses_the_stand_in() -> None:
    memory, messages = BodyMemory(LIMIT), turns(4)
    raw = json.dumps(body(messages)).encode()
    seen(memory, raw)
    made = memory.decode(raw)
    assert made is not None
    assert len(made[0]["messages"]) == 4
    assert body_memory._STAND_IN not in json.dumps(made)
    again = memory.decode(raw)
    assert again is not None
    assert len(again[0]["messages"]) == 4, "what is shared is not changed"


def test_memory_is_bounded_and_the_longest_unused_leaves() -> None:
    raws = [json.dumps(body(turns(6, chr(48 + number)))).encode() for number in range(50)]
    memory = BodyMemory(20_000)
    for raw in raws:
        seen(memory, raw)
        agrees(memory, raws[0])
    assert 1 < len(memory) < 30
    assert agrees(memory, raws[0])
    assert agrees(memory, raws[-1])
    assert not agrees(memory, raws[1])
    nothing = BodyMemory(0)
    seen(nothing, raws[0])
    assert not len(nothing)
