"""The admin endpoints: workers, index, dry runs, recent requests."""

import asyncio
import hmac
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Body, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from router.api.dashboard import add_data
from router.cache_control import Operation, Options, PromptKind, control, kind_of
from router.config import LOOPBACK, WorkerSpec
from router.control import MAX_TTL_S
from router.cross_origin import origins_of
from router.errors import Forbidden, NotFound, Unauthorized
from router.explain import explain_body, explain_id
from router.policies import comparison_of
from router.workers import Worker

if TYPE_CHECKING:
    from router.app import Gateway
    from router.choosing import Plan, Routed


_OWN_PAGES = frozenset({"none", "same-origin"})
"""What a browser says of requests by its user's hand, or by a page of ours."""
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_CHUNKS = {"type": "object", "required": ["chunks"], "properties": {"chunks": {"type": "array", "items": _DIGEST}}}
_CACHE_BODY = {
    "summary": "Have one worker or all do something with their caches",
    "requestBody": {
        "description": "Chunks, or any request whose prompt is meant, or nothing for everything",
        "content": {"application/json": {"schema": {"anyOf": [_CHUNKS, {"type": "object"}]}}},
    },
}


class Selector(BaseModel):
    """Names a worker, by name or by URL."""

    model_config = ConfigDict(extra="forbid")

    worker: str


class DrainRequest(Selector):
    """``drain`` false takes a worker back into service."""

    drain: bool = True


class AddRequest(WorkerSpec):
    """A worker to add; ``ttl`` seconds of lease, 0 for none."""

    ttl: float = Field(default=0.0, ge=0, le=MAX_TTL_S, allow_inf_nan=False)

    @field_validator("key", mode="before")
    @classmethod
    def _key_is_said(cls, key: Any) -> Any:
        # Whoever may add workers must not thereby read files and variables of the gateway.
        if isinstance(key, str) and key.startswith(("file:", "env:")):
            raise ValueError("a key given over HTTP is the key itself, not where the gateway finds it")
        return key

    def spec(self) -> WorkerSpec:
        return WorkerSpec(**{name: getattr(self, name) for name in self.model_fields_set - {"ttl"}})


def make_admin(gateway: "Gateway") -> APIRouter:
    """Every route, behind the guard."""
    router = APIRouter(prefix="/admin", dependencies=[Depends(_guard(gateway))])
    _add_workers(router, gateway)
    _add_config(router, gateway)
    _add_inspection(router, gateway)
    _add_cache(router, gateway)
    if gateway.settings.dashboard:
        add_data(router, gateway)
    return router


def _add_workers(router: APIRouter, gateway: "Gateway") -> None:
    @router.get("/workers")
    async def workers() -> Any:
        in_flight = await gateway.control.in_flight()
        shown = [
            describe(worker) | _membership(gateway, worker) | {"in_flight": in_flight.get(worker.name, 0)}
            for worker in gateway.registry.workers
        ]
        siblings = gateway.control.siblings
        process = {"number": siblings.number, "count": siblings.count}
        return {"workers": shown, "names": gateway.control.describe_names(), "process": process}

    @router.post("/workers", status_code=201)
    async def add(request: AddRequest, response: Response) -> Any:
        worker, fresh = await gateway.control.add_worker(request.spec(), request.ttl)
        response.status_code = 201 if fresh else 200
        return describe(worker) | _membership(gateway, worker)

    @router.delete("/workers")
    async def remove(worker: Annotated[str, Query()]) -> Any:
        found = _find(gateway, worker)
        await gateway.control.remove_worker(found)
        return {"removed": found.name}

    @router.get("/keys")
    async def keys() -> Any:
        return gateway.access.describe() if gateway.access is not None else {"keys": None}

    @router.post("/workers/drain")
    async def drain(request: DrainRequest) -> Any:
        found = _find(gateway, request.worker)
        await gateway.control.drain_worker(found, drain=request.drain)
        return describe(found) | _membership(gateway, found)


def _add_config(router: APIRouter, gateway: "Gateway") -> None:
    @router.get("/config")
    async def config() -> Any:
        return gateway.control.describe_settings()

    @router.patch("/config")
    async def change_config(request: Annotated[dict[str, Any], Body()]) -> Any:
        await gateway.control.set_overrides(request)
        return gateway.control.describe_settings()

    @router.post("/config/reload")
    async def reload_config() -> Any:
        gateway.control.reload()
        return gateway.control.describe_settings()


