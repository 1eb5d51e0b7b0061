"""What the request path needs for everything beside chats and completions: how such a request is read, and what its
response teaches."""

from functools import partial
from typing import Any, cast

import msgspec

from router.accounting import Accounting, Decision
from router.client import Client
from router.clients import ResponsesClient
from router.endpoints import PASSED_THROUGH, TABLE, response_id
from router.errors import InvalidRequest
from router.parse import Arrival, Request, parse_other, parse_request
from router.pool_prompts import Tokenized
from router.splice import Kind
from router.stored import StoredResponses, id_for
from router.workers import Pool, Worker

HOT: frozenset[Kind] = frozenset({"chat", "completions"})
UNSCORED: frozenset[Kind] = frozenset({"stored", "load"})
NO_PROMPT = Tokenized((), "nobody", "routed by load: no prompt that caches serve")
NO_RANK = Tokenized((), "nobody", "the engine itself picks the data-parallel rank of a Responses request")


class Surface:
    """Shared by all requests."""

    def __init__(self, stored: StoredResponses, accounting: Accounting) -> None:
        self.stored = stored
        self._accounting = accounting

    async def read(self, client: Client, kind: Kind, raw: bytes, arrival: Arrival, *, tenant: str) -> Request:
        """The parse step. One that asks for, or goes on from, a stored response is bound to the worker that keeps it.

        Raises:
            ApiError: it cannot be read, or what it asks for is nowhere.
        """
        scope, headers, request_id = client.scope, arrival.headers, arrival.request_id
        if kind in UNSCORED:
            repeatable = TABLE.get(scope["path"], PASSED_THROUGH).repeatable
            request = parse_other(kind, scope, raw, headers, request_id, repeatable=repeatable)
            identifier: Any = response_id(scope["path"]) if kind == "stored" else None
        else:
            request = parse_request(kind, raw, headers, request_id)
            identifier = request.body.get("previous_response_id") if kind == "responses" else None
        if identifier is not None and not isinstance(identifier, str):
            raise InvalidRequest("previous_response_id must be a string", param="previous_response_id")
        if kind == "responses" and tenant:
            _give_id(request, id_for(tenant))
        if identifier:
            await self.stored.place(request, identifier, tenant)
        return request

    def watch(self, client: Client, worker: Worker) -> None:
        """Learn from a Responses answer, as it passes, which worker keeps it."""
        if isinstance(client, ResponsesClient):
            client.learn = partial(self.stored.learn, worker=worker.name)

    def delivered(self, client: Client, worker: Worker, decision: Decision) -> None:
        """A Responses answer is complete: its engine reports no length under an id known here, but says it itself."""
        if isinstance(client, ResponsesClient) and client.input_tokens is not None and decision.status == 200:
            self._accounting.counted(worker, decision, client.input_tokens)


def _give_id(request: Request, identifier: str) -> None:
    """Name a Responses request; vLLM gives its answer the same id."""
    member = b'"request_id":"' + identifier.encode() + b'"'
    if "request_id" in request.body:
        members = msgspec.json.decode(request.raw, type=dict[str, msgspec.Raw])
        request.raw = msgspec.json.encode(members | {"request_id": identifier})
    else:
        at = request.raw.index(b"{") + 1
        request.raw = b"".join((request.raw[:at], member, b"," if request.body else b"", request.raw[at:]))
    request.body["request_id"] = identifier


def unscored_prompt(kind: Kind, pool: Pool) -> Tokenized | None:
    """What stands for the prompt of a request whose hits mean nothing; None where it is to be tokenized."""
    if kind in UNSCORED:
        return NO_PROMPT
    if kind == "responses" and any(worker.rank_header for worker in pool.workers):
        return NO_RANK
    return None


def target_of(client: Client) -> bytes:
    """The path as it came, percent-encoded, with its query string."""
    scope = client.scope
    query = cast("bytes", scope.get("query_string") or b"")
    path = cast("bytes", scope.get("raw_path") or scope["path"].encode())
    return path + (b"?" + query if query else b"")
