"""KV events of one worker: a task that keeps the index equal to what an engine without the connector says it holds.

Subscribe, have replayed what was published before, then follow by sequence number. A gap is replayed; where it cannot be,
or the connection breaks, or the engine is another process, everything is dropped and built again. vLLM keeps the last steps
only and lists nothing: what an engine held before is not known until it is stored again, and prompts sent there fill in.
"""

import asyncio
import logging
import random
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kv_protocol.errors import MalformedFrame, ProtocolError
from kv_protocol.messages import pack
from router.errors import TooManyChunks, UpstreamError
from router.event_chunks import SLICE, Change, EventChunks
from router.history import History
from router.index import Index
from router.kv_events import AllBlocksCleared, Source, read_batch, source_of, sources_of, why_none
from router.sent_memory import SentMemory
from router.turns import CHUNKS, Turns
from router.workers import Following, Worker

if TYPE_CHECKING:
    import zmq.asyncio

ASK_AGAIN_S = 30.0
"""How often an engine that publishes nothing is asked again."""
CONNECT_TIMEOUT_S = 5.0
REPLAY_TIMEOUT_S = 5.0
LONGEST_REPLAY_S = 600.0
BACKOFF_S = (0.5, 10.0)
CALM_S = 10.0
_SETTLE_S = 0.1
_HEARTBEAT_MS = 2_000
_SILENCE_MS = 6_000
_QUEUE = 100_000
_LARGEST_BYTES = 64 << 20
_BLOCK_TURN = CHUNKS // SLICE
"""What a block weighs in a turn: a slice of them takes as long as the chunks of one."""
_BATCH_TURN = 16
_BYTES_TURN = 256
_END = (1 << 64) - 1
"""The sequence number that ends a replay: -1 in vLLM's signed reading."""

_log = logging.getLogger(__name__)


class _Again(Exception):
    """What is known is to be built again; the text says why."""


class _Silent(Exception):
    """The engine publishes no events; the text says how to change that."""


class _Unended(Exception):
    """A replay stopped before its end."""


