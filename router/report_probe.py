"""A reader of a worker's report port that only looks: what the worker says of itself, and which chunks it reports."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from kv_protocol.errors import MalformedFrame, ProtocolError, Refused
from kv_protocol.messages import (
    Admitted,
    Bye,
    FrameDecoder,
    Heartbeat,
    Hello,
    Message,
    Open,
    Snapshot,
    SnapshotEnd,
    Stored,
    check_version,
    unpack,
)
from router.reports import connect

_READ_BYTES = 256 << 10


class ReportProbe:
    """Use as an async context; entering waits for Hello, at most ``timeout`` seconds."""

    def __init__(self, address: tuple[str, int], token: str, timeout: float) -> None:
        self._address = address
        self._token = token
        self._timeout = timeout
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._changed = asyncio.Event()
        self.hello: Hello | None = None
        self.complete = False
        self.heartbeat: Heartbeat | None = None
        self.fresh: set[bytes] = set()
        """Chunks stored since the snapshot, in any tier."""
        self.admitted: list[Admitted] = []
        self.error = ""

    async def __aenter__(self) -> Self:
        """Raises:
        OSError: nobody listens, or nobody says Hello in time.
        ProtocolError: what answers is no report port, or refuses.
        """
        opening = Open(token=self._token, reader="warmroute doctor")
        reader, writer = await connect(self._address, opening)
        try:
            async with asyncio.timeout(self._timeout):
                await self._greet(reader, decoder := FrameDecoder())
        except BaseException:
            writer.transport.abort()
            raise
        self._writer = writer
        self._task = asyncio.create_task(self._follow(reader, decoder))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None, "the probe was entered"
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        assert self._writer is not None, "the probe was entered"
        self._writer.transport.abort()

    async def until(self, seen: str) -> bool:
        """Wait until an attribute is true, at most ``timeout`` seconds; whether it came."""
        return await self.until_true(lambda: bool(getattr(self, seen)))

    async def until_true(self, condition: Callable[[], bool]) -> bool:
        """The same for any condition."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                while not condition() and not self.error:
                    self._changed.clear()
                    await self._changed.wait()
        return condition()

    async def _greet(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> None:
        while self.hello is None:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise MalformedFrame("the connection was closed without a word: is this a report port?")
            for message in decoder.feed(data):
                self._take(message)

    async def _follow(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> None:
        try:
            while data := await reader.read(_READ_BYTES):
                for message in decoder.feed(data):
                    self._take(message)
                self._changed.set()
            self.error = "the worker closed the report stream"
        except (OSError, ProtocolError) as error:
            self.error = str(error) or type(error).__name__
        finally:
            self._changed.set()

    def _take(self, message: Message) -> None:
        match message:
            case Hello():
                check_version(message)
                self.hello = message
            case Bye():
                raise Refused(message.reason)
            case SnapshotEnd():
                self.complete = True
            case Heartbeat():
                self.heartbeat = message
            case Stored() if self.complete:
                self.fresh.update(unpack(message.chunks))
            case Admitted():
                self.admitted.append(message)
            case Snapshot() | _:
                pass
