"""Responses and Anthropic Messages bodies as the chat body vLLM makes of them.

vLLM serves both by way of chat: a Messages request becomes a chat request, a Responses request a list of chat messages,
and from there on the same template and tokenizer are at work. The rules are those of ``entrypoints/anthropic/serving.py``
and ``entrypoints/openai/responses/utils.py`` of vLLM 0.32. What they refuse, what depends on state the worker alone has,
and what is rare enough not to be worth the risk is Unrenderable: the worker judges it, and it is routed by load.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.conversation import AsGiven
from router.errors import RouterError, Unrenderable

Dialect = Literal["messages", "responses"]
Message = dict[str, Any]

_BILLING_HEADER = "x-anthropic-billing-header"
_THINKING_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_FIRST_SYSTEM_PROBE = [
    {"role": "system", "content": "t"},
    {"role": "user", "content": "t"},
    {"role": "system", "content": "t"},
    {"role": "user", "content": "t"},
]


class Renderer(Protocol):
    """What a translation needs to know of the model; ``router.prompt.PromptBuilder`` is one."""

    def render(self, body: dict[str, Any]) -> str: ...

    def template_source(self, *, with_tools: bool) -> str | None: ...


class Translator:
    """Translates for one model. Two of vLLM's rules depend on its chat template; they are found out once."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def chat_body(self, dialect: Dialect, body: Mapping[str, Any]) -> dict[str, Any]:
        """The chat body with the same prompt. Costs a few microseconds per message.

        Raises:
            Unrenderable: only the worker can tell.
        """
        if dialect == "messages":
            return self._of_messages(body)
        return _of_responses(body)

    @cached_property
    def merges_system(self) -> bool:
        """Whether system messages move to the front: where a template variant refuses them anywhere else."""
        sources = (self._renderer.template_source(with_tools=tools) for tools in (False, True))
        return any(_refuses_later_system(source) for source in sources)

    @cached_property
    def disabled_effort(self) -> str:
        """The reasoning effort that stands for disabled thinking: ``low`` where the template knows no ``none``."""
        none = self._greeting("none")
        if none is None or any(self._greeting(effort) == none for effort in _THINKING_EFFORTS):
            return "low"
        return "none"

    def _greeting(self, effort: str) -> str | None:
        try:
            return self._renderer.render({"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": effort})
        except RouterError:
            return None

    def _of_messages(self, body: Mapping[str, Any]) -> dict[str, Any]:
        messages = _list_of_objects(body.get("messages"), "messages")
        system = _system_texts(body.get("system"))
        if self.merges_system:
            system += [text for message in messages if message.get("role") == "system" for text in _own_text(message)]
        chat: list[Message] = [{"role": "system", "content": "".join(system)}] if system else []
        for message in messages:
            if message.get("role") != "system":
                chat += _turn(message)
            elif not self.merges_system:
                chat += [{"role": "system", "content": text} for text in _own_text(message)]
        effort = _effort(body, self)
        tools, choice = _tools(body), body.get("tool_choice")
        return _without_none(
            model=body.get("model"),
            messages=chat,
            tools=tools,
            tool_choice="none" if isinstance(choice, dict) and choice.get("type") == "none" else None,
            reasoning_effort=effort,
            chat_template_kwargs=body.get("chat_template_kwargs"),
            kv_transfer_params=body.get("kv_transfer_params"),
        )


def _refuses_later_system(source: str | None) -> bool:
    if not source:
        return True
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        environment.from_string(source).render(messages=_FIRST_SYSTEM_PROBE, add_generation_prompt=False)
    except jinja2.TemplateError:
        return True
    except Exception as error:  # templates raise whatever their expressions raise
        raise Unrenderable("the chat template fails on a plain conversation") from error
    return False


# Messages.


def _effort(body: Mapping[str, Any], translator: Translator) -> str | None:
    thinking, config = body.get("thinking"), body.get("output_config")
    if isinstance(thinking, dict) and thinking.get("type") == "disabled":
        return translator.disabled_effort
    effort = config.get("effort") if isinstance(config, dict) else None
    if effort is not None and effort not in _THINKING_EFFORTS:
        raise Unrenderable("output_config.effort has a value that only some workers know")
    return effort


def _system_texts(system: Any) -> list[str]:
    if not system:
        return []
    return [system] if isinstance(system, str) else _block_texts(system)


def _own_text(message: Message) -> list[str]:
    """A system message's text as a list of one, or of none where nothing is left of it."""
    content = message.get("content")
    if isinstance(content, str):
        return [] if content.startswith(_BILLING_HEADER) or not content else [content]
    texts = _block_texts(content)
    return ["".join(texts)] if texts else []


