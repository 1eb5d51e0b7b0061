"""The tokenize step of the request path: exact here, else by a worker, else not at all.

Each base model has one ``PoolPrompts``. It uses the router's own ``PromptBuilder`` as long as every worker checked so far
tokenizes as it does; where one does not, and for single requests that cannot be reproduced, a worker's ``/tokenize`` is
asked; where that fails too the request is routed by load alone. Which way is taken shows in metrics and admin endpoints.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from router.dialects import DIALECTS, Dialects
from router.errors import UNDECODABLE, ConfigError, InvalidRequest, Unrenderable, UpstreamError
from router.parity import check_parity
from router.parse import Request
from router.prompt import PromptBuilder, tokenize_request
from router.prompt_ids import PromptIds
from router.splice import Kind
from router.tokenizer import MEMORY_BYTES
from router.tokenizer_files import is_mistral_format
from router.workers import Worker

TOKENIZE_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
"""The first request an engine ever gets may compile kernels."""
_TOKENIZED_BY_WORKERS: frozenset[Kind] = frozenset({"chat", "completions"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})

_log = logging.getLogger(__name__)


class Tokenized(msgspec.Struct, frozen=True, eq=False):
    """Token ids of each prompt of a request, empty where nobody could tell; ``by`` whom; ``why`` not by the router."""

    prompts: Sequence[PromptIds]
    by: Literal["router", "worker", "nobody"]
    why: str = ""


class PoolPrompts:
    """Prompts of one base model's requests."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.builder: PromptBuilder | None = None
        self.dialects = Dialects(model)
        self._fault = "the tokenizer is not loaded yet"
        self._short_call_ids = False
        self._disagreeing: dict[str, str] = {}
        self._logged: set[str] = set()

    @property
    def by(self) -> Literal["router", "worker"]:
        """Who tokenizes this model's prompts, where it can."""
        return "router" if self.builder is not None and not self.why_not else "worker"

    @property
    def why_not(self) -> str:
        """Why prompts are not tokenized here; empty when they are."""
        return self._fault or next(iter(self._disagreeing.values()), "")

    async def load(self, where: str, chat_template: str, max_model_len: int, memory_bytes: int = MEMORY_BYTES) -> None:
        """Load the tokenizer; failing leaves tokenization to the workers."""
        if not where:
            self._fault = "no tokenizer: the worker's model list names none"
            self._log_once(self._fault)
            return
        try:
            self.builder = await asyncio.to_thread(
                PromptBuilder.load,
                where,
                chat_template or None,
                max_model_len=max_model_len or None,
                memory_bytes=memory_bytes,
            )
        except (ConfigError, Unrenderable) as error:
            self._fault = str(error)
            self._short_call_ids = await asyncio.to_thread(is_mistral_format, where)
            self._log_once(self._fault)
        else:
            self._fault = ""

    def at_once(self, request: Request) -> Tokenized | None:
        """Token ids of a chat that needs nothing but copying and little encoding: nearly every one. None leaves it to
        ``tokenize``."""
        if request.plain is None or self.builder is None or self._fault or self._disagreeing:
            return None
        try:
            ids = self.builder.plain_chat(request.body, request.plain)
        except Unrenderable:
            return None
        return Tokenized([ids], "router") if ids is not None else None

    async def tokenize(self, kind: Kind, body: dict[str, Any], workers: Callable[[], Sequence[Worker]]) -> Tokenized:
        """Token ids of a request's prompts; one of ``workers`` may be asked for them.

        Raises:
            InvalidRequest: a field has a wrong type.
        """
        why = self.why_not
        if self.builder is not None and not why:
            try:
                if kind == "chat":
                    return Tokenized([await self.builder.chat_async(body)], "router")
                if kind == "completions":
                    return Tokenized(await self.builder.completion_async(body), "router")
                if kind in DIALECTS:
                    return Tokenized([await self._translated(kind, body, self.builder)], "router")
            except Unrenderable as error:
                why = error.reason
        self._log_once(why)
        return await self._by_worker(kind, body, workers(), why)

    async def _translated(self, kind: Kind, body: dict[str, Any], builder: PromptBuilder) -> PromptIds:
        """The worker judges what is wrong with such a body, in the words of the endpoint it came to."""
        try:
            return await builder.chat_async(self.dialects.chat_body(kind, body, builder))
        except InvalidRequest as error:
            raise Unrenderable(error.message) from error

    async def check(self, worker: Worker) -> None:
        """Compare with the worker's own /tokenize; sets ``worker.parity``."""
        if self.builder is None:
            worker.parity = "unchecked"
            return

        async def tokenize(request: dict[str, Any]) -> list[int]:
            return await tokenize_at(worker, {"model": self.model, **request})

        try:
            parity = await check_parity(self.builder, tokenize)
        except (UpstreamError, Unrenderable) as error:
            worker.parity = "unavailable"
            _log.warning("tokenization of %s could not be compared with worker %s: %s", self.model, worker.name, error)
            return
        worker.parity = "exact" if parity.ok else "mismatch"
        self.forget(worker)
        await self.dialects.check(worker, self.builder)
        if not parity.ok:
            why = self._disagreeing[worker.name] = f"worker {worker.name} tokenizes otherwise: {parity.mismatch}"
            self._log_once(why)

    def forget(self, worker: Worker) -> None:
        """A worker that disagreed is gone, or agrees now."""
        self._disagreeing.pop(worker.name, None)
        self.dialects.forget(worker.name)

    async def probe_token_ids(self, worker: Worker) -> bool:
        """Whether the worker takes a chat's token ids instead of its text: a request of one token tells, by the number
        of prompt tokens it counts."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        if self.builder is None:
            return False
        try:
            ids = self.builder.chat(body)
            # Twice the text's own ids are valid ids, and a number of them the text does not have.
            body["kv_transfer_params"] = {"prompt_token_ids": ids + ids}
            payload = msgspec.json.encode(body)
            answer = await worker.upstream.fetch("POST", "/v1/chat/completions", payload, timeout=PROBE_TIMEOUT_S)
            usage = msgspec.json.decode(answer.body).get("usage") or {}
            return answer.status == 200 and usage.get("prompt_tokens") == 2 * len(ids)
        except (UpstreamError, Unrenderable, *UNDECODABLE, AttributeError):
            return False

    async def _by_worker(self, kind: Kind, body: dict[str, Any], workers: Sequence[Worker], why: str) -> Tokenized:
        if (given := _given_ids(kind, body)) is not None:
            return Tokenized(_checked(given), "router")
        try:
            if not workers or kind not in _TOKENIZED_BY_WORKERS or _has_media(body):
                return Tokenized((), "nobody", why)
            worker = min(workers, key=lambda w: w.weight)
            ids = await tokenize_at(worker, tokenize_request(body, kind, short_call_ids=self._short_call_ids))
            return Tokenized(_checked([ids]), "worker", why)
        except (UpstreamError, Unrenderable, InvalidRequest) as error:
            return Tokenized((), "nobody", f"{why}; {error}")

    def _log_once(self, why: str) -> None:
        if why not in self._logged and len(self._logged) < 64:
            self._logged.add(why)
            _log.warning("prompts of %s are not tokenized here: %.500s", self.model, why)


async def tokenize_at(worker: Worker, request: dict[str, Any]) -> list[int]:
    """What a worker's /tokenize answers.

    Raises:
        InvalidRequest: it answered 4xx.
        UpstreamError: it failed to answer.
        Unrenderable: its answer holds no token ids.
    """
    answer = await worker.upstream.fetch("POST", "/tokenize", msgspec.json.encode(request), timeout=TOKENIZE_TIMEOUT_S)
    if answer.status in (404, 405):
        worker.has_tokenize = False
        raise Unrenderable("the worker has no /tokenize")
    if 400 <= answer.status < 500:
        raise InvalidRequest(f"the worker's /tokenize answered {answer.status}")
    if answer.status != 200:
        raise Unrenderable(f"the worker's /tokenize answered {answer.status}")
    try:
        return msgspec.json.decode(answer.body, type=_Tokens).tokens
    except UNDECODABLE as error:
        raise Unrenderable(f"the worker's /tokenize answered no token ids: {error}") from error


def _checked(prompts: Sequence[list[int]]) -> list[PromptIds]:
    try:
        return [PromptIds.of(ids) for ids in prompts]
    except ValueError as error:
        raise InvalidRequest(str(error), param="prompt") from error


class _Tokens(msgspec.Struct):
    tokens: list[int]


def _given_ids(kind: Kind, body: dict[str, Any]) -> list[list[int]] | None:
    """Prompts that are ids already, which need no tokenizer."""
    if kind == "generate":
        ids = body.get("token_ids")
        media = body.get("features") or body.get("content_parts")
        return [ids] if isinstance(ids, list) and ids and not media else None
    prompt = body.get("prompt") if kind == "completions" else None
    if not isinstance(prompt, list) or not prompt or body.get("truncate_prompt_tokens") is not None:
        return None
    prompts = [prompt] if isinstance(prompt[0], int) else prompt
    whole = all(isinstance(one, list) and all(type(item) is int for item in one) for one in prompts)
    return prompts if whole else None


def _has_media(body: dict[str, Any]) -> bool:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(
            isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS for part in content
        ):
            return True
    return False
