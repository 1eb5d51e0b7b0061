"""The parse step: a request's body and headers to what the router needs to know of them.

Only what the router itself reads is checked for meaning; beyond that, wrong kinds of values are refused where no engine
could accept them, and everything else is the engine's to judge.
"""

import os
import re
from collections.abc import Iterable
from itertools import count
from typing import Any
from urllib.parse import parse_qs

import msgspec

from router.body_memory import SHORTEST, BodyMemory
from router.conversation import PlainTexts, plain_texts
from router.errors import InvalidRequest, TooLarge
from router.multipart import form_field
from router.splice import Kind

_SCALARS = frozenset(
    {
        "best_of",
        "cache_salt",
        "echo",
        "frequency_penalty",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stream",
        "suffix",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
    }
)
_NUMBERS = frozenset(
    {
        "best_of",
        "frequency_penalty",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)
_OBJECTS = frozenset({"chat_template_kwargs", "kv_transfer_params", "logit_bias", "response_format", "stream_options"})
_NOTHING = type(None)
# The types of values, by member, that need no closer look; every other member may be anything.
_FINE: dict[str, frozenset[type]] = {
    **dict.fromkeys(_SCALARS, frozenset({str, int, float, bool, _NOTHING})),
    **dict.fromkeys(_NUMBERS, frozenset({int, float, bool, _NOTHING})),
    **dict.fromkeys(_OBJECTS, frozenset({dict, _NOTHING})),
    "tools": frozenset({list, _NOTHING}),
}
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-data-parallel-rank",
        b"x-request-id",
    }
)
_KEPT = frozenset({b"content-length", b"x-request-id"})
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
"""Headers that carry a client's key; they do not travel on to workers where keys are in use."""
PRIORITY_HEADER = b"x-warmroute-priority"
_READ = _HOP_BY_HOP | CREDENTIALS | {PRIORITY_HEADER}
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OWN_IDS = count(1)
_OWN_PREFIX = os.urandom(8).hex()


def _fresh_prefix() -> None:
    global _OWN_PREFIX  # noqa: PLW0603 - two processes must never give the same id
    _OWN_PREFIX = os.urandom(8).hex()


os.register_at_fork(after_in_child=_fresh_prefix)

_decoder = msgspec.json.Decoder()


class Request(msgspec.Struct, eq=False):
    """One request. ``raw`` is the body as it came, ``body`` what it says where it is a JSON object; ``headers`` are those
    that travel on. ``plain`` are the roles and texts of a chat that has nothing else. ``only`` names the one worker that can serve it, where there is one; ``repeatable`` is whether another
    worker may get it after one failed it half-way."""

    kind: Kind
    raw: bytes
    body: dict[str, Any]
    model: str
    cache_salt: str
    request_id: str
    headers: list[tuple[bytes, bytes]]
    plain: PlainTexts | None = None
    method: bytes = b"POST"
    only: str = ""
    repeatable: bool = True


def parse_request(
    kind: Kind, raw: bytes, headers: list[tuple[bytes, bytes]], request_id: str, memory: BodyMemory | None = None
) -> Request:
    """``memory``, where given, spares decoding what it knows of long chats.

    Raises:
        InvalidRequest: the body is not what the endpoint takes; names the field.
    """
    if kind != "chat" or len(raw) < SHORTEST:
        memory = None
    remembered = memory.decode(raw) if memory is not None else None
    body, known = remembered or (_decode(raw), 0)
    _check_kinds(body)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "a string", model)
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequest("cache_salt must be a non-empty string", param="cache_salt")
    plain = None
    if kind == "chat":
        plain = plain_texts(body.get("messages"))
        if plain is None:
            _check_messages(body)
        elif memory is not None:
            memory.learn(raw, body, known)
    elif kind == "completions":
        _check_prompt(body)
    return Request(kind, raw, body, model or "", salt or "", request_id, headers, plain)


def parse_other(
    kind: Kind, scope: Any, raw: bytes, headers: list[tuple[bytes, bytes]], request_id: str, *, repeatable: bool
) -> Request:
    """A request that is no prompt, of which only the model matters: from its JSON body, its form or its query string.

    Raises:
        InvalidRequest: it says that it is JSON or a form, and is not.
    """
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    body: dict[str, Any] = {}
    if raw and content_type[:19].lower() == b"multipart/form-data":
        model: Any = form_field(raw, content_type, "model")
    elif raw and (b"json" in content_type[:64].lower() or not content_type):
        body = _decode(raw)
        model = body.get("model")
    else:
        form = raw and content_type[:33].lower() == b"application/x-www-form-urlencoded"
        model = _last_model(raw if form else scope.get("query_string") or b"")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "a string", model)
    method = b"GET" if scope["method"] == "HEAD" else scope["method"].encode("ascii")
    return Request(kind, raw, body, model or "", "", request_id, headers, None, method, repeatable=repeatable)


def _last_model(pairs: bytes) -> str:
    """Of a form or query string; as workers read it, the last one counts, given or empty."""
    if not pairs:
        return ""
    try:
        return parse_qs(pairs.decode("latin-1"), keep_blank_values=True, max_num_fields=100).get("model", [""])[-1]
    except ValueError as error:
        raise InvalidRequest("the form or query string has more than 100 fields") from error


