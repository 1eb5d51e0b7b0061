"""Which server holds a key: one server, the primary that Sentinels name, or the nodes of a cluster."""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from redis.crc import key_slot
from redis.exceptions import RedisError

from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.redis_link import Links, Refusal, unavailable

_REFRESH_SECONDS = 1.0


class Address(NamedTuple):
    """A host and port, or a unix socket's path with port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


class Servers:
    """The connections to every server met so far."""

    def __init__(self, make: Callable[[Address], Links]) -> None:
        self._make = make
        self._known: dict[Address, Links] = {}
        self._lock = threading.Lock()
        self._closed = False

    def links(self, address: Address) -> Links:
        with self._lock:
            if self._closed:
                raise StoreUnavailable(str(address), "closed", "it was closed")
            if address not in self._known:
                self._known[address] = self._make(address)
            return self._known[address]

    def keep_only(self, addresses: Iterable[Address]) -> None:
        """Close the idle connections to all others."""
        kept = set(addresses)
        with self._lock:
            gone = [self._known.pop(address) for address in list(self._known) if address not in kept]
        for links in gone:
            links.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.keep_only(())


class Places(ABC):
    """Thread-safe. A place is a server's address. ``rounds`` is how often a call may look for its server."""

    rounds = 3

    @abstractmethod
    def of(self, key: bytes, deadline: float) -> Address | None:
        """Where a key belongs; None where nobody serves it at present."""

    @abstractmethod
    def all(self, deadline: float) -> list[Address]:
        """Every place, in an order that lasts as long as the places do."""

    def doubt(self) -> None:  # noqa: B027 - a single server has nothing to forget
        """A place did not answer, or said it is no longer the place: look again before the next use."""

    def close(self) -> None:  # noqa: B027 - likewise
        """Give connections of its own back."""


class OneServer(Places):
    rounds = 1

    def __init__(self, address: Address) -> None:
        self._address = address

    def of(self, key: bytes, deadline: float) -> Address:
        del key, deadline
        return self._address

    def all(self, deadline: float) -> list[Address]:
        del deadline
        return [self._address]


class _Looked(Places):
    """Places that are asked for, remembered, and asked for again after a doubt."""

    def __init__(self, name: str, asked: list[Address], servers: Servers) -> None:
        self._name = name
        self._asked = asked
        self._servers = servers
        self._lock = threading.Lock()
        self._doubtful = True
        self._looked_at = float("-inf")

    def doubt(self) -> None:
        self._doubtful = True

    def close(self) -> None:
        self._servers.close()

    def _look(self, deadline: float) -> None:
        """Ask one server after the other, each for a fair share of the time that is left."""
        with self._lock:
            recently = time.monotonic() - self._looked_at < _REFRESH_SECONDS
            if not self._doubtful or (recently and self._known()):
                return
            self._doubtful = False
            self._looked_at = time.monotonic()
            error: Exception | None = None
            candidates = self._candidates()
            for at, address in enumerate(candidates):
                now = time.monotonic()
                share = (deadline - now) / (len(candidates) - at)
                try:
                    if self._ask(address, now + share):
                        return
                except (RedisError, OSError) as problem:
                    error = problem
            self._doubtful = True
            if not self._known():
                raise self._lost(error)

    def _exchange(self, address: Address, deadline: float, *words: bytes) -> Any:
        links = self._servers.links(address)
        link = links.take(deadline)
        try:
            reply = link.ask(*words)
        except BaseException:
            link.drop()
            raise
        links.give(link)
        return reply

    @abstractmethod
    def _candidates(self) -> list[Address]: ...

    @abstractmethod
    def _ask(self, address: Address, deadline: float) -> bool: ...

    @abstractmethod
    def _known(self) -> bool: ...

    @abstractmethod
    def _lost(self, error: Exception | None) -> StoreUnavailable: ...


class SentinelPrimary(_Looked):
    """The primary of ``service``, as the Sentinels see it (https://redis.io/docs/latest/develop/reference/sentinel-clients/)."""

    def __init__(self, name: str, sentinels: list[Address], servers: Servers, service: str) -> None:
        super().__init__(name, sentinels, servers)
        self._service = service
        self._primary: Address | None = None

    def of(self, key: bytes, deadline: float) -> Address | None:
        del key
        if self._doubtful or self._primary is None:
            self._look(deadline)
        return self._primary

    def all(self, deadline: float) -> list[Address]:
        primary = self.of(b"", deadline)
        return [primary] if primary else []

    def _candidates(self) -> list[Address]:
        return self._asked

    def _ask(self, address: Address, deadline: float) -> bool:
        reply = self._exchange(address, deadline, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service.encode())
        if not reply:
            return False
        self._primary = Address(reply[0].decode(), int(reply[1]))
        self._asked = [address, *(each for each in self._asked if each != address)]
        return True

    def _known(self) -> bool:
        return self._primary is not None

    def _lost(self, error: Exception | None) -> StoreUnavailable:
        if error is None:
            text = f"its Sentinels know no service {self._service!r}: see service= in the URL"
            return StoreUnavailable(self._name, "config", text)
        found = unavailable(self._name, error)
        return StoreUnavailable(self._name, found.cause, f"no Sentinel answers ({found})")


class ClusterNodes(_Looked):
    """The primaries of a cluster by slot (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/)."""

    def __init__(self, name: str, seeds: list[Address], servers: Servers) -> None:
        super().__init__(name, seeds, servers)
        self._map: tuple[list[int], list[tuple[int, Address]]] = ([], [])

    def of(self, key: bytes, deadline: float) -> Address | None:
        if self._doubtful:
            self._look(deadline)
        slot = key_slot(key)
        starts, ranges = self._map
        at = bisect_right(starts, slot) - 1
        if at < 0 or slot > ranges[at][0]:
            return None
        return ranges[at][1]

    def all(self, deadline: float) -> list[Address]:
        if self._doubtful:
            self._look(deadline)
        return sorted({address for _, address in self._map[1]})

    def _candidates(self) -> list[Address]:
        return list(dict.fromkeys([*(address for _, address in self._map[1]), *self._asked]))

    def _ask(self, address: Address, deadline: float) -> bool:
        reply = self._exchange(address, deadline, b"CLUSTER", b"SLOTS")
        found = sorted((start, end, _node(primary, address)) for start, end, primary, *_ in reply)
        if not found:
            return False
        self._map = [start for start, _, _ in found], [(end, node) for _, end, node in found]
        self._servers.keep_only(self._candidates())  # nobody else would close what leads to nodes that are gone
        return True

    def _known(self) -> bool:
        return bool(self._map[0])

    def _lost(self, error: Exception | None) -> StoreUnavailable:
        if error is None:
            return StoreUnavailable(self._name, "clusterdown", "no slot of the cluster has a primary")
        return unavailable(self._name, error)


def _node(described: list[Any], asked: Address) -> Address:
    """A node that does not know its own name is the one that was asked."""
    host = (described[0] or b"").decode()
    return Address(host if host and host != "?" else asked.host, int(described[1]))


def redirected(refusal: Refusal, asked: Address) -> tuple[Address, bool] | None:
    """Where MOVED or ASK point, and whether the command needs ASKING before it."""
    if refusal.code not in ("MOVED", "ASK"):
        return None
    with contextlib.suppress(ValueError):
        host, _, port = refusal.text.split(" ")[1].rpartition(":")
        return Address(host or asked.host, int(port)), refusal.code == "ASK"
    return None
