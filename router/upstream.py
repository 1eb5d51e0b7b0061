"""Connections to a worker: an HTTP/1.1 client that adds as little as possible to a request.

A connection carries one request at a time. Response bytes are buffered up to ``HIGH_WATER`` per connection; above it
the socket is not read until they were taken, so a slow client slows its worker down and memory stays bounded. Deadlines
are kept by one timer per worker that looks at its connections, not by one timer per request.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

from router.errors import ConnectFailed, UpstreamClosed, UpstreamError, UpstreamTimeout
from router.framing import Chunked, Head, read_head

HIGH_WATER = 256 << 10
KEEP_ALIVE_S = 4.0
"""Idle connections are closed after this; uvicorn, and with it vLLM, keeps them for five seconds."""
MAX_IDLE = 256
MAX_HEAD_BYTES = 256 << 10
TICK_S = 0.2

Headers = list[tuple[bytes, bytes]]
Sink = Callable[[bytes], bool]


class Timeouts(NamedTuple):
    """In seconds: to connect, to the first byte of a response's body, and of silence within it."""

    connect: float
    first_byte: float
    idle: float


class Response(NamedTuple):
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


class Connection(asyncio.Protocol):
    """One connection; ``status`` and ``headers`` (names in lower case) are valid once ``head_done``; until then ``more`` is to be awaited."""

    def __init__(self, worker: str, idle_timeout: float, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._idle_timeout = idle_timeout
        self._loop = loop
        self.now = loop.time
        self._transport: asyncio.Transport = None  # type: ignore[assignment] # set by connection_made
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._paused = False
        self._sink: Sink | None = None
        self._framed_sink: Sink | None = None
        self._full = False
        self.used = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parser: Any = None
        self._left = 0
        self._chunked: Chunked | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._head_size = 0
        self.head_done = self._done = self._until_close = self._surplus = self._body_begun = False
        self._keep_alive = True
        self.headers: Headers = []
        self.status = 0
        self.deadline = 0.0

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self._error is None and self._keep_alive and not self._surplus and not self._transport.is_closing()

    @property
    def complete(self) -> bool:
        """The whole response has arrived, taken or not."""
        return self._done

    @property
    def buffered(self) -> int:
        """Body bytes that arrived and were not taken."""
        return self._size

    @property
    def body_begun(self) -> bool:
        """Some of the response's body has arrived."""
        return self._body_begun

    @property
    def untouched(self) -> bool:
        """Nothing of the response has arrived."""
        return not self._head_size and not self.head_done

    def send(self, head: bytes, body: Sequence[bytes], first_byte_timeout: float) -> None:
        """Send a request. The previous response must be complete."""
        if self.used:
            self._reset()
        self.used = True
        self.deadline = self.now() + first_byte_timeout
        self._transport.writelines((head, *body))

    async def read(self) -> bytes:
        """The body bytes that have arrived, waiting for some; empty at the end.

        Raises:
            UpstreamError: the worker failed before the response was complete.
        """
        while not self._chunks:
            if self._done:
                return b""
            await self.more()
        return self.take()

    async def read_whole(self, limit: int) -> bytes:
        """The body up to its end, or the first part of it that exceeds ``limit``; ``complete`` tells which."""
        parts: list[bytes] = []
        size = 0
        while True:
            if self._chunks:
                parts.append(self.take())
                size += len(parts[-1])
            if self._done or size > limit:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            await self.more()

    async def pump(self, sink: Sink, framed_sink: Sink | None = None) -> bool:
        """Hand body bytes to ``sink`` as they arrive, without waking a task for each; whether the end was reached. The
        other way to return is that ``sink`` said False: it takes no more for now. What comes as one chunk of the chunked
        coding goes to ``framed_sink`` as it is, framing and all, where there is one.

        Raises:
            UpstreamError: the worker failed before the response was complete.
        """
        while True:
            if self._chunks and not sink(self.take()):
                return False
            if self._done and not self._chunks:
                return True
            self._sink, self._framed_sink, self._full = sink, framed_sink, False
            try:
                await self.more()
            finally:
                self._sink = self._framed_sink = None
            if self._full:
                return False

    def abort(self, error: UpstreamError | None = None) -> None:
        """Close at once; whoever waits gets ``error``. Buffered bytes are dropped."""
        self._fail(error or UpstreamClosed(self._worker, "was hung up on"))
        self._chunks, self._size = [], 0
        self._transport.abort()

    def check_deadline(self, now: float) -> None:
        if self._done or self._paused or self._error is not None or now < self.deadline:
            return
        what = "sent nothing more in time" if self.head_done else "did not answer in time"
        self.abort(UpstreamTimeout(self._worker, what))

    def more(self) -> asyncio.Future[None]:
        """What to await for more of the response.

        Raises:
            UpstreamError: nothing more will come.
        """
        if self._error is not None:
            raise self._error
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def take(self) -> bytes:
        """The body bytes that have arrived; empty where none have."""
        chunks, self._chunks, self._size = self._chunks, [], 0
        if self._paused:
            self._paused = False
            self.deadline = self.now() + self._idle_timeout
            self._transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(self._error)

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # a stream transport

    def data_received(self, data: bytes) -> None:
        if self._done:
            self._overrun()
            return
        if self._framed_sink is not None and self._passed_on(self._framed_sink, data):
            return
        if self._taken_in(data):
            self._overrun()
            return
        if self._error is not None:
            return
        if self._sink is not None and not self._done:
            self._feed(self._sink)
        elif self._chunks or self._done or self.head_done:
            self._wake()
        if self._size > HIGH_WATER and not self._paused and not self._done:
            self._paused = True
            self._transport.pause_reading()
        elif not self.head_done and self._head_size > MAX_HEAD_BYTES:
            self.abort(UpstreamClosed(self._worker, f"sent a response head above {MAX_HEAD_BYTES} bytes"))

    def _passed_on(self, sink: Sink, data: bytes) -> bool:
        """Hand on what is one chunk, nothing being left of those before it; whether it was."""
        if self._chunked is None or self._chunks or not self._chunked.is_one_chunk(data):
            return False
        self.deadline = self.now() + self._idle_timeout
        if not sink(data):
            self._stop_pumping()
        return True

    def _taken_in(self, data: bytes) -> bool:
        """Read more of the response; whether more came than belongs to it."""
        if self._left:
            return self._counted(data)
        if self._chunked is not None:
            return self._decoded(self._chunked, data)
        if self._parser is None and (head := read_head(data, MAX_HEAD_BYTES)) is not None:
            return self._framed(head, data)
        return self._parsed(data)

    def _framed(self, head: Head, data: bytes) -> bool:
        """Take over a plain head, and what came behind it; whether too much came."""
        self.status, self.headers, length, self._keep_alive, end = head
        self.head_done = True
        if length is None:
            self._chunked = Chunked()
            return end < len(data) and self._decoded(self._chunked, data[end:])
        self._left = length
        if not length:
            self._done = True
            return end < len(data)
        return end < len(data) and self._counted(data[end:])

    def _counted(self, data: bytes) -> bool:
        """Take body bytes of which the number is known; whether more came."""
        left = self._left - len(data)
        self.on_body(data if left >= 0 else data[: self._left])
        self._left = max(0, left)
        self._done = left <= 0
        return left < 0

    def _decoded(self, chunked: Chunked, data: bytes) -> bool:
        """Take body bytes in chunks; whether more came."""
        try:
            for piece in chunked.feed(data):
                self.on_body(piece)
        except ValueError as error:
            self.abort(UpstreamClosed(self._worker, f"sent what is no HTTP response: {error}"))
            return False
        self._done = chunked.done
        return chunked.surplus

    def _parsed(self, data: bytes) -> bool:
        """Have httptools read the response; whether something came behind it."""
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        if not self.head_done:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._done:
                return True
            self.abort(UpstreamClosed(self._worker, f"sent what is no HTTP response: {error}"))
        return False

    def _stop_pumping(self) -> None:
        self._sink, self._framed_sink, self._full = None, None, True
        self._wake()

    def _feed(self, sink: Sink) -> None:
        if self._chunks and not sink(self.take()):
            self._stop_pumping()

    def _overrun(self) -> None:
        """More came than was asked for: the response stands, but nothing may be taken for the next one."""
        self._surplus = True
        self._transport.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._until_close and exc is None and not self._done:
            self._done, self._keep_alive = True, False
            self._wake()
        elif not self._done:
            self._fail(UpstreamClosed(self._worker, "closed the connection before its response was complete"))
        else:
            self._keep_alive = False

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_done:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._done:
            self._surplus = True
            return
        self.status = self._parser.get_status_code()
        if not 100 <= self.status < 600:
            self.abort(UpstreamClosed(self._worker, f"answered with the status {self.status}, which is none"))
            return
        if self.status < 200:
            self.headers = []
            return
        self.head_done = True
        self._keep_alive = self._parser.should_keep_alive()
        self._until_close = not _has_length(self.headers) and self.status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        if self._done:
            return
        self._body_begun = True
        self._chunks.append(body)
        self._size += len(body)
        self.deadline = self.now() + self._idle_timeout

    def on_message_complete(self) -> None:
        self._done = self.head_done


class Upstream:
    """The connections to one worker. ``url`` is http(s)://HOST:PORT[/PREFIX]. With a ``key`` every request carries it in
    place of any other authorization."""

    def __init__(
        self, worker: str, url: str, timeouts: Timeouts, *, key: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        self.worker = worker
        self._host = parts.hostname or ""
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.encode()
        self.timeouts = timeouts
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self.host_header = parts.netloc.rpartition("@")[2].encode()
        self.has_key = bool(key)
        self._fixed = b" HTTP/1.1\r\nhost: " + self.host_header
        if key:
            self._fixed += b"\r\nauthorization: Bearer " + key.encode("ascii")

    @property
    def connections(self) -> int:
        return len(self._idle) + len(self._busy)

    def request_head(self, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], length: int) -> bytes:
        """Request line and headers, Host and Content-Length among them, and Authorization where there is a key."""
        lines = [method, b" ", self._prefix, target, self._fixed]
        if self.has_key:
            headers = [header for header in headers if header[0] != b"authorization"]
        lines.append(b"\r\ncontent-length: %d\r\n" % length)
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def redirected(self, headers: Headers) -> Headers:
        """A redirection's headers as seen from outside: Location without this worker's address and prefix."""
        own = re.compile(
            rb"(?i:https?://" + re.escape(self.host_header) + rb")" + re.escape(self._prefix) + rb"(?=/(?!/)|[?#]|$)"
        )
        return [
            (n, own.sub(b"", v, count=1) or b"/") if n == b"location" and own.match(v) else (n, v) for n, v in headers
        ]

    async def exchange(self, head: bytes, body: Sequence[bytes], first_byte_timeout: float | None = None) -> Connection:
        """Send a request and wait for the response's head. Return the connection with ``release``.

        A kept connection that turns out to be closed is replaced, once, by a fresh one: nothing was answered on it.

        Raises:
            UpstreamError: the worker cannot be reached or failed to answer.
        """
        deadline = first_byte_timeout or self.timeouts.first_byte
        while True:
            connection = self._kept() or await self._connect()
            reused = connection.used
            self._busy.add(connection)
            self._tick()
            try:
                connection.send(head, body, deadline)
                while not connection.head_done:
                    await connection.more()
            except UpstreamClosed:
                self.release(connection)
                if not reused or not connection.untouched:
                    raise
                self.close_idle()
            except BaseException:
                self.release(connection)
                raise
            else:
                return connection

    async def fetch(self, method: str, target: str, body: Any = None, *, timeout: float) -> Response:  # noqa: ASYNC109
        """One whole exchange of the control plane; ``body`` is bytes of JSON or None; ``timeout`` covers all of it.

        Raises:
            UpstreamError: the worker cannot be reached or did not answer in time.
        """
        payload: bytes = body or b""
        headers = [(b"accept", b"application/json")] + ([(b"content-type", b"application/json")] if body else [])
        head = self.request_head(method.encode(), target.encode(), headers, len(payload))
        try:
            async with asyncio.timeout(timeout):
                return await self._fetch(head, payload, timeout)
        except TimeoutError as error:
            raise UpstreamTimeout(self.worker, f"did not answer {method} {target} within {timeout:g} s") from error

    async def _fetch(self, head: bytes, body: bytes, deadline: float) -> Response:
        connection = await self.exchange(head, (body,), deadline)
        try:
            content = await connection.read_whole(16 << 20)
            return Response(connection.status, connection.headers, content)
        finally:
            self.release(connection)

    def release(self, connection: Connection) -> None:
        """Give a connection back: kept when its response is complete, closed at once otherwise."""
        self._busy.discard(connection)
        if connection.complete and connection.reusable and len(self._idle) < MAX_IDLE:
            connection.idle_since = connection.now()
            self._idle.append(connection)
        else:
            connection.abort()

    def close_idle(self) -> None:
        """Close the connections nobody uses."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()

    def close(self) -> None:
        """Close every connection."""
        self.close_idle()
        for connection in tuple(self._busy):
            connection.abort()
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeouts.connect):
                _, connection = await loop.create_connection(
                    lambda: Connection(self.worker, self.timeouts.idle, loop), self._host, self._port, ssl=self._tls
                )
                return connection
        except TimeoutError as error:
            what = f"accepted no connection within {self.timeouts.connect:g} s"
            raise ConnectFailed(self.worker, what) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: the host is no name at all
            raise ConnectFailed(self.worker, f"cannot be reached: {error}") from error

    def _tick(self) -> None:
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _on_tick(self) -> None:
        self._ticker = None
        now = asyncio.get_running_loop().time()
        for connection in tuple(self._busy):
            connection.check_deadline(now)
        kept = [connection for connection in self._idle if connection.reusable]
        self._idle = [connection for connection in kept if now - connection.idle_since < KEEP_ALIVE_S]
        for connection in kept:
            if now - connection.idle_since >= KEEP_ALIVE_S:
                connection.abort()
        if self._busy or self._idle:
            self._tick()


def _has_length(headers: Headers) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in headers)