def _add_inspection(router: APIRouter, gateway: "Gateway") -> None:
    @router.get("/index")
    async def index(worker: str | None = None) -> Any:
        if worker is not None:
            return describe_contents(gateway, _find(gateway, worker))
        return describe_index(gateway)

    @router.get("/policy")
    async def policy() -> Any:
        return describe_policy(gateway)

    @router.post("/route")
    async def route(request: Request, endpoint: PromptKind | None = None) -> Any:
        raw = await request.body()
        plan, routed = await gateway.pipeline.explain(endpoint or kind_of(raw), raw)
        return explanation(gateway, plan, routed)

    @router.get("/explain")
    async def explain_request(id: str, *, live: bool = False) -> Any:  # noqa: A002 - the name in the URL
        return await explain_id(gateway, id, live=live)

    @router.post("/explain")
    async def explain_body_of(request: Request, endpoint: PromptKind | None = None, *, live: bool = False) -> Any:
        raw = await request.body()
        plan, routed = await gateway.pipeline.explain(endpoint or kind_of(raw), raw)
        return explanation(gateway, plan, routed) | {"ends": await explain_body(gateway, plan, routed, live=live)}

    @router.get("/requests")
    async def requests(
        id: str | None = None,  # noqa: A002 - the name in the URL
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    ) -> Any:
        return {"requests": await gateway.control.requests(limit, id)}


def _add_cache(router: APIRouter, gateway: "Gateway") -> None:
    @router.post("/cache/{operation}", openapi_extra=_CACHE_BODY)
    async def cache(operation: Operation, request: Request, options: Annotated[Options, Query()]) -> Any:
        return await control(gateway, operation, await request.body(), options)


def describe(worker: Worker) -> dict[str, Any]:
    """Everything known of a worker, for people and programs. Times in seconds."""
    hello, beat = worker.hello, worker.heartbeat
    now = asyncio.get_running_loop().time()
    return {
        "name": worker.name,
        "url": worker.spec.url,
        "healthy": worker.up,
        "down_reason": worker.down_reason,
        "draining": worker.draining,
        "held": worker.held,
        "breaker": worker.breaker.state,
        "engine_version": worker.engine_version,
        "models": [msgspec.to_builtins(card) for card in worker.models.values()],
        "in_flight": worker.load.in_flight,
        "uncached_tokens": worker.load.uncached_tokens,
        "cache_source": worker.source,
        "routed_by": "cache and load" if worker.source != "none" else "load only",
        "reports": {
            "address": None if worker.spec.report_address is None else "{}:{}".format(*worker.spec.report_address),
            "error": worker.reports_error,
            "synced": worker.synced,
            "epoch": hello.epoch if hello else None,
            "chunk_size": hello.chunk_size if hello else None,
            "connector_version": hello.version if hello else None,
            "tiers": msgspec.to_builtins(hello.tiers) if hello else [],
            "heartbeat": msgspec.to_builtins(beat) if beat else None,
            "heartbeat_age_s": round(now - worker.heartbeat_at, 3) if beat else None,
        },
        "events": {
            "error": worker.events_error,
            "following": msgspec.to_builtins(worker.following) if worker.following is not None else None,
        },
        "assumed": {"chunk_size": worker.assumed[1], "chunks": worker.assumed_chunks} if worker.assumed else None,
        "tokenization": {"parity": worker.parity, "takes_token_ids": worker.takes_token_ids},
        "trust": round(worker.trust, 3),
        "predictions": dict(worker.predictions),
        "relists": dict(worker.relists),
    }


def _membership(gateway: "Gateway", worker: Worker) -> dict[str, Any]:
    control, url = gateway.control, worker.spec.url
    return {
        "named_by": control.membership.origin_of(url),
        "leaving": control.membership.leaving(url),
        "lease": control.lease_of(url),
    }


def describe_policy(gateway: "Gateway") -> dict[str, Any]:
    """The active policy, what its shadow would have done, and what was learned of each worker. Times in seconds."""
    comparison = comparison_of(gateway.policy)
    return {
        "policy": gateway.policy.name,
        "by_header": gateway.settings.policy_header,
        "shadow": msgspec.to_builtins(comparison) if comparison is not None else None,
        "workers": {
            worker.name: {
                "load": worker.weight,
                "average_load": round(worker.average_load),
                "learned_tokens_per_second": round(worker.pace.learned_speed) or None,
                "learned_fixed_s": round(worker.pace.fixed, 4),
                "reported_tokens_per_second": round(worker.prefill_speed) or None,
            }
            for worker in gateway.registry.workers
        },
    }


