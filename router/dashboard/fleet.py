"""The fleet at a glance: its sums, and one page of its workers, so that a thousand of them cost what twenty do."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kv_protocol.messages import TIERS
from router.workers import Worker

if TYPE_CHECKING:
    from router.app import Gateway

State = Literal["up", "draining", "kept out", "down"]
STATES: tuple[State, ...] = ("up", "draining", "kept out", "down")
Sort = Literal["name", "state", "load", "cache", "trust"]


class FleetQuery(BaseModel):
    """Which workers are wanted: ``search`` is part of a name, a URL or a model."""

    model_config = ConfigDict(extra="forbid")

    sort: Sort = "name"
    descending: bool = False
    search: str = Field(default="", max_length=200)
    state: State | None = None
    offset: int = Field(default=0, ge=0)
    limit: int = Field(default=20, ge=1, le=200)


def describe_fleet(gateway: "Gateway", query: FleetQuery, in_flight: dict[str, int], queued: int) -> dict[str, Any]:
    """Sums over all workers, and the page of them that was asked for; what is in flight and queued is of all processes.
    O(workers)."""
    workers = gateway.registry.workers
    wanted = [worker for worker in workers if _matches(worker, query)]
    wanted.sort(key=lambda worker: worker.name)
    wanted.sort(key=_key(gateway, query.sort), reverse=query.descending)
    page = wanted[query.offset : query.offset + query.limit]
    return {
        "policy": gateway.policy.name,
        "draining": gateway.draining,
        "models": sorted(pool.model for pool in gateway.registry.pools.values()),
        "states": dict(Counter(state_of(worker) for worker in workers)),
        "in_flight": sum(in_flight.values()),
        "queued": queued,
        "tiers": _filled(gateway, workers),
        "matching": len(wanted),
        "workers": [_row(gateway, worker, in_flight) for worker in page],
    }


def state_of(worker: Worker) -> State:
    """Whether requests go to it, and what is in the way first."""
    if not worker.up:
        return "down"
    if worker.draining:
        return "draining"
    return "up" if worker.breaker.state == "closed" else "kept out"


def tiers_of(gateway: "Gateway", worker: Worker) -> list[dict[str, Any]]:
    """What each tier holds in chunks, of how many; ``capacity`` and ``chunk_bytes`` are 0 where they are not known."""
    held = gateway.index.sizes(worker.name)
    if worker.hello is None:
        rooms = {"gpu": worker.assumed_chunks} if worker.source != "none" else {}
        return [
            {"tier": tier, "chunks": count, "capacity": rooms.get(tier, 0), "chunk_bytes": 0}
            for tier, count in held.items()
            if count or tier in rooms
        ]
    return [
        {
            "tier": tier.name,
            "chunks": held.get(tier.name, 0),
            "capacity": tier.capacity_chunks,
            "chunk_bytes": tier.chunk_bytes,
        }
        for tier in worker.hello.tiers
    ]


def _matches(worker: Worker, query: FleetQuery) -> bool:
    if query.state is not None and state_of(worker) != query.state:
        return False
    text = query.search.casefold()
    return not text or any(text in name.casefold() for name in (worker.name, worker.spec.url, *worker.models))


def _key(gateway: "Gateway", sort: Sort) -> Callable[[Worker], Any]:
    match sort:
        case "state":
            return lambda worker: STATES.index(state_of(worker))
        case "load":
            return lambda worker: worker.weight
        case "cache":
            return lambda worker: gateway.index.size(worker.name)
        case "trust":
            return lambda worker: (worker.source != "none", worker.trust)
        case _:
            return lambda worker: worker.name


def _filled(gateway: "Gateway", workers: tuple[Worker, ...]) -> dict[str, dict[str, int]]:
    """By tier, in chunks and bytes, all workers together."""
    sums: dict[str, dict[str, int]] = {}
    for worker in workers:
        for tier in tiers_of(gateway, worker):
            into = sums.setdefault(tier["tier"], {"chunks": 0, "capacity": 0, "bytes": 0})
            into["chunks"] += tier["chunks"]
            into["capacity"] += tier["capacity"]
            into["bytes"] += tier["chunks"] * tier["chunk_bytes"]
    return {tier: sums[tier] for tier in TIERS if tier in sums}


def _row(gateway: "Gateway", worker: Worker, in_flight: dict[str, int]) -> dict[str, Any]:
    beat = worker.heartbeat
    control, url = gateway.control, worker.spec.url
    return {
        "name": worker.name,
        "url": url,
        "state": state_of(worker),
        "why": _why(worker),
        "models": sorted(worker.models),
        "version": worker.engine_version,
        "in_flight": in_flight.get(worker.name, 0),
        "running": beat.running if beat else None,
        "waiting": beat.waiting if beat else None,
        "uncached_tokens": worker.load.uncached_tokens,
        "load": worker.weight,
        "gpu_usage": beat.gpu_usage if beat else None,
        "prefill_tokens_per_second": round(worker.prefill_speed) or None,
        "tiers": tiers_of(gateway, worker),
        "cache_source": worker.source,
        "synced": worker.knows_all,
        "trust": round(worker.trust, 3),
        "predictions": dict(worker.predictions),
        "reports_error": worker.reports_error or worker.events_error,
        "report_port": worker.spec.report_address is not None,
        "heartbeat_age_s": round(asyncio.get_running_loop().time() - worker.heartbeat_at, 3) if beat else None,
        "leaving": control.membership.leaving(url),
        "drained": control.membership.drained(url),
    }


def _why(worker: Worker) -> str:
    match state_of(worker):
        case "down":
            return worker.down_reason
        case "draining":
            return worker.held
        case "kept out":
            return f"its circuit breaker is {worker.breaker.state} after failures"
        case _:
            return ""
