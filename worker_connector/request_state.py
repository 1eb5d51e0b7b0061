"""What the planner knows of one request: its chunk hashes and how far it has come."""

import re
from typing import Any

from kv_protocol.hashing import Media, chunk_hashes, root_hash
from worker_connector.request_controls import controls_of

Adapter = tuple[str, int]
"""What a LoRA adapter was loaded from: its path, and the engine's number for it."""

_COMPLETION_ID = re.compile(r"(?:\d+_)?cmpl-(?P<id>.+?)-\d+(?:-[0-9a-f]{8})?")
_CHAT_ID = re.compile(r"(?:\d+_)?chatcmpl-(?P<id>.+?)(?:-[0-9a-f]{8})?")
_RANDOM_SUFFIX = re.compile(r"(?P<id>.+)-[0-9a-f]{8}")


class RequestState:
    """A request the engine has. Token positions are counted from the start of the prompt.

    ``local`` and ``offered`` are the answer to the engine's last query: the tokens it has itself, and the tokens the
    connector offered beyond them; ``skipped`` are chunks it held back because computing them is predicted to be faster.
    ``saved`` is the first chunk that has not been considered for saving; a step that starts behind the tokens ``seen``
    computed, or reaches token ``boundary``, may have something to save. ``barred``: a load of this request failed. ``shadowed``: whether the
    request is of the shadow check's sample, None until it was asked. ``wanted`` names the
    chunks of the offer, the last of which may be a tail.
    """

    __slots__ = (
        "_prompt_tokens",
        "_tails",
        "adapter",
        "barred",
        "boundary",
        "chunk_size",
        "chunks",
        "controls",
        "eligible",
        "loaded",
        "local",
        "media",
        "offered",
        "request",
        "root",
        "running",
        "saved",
        "seen",
        "shadowed",
        "skipped",
        "started",
        "waiting_since",
        "wanted",
    )

    def __init__(self, request: Any, chunk_size: int, model: str) -> None:
        self.request = request
        self.chunk_size = chunk_size
        self.chunks: list[bytes] = []
        self.eligible = has_tokens(request)
        self.root = root_of(request, chunk_size, model) if self.eligible else b""
        self.media = media_of(request) if self.eligible else ()
        self.adapter = adapter_of(request)
        self.controls = controls_of(request)
        self.local = 0
        self.offered = 0
        self.loaded = 0
        self.saved = 0
        self.seen = 0
        self.boundary = 0
        self.skipped = 0
        self.shadowed: bool | None = None
        self.barred = False
        self.started = False
        self.running = False
        self.waiting_since: float | None = None
        self.wanted: list[bytes] = []
        self._tails: tuple[int, list[bytes]] = (-1, [])
        self._prompt_tokens: int = request.num_prompt_tokens

    def extend(self) -> list[bytes]:
        """The hashes of all whole chunks of known tokens, prompt and generated. About 2 µs per chunk not seen before.

        Placeholders for tokens that are still being sampled, and draft tokens, are not known tokens.
        """
        if self.request.num_prompt_tokens != self._prompt_tokens:
            self._begin_again()
        size, have = self.chunk_size, len(self.chunks)
        whole = self.request.num_tokens // size
        if whole > have and self.eligible:
            tokens = self.request.all_token_ids[have * size : whole * size]
            parent = self.chunks[-1] if self.chunks else self.root
            try:
                self.chunks += chunk_hashes(parent, tokens, size, media=self.media, start=have * size)
            except ValueError:
                self.eligible = False
        return self.chunks

    def _begin_again(self) -> None:
        """A session that streams its input got more of it, perhaps with media, in the place of its last token."""
        self._prompt_tokens = self.request.num_prompt_tokens
        self.media = media_of(self.request) if self.eligible else ()
        self.chunks, self._tails = [], (-1, [])
        self.boundary = 0

    def tails(self, at: int, unit: int) -> list[bytes]:
        """Names of the beginnings of chunk ``at``, of one ``unit`` of known tokens and more, shorter than the chunk.

        A tail is hashed as a chunk of its own size behind the chunk before it, so no chunk has its name.
        """
        start = at * self.chunk_size
        units = max(0, min(self.chunk_size - unit, self.request.num_tokens - start)) // unit
        if self._tails[0] != at or len(self._tails[1]) < units:
            self._tails = (at, [self.name_tail(at, count * unit) for count in range(1, units + 1)])
        return self._tails[1]

    def name_tail(self, at: int, length: int) -> bytes:
        """The name of the first ``length`` tokens of chunk ``at``; empty if they have none."""
        start = at * self.chunk_size
        parent = self.chunks[at - 1] if at else self.root
        tokens = self.request.all_token_ids[start : start + length]
        media = [Media(item.hash, item.offset - start, item.length) for item in self.media]
        try:
            return chunk_hashes(parent, tokens, length, media=media)[0]
        except ValueError:
            self.eligible = False
            return b""

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that are still to be computed, as far as hits are known."""
        have = max(self.request.num_computed_tokens, self.local + self.offered)
        left: int = self.request.num_prompt_tokens - have
        return max(0, left)


def has_tokens(request: Any) -> bool:
    """Whether the prompt is token ids throughout, so that its chunks can be named."""
    return request.prompt_token_ids is not None and getattr(request, "prompt_embeds", None) is None


def root_of(request: Any, chunk_size: int, model: str) -> bytes:
    """The root of a request's chunk hashes."""
    lora = getattr(request, "lora_request", None)
    return root_hash(
        chunk_size=chunk_size,
        model=model,
        lora=lora.lora_name if lora is not None else "",
        cache_salt=getattr(request, "cache_salt", None) or "",
    )


def adapter_of(request: Any) -> tuple[str, Adapter] | None:
    """A request's LoRA adapter by name, and what it was loaded from."""
    lora = getattr(request, "lora_request", None)
    if lora is None:
        return None
    return lora.lora_name, (getattr(lora, "lora_path", ""), getattr(lora, "lora_int_id", 0))


def media_of(request: Any) -> tuple[Media, ...]:
    """The media items among a request's prompt tokens."""
    return tuple(
        Media(feature.identifier, feature.mm_position.offset, feature.mm_position.length)
        for feature in getattr(request, "mm_features", None) or ()
    )


def external_id(request_id: str) -> str:
    """The id a client gave a request (``X-Request-Id``), from the engine's own id for it: without the endpoint's
    prefix, the prompt's number and the random suffix, as far as they can be told apart."""
    for pattern in (_COMPLETION_ID, _CHAT_ID, _RANDOM_SUFFIX):
        if match := pattern.fullmatch(request_id):
            return match["id"]
    return request_id