def _block_texts(blocks: Any) -> list[str]:
    texts = []
    for block in _list_of_objects(blocks, "system"):
        if block.get("type") in ("tool_addition", "tool_removal"):
            raise Unrenderable("a system message changes the tools")
        text = _optional_text(block, "text") if block.get("type") == "text" else None
        if text and not text.startswith(_BILLING_HEADER):
            texts.append(text)
    return texts


def _turn(message: Message) -> list[Message]:
    """The chat messages one message becomes: results of tools come before what the user says beside them."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise Unrenderable("a message's role is neither user, assistant nor system")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = _Blocks(role)
    for block in _list_of_objects(content, "content"):
        blocks.add(block)
    return blocks.chat()


class _Blocks:
    """The content blocks of one message, sorted into what chat knows."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._parts: list[Message] = []
        self._calls: list[Message] = []
        self._thoughts: list[str] = []
        self._results: list[Message] = []

    def add(self, block: Message) -> None:
        kind = block.get("type")
        if kind == "text":
            if text := _optional_text(block, "text"):
                self._parts.append({"type": "text", "text": text})
        elif kind == "thinking" and self._role == "assistant":
            if (thought := _optional_text(block, "thinking")) is not None:
                self._thoughts.append(thought)
        elif kind == "tool_use" and self._role == "assistant":
            self._calls.append(_tool_use(block))
        elif kind == "tool_result" and self._role == "user":
            self._results.append(_tool_result(block))
        elif kind == "image":
            raise Unrenderable("a message holds media")
        elif kind not in ("redacted_thinking", "tool_reference"):
            raise Unrenderable("a message holds a block that its role does not have, or that is not known here")

    def chat(self) -> list[Message]:
        message: Message = {"role": self._role}
        if self._thoughts:
            message["reasoning"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        if len(self._parts) == 1:
            message["content"] = self._parts[0]["text"]
        elif self._parts:
            message["content"] = self._parts
        if self._role == "user" and "content" not in message:
            return self._results
        return [*self._results, message]


def _tool_use(block: Message) -> Message:
    identifier, given = _optional_text(block, "id"), block.get("input")
    if not identifier:
        raise Unrenderable("a tool call has no id: the worker makes one up")
    if given is not None and not isinstance(given, dict):
        raise Unrenderable("a tool call's input is no object")
    function = {"name": _optional_text(block, "name") or "", "arguments": json.dumps(given or {})}
    return {"id": identifier, "type": "function", "function": function}


def _tool_result(block: Message) -> Message:
    content = block.get("content")
    if content is None or isinstance(content, str):
        text = content or ""
    else:
        items = _list_of_objects(content, "content")
        if any(item.get("type") != "text" for item in items):
            raise Unrenderable("a tool's result is more than text")
        text = "\n".join(_text(item.get("text", ""), "text") for item in items)
    return {"role": "tool", "tool_call_id": _optional_text(block, "tool_use_id") or "", "content": text}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = body.get("tools")
    if tools is None:
        return None
    if not tools:
        raise Unrenderable("tools is an empty list, which templates may tell from none")
    return [_anthropic_tool(tool) for tool in _list_of_objects(tools, "tools")]


def _anthropic_tool(tool: Message) -> dict[str, Any]:
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise Unrenderable("a tool has no input_schema")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        **_without_none(strict=tool.get("strict"), defer_loading=tool.get("defer_loading")),
    }
    return {"type": "function", "function": function}


# Responses.


def _of_responses(body: Mapping[str, Any]) -> dict[str, Any]:
    for field in ("previous_response_id", "previous_input_messages", "prompt"):
        if body.get(field):
            raise Unrenderable(f"{field} stands for text that the worker alone has")
    given = body.get("input")
    messages: list[Message] = []
    if instructions := _optional_text(body, "instructions"):
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        # Items join what other items began, never the instructions: those are no assistant's.
        for item in _list_of_objects(given, "input"):
            _add_item(messages, item)
    unfinished = isinstance(given, list) and _is_unfinished(given)
    reasoning = body.get("reasoning")
    return _without_none(
        model=body.get("model"),
        messages=messages,
        tools=_function_tools(body.get("tools")),
        tool_choice="none" if body.get("tool_choice") == "none" else None,
        reasoning_effort=reasoning.get("effort") if isinstance(reasoning, dict) else None,
        chat_template_kwargs=body.get("chat_template_kwargs"),
        kv_transfer_params=body.get("kv_transfer_params"),
        add_generation_prompt=not unfinished,
        continue_final_message=unfinished,
        # Unlike for chats, the tokenizer's own special tokens come on top of the template's.
        add_special_tokens=True,
        truncate_prompt_tokens=-1 if body.get("truncation", "disabled") != "disabled" else None,
        max_tokens=body.get("max_output_tokens"),
    )


