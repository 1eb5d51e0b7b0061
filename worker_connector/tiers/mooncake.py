"""Objects in a Mooncake Store, through its own Python client.

Mooncake replicates and evicts by itself, and bounds its memory; this is a thin adapter. Three things it does not have:
objects do not expire (their own header says when they do), keys cannot be listed (a scan is empty; look-ups ask), and its
calls know no deadline (``Guarded`` gives up on them). Bytes pass through buffers of the client and copies of this module,
so that a call that was given up never touches memory that was taken back.

The client is connected at the first use: a store that is down does not delay the engine's start.
"""

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import (
    DELETED,
    MISSING,
    Outcome,
    Page,
    Sink,
    Source,
    Status,
    Store,
    failed,
    refused,
    remaining,
)

_NO_ROOM = frozenset({-200})  # NO_AVAILABLE_HANDLE
_MISSING = frozenset({-704})  # OBJECT_NOT_FOUND
_LOST = frozenset({-900, -901, -1000, -1001, -1002, -1003, -1010, -1011})  # RPC_FAIL, etcd's, high availability's
_CURE = (
    "Mooncake's client cannot be loaded ({error}): pip install mooncake-transfer-engine (on machines without CUDA "
    "mooncake-transfer-engine-non-cuda), and the system's libibverbs (Debian: apt-get install libibverbs1)"
)


@dataclass(frozen=True, kw_only=True)
class MooncakeSettings:
    """``master`` is host:port. ``segment_bytes`` is memory that this process lends to the store, 0 for none;
    ``buffer_bytes`` is what the client copies through, and no object may be larger. ``metadata`` is a metadata server's
    URL, or P2PHANDSHAKE where there is none."""

    master: str
    metadata: str = "P2PHANDSHAKE"
    host: str = ""
    protocol: str = "tcp"
    devices: str = ""
    segment_bytes: int = 0
    buffer_bytes: int = 256 << 20
    copies: int = 1
    prefix: str = "warmroute:"
    name: str = ""


class MooncakeStore(Store):
    """
    Raises:
        ConfigurationError: the client is not installed, or a library of the system is missing.
    """

    def __init__(self, settings: MooncakeSettings) -> None:
        try:
            from mooncake import store  # noqa: PLC0415 - an optional package
        except ImportError as error:
            raise ConfigurationError(_CURE.format(error=str(error).split("\n", 1)[0][:160])) from None
        self.name = settings.name or f"mooncake://{settings.master}"
        self.max_object_bytes = settings.buffer_bytes // 2
        self._library: Any = store
        self._settings = settings
        self._lock = threading.Lock()
        self._connected: Any = None
        self._closed = False

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        client = self._client(deadline)
        outcomes = []
        for key, sink in zip(keys, into, strict=True):
            remaining(deadline, self.name)
            outcomes.append(self._get(client, key, sink))
        return outcomes

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        """A ``ttl`` is kept by the object's own header only."""
        del ttl
        client = self._client(deadline)
        outcomes = []
        for key, value in zip(keys, values, strict=True):
            remaining(deadline, self.name)
            outcomes.append(self._put(client, key, value))
        return outcomes

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        codes: list[int] = self._client(deadline).batch_is_exist([self._settings.prefix + key for key in keys])
        return [self._existing(code) for code in codes]

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        """Also what was read lately, which Mooncake itself would keep until its lease has ended."""
        client = self._client(deadline)
        return [self._deleted(client.remove(self._settings.prefix + key, True)) for key in keys]

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """Empty: Mooncake does not list keys."""
        del cursor, deadline, limit
        return Page([], "")

    def ping(self, deadline: float) -> None:
        """The master answers."""
        self._existing(self._client(deadline).is_exist(self._settings.prefix))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            client, self._connected = self._connected, None
        if client is not None:
            client.close()

    # One object.

    def _get(self, client: Any, key: str, sink: Sink) -> Outcome:
        name = self._settings.prefix + key
        found = client.get_buffer(name)
        if found is None:
            # The client does not tell why there is none.
            known = self._existing(client.is_exist(name))
            return failed("io", "it could not be read") if known.ok else known
        view = memoryview(found).cast("B")
        sink.rewind()
        if view.nbytes > sink.size:
            return sink.too_small(view.nbytes)
        sink.write(view)
        return sink.finish()

    def _put(self, client: Any, key: str, value: Source) -> Outcome:
        if value.size > self.max_object_bytes:
            return refused("size", f"an object of {value.size} bytes, and buffer= allows {self.max_object_bytes}")
        config = self._library.ReplicateConfig()
        config.replica_num = self._settings.copies
        # Without upsert (before 0.3.10), what is there stays, which is the same bytes unless they were bad.
        put = getattr(client, "upsert", client.put)
        code: int = put(self._settings.prefix + key, value.join(), config)
        if code in _NO_ROOM:
            return refused("full", "it has no room: raise its segments' sizes, or lower the number of copies")
        self._check(code)
        return Outcome(Status.STORED, value.size) if code == 0 else failed("error", f"put failed with code {code}")

    def _existing(self, code: int) -> Outcome:
        self._check(code)
        if code == 1:
            return Outcome(Status.FOUND)
        return MISSING if code == 0 or code in _MISSING else failed("error", f"the look-up failed with code {code}")

    def _deleted(self, code: int) -> Outcome:
        self._check(code)
        if code == 0:
            return DELETED
        return MISSING if code in _MISSING else failed("error", f"remove failed with code {code}")

    def _check(self, code: int) -> None:
        if code in _LOST:
            raise StoreUnavailable(self.name, "unreachable", f"its master does not answer (code {code})")

    def _client(self, deadline: float) -> Any:
        """
        Raises:
            StoreUnavailable: it cannot be connected, or was closed.
        """
        if not self._lock.acquire(timeout=remaining(deadline, self.name)):
            raise StoreUnavailable(self.name, "timeout", "it is still being connected")
        try:
            if self._closed:
                raise StoreUnavailable(self.name, "closed", "it was closed")
            if self._connected is None:
                self._connected = self._connect()
            return self._connected
        finally:
            self._lock.release()

    def _connect(self) -> Any:
        settings = self._settings
        client = self._library.MooncakeDistributedStore()
        code: int = client.setup(
            settings.host or _own_address(settings.master),
            settings.metadata,
            settings.segment_bytes,
            settings.buffer_bytes,
            settings.protocol,
            settings.devices,
            settings.master,
        )
        if code != 0:
            client.close()
            text = f"it cannot be connected (code {code}): check the master's address, metadata= and protocol="
            raise StoreUnavailable(self.name, "unreachable", text)
        return client


def _own_address(master: str) -> str:
    """This machine's address on the way to the master, by which others reach the memory that it lends."""
    host, _, port = master.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
