"""Putting token ids into a request body, so that the worker does not tokenize again.

Completions take them as ``prompt``; chats as ``kv_transfer_params.prompt_token_ids``. The body is cut open at one place
and nothing else in it changes; where that place is not certain, the top-level object is written anew around the raw
bytes of its other members.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from router.conversation import plain_texts
from router.errors import InvalidRequest
from router.prompt_ids import PromptIds

Kind = Literal["chat", "completions", "messages", "responses", "generate", "stored", "load"]
"""How a request is read. Prompts are of the first five kinds; ``stored`` asks for a response made before, ``load`` is
everything routed by load alone."""
LEAN_FROM = 16 << 10
"""Bytes of a body from which its text is worth leaving behind: below that nothing measurable is saved."""
# Members that neither the template nor a parser reads.
_KEPT_FIELDS = frozenset(
    """
    cache_salt frequency_penalty ignore_eos logprobs max_completion_tokens max_tokens min_p min_tokens model n
    presence_penalty priority repetition_penalty seed stop stream stream_options temperature top_k top_logprobs top_p user
    """.split()  # noqa: SIM905 - a table of names
)
_EXACT = 2.0**53
_KEPT_TYPES = frozenset({str, int, float, bool, type(None)})
_MEMBERS = dict[str, msgspec.Raw]
_NO_MESSAGES = [{"role": "user", "content": ""}]
_OPENING = b'"kv_transfer_params":{"prompt_token_ids":'
_PROMPT_KEY = re.compile(rb'"prompt"[ \t\r\n]*:[ \t\r\n]*')


def splice_token_ids(body: bytes, ids: Sequence[int] | Sequence[Sequence[int]], kind: Kind) -> bytes:
    """``body`` with the ids in it: those of one prompt, or for completions also a list per prompt.

    Of a member given twice the last counts, as it does for the worker.

    Raises:
        InvalidRequest: ``body`` is not a JSON object, or its ``kv_transfer_params`` is not one.
    """
    encoded = msgspec.json.encode(ids)
    return splice(body, [encoded], kind, given="kv_transfer_params" in _members(body, "the body"))


def splice(body: bytes, encoded: Sequence[bytes], kind: Kind, *, given: bool) -> bytes:
    """``body`` with ids whose JSON is ``encoded``, in pieces; ``given`` says whether it has ``kv_transfer_params``.

    A chat is copied once and not read. A completion of 128 KB is read in about 0.05 ms. Raises as
    ``splice_token_ids`` does.
    """
    if kind == "completions":
        return _with_prompt(body, b"".join(encoded))
    if given:
        members = _members(body, "the body")
        value = bytes(members["kv_transfer_params"])
        inner = {} if value == b"null" else _members(value, "kv_transfer_params")
        inner["prompt_token_ids"] = msgspec.Raw(b"".join(encoded))
        return msgspec.json.encode(members | {"kv_transfer_params": inner})
    end = body.rindex(b"}")
    last = end - 1
    while body[last] in b" \t\r\n":
        last -= 1
    comma = b"" if body[last] == b"{"[0] else b","
    view = memoryview(body)
    return b"".join((view[:end], comma, _OPENING, *encoded, b"}", view[end:]))


def without_messages(body: Mapping[str, Any], encoded: Sequence[bytes]) -> bytes | None:
    """A chat body whose messages' text is left out, for a worker that takes the ids in its place.

    None where the answer could depend on more than the ids. In vLLM (0.32, ``entrypoints/openai/chat_completion``) it
    does on: tool calls in the history (numbering of calls), the last message's role where no generation prompt is added,
    parts of a content list (media and their adapters), ``echo``, and on whether messages are valid at all. None of it
    differs between chats of plain texts in well-known roles without such fields; only those lose their messages, and
    only with members whose values survive being written again.
    """
    if plain_texts(body.get("messages")) is None:
        return None
    parts = parts_without_messages(body, encoded)
    return b"".join(parts) if parts is not None else None


def parts_without_messages(body: Mapping[str, Any], encoded: Sequence[bytes]) -> list[bytes] | None:
    """``without_messages`` of a chat known to be plain texts in well-known roles, in pieces that are not copied."""
    if not _can_be_rewritten(body, "messages"):
        return None
    short = msgspec.json.encode({**body, "messages": _NO_MESSAGES})
    return [short[:-1] + b"," + _OPENING, *encoded, b"}}"]


def with_prompt(body: Mapping[str, Any], encoded: Sequence[bytes]) -> bytes | None:
    """A completion's body with ids in the place of its text, made without reading the text again; None where a member's
    value may not survive being written again.
    """
    if not _can_be_rewritten(body, "prompt"):
        return None
    short = msgspec.json.encode({key: value for key, value in body.items() if key != "prompt"})
    comma = b"," if len(body) > 1 else b""
    return b"".join((short[:-1], comma, b'"prompt":', *encoded, b"}"))


def _can_be_rewritten(body: Mapping[str, Any], prompt: str) -> bool:
    return all(
        key == prompt or (key in _KEPT_FIELDS and all(map(_survives, _values(key, value))))
        for key, value in body.items()
    )


def _values(key: str, value: Any) -> Iterable[Any]:
    if key == "stop" and isinstance(value, list):
        return value
    if key == "stream_options" and isinstance(value, dict):
        return value.values()
    return (value,)


def _survives(value: Any) -> bool:
    # Whole numbers beyond 64 bits are read as floats here, and as what they are by the worker.
    return type(value) in _KEPT_TYPES and not (type(value) is float and abs(value) >= _EXACT)


def ids_of(prompts: Sequence[PromptIds], *, several: bool) -> list[bytes]:
    """JSON of prompts' ids, in pieces: of the only one, or a list of them where there may be ``several``."""
    if not several:
        return prompts[0].json_parts()
    parts = [b"["]
    for prompt in prompts:
        parts += (*prompt.json_parts(), b",")
    parts[-1] = b"]"
    return parts


