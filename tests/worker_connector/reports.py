"""A report source that changes at will, and a plain reader over raw sockets."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from kv_protocol.digests import RunningDigest, SetDigest
from kv_protocol.identity import GroupGeometry, Identity
from kv_protocol.messages import (
    Cleared,
    Digest,
    FrameDecoder,
    Heartbeat,
    Hello,
    Message,
    Open,
    Removed,
    Snapshot,
    SnapshotEnd,
    Stored,
    TierInfo,
    encode,
    pack,
    unpack,
)
from worker_connector.report_server import ReportServer, Timing

HELLO = Hello(
    epoch="epoch",
    model="m",
    chunk_size=256,
    block_size=16,
    identity=Identity("w", "bf16", "LBNHC", (GroupGeometry("full_attention", 16, 4096, 2),)),
    tiers=[TierInfo("gpu", 1000, 1 << 20), TierInfo("cpu", 1000, 1 << 20)],
)
FAST = Timing(heartbeat=0.1, digest=0.2, handshake=1.0, write=5.0, operation=2.0, idle=5.0)


class Source:
    """Two tiers of chunks; ``change`` mutates and publishes as an engine's thread does."""

    def __init__(self, seed: int = 0, chunks: int = 0) -> None:
        self.lock = threading.RLock()
        self.server: ReportServer | None = None
        self.tiers: dict[str, dict[bytes, None]] = {"gpu": {}, "cpu": {}}
        self.random = random.Random(seed)
        self.unpublished: list[Message] = []
        self.slowest = 0.0
        self.fail_heartbeat = False
        for tier in self.tiers.values():
            tier.update(dict.fromkeys(self.random.randbytes(16) for _ in range(chunks)))

    def take_changes(self) -> list[Message]:
        taken, self.unpublished = self.unpublished, []
        return taken

    def content(self) -> dict[str, list[bytes]]:
        return {tier: list(chunks) for tier, chunks in self.tiers.items()}

    def digests(self) -> dict[str, SetDigest]:
        return {tier: digest_of(chunks) for tier, chunks in self.tiers.items()}

    def heartbeat(self) -> Heartbeat:
        if self.fail_heartbeat:
            raise RuntimeError("no heartbeat today")
        held = {tier: len(chunks) for tier, chunks in self.tiers.items()}
        return Heartbeat(1, 2, 3, 0.5, 1000.0, held, {"cpu": 1e9})

    def change(self, publish: bool = True) -> None:
        with self.lock:
            self.unpublished.append(self._mutate())
            if publish:
                self.publish(self.take_changes())

    def store(self, tier: str, count: int) -> None:
        with self.lock:
            chunks = [self.random.randbytes(16) for _ in range(count)]
            self.tiers[tier].update(dict.fromkeys(chunks))
            self.publish([Stored(tier, pack(chunks))])

    def publish(self, messages: list[Message]) -> None:
        if self.server is None:
            return
        began = time.perf_counter()
        self.server.publish(messages)
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def _mutate(self) -> Message:
        name = self.random.choice(("gpu", "cpu"))
        tier, roll = self.tiers[name], self.random.random()
        if roll < 0.005:
            tier.clear()
            return Cleared(name)
        if roll < 0.45 and tier:
            gone = self.random.sample(list(tier), min(len(tier), self.random.randint(1, 4)))
            for chunk in gone:
                del tier[chunk]
            return Removed(name, pack(gone))
        chunks = [self.random.randbytes(16) for _ in range(self.random.randint(1, 6))]
        tier.update(dict.fromkeys(chunks))
        return Stored(name, pack(chunks))


@contextmanager
def serving(source: Source, **options: Any) -> Iterator[ReportServer]:
    options = {"timing": FAST, **options}
    arguments = [options.pop("host", "127.0.0.1"), options.pop("port", 0), options.pop("token", "")]
    server = ReportServer(*arguments, HELLO, source, options.pop("operations", {}), **options)
    server.start()
    source.server = server
    try:
        yield server
    finally:
        source.server = None
        server.close()


class Reader:
    """A raw connection that keeps every message, and the content they amount to."""

    def __init__(
        self,
        server: ReportServer,
        *,
        watch: bool = True,
        token: str = "",
        opening: bytes | None = None,
        receive_buffer: int = 0,
    ) -> None:
        self.connection = socket.socket()
        self.connection.settimeout(10)
        if receive_buffer:
            # Before connecting, or the kernel lets it grow.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.connection.connect(server.address)
        self.decoder = FrameDecoder()
        self.messages: list[Message] = []
        self.content: dict[str, set[bytes]] = {}
        self.digests = 0
        self.closed = False
        self.connection.sendall(encode(Open(watch=watch, token=token)) if opening is None else opening)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, message: Message) -> None:
        self.connection.sendall(encode(message))

    def pump(self, timeout: float = 5.0) -> list[Message]:
        """Messages of the next read; empty when the other side closed."""
        self.connection.settimeout(timeout)
        try:
            data = self.connection.recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return []
        fresh = list(self.decoder.feed(data))
        for message in fresh:
            self._apply(message)
        self.messages += fresh
        return fresh

    def until(self, kind: type, timeout: float = 10.0) -> Any:
        """The next message of a kind, among those to come or the first already here."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for message in self.messages[seen:]:
                seen += 1
                if isinstance(message, kind):
                    return message
            assert not self.closed, f"closed without {kind.__name__}: {self.messages[-1:]}"
            assert time.monotonic() < deadline, f"no {kind.__name__}"
            self.pump(max(0.05, deadline - time.monotonic()))

    def until_closed(self, timeout: float = 10.0) -> list[Message]:
        deadline = time.monotonic() + timeout
        while not self.closed:
            assert time.monotonic() < deadline, "the connection stays open"
            self.pump(max(0.05, deadline - time.monotonic()))
        return self.messages

    def until_equal(self, source: Source, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while self.content != {tier: set(chunks) for tier, chunks in source.content().items()}:
            assert time.monotonic() < deadline, "the reader's view never became the source's content"
            self.pump(max(0.05, deadline - time.monotonic()))

    def _apply(self, message: Message) -> None:
        # Strict: a change that does not fit the view means that the stream had a gap.
        if isinstance(message, Snapshot | Stored):
            chunks, tier = unpack(message.chunks), self.content.setdefault(message.tier, set())
            assert not tier & set(chunks), "stored twice"
            tier.update(chunks)
        elif isinstance(message, Removed):
            assert set(unpack(message.chunks)) <= self.content[message.tier], "removed what was never there"
            self.content[message.tier] -= set(unpack(message.chunks))
        elif isinstance(message, Cleared):
            self.content[message.tier] = set()
        elif isinstance(message, Digest):
            self.digests += 1
            for name, digest in message.tiers.items():
                assert digest_of(self.content[name]) == digest, "the digest differs"


def digest_of(chunks: Any) -> SetDigest:
    digest = RunningDigest()
    for chunk in chunks:
        digest.add(chunk)
    return digest.take()


__all__ = ["FAST", "HELLO", "Reader", "SnapshotEnd", "Source", "digest_of", "serving"]
