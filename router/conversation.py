"""A request's messages and tools, as the chat template will see them.

vLLM validates messages against the OpenAI types, then flattens content, drops what the role does not carry and parses
tool-call arguments. What it answers 400 to on sight is an InvalidRequest here too; shapes whose treatment depends on
the library versions in the worker are Unrenderable, so that the worker itself decides.
"""

import json
from collections.abc import Mapping
from typing import Any

from router.chat_template import ContentFormat, Message
from router.errors import InvalidRequest, Unrenderable

_MEDIA_KEYS = frozenset(
    """
    audio_embeds audio_url image_embeds image_pil image_url input_audio input_image prompt_embeds video_embeds video_url
    """.split()  # noqa: SIM905 - a table of names
)
# Keys of any content part the OpenAI or vLLM types define; others travel on to templates that take parts.
_PART_KEYS = frozenset(
    """
    audio_embeds audio_url closed data file image_embeds image_pil image_url input_audio name prompt_cache_breakpoint
    refusal text thinking type uuid video_embeds video_url
    """.split()  # noqa: SIM905 - a table of names
)
_NULLABLE_CONTENT = frozenset({"assistant", "function"})
_BILLING_HEADER = "x-anthropic-billing-header"


class AsGiven(dict[str, Any]):
    """A tool call's function whose members keep their order, as those of a Responses body do."""


_PLAIN_ROLES = frozenset({"system", "user", "assistant", "tool"})
_PLAIN_MEMBERS = 2  # role and content


PlainTexts = tuple[tuple[str, ...], list[str]]
"""Roles and texts."""


def plain_texts(messages: Any) -> PlainTexts | None:
    """Roles and texts of a chat that is nothing but well-known roles and plain texts, which ``conversation_of`` takes
    over as they are; None for every other. About 0.2 µs per message.
    """
    if not isinstance(messages, list) or not messages:
        return None
    roles, texts = [], []
    for message in messages:
        if type(message) is not dict or len(message) != _PLAIN_MEMBERS:
            return None
        role, text = message.get("role"), message.get("content")
        if type(text) is not str or type(role) is not str or role not in _PLAIN_ROLES:
            return None
        if role == "system" and text.startswith(_BILLING_HEADER):
            return None
        roles.append(role)
        texts.append(text)
    return tuple(roles), texts


def conversation_of(messages: Any, content_format: ContentFormat) -> list[Message]:
    """The messages as templates get them, none of them shared with the input.

    Raises:
        InvalidRequest: a member has a type no OpenAI-compatible server takes; names it.
        Unrenderable: media, or a shape left to the worker.
    """
    if not isinstance(messages, list):
        raise InvalidRequest(f"messages must be a list, got {_kind(messages)}", param="messages")
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    return [_parse(message, f"messages[{index}]", content_format) for index, message in enumerate(messages)]


def _parse(message: Any, where: str, content_format: ContentFormat) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object, got {_kind(message)}", param=where)
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role must be a string, got {_kind(role)}", param=f"{where}.role")
    parsed: Message = {"role": role, "content": _content(message, role, where, content_format)}
    if role == "assistant":
        _add_assistant(parsed, message, where)
    elif role == "tool":
        _add_tool(parsed, message, where)
    for key in ("name", "task"):
        if key in message:
            parsed[key] = _string(message[key], f"{where}.{key}")
    if role == "developer":
        if message.get("tools") is not None:
            raise Unrenderable("a developer message brings tools of its own")
        parsed["tools"] = None
    return parsed


def _content(message: Message, role: str, where: str, content_format: ContentFormat) -> Any:
    content = message.get("content")
    where = f"{where}.content"
    if content is None:
        if "content" in message and (role not in _NULLABLE_CONTENT or message.get("tool_calls", ()) is None):
            raise Unrenderable(f"null content in a message with role {role!r}")
        parts: list[Message] = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
        _check_parts(parts, role, where)
    else:
        raise InvalidRequest(f"{where} must be a string or a list of parts, got {_kind(content)}", param=where)
    if role == "system":
        parts = _without_billing_header(parts)
    if content_format == "string":
        return "\n".join(text for text in map(_part_text, parts) if text)
    wrapped = [_wrapped(part) for part in parts]
    if role == "tool":
        return "\n".join(part["text"] for part in wrapped)
    return wrapped


