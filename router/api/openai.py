"""What any client may ask: models, health, metrics, version."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response

from router.access import TENANT, Tenant
from router.errors import ModelNotFound, Unavailable

if TYPE_CHECKING:
    from router.app import Gateway
    from router.workers import Pool


def package_version() -> str:
    """The installed version; ``unknown`` when run from a plain checkout."""
    try:
        return version("warmroute")
    except PackageNotFoundError:
        return "unknown"


def make_public(gateway: "Gateway") -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models(request: Request) -> Any:
        cards = [_card(pool) for name, pool in gateway.registry.pools.items() if _may_use(request, name)]
        return {"object": "list", "data": cards}

    @router.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> Any:
        pool = gateway.registry.pools.get(model)
        if pool is None or not _may_use(request, model):
            raise ModelNotFound(f"the model {model!r} is not served here", param="model")
        return _card(pool)

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Any:
        return {"status": "ok"}

    @router.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Any:
        if gateway.draining:
            raise Unavailable("the gateway is stopping", retry_after=1)
        missing = _without_workers(gateway)
        if missing:
            raise Unavailable(f"no worker is up for: {', '.join(missing)}", retry_after=1)
        return {"status": "ready"}

    @router.get("/version")
    async def get_version() -> Any:
        return {"version": package_version(), "product": "warmroute"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(await gateway.control.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _may_use(request: Request, model: str) -> bool:
    tenant: Tenant | None = request.scope.get(TENANT)
    return tenant is None or tenant.may_use(model)


def _card(pool: "Pool") -> dict[str, Any]:
    """One model as a worker shows it, with the shortest context of all its workers."""
    cards = [worker.models[pool.model] for worker in pool.workers]
    lengths = [card.max_model_len for card in cards if card.max_model_len]
    card: dict[str, Any] = msgspec.to_builtins(cards[0])
    return card | {"object": "model", "max_model_len": min(lengths) if lengths else None}


def _without_workers(gateway: "Gateway") -> list[str]:
    pools = gateway.registry.pools
    if not pools:
        return ["any model"]
    return [
        model for model, pool in pools.items() if not any(worker.up and not worker.draining for worker in pool.workers)
    ]
