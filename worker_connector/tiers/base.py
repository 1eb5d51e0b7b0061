"""The interface of a store: where chunk objects are kept below the CPU tier.

A store is synchronous, safe to use from several threads, and called from threads of the tiers only, never from the
engine's. It moves objects and decides nothing. Calls take lists of keys and answer one ``Outcome`` per key, in order;
what concerns the store as a whole (unreachable, refused login) is raised as ``StoreUnavailable``.

Memory that a store reads or writes is lent for one operation: a ``Sink`` takes an object's bytes, a ``Source`` gives
them. When an operation is given up, the loan ends with it; whoever still works on it then gets ``LoanEnded`` instead of
memory that may already belong to another chunk.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from worker_connector.errors import StoreUnavailable

Buffer: TypeAlias = bytes | bytearray | memoryview


class Status(Enum):
    FOUND = "found"
    MISSING = "missing"
    STORED = "stored"
    DELETED = "deleted"
    REFUSED = "refused"
    """The store is well, but does not take this object: it is full, or the object is too large."""
    FAILED = "failed"


class Outcome(NamedTuple):
    """What became of one key.

    ``size`` is the object's bytes: what a get wrote, a put stored, or what an exists call learned (-1: not told).
    ``cause`` is one word of a small set, fit for a metric's label; ``reason`` is for a log line and holds no secret.
    """

    status: Status
    size: int = -1
    cause: str = ""
    reason: str = ""

    @property
    def ok(self) -> bool:
        """The object is there (get, exists, put), or is gone by this call (delete)."""
        return self.status in _GOOD


_GOOD = frozenset({Status.FOUND, Status.STORED, Status.DELETED})

MISSING = Outcome(Status.MISSING)
DELETED = Outcome(Status.DELETED)


def failed(cause: str, reason: str) -> Outcome:
    return Outcome(Status.FAILED, -1, cause, reason)


def refused(cause: str, reason: str) -> Outcome:
    return Outcome(Status.REFUSED, -1, cause, reason)


class Entry(NamedTuple):
    """An object met by a scan; ``size`` in bytes is -1 and ``modified`` (seconds since the epoch) is 0 when not told."""

    key: str
    size: int = -1
    modified: float = 0.0


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a scan. ``cursor`` continues it and is empty at its end. A page may be empty before the end."""

    entries: list[Entry]
    cursor: str


class LoanEnded(Exception):
    """The operation was given up: its memory belongs to someone else again."""


class Loan:
    """Views of memory, lent to a store for one operation and taken back at its end.

    Whoever touches the views does so inside ``borrow`` and stays there only for a bounded time (a copy in memory, one
    receive with a time limit): ``end`` waits for it.
    """

    __slots__ = ("_lender", "_lock", "_open", "_views", "size")

    def __init__(self, *views: Buffer, lender: "Loan | None" = None) -> None:
        self._views = tuple(memoryview(view).cast("B") for view in views)
        self._lock = threading.Lock()
        self._open = True
        self._lender = lender
        self.size = sum(view.nbytes for view in self._views)

    @contextmanager
    def borrow(self) -> Iterator[tuple[memoryview, ...]]:
        """The views, which stay valid until the end of the block.

        Raises:
            LoanEnded: the operation was given up.
        """
        with self._lock:
            if not self._open:
                raise LoanEnded
            if self._lender is None:
                yield self._views
            else:
                with self._lender.borrow():
                    yield self._views

    @property
    def lent(self) -> bool:
        return self._open and (self._lender is None or self._lender.lent)

    def end(self) -> None:
        """From here on nobody touches the views. Waits for whoever is inside ``borrow``."""
        with self._lock:
            self._open = False
            self._views = ()


