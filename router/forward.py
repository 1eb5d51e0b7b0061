"""The forward step: a request to its worker, and the response back to the client as the worker sent it.

Status, end-to-end headers and body bytes are the worker's own. Event streams are passed on in whole events: when a
worker dies in the middle of one, the client gets every event that was complete and then an error event, never half of
one. Nothing is sent to the client before the first body byte is there, so that until then another worker can take over.
"""

import asyncio
import re
from collections.abc import Sequence

import msgspec

from router.client import Client, Headers
from router.errors import BadGateway, RetryableStatus, UpstreamError
from router.limits import Meter
from router.parse import response_headers
from router.upstream import Connection, Upstream

RETRYABLE = frozenset({502, 503, 504})
WHOLE_BYTES = 1 << 20
"""A response that is no event stream is completed before it is passed on, up to this size."""
_LONGEST_EVENT = 256 << 10
_CACHED = re.compile(rb'"cached_tokens":\s*(\d{1,15})(?!\d)')
_ENDS = (b"\n\n", b"\r\n\r\n")
_FRAMED_ENDS = (b"\n\n\r\n", b"\r\n\r\n\r\n")


class Delivery(msgspec.Struct, eq=False, kw_only=True):
    """One answer on its way, and what it told. ``broken`` says why it ended early, though its client was told; ``parts``
    are the pieces an event stream came in; ``meter`` sees all of its body."""

    status: int = 0
    cached_tokens: int | None = None
    broken: UpstreamError | None = None
    parts: int = 0
    meter: Meter | None = None

    def may_retry(self) -> bool:
        """Whether another worker could be asked in place of this one."""
        return False

    def begun(self) -> None:
        """The first bytes of the body came."""

    def read_counts(self, data: bytes) -> None:
        """Look for the tokens the worker says it reused, and made; inside a JSON string the patterns cannot occur
        unescaped."""
        if b'"cached_tokens":' in data and (found := _CACHED.findall(data)):
            self.cached_tokens = int(found[-1])
        if self.meter is not None:
            self.meter.read(data)


async def forward(
    client: Client, upstream: Upstream, head: bytes, body: Sequence[bytes], *, extra: Headers, delivery: Delivery
) -> None:
    """Send a request and deliver its response.

    Raises:
        UpstreamError: the worker failed and nothing was sent to the client.
    """
    connection = await upstream.exchange(head, body)
    try:
        delivery.status = connection.status
        if connection.status in RETRYABLE and delivery.may_retry():
            raise RetryableStatus(upstream.worker, f"answered {connection.status}")
        headers, is_stream = _merged(connection.headers, extra)
        if 300 <= connection.status < 400:
            headers = upstream.redirected(headers)
        if is_stream:
            await _stream(client, connection, headers, delivery)
        elif not connection.complete or not _at_once(client, connection, headers, delivery):
            await _whole(client, connection, headers, delivery)
    finally:
        upstream.release(connection)


def _at_once(client: Client, connection: Connection, headers: Headers, delivery: Delivery) -> bool:
    """Deliver a response that is all here to a client that keeps up; whether that could be done."""
    if not client.keeps_up:
        return False
    data = connection.take()
    delivery.begun()
    if b'_tokens":' in data:
        delivery.read_counts(data)
    client.answer(connection.status, headers, data)
    return True


async def _whole(client: Client, connection: Connection, headers: Headers, delivery: Delivery) -> None:
    try:
        data = await connection.read_whole(WHOLE_BYTES)
    except UpstreamError as error:
        if not connection.body_begun:
            raise
        delivery.broken = error
        request_id = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
        await client.fail(BadGateway(f"{error}; the response is not complete"), request_id)
        return
    delivery.begun()
    delivery.read_counts(data)
    await client.start(connection.status, headers)
    if connection.complete and not connection.buffered:
        await client.finish(data)
        return
    try:
        while data:
            await client.write(data)
            data = await connection.read()
            delivery.read_counts(data)
    except UpstreamError as error:
        delivery.broken = error
        client.hang_up()
        return
    await client.finish()


async def _stream(client: Client, connection: Connection, headers: Headers, delivery: Delivery) -> None:
    data = await connection.read()
    delivery.begun()
    await client.start(connection.status, headers)
    events = _Events(delivery)
    try:
        if data and client.takes_pushes:
            await _pump(client, connection, events, data)
        else:
            while data:
                if whole := events.whole(data):
                    await client.write(whole)
                data = await connection.read()
    except asyncio.CancelledError:
        if not client.gone:
            await client.finish(client.error_event(_incomplete("the gateway is stopping")))
        raise
    except UpstreamError as error:
        delivery.broken = error
        if any(name == b"content-length" for name, _ in headers):
            client.hang_up()  # no room was promised for an error event
        else:
            await client.finish(client.error_event(_incomplete(error)))
        return
    await client.finish(events.held)


async def _pump(client: Client, connection: Connection, events: "_Events", data: bytes) -> None:
    """Pass a stream on without waking a task for each piece; while the client does not read, nothing is taken."""

    def sink(data: bytes) -> bool:
        return client.push(events.whole(data))

    def framed_sink(chunk: bytes) -> bool:
        if events.held or not chunk.endswith(_FRAMED_ENDS):
            return sink(chunk[chunk.index(b"\r\n") + 2 : -2])
        events.count(chunk)
        return client.push_framed(chunk)

    if not sink(data):
        await client.drained()
    while not await connection.pump(sink, framed_sink if client.takes_framed else None):
        await client.drained()


class _Events:
    """Cuts a stream into whole events; ``held`` is the beginning of the one that is not whole yet."""

    def __init__(self, delivery: Delivery) -> None:
        self.held = b""
        self._delivery = delivery

    def whole(self, data: bytes) -> bytes:
        """The events that are whole now, which may be none."""
        if self.held:
            data = self.held + data
        data, self.held = _whole_events(data)
        self.count(data)
        return data

    def count(self, data: bytes) -> None:
        """Take note of whole events."""
        delivery = self._delivery
        delivery.parts += 1
        if b'_tokens":' in data:
            delivery.read_counts(data)
        if delivery.meter is not None:
            delivery.meter.count(data)


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """The bytes up to the end of the last whole event, and the rest."""
    if data.endswith(_ENDS):
        return data, b""
    end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _ENDS)
    if not end and len(data) > _LONGEST_EVENT:
        return data, b""
    return data[:end], data[end:]


def _incomplete(error: object) -> BadGateway:
    return BadGateway(f"{error}; the response is not complete", code="worker_failed")


def _merged(headers: Headers, extra: Headers) -> tuple[Headers, bool]:
    """The response's headers and the router's own, and whether an event stream follows."""
    merged = response_headers(headers)
    named = is_stream = False
    for name, value in merged:
        if name == b"content-type":
            is_stream = value.startswith(b"text/event-stream")
        elif name == b"x-request-id":
            named = True
    merged += [header for header in extra if header[0] != b"x-request-id"] if named else extra
    return merged, is_stream
