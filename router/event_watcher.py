"""KV events of one worker: a task that keeps the index equal to what an engine without the connector says it holds.

Subscribe, have replayed what was published before, then follow by sequence number. A gap is replayed; where it cannot be,
or the connection breaks, or the engine is another process, everything is dropped and built again. vLLM keeps the last steps
only and lists nothing: what an engine held before is not known until it is stored again, and prompts sent there fill in.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kv_protocol.errors import MalformedFrame, ProtocolError
from kv_protocol.messages import pack
from router.errors import TooManyChunks, UpstreamError
from router.event_chunks import Change, EventChunks
from router.history import History
from router.index import Index
from router.kv_events import AllBlocksCleared, Source, read_batch, sources_of
from router.sent_memory import SentMemory
from router.turns import Turns
from router.workers import Following, Worker

if TYPE_CHECKING:
    import zmq.asyncio

ASK_AGAIN_S = 30.0
"""How often an engine that publishes nothing is asked again."""
CONNECT_TIMEOUT_S = 5.0
REPLAY_TIMEOUT_S = 5.0
BACKOFF_S = (0.5, 10.0)
CALM_S = 10.0
_SETTLE_S = 0.1
_HEARTBEAT_MS = 2_000
_SILENCE_MS = 6_000
_QUEUE = 100_000
_LARGEST_BYTES = 64 << 20
_END = (1 << 64) - 1
"""The sequence number that ends a replay: -1 in vLLM's signed reading."""

_log = logging.getLogger(__name__)


class _Again(Exception):
    """What is known is to be built again; the text says why."""


class _Silent(Exception):
    """The engine publishes no events; the text says how to change that."""


class EventWatcher:
    """Watches one worker. ``ask`` gives the body of its ``GET /kv_event_sources``."""

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
        source = sources.get(worker.spec.rank or 0)
        if source is None:
            raise _Silent("the engine publishes no KV events: start it with --kv-events-config")
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
        batch = read_batch(payload)
        if batch.rank is not None and worker.spec.rank is not None and batch.rank != worker.spec.rank:
            return
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._sent.begin(worker)
            for change in chunks.apply(event):
                await self._turns.take(len(change.chunks))
                self._bring(change)
        following = worker.following
        if following is not None:
            following.complete, following.blocks = chunks.complete, len(chunks)

    def _bring(self, change: Change) -> None:
        name = self._worker.name
        if self._worker.following is None:
            return  # the worker was taken out
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

    def taken(self, number: int) -> None:
        """Batches up to this number are in the index."""
        if self._worker.following is not None:
            self._worker.following.sequence = number
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
        subscriber.connect(self._source.endpoint)
        await self._connected(monitor)
        await asyncio.sleep(_SETTLE_S)  # a subscription is not confirmed; what it misses until it is made, a gap tells
        chunks = self._watcher.begin(self._source)
        await self._replay(chunks, 0)
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
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await monitor.recv_multipart()
        except TimeoutError:
            raise OSError(
                f"nobody publishes at {self._source.endpoint}: no connection within {CONNECT_TIMEOUT_S:g} s"
            ) from None

    async def _take(self, chunks: EventChunks, number: int, payload: bytes) -> None:
        if number <= self._last:
            return  # replayed already
        if self._last < 0:
            chunks.complete = number == 0
        elif number > self._last + 1:
            await self._replay(chunks, self._last + 1)
            if number <= self._last:
                return
            if number > self._last + 1:
                raise _Again("gap")
        await self._watcher.take(chunks, payload)
        self._last = number
        self._watcher.taken(number)

    async def _replay(self, chunks: EventChunks, start: int) -> None:
        """Take what was published from a number on, as far as it is kept."""
        if not self._source.replay:
            return
        expected = start
        async for number, payload in self._replayed(start):
            if number != expected and start:
                raise _Again("gap")
            if number == start == 0:
                chunks.complete = True
            expected = number + 1
            await self._watcher.take(chunks, payload)
            self._last = number
        if start == 0 and expected == 0:
            chunks.complete = True  # nothing was published yet
        self._watcher.taken(self._last)

    async def _replayed(self, start: int) -> AsyncIterator[tuple[int, bytes]]:
        import zmq  # noqa: PLC0415 - an extra

        asking = self._socket(zmq.DEALER)
        try:
            asking.connect(self._source.replay)
            await asking.send_multipart((b"", start.to_bytes(8, "big")))
            while True:
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    frames = await asking.recv_multipart()
                number, payload = _frames(frames[1:])
                if number == _END:
                    return
                yield number, payload
        except TimeoutError:
            raise OSError(f"nothing was replayed from {self._source.replay} within {REPLAY_TIMEOUT_S:g} s") from None
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
