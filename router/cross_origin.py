"""Web pages of other origins: which may call the gateway (CORS). Off unless origins are named."""

import re
from typing import Any

from starlette.middleware.cors import CORSMiddleware

EXPOSED = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-should-retry",
    "x-warmroute-hit-tokens",
    "x-warmroute-reason",
    "x-warmroute-worker",
)


def origins_of(text: str) -> list[str]:
    """The origins of a setting, which spaces or commas separate."""
    return [origin for origin in re.split(r"[\s,]+", text) if origin]


def share_with_origins(app: Any, origins: str) -> CORSMiddleware:
    """``app`` for pages of these origins, separated by spaces or commas; ``*`` is any.

    Cookies are never asked for: who may use the gateway is told by a key, which a page has to send itself.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins_of(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        allow_credentials=False,
        expose_headers=EXPOSED,
    )
