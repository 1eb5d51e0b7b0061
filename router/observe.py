"""The request path as seen from outside: access log and traces wrap it where they are switched on, and only there."""

import time
from collections.abc import Awaitable, Callable

from router.client import Client
from router.logs import log_access
from router.parse import request_id_of
from router.splice import Kind
from router.tracing import Tracer

Handle = Callable[[Client, Kind], Awaitable[None]]


def observed(handle: Handle, *, access_log: bool, tracer: Tracer | None) -> Handle:
    """``handle``, observed as asked; itself where nothing is."""
    if tracer is not None:
        handle = _traced(handle, tracer)
    return _logged(handle) if access_log else handle


def _logged(handle: Handle) -> Handle:
    async def logged(client: Client, kind: Kind) -> None:
        request_id = _name(client)
        began = time.perf_counter()
        try:
            await handle(client, kind)
        finally:
            log_access(client, request_id, time.perf_counter() - began)

    return logged


def _traced(handle: Handle, tracer: Tracer) -> Handle:
    async def traced(client: Client, kind: Kind) -> None:
        span = tracer.begin(client, _name(client))
        try:
            await handle(client, kind)
        finally:
            tracer.end(client, span)

    return traced


def _name(client: Client) -> str:
    """The request's id, from now on also in its headers."""
    headers = client.scope["headers"]
    request_id = request_id_of(headers)
    named = (b"x-request-id", request_id.encode("ascii"))
    if named not in headers:
        client.scope["headers"] = [header for header in headers if header[0] != b"x-request-id"] + [named]
    return request_id
