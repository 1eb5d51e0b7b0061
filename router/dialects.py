"""Which translated bodies can be trusted: each dialect of one model, held against what workers count.

A worker's ``/v1/messages/count_tokens`` says how long a Messages prompt is; that is compared when a worker comes up. For
Responses there is no such endpoint: the count that comes with each answer is compared. A dialect that a worker counts
otherwise is not translated for that model until the worker agrees or is gone: such requests are routed by load.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from router.errors import UNDECODABLE, RouterError, Unrenderable, UpstreamError
from router.prompt import PromptBuilder
from router.splice import Kind
from router.translate import Dialect, Translator
from router.workers import Worker

DIALECTS: frozenset[Kind] = frozenset({"messages", "responses"})
COUNT_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class Dialects:
    """Translations for one model."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._builder: PromptBuilder | None = None
        self._translator: Translator | None = None
        self._distrusted: dict[tuple[Dialect, str], str] = {}

    def chat_body(self, kind: Kind, body: Mapping[str, Any], builder: PromptBuilder) -> dict[str, Any]:
        """The chat body with the same prompt as a body of one of ``DIALECTS``.

        Raises:
            Unrenderable: only the worker can tell, or a worker was seen to disagree.
        """
        dialect = cast("Dialect", kind)
        if why := self.why_not(dialect):
            raise Unrenderable(why)
        return self._translated_by(builder).chat_body(dialect, body)

    def why_not(self, dialect: Dialect) -> str:
        """Why bodies of a dialect are not translated; empty when they are."""
        return next((why for (kind, _), why in self._distrusted.items() if kind == dialect), "")

    def distrust(self, kind: Kind, worker: str, ours: int, theirs: int) -> None:
        """A worker counted other prompt tokens of one of ``DIALECTS`` than were counted here."""
        dialect = cast("Dialect", kind)
        why = f"worker {worker} counts {theirs} tokens of a {dialect} prompt that has {ours} here"
        if (dialect, worker) not in self._distrusted:
            _log.warning("%s: %s requests of %s are routed by load", why, dialect, self.model)
        self._distrusted[dialect, worker] = why

    def forget(self, worker: str) -> None:
        """What was held against a worker."""
        for dialect in ("messages", "responses"):
            self._distrusted.pop((dialect, worker), None)

    async def check(self, worker: Worker, builder: PromptBuilder) -> None:
        """Compare lengths with the worker's count of each probe; one that does not count is taken at its word."""
        self.forget(worker.name)
        for probe in probes():
            theirs = await _count(worker, {"model": self.model, **probe})
            if theirs is None:
                return
            try:
                ours = len(builder.chat(self._translated_by(builder).chat_body("messages", probe)))
            except RouterError:
                continue
            if ours != theirs:
                self.distrust("messages", worker.name, ours, theirs)
                return

    def _translated_by(self, builder: PromptBuilder) -> Translator:
        if self._translator is None or self._builder is not builder:
            self._builder, self._translator = builder, Translator(builder)
        return self._translator


class _Count(msgspec.Struct):
    input_tokens: int


async def _count(worker: Worker, body: Mapping[str, Any]) -> int | None:
    target = "/v1/messages/count_tokens"
    try:
        answer = await worker.upstream.fetch("POST", target, msgspec.json.encode(body), timeout=COUNT_TIMEOUT_S)
        return msgspec.json.decode(answer.body, type=_Count).input_tokens if answer.status == 200 else None
    except (UpstreamError, *UNDECODABLE):
        return None


def probes() -> Iterator[dict[str, Any]]:
    """Messages bodies, without model, in which every rule shows that depends on the template or the worker's flags."""
    user = {"role": "user", "content": "What is 2+2?"}
    yield {"messages": [user]}
    yield {"system": "Be terse.", "messages": [user]}
    yield {
        "system": [{"type": "text", "text": "Be terse."}, {"type": "text", "text": " Always."}],
        "messages": [user, {"role": "assistant", "content": "4"}, {"role": "system", "content": "Mind."}, user],
    }
    yield {"messages": [user], "thinking": {"type": "disabled"}}
    yield {"messages": [user], "output_config": {"effort": "high"}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 2, "b": [2.5, None]}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "4"}
    schema = {"properties": {"a": {"type": "integer"}}}
    yield {
        "messages": [user, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}],
        "tools": [{"name": "add", "description": "Add <numbers>", "input_schema": schema}],
        "tool_choice": {"type": "auto"},
    }


__all__ = ["DIALECTS", "Dialects", "probes"]
