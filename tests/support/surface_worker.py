"""A simulated worker with every endpoint a vLLM has: each in the shape vLLM gives its answers."""

import asyncio
import json
from typing import Any

from kv_protocol.messages import Admitted
from router.prompt import PromptBuilder
from router.prompt_ids import PromptIds
from tests.support.simulated_worker import SimulatedWorker


class SurfaceWorker(SimulatedWorker):
    """Keeps responses while ``keeps`` is set. Paths it has no better answer for are answered with what was asked."""

    def __init__(self, model: str = "simulated", **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.generating |= {"/v1/messages", "/v1/responses", "/inference/v1/generate"}
        self.keeps = True
        self.kept: dict[str, dict[str, Any]] = {}
        self.counts_messages = False
        self.made = 0

    def _control(self, path: str, body: bytes) -> tuple[int, Any]:
        bare = path.partition("?")[0]
        if bare in ("/health", "/v1/models", "/version", "/tokenize"):
            return super()._control(bare, body)
        if bare.startswith("/v1/responses/") and not bare.endswith("/render"):
            return self._stored(bare.removeprefix("/v1/responses/"))
        if bare == "/v1/messages/count_tokens":
            return self._count(body)
        asked = {"path": path, "method": self.methods[-1], "port": self.port, "bytes": len(body)}
        return (200, asked) if self.status == 200 else (self.status, {"error": {"message": "simulated failure"}})

    def _count(self, body: bytes) -> tuple[int, Any]:
        if not self.counts_messages:
            return 404, {"detail": "Not Found"}
        return 200, {"input_tokens": len(text_of(json.loads(body))) + self.extra_tokens}

    def _stored(self, rest: str) -> tuple[int, Any]:
        identifier, _, action = rest.partition("/")
        if identifier not in self.kept:
            return 404, {"error": {"message": f"Response with id '{identifier}' not found.", "code": 404}}
        if action == "cancel":
            return 200, self.kept[identifier] | {"status": "cancelled"}
        return (200, self.kept[identifier]) if not action else (404, {"detail": "Not Found"})

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        if "token_ids" in body:
            return list(body["token_ids"])
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if given is not None or "prompt" in body:
            return super().tokenize(body)
        return list((text_of(body) or str(body.get("input"))).encode()) + [0] * self.extra_tokens

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
        body = json.loads(raw)
        path = self.requests[-1][0].partition("?")[0]
        if path in ("/v1/chat/completions", "/v1/completions") or self.fail_next or self.status != 200:
            return await super()._answer(writer, headers, raw)
        await self.hold_head.wait()
        tokens = self.tokenize(body)
        if self.admit is not None and path != "/v1/responses":
            kind = {"/v1/messages": "chatcmpl-"}.get(path, "generate-tokens-")
            self.publish(Admitted(kind + headers["x-request-id"] + "-0a1b2c3d", len(tokens), self.admit))
        whole, events = self._made(path, body, tokens)
        if body.get("stream"):
            return await self._events(writer, events)
        self._json(writer, 200, whole)
        return True

    def _made(self, path: str, body: dict[str, Any], tokens: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if path == "/v1/responses":
            return self._response(body, tokens)
        if path == "/v1/messages":
            usage = {"input_tokens": len(tokens), "output_tokens": self.words}
            whole = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "usage": usage}
            deltas = [{"type": "content_block_delta", "index": 0, "delta": {"text": "word"}} for _ in range(self.words)]
            return whole, [{"type": "message_start", "message": whole}, *deltas, {"type": "message_stop"}]
        whole = {"request_id": "1", "choices": [{"index": 0, "token_ids": [1, 2]}]}
        return whole, [whole] * self.words

    def _response(self, body: dict[str, Any], tokens: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self.made += 1
        identifier = f"resp_{self.port}_{self.made}"
        details = {"cached_tokens": self.cached_tokens or 0, "cached_tokens_per_turn": []}
        usage = {"input_tokens": len(tokens), "input_tokens_details": details, "output_tokens": self.words}
        begun = {"id": identifier, "object": "response", "status": "in_progress", "output": [], "usage": None}
        whole = begun | {"status": "completed", "usage": usage, "metadata": {"id": "not-the-id"}}
        if self.keeps and body.get("store", True):
            self.kept[identifier] = whole
        deltas = [{"type": "response.output_text.delta", "delta": "word", "item_id": "msg_1"}] * self.words
        completed = {"response": whole, "type": "response.completed"}
        return whole, [{"response": begun, "type": "response.created"}, *deltas, completed]

    async def _events(self, writer: asyncio.StreamWriter, events: list[dict[str, Any]]) -> bool:
        self._head(writer, 200, "text/event-stream; charset=utf-8", None)
        for number, event in enumerate(events):
            if self.die_after == number:
                await writer.drain()
                writer.close()
                raise ConnectionResetError
            name = event.get("type", "data")
            await self._chunk(writer, f"event: {name}\ndata: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(self.pause)
        writer.write(b"0\r\n\r\n")
        return True


def text_of(body: dict[str, Any]) -> str:
    """All text of a Responses, Messages or chat body, in the order it has in the prompt."""
    given = body.get("input")
    parts = [body.get("system") or body.get("instructions") or "", given if isinstance(given, str) else ""]
    for message in body.get("messages") or (given if isinstance(given, list) else ()):
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(parts)


class BytesBuilder(PromptBuilder):
    """Tokenizes chats as the simulated worker does: a token per byte of text."""

    def __init__(self) -> None:
        self.memory = None
        self.renders_by_heart = 0
        self._by_heart = None

    def template_source(self, *, with_tools: bool) -> str | None:
        del with_tools
        return "{% for m in messages %}{{ m.content }}{% endfor %}"

    def render(self, body: dict[str, Any]) -> str:
        return text_of(body)

    def chat(self, body: dict[str, Any]) -> list[int]:
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        return list(given) if given is not None else list(text_of(body).encode())

    async def chat_async(self, body: dict[str, Any]) -> PromptIds:
        return PromptIds.of(self.chat(body))