class Arrival(msgspec.Struct, eq=False):
    """What a request's headers say, read in one pass. ``headers`` are those that travel on, ``shown`` the key or token
    shown, ``length`` Content-Length or 0, ``size`` the bytes of all ``count`` headers."""

    request_id: str
    headers: list[tuple[bytes, bytes]]
    length: int
    count: int
    size: int
    shown: bytes | None
    priority: bytes | None

    def __repr__(self) -> str:
        return f"Arrival({self.request_id!r})"  # a key is not to be written anywhere

    def check(self, most: int, most_bytes: int) -> None:
        """Raises:
        TooLarge: there are too many headers, or they are too long.
        """
        if self.count > most:
            raise TooLarge(f"the request has more than {most} headers", status=431, code="headers_too_large")
        if self.size > most_bytes:
            raise TooLarge(f"the request's headers exceed {most_bytes} bytes", status=431, code="headers_too_large")


def read_headers(  # noqa: C901 - a table of names, and one pass for all of them
    headers: list[tuple[bytes, bytes]], *, keyed: bool = False
) -> Arrival:
    """Where keys are in use (``keyed``), the client's does not travel on."""
    size = 4 * len(headers)
    forwarded: list[tuple[bytes, bytes]] = []
    shown = priority = connection = given = length = None
    for header in headers:
        name, value = header
        size += len(name) + len(value)
        if name not in _READ:
            forwarded.append(header)
        elif name == b"content-length":
            length = value if length is None else length
        elif name in CREDENTIALS:
            if shown is None:
                shown = shown_in(name, value)
            if not keyed:
                forwarded.append(header)
        elif name == b"x-request-id":
            given = value if given is None else given
        elif name == PRIORITY_HEADER:
            priority = value if priority is None else priority
            forwarded.append(header)
        elif name == b"connection":
            connection = value if connection is None else b"%b,%b" % (connection, value)
    if connection is not None and (dropped := _with_named(_HOP_BY_HOP, connection)) is not _HOP_BY_HOP:
        forwarded = [header for header in forwarded if header[0] not in dropped]
    declared = int(length) if length is not None and length.isdigit() else 0
    return Arrival(_named(given), forwarded, declared, len(headers), size, shown, priority)


def shown_in(name: bytes, value: bytes) -> bytes | None:
    """The key or token that one of ``CREDENTIALS`` shows."""
    if name == b"x-api-key":
        return value.strip()
    return value[7:].strip() if value[:7].lower() == b"bearer " else None


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's X-Request-Id, or a fresh one where it is missing or unfit for a header and an engine's id."""
    return _named(next((value for name, value in headers if name == b"x-request-id"), None))


def _named(given: bytes | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"{_OWN_PREFIX}{next(_OWN_IDS):08x}"


def response_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A worker's response headers without those of its hop; Content-Length stays, and the id it gives the request."""
    connection = None
    kept = []
    for header in headers:
        name = header[0]
        if name not in _HOP_BY_HOP or name in _KEPT:
            kept.append(header)
        elif name == b"connection":
            connection = header[1] if connection is None else b"%b,%b" % (connection, header[1])
    if connection is not None and (dropped := _with_named(_HOP_BY_HOP, connection)) is not _HOP_BY_HOP:
        kept = [header for header in kept if header[0] not in dropped or header[0] in _KEPT]
    return kept


def _with_named(dropped: frozenset[bytes], connection: bytes) -> frozenset[bytes]:
    named = {token.strip().lower() for token in connection.split(b",")} - {b"keep-alive", b"close"}
    return dropped | named if named else dropped


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        body = _decoder.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_kind_of(body)}")
    return body


def _check_kinds(body: dict[str, Any]) -> None:
    for key, value in body.items():
        fine = _FINE.get(key)
        if fine is not None and type(value) not in fine:
            _check_kind(key, value)


def _check_kind(key: str, value: Any) -> None:
    if key in _SCALARS:
        if isinstance(value, list | dict) or not _is_number(value):
            raise _wrong(key, "a number" if key in _NUMBERS else "a single value", value)
    else:
        raise _wrong(key, "a list" if key == "tools" else "an object", value)


def _check_messages(body: dict[str, Any]) -> None:
    messages = body.get("messages")
    if messages is None:
        raise InvalidRequest("messages is required", param="messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "a list of messages", messages)
    if not messages and "kv_transfer_params" not in body:
        raise InvalidRequest("messages must not be empty", param="messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{number}]", "an object", message)
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{number}].role must be a string", param=f"messages[{number}].role")


def _check_prompt(body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    if prompt is None:
        if body.get("prompt_embeds") is None:
            raise InvalidRequest("prompt is required", param="prompt")
    elif not isinstance(prompt, str | list):
        raise _wrong("prompt", "a string, a list of strings, or token ids", prompt)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _wrong(field: str, expected: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{field} must be {expected}, not {_kind_of(value)}", param=field)


def _kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"
