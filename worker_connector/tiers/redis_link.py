"""Connections to Valkey/Redis servers that read and write objects where they lie.

redis-py connects, speaks TLS and logs in. Its parsers build a bytes object of every reply, which for objects of many MiB
costs several copies; ``Wire`` takes the parser's place and receives a reply's bytes in the sink's own memory. It speaks
RESP2 (https://redis.io/docs/latest/develop/reference/protocol-spec/), in which nothing arrives unasked.
"""

import math
import select
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import Outcome, Sink, Source

_READ_BYTES = 16 << 10
_SKIP_BYTES = 256 << 10
_SEND_BYTES = 1 << 20
_MOST_LINE_BYTES = 64 << 10
_MOST_SMALL_BYTES = 16 << 20
_MOST_OBJECT_BYTES = 512 << 20
_LATE_SECONDS = 0.02
"""How much later than its deadline a wait may end."""
_NO_CONNECTION = "no connection within the deadline: check host and port, and whether the port speaks TLS"
_NO_ANSWER = "no answer within the deadline"


class Refusal(ResponseError):
    """An error reply; ``code`` is its first word, as in ``OOM command not allowed ...``."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.code, _, self.text = line.partition(" ")


class Wire:
    """A connection's parser, in redis-py's sense, and its way out too. Used by one thread at a time."""

    def __init__(self, socket_read_size: int = _READ_BYTES) -> None:
        del socket_read_size
        self._sock: Any = None
        self._data = b""
        self._at = 0
        self._limited = math.inf
        self.deadline = 0.0

    # What redis-py calls.

    def on_connect(self, connection: Any) -> None:
        self._sock = connection._sock  # noqa: SLF001 - how redis-py hands it to its parsers
        self._data, self._at, self._limited = b"", 0, math.inf

    def on_disconnect(self) -> None:
        self._sock = None

    def can_read(self, timeout: float = 0) -> bool:
        """Something is there to read, be it the end of the connection."""
        if self._sock is None:
            return False
        if self._at < len(self._data) or getattr(self._sock, "pending", int)():
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def read_response(self, disable_decoding: bool = False, timeout: object = None, **_others: object) -> Any:
        """One whole reply, with its parts as bytes; an error reply is returned, not raised."""
        del disable_decoding, timeout
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return Refusal(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _number(line)
        if kind == b"$":
            return None if rest == b"-1" else self._exactly(_number(line, _MOST_SMALL_BYTES))
        if kind == b"*":
            return None if rest == b"-1" else [self.read_response() for _ in range(_number(line, _MOST_SMALL_BYTES))]
        raise InvalidResponse(f"a reply that is not of this protocol: {line[:40]!r}")

    # What the store calls.

    def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view.nbytes:
            self._limit()
            view = view[self._sock.send(view) :]

    def send_with(self, before: bytes, body: Source) -> None:
        """Send ``before`` and all of the body, in as few pieces as the connection takes: where it can, a server gets a command
        and its value at once."""
        if not hasattr(self._sock, "sendmsg") or isinstance(self._sock, ssl.SSLSocket):
            self.send(before)
            body.each(self.send, _SEND_BYTES)
            return
        size = len(before)
        at = -size
        while at < body.size:
            self._limit()
            head = [memoryview(before)[size + at :]] if at < 0 else []
            at += body.pour(max(0, at), _SEND_BYTES, lambda views, head=head: self._sock.sendmsg([*head, *views]))  # type: ignore[misc]

    def land(self, sink: Sink) -> Outcome | Refusal | None:
        """Read one bulk reply into the sink. Returns None where there is no such key."""
        line = self._line()
        if line[:1] == b"-":
            return Refusal(line[1:].decode("utf-8", "replace"))
        if line[:1] != b"$":
            raise InvalidResponse(f"no object, but {line[:40]!r}")
        if line == b"$-1":
            return None
        size = _number(line, _MOST_OBJECT_BYTES)
        sink.rewind()
        outcome = self._skip(size, sink) if size > sink.size else self._fill(size, sink)
        if self._exactly(0) != b"":
            raise InvalidResponse("an object without its end")
        return outcome

    def _fill(self, size: int, sink: Sink) -> Outcome:
        early = memoryview(self._data)[self._at : self._at + size]
        sink.write(early)
        self._at += early.nbytes
        while sink.filled < size:
            sink.fill(size - sink.filled, self._receive_into)
        return sink.finish()

    def _skip(self, size: int, sink: Sink) -> Outcome:
        """Objects that are too large are read and dropped, so that the connection stays usable."""
        scratch = memoryview(bytearray(_SKIP_BYTES))
        left = size - min(size, len(self._data) - self._at)
        self._at += size - left
        while left:
            left -= self._receive_into(scratch[:left])
        return sink.too_small(size)

    def _receive_into(self, room: memoryview) -> int:
        self._limit()
        got: int = self._sock.recv_into(room)
        if not got:
            raise RedisConnectionError("closed by the server")
        return got

    def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n", self._at)) < 0:
            if len(self._data) - self._at > _MOST_LINE_BYTES:
                raise InvalidResponse(f"a line without an end: {self._data[self._at : self._at + 40]!r}")
            self._more()
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _exactly(self, size: int) -> bytes:
        parts = []
        missing = size + 2
        while (have := len(self._data) - self._at) < missing:
            parts.append(self._data[self._at :])
            missing -= have
            self._at = len(self._data)
            self._more()
        parts.append(self._data[self._at : self._at + missing])
        self._at += missing
        whole = b"".join(parts)
        if not whole.endswith(b"\r\n"):
            raise InvalidResponse("a reply without its end")
        return whole[:-2]

    def _more(self) -> None:
        if self._sock is None:
            raise RedisConnectionError("closed")
        self._limit()
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise RedisConnectionError("closed by the server")
        self._data = self._data[self._at :] + data
        self._at = 0

    def _limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise RedisTimeoutError(_NO_ANSWER)
        # Each time costs a call of the system, which gives the interpreter away.
        if not left <= self._limited <= left + _LATE_SECONDS:
            self._sock.settimeout(left)
            self._limited = left


def _number(line: bytes, most: int = 1 << 63) -> int:
    """The number behind a reply's first byte, up to ``most``; lengths are never negative here."""
    digits = line[1:]
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
        raise InvalidResponse(f"no number: {line[:40]!r}")
    number = int(digits)
    if number > most or (number < 0 and line[:1] != b":"):
        raise InvalidResponse(f"a length that is out of bounds: {line[:40]!r}")
    return number