def _check_parts(parts: list[Any], role: str, where: str) -> None:
    """Only parts every version of the message types takes for this role; the worker may take others or refuse them."""
    for index, part in enumerate(parts):
        at = f"{where}[{index}]"
        if isinstance(part, str):
            raise Unrenderable("a content part is a bare string, which only some messages may have")
        if not isinstance(part, dict):
            raise InvalidRequest(f"{at} must be an object with a type, got {_kind(part)}", param=at)
        if _MEDIA_KEYS & part.keys() or part.get("uuid") is not None:
            raise Unrenderable("a message holds media")
        kind = part.get("type")
        if kind != "text" and not (kind == "refusal" and role == "assistant"):
            raise Unrenderable("a message holds a content part that is not plain text")
        text = part.get(kind)
        if text is not None and not isinstance(text, str):
            raise InvalidRequest(f"{at}.{kind} must be a string, got {_kind(text)}", param=f"{at}.{kind}")
        _string(text, f"{at}.{kind}")


def _without_billing_header(parts: list[Message]) -> list[Message]:
    """Drop the line Claude Code opens its system prompt with: it changes on every request."""
    kept = []
    for part in parts:
        if part["type"] != "text" or not part["text"].startswith(_BILLING_HEADER):
            kept.append(part)
        elif rest := part["text"].partition("\n")[2]:
            kept.append({**part, "text": rest})
    return kept


def _part_text(part: Message) -> str:
    text: str = part[part["type"]]
    return text


def _wrapped(part: Message) -> Message:
    extra = {key: value for key, value in part.items() if key not in _PART_KEYS}
    return {"type": "text", "text": _part_text(part), **extra}


def _add_assistant(parsed: Message, message: Message, where: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list, got {_kind(calls)}", param=f"{where}.tool_calls")
    if calls:
        parsed["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        parsed["reasoning"] = parsed["reasoning_content"] = _string(reasoning, f"{where}.reasoning")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments parsed, its members in the order of the OpenAI types, unknown ones last."""
    if not isinstance(call, dict):
        raise InvalidRequest(f"{where} must be an object, got {_kind(call)}", param=where)
    function = call.get("function")
    if call.get("type") != "function" or not isinstance(function, dict):
        raise Unrenderable(f"{where} is not a complete function call")
    _string(call.get("id"), f"{where}.id")
    _string(function.get("name"), f"{where}.function.name")
    arguments = _arguments(_string(function.get("arguments"), f"{where}.function.arguments"))
    first = () if isinstance(function, AsGiven) else ("arguments", "name")
    ordered = {**_ordered(function, first), "arguments": arguments}
    return {**_ordered(call, ("id", "function", "type")), "function": ordered}


def _arguments(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        # The standard library's reader, not msgspec's: NaN and Infinity pass, as they do in the worker.
        parsed = json.loads(text)
    except ValueError:
        return {}
    except RecursionError as error:
        raise Unrenderable("tool-call arguments are nested too deeply") from error
    return parsed if isinstance(parsed, dict) else {}


def _ordered(value: Mapping[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    return {key: value[key] for key in first} | {key: item for key, item in value.items() if key not in first}


def _add_tool(parsed: Message, message: Message, where: str) -> None:
    if "tool_call_id" in message:
        identifier = message["tool_call_id"]
        parsed["tool_call_id"] = None if identifier is None else _string(identifier, f"{where}.tool_call_id")


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions as templates get them: known members only, in the order of vLLM's models, null descriptions
    and parameters spelled out.

    Raises:
        InvalidRequest: ``tools`` is not a list of objects, or is empty.
        Unrenderable: a member has a type the worker may or may not convert.
    """
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools must be a list, got {_kind(tools)}", param="tools")
    if not tools:
        raise InvalidRequest("tools must not be an empty list; leave it out instead", param="tools")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"{where} must be an object, got {_kind(tool)}", param=where)
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise Unrenderable(f"{where} is not a function tool")
    deferred = _optional(tool.get("defer_loading"), bool, f"{where}.defer_loading")
    described = _function(function, f"{where}.function", deferred)
    return {"type": "function", "function": described, **_given(defer_loading=deferred)}


def _function(function: Message, where: str, deferred: bool | None) -> dict[str, Any]:
    parameters = _optional(function.get("parameters"), dict, f"{where}.parameters")
    strict = _optional(function.get("strict"), bool, f"{where}.strict")
    own = _optional(function.get("defer_loading"), bool, f"{where}.defer_loading")
    return {
        "name": _string(function.get("name"), f"{where}.name"),
        "description": _optional(function.get("description"), str, f"{where}.description"),
        "parameters": parameters,
        **_given(strict=strict, defer_loading=deferred if own is None else own),
    }


def _given(**members: Any) -> dict[str, Any]:
    return {key: value for key, value in members.items() if value is not None}


def _optional(value: Any, kind: type, where: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise Unrenderable(f"{where} is of type {_kind(value)}")
    return value


def _string(value: Any, where: str) -> str:
    # Not InvalidRequest: which other types pass depends on the type union of the worker's version.
    if not isinstance(value, str):
        raise Unrenderable(f"{where} is of type {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
