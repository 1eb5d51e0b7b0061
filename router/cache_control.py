"""Control requests to the caches of workers: one operation, sent to the report ports of one worker or all.

Chunks are named by their hashes, or by a prompt, whose hashes are computed for each worker as they are for routing. Every
worker has its own deadline, and one that fails is an entry with its error.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from kv_protocol.errors import ProtocolError
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.identity import MOST_GENERATION
from kv_protocol.messages import TIERS, pack
from router.errors import UNDECODABLE, InvalidRequest, NotFound
from router.reports import call
from router.workers import Worker

if TYPE_CHECKING:
    from router.app import Gateway
    from router.choosing import Plan

PromptKind = Literal["chat", "completions", "messages", "responses", "generate"]
Operation = Literal["lookup", "clear", "pin", "unpin", "pins", "tags", "warm", "move", "flush", "generation", "stats"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
DEADLINE_S = 5.0
"""How long one worker may take to answer."""
MOST_CHUNKS = 60_000
"""Chunks in one operation: as many as fit a frame to a worker."""
EVERYTHING = 1 << 30
_AT_ONCE = 64
_NEEDS_CHUNKS = frozenset({"lookup", "pin", "move"})
_TAKES_CHUNKS = _NEEDS_CHUNKS | {"clear", "unpin", "warm"}
_OPTIONS: dict[str, frozenset[str]] = {
    "lookup": frozenset({"ask", "tag"}),
    "clear": frozenset({"tag", "tier"}),
    "pin": frozenset({"seconds", "tag"}),
    "unpin": frozenset({"tag"}),
    "pins": frozenset({"limit"}),
    "tags": frozenset({"limit"}),
    "warm": frozenset({"newest", "seconds", "tag", "tier"}),
    "move": frozenset({"tag", "tier"}),
    "flush": frozenset({"newest", "tier"}),
    "generation": frozenset({"name", "start"}),
    "stats": frozenset(),
}


class Options(BaseModel):
    """What may be said beside the chunks. ``seconds`` is how long a pin lasts, ``name`` a generation of weights
    and ``start`` that of their files."""

    model_config = ConfigDict(extra="forbid")

    worker: str | None = None
    endpoint: PromptKind | None = None
    tier: Literal["cpu", "disk", "remote"] | None = None
    tag: str | None = Field(default=None, min_length=1, max_length=128)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    newest: int | None = Field(default=None, ge=1, le=EVERYTHING)
    limit: int | None = Field(default=None, ge=1, le=10_000)
    ask: bool | None = None
    name: str | None = Field(default=None, min_length=1, max_length=MOST_GENERATION)
    start: bool | None = None

    def arguments(self, operation: Operation) -> dict[str, Any]:
        """Those that go to workers.

        Raises:
            InvalidRequest: one is given that the operation does not take.
        """
        given = self.model_dump(exclude={"worker", "endpoint"}, exclude_none=True)
        if wrong := sorted(given.keys() - _OPTIONS[operation]):
            known = ", ".join(sorted(_OPTIONS[operation])) or "none"
            raise InvalidRequest(f"{operation} does not take {wrong[0]}; it takes: {known}", param=wrong[0])
        return given


class Named(msgspec.Struct):
    """The chunks that an operation is about: ``chunks``, or those of ``plan``, or neither, for everything."""

    chunks: list[bytes] | None = None
    plan: "Plan | None" = None


class _Order(msgspec.Struct):
    """What every worker is told; ``named`` is turned into chunks for each."""

    operation: Operation
    named: Named
    arguments: dict[str, Any]
    token: str


async def control(gateway: "Gateway", operation: Operation, raw: bytes, options: Options) -> dict[str, Any]:
    """Have workers do an operation; what each of them answered. ``raw`` is empty, ``{"chunks": [digests]}``, or a request
    whose prompt is meant.

    Raises:
        ApiError: the request is none, or names a worker that is not there; no worker was asked.
    """
    arguments = options.arguments(operation)
    named = await _named(gateway, operation, raw, options)
    names = sum((named.chunks is not None or named.plan is not None, "tag" in arguments, "newest" in arguments))
    if names > 1:
        raise InvalidRequest("name chunks, a tag or newest, not more than one of them")
    if operation == "warm" and not names:
        arguments["newest"] = EVERYTHING
    order = _Order(operation, named, arguments, gateway.settings.report_token.get_secret_value())
    limit = asyncio.Semaphore(_AT_ONCE)

    async def ask(worker: Worker) -> dict[str, Any]:
        async with limit:
            return {"worker": worker.name} | await _ask(gateway, worker, order)

    workers = _workers(gateway, named, options.worker)
    return {"operation": operation, "workers": await asyncio.gather(*map(ask, workers))}


async def ask_worker(
    address: tuple[str, int], operation: str, arguments: dict[str, Any], token: str
) -> tuple[Any, str]:
    """A worker's result and no error, or nothing and its error, within the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await call(address, operation, arguments, token), ""
    except TimeoutError:
        return None, f"no answer within {DEADLINE_S:g} s"
    except (OSError, ProtocolError) as error:
        return None, str(error) or type(error).__name__