class Source(Loan):
    """The bytes of one object to put: its parts, one after the other. ``prepare`` is called once, by whoever uses them first,
    and fills in what they lack: so stores' threads do it side by side, while others already wait for their medium."""

    __slots__ = ("_prepare",)

    def __init__(
        self, *views: Buffer, lender: "Loan | None" = None, prepare: Callable[[], object] | None = None
    ) -> None:
        super().__init__(*views, lender=lender)
        self._prepare = prepare

    @contextmanager
    def borrow(self) -> Iterator[tuple[memoryview, ...]]:
        """As of any loan; the parts are complete."""
        with super().borrow() as views:
            if self._prepare is not None:
                self._prepare()
                self._prepare = None
            yield views

    def lend(self) -> "Source":
        """The same bytes on a loan of their own, which ends at the latest with this one."""
        with super().borrow() as views:
            return Source(*views, lender=self)

    def join(self) -> bytes:
        """A copy of the whole object."""
        with self.borrow() as views:
            return b"".join(views)

    def each(self, send: Callable[[memoryview], object], most: int = 1 << 20) -> None:
        """Give the object in order to ``send``, in views of at most ``most`` bytes, each lent for one call.

        ``send`` ends in a bounded time, as a send with a time limit does; a write to a file may not (see ``copy``).

        Raises:
            LoanEnded: the operation was given up in between.
        """
        with self.borrow() as views:
            sizes = [view.nbytes for view in views]
        for part, size in enumerate(sizes):
            for start in range(0, size, most):
                with self.borrow() as views:
                    send(views[part][start : start + most])

    def pour(self, at: int, most: int, send: Callable[[list[memoryview]], int]) -> int:
        """Give ``send`` the object's bytes from ``at`` on, up to ``most`` of them, as the views that have them; returns what it
        returns, how many it took. It ends in a bounded time.

        Raises:
            LoanEnded: the operation was given up.
        """
        with self.borrow() as views:
            given: list[memoryview] = []
            for view in views:
                part = view[at : at + most]
                at = max(0, at - view.nbytes)
                most -= part.nbytes
                if part.nbytes:
                    given.append(part)
            return send(given)

    def copy(self, at: int, room: memoryview) -> int:
        """Copy the object's bytes from ``at`` on into ``room``, as many as fit; returns how many, 0 at its end.

        Raises:
            LoanEnded: the operation was given up; nothing was copied.
        """
        taken = 0
        with self.borrow() as views:
            while taken < room.nbytes and at + taken < self.size:
                taken += _copy(_rest(views, at + taken), room[taken:])
        return taken


class _Verdict:
    """What is found of an object in memory that several sinks may be of."""

    __slots__ = ("_examine", "finding")

    def __init__(self, examine: Callable[[int], object] | None) -> None:
        self._examine = examine
        self.finding: object = None

    def reach(self, size: int) -> None:
        if self._examine is not None and self.finding is None:
            self.finding = self._examine(size)


class Sink(Loan):
    """Where the bytes of one object go: its parts are filled one after the other. ``size`` is their room.

    ``examine`` is called with the object's bytes when it is whole, by the store's thread that wrote the last of them, so that
    one object is verified while others are read. It takes a bounded time and raises nothing; what it says is the
    ``finding``, which a later write to the same memory takes back.
    """

    __slots__ = ("_verdict", "complete", "filled")

    def __init__(
        self, *views: Buffer, lender: "Sink | None" = None, examine: Callable[[int], object] | None = None
    ) -> None:
        super().__init__(*views, lender=lender)
        self._verdict: _Verdict = _Verdict(examine) if lender is None else lender._verdict  # noqa: SLF001 - of the same memory
        self.filled = 0
        self.complete = False

    @property
    def finding(self) -> object:
        """What was found by examining what is there now; None where nothing was examined."""
        return self._verdict.finding

    def lend(self) -> "Sink":
        """The same memory on a loan of its own, which ends at the latest with this one and is filled from the start."""
        with self.borrow() as views:
            return Sink(*views, lender=self)

    def write(self, data: Buffer) -> None:
        """Copy ``data`` behind what is there. The caller has checked that it fits.

        Raises:
            LoanEnded: the operation was given up; nothing was written.
        """
        source = memoryview(data).cast("B")
        while source.nbytes:
            taken = self.fill(source.nbytes, partial(_copy, source))
            source = source[taken:]

    def fill(self, most: int, read_into: Callable[[memoryview], int]) -> int:
        """Let ``read_into`` write up to ``most`` bytes behind what is there; returns how many it says it wrote.

        It gets the rest of one part and must end in a bounded time, as a receive with a time limit does.

        Raises:
            LoanEnded: the operation was given up; nothing was written.
        """
        with self.borrow() as views:
            self._verdict.finding = None
            taken = read_into(_rest(views, self.filled)[:most])
            self.filled += taken
            return taken

    def finish(self) -> Outcome:
        """The whole object has been written."""
        with self.borrow():
            self.complete = True
            self._verdict.reach(self.filled)
            return Outcome(Status.FOUND, self.filled)

    def rewind(self) -> None:
        """Start again, after a failure in the middle."""
        self.filled = 0
        self.complete = False
        self._verdict.finding = None

    def too_small(self, size: int) -> Outcome:
        return failed("size", f"the object has {size} bytes where {self.size} were expected")