def describe_index(gateway: "Gateway") -> dict[str, Any]:
    """Sizes, freshness and trust of what is known of each worker's cache, and who tokenizes for each model."""
    now = asyncio.get_running_loop().time()
    workers = {
        worker.name: {
            "source": worker.source,
            "synced": worker.synced,
            "chunks": gateway.index.sizes(worker.name),
            "heartbeat_age_s": round(now - worker.heartbeat_at, 3) if worker.heartbeat else None,
            "digests_checked": worker.digests_checked,
            "digest_mismatches": worker.digest_mismatches,
            "relists": dict(worker.relists),
            "epochs": worker.epochs,
            "trust": round(worker.trust, 3),
            "predictions": dict(worker.predictions),
        }
        for worker in gateway.registry.workers
    }
    tokenization = {
        model: {"by": prompts.by, "why_not_router": prompts.why_not} for model, prompts in gateway.prompts.items()
    }
    return {"entries": len(gateway.index), "workers": workers, "tokenization": tokenization}


def describe_contents(gateway: "Gateway", worker: Worker) -> dict[str, Any]:
    """The chunks a worker is believed to hold, by tier, as sorted hexadecimal hashes. O(entries)."""
    held = gateway.index.contents(worker.name)
    tiers = [tier.name for tier in worker.hello.tiers] if worker.hello else [tier for tier in held if held[tier]]
    return {
        "worker": worker.name,
        "synced": worker.synced,
        "contents": {tier: sorted(chunk.hex() for chunk in held.get(tier, ())) for tier in tiers},
    }


def explanation(gateway: "Gateway", plan: "Plan", routed: "Routed | None") -> dict[str, Any]:
    """Which worker a request would go to and why, with every candidate's hit in tokens by tier."""
    hits = routed.hits if routed else {}
    candidates = [
        {
            "worker": item.worker.name,
            "hit_tokens": hits[item.worker.name].total,
            "hit_tokens_by_tier": gateway.pipeline.chooser.tiers(plan, item.worker),
            "uncached_tokens_in_flight": item.worker.load.uncached_tokens,
            "in_flight": item.in_flight,
            "load": item.load,
            "trust": round(item.worker.trust, 3),
            "cache_source": item.worker.source,
        }
        for item in (routed.candidates if routed else ())
    ]
    return {
        "model": plan.pool.model,
        "policy": gateway.policy.name,
        "worker": routed.choice.worker.name if routed else None,
        "reason": routed.choice.reason if routed else "no worker can take requests",
        "prompt_tokens": plan.prompt_tokens,
        "tokenized_by": plan.tokenized.by,
        "why_not_router": plan.tokenized.why,
        "candidates": candidates,
    }


def _guard(gateway: "Gateway") -> Any:
    token = gateway.settings.admin_token.get_secret_value()
    friends = set(origins_of(gateway.settings.cors_origins)) - {"*"}

    async def guard(request: Request) -> None:
        if token:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), token.encode()):
                raise Unauthorized("the admin endpoints want 'Authorization: Bearer <admin token>'")
        elif not gateway.settings.admin_open:
            raise Forbidden(
                "the admin endpoints are closed: other machines can reach this address and no admin token is set. "
                "Start with --admin-token (or WARMROUTE_ADMIN_TOKEN), or listen on 127.0.0.1",
                code="admin_closed",
            )
        elif not _names_loopback(request.headers.get("host", "")):
            # A page in a browser on this machine can have its own name resolve to 127.0.0.1.
            raise Forbidden("without an admin token the admin endpoints answer to localhost only", code="admin_closed")
        elif _is_of_another_page(request) and request.headers.get("origin") not in friends:
            # A browser on this machine sends simple requests for any page, and says so.
            raise Forbidden("without an admin token no page of another origin may do that", code="admin_closed")

    return guard


def _is_of_another_page(request: Request) -> bool:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None and origin is not None:  # an older browser
        return origin.partition("://")[2] != request.headers.get("host", "")
    return site is not None and site not in _OWN_PAGES


def _names_loopback(host: str) -> bool:
    try:
        return not host or urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False


def _find(gateway: "Gateway", name: str) -> Worker:
    worker = gateway.registry.find(name)
    if worker is None:
        names = ", ".join(item.name for item in gateway.registry.workers) or "none"
        raise NotFound(f"there is no worker {name!r}; there are: {names}", param="worker", code="worker_not_found")
    return worker
