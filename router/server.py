"""The HTTP server: uvicorn with httptools and uvloop, and what uvicorn leaves open.

A request's head is bounded, in bytes and in time, while it arrives; a client that stops reading is disconnected after a while; the application
learns of a lost connection by a call instead of a waiting task, and can break one off.

Stopping loses no request. ``/ready`` turns 503 and every response says ``connection: close``; connections are taken for
``drain_delay`` longer. Then the listener closes. What is in flight is answered; a connection that idles is kept for
``drain_idle``, because its client may just be sending on it. Only a client that was told is hung up on after a response.
"""

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.client import CONNECTION, Headers
from router.config import Settings
from router.errors import RequestTimeout, TooLarge
from router.tls import server_context
from router.upgrade import parse_past_head

TICK_S = 0.1
LINGER_S = 2.0
"""How long what a client still sends is swallowed after the last answer on its connection."""

_PROTOCOL_SETTINGS = ("max_header_bytes", "client_timeout", "body_timeout", "drain_idle")

_log = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """One client connection."""

    max_header_bytes = 64 << 10
    client_timeout = 300.0
    body_timeout = 60.0
    drain_idle = 1.0
    draining = False

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.on_lost: Callable[[], None] | None = None
        self._head_bytes = 0
        self._in_head = True
        self._ending = False
        self._received = self._unsent = b""
        self._promised: int | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._idle_since = 0.0

    def start(self, cycle: RequestResponseCycle, status: int, headers: Headers) -> None:
        """Begin a response. Its head is sent with the first of its body. Clients may send requests ahead: ``cycle`` says
        which one is answered, here and below."""
        if not cycle.disconnected:
            self._unsent = self._head(cycle, status, headers)

    async def send(self, cycle: RequestResponseCycle, data: bytes) -> None:
        """Send body bytes; waits while the client does not read."""
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        if not cycle.disconnected and data:
            self._write(cycle, data, b"")

    def push(self, cycle: RequestResponseCycle, data: bytes) -> bool:
        """Send body bytes at once; whether the client still keeps up. If not, ``drained`` waits until it does."""
        if not cycle.disconnected and data:
            self._write(cycle, data, b"")
        return not self.flow.write_paused

    def push_framed(self, cycle: RequestResponseCycle, chunk: bytes) -> bool:
        """``push`` for one chunk of a response in the chunked coding, given as that."""
        if not cycle.disconnected:
            head, self._unsent = self._unsent, b""
            self.transport.write(head + chunk if head else chunk)
        return not self.flow.write_paused

    async def drained(self, cycle: RequestResponseCycle) -> None:
        """Wait until the client has read what was sent, or is gone."""
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()

    def answer(self, cycle: RequestResponseCycle, status: int, headers: Headers, data: bytes) -> None:
        """Send a whole response at once; for connections whose writing is not paused."""
        self.start(cycle, status, headers)
        self._end_with(cycle, data)

    async def finish(self, cycle: RequestResponseCycle, data: bytes) -> None:
        """Send the last body bytes. A body shorter than was promised ends the connection."""
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        self._end_with(cycle, data)

    def _end_with(self, cycle: RequestResponseCycle, data: bytes) -> None:
        if cycle.disconnected:
            return
        self._write(cycle, data, b"0\r\n\r\n")
        if self._promised:
            self.abort(cycle)
        else:
            self._complete(cycle)

    def _complete(self, cycle: RequestResponseCycle) -> None:
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            if cycle.more_body:
                self._end()
            else:
                self.transport.close()
        cycle.on_response()

    def _head(self, cycle: RequestResponseCycle, status: int, headers: Headers) -> bytes:
        """The response's head; what the cycle keeps of a response is set as if it had sent it."""
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        cycle.chunked_encoding, self._promised = cycle.scope["http_version"] == "1.1", None
        parts = [STATUS_LINE[status]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                cycle.chunked_encoding, self._promised = False, int(value)
            elif name == b"connection" and value.lower() == b"close":
                cycle.keep_alive = False
        if not cycle.keep_alive:
            parts.append(b"connection: close\r\n")
        if status in (204, 304):  # without a body, whatever length a 304 tells
            cycle.chunked_encoding, self._promised = False, None
        elif cycle.chunked_encoding:
            parts.append(b"transfer-encoding: chunked\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def _write(self, cycle: RequestResponseCycle, data: bytes, last: bytes) -> None:
        head, self._unsent = self._unsent, b""
        if cycle.chunked_encoding:
            piece = b"%x\r\n%b\r\n%b" % (len(data), data, last) if data else last
            self.transport.write(head + piece if head else piece)
        elif head or data:
            if self._promised is not None:
                self._promised -= len(data)
            self.transport.write(head + data)

    def abort(self, cycle: RequestResponseCycle) -> None:
        """Close at once, without completing the response."""
        cycle.disconnected = True
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._await_rest()

    def data_received(self, data: bytes) -> None:
        self._received = data
        self._idle_since = math.inf
        super().data_received(data)
        if self._ending or self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse_head()
        if self._in_head or self.cycle.more_body:
            self._await_rest()
        elif self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self.scope[CONNECTION] = self  # type: ignore[literal-required] # ours alone

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        if self.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, but the first piece is not copied: mostly it is the whole body, or half of a long one."""
        cycle: Any = self.cycle
        if cycle.body:
            cycle.body = bytearray(cycle.body) if type(cycle.body) is bytes else cycle.body
            super().on_body(body)
        elif not cycle.response_complete and not (self.parser.should_upgrade() and self._should_upgrade()):
            cycle.body = body
            if len(body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        cycle = self.cycle
        if cycle.response_complete:  # answered before its body was here
            cycle.more_body = False
        elif not (self.parser.should_upgrade() and self._should_upgrade()):
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        """As uvicorn's, but with one timer for all the pauses between requests instead of one for each."""
        if self.pipeline or self.timeout_keep_alive == self.drain_idle:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self._idle is None:
            self._idle = self.loop.call_later(self.timeout_keep_alive, self._end_idleness)

    def _end_idleness(self) -> None:
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self._idle = None
            self.timeout_keep_alive_handler()
        else:
            self._idle = self.loop.call_later(min(left, self.timeout_keep_alive), self._end_idleness)

    def _should_upgrade(self) -> bool:
        """Asked only of requests that offer another protocol: they begin as any other, and do not end with their head."""
        return not self._in_head

    def handle_websocket_upgrade(self) -> None:
        """Called while the parser's exception is handled, which says where the head ended."""
        ended = sys.exception()
        at = ended.args[0] if ended is not None and ended.args else len(self._received)
        rest = self._received[at:]
        try:
            parse_past_head(self, self.scope["method"].encode(), self.headers)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if rest:
            self.data_received(rest)

    def shutdown(self) -> None:
        """The server stops: end this connection where its client knows, or will see, that it ends."""
        self.timeout_keep_alive = self.drain_idle  # type: ignore[assignment] # whole seconds are uvicorn's choice alone
        if not self.cycle or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            if not (self._in_head and self._head_bytes):  # a head that is arriving has a deadline of its own
                self.timeout_keep_alive_task = self.loop.call_later(self.drain_idle, self.timeout_keep_alive_handler)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def _await_rest(self) -> None:
        """One deadline for the rest of a head, or of a body that nobody reads any more."""
        if self._overdue is None:
            self._overdue = self.loop.call_later(self.body_timeout, self._give_up)

    def _give_up(self) -> None:
        self._overdue = None
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever reads the body has a deadline of their own.
            self._await_rest()
        elif not self._in_head:
            self.transport.close()  # it was answered: another answer would be taken for the next request's
        elif not self.transport.is_closing():
            error = RequestTimeout(f"no whole request arrived within {self.body_timeout:g} s")
            self._answer(b"408 Request Timeout", error.body())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self.resume_writing()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        task = self.loop.create_task(self._run(cycle, app))
        cycle.task = task  # type: ignore[attr-defined] # ours alone
        self.tasks.add(task)

    async def _run(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Without a callback for the task's end, which would take another turn of the loop."""
        try:
            await cycle.run_asgi(app)
        finally:
            self.tasks.discard(cycle.task)  # type: ignore[attr-defined] # set above

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.client_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        error = TooLarge(msg, status=400, code="malformed_http")
        self._answer(b"400 Bad Request", error.body())

    def _refuse_head(self) -> None:
        message = f"the request's headers exceed {self.max_header_bytes} bytes"
        self._answer(
            b"431 Request Header Fields Too Large", TooLarge(message, status=431, code="headers_too_large").body()
        )

    def _answer(self, status: bytes, body: bytes) -> None:
        """Refuse what arrived, and end the connection; what was asked before it is answered first, and then alone."""
        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way and (self.pipeline or cycle.response_started or not cycle.more_body):
            cycle.keep_alive = False
            self.parser = _Deaf()
            return
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self._end()

    def _end(self) -> None:
        """Send no more, and swallow what comes: a connection closed upon unread bytes is reset, which loses the answer."""
        self._ending = True
        self.parser = _Deaf()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = self.loop.call_later(LINGER_S, self.transport.close)


class _Deaf:
    """The parser of a connection from which no more is taken."""

    def feed_data(self, data: bytes) -> None:
        pass


class Server(uvicorn.Server):
    """A server that drains as this module's text says. ``on_drain`` is called when that begins."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None], drain_delay: float) -> None:
        super().__init__(config)
        self._on_drain = on_drain
        self._drain_delay = drain_delay

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_drain()
        protocol: Any = self.config.http_protocol_class
        protocol.draining = True
        waited = 0.0
        while waited < self._drain_delay and not self.force_exit:
            waited += TICK_S
            await asyncio.sleep(TICK_S)
        await super().shutdown(sockets)


def make_server(app: Any, settings: Settings) -> Server:
    """A server for ``app``, not started.

    Raises:
        ConfigError: the files for TLS cannot be used.
    """
    members = {name: getattr(settings, name) for name in _PROTOCOL_SETTINGS}
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=type("Protocol", (Protocol,), members),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=2048,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
    )
    config.load()
    if settings.tls_cert:
        config.ssl = server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    def on_drain() -> None:
        if (gateway := getattr(app, "gateway", None)) is not None:
            gateway.draining = True

    return Server(config, on_drain, settings.drain_delay)
