import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import chat_template, traced_template
from router.chat_template import ChatTemplate
from router.conversation import conversation_of, plain_texts
from router.errors import Unrenderable
from router.traced_template import TracedTemplate
from tests.router.prompt_samples import PIECES, TEMPLATES, random_text

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
THINKING = """{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string and not (message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) and ns.last == messages | length - 1 %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
MACRO = (
    "{% macro show(m, last) %}{% set t = m['content'] | trim %}[{{ m.role }}:{{ t }}{{ '!' if last }}]{% endmacro %}"
    "{% for m in messages %}{{ show(m, loop.last) }}{% endfor %}"
)
RECORDED = {**TEMPLATES, "thinking": THINKING, "dated": DATED, "macro": MACRO}
del RECORDED["dumping"]

# Every one of them tells texts apart in a way that a careless recording would miss.
SLY = [
    "{{ messages[0].content | length }}",
    "{{ messages[0].content | upper | length }}",
    "{% if messages[0].content | length > 3 %}long{% endif %}",
    "{{ messages[0].content[0] }}",
    "{{ messages[0].content[:2] }}",
    "{% for c in messages[0].content %}{{ c }}.{% endfor %}",
    "{{ messages[0] | tojson }}",
    "{{ messages[0].content | tojson }}",
    "{{ messages[0] }}",
    "{{ messages | string }}",
    "{{ {'a': 1, 'b': 2}[messages[0].content] }}",
    "{{ {'a': 1, 'b': 2}.get(messages[0].content) }}",
    "{{ {messages[0].content: 1} | length }}",
    "{{ messages[0].content | int }}",
    "{{ messages[0].content | float }}",
    "{{ messages[0].content in ['a', 'b'] }}",
    "{{ messages[0].content in 'abc' }}",
    "{{ messages[0].content == messages[-1].content }}",
    "{{ messages | map(attribute='content') | join(',') }}",
    "{{ messages | map(attribute='content') | unique | list | length }}",
    "{{ messages | map(attribute='content') | sort | join }}",
    "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "{{ messages | groupby('content') | length }}",
    "{{ '%s' % messages[0].content }}",
    "{{ '{}'.format(messages[0].content) }}",
    "{{ messages[0].content % () }}",
    "{{ messages[0].content * 2 }}",
    "{{ 'x'.join([messages[0].content]) }}",
    "{{ 'abc'.startswith(messages[0].content) }}",
    "{{ 'a b'.replace(messages[0].content, 'x') }}",
    "{{ messages[0].content.replace('a', messages[-1].content) }}",
    "{{ messages[0].content | replace('a', 'b') }}",
    "{{ messages[0].content.count('a') }}",
    "{{ messages[0].content.find('a') }}",
    "{{ messages[0].content.isdigit() }}",
    "{{ messages[0].content.split() | length }}",
    "{{ messages[0].content.split('a') | last }}",
    "{{ messages[0].content.split('a')[1:] }}",
    "{{ messages[0].content.split('a')[1] }}",
    "{{ messages[0].content.partition('a')[0] }}",
    "{{ messages[0].content.piece }}{{ messages[0].content.made }}",
    "{{ messages[0].content['piece'] }}{{ messages[0].content | attr('piece') }}",
    "{{ messages[0].content._value }}",
    "{{ messages[0].content is callable }}{{ messages[0].content is mapping }}{{ messages[0].content is number }}",
    "{{ messages[0].content is sequence }}{{ messages[0].content is iterable }}{{ messages[0].content is string }}",
    "{{ messages[0].content is lower }}",
    "{{ messages[0].content is eq 'a' }}{{ 'a' == messages[0].content }}{{ messages[0].content != 'a' }}",
    "{{ messages[0].content < 'b' }}",
    "{{ messages[0].content is sameas messages[-1].content }}",
    "{{ messages[0].content == none }}{{ messages[0].content is none }}{{ messages[0].content is defined }}",
    "{{ (messages[0].content ~ 'x') | length }}",
    "{{ 'a' in ('x' + messages[0].content) }}",
    "{{ 'y' if 'x' + messages[0].content }}{{ 'y' if '' ~ messages[0].content else 'n' }}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x | length }}",
    "{% set x %}{{ messages[0].content }}!{% endset %}{{ x }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "{{ messages[0].content | trim | lower }}{{ messages[0].content | upper }}",
    "{{ messages[0].content | default('x', true) }}",
    "{{ messages[0].content | title }}{{ messages[0].content | capitalize }}",
    "{{ messages[0].content | e }}{{ messages[0].content | safe }}",
    "{{ messages[0].content | indent(2) }}{{ messages[0].content | wordcount }}",
    "{{ messages[0].content | list }}{{ messages[0].content | first }}",
    "{{ messages[0].content or 'nothing' }}{{ not messages[0].content }}",
    "{{ messages[0].content and messages[-1].content }}",
    "{{ messages[0].get('content', 'x') }}{{ messages[0]['content'].strip('a') }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "{{ messages[0] == messages[-1] }}",
    "{{ messages[0].content.encode() }}",
    "{{ messages[0].content.format() }}",
    "{{ dict(a=messages[0].content) }}",
    "{{ [messages[0].content] }}{{ (messages[0].content,) }}",
    "{{ range(messages[0].content | length) | list }}",
    "{% if messages[0].content == 'a' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    "{{ messages[0].content + 1 }}",
    "{{ messages[0].content | batch(2) | list }}",
    "{{ messages[0].content | select('string') | list }}",
    "{{ messages | rejectattr('content') | list | length }}",
    "{{ messages | sum(attribute='content', start='') }}",
    "{{ messages | max(attribute='content') }}",
    "{{ messages[0].content | pprint }}{{ messages[0].content | urlencode }}",
    "{{ messages[0].content | reverse }}",
    "{{ messages[0].content.lstrip('a').rstrip('b').removeprefix('x').removesuffix('y').lower().upper() }}",
    "{{ messages[0].content.startswith(('a', 'b')) }}{{ messages[0].content.endswith('b', 1) }}",
    "{{ messages[0].content.isspace() }}{{ messages[0].content.rsplit('a', 1)[0] }}",
]


def rendered(template: ChatTemplate, roles: tuple[str, ...], texts: list[str]) -> str | None:
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        return template.render(conversation_of(messages, template.content_format))
    except Unrenderable:
        return None


def by_heart(template: ChatTemplate) -> TracedTemplate:
    found = template.by_heart(template.content_format)
    assert found is not None
    return found


def check(template: ChatTemplate, traced: TracedTemplate, roles: tuple[str, ...], texts: list[str]) -> bool:
    plain = plain_texts([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
    found = traced.render(*plain) if plain is not None else None
    if found is not None:
        assert found == rendered(template, roles, texts), (roles, texts)
    return found is not None


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_repeat_what_the_template_writes(name: str) -> None:
    template = ChatTemplate(RECORDED[name], SPECIAL)
    traced, rng = by_heart(template), random.Random(name)
    for _ in range(300):
        turns = rng.randrange(1, 7)
        roles = ("user", "assistant") * 3
        found = (*(("system",) if rng.random() < 0.4 else ()), *roles[:turns])
        texts = [rng.choice(["", "<think>x</think>\n", "</think>", ""]) + random_text(rng, 8) for _ in found]
        check(template, traced, found, texts)
    assert traced.repeated > 100 or name == "thinking"
    assert traced.repeated > 10


@pytest.mark.parametrize("source", SLY)
def test_a_text_the_template_looks_into_is_never_repeated_wrongly(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    traced = by_heart(template)
    texts = ["a", "b", "", "ab", " a ", "7", "xaay", "a b", "bca", "  ", "A", "<&>", "aaaa", "content", "é"]
    for first in texts:
        for last in ("a", "b", first):
            check(template, traced, ("user", "assistant"), [first, last])
            check(template, traced, ("user", "assistant"), [first, last])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(RECORDED)),
    st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant", "tool"]),
            st.lists(st.sampled_from([*PIECES, "</think>", "<tool_response>", ""]), max_size=4).map("".join),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_any_plain_chat(name: str, chat: list[tuple[str, str]]) -> None:
    template, traced = TEMPLATES_BY_HEART[name]
    check(template, traced, tuple(role for role, _ in chat), [text for _, text in chat])


TEMPLATES_BY_HEART = {
    name: (template, by_heart(template))
    for name, template in ((name, ChatTemplate(source, SPECIAL)) for name, source in RECORDED.items())
}


def test_a_recording_ends_with_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    day = ["1 Jan"]
    monkeypatch.setattr(chat_template, "_strftime_now", lambda _: day[0])
    template = ChatTemplate(DATED, SPECIAL)
    traced = by_heart(template)
    assert traced.render(("user",), ["x"]) == "1 Janx"
    day[0] = "2 Jan"
    assert traced.render(("user",), ["x"]) == "2 Janx"


def test_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_template, "_PATIENCE", 10_000)
    template = ChatTemplate(THINKING, SPECIAL)
    traced = template.by_heart(template.content_format, limit=20_000)
    assert traced is not None
    rng = random.Random(3)
    for _ in range(300):
        texts = [rng.choice(["</think>", "x"]) for _ in range(rng.randrange(1, 9))]
        traced.render(("assistant",) * len(texts), texts)
        assert traced._bytes == sum(each.cost for known in traced._known.values() for each in known) <= 20_000
        assert all(len(known) <= 4 for known in traced._known.values())


def test_what_never_repeats_is_given_up() -> None:
    traced = by_heart(ChatTemplate(SLY[0], SPECIAL))
    for number in range(100):
        assert traced.render(("user",), [str(number)]) is None
    assert traced.traced < 50


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [5],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": "x", "name": "n"}],
        [{"role": "developer", "content": "x"}],
        [{"role": "critic", "content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"content": "x", "nothing": "x"}],
        [{"role": "system", "content": "x-anthropic-billing-header: a\nx"}],
    ],
)
def test_chats_that_are_more_than_plain_texts(messages: Any) -> None:
    assert plain_texts(messages) is None
    assert plain_texts([{"role": "user", "content": "x"}, {"content": "", "role": "tool"}]) == (
        ("user", "tool"),
        ["x", ""],
    )
