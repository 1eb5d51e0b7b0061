"""Objects in a directory: the disk tier, or a filesystem shared by several engines.

The directory never holds more than ``max_bytes``, whoever wrote them: temporary files, bad objects kept for inspection,
other engines' files and foreign ones count; directories themselves do not. To make room, this store evicts the units that
its policy names. What is written appears whole under its name or not at all, so a process may be killed at any moment. What
the index does not know is looked for on disk when it is asked for, and what a file holds is verified by whoever loads it;
so the index may be old, and the store serves before it has one.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from worker_connector.chunk_object import HEADER_BYTES, read_header
from worker_connector.errors import BadObject, ConfigurationError, StoreUnavailable
from worker_connector.eviction import POLICIES
from worker_connector.tiers.base import (
    DELETED,
    MISSING,
    Entry,
    Loan,
    LoanEnded,
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
from worker_connector.tiers.disk_account import LockBusy
from worker_connector.tiers.disk_files import QUARANTINE, SUFFIX, Files, charge, key_of, parse_name
from worker_connector.tiers.disk_gate import Gate
from worker_connector.tiers.disk_index import Index
from worker_connector.tiers.disk_io import read_object, supports_direct, write_object
from worker_connector.tiers.disk_keeper import Keeper
from worker_connector.tiers.disk_space import NoRoom, Space, Temporary

T = TypeVar("T")

_WAITING = 4096
_GRACE_SECONDS = 1.0
_REFRESH_SECONDS = 60.0
_SMALLEST_BYTES = 1 << 20
_IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST})
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


@dataclass(frozen=True, kw_only=True)
class DiskSettings:
    """``direct`` bypasses the page cache; None does where the filesystem can. ``fsync`` makes an object survive a loss
    of power once it is stored; without it, such a loss may leave damaged objects, which readers refuse. ``ttl`` in
    seconds, 0 for ever. Up to ``threads`` read at once, and as many write. The directory is listed again bit by bit, all of
    it every ``rescan_seconds``."""

    directory: Path
    max_bytes: int
    policy: str = "lru"
    ttl: float = 0.0
    fsync: bool = False
    direct: bool | None = None
    threads: int = 4
    rescan_seconds: float = 60.0
    quarantine_bytes: int = 256 << 20
    name: str = "disk"


@dataclass(frozen=True, kw_only=True)
class DiskFigures:
    """What this engine knows to be there now, and what it did since the start. ``foreign_files`` are none of the tier's;
    ``abandoned_files`` are what writers left that died, and was removed. ``writing`` is empty, or why nothing is
    written."""

    objects: int
    object_bytes: int
    foreign_files: int
    evictions: int
    expirations: int
    quarantined: int
    abandoned_files: int
    scan_seconds: float
    scanned: bool
    direct: bool
    writing: str


class DiskStore(Store):
    """Keys are ``str(ObjectKey)``, a prompt's in the prompt's order: among equals the last is evicted first. Several
    processes may use one directory, each with a store of its own.

    Raises:
        ConfigurationError: the directory or a setting cannot be used; the text says why.
    """

    def __init__(self, settings: DiskSettings) -> None:
        self.name = settings.name
        self.settings = settings
        if settings.policy not in POLICIES:
            raise ConfigurationError(f"eviction policy {settings.policy!r} is none of {', '.join(POLICIES)}")
        if settings.max_bytes < _SMALLEST_BYTES:
            raise ConfigurationError(
                f"a disk tier of {settings.max_bytes} bytes is too small: give it a megabyte at least"
            )
        self._files = Files(settings.directory)
        self._direct = self._resolve_direct()
        self._index = Index(POLICIES[settings.policy]())
        self._space = Space(self._files, self._index, settings.max_bytes, settings.quarantine_bytes)
        self.max_object_bytes = self._space.largest
        self._gate = Gate()
        self._crew = Crew(f"{self.name}-io", settings.threads, _WAITING)
        # Nobody waits for what is written, and what is read does not queue behind it.
        self._writers = Crew(f"{self.name}-write-io", settings.threads, _WAITING)
        self._closed = False
        self._keeper = Keeper(
            self.name,
            self._files,
            self._index,
            self._space,
            gate=self._gate,
            rescan_seconds=settings.rescan_seconds,
        )

    # ---- the interface ------------------------------------------------------------------------------------------

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        lent = [sink.lend() for sink in into]
        works = [partial(self._get, *each, deadline) for each in zip(keys, into, lent, strict=True)]
        outcomes = self._run(self._crew, works, lent, deadline)
        self._index.touch(_good_units(keys, outcomes))
        return outcomes

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        if self._gate.is_open:
            # Here, so that it ends when the store is closed.
            self._keeper.scanned.wait(max(0.0, deadline - time.monotonic()))
        lent = [value.lend() for value in values]
        works = [partial(self._put, key, source, ttl, deadline) for key, source in zip(keys, lent, strict=True)]
        outcomes = self._run(self._writers, works, lent, deadline)
        self._index.refresh(_good_units(keys, outcomes))
        return outcomes

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._run_all(keys, self._exists, deadline)

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._run_all(keys, partial(self._delete, deadline=deadline), deadline)

    def discard(self, keys: Sequence[str], reason: str, deadline: float) -> list[Outcome]:
        """Move bad copies to the quarantine, a bounded directory beside the objects."""
        del reason
        return self._run_all(keys, partial(self._quarantine, deadline=deadline), deadline)

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """Shard by shard, as the directory is now, whoever wrote what is in it."""
        area = self._area_of(cursor)
        return self._wait(self._submit(self._crew, partial(self._page, area, limit)), deadline)

    def ping(self, deadline: float) -> None:
        self._wait(self._submit(self._crew, partial(self._probe, deadline)), deadline)

    def close(self) -> None:
        self._closed = True
        self._keeper.stop()
        self._crew.close()
        self._writers.close()

    # ---- beyond the interface -----------------------------------------------------------------------------------

    def pin(self, keys: Sequence[str], *, pin: bool = True) -> None:
        """Keep objects from eviction by this engine, or no longer; counted. All ranks' objects of a chunk go together.
        Other engines that share the directory do not know of it.

        Raises:
            ValueError: a key is none.
        """
        for unit, _ in [_split(key) for key in keys]:
            self._index.pin(unit, pin=pin)

    def wait_scanned(self, seconds: float) -> bool:
        """Whether the directory has been listed, waiting for it at most so long. Until then nothing is stored."""
        return self._keeper.scanned.wait(seconds)

    def take_lost(self) -> list[bytes]:
        return self._index.take_gone()

    def figures(self) -> DiskFigures:
        space = self._space
        return DiskFigures(
            objects=self._index.objects,
            object_bytes=self._index.used,
            foreign_files=sum(space.foreign),
            evictions=space.evictions,
            expirations=space.expirations,
            quarantined=space.quarantined,
            abandoned_files=space.removed,
            scan_seconds=self._keeper.scan_seconds,
            scanned=self._keeper.scanned.is_set(),
            direct=self._direct,
            writing=self._gate.cause,
        )

    def check(self) -> None:
        """Assert every invariant of the index. O(objects)."""
        self._index.check()

    # ---- one key ------------------------------------------------------------------------------------------------

    def _get(self, key: str, into: Sink, sink: Sink, deadline: float) -> Outcome:
        """``sink`` is ``into`` on a loan that ends with this call."""
        unit, part = _split(key)
        if self._index.has_expired(unit, part, time.time()):
            return MISSING
        try:
            fd = self._files.open(unit, part, os.O_DIRECT if self._direct else 0)
        except FileNotFoundError:
            self._index.remove(unit, part)
            return MISSING
        try:
            outcome = self._read(fd, unit, part, sink, deadline)
        except OSError as error:
            if error.errno == errno.EIO:
                # One bad place on the disk, perhaps: not to be met again when the disk proves well.
                with suppress(OSError, LockBusy):
                    self._space.quarantine(unit, part, deadline)
            raise
        finally:
            os.close(fd)
        if outcome.ok:
            into.filled = sink.filled
            return into.finish()
        return outcome

    def _read(self, fd: int, unit: bytes, part: str, sink: Sink, deadline: float) -> Outcome:
        status = os.fstat(fd)
        if status.st_size > sink.size:
            return sink.too_small(status.st_size)
        read = read_object(fd, status.st_size, sink, partial(_in_time, deadline))
        if read != status.st_size:
            return failed("size", f"the file ended after {read} of {status.st_size} bytes")
        if not self._index.holds(unit, part):
            self._index.add(unit, part, charge(read))
        if time.time() - status.st_mtime > _REFRESH_SECONDS:
            with suppress(OSError):
                os.utime(fd)  # so that recency outlives the process and is known to others
        return sink.finish()

    def _put(self, key: str, source: Source, ttl: float, deadline: float) -> Outcome:
        unit, part = _split(key)
        if not self._gate.is_open:
            return refused(self._gate.cause, self._gate.reason)
        if source.size > self._space.largest:
            return refused("size", f"an object of {source.size} bytes is larger than the tier")
        if not self._keeper.scanned.is_set():
            return failed("scanning", "the directory has not been listed yet")
        expires = _expires(source, ttl or self.settings.ttl)
        try:
            made = self._space.begin(unit, part, source.size, os.O_DIRECT if self._direct else 0, deadline)
        except OSError as error:
            return self._judge(error, source.size)
        try:
            self._write(made, source, expires, deadline)
        except OSError as error:
            self._drop(made)
            return self._judge(error, source.size)
        except BaseException:
            self._drop(made)
            raise
        return Outcome(Status.STORED, source.size)

    def _write(self, made: Temporary, source: Source, expires: float, deadline: float) -> None:
        write_object(made.fd, source, partial(_in_time, deadline), direct=self._direct)
        if self.settings.fsync:
            os.fsync(made.fd)
        self._space.commit(made, expires, deadline)
        if self.settings.fsync:
            os.fsync(self._files.directory(self._files.area_of(made.unit)))

    def _drop(self, made: Temporary) -> None:
        with suppress(OSError, LockBusy):
            self._space.drop(made, time.monotonic() + _GRACE_SECONDS)

    def _judge(self, error: OSError, size: int) -> Outcome:
        """What a failed write means for the object; raises what means more."""
        if self._gate.judge(error, size):
            return refused(self._gate.cause, f"{self.settings.directory}: {self._gate.reason}")
        if error.errno in _IN_THE_WAY:
            return refused("foreign", f"something foreign in {self.settings.directory} is in its way: {error.strerror}")
        if error.errno == errno.EFBIG:
            return refused("size", f"files of {size} bytes are not allowed here")
        raise error

    def _exists(self, key: str) -> Outcome:
        unit, part = _split(key)
        if self._index.has_expired(unit, part, time.time()):
            return MISSING
        # What the index says would not do: other processes, the ranks of this engine among them, delete and evict too.
        found = self._files.stat(unit, part)
        return Outcome(Status.FOUND, found.st_size) if found else MISSING

    def _delete(self, key: str, deadline: float) -> Outcome:
        return DELETED if self._space.delete(*_split(key), deadline) else MISSING

    def _quarantine(self, key: str, deadline: float) -> Outcome:
        return DELETED if self._space.quarantine(*_split(key), deadline) else MISSING

    def _page(self, area: int, limit: int) -> Page:
        entries: list[Entry] = []
        while area < QUARANTINE and len(entries) < limit:
            found = self._files.list_objects(area)
            entries += [Entry(key_of(each.unit, each.part), each.size, each.modified) for each in found]
            area += 1
        return Page(entries, str(area) if area < QUARANTINE else "")

    def _probe(self, deadline: float) -> None:
        try:
            self._space.probe(charge(1), deadline)
        except OSError as error:
            if not self._gate.judge(error, charge(1)):
                raise
            self._files.list_objects(0)

    def _area_of(self, cursor: str) -> int:
        if cursor and not (cursor.isdecimal() and int(cursor) < QUARANTINE):
            raise StoreUnavailable(self.name, "cursor", f"{cursor[:40]!r} is no cursor of this store")
        return int(cursor or 0)

    def _resolve_direct(self) -> bool:
        if self.settings.direct is False:
            return False
        able = supports_direct(self._files.fd)
        if self.settings.direct and not able:
            raise ConfigurationError(
                f"{self.settings.directory} is on a filesystem without direct I/O: leave it to be chosen"
            )
        return able

    # ---- on the tier's threads ----------------------------------------------------------------------------------

    def _run(
        self, crew: Crew, works: Sequence[Callable[[], Outcome]], lent: Sequence[Loan], deadline: float
    ) -> list[Outcome]:
        try:
            jobs = [self._submit(crew, partial(_outcome, work)) for work in works]
            return [self._outcome_of(crew, job, loan, deadline) for job, loan in zip(jobs, lent, strict=True)]
        finally:
            for loan in lent:
                loan.end()

    def _run_all(self, keys: Sequence[str], work: Callable[[str], Outcome], deadline: float) -> list[Outcome]:
        if not keys:
            return []
        job = self._submit(self._crew, lambda: [_outcome(partial(work, key)) for key in keys])
        return self._wait(job, deadline)

    def _submit(self, crew: Crew, work: Callable[[], T]) -> Job[T]:
        try:
            if self._closed:
                raise StoreUnavailable(self.name, "closed", "it was closed")
            return crew.submit(work)
        except CrewFull:
            raise StoreUnavailable(self.name, "busy", "too many operations are under way") from None

    def _wait(self, job: Job[T], deadline: float) -> T:
        if not self._crew.wait(job, deadline):
            raise StoreUnavailable(self.name, "timeout", "the disk did not answer within the deadline")
        with self._explained():
            return job.result()

    def _outcome_of(self, crew: Crew, job: Job[Outcome], loan: Loan, deadline: float) -> Outcome:
        if crew.wait(job, deadline):
            with self._explained():
                return job.result()
        loan.end()
        return failed("timeout", "the disk did not answer within the deadline")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the disk says, as what it means for the store."""
        try:
            yield
        except LockBusy:
            raise StoreUnavailable(self.name, "busy", "other engines kept its directory locked") from None
        except OSError as error:
            where = self.settings.directory
            raise StoreUnavailable(self.name, "io", f"{where}: {error.strerror or error}") from error