def summary(found: dict[str, list[str]]) -> dict[str, Any]:
    """Of a look-up: the run of chunks from the start that are anywhere, and how many chunks each tier has."""
    run = 0
    for tiers in found.values():
        if not tiers:
            break
        run += 1
    held = {tier: sum(tier in tiers for tiers in found.values()) for tier in TIERS}
    return {"chunks": len(found), "hit_chunks": run, "held": {tier: count for tier, count in held.items() if count}}


def kind_of(raw: bytes) -> PromptKind:
    """Which endpoint a body is for, as far as it shows.

    Raises:
        InvalidRequest: it is no JSON.
    """
    body = _decoded(raw)
    return "completions" if isinstance(body, dict) and "messages" not in body and "prompt" in body else "chat"


async def _ask(gateway: "Gateway", worker: Worker, order: _Order) -> dict[str, Any]:
    if worker.spec.report_address is None:
        return {"error": "it has no report port"}
    plan = order.named.plan
    chunks = order.named.chunks if plan is None else _chunks_of(gateway, worker, plan)
    if isinstance(chunks, str):
        return {"error": chunks}
    sent = order.arguments if chunks is None else order.arguments | {"chunks": pack(chunks)}
    began = time.perf_counter()
    result, error = await ask_worker(worker.spec.report_address, order.operation, sent, order.token)
    entry: dict[str, Any] = {"ms": round(1000 * (time.perf_counter() - began), 1)}
    if error:
        return entry | {"error": error}
    if order.operation == "lookup" and _is_lookup(result):
        entry |= summary(result)
    return entry | {"result": result}


def _chunks_of(gateway: "Gateway", worker: Worker, plan: "Plan") -> list[bytes] | str:
    """A prompt's chunks as a worker names them, or why there are none."""
    if (namespace := worker.namespace) is None:
        return f"its chunk hashes are not known: {worker.reports_error or 'not connected yet'}"
    gateway.pipeline.chooser.chunks(plan, namespace)
    chunks = [chunk for prompt in plan.hashes[namespace] for chunk in prompt]
    if not chunks:
        return f"the prompt does not fill one chunk of {namespace[1]} tokens"
    if len(chunks) > MOST_CHUNKS:
        return f"the prompt has {len(chunks)} chunks; {MOST_CHUNKS} fit one operation"
    return chunks


async def _named(gateway: "Gateway", operation: Operation, raw: bytes, options: Options) -> Named:
    if not raw.strip():
        if operation in _NEEDS_CHUNKS and options.tag is None:
            raise InvalidRequest(f"{operation} needs a request body with a prompt or {{'chunks': [digests]}}, or a tag")
        return Named()
    if operation not in _TAKES_CHUNKS:
        raise InvalidRequest(f"{operation} takes no body")
    body = _decoded(raw)
    if isinstance(body, dict) and "chunks" in body:
        return Named(_digests(body))
    if body == {}:
        # Whoever meant everything sends nothing; an object that lost its members must not empty a fleet's caches.
        raise InvalidRequest("the body names neither a prompt nor chunks; send none to mean everything")
    plan, _ = await gateway.pipeline.explain(options.endpoint or kind_of(raw), raw)
    if not plan.tokenized.prompts:
        why = plan.tokenized.why or "it has no prompt"
        raise InvalidRequest(f"the prompt's tokens are not known here: {why}. Name chunks instead")
    return Named(plan=plan)


def _workers(gateway: "Gateway", named: Named, name: str | None) -> Sequence[Worker]:
    candidates = list(named.plan.pool.workers) if named.plan is not None else list(gateway.registry.workers)
    if name is None:
        return candidates
    found = gateway.registry.find(name)
    if found is None or found not in candidates:
        names = ", ".join(worker.name for worker in candidates) or "none"
        raise NotFound(f"there is no worker {name!r}; there are: {names}", param="worker", code="worker_not_found")
    return [found]


def _digests(body: dict[str, Any]) -> list[bytes]:
    given = body["chunks"]
    if body.keys() != {"chunks"} or not isinstance(given, list) or not given:
        raise InvalidRequest("chunks is a list of digests, and stands alone in the body", param="chunks")
    if len(given) > MOST_CHUNKS:
        raise InvalidRequest(f"{len(given)} chunks are too many: {MOST_CHUNKS} fit one operation", param="chunks")
    try:
        chunks = [bytes.fromhex(digest) for digest in given]
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"chunks are hexadecimal digests: {error}", param="chunks") from error
    if any(len(chunk) != HASH_BYTES for chunk in chunks):
        raise InvalidRequest(f"a chunk's digest has {2 * HASH_BYTES} hexadecimal digits", param="chunks")
    return chunks


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except UNDECODABLE as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def _is_lookup(result: Any) -> bool:
    return isinstance(result, dict) and all(isinstance(tiers, list) for tiers in result.values())
