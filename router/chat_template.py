"""Chat templates, rendered as vLLM renders them through transformers.

The environment is transformers': sandboxed and immutable, block lines trimmed, ``break`` and ``continue``, a ``tojson``
that keeps non-ASCII and HTML characters, ``raise_exception``, ``strftime_now`` and the ``generation`` block. On top
come vLLM's rules: which keyword arguments reach the template, whether message content is a string or a list of parts,
and what becomes of the developer role in templates that do not know it.
"""

import copy
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import Unrenderable
from router.traced_template import TracedTemplate, Tracer

ContentFormat = Literal["string", "openai"]
Message = dict[str, Any]

# Parameters of apply_chat_template: as template arguments they mean something else, or clash.
_RESERVED = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# A worker's clock may differ by seconds and its day by none: only calendar dates can be reproduced.
_DATE_DIRECTIVES = re.compile(r"%-?[aAbBdDeFGjmuUVwWyY%]")
_RANDOM_FILTERS = frozenset({"random"})
_RANDOM_NAMES = frozenset({"lipsum"})


class ChatTemplate:
    """One compiled template. ``content_format`` is what vLLM detects: "openai" where it loops over content parts."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile ``source``; ``special_tokens`` are its variables such as ``bos_token``.

        Raises:
            Unrenderable: it does not compile, or its output is random.
        """
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._environment, self._template = environment, environment.from_string(source)
        except jinja2.TemplateError as error:
            raise Unrenderable(f"the chat template does not compile: {error}") from error
        if _is_random(tree):
            raise Unrenderable("the chat template draws random text")
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.content_format = _content_format(tree)

    @cached_property
    def knows_developer(self) -> bool:
        """Whether the role ``developer`` reaches the template; otherwise those messages become system messages."""
        return '"developer"' in self.source or "'developer'" in self.source

    def render(
        self,
        conversation: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        ``arguments`` are the request's ``chat_template_kwargs``; those the template does not read are dropped.

        Raises:
            Unrenderable: the template refuses the conversation, or an argument would change more than the template.
        """
        if reserved := _RESERVED & (arguments or {}).keys():
            raise Unrenderable(f"chat_template_kwargs names {', '.join(sorted(reserved))}")
        if not self.knows_developer and any(message["role"] == "developer" for message in conversation):
            conversation = _as_system(conversation)
        final = None
        if continue_final_message:
            conversation, final = self._mark_final(conversation)
        variables = self._variables(conversation, arguments or {})
        variables |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        text = self._run(variables)
        return text if final is None else _cut_after(text, final)

    def by_heart(
        self,
        content_format: ContentFormat,
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
        limit: int = 8 << 20,
    ) -> TracedTemplate | None:
        """What renders chats of plain texts as ``render`` does with the same arguments, at a fraction of the cost; None
        where it cannot. ``limit`` bounds its memory in bytes.
        """
        if _RESERVED & (arguments or {}).keys():
            return None
        wanted = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return TracedTemplate(
            self._tracer,
            lambda messages: self._variables(messages, arguments or {}) | wanted,
            parts=content_format == "openai",
            limit=limit,
        )

    @cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self._environment, self.source)

    def _variables(self, conversation: Sequence[Message], arguments: Mapping[str, Any]) -> dict[str, Any]:
        accepted = {key: value for key, value in arguments.items() if key in self.variables}
        return {**self._special_tokens, **accepted, "messages": conversation}

    def _run(self, variables: dict[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except Unrenderable:
            raise
        except RecursionError as error:
            raise Unrenderable("the chat template recurses too deeply on this conversation") from error
        except Exception as error:  # templates raise whatever their expressions raise
            raise Unrenderable(f"the chat template refuses this conversation: {type(error).__name__}") from error

    def _mark_final(self, conversation: Sequence[Message]) -> tuple[list[Message], str]:
        """The conversation with a tag after the text to be continued, and that text."""
        if "content" not in self.source:
            raise Unrenderable("continue_final_message with a template that reads no content")
        *earlier, last = conversation
        last = copy.deepcopy(last)
        content = last.get("content")
        if isinstance(content, str):
            last["content"] = content + _CONTINUE_TAG
            return [*earlier, last], content
        for part in reversed(content or []):
            if "text" in part:
                text: str = part["text"]
                part["text"] = text + _CONTINUE_TAG
                return [*earlier, last], text
        raise Unrenderable("continue_final_message is set, but the last message has no text")


def _cut_after(text: str, final: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise Unrenderable("continue_final_message is set, but the template drops the last message's text")
    at = text.rindex(tag)
    # A template that trims the message has eaten the tag's trailing space, and the text's own with it.
    return text[:at] if text.startswith(_CONTINUE_TAG, at) else text[:at].rstrip()


class _GenerationBlock(Extension):
    """``{% generation %}``: marks assistant text for training; here it only renders, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if "%" in _DATE_DIRECTIVES.sub("", pattern):
        raise Unrenderable("the chat template writes the time of day, which differs from worker to worker")
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - local time, as the worker's library has it


def _is_random(tree: nodes.Template) -> bool:
    return any(node.name in _RANDOM_FILTERS for node in tree.find_all(nodes.Filter)) or any(
        node.name in _RANDOM_NAMES for node in tree.find_all(nodes.Name)
    )


def _as_system(conversation: Sequence[Message]) -> list[Message]:
    """Developer messages as system messages and, where one then stands out of first place, all merged into the first."""
    converted = []
    for message in conversation:
        if message["role"] == "developer":
            message = {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}  # noqa: PLW2901
        converted.append(message)
    system = [index for index, message in enumerate(converted) if message["role"] == "system"]
    if not any(index > 0 for index in system):
        return converted
    texts = [_joined_text(converted[index].get("content", "")) for index in system]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in converted if message["role"] != "system")]


