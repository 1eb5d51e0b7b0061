import threading
from datetime import datetime

import pytest

from router.chat_template import ChatTemplate
from router.errors import Unrenderable
from tests.router.prompt_samples import TEMPLATES

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, *messages: dict[str, object], **settings: object) -> str:
    return ChatTemplate(source, SPECIAL).render(list(messages) or [USER], **settings)  # type: ignore[arg-type]


# Templates whose content format vLLM's analysis decides in different ways; the test asks vLLM for the answer.
FORMATS = [
    *TEMPLATES.values(),
    "{% for m in messages %}{% for p in m['content'] %}{{ p }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.content | list %}{{ p }}{% endfor %}{% endfor %}",
    "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% for p in m.content %}{% endfor %}{% endfor %}",
    "{% set a = messages %}{% set b = a %}{% for m in b %}{% for p in m.content %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set content = m.content %}{% for p in content %}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(x=m.content) }}{% endfor %}",
    "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
    "{% macro f(content) %}{% for p in content %}{% endfor %}{% endmacro %}{{ f(messages) }}",
    "{% for i, m in x %}{% for p in m.content %}{% endfor %}{% endfor %}",
    "{% for i, m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for k, v in m.content %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content[1:] %}{% endfor %}{% endfor %}",
    "{% set ns.messages = messages %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for part in content %}{% endfor %}",
    "{{ messages[0].content }}",
]


@pytest.mark.usefixtures("vllm")
def test_content_format_is_the_one_vllm_detects() -> None:
    from vllm.renderers.hf import _detect_content_format

    found = {source: ChatTemplate(source, {}).content_format for source in FORMATS}
    assert found == {source: _detect_content_format(source, default="string") for source in FORMATS}
    assert set(found.values()) == {"string", "openai"}


def test_mutually_assigned_names_do_not_hang() -> None:
    source = "{% set a = messages %}{% set b = a %}{% set a = b %}{% for m in b %}{{ m.content }}{% endfor %}"
    worker = threading.Thread(target=ChatTemplate, args=(source, {}), daemon=True)
    worker.start()
    worker.join(5)
    assert not worker.is_alive()


def test_tojson_keeps_characters_and_order() -> None:
    message = {"role": "user", "content": {"b": "ü<&>'", "a": [1.0, float("nan"), 2**70]}}
    assert render("{{ messages[0].content | tojson }}", message) == (
        '{"b": "ü<&>\'", "a": [1.0, NaN, 1180591620717411303424]}'
    )
    assert render("{{ messages[0].content.a[:1] | tojson(indent=1) }}", message) == "[\n 1.0\n]"


def test_blocks_are_trimmed_and_loops_controlled() -> None:
    source = "  {% for x in [1,2,3] %}\n{% if x == 2 %}{% continue %}{% endif %}\n{{ x }}\n  {% endfor %}\n."
    assert render(source) == "1\n3\n."


def test_generation_block_has_a_scope_of_its_own() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}[{{ x }}]{% endgeneration %}{{ x }}"
    assert render(source) == "[2]1"


def test_dates_are_rendered_and_times_are_not() -> None:
    assert render("{{ strftime_now('%d %b %Y (%%)') }}") == datetime.now().strftime("%d %b %Y (%%)")  # noqa: DTZ005
    for pattern in ("%H:%M", "%c", "%s", "%X", "%", "%Z"):
        with pytest.raises(Unrenderable, match="time of day"):
            render("{{ strftime_now('" + pattern + "') }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "does not compile"),
        ("{{ messages | random }}", "random"),
        ("{{ lipsum() }}", "random"),
        ("{{ raise_exception('no') }}", "TemplateError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recurses"),
    ],
)
def test_what_a_template_refuses_is_left_to_the_worker(source: str, reason: str) -> None:
    with pytest.raises(Unrenderable, match=reason):
        render(source)


def test_reasons_hold_no_prompt_text() -> None:
    with pytest.raises(Unrenderable) as caught:
        render("{{ raise_exception(messages[0].content) }}", {"role": "user", "content": "secret"})
    assert "secret" not in str(caught.value)


def test_only_arguments_the_template_reads_reach_it() -> None:
    source = "{{ enable_thinking }}{{ bos_token }}{{ other is defined }}"
    assert render(source, arguments={"enable_thinking": False, "unread": 1, "bos_token": "B"}) == "FalseBFalse"
    for name in ("tokenize", "chat_template", "tools", "messages", "padding"):
        with pytest.raises(Unrenderable, match=name):
            render(source, arguments={name: None})


def test_developer_messages_become_system_messages() -> None:
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    developer = {"role": "developer", "content": "D", "tools": None}
    system = {"role": "system", "content": [{"type": "text", "text": "S1"}, {"type": "text", "text": "S2"}]}
    assert render(source, developer, USER) == "system:D;user:hi;"
    assert render(source, USER, developer, system) == "system:D\n\nS1\nS2;user:hi;"
    assert render(source + "{# 'developer' #}", USER, developer) == "user:hi;developer:D;"


def test_final_message_is_left_open() -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert render(source, USER, ASSISTANT, add_generation_prompt=False, continue_final_message=True) == "[hi][yes"
    spaced = {"role": "assistant", "content": "so  "}
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, spaced, **settings) == "[so  "
    assert render(source.replace("m.content", "m.content | trim"), spaced, **settings) == "[so"
    parts = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    looped = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render(looped, parts, **settings) == "<a"
    assert parts["content"] == [{"type": "text", "text": "a"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }}", ASSISTANT),
        ("{{ 'content' }}", ASSISTANT),
        ("{{ messages[0].content }}", {"role": "assistant", "content": []}),
        ("{{ messages[0].content[:2] }}", ASSISTANT),
    ],
)
def test_a_final_message_that_cannot_be_continued(source: str, message: dict[str, object]) -> None:
    with pytest.raises(Unrenderable, match="continue_final_message"):
        render(source, message, add_generation_prompt=False, continue_final_message=True)
