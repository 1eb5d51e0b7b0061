"""The gateway's OpenAPI document, at ``/openapi.json``.

FastAPI describes what it serves itself. Requests that go on to workers bypass it; they are described here from the table
of endpoints, no closer than the gateway looks at them: what else a body may hold is the worker's to say.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from router.endpoints import TABLE, Endpoint

_TEXT = {"type": "string"}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _ANY_OBJECT}]},
    },
}
_PROMPT = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, _TOKENS, {"type": "array", "items": _TOKENS}]}
_COMMON: Mapping[str, Any] = {
    "model": _TEXT,
    "stream": {"type": "boolean"},
    "cache_salt": {"type": "string", "minLength": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 16},
}
_BODIES: Mapping[str, dict[str, Any]] = {
    "chat": {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}},
    "completions": {"prompt": _PROMPT},
    "messages": {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}, "system": _TEXT},
    "responses": {"input": {"anyOf": [_TEXT, {"type": "array", "items": _ANY_OBJECT}]}, "instructions": _TEXT},
    "generate": {"token_ids": _TOKENS},
}
_REQUIRED: Mapping[str, list[str]] = {
    "chat": ["model", "messages"],
    "completions": ["model", "prompt"],
    "messages": ["model", "messages", "max_tokens"],
    "responses": ["model", "input"],
    "generate": ["token_ids"],
}
_ROUTED = {"cache": "by what workers hold of it and their load", "load": "by load", "owner": "to the worker it is from"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def describe_itself(app: FastAPI) -> None:
    """Have ``app`` answer with the whole gateway's document, made when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            with warnings.catch_warnings():
                # A route that answers HEAD as it does GET has one name for both.
                warnings.filterwarnings("ignore", message="Duplicate Operation ID")
                document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in document["paths"].values():
                operations.pop("head", None)
            document["paths"] |= {path: _path(path, endpoint) for path, endpoint in TABLE.items()}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # as FastAPI documents it


def _path(path: str, endpoint: Endpoint) -> dict[str, Any]:
    return {method.lower(): _operation(path, endpoint) for method in sorted(endpoint.methods)}


def _operation(path: str, endpoint: Endpoint) -> dict[str, Any]:
    errors = {"content": {"application/json": {"schema": _ERROR}}}
    return {
        "operationId": path.strip("/").replace("/", "_").replace(".", "_"),
        "summary": f"Sent on to a worker, {_ROUTED[endpoint.routing]}",
        "requestBody": {"required": True, "content": _content(path, endpoint)},
        "responses": {
            "200": {"description": "The worker's answer", "content": {"application/json": {}, "text/event-stream": {}}},
            "4XX": {"description": "The request cannot be served", **errors},
            "5XX": {"description": "No worker could serve it", **errors},
        },
    }


def _content(path: str, endpoint: Endpoint) -> dict[str, Any]:
    if path.startswith("/v1/audio/"):
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        form = {"type": "object", "required": ["model", "file"], "properties": {"model": _TEXT, "file": file}}
        return {"multipart/form-data": {"schema": form}}
    kind = endpoint.kind
    schema = {"type": "object", "properties": {**_COMMON, **_BODIES.get(kind, {})}}
    return {"application/json": {"schema": schema | {"required": _REQUIRED.get(kind, ["model"])}}}