def _is_unfinished(items: Sequence[Message]) -> bool:
    last = items[-1] if items else {}
    return last.get("type", "message") in ("message", "reasoning") and last.get("status") in (
        "in_progress",
        "incomplete",
    )


def _add_item(messages: list[Message], item: Message) -> None:
    """Add one input item: some become a message, some part of the assistant's last one."""
    kind = item.get("type")
    if kind in (None, "message") and item.get("role") == "assistant":
        _join(messages, "content", _assistant_text(item))
    elif kind in (None, "message"):
        messages.append(_input_message(item))
    elif kind == "reasoning":
        _join(messages, "reasoning", _reasoning_text(item))
    elif kind == "function_call":
        name, space = _text(item.get("name"), "name"), _optional_text(item, "namespace")
        _add_call(messages, item, f"{space}__{name}" if space else name, _text(item.get("arguments"), "arguments"))
    elif kind == "custom_tool_call":
        payload = json.dumps({"input": _text(item.get("input"), "input")}, ensure_ascii=False)
        _add_call(messages, item, _text(item.get("name"), "name"), payload)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        identifier = _text(item.get("call_id"), "call_id")
        messages.append({"role": "tool", "content": _content(item.get("output")), "tool_call_id": identifier})
    else:
        raise Unrenderable("an input item is of a kind not known here")


def _join(messages: list[Message], member: str, text: str) -> None:
    if messages and messages[-1]["role"] == "assistant" and messages[-1].get(member) is None:
        messages[-1][member] = text
    else:
        messages.append({"role": "assistant", member: text})


def _add_call(messages: list[Message], item: Message, name: str, arguments: str) -> None:
    call = {
        "id": _text(item.get("call_id"), "call_id"),
        "function": AsGiven(name=name, arguments=arguments),
        "type": "function",
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "tool_calls": [call]})


def _assistant_text(item: Message) -> str:
    """Only the first part counts, as it does for the worker."""
    content = item.get("content")
    if isinstance(content, str) and not {"id", "status"} & item.keys():
        return content  # with those it could be read as an output message, whose content is a list
    first = content[0] if isinstance(content, list) and content else None
    if item.get("type") != "message" or not isinstance(first, dict) or first.get("type") != "output_text":
        raise Unrenderable("an assistant's message is more than text")
    return _text(first.get("text"), "text")


def _reasoning_text(item: Message) -> str:
    if item.get("encrypted_content") or not isinstance(item.get("summary"), list):
        raise Unrenderable("a reasoning item is encrypted, or has no summary")
    for member in ("content", "summary"):
        if texts := item.get(member):
            return _text(_list_of_objects(texts, member)[0].get("text"), "text")
    return ""


def _input_message(item: Message) -> Message:
    role = item.get("role")
    if role not in ("user", "system", "developer") or "id" in item:
        raise Unrenderable("an input message has a role or an id, and is read in more than one way")
    content = _content(item.get("content"))
    if role == "system" and isinstance(content, list) and any(p["text"].startswith(_BILLING_HEADER) for p in content):
        raise Unrenderable("a system message opens with a billing header")
    return {"role": role, "content": content}


def _content(content: Any) -> str | list[Message]:
    if isinstance(content, str):
        return content
    parts = _list_of_objects(content, "content")
    if any(part.get("type") in ("input_image", "input_audio", "input_file") for part in parts):
        raise Unrenderable("a message holds media")
    if not parts or any(part.get("type") != "input_text" for part in parts):
        raise Unrenderable("an input item holds a part that is not plain text")
    return [{"type": "text", "text": _text(part.get("text"), "text")} for part in parts]


def _function_tools(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    return [_response_tool(tool) for tool in _list_of_objects(tools, "tools")]


def _response_tool(tool: Message) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise Unrenderable("a tool is not a function")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        **_without_none(strict=tool.get("strict"), defer_loading=tool.get("defer_loading")),
    }
    return {"type": "function", "function": function}


# Both.


def _list_of_objects(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unrenderable(f"{where} is no list of objects")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Unrenderable(f"{where} is no string")
    return value


def _optional_text(holder: Mapping[str, Any], member: str) -> str | None:
    value = holder.get(member)
    return None if value is None else _text(value, member)


def _without_none(**members: Any) -> dict[str, Any]:
    return {key: value for key, value in members.items() if value is not None}
