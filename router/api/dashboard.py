"""The dashboard: its page, which holds no data, at ``/dashboard``; and what it shows, for whoever may use ``/admin``."""

import asyncio
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from router.api.openai import package_version
from router.dashboard import timeline
from router.dashboard.fleet import FleetQuery, describe_fleet
from router.dashboard.prefixes import described, tree
from router.dashboard.timeline import NOW_S

if TYPE_CHECKING:
    from router.app import Gateway

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
PROTECTION = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every part of the page: nothing from elsewhere, nothing inline, in nobody's frame."""

_UNCACHED = {"cache-control": "no-store"}


class File(msgspec.Struct, frozen=True):
    """One file of the page, as it is sent."""

    content: bytes
    type: str
    etag: str


def page_files() -> dict[str, File]:
    """The page's files by name."""
    found = {}
    for item in files("router.dashboard").joinpath("page").iterdir():
        kind = TYPES.get(item.name.rpartition(".")[2])
        if kind is not None:
            content = item.read_bytes()
            found[item.name] = File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def make_page() -> APIRouter:
    """The page, for anybody: it asks for the token itself."""
    router = APIRouter(include_in_schema=False)
    held = page_files()

    @router.get("/dashboard")
    async def page(request: Request) -> Response:
        return _sent(held["index.html"], request)

    @router.get("/dashboard/{name:path}")
    async def part(name: str, request: Request) -> Response:
        if not name:
            return Response(status_code=308, headers=PROTECTION | {"location": "../dashboard"})
        if name == "index.html" or (file := held.get(name)) is None:
            return Response("there is no such part of the dashboard", 404, PROTECTION, "text/plain; charset=utf-8")
        return _sent(file, request)

    return router


def add_data(router: APIRouter, gateway: "Gateway") -> None:
    """What the page shows, among the admin endpoints."""
    board = gateway.board

    @router.get("/fleet")
    async def fleet(query: Annotated[FleetQuery, Query()], response: Response) -> Any:
        response.headers.update(_UNCACHED)
        in_flight, queued = await asyncio.gather(gateway.control.in_flight(), board.queued())
        shown = describe_fleet(gateway, query, in_flight, queued)
        return {"version": package_version()} | shown

    @router.get("/timeline")
    async def over_time(response: Response, minutes: Annotated[int, Query(ge=1, le=60)] = 15) -> Any:
        response.headers.update(_UNCACHED)
        rows = await board.rows(60 * minutes)
        bounds = board.timeline.bounds
        first = max((number for number, _ in rows), default=0) - NOW_S // timeline.SLOT_S
        recent = [row for row in rows if row[0] > first]
        return timeline.points(rows, bounds, 60 * minutes) | {"now": timeline.now(recent, bounds)}

    @router.get("/prefixes")
    async def prefixes(response: Response) -> Any:
        response.headers.update(_UNCACHED)
        latest = await board.paths()
        workers: dict[tuple[str, int], list[str]] = {}
        for worker in gateway.registry.workers:
            if worker.namespace is not None:
                workers.setdefault(worker.namespace, []).append(worker.name)
        return {"prompts": len(latest), "prefixes": await described(gateway.index, tree(latest), workers)}

    @router.get("/decisions", response_class=StreamingResponse)
    async def decisions(request: Request) -> Response:
        events = await board.live.open(request.is_disconnected)
        return StreamingResponse(
            events, media_type="text/event-stream", headers=_UNCACHED | {"x-accel-buffering": "no"}
        )


def _sent(file: File, request: Request) -> Response:
    headers = PROTECTION | {"etag": file.etag, "cache-control": "no-cache"}
    if file.etag in re.split(r"\s*,\s*", request.headers.get("if-none-match", "").replace("W/", "")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers | {"content-type": file.type})