def can_carry_ids(body: dict[str, Any], kind: Kind) -> bool:
    """Whether the response stays the same when the worker gets ids instead of text.

    Not with ``echo`` or its like, which give the text back, and not where the prompt is more than text or ids already.
    """
    if body.get("echo") or kind == "generate" or body.get("enable_response_messages"):
        return False
    if kind == "completions":
        return body.get("suffix") is None and body.get("prompt_embeds") is None
    return not body.get("return_prompt_text") and isinstance(body.get("kv_transfer_params") or {}, dict)


class _PromptOnly(msgspec.Struct):
    prompt: msgspec.Raw = msgspec.Raw(b"")


def _with_prompt(body: bytes, encoded: bytes) -> bytes:
    """Cut open where the only ``"prompt"`` is a member of the object itself; else written anew."""
    at = body.find(b'"prompt"')
    if at >= 0 and body.find(b'"prompt"', at + 1) < 0 and _is_flat(body, at):
        old = bytes(_prompt_only(body).prompt)
        key = _PROMPT_KEY.match(body, at)
        if old and key is not None and body.startswith(old, key.end()):
            view = memoryview(body)
            return b"".join((view[: key.end()], encoded, view[key.end() + len(old) :]))
    return msgspec.json.encode(_members(body, "the body") | {"prompt": msgspec.Raw(encoded)})


def _is_flat(body: bytes, end: int) -> bool:
    """Whether nothing before ``end`` can open another object, list or string that spans it."""
    before = body[:end]
    return before.count(b"{") == 1 and b"[" not in before and b"\\" not in before and not before.count(b'"') % 2


def _prompt_only(body: bytes) -> _PromptOnly:
    try:
        return msgspec.json.decode(body, type=_PromptOnly)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body must be a JSON object: {error}", param=None) from error


def _members(data: bytes, what: str) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(data, type=_MEMBERS)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{what} must be a JSON object: {error}", param=None) from error
