"""Report streams: one task per worker keeps the index equal to the worker's ledger.

Connect, ``Open``, ``Hello``, snapshot, changes. Whatever ends a stream, everything known from it is dropped in the same
instant, and the next stream lists again: there is no state in which old knowledge is believed.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kv_protocol.errors import MalformedFrame, ProtocolError, Refused
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.messages import (
    TIERS,
    Admitted,
    Bye,
    Call,
    Cleared,
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
    unpack,
)
from router.errors import TooManyChunks
from router.history import History
from router.index import Index
from router.turns import Turns
from router.workers import Worker

AUDIT_ROUND_S = 5.0
"""Shortest time for one recount of the whole index."""
_SWEEP_ENTRIES = 1024
_SWEEP_PAUSE_S = 0.001
_LIES = 2
_SLACK_CHUNKS = 4096
BACKOFF_S = (0.1, 5.0)
CONNECT_TIMEOUT_S = 5.0
CALM_S = 10.0
"""A stream that lived this long is reconnected at once."""
_MISSED = 3
_READ_BYTES = 256 << 10

_log = logging.getLogger(__name__)


class _Relist(Exception):
    """The stream is to begin again."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Watcher:
    """Watches one worker. ``lost`` is called when a stream breaks without a word, ``admitted`` with each outcome,
    ``speaks`` when a stream begins to tell what the worker holds."""

    def __init__(
        self,
        worker: Worker,
        index: Index,
        turns: Turns,
        *,
        token: str,
        heartbeat: float,
        most_chunks: int,
        admitted: Callable[[Worker, Admitted], None],
        lost: Callable[[Worker], None],
        rng: random.Random,
        history: History | None = None,
        speaks: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        self._history = history or History()
        self._speaks = speaks
        self._worker = worker
        self._index = index
        self._token = token
        self._silence = heartbeat * _MISSED
        self._turns = turns
        self._most_chunks = most_chunks
        self._admitted = admitted
        self._lost = lost
        self._rng = rng
        self._epoch = ""
        self._relist_cause = ""
        self._listing = False
        self._transport: asyncio.WriteTransport | None = None
        self._logged = ""

    def relist(self, cause: str) -> None:
        """Begin again: what is known is dropped and listed anew."""
        if self._transport is not None:
            self._relist_cause = cause
            self._transport.abort()

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                await self._stream()
            except (OSError, UnicodeError, ProtocolError, TimeoutError, TooManyChunks, _Relist) as error:
                self._note(error)
            except Exception as error:  # noqa: BLE001 - whatever a worker sends, it must not end the watch
                _log.exception("reports of worker %s could not be taken", self._worker.name)
                self._note(error)
            finally:
                self._forget()
            failures = 0 if loop.time() - began > CALM_S else failures + 1
            await asyncio.sleep(self._pause(failures))

    def _pause(self, failures: int) -> float:
        shortest, longest = BACKOFF_S
        return min(longest, shortest * 2.0 ** min(failures, 16)) * self._rng.uniform(0.5, 1.0)

    async def _stream(self) -> None:
        address = self._worker.spec.report_address
        assert address is not None, "a worker without reports is not watched"
        reader, writer = await connect(address, Open(token=self._token, reader="warmroute router"))
        self._transport = writer.transport
        try:
            await self._follow(reader, FrameDecoder())
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            if self._relist_cause:
                raise _Relist(self._relist_cause) from error
            if self._worker.hello is not None:
                self._lost(self._worker)
            raise
        finally:
            self._end_listing()
            self._transport = None
            self._relist_cause = ""
            writer.transport.abort()

    async def _follow(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(self._silence, CONNECT_TIMEOUT_S)
        while True:
            async with asyncio.timeout_at(deadline):
                data = await reader.read(_READ_BYTES)
            if not data:
                raise ConnectionResetError("the worker closed the report stream")
            began = loop.time()
            for message in decoder.feed(data):
                await self._apply(message)
                # Within a snapshot every frame is a sign of life; afterwards only heartbeats are.
                if not self._worker.synced or isinstance(message, Heartbeat):
                    began = loop.time()
                    deadline = began + self._silence
            # Waiting for a turn is not the worker's silence.
            deadline += loop.time() - began

    async def _apply(self, message: Message) -> None:
        match message:
            case Hello():
                self._begin(message)
                await self._turns.listings.acquire()
                self._listing = True
            case Bye():
                raise Refused(f"the worker ended the report stream: {message.reason}")
            case _ if self._worker.hello is None:
                raise MalformedFrame(f"the worker sent {type(message).__name__} before Hello")
            case Snapshot() | Stored() | Removed() | Cleared():
                await self._apply_change(message)
            case SnapshotEnd():
                self._end_listing()
                self._worker.synced = True
                self._logged = ""
            case Heartbeat():
                self._beat(message)
            case Digest():
                self._verify(message)
            case Admitted():
                if min(message.hit_tokens.values(), default=0) < 0:
                    raise MalformedFrame("the worker reported fewer than no hit tokens")
                self._admitted(self._worker, message)
            case _:
                pass

    async def _apply_change(self, message: Snapshot | Stored | Removed | Cleared) -> None:
        if message.tier not in TIERS:
            return
        match message:
            case Cleared():
                self._history.cleared(self._worker.name, message.tier)
                await self._clear(message.tier)
            case Removed():
                self._history.removed(self._worker.name, message.tier, message.chunks)
                await self._in_slices(self._index.removed, message.tier, message.chunks)
            case _:
                await self._in_slices(self._index.stored, message.tier, message.chunks)

    def _begin(self, hello: Hello) -> None:
        check_version(hello)
        if self._worker.hello is not None:
            raise MalformedFrame("the worker sent Hello twice")
        if not 0 < hello.chunk_size < 2**32:
            raise MalformedFrame(f"the worker's chunk size is {hello.chunk_size}")
        self._speaks(self._worker)
        self._index.drop(self._worker.name)
        self._index.open(self._worker.name, self._limit(hello))
        if hello.epoch != self._epoch:
            self._epoch = hello.epoch
            self._worker.epochs += 1
            self._worker.trust = 1.0
        self._history.began(self._worker.name, hello.epoch)
        self._worker.hello = hello
        self._worker.reports_error = ""

    def _end_listing(self) -> None:
        if self._listing:
            self._listing = False
            self._turns.listings.release()

    def _limit(self, hello: Hello) -> int:
        """A worker may report twice what it says fits, for what it counts otherwise, and never more than is set."""
        claims = [tier.capacity_chunks for tier in hello.tiers]
        claimed = sum(claims) * _LIES + _SLACK_CHUNKS if all(claim > 0 for claim in claims) else self._most_chunks
        return min(claimed, self._most_chunks)

    async def _in_slices(self, apply: Callable[[str, str, list[bytes]], None], tier: str, chunks: bytes) -> None:
        for at in self._turns.slices(chunks, HASH_BYTES):
            piece = unpack(chunks[at : at + self._turns.chunks * HASH_BYTES])
            await self._turns.take(len(piece))
            apply(self._worker.name, tier, piece)

    async def _clear(self, tier: str) -> None:
        self._index.cleared(self._worker.name, tier)
        while not self._index.is_swept(self._worker.name):
            await self._turns.take(self._turns.chunks)
            self._index.sweep(self._turns.chunks)

    def _beat(self, message: Heartbeat) -> None:
        self._worker.beat(message, asyncio.get_running_loop().time())

    def _verify(self, message: Digest) -> None:
        wrong = self._index.verify(self._worker.name, message.tiers)
        self._worker.digests_checked += 1
        if wrong:
            self._worker.digest_mismatches += 1
            raise _Relist("digest")

    def _forget(self) -> None:
        if self._worker.hello is not None:  # else the index has what was learnt otherwise
            self._index.drop(self._worker.name)
        self._worker.forget_reports()

    def _note(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, _Relist):
            self._worker.relisted(error.cause)
            text = f"listing again: {error.cause}"
        elif isinstance(error, TimeoutError):
            text = f"nothing heard for {self._silence:g} s"
        self._worker.reports_error = text
        if text != self._logged:
            self._logged = text
            meanwhile = "load and by what was sent there" if self._worker.assumes else "load"
            _log.warning(
                "reports of worker %s: %s; routed by %s until they are back", self._worker.name, text, meanwhile
            )


async def connect(address: tuple[str, int], opening: Open) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A report connection with ``opening`` sent.

    Raises:
        OSError: nobody listens, or not in time.
    """
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*address)
    writer.write(encode(opening))
    return reader, writer


async def call(
    address: tuple[str, int], operation: str, arguments: dict[str, Any] | None = None, token: str = ""
) -> Any:
    """The result of one control request to a worker's report port.

    Raises:
        OSError: the port cannot be reached, or does not answer in time.
        ProtocolError: the worker refused, or what answered is no report port.
    """
    async with asyncio.timeout(CONNECT_TIMEOUT_S * 2):
        reader, writer = await connect(address, Open(watch=False, token=token, reader="warmroute"))
        try:
            writer.write(encode(Call(id=1, operation=operation, arguments=arguments or {})))
            return await _reply(reader)
        finally:
            writer.transport.abort()


async def _reply(reader: asyncio.StreamReader) -> Any:
    decoder = FrameDecoder()
    while data := await reader.read(_READ_BYTES):
        for message in decoder.feed(data):
            match message:
                case Hello():
                    check_version(message)
                case Bye():
                    raise Refused(message.reason)
                case Reply():
                    if message.error:
                        raise Refused(message.error)
                    return message.result
    raise MalformedFrame("the connection was closed without a reply: is this a report port?")


class Sweeper:
    """Looks after the index, a little at a time: sweeps what dropped workers left, and recounts what is there, up to
    ``audit_entries`` entries a second. ``wrong`` is called with the name of a worker whose entries are not as counted.
    """

    def __init__(
        self,
        index: Index,
        *,
        audit_entries: int,
        wrong: Callable[[str], None],
        period: float = 0.05,
    ) -> None:
        self._index = index
        self._audit_entries = round(audit_entries * period)
        self._wrong = wrong
        self._period = period
        self._next_round = 0.0

    async def run(self) -> None:
        """Sweep until cancelled."""
        with suppress(asyncio.CancelledError):
            while True:
                busy = self._index.sweep(_SWEEP_ENTRIES)
                if not busy:
                    self._audit()
                    self._index.compact()
                await asyncio.sleep(_SWEEP_PAUSE_S if busy else self._period)

    def _audit(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._next_round or not self._audit_entries:
            return
        for worker in self._index.audit(self._audit_entries):
            self._wrong(worker)
        if not self._index.audited:
            self._next_round = now + AUDIT_ROUND_S
