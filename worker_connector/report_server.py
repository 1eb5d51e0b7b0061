"""The report port: tells readers what this worker holds, and answers control requests (docs/report-protocol.md).

Threads. The engine's thread calls ``publish`` while it holds ``source.lock``: that appends to a list and at most wakes
the server's thread. Everything else happens on the server's own thread and event loop, except operations, which run on
a few threads of their own. Order is exact: a reader is registered, and the content for its snapshot taken, under the
same lock that orders changes; whatever was published before is in the snapshot, whatever comes after is in its queue.

Nothing here can slow or fill the engine: each reader has a queue bounded in bytes, and one that does not keep up is
dropped with its queue and may list again. What is published is encoded once, however many readers there are.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import msgspec

from kv_protocol.digests import SetDigest
from kv_protocol.errors import FrameTooLarge, MalformedFrame, ProtocolError, Refused
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.messages import (
    SNAPSHOT_CHUNKS,
    Bye,
    Call,
    Digest,
    FrameDecoder,
    Heartbeat,
    Hello,
    Message,
    Open,
    Removed,
    Reply,
    Snapshot,
    SnapshotEnd,
    Stored,
    check_version,
    encode,
    pack,
)
from worker_connector.errors import ConfigurationError, ReportUnavailable
from worker_connector.runtime_files import RuntimeFile

CLIENT_FRAME_BYTES = 1 << 20
"""The largest frame accepted from a client."""

# A child of vLLM's logger, so that its handlers and level apply inside an engine.
_log = logging.getLogger("vllm.warmroute.report")

Operation = Callable[[dict[str, Any]], Any]


class ReportSource(Protocol):
    """Where the content comes from. ``lock`` orders every change; the server holds it while it calls the others."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def take_changes(self) -> Iterable[Message]:
        """Changes made but not published yet: the server publishes them before a snapshot, digest or heartbeat."""

    def content(self) -> Mapping[str, list[bytes]]:
        """Every tier's chunk hashes, in lists that are the caller's to keep."""

    def digests(self) -> Mapping[str, SetDigest]: ...

    def heartbeat(self) -> Heartbeat: ...


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Intervals and deadlines, in seconds."""

    heartbeat: float = 1.0
    digest: float = 5.0
    handshake: float = 5.0
    write: float = 30.0
    operation: float = 30.0
    idle: float = 300.0
    """A connection that does not watch is closed after so long without a call."""


class ReportServer:
    """Serves one worker's reports. ``hello`` is sent to every client; ``operations`` are control requests by name, each
    called with the request's arguments on a thread of the server.

    Raises:
        ConfigurationError: the host is not a loopback address and there is no token.
    """

    def __init__(  # noqa: PLR0917 - the parts it wires, in the order of its wire
        self,
        host: str,
        port: int,
        token: str,
        hello: Hello,
        source: ReportSource,
        operations: Mapping[str, Operation],
        *,
        ephemeral_if_busy: bool = False,
        timing: Timing | None = None,
        queue_bytes: int = 64 << 20,
        max_readers: int = 64,
    ) -> None:
        if not token and not _is_loopback(host):
            raise ConfigurationError(
                f"report_host is {host!r}, which other machines can reach, and there is no report_token: "
                "set report_token (WARMROUTE_REPORT_TOKEN) here and in the router, or bind 127.0.0.1"
            )
        self.hello = hello
        self.source = source
        self.operations = dict(operations)
        self.token = token
        self.timing = timing or Timing()
        self.queue_bytes = queue_bytes
        self.max_readers = max_readers
        self.dropped_readers = 0
        """Readers dropped because they did not keep up."""
        self.relists = 0
        """Snapshots begun."""
        self._host, self._port, self._ephemeral_if_busy = host, port, ephemeral_if_busy
        self._published: deque[tuple[int, list[Message]]] = deque()
        self._bytes_in = 0  # the engine's thread alone writes this one
        self._bytes_out = 0  # and the server's thread this one
        self._overflowed = False
        self._waking = False
        self._clients: dict[_Client, None] = {}
        self._watchers: list[_Client] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._socket: socket.socket | None = None
        self._file: RuntimeFile | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that clients reach."""
        if self._socket is None:
            return self._host, self._port
        bound = self._socket.getsockname()
        return bound[0], bound[1]

    @property
    def readers(self) -> int:
        """How many readers watch now."""
        return len(self._watchers)

    @property
    def is_full(self) -> bool:
        """Whether it takes no other client."""
        return sum(client.is_open for client in self._clients) >= self.max_readers

    def start(self) -> None:
        """Bind and serve; returns once clients can connect.

        Raises:
            ReportUnavailable: the port cannot be bound.
        """
        self._socket = self._bind()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, started), name="warmroute-report", daemon=True
        )
        self._thread.start()
        if not started.wait(10):
            raise ReportUnavailable("the report server's thread did not start within 10 s")
        self._file = RuntimeFile.write(*self.address, token=self.token)
        _log.info("Reports are served on %s port %d", *self.address)

    def publish(self, messages: Iterable[Message]) -> None:
        """Send messages to every reader, in order. The caller holds ``source.lock`` and does not change the messages
        afterwards. Never blocks; a few microseconds, less without readers."""
        if not self._watchers or self._loop is None:
            return
        batch = list(messages)
        if not batch:
            return
        weight = sum(_weight(message) for message in batch)
        if self._bytes_in - self._bytes_out + weight > self.queue_bytes:
            # The server's thread is starved: every reader lists again instead of the list growing.
            self._overflowed = True
        elif not self._overflowed:
            self._bytes_in += weight
            self._published.append((weight, batch))
        self._wake()

    def close(self) -> None:
        """Say goodbye to every client and stop; at most about 3 s. Safe to call more than once."""
        if self._file is not None:
            self._file.remove()
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
            thread.join(3)
        if self._socket is not None:
            self._socket.close()

    def _wake(self) -> None:
        if not self._waking and self._loop is not None:
            self._waking = True
            # The loop is closed only when the server is being closed: nobody is left to tell then.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._flush_published)

    def _bind(self) -> socket.socket:
        try:
            return _listen(self._host, self._port)
        except OSError as error:
            if not self._ephemeral_if_busy:
                raise ReportUnavailable(
                    f"the report port {self._port} on {self._host} cannot be bound ({error.strerror}): "
                    "set report_port to a free port, or to 0 to let the system choose"
                ) from error
        listening = _listen(self._host, 0)
        _log.warning(
            "Report port %d is taken: using port %d. Set report_port to choose one yourself",
            self._port,
            listening.getsockname()[1],
        )
        return listening

    def _run(self, loop: asyncio.AbstractEventLoop, started: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve(started))
        except Exception:  # noqa: BLE001 - reports are not worth an engine
            _log.exception("The report server stopped; the engine goes on without it")
        finally:
            self._watchers = []
            with contextlib.suppress(RuntimeError):
                loop.close()

    async def _serve(self, started: threading.Event) -> None:
        assert self._socket is not None
        assert self._stopping is not None
        server = await asyncio.start_server(self._accept, sock=self._socket, limit=1 << 16)
        self._operating = asyncio.Semaphore(4)
        tickers = [
            asyncio.create_task(_every(self.timing.heartbeat, self._send_heartbeat)),
            asyncio.create_task(_every(self.timing.digest, self._send_digest)),
        ]
        started.set()
        await self._stopping.wait()
        for ticker in tickers:
            ticker.cancel()
        server.close()
        for client in list(self._clients):
            client.leave("the worker is shutting down")
        sessions = [client.session for client in self._clients]
        if sessions:
            _, unfinished = await asyncio.wait(sessions, timeout=1)
            for session in unfinished:
                session.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        client = _Client(self, reader, writer, session)
        strangers = [each for each in self._clients if not each.is_open]
        if len(strangers) >= self.max_readers:
            # Whoever cannot open, for want of the token perhaps, must not keep out those who can.
            del self._clients[strangers[0]]
            strangers[0].leave("too many connections wait to be opened")
        self._clients[client] = None
        try:
            await client.run()
        finally:
            self._clients.pop(client, None)
            if client in self._watchers:
                self._watchers = [each for each in self._watchers if each is not client]
            await _close(writer)

    def watch(self, client: "_Client") -> Mapping[str, list[bytes]]:
        """Add a reader to those who get changes; returns the content they apply to."""
        with self.source.lock:
            self._send_changes()
            self._watchers = [*self._watchers, client]
            self.relists += 1
            return self.source.content()

    async def operate(self, call: Call) -> Reply:
        """The answer to a control request; never raises."""
        operation = self.operations.get(call.operation)
        if operation is None:
            available = ", ".join(sorted(self.operations)) or "none"
            return Reply(call.id, error=f"unknown operation {call.operation!r}; available: {available}")
        try:
            async with asyncio.timeout(self.timing.operation):
                result = await self._in_thread(operation, call.arguments)
        except TimeoutError:
            return Reply(call.id, error=f"{call.operation} took longer than {self.timing.operation:g} s")
        except Exception as error:  # noqa: BLE001 - whatever an operation raises is the caller's answer
            return Reply(call.id, error=f"{call.operation}: {str(error) or type(error).__name__}")
        with self.source.lock:
            self._send_changes()
        return Reply(call.id, result=result)

    def _send_changes(self) -> None:
        """Bring readers up to date; the caller holds the source's lock."""
        self._flush_published()
        self._broadcast(self.source.take_changes())

    def _flush_published(self) -> None:
        # Cleared before the list is read: what is published from here on wakes the loop again.
        self._waking = False
        if self._overflowed:
            for client in self._watchers:
                client.drop()
        while self._published:
            weight, batch = self._published.popleft()
            self._bytes_out += weight
            self._broadcast(batch)
        self._overflowed = False

    def _broadcast(self, messages: Iterable[Message]) -> None:
        frames = b"".join(frame for message in messages for frame in _frames(message))
        if frames:
            for client in self._watchers:
                client.enqueue(frames)

    def _send_heartbeat(self) -> None:
        if self._watchers:
            with self.source.lock:
                self._send_changes()
                self._broadcast([self.source.heartbeat()])

    def _send_digest(self) -> None:
        if self._watchers:
            with self.source.lock:
                self._send_changes()
                self._broadcast([Digest(dict(self.source.digests()))])

    async def _in_thread(self, operation: Operation, arguments: dict[str, Any]) -> Any:
        """The operation's result. Its thread is a daemon: one that hangs cannot hold up the engine's exit."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        await self._operating.acquire()

        def finish(result: Any, error: Exception | None) -> None:
            self._operating.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def work() -> None:
            result, failure = None, None
            try:
                result = operation(arguments)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
                loop.call_soon_threadsafe(finish, result, failure)

        threading.Thread(target=work, name="warmroute-control", daemon=True).start()
        return await answer


class _Client:
    """One connection, on the server's loop."""

    def __init__(
        self,
        server: ReportServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        session: "asyncio.Task[None]",
    ) -> None:
        self.session = session
        self._server = server
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder(CLIENT_FRAME_BYTES)
        self._inbox: deque[Message] = deque()
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._queued = asyncio.Event()
        self.is_open = False
        self._watching = False
        self._dropped = False

    def enqueue(self, frames: bytes) -> None:
        """Queue frames behind whatever is queued; drops the reader when its queue would grow over the bound."""
        if self._dropped:
            return
        if self._queued_bytes + len(frames) > self._server.queue_bytes:
            self.drop()
            return
        self._queue.append(frames)
        self._queued_bytes += len(frames)
        self._queued.set()

    def drop(self) -> None:
        """Give up on a reader that does not keep up."""
        if self._dropped:
            return
        self._dropped = True
        self._server.dropped_readers += 1
        _log.warning("Dropped a report reader that did not keep up; it may connect again")
        self._queue.clear()
        self._queued_bytes = 0
        self._writer.transport.abort()

    def leave(self, reason: str) -> None:
        """End the connection after telling why."""
        if not self._writer.is_closing():
            self._writer.write(encode(Bye(reason)))
        self.session.cancel()

    async def run(self) -> None:
        try:
            _keep_alive(self._writer)
            self._writer.transport.set_write_buffer_limits(high=256 << 10)
            await self._converse()
        except asyncio.CancelledError:
            pass
        except ProtocolError as error:
            self._writer.write(encode(Bye(str(error))))
        except TimeoutError:
            self._writer.write(encode(Bye("a deadline passed without an answer")))
        except OSError:
            pass
        except Exception:  # noqa: BLE001 - one reader's trouble is nobody else's
            _log.exception("A report connection ended")

    async def _converse(self) -> None:
        async with asyncio.timeout(self._server.timing.handshake):
            opening = await self._receive()
        if opening is None:
            return
        self._check(opening)
        assert isinstance(opening, Open)
        self._writer.write(encode(self._server.hello))
        self._watching = opening.watch
        sending = asyncio.create_task(self._send_stream()) if opening.watch else None
        try:
            await self._answer_calls()
        finally:
            if sending is not None:
                sending.cancel()

    def _check(self, opening: Message) -> None:
        if not isinstance(opening, Open):
            raise MalformedFrame(f"the first message must be open, not {type(opening).__name__.lower()}")
        check_version(opening)
        if not hmac.compare_digest(opening.token.encode(), self._server.token.encode()):
            raise Refused("wrong token: set the worker's report_token in the reader")
        if self._server.is_full:
            raise Refused(f"this worker takes {self._server.max_readers} readers at most: set report_max_readers")
        self.is_open = True

    async def _send_stream(self) -> None:
        try:
            await self._send_snapshot(self._server.watch(self))
            while True:
                await self._queued.wait()
                self._queued.clear()
                while self._queue:
                    frames = self._queue.popleft()
                    await self._write(frames)
                    self._queued_bytes -= len(frames)
        except TimeoutError:  # before OSError, of which it is one
            self.drop()
        except OSError:
            pass  # the other side is gone: the session sees its end
        except Exception:  # noqa: BLE001 - one reader's trouble is nobody else's
            _log.exception("A report stream ended")
        finally:
            self._writer.transport.abort() if self._dropped else self._writer.close()

    async def _send_snapshot(self, content: Mapping[str, list[bytes]]) -> None:
        for tier, chunks in content.items():
            for at in range(0, max(1, len(chunks)), SNAPSHOT_CHUNKS):
                await self._write(encode(Snapshot(tier, pack(chunks[at : at + SNAPSHOT_CHUNKS]))))
        await self._write(encode(SnapshotEnd()))

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        async with asyncio.timeout(self._server.timing.write):
            await self._writer.drain()

    async def _answer_calls(self) -> None:
        while True:
            async with asyncio.timeout(None if self._watching else self._server.timing.idle):
                message = await self._receive()
            if message is None or isinstance(message, Bye):
                return
            if not isinstance(message, Call):
                raise MalformedFrame(f"after open only call is understood, not {type(message).__name__.lower()}")
            await self._reply(await self._server.operate(message))

    async def _reply(self, reply: Reply) -> None:
        frame = _encode_reply(reply)
        if self._watching:
            self.enqueue(frame)
        else:
            await self._write(frame)

    async def _receive(self) -> Message | None:
        """The next message; None once the client closed."""
        while not self._inbox:
            data = await self._reader.read(1 << 16)
            if not data:
                return None
            self._inbox.extend(self._decoder.feed(data))
        return self._inbox.popleft()


