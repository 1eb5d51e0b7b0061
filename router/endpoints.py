"""Which paths the gateway serves, and how: the table behind ``docs/http-api.md``.

A path is looked up once. What is not in the table is passed through by load; what would let a client control a worker
never is. Paths that two programs could read differently are refused, so that what is looked up here is what the worker
looks up.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from router.errors import InvalidRequest, MethodNotAllowed, NotFound
from router.splice import Kind

Routing = Literal["cache", "load", "owner"]
"""How a worker is chosen: by what its cache holds and its load, by load alone, or because it made what is asked for."""


class Endpoint(NamedTuple):
    """``kind`` is how the request is read and what it is counted as; ``repeatable`` whether another worker may get it
    after one failed it half-way; ``methods`` those it takes, none meaning any."""

    kind: Kind
    routing: Routing
    methods: frozenset[str] = frozenset({"POST"})
    repeatable: bool = True


_BY_LOAD = Endpoint("load", "load")

PROMPTS: Mapping[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
    "/inference/v1/generate": "generate",
}
"""Prompts: tokenized, hashed, and routed by cache and load."""

BY_LOAD: tuple[str, ...] = (
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""Known requests whose work no cache saves, or whose prompt the engine alone knows."""

PASSED_THROUGH = Endpoint("load", "load", frozenset(), repeatable=False)
# All below a response's id, in any spelling that some server may take: none of it may reach another tenant's response.
_STORED = re.compile(r"/v1/responses/(?P<id>[^/]+)(?:/.*)?", re.IGNORECASE | re.DOTALL)
_OF_A_RESPONSE = Endpoint("stored", "owner", frozenset({"GET", "POST", "DELETE"}), repeatable=False)

_STOPS = "it stops, empties or slows a worker down for everybody"
_WEIGHTS = "it changes or shows what a worker computes with"
_ADAPTERS = "it makes a worker load files, and only one worker of a pool would have the adapter"
_OTHERS = "it ends requests of others"
_ONE = "it says something about one worker, and any worker would answer"
_SOCKET = "it needs a WebSocket"

REFUSED: Mapping[str, str] = {
    "/pause": _STOPS,
    "/resume": _STOPS,
    "/is_paused": _ONE,
    "/sleep": _STOPS,
    "/wake_up": _STOPS,
    "/is_sleeping": _ONE,
    "/release_kv_cache_memory": _STOPS,
    "/reset_prefix_cache": _STOPS,
    "/reset_mm_cache": _STOPS,
    "/reset_encoder_cache": _STOPS,
    "/start_profile": _STOPS,
    "/stop_profile": _STOPS,
    "/scale_elastic_ep": _STOPS,
    "/is_scaling_elastic_ep": _ONE,
    "/collective_rpc": "it runs any method of an engine",
    "/abort_requests": _OTHERS,
    "/inference/v1/abort_requests": _OTHERS,
    "/init_weight_transfer_engine": _WEIGHTS,
    "/shutdown_weight_transfer_engine": _WEIGHTS,
    "/start_weight_update": _WEIGHTS,
    "/start_draft_weight_update": _WEIGHTS,
    "/update_weights": _WEIGHTS,
    "/finish_weight_update": _WEIGHTS,
    "/update_weight_version": _WEIGHTS,
    "/weight_info": _WEIGHTS,
    "/weight_checker": _WEIGHTS,
    "/get_world_size": _ONE,
    "/v1/load_lora_adapter": _ADAPTERS,
    "/v1/unload_lora_adapter": _ADAPTERS,
    "/server_info": _ONE,
    "/load": _ONE,
    "/kv_event_sources": _ONE,
    "/ping": _ONE,
    "/docs": _ONE,
    "/docs/oauth2-redirect": _ONE,
    "/redoc": _ONE,
    "/invocations": "it hides which endpoint is meant; ask for that endpoint",
    "/v1/realtime": _SOCKET,
}
"""Paths of a worker that are never passed through, and why."""

REFUSED_BELOW: Mapping[str, str] = {
    "/fault_tolerance/": _STOPS,
    "/metrics/": _ONE,
    "/admin/": "it would be taken for the gateway's own",
}

OWN: frozenset[str] = frozenset(
    {"/v1/models", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/dashboard"}
)
"""Answered by the gateway itself, as is everything below ``/admin``."""

TABLE: Mapping[str, Endpoint] = {
    **{path: Endpoint(kind, "cache") for path, kind in PROMPTS.items()},
    **dict.fromkeys(BY_LOAD, _BY_LOAD),
}
_ODD = re.compile(r"//|/\.{1,2}(?:/|$)|[\\\x00-\x20\x7f]")


def find(path: str, method: str, *, pass_through: bool = True) -> Endpoint | None:
    """What a decoded path is; None for the gateway's own. O(1).

    Raises:
        ApiError: it is not served, not with this method, or could be read in more than one way.
    """
    if is_own(path):
        return None
    endpoint = TABLE.get(path)
    if endpoint is None:
        endpoint = _beyond_table(path, pass_through=pass_through)
    if endpoint.methods and method not in endpoint.methods and not (method == "HEAD" and "GET" in endpoint.methods):
        raise MethodNotAllowed(f"{path} takes {' or '.join(sorted(endpoint.methods))}, not {method}")
    return endpoint


def is_own(path: str) -> bool:
    """Whether the gateway itself answers."""
    return path in OWN or path == "/admin" or path.startswith(("/admin/", "/dashboard/", "/v1/models/"))


def is_page(path: str) -> bool:
    """Whether it is a part of the dashboard's page."""
    return path == "/dashboard" or path.startswith("/dashboard/")


def response_id(path: str) -> str:
    """The id in the path of a stored response's endpoint."""
    found = _STORED.fullmatch(path)
    return found["id"] if found is not None else ""


def _beyond_table(path: str, *, pass_through: bool) -> Endpoint:
    if _ODD.search(path) or not path.startswith("/"):
        raise InvalidRequest("the path is ambiguous: it has empty, '.' or '..' segments, or control characters")
    if (why := _refused(path)) is not None:
        raise NotFound(f"{path} is not passed on to workers: {why}", code="not_proxied")
    if _STORED.fullmatch(path):
        return _OF_A_RESPONSE
    if not pass_through:
        raise NotFound(f"there is no {path} here", code="not_found")
    return PASSED_THROUGH


def _refused(path: str) -> str | None:
    """Compared without case and trailing slashes, which a proxy before the worker may not mind."""
    plain = path.rstrip("/").lower()
    if plain in REFUSED:
        return REFUSED[plain]
    below = plain + "/"
    return next((why for start, why in REFUSED_BELOW.items() if below.startswith(start)), None)