def _outcome(work: Callable[[], Outcome]) -> Outcome:
    """What concerns one key only, as its outcome."""
    try:
        return work()
    except (TimeoutError, LoanEnded):
        return failed("timeout", "the disk did not answer within the deadline")
    except LockBusy:
        return failed("busy", "other engines kept the directory locked until the deadline")
    except NoRoom as error:
        return refused("room", str(error))
    except ValueError as error:
        return failed("key", str(error))
    except OSError as error:
        if error.errno in _SCARCE:
            return failed("resources", error.strerror or "resources are scarce")
        raise


def _split(key: str) -> tuple[bytes, str]:
    """Unit and part of an object's key.

    Raises:
        ValueError: it is none.
    """
    found = parse_name(key + SUFFIX)
    if found is None:
        raise ValueError(f"{key[:120]!r} is no object's key")
    return found


def _good_units(keys: Sequence[str], outcomes: Sequence[Outcome]) -> list[bytes]:
    """From the last to the first."""
    return [_split(key)[0] for key, outcome in zip(reversed(keys), reversed(outcomes), strict=True) if outcome.ok]


def _in_time(deadline: float) -> bool:
    return time.monotonic() < deadline


def _expires(source: Source, ttl: float) -> float:
    """When an object expires, by its own header and by what the store was told; seconds since the epoch."""
    told = time.time() + ttl if ttl else math.inf
    with source.borrow() as views:
        block = b"".join(bytes(view[:HEADER_BYTES]) for view in views[:2])[:HEADER_BYTES]
    with suppress(BadObject):
        return min(told, read_header(block).expires)
    return told
