"""Everything but the two hot endpoints: a FastAPI application for models, health, metrics and administration."""

import json
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from router.api.admin import make_admin
from router.api.dashboard import make_page
from router.api.openai import make_public
from router.api.schema import describe_itself
from router.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound

if TYPE_CHECKING:
    from router.app import Gateway


def make_rest(gateway: "Gateway") -> FastAPI:
    """The application, with every error answered as an OpenAI error object."""
    app = FastAPI(title="warmroute", docs_url=None, redoc_url=None, default_response_class=_Json)
    app.include_router(make_public(gateway))
    app.include_router(make_admin(gateway))
    if gateway.settings.dashboard:
        app.include_router(make_page())
    describe_itself(app)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return _answer(_invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return _answer(MethodNotAllowed(f"{request.url.path} does not take {request.method}"))
        if error.status_code == 400:
            return _answer(InvalidRequest(str(error.detail)))
        return _answer(NotFound(f"there is no {request.url.path} here", code="not_found"))

    return app


class _Json(Response):
    """JSON as msgspec writes it: a worker's figure that is no number becomes null, not an error."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def _invalid(error: RequestValidationError) -> InvalidRequest:
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"][1:] if first["type"] != "json_invalid")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return InvalidRequest(json.dumps(message, ensure_ascii=True)[1:-1], param=where or None)


def _answer(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers)
