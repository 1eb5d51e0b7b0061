"""What can go wrong in the router.

RouterError
├── ConfigError              a setting is unknown, malformed or contradicts another
├── TooManyChunks            a worker reports more than the index takes from one
├── Unrenderable             a prompt cannot be reproduced exactly, so it is not hashed here
├── ApiError                 answered to the client as an OpenAI error object
│   ├── InvalidRequest       400, names the field
│   │   └── ContextTooLong   400 context_length_exceeded
│   ├── Unauthorized         401 wrong or missing token
│   ├── Forbidden            403 the operation is closed in this set-up
│   ├── NotFound             404
│   │   └── ModelNotFound    404 model_not_found
│   ├── MethodNotAllowed     405
│   ├── RequestTimeout       408 the body did not arrive in time
│   ├── Conflict             409
│   ├── TooLarge             413 body, 431 headers
│   ├── Busy                 429 with Retry-After
│   │   └── Limited          429 a limit of the key is reached
│   ├── BadGateway           502, or 504 when a worker took too long
│   └── Unavailable          503 with Retry-After: no worker can take the request
├── UpstreamError            a worker failed a request; the text names the worker and what happened
│   ├── ConnectFailed        no connection could be made
│   ├── UpstreamTimeout      silence beyond the deadline
│   ├── UpstreamClosed       the connection broke before the response was complete
│   └── RetryableStatus      the worker itself answered 502, 503 or 504
└── ClientGone               the client closed its connection
"""

import math
import random

import msgspec

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected, not UTF-8, or nested too deeply."""


class RouterError(Exception):
    """Root of everything the router raises on purpose."""


class ConfigError(RouterError):
    pass


class TooManyChunks(RouterError):
    pass


class Unrenderable(RouterError):
    """``reason`` is for people: logged once per pool, shown by the admin endpoints, never holding prompt text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ApiError(RouterError):
    """An error with its HTTP status and the members of an OpenAI error object. ``retry_after`` is in seconds."""

    status = 500
    type = "server_error"
    code: str | None = None
    should_retry: bool | None = None
    """Said to clients that heed ``x-should-retry``; None leaves it to them."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        members = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": members})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers, with ``retry-after`` in whole seconds where it applies.

        ``retry-after-ms`` (which OpenAI's and Anthropic's clients prefer) is up to a quarter longer, at random, so that
        clients that were turned away together do not come back together.
        """
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after))))
            wait = self.retry_after * (1000 + 250 * random.random())  # noqa: S311 - spreads load, guards nothing
            headers.append((b"retry-after-ms", b"%d" % max(1, round(wait))))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ApiError):
    """Answered with the challenge that RFC 6750 asks for."""

    status = 401
    type = "authentication_error"
    code = "invalid_token"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class Forbidden(ApiError):
    status = 403
    type = "permission_error"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(ApiError):
    status = 409
    type = "invalid_request_error"
    should_retry = False


class TooLarge(ApiError):
    type = "invalid_request_error"

    def __init__(self, message: str, *, status: int = 413, code: str = "request_too_large") -> None:
        super().__init__(message, code=code)
        self.status = status


class Busy(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    should_retry = True


class Limited(Busy):
    """``kind`` is the limit that is reached: requests, tokens or concurrency. Without ``retry_after`` waiting does not
    help."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str = "requests", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = kind
        self.should_retry = retry_after is not None


class BadGateway(ApiError):
    """A worker that took too long once is not worth another wait of that length; other failures are."""

    type = "upstream_error"

    def __init__(self, message: str, *, status: int = 502, code: str = "worker_failed") -> None:
        super().__init__(message, code=code)
        self.status = status
        self.should_retry = status != 504


class Unavailable(ApiError):
    status = 503
    type = "service_unavailable_error"
    code = "no_worker_available"
    should_retry = True


class UpstreamError(RouterError):
    """``worker`` names who failed."""

    def __init__(self, worker: str, what: str) -> None:
        super().__init__(f"worker {worker} {what}")
        self.worker = worker


class ConnectFailed(UpstreamError):
    pass


class UpstreamTimeout(UpstreamError):
    pass


class UpstreamClosed(UpstreamError):
    pass


class RetryableStatus(UpstreamError):
    pass


class ClientGone(RouterError):
    pass