class EventWatcher:
    """Watches one worker, from its first ``nudge`` on."""

    def __init__(
        self,
        worker: Worker,
        index: Index,
        turns: Turns,
        sent: SentMemory,
        *,
        history: History,
        most_blocks: int,
        rng: random.Random,
    ) -> None:
        self._worker = worker
        self._index = index
        self._turns = turns
        self._sent = sent
        self._history = history
        self._most_blocks = most_blocks
        self._rng = rng
        self._nudged = asyncio.Event()
        self._ready = asyncio.Event()
        self._logged = ""
        self._epochs = 0

    def nudge(self) -> None:
        """The worker came up, perhaps as another process: build what is known again."""
        self._ready.set()
        self._nudged.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        await self._ready.wait()
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._nudged.clear()
            began = loop.time()
            pause = await self._watch_once()
            failures = 0 if loop.time() - began > CALM_S else failures + 1
            shortest, longest = BACKOFF_S
            wait = min(longest, shortest * 2.0 ** min(failures, 16)) * self._rng.uniform(0.5, 1.0)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause or wait):
                    await self._nudged.wait()

    async def _watch_once(self) -> float:
        """Find the events and follow them, until something ends that; seconds to wait, 0 for the usual."""
        following = asyncio.create_task(self._follow_all())
        nudged = asyncio.create_task(self._nudged.wait())
        pause = 0.0
        try:
            await asyncio.wait((following, nudged), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                await following
            else:
                self._worker.relisted("restart")
        except _Silent as reason:
            self._note(str(reason))
            pause = ASK_AGAIN_S
        except _Again as cause:
            self._worker.relisted(str(cause))
            self._note(f"built again: {cause}")
        except (OSError, ProtocolError, TooManyChunks, UpstreamError, ValueError) as error:
            self._note(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - whatever an engine sends, it must not end the watch
            _log.exception("KV events of worker %s could not be taken", self._worker.name)
            self._note(f"{type(error).__name__}: {error}")
        finally:
            following.cancel()
            nudged.cancel()
            await asyncio.gather(following, nudged, return_exceptions=True)
        self._forget()
        return pause

    async def _follow_all(self) -> None:
        source = await self._source()
        try:
            import zmq.asyncio  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise _Silent(
                "the engine publishes KV events, and reading them needs: pip install 'warmroute[events]'"
            ) from error
        context = zmq.asyncio.Context()
        try:
            await _Stream(self, source, context).follow()
        finally:
            context.destroy(linger=0)

    async def _source(self) -> Source:
        worker = self._worker
        if worker.spec.events:
            return worker.spec.event_source
        answer = await worker.upstream.fetch("GET", "/kv_event_sources", timeout=CONNECT_TIMEOUT_S)
        if answer.status != 200:
            raise _Silent(
                f"GET /kv_event_sources answered {answer.status}: a vLLM before 0.31 wants events=HOST:PORT here"
            )
        sources = sources_of(answer.body, worker.spec.host)
        source = source_of(sources, worker.spec.rank)
        if source is None:
            raise _Silent(why_none(sources, worker.spec.rank))
        return source

    def begin(self, source: Source) -> EventChunks:
        """Start with nothing known."""
        worker = self._worker
        model, size = worker.assumed or ("", 1)
        self._sent.begin(worker)
        self._epochs += 1
        worker.events_error = ""
        self._history.began(worker.name, f"events {self._epochs}")
        worker.follow(Following(source.endpoint, replayed=bool(source.replay)))
        return EventChunks(model, size, self._most_blocks)

    async def take(self, chunks: EventChunks, payload: bytes) -> None:
        """Bring what a batch says into the index."""
        worker = self._worker
        await self._turns.take(_BATCH_TURN + len(payload) // _BYTES_TURN)
        batch = read_batch(payload)
        if batch.rank is not None and worker.spec.rank is not None and batch.rank != worker.spec.rank:
            return
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._sent.begin(worker)
            for change in chunks.apply(event):
                await self._turns.take(change.blocks * _BLOCK_TURN)
                self._bring(change)

    def _bring(self, change: Change) -> None:
        name = self._worker.name
        if self._worker.gone:
            return
        match change.what:
            case "stored":
                self._index.stored(name, change.tier, change.chunks)
            case "removed":
                self._index.removed(name, change.tier, change.chunks)
                if change.chunks:
                    self._history.removed(name, change.tier, pack(change.chunks))
            case "cleared":
                self._index.cleared(name, change.tier)
                self._history.cleared(name, change.tier)

    def taken(self, chunks: EventChunks, number: int) -> None:
        """Batches up to this number are in the index, -1 before the first."""
        following = self._worker.following
        if following is not None:
            following.sequence, following.complete, following.blocks = number, chunks.complete, len(chunks)
            following.settled = chunks.complete or number >= 0
        self._logged = ""

    def _forget(self) -> None:
        if self._worker.following is not None:
            self._worker.follow(None)
            self._sent.begin(self._worker)

    def _note(self, text: str) -> None:
        self._worker.events_error = text
        if text != self._logged:
            self._logged = text
            _log.info("KV events of worker %s: %s; what was sent there counts", self._worker.name, text)


class _Stream:
    """One subscription, from its connection to its end."""

    def __init__(self, watcher: EventWatcher, source: Source, context: "zmq.asyncio.Context") -> None:
        self._watcher = watcher
        self._source = source
        self._context = context
        self._last = -1

    async def follow(self) -> None:
        """Follow until something ends it.

        Raises:
            OSError: nobody publishes there, or not any more.
            _Again: events were missed and cannot be had.
            MalformedFrame: what comes are no KV events.
        """
        import zmq  # noqa: PLC0415 - an extra

        subscriber = self._socket(zmq.SUB)
        subscriber.subscribe(self._source.topic.encode())
        monitor = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        await _connect(subscriber, self._source.endpoint)
        await self._connected(monitor)
        await asyncio.sleep(_SETTLE_S)  # a subscription is not confirmed; what it misses until it is made, a gap tells
        chunks = self._watcher.begin(self._source)
        await self._replay(chunks)
        broken = asyncio.ensure_future(monitor.recv_multipart())
        try:
            while True:
                came = asyncio.ensure_future(subscriber.recv_multipart())
                await asyncio.wait((came, broken), return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    came.cancel()
                    raise ConnectionResetError("the connection broke")
                await self._take(chunks, *_frames(came.result()))
        finally:
            broken.cancel()

    async def _connected(self, monitor: Any) -> None:
        import zmq  # noqa: PLC0415 - an extra
        from zmq.utils.monitor import parse_monitor_message  # noqa: PLC0415

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                # A peer that speaks something else is disconnected before there is a connection.
                while parse_monitor_message(await monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                    pass
        except TimeoutError:
            raise OSError(
                f"nobody publishes at {self._source.endpoint}: no connection within {CONNECT_TIMEOUT_S:g} s"
            ) from None

    async def _take(self, chunks: EventChunks, number: int, payload: bytes) -> None:
        if number <= self._last:
            return  # replayed already
        if number > self._last + 1 and (self._last >= 0 or self._source.replay):
            await self._replay(chunks)
            if number <= self._last:
                return
            if number > self._last + 1:
                raise _Again("gap")
        elif self._last < 0:
            chunks.complete = number == 0
        await self._watcher.take(chunks, payload)
        self._last = number
        self._watcher.taken(chunks, number)

    async def _replay(self, chunks: EventChunks) -> None:
        """Take what was published after the last batch that was taken, as far as it is kept. An engine drops of a long
        replay what the connection is too slow for, without a word: that is asked for again."""
        if not self._source.replay:
            return
        asked = self._last + 1
        try:
            async with asyncio.timeout(LONGEST_REPLAY_S):
                while not await self._replay_some(chunks):
                    pass
        except TimeoutError:
            raise OSError(f"{self._source.replay} replayed for more than {LONGEST_REPLAY_S:g} s") from None
        if asked == 0 and self._last < 0:
            chunks.complete = True  # nothing was published yet
        self._watcher.taken(chunks, self._last)

    async def _replay_some(self, chunks: EventChunks) -> bool:
        """Take a replay up to its end, or to where something of it is missing; whether it ended.

        Raises:
            _Again: what is missing is not kept any more.
            OSError: nothing is replayed.
        """
        before = self._last
        async with aclosing(self._replayed(before + 1)) as replayed:
            try:
                async for number, payload in replayed:
                    if number != self._last + 1 and self._last >= 0:
                        if self._last == before:
                            raise _Again("gap")
                        return False
                    if self._last < 0:
                        chunks.complete = number == 0
                    await self._watcher.take(chunks, payload)
                    self._last = number
            except _Unended:
                if self._last == before:
                    raise OSError(
                        f"nothing was replayed from {self._source.replay} within {REPLAY_TIMEOUT_S:g} s"
                    ) from None
                return False
        return True

    async def _replayed(self, start: int) -> AsyncGenerator[tuple[int, bytes]]:
        import zmq  # noqa: PLC0415 - an extra

        asking = self._socket(zmq.DEALER)
        try:
            await _connect(asking, self._source.replay)
            await asking.send_multipart((b"", start.to_bytes(8, "big")))
            while True:
                try:
                    async with asyncio.timeout(REPLAY_TIMEOUT_S):
                        frames = await asking.recv_multipart()
                except TimeoutError:
                    raise _Unended from None
                number, payload = _frames(frames[1:])
                if number == _END:
                    return
                yield number, payload
        finally:
            asking.close(linger=0)

    def _socket(self, kind: int) -> Any:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = _QUEUE
        socket.maxmsgsize = _LARGEST_BYTES
        socket.heartbeat_ivl, socket.heartbeat_timeout = _HEARTBEAT_MS, _SILENCE_MS
        return socket


def _frames(frames: list[bytes]) -> tuple[int, bytes]:
    """Number and payload of topic, number and payload.

    Raises:
        MalformedFrame: these are other frames.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        raise MalformedFrame(f"{len(frames)} frames came; KV events have a topic, a number of 8 bytes and a payload")
    return int.from_bytes(frames[1], "big"), frames[2]


async def _connect(connecting: Any, endpoint: str) -> None:
    """Connect a socket. A name is looked up here: of IPv6 ZeroMQ has to be told, and closing it waits for its look-ups.

    Raises:
        OSError: the name is not known, or this is no endpoint.
    """
    import zmq  # noqa: PLC0415 - an extra

    try:
        connecting.connect(await _numeric(connecting, endpoint))
    except (zmq.ZMQError, OSError, ValueError) as error:
        raise OSError(f"{endpoint} cannot be connected to: {str(error) or type(error).__name__}") from error


async def _numeric(connecting: Any, endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        return endpoint
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # an engine binds IPv4 unless told
    connecting.ipv6 = family == socket.AF_INET6
    return f"tcp://[{address[0]}]:{parts.port}" if connecting.ipv6 else f"tcp://{address[0]}:{parts.port}"