def _joined_text(content: Any) -> str:
    if not isinstance(content, list):
        return content or ""
    return "\n".join(part if isinstance(part, str) else part["text"] for part in content if _has_text(part))


def _has_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and "text" in part)


# Content format detection. vLLM calls a template "openai" when a loop in it runs over a message's content: directly
# (``for part in message.content``), through variables assigned from messages, through a macro that is handed the
# content, or over a plain variable named ``content``. What it cannot analyse counts as "string".


def _content_format(tree: nodes.Template) -> ContentFormat:
    try:
        return "openai" if _loops_over_content(tree) else "string"
    except _NotAnalysable:
        return "string"


class _NotAnalysable(Exception):
    """An assignment or loop over messages whose target is not a plain name."""


def _loops_over_content(tree: nodes.Template) -> bool:
    messages = list(_message_names(tree))
    parameters: dict[int, set[str]] = {}
    inside_macros: set[int] = set()
    for macro in tree.find_all(nodes.Macro):
        handed = _parameters_handed_content(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            inside_macros.add(id(loop))
            if handed:
                parameters[id(loop)] = handed
    for loop in tree.find_all(nodes.For):
        over_content = any(_reads(loop.iter, name, "content") for name in messages)
        if not over_content and isinstance(loop.iter, nodes.Name):
            plain = loop.iter.name == "content" and id(loop) not in inside_macros
            over_content = plain or loop.iter.name in parameters.get(id(loop), ())
        if over_content:
            _target_name(loop.target)
            return True
    return False


def _parameters_handed_content(tree: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    names = [argument.name for argument in macro.args]
    handed = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        positional = zip(names, call.args, strict=False)
        by_name = ((keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in names)
        for name, value in (*positional, *by_name):
            if any(_reads(value, message, "content") for message in messages):
                handed.add(name)
    return handed


def _message_names(tree: nodes.Template) -> Iterator[str]:
    """Names of loop variables that stand for one message."""
    lists = list(_names_assigned_from(tree, "messages"))
    for loop in tree.find_all(nodes.For):
        if any(_reads(loop.iter, name) for name in lists):
            yield _target_name(loop.target)


def _names_assigned_from(tree: nodes.Template, name: str) -> Iterator[str]:
    seen = {name}
    queue = deque([name])
    while queue:
        source = queue.popleft()
        yield source
        for assignment in tree.find_all(nodes.Assign):
            if _reads(assignment.node, source):
                target = _target_name(assignment.target)
                if target not in seen:
                    seen.add(target)
                    queue.append(target)


def _target_name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _NotAnalysable
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether ``node`` is ``name`` (or ``name.key``), possibly filtered, tested or sliced."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is None:
        return _is_name(node, name)
    if isinstance(node, nodes.Getitem):
        return _is_name(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _is_name(node.node, name) and node.attr == key


def _is_name(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
