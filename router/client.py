"""The client's side of one request: its body, its response, and whether it is still there."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Self

from router.errors import ApiError, ClientGone, RequestTimeout, TooLarge

if TYPE_CHECKING:
    from router.accounting import Decision

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

CONNECTION = "warmroute.connection"
"""Scope key under which our server passes the connection; see router.server."""


class Client:
    """While the context is open, the request's task is cancelled as soon as the client goes away; ``gone`` then tells
    that from any other cancellation. Under a server that is not ours a task waits for the disconnect instead."""

    transparent = True
    """Whether nothing looks at what passes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._connection = scope.get(CONNECTION)
        # What uvicorn calls a request and its response on that connection.
        self._cycle: Any = receive.__self__ if self._connection is not None else None  # type: ignore[attr-defined]
        # uvicorn's own messages stay in use for HEAD, whose responses promise a body and have none, and where somebody
        # in between adds to the response's head.
        straight = scope["method"] != "HEAD" and getattr(send, "__self__", None) is self._cycle
        self._direct = self._connection if straight else None
        self._task: asyncio.Task[Any] | None = None
        self._listener: asyncio.Task[None] | None = None
        self.gone = False
        self.status = 0
        self.decision: Decision | None = None
        self.started = False
        self.finished = False

    def __enter__(self) -> Self:
        if self._connection is not None:
            self._task = self._cycle.task
            self._connection.on_lost = self._lost
        else:
            self._task = asyncio.current_task()
        return self

    def __exit__(self, *_: object) -> None:
        self._task = None
        if self._connection is not None:
            self._connection.on_lost = None
        if self._listener is not None:
            self._listener.cancel()

    @property
    def declared_length(self) -> int:
        """Content-Length, 0 where there is none."""
        for name, value in self.scope["headers"]:
            if name == b"content-length":
                return int(value) if value.isdigit() else 0
        return 0

    async def read_body(
        self,
        limit: int,
        timeout: float,  # noqa: ASYNC109 - one deadline for all of it
        arrived: Callable[[int], None] = lambda _: None,
    ) -> bytes:
        """The whole body; ``arrived`` is told how many bytes are here, as they come, and may raise.

        Raises:
            TooLarge: it exceeds ``limit`` bytes.
            RequestTimeout: it did not arrive in time.
            ClientGone: the client left.
        """
        if (body := self.take_body(limit)) is not None:
            return body
        if self.declared_length > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(timeout):
                body = await self._read(limit, arrived)
        except TimeoutError as error:
            raise RequestTimeout(f"the request's body did not arrive within {timeout:g} s") from error
        if self._connection is None and self._task is not None:
            self._listener = asyncio.create_task(self._listen())
        return body

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self.status = status
        if self._direct is not None:
            self._direct.start(self._cycle, status, headers)
        else:
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while the client does not read."""
        if self._direct is not None:
            await self._direct.send(self._cycle, data)
        else:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    @property
    def takes_pushes(self) -> bool:
        """Whether ``push`` may be used for body bytes in place of ``write``."""
        return self._direct is not None and self.transparent

    def push(self, data: bytes) -> bool:
        """Send body bytes without waiting; whether the client keeps up. If not, ``drained`` waits until it does."""
        assert self._direct is not None
        keeps_up: bool = self._direct.push(self._cycle, data)
        return keeps_up

    @property
    def takes_framed(self) -> bool:
        """Whether ``push_framed`` may be used in place of ``push``."""
        return self._direct is not None and self.transparent and bool(self._cycle.chunked_encoding)

    def push_framed(self, chunk: bytes) -> bool:
        """``push`` for one chunk in the chunked coding."""
        assert self._direct is not None
        keeps_up: bool = self._direct.push_framed(self._cycle, chunk)
        return keeps_up

    async def drained(self) -> None:
        """Wait while the client does not read."""
        assert self._direct is not None
        await self._direct.drained(self._cycle)

    @property
    def keeps_up(self) -> bool:
        """Whether ``answer`` may be used: nothing that was sent before still waits to be read."""
        return self._direct is not None and self.transparent and not self._direct.flow.write_paused

    def answer(self, status: int, headers: Headers, data: bytes) -> None:
        """Send a whole response at once."""
        assert self._direct is not None
        self.started = True
        self.status = status
        self._direct.answer(self._cycle, status, headers, data)
        self.finished = True

    async def finish(self, data: bytes = b"") -> None:
        if self._direct is not None:
            await self._direct.finish(self._cycle, data)
        else:
            await self._send({"type": "http.response.body", "body": data})
        self.finished = True

    def error_body(self, error: ApiError) -> bytes:
        """How errors look to this client."""
        return error.body()

    def error_event(self, error: ApiError) -> bytes:
        """The last event of a stream that broke off."""
        return b"data: " + self.error_body(error) + b"\n\n"

    async def fail(self, error: ApiError, request_id: str = "") -> None:
        """Answer with an error object."""
        body = self.error_body(error)
        headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
        if request_id:
            headers.append((b"x-request-id", request_id.encode("latin-1")))
        await self.start(error.status, headers)
        await self.finish(body)

    def hang_up(self) -> None:
        """End a response that cannot be completed so that the client sees it is not complete.

        Raises:
            ClientGone: always, under a server that only understands exceptions.
        """
        if self._connection is None:
            raise ClientGone("the response could not be completed")
        self._connection.abort(self._cycle)

    def take_body(self, limit: int) -> bytes | None:
        """A body that is all here already, None otherwise: spares a timer, and uvicorn's messages. Raises as
        ``read_body`` does."""
        cycle = self._cycle
        if cycle is None or cycle.more_body or cycle.waiting_for_100_continue:
            return None
        if cycle.disconnected:
            raise ClientGone("the client left before its request was served")
        body = bytes(cycle.body)
        cycle.body = bytearray()
        cycle.message_event.clear()
        cycle.flow.resume_reading()
        if len(body) > limit:
            raise _too_large(limit)
        return body

    async def _read(self, limit: int, arrived: Callable[[int], None]) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was complete")
        body: bytes = message.get("body", b"")
        arrived(len(body))
        if not message.get("more_body") and len(body) <= limit:
            return body
        return await self._read_rest(bytearray(body), limit, arrived, more=bool(message.get("more_body")))

    async def _read_rest(self, body: bytearray, limit: int, arrived: Callable[[int], None], *, more: bool) -> bytes:
        while more:
            if len(body) > limit:
                raise _too_large(limit)
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client left before its request was complete")
            body += message.get("body", b"")
            arrived(len(body))
            more = message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(limit)
        return bytes(body)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._lost()

    def _lost(self) -> None:
        self.gone = True
        if self._cycle is not None:  # uvicorn tells the last request that arrived, which need not be this one
            self._cycle.disconnected = True
        if self._task is not None:
            self._task.cancel()


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request's body exceeds {limit} bytes")
