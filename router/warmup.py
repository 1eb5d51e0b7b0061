"""Prompts that every worker computes once when it starts, so that the first user who brings one of them finds it warm.

The file has one prompt a line: a request body of the Chat Completions or the Completions API as JSON, or the prompt itself as
a JSON string. A worker gets them one after the other, each for a single token, when it comes up and whenever it is another
process than before. What it holds already, or its connector fetches from a lower tier, costs it next to nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from router.errors import ConfigError, UpstreamError
from router.workers import Worker

MOST_PROMPTS = 10_000
MOST_BYTES = 256 << 20
_FAILURES_IN_A_ROW = 3
_REPORT_S = 5.0

_log = logging.getLogger(__name__)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The request bodies of a file, each for one token.

    Raises:
        ConfigError: the file cannot be read, is too large, or a line is no prompt; it names the line, not its text.
    """
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"the prompts of {path} take more than {MOST_BYTES >> 20} MiB")
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts of {path}: {error.strerror}") from error
    bodies = list(_bodies(path, lines))
    if len(bodies) > MOST_PROMPTS:
        raise ConfigError(f"{path} has {len(bodies)} prompts, more than {MOST_PROMPTS}")
    return bodies


def _bodies(path: str, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _body(f"{path}, line {number}", line)


def _body(place: str, line: bytes) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigError(f'{place} is not JSON: write a request body, or a prompt as "text"') from None
    body = {"prompt": content} if isinstance(content, str) else content
    if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
        raise ConfigError(f"{place} is no prompt: it must be a text, or an object with messages or with prompt")
    if not isinstance(body.get("model", ""), str):
        raise ConfigError(f"{place} names a model that is no text")
    for name in ("stream", "stream_options", "max_completion_tokens", "min_tokens", "n", "best_of"):
        body.pop(name, None)
    return {**body, "max_tokens": 1}


class Warmup:
    """Has workers compute the prompts of a file. ``timeout`` in seconds bounds each of them; ``count`` is told each result:
    ``ok``, ``refused`` by the worker, or ``failed``."""

    def __init__(self, path: str, timeout: float, count: Callable[[str], object]) -> None:
        self._path = path
        self._timeout = timeout
        self._count = count
        self._met: dict[str, int] = {}
        self._busy: set[str] = set()

    async def run(self, worker: Worker) -> None:
        """Warm a worker up, unless this process of it was met before or is being warmed up. Never raises."""
        if worker.name in self._busy:
            return
        self._busy.add(worker.name)
        try:
            await self._reported(worker)
            if worker.epochs and self._met.get(worker.name) == worker.epochs:
                return
            bodies = await asyncio.to_thread(read_prompts, self._path)
            self._met[worker.name] = worker.epochs
            await self._send_all(worker, bodies)
        except ConfigError as error:
            _log.error("worker %s is not warmed up: %s", worker.name, error)
        finally:
            self._busy.discard(worker.name)

    def forget(self, worker: Worker) -> None:
        """A worker was removed."""
        self._met.pop(worker.name, None)

    @staticmethod
    async def _reported(worker: Worker) -> None:
        """Wait a while for the worker's reports, which tell whether it is another process than before."""
        ends = time.monotonic() + _REPORT_S
        while worker.spec.report_address is not None and not worker.synced and time.monotonic() < ends:  # noqa: ASYNC110 - plain state
            await asyncio.sleep(0.05)

    async def _send_all(self, worker: Worker, bodies: list[dict[str, Any]]) -> None:
        began, sent, failures = time.monotonic(), 0, 0
        for body in bodies:
            if worker.departing or failures == _FAILURES_IN_A_ROW:
                break
            failures = 0 if await self._send(worker, body) else failures + 1
            sent += not failures
        _log.info(
            "worker %s computed %d of %d prompts to warm up, in %.1f s",
            *(worker.name, sent, len(bodies), time.monotonic() - began),
        )

    async def _send(self, worker: Worker, body: dict[str, Any]) -> bool:
        target = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        model = body.get("model") or next((card.id for card in worker.models.values() if not card.parent), "")
        if model not in worker.models:
            return True  # another pool's prompt
        payload = msgspec.json.encode({**body, "model": model})
        try:
            answer = await worker.upstream.fetch("POST", target, payload, timeout=self._timeout)
        except UpstreamError as error:
            _log.warning("worker %s did not compute a prompt to warm up: %s", worker.name, error)
            self._count("failed")
            return False
        if answer.status == 200:
            self._count("ok")
            return True
        _log.warning("worker %s answered %d to a prompt to warm up", worker.name, answer.status)
        self._count("refused")
        return answer.status < 500
