"""The doctor's look at the KV events of an engine without the connector."""

import asyncio
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from kv_protocol.errors import MalformedFrame
from router.config import WorkerSpec
from router.findings import Result
from router.kv_events import Source, source_of, sources_of, why_none

TIMEOUT_S = 5.0
_START = "start vLLM with --kv-events-config, an endpoint and a replay_endpoint in it"

Seen = tuple[Result, str, str]
"""A result, what was found, and what to do."""


async def examine_events(client: httpx.AsyncClient, spec: WorkerSpec) -> Seen:
    """Whether an engine publishes its KV events where the gateway can read them."""
    if not spec.has_events:
        return "skip", "events=none: it is routed by what is sent there", ""
    try:
        source = await _source(client, spec)
    except (MalformedFrame, httpx.HTTPError) as error:
        return "warn", str(error), _START
    if isinstance(source, str):
        return "warn", f"{source}; until then it is routed by what is sent there", _START
    for endpoint in filter(None, (source.endpoint, source.replay)):
        if refusal := await _refusal(endpoint):
            return "fail", f"{endpoint}: {refusal}", "let the port be reached from here; bind it with tcp://*:PORT"
    if find_spec("zmq") is None:
        return "fail", f"{source.endpoint}; reading them needs pyzmq", "pip install 'warmroute[events]'"
    if not source.replay:
        found = f"{source.endpoint}, without replay: what was published before is not known"
        return "warn", found, "name a replay_endpoint in --kv-events-config"
    return "ok", f"{source.endpoint}, replayed from {source.replay}", ""


async def _source(client: httpx.AsyncClient, spec: WorkerSpec) -> Source | str:
    """Where the events are, or why that is not known."""
    if spec.events:
        return spec.event_source
    answer = await client.get("/kv_event_sources")
    found = sources_of(answer.content, spec.host) if answer.status_code == httpx.codes.OK else {}
    return source_of(found, spec.rank) or why_none(found, spec.rank)


async def _refusal(endpoint: str) -> str:
    """Why a TCP endpoint cannot be reached; empty where it can, or is of another kind."""
    parts = urlsplit(endpoint)
    try:
        if parts.scheme != "tcp" or parts.port is None:
            return ""
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except TimeoutError:
        return f"no connection within {TIMEOUT_S:g} s"
    except (OSError, ValueError) as error:
        return f"cannot be reached: {error}"
    writer.close()
    return ""