class Link:
    """One connection, in the hands of one thread until it is given back."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection: Any = connection
        self.wire: Wire = self._connection._parser  # noqa: SLF001 - redis-py has no other way to it
        self.reused = False
        self._unsent = bytearray()

    def connect(self, deadline: float) -> None:
        """Open it, log in, and see that the server answers: a refusal in the middle of a large object would be a
        reset connection without a reason."""
        left = max(0.001, deadline - time.monotonic())
        self.wire.deadline = deadline
        self._connection.socket_timeout = left
        self._connection.socket_connect_timeout = left
        try:
            self._connection.connect()
        except (RedisTimeoutError, TimeoutError) as error:
            raise RedisTimeoutError(_NO_CONNECTION) from error
        self.ask(b"PING")

    def ask(self, *words: bytes) -> Any:
        """The reply to a small command.

        Raises:
            Refusal: it is an error.
        """
        self.send(words)
        self.flush()
        reply = self.wire.read_response()
        if isinstance(reply, Refusal):
            raise reply
        return reply

    def send(self, words: Sequence[bytes], body: Source | None = None, after: Sequence[bytes] = ()) -> None:
        """Send a command; ``body`` is the word between the others, sent from where it lies. What is small waits for
        ``flush``."""
        count = len(words) + len(after) + (body is not None)
        self._unsent += b"*%d\r\n" % count + _packed(words)
        if body is not None:
            before = bytes(self._unsent) + b"$%d\r\n" % body.size
            self._unsent.clear()
            self.wire.send_with(before, body)
            self._unsent += b"\r\n"
        self._unsent += _packed(after)

    def flush(self) -> None:
        if self._unsent:
            self.wire.send(bytes(self._unsent))
            self._unsent.clear()

    def drop(self) -> None:
        """Close it; a command that was sent in part is never carried out."""
        self._connection.disconnect()


def _packed(words: Sequence[bytes]) -> bytes:
    return b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Links:
    """The connections to one server; those not in use wait to be used again, at most ``idle`` of them."""

    def __init__(self, make: Callable[[], AbstractConnection], idle: int) -> None:
        self._make = make
        self._most_idle = idle
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self, deadline: float) -> Link:
        while (link := self._pop()) is not None:
            link.wire.deadline = deadline
            if not link.wire.can_read():
                link.reused = True
                return link
            link.drop()  # the server closed it, or sent what nobody asked for
        link = Link(self._make())
        try:
            link.connect(deadline)
        except BaseException:
            link.drop()
            raise
        return link

    def give(self, link: Link) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < self._most_idle:
                self._idle.append(link)
                return
        link.drop()

    def purge(self) -> None:
        """Close what is idle: where one connection broke, others of its age are likely broken too."""
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.drop()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.purge()

    def _pop(self) -> Link | None:
        with self._lock:
            return self._idle.pop() if self._idle else None


_CODES = {
    "WRONGPASS": ("auth", "it refuses user and password: check both, and that the user is enabled"),
    "NOAUTH": ("auth", "it wants a password: put it into the URL (redis://user:password@host)"),
    "NOPERM": ("noperm", "the user lacks a right: allow GET, SET, STRLEN, UNLINK, SCAN and PING on the prefix's keys"),
    "LOADING": ("loading", "it is loading its data set into memory"),
    "CLUSTERDOWN": ("clusterdown", "the cluster does not serve: some of its slots have no primary"),
    "MASTERDOWN": ("masterdown", "it is a replica that lost its primary and may not serve stale data"),
    "READONLY": ("readonly", "it is a read-only replica: give the primary's address, or redis+sentinel://"),
    "OOM": ("full", "its memory is full: raise maxmemory, or set maxmemory-policy to allkeys-lru"),
    "MISCONF": ("misconf", "it cannot write its snapshots and takes no data: see its log and its disk"),
    "NOREPLICAS": ("noreplicas", "it has fewer replicas than min-replicas-to-write asks for"),
    "BUSY": ("script", "a script keeps it from serving"),
    "WRONGTYPE": ("type", "the key is no string: something else uses the same prefix"),
}
_TEXTS = (
    ("max number of clients", ("clients", "it has as many clients as maxclients allows")),
    ("without any password", ("auth", "it has no password for the default user: take the password out of the URL")),
    ("no password is set", ("auth", "it has no password: take the password out of the URL")),
    ("DB index", ("config", "it has no such database: see the number behind the host in the URL")),
    ("cluster mode", ("config", "it is part of a cluster: use redis+cluster://")),
    ("cluster support disabled", ("config", "it is no cluster: use redis://")),
    ("unauthenticated", ("auth", "it wants a password: put it into the URL (redis://user:password@host)")),
)


def explain(refusal: Refusal) -> tuple[str, str]:
    """The cause in one word, and cause and cure in a sentence."""
    if known := _CODES.get(refusal.code):
        return known
    for part, known in _TEXTS:
        if part in str(refusal):
            return known
    if refusal.code in ("MOVED", "ASK"):
        return "config", "it is part of a cluster: use redis+cluster://"
    return "error", f"it answers: {str(refusal)[:120]}"


def unavailable(name: str, error: Exception) -> StoreUnavailable:
    """What an error of the connection says of the store."""
    if isinstance(error, StoreUnavailable):
        return error
    if isinstance(error, Refusal):
        return StoreUnavailable(name, *explain(error))
    if isinstance(error, (RedisTimeoutError, TimeoutError)):
        return StoreUnavailable(name, "timeout", _NO_CONNECTION if str(error) == _NO_CONNECTION else _NO_ANSWER)
    if isinstance(error, InvalidResponse):
        return StoreUnavailable(name, "protocol", f"it does not answer as Redis does ({error})")
    if tls := _tls_error(error):
        return StoreUnavailable(name, "tls", f"TLS failed ({tls}): see ca_certs, and whether its port speaks TLS")
    if isinstance(error, (RedisError, OSError)):
        return StoreUnavailable(name, "unreachable", f"it cannot be reached or closed the connection ({_short(error)})")
    raise error


def _tls_error(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return str(error.reason or error.args[-1])
        error = error.__cause__ or error.__context__
    return ""


def _short(error: Exception) -> str:
    return str(error).rstrip(".")[:160] or type(error).__name__
