"""Objects in Valkey or Redis: one server, a primary under Sentinel, or a cluster; over TCP, TLS or a unix socket.

An object is a string value under ``prefix`` + key. Values go from and to the lent memory without a copy in between
(``redis_link``); calls are pipelined, with a bound on the bytes that a server has to hold ready for one connection. Large
batches go over several connections to a server at once: while one thread verifies what it received, others receive.
Every wait ends at the call's deadline by the socket's own time limit; resolving a host name is the one step that only
``Guarded`` bounds.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import (
    DELETED,
    MISSING,
    Entry,
    Outcome,
    Page,
    Sink,
    Source,
    Status,
    Store,
    failed,
    refused,
)
from worker_connector.tiers.crew import Crew, CrewFull, Job
from worker_connector.tiers.redis_link import Link, Links, Refusal, Wire, explain, unavailable
from worker_connector.tiers.redis_places import (
    Address,
    ClusterNodes,
    OneServer,
    Places,
    SentinelPrimary,
    Servers,
    redirected,
)

_WINDOW_BYTES = 3 << 20
_WINDOW_CALLS = 256
_SHARE_BYTES = 2 << 20
"""Less than this is not worth a connection of its own."""
_BROKEN = (RedisError, OSError)
_TOO_LATE = (TimeoutError, RedisTimeoutError)
_REFUSED_PUTS = frozenset({"OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM"})


@dataclass(frozen=True, kw_only=True)
class RedisSettings:
    """Where the servers are and how to log in. Addresses are (host, port); a unix socket is (path, 0).

    ``ttl`` is in seconds, 0 for none. ``connections`` is how many one batch is read over from each server, and how many stay
    open while they are idle.
    """

    addresses: tuple[tuple[str, int], ...]
    kind: str = "server"
    service: str = ""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
    prefix: str = "warmroute:"
    ttl: float = 0.0
    connections: int = 4
    tls: bool = False
    ca_certs: str = ""
    certificate: str = ""
    private_key: str = ""
    verify: bool = True
    name: str = ""


@dataclass(slots=True)
class _Call:
    """One command of a batch; ``read`` takes its reply. ``weight`` is about what the server holds ready for it."""

    key: bytes
    words: tuple[bytes, ...]
    read: Callable[[Wire], Outcome | Refusal]
    refuse: Callable[[Refusal], Outcome]
    body: Source | None = None
    after: tuple[bytes, ...] = ()
    weight: int = 64
    outcome: Outcome | None = None
    moved: tuple[Address, bool] | None = None


class RedisStore(Store):
    """Sentinel's failover and a cluster's moved slots are followed within a call, as long as its deadline allows."""

    max_object_bytes = 512 << 20

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._prefix = settings.prefix.encode()
        self.name = settings.name or _name(settings)
        self._servers = Servers(lambda address: Links(partial(_connection, settings, address), settings.connections))
        self._places = _places(self.name, settings, self._servers)
        self._crew = Crew("redis-node", 16, 64)

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        calls = [self._getting(key, sink) for key, sink in zip(keys, into, strict=True)]
        return self._run(calls, deadline, connections=self._settings.connections)

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        expiry = _expiry(ttl or self._settings.ttl)
        calls = [self._putting(key, value, expiry) for key, value in zip(keys, values, strict=True)]
        # Nobody waits for what is written: one connection leaves the processors to the engine.
        return self._run(calls, deadline, connections=1)

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._run([self._small(key, b"STRLEN", _size) for key in keys], deadline)

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._run([self._small(key, b"UNLINK", _gone) for key in keys], deadline)

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """A cursor is a place and that server's own cursor; objects' sizes are not told."""
        try:
            places = self._places.all(deadline)
            at, address, inner = _resume(cursor, places)
            words = (b"SCAN", inner.encode(), b"MATCH", _glob(self._prefix) + b"*", b"COUNT", b"%d" % limit)
            found, keys = self._ask(address, deadline, *words)
        except ValueError:
            raise StoreUnavailable(self.name, "cursor", "the cursor is not of this store as it is now") from None
        except _BROKEN as error:
            self._places.doubt()
            raise unavailable(self.name, error) from error
        entries = [Entry(key[len(self._prefix) :].decode("utf-8", "replace")) for key in keys]
        if found != b"0":
            return Page(entries, f"{address} {found.decode()}")
        return Page(entries, f"{places[at + 1]} 0" if at + 1 < len(places) else "")

    def ping(self, deadline: float) -> None:
        """Every server there is answers."""
        try:
            places = self._places.all(deadline)
            for address in places:
                self._ask(address, deadline, b"PING")
        except _BROKEN as error:
            self._places.doubt()
            raise unavailable(self.name, error) from error
        if not places:
            raise StoreUnavailable(self.name, "unreachable", "no server is known")

    def close(self) -> None:
        self._servers.close()
        self._places.close()
        self._crew.close()

    # The commands.

    def _getting(self, key: str, sink: Sink) -> _Call:
        def read(wire: Wire) -> Outcome | Refusal:
            landed = wire.land(sink)
            return MISSING if landed is None else landed

        name = self._prefix + key.encode()
        return _Call(name, (b"GET", name), read, _failure, weight=sink.size)

    def _putting(self, key: str, value: Source, expiry: tuple[bytes, ...]) -> _Call:
        name = self._prefix + key.encode()
        stored = Outcome(Status.STORED, value.size)
        call = _Call(
            name, (b"SET", name), partial(_answer, lambda _ok: stored), _put_refusal, value, expiry, value.size
        )
        if value.size > self.max_object_bytes:
            call.outcome = refused("size", f"an object of {value.size} bytes; Redis takes {self.max_object_bytes}")
        return call

    def _small(self, key: str, command: bytes, meaning: Callable[[Any], Outcome]) -> _Call:
        name = self._prefix + key.encode()
        return _Call(name, (command, name), partial(_answer, meaning), _failure)

    # How a batch is carried out.

    def _run(self, calls: list[_Call], deadline: float, connections: int = 1) -> list[Outcome]:
        error: StoreUnavailable | None = None
        for _ in range(self._places.rounds):
            waiting = [call for call in calls if call.outcome is None]
            if not waiting or time.monotonic() >= deadline:
                break
            error = self._round(waiting, deadline, connections) or error
            if error is not None and error.cause != "unreachable":
                break
        return self._outcomes(calls, error)

    def _outcomes(self, calls: list[_Call], error: StoreUnavailable | None) -> list[Outcome]:
        if error is not None and all(call.outcome is None for call in calls):
            raise error
        cause = (error.cause, str(error)) if error else ("moving", "the key's server could not be found in time")
        return [call.outcome or failed(*cause) for call in calls]

    def _round(self, calls: list[_Call], deadline: float, connections: int) -> StoreUnavailable | None:
        """Carry out what each place holds, all places at once; returns why a place could not serve."""
        try:
            shares = self._by_place(calls, deadline)
        except _BROKEN as error:
            return unavailable(self.name, error)
        except StoreUnavailable as error:
            return error
        parts = [(place, part) for place, its in shares.items() for part in _split(its, connections)]
        return self._serve_all(parts, deadline) if parts else None

    def _by_place(self, calls: list[_Call], deadline: float) -> dict[tuple[Address, bool], list[_Call]]:
        shares: dict[tuple[Address, bool], list[_Call]] = {}
        for call in calls:
            place = call.moved or (self._places.of(call.key, deadline), False)
            call.moved = None
            if place[0] is None:
                self._places.doubt()
                call.outcome = failed("clusterdown", "no server holds the key's slot")
            else:
                shares.setdefault((place[0], place[1]), []).append(call)
        return shares

    def _serve_all(
        self, parts: Sequence[tuple[tuple[Address, bool], list[_Call]]], deadline: float
    ) -> StoreUnavailable | None:
        """All parts at once, the first of them on this thread; returns why one of them failed."""
        errors: list[StoreUnavailable | None] = []
        jobs = []
        for place, calls in parts[1:]:
            try:
                jobs.append(self._crew.submit(partial(self._serve, place, calls, deadline)))
            except CrewFull:
                errors.append(StoreUnavailable(self.name, "busy", "too many operations are under way"))
        try:
            errors.append(self._serve(*parts[0], deadline))
        finally:
            errors += [self._answer_of(job, deadline) for job in jobs]
        return next((error for error in errors if error is not None), None)

    def _answer_of(self, job: Job[StoreUnavailable | None], deadline: float) -> StoreUnavailable | None:
        # Sockets keep the deadline; the rest is for a thread that the processor leaves waiting.
        if not self._crew.wait(job, deadline + 1.0):
            return StoreUnavailable(self.name, "timeout", "no answer within the deadline")
        return job.result()

    def _serve(self, place: tuple[Address, bool], calls: list[_Call], deadline: float) -> StoreUnavailable | None:
        address, asking = place
        try:
            self._on_link(address, deadline, partial(_carry_out, calls, address, asking=asking))
        except _BROKEN as error:
            self._places.doubt()
            return unavailable(self.name, error)
        if any(call.moved for call in calls) or any(_demoted(call.outcome) for call in calls):
            self._places.doubt()
            self._retry_demoted(calls, address, deadline)
        return None

    def _retry_demoted(self, calls: list[_Call], address: Address, deadline: float) -> None:
        """A primary that became a replica refuses writes: they go to its successor, if there is one already."""
        for call in calls:
            if _demoted(call.outcome) and self._places.of(call.key, deadline) != address:
                call.outcome = None

    def _on_link(self, address: Address, deadline: float, work: Callable[[Link], Any]) -> Any:
        """Do ``work``, a second time on a fresh connection if an old one turned out to be broken."""
        links = self._servers.links(address)
        link = links.take(deadline)
        try:
            result = work(link)
        except BaseException as error:
            link.drop()
            if not link.reused or not isinstance(error, _BROKEN) or isinstance(error, (Refusal, *_TOO_LATE)):
                raise
            links.purge()
            return self._on_link(address, deadline, work)
        links.give(link)
        return result

    def _ask(self, address: Address, deadline: float, *words: bytes) -> Any:
        return self._on_link(address, deadline, lambda link: link.ask(*words))


def _split(calls: list[_Call], most: int) -> list[list[_Call]]:
    """What goes over one connection each. Neighbours are on different ones, so that a prompt's beginning comes first."""
    count = max(1, min(most, len(calls), sum(call.weight for call in calls) // _SHARE_BYTES))
    return [calls[start::count] for start in range(count)]


def _carry_out(calls: list[_Call], address: Address, link: Link, *, asking: bool) -> None:
    """Send every call that has no outcome and read its reply, with a window of calls under way."""
    under_way: deque[_Call] = deque()
    weight = 0
    for call in calls:
        if call.outcome is not None or call.moved is not None:
            continue
        if len(under_way) >= _WINDOW_CALLS or weight + call.weight > _WINDOW_BYTES:
            # Half of the window, so that commands go out in as few pieces as they came together.
            link.flush()
            most, room = len(under_way) // 2, _WINDOW_BYTES - call.weight
            while under_way and (len(under_way) > most or weight > room):
                weight -= _take_reply(under_way.popleft(), link, address, asking=asking)
        if asking:
            link.send((b"ASKING",))
        link.send(call.words, call.body, call.after)
        under_way.append(call)
        weight += call.weight
    link.flush()
    for call in under_way:
        _take_reply(call, link, address, asking=asking)


def _take_reply(call: _Call, link: Link, address: Address, *, asking: bool) -> int:
    if asking:
        link.wire.read_response()
    reply = call.read(link.wire)
    if not isinstance(reply, Refusal):
        call.outcome = reply
    elif reply.code == "TRYAGAIN":
        call.outcome = failed("moving", "the key's slot is being moved to another server")
    elif (moved := redirected(reply, address)) is not None:
        call.moved = moved
    else:
        call.outcome = call.refuse(reply)
    return call.weight


def _answer(meaning: Callable[[Any], Outcome], wire: Wire) -> Outcome | Refusal:
    reply = wire.read_response()
    return reply if isinstance(reply, Refusal) else meaning(reply)


def _size(reply: int) -> Outcome:
    return Outcome(Status.FOUND, reply) if reply else MISSING


def _gone(reply: int) -> Outcome:
    return DELETED if reply else MISSING


def _failure(refusal: Refusal) -> Outcome:
    if refusal.code == "WRONGTYPE":
        return failed(*explain(refusal))
    raise refusal


def _put_refusal(refusal: Refusal) -> Outcome:
    if refusal.code in _REFUSED_PUTS:
        return refused(*explain(refusal))
    return _failure(refusal)


def _demoted(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.cause == "readonly"


def _expiry(ttl: float) -> tuple[bytes, ...]:
    return (b"PX", b"%d" % max(1, int(ttl * 1000))) if ttl else ()


def _glob(prefix: bytes) -> bytes:
    for special in (b"\\", b"*", b"?", b"[", b"]"):
        prefix = prefix.replace(special, b"\\" + special)
    return prefix


def _resume(cursor: str, places: list[Address]) -> tuple[int, Address, str]:
    if not cursor:
        return 0, places[0], "0"
    place, _, inner = cursor.rpartition(" ")
    at = [str(each) for each in places].index(place)
    return at, places[at], str(int(inner))


def _name(settings: RedisSettings) -> str:
    hosts = ",".join(str(Address(*each)) for each in settings.addresses)
    where = {"sentinel": f"{settings.service} of {hosts}", "cluster": f"cluster {hosts}"}.get(settings.kind, hosts)
    return f"redis {where}/{settings.database}"


def _places(name: str, settings: RedisSettings, servers: Servers) -> Places:
    addresses = [Address(*each) for each in settings.addresses]
    if settings.kind == "cluster":
        return ClusterNodes(name, addresses, servers)
    if settings.kind == "sentinel":
        watchers = Servers(lambda address: Links(partial(_sentinel_connection, settings, address), 1))
        return SentinelPrimary(name, addresses, watchers, settings.service)
    return OneServer(addresses[0])


def _connection(settings: RedisSettings, address: Address) -> AbstractConnection:
    return _open(settings, address, settings.username, settings.password, settings.database)


def _sentinel_connection(settings: RedisSettings, address: Address) -> AbstractConnection:
    return _open(settings, address, settings.sentinel_username, settings.sentinel_password, 0)


def _open(settings: RedisSettings, address: Address, user: str, password: str, database: int) -> AbstractConnection:
    common: dict[str, Any] = {
        "db": database,
        "username": user or None,
        "password": password or None,
        "protocol": 2,
        "parser_class": Wire,
        "retry": Retry(NoBackoff(), 0),
    }
    tcp: Any = Connection  # redis-py's constructors have no types
    unix: Any = UnixDomainSocketConnection
    made: AbstractConnection
    if not address.port:
        made = unix(path=address.host, **common)
        return made
    common |= {"host": address.host, "port": address.port}
    if not settings.tls:
        made = tcp(**common)
        return made
    return SSLConnection(
        ssl_cert_reqs="required" if settings.verify else "none",
        ssl_check_hostname=settings.verify,
        ssl_ca_certs=settings.ca_certs or None,
        ssl_certfile=settings.certificate or None,
        ssl_keyfile=settings.private_key or None,
        **common,
    )