def _rest(views: Sequence[memoryview], filled: int) -> memoryview:
    for view in views:
        if filled < view.nbytes:
            return view[filled:]
        filled -= view.nbytes
    raise ValueError("an object is larger than the room for it")


def _copy(source: memoryview, room: memoryview) -> int:
    taken = min(source.nbytes, room.nbytes)
    # numpy lets other threads run meanwhile; a slice assignment of memoryviews would stop the engine's.
    np.copyto(np.frombuffer(room[:taken], np.uint8), np.frombuffer(source[:taken], np.uint8))
    return taken


class Store(ABC):
    """A place for objects. Deadlines are readings of ``time.monotonic``.

    Attributes:
        name: what logs and metrics call it; holds no secret.
        max_object_bytes: larger objects are refused.
    """

    name: str
    max_object_bytes: int = 1 << 40

    @abstractmethod
    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        """Write each object into its sink: found (with its size), missing, or failed.

        An object that does not fit its sink has failed. What was found is not verified here: the caller checks header
        and checksum, and discards what is bad. After a failure the sink's bytes are undefined, and nothing writes
        to them any more.

        Raises:
            StoreUnavailable: the store as a whole failed; no outcome is known.
        """

    @abstractmethod
    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        """Store each object, replacing one of the same key: stored, refused or failed.

        An object becomes visible whole or not at all. ``ttl`` is in seconds; 0 stands for the store's own setting.

        Raises:
            StoreUnavailable: the store as a whole failed; objects may or may not have been stored.
        """

    def take_lost(self) -> list[bytes]:
        """What the store gave up by itself since the last call, as far as it tells: an identity and a chunk each, of 16
        bytes. What came again meanwhile is not among it."""
        return []

    @abstractmethod
    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        """Found, with the size where the store tells it, missing, or failed.

        Raises:
            StoreUnavailable: the store as a whole failed.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        """Deleted, missing (where the store tells), or failed.

        Raises:
            StoreUnavailable: the store as a whole failed.
        """

    @abstractmethod
    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """The next page of keys, about ``limit`` of them; the first one for an empty cursor.

        A key stored or deleted during the scan may be met or not, and a key may be met twice.

        Raises:
            StoreUnavailable: the store as a whole failed, or the cursor is not one of its own.
        """

    @abstractmethod
    def ping(self, deadline: float) -> None:
        """Return when the store would serve a request.

        Raises:
            StoreUnavailable: it would not.
        """

    def discard(self, keys: Sequence[str], reason: str, deadline: float) -> list[Outcome]:
        """Get rid of copies that proved bad. A store that can keep them for inspection does so; others delete them.

        Raises:
            StoreUnavailable: the store as a whole failed.
        """
        del reason
        return self.delete(keys, deadline)

    @abstractmethod
    def close(self) -> None:
        """Give connections and threads back. Later calls raise StoreUnavailable. Does not wait for the store."""


def pages(store: Store, stop: threading.Event, page_seconds: float, limit: int = 1000) -> Iterator[Page]:
    """All pages of a scan, until its end or until ``stop`` is set; each may take ``page_seconds``.

    Raises:
        StoreUnavailable: a page failed.
    """
    cursor = ""
    while not stop.is_set():
        page = store.scan(cursor, time.monotonic() + page_seconds, limit)
        yield page
        cursor = page.cursor
        if not cursor:
            return


def remaining(deadline: float, store: str) -> float:
    """Seconds until the deadline.

    Raises:
        StoreUnavailable: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise StoreUnavailable(store, "timeout", "no answer within the deadline")
    return left
