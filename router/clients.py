"""Clients of other dialects than OpenAI's chat: how their errors look, and what their answers tell on the way."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from router.client import Client
from router.errors import ApiError
from router.splice import Kind

_HEAD_BYTES = 64 << 10
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')
_INPUT_TOKENS = re.compile(rb'"input_tokens"\s*:\s*(\d{1,15})(?!\d)')


class MessagesClient(Client):
    """Errors as Anthropic's are: an OpenAI error object that also says, at the top, that it is one."""

    def error_body(self, error: ApiError) -> bytes:
        return b'{"type":"error",' + error.body()[1:]

    def error_event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + self.error_body(error) + b"\n\n"


class ResponsesClient(Client):
    """The client of a Responses request; what passes on to it tells the response's id and its count of prompt tokens."""

    transparent = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.learn: Callable[[str], None] | None = None
        self.input_tokens: int | None = None
        self._head = b""

    async def write(self, data: bytes) -> None:
        self._look(data)
        await super().write(data)

    async def finish(self, data: bytes = b"") -> None:
        self._look(data)
        await super().finish(data)

    def _look(self, data: bytes) -> None:
        """The id is the first in the body; the count stands in whatever comes last and has one."""
        if self.learn is not None:
            self._head += data[:_HEAD_BYTES]
            if found := _ID.search(self._head):
                self.learn(found[1].decode(errors="replace"))
            if found or len(self._head) > _HEAD_BYTES:
                self.learn, self._head = None, b""
        if b'"input_tokens"' in data and (counts := _INPUT_TOKENS.findall(data)):
            self.input_tokens = int(counts[-1])

    def error_event(self, error: ApiError) -> bytes:
        members = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        event = msgspec.json.encode(members)[:-1] + b"," + error.body()[1:]
        return b"event: error\ndata: " + event + b"\n\n"


def client_type(kind: Kind, path: str) -> type[Client]:
    """What serves a client of this kind of request."""
    if path.startswith("/v1/messages"):
        return MessagesClient
    return ResponsesClient if kind == "responses" else Client