async def _every(interval: float, job: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(interval)
        try:
            job()
        except Exception:  # noqa: BLE001 - one reader's trouble is nobody else's
            _log.exception("A report could not be made")


async def _close(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            writer.close()
            await writer.wait_closed()
            return
    writer.transport.abort()


def _frames(message: Message) -> list[bytes]:
    if isinstance(message, Stored | Removed) and len(message.chunks) > SNAPSHOT_CHUNKS * HASH_BYTES:
        width = SNAPSHOT_CHUNKS * HASH_BYTES
        parts = [message.chunks[at : at + width] for at in range(0, len(message.chunks), width)]
        return [encode(type(message)(message.tier, part)) for part in parts]
    return [encode(message)]


def _weight(message: Message) -> int:
    return 64 + (len(message.chunks) if isinstance(message, Stored | Removed) else 0)


def _encode_reply(reply: Reply) -> bytes:
    try:
        return encode(reply)
    except FrameTooLarge:
        return encode(Reply(reply.id, error="the answer does not fit a frame: ask for less"))
    except (TypeError, ValueError, OverflowError) as error:
        return encode(Reply(reply.id, error=f"the answer cannot be sent: {error}"))


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Find a vanished peer within about 30 s, whether or not there is something to send."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if (number := getattr(socket, option, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, number, value)


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.create_server(address[:2], family=family, backlog=64)
    listening.setblocking(False)
    return listening


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found)
