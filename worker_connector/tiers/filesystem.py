"""Objects in a directory that several machines share: NFS, Lustre, CephFS, a Kubernetes volume.

    <root>/<xx>/<key>.object           xx is the first byte of a hash of the key
    <root>/<xx>/.<key>.<random>.tmp    an object that is being written

An object gets its name when it is whole, by ``rename``, which replaces atomically on one file system (rename(2)). Nothing
here locks, and nothing bounds the directory: a share of unknown machines has its own quota, and is cleaned by age (``ttl``
hides what is older, a scan removes it and the leavings of writers that died). Calls to a server that hangs cannot be
interrupted: ``Guarded`` gives up on them, and what they still read or write is a buffer of this module.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    remaining,
)

_SUFFIX = ".object"
_TEMPORARY = ".tmp"
_PIECE_BYTES = 1 << 20
_ABANDONED_SECONDS = 3600.0
_SHARDS = 256
_MOST_NAME_BYTES = 200

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GONE = {errno.ENOENT, errno.ESTALE}
_OF_ONE_OBJECT = {errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EUCLEAN}
_REASONS = {
    errno.EACCES: ("auth", "access is denied: see the directory's owner and mode"),
    errno.EPERM: ("auth", "access is denied: see the directory's owner and mode"),
    errno.EROFS: ("readonly", "it is mounted read-only"),
    errno.ENOTCONN: ("unreachable", "its file system is not connected: mount it again"),
    errno.EHOSTDOWN: ("unreachable", "its server is down"),
    errno.ETIMEDOUT: ("timeout", "its server does not answer"),
    errno.ESTALE: ("stale", "the directory was replaced on its server: mount it again"),
    errno.ENOENT: ("missing", "the directory is gone: make it again, or mount it"),
    errno.EIO: ("io", "reading or writing fails: see the kernel's log"),
    errno.EMFILE: ("files", "this process has too many open files: raise its limit (ulimit -n)"),
}

_local = threading.local()


@dataclass(frozen=True, kw_only=True)
class DirectorySettings:
    """``ttl`` is in seconds, 0 for none. ``sync`` waits until an object is on stable storage before it gets its name."""

    path: Path
    ttl: float = 0.0
    sync: bool = False
    name: str = ""


class DirectoryStore(Store):
    """The directory must exist: one that is made where a mount is missing would fill the machine's own disk."""

    def __init__(self, settings: DirectorySettings) -> None:
        self.name = settings.name or f"file://{settings.path}"
        self._root = settings.path
        self._settings = settings
        self._closed = False

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        return self._each([partial(self._get, key, sink, deadline) for key, sink in zip(keys, into, strict=True)])

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        """A ``ttl`` for one put is kept by the object's own header only."""
        del ttl
        return self._each([partial(self._put, key, value, deadline) for key, value in zip(keys, values, strict=True)])

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._each([partial(self._exists, key, deadline) for key in keys])

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._each([partial(self._delete, key, deadline) for key in keys])

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """A page is one shard, however many objects it has; the cursor is the next shard's number."""
        del limit
        shard = int(cursor or "0")
        remaining(deadline, self.name)
        try:
            self._check_root()
            entries = list(self._entries(self._root / f"{shard:02x}"))
        except OSError as error:
            raise self._unavailable(error) from error
        return Page(entries, str(shard + 1) if shard + 1 < _SHARDS else "")

    def ping(self, deadline: float) -> None:
        """A file can be written, and the directory read."""
        remaining(deadline, self.name)
        probe = self._root / f".{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            self._check_root()
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            if error.errno in _FULL:
                return  # what is there can still be read
            raise self._unavailable(error) from error

    def close(self) -> None:
        self._closed = True

    # One object.

    def _get(self, key: str, sink: Sink, deadline: float) -> Outcome:
        sink.rewind()
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in _GONE:
                return MISSING
            raise
        try:
            status = os.fstat(fd)
            if self._expired(status.st_mtime):
                return MISSING
            if status.st_size > sink.size:
                return sink.too_small(status.st_size)
            return self._read(fd, status.st_size, sink, deadline)
        except OSError as error:
            if error.errno == errno.ESTALE:
                return MISSING  # another machine replaced or removed it meanwhile
            raise
        finally:
            os.close(fd)

    def _read(self, fd: int, size: int, sink: Sink, deadline: float) -> Outcome:
        buffer = _buffer()
        while sink.filled < size:
            remaining(deadline, self.name)
            taken = os.readv(fd, [buffer[: min(_PIECE_BYTES, size - sink.filled)]])
            if not taken:
                return failed("short", f"{sink.filled} of {size} bytes are there")
            sink.write(buffer[:taken])
        return sink.finish()

    def _put(self, key: str, value: Source, deadline: float) -> Outcome:
        path = self._path(key)
        temporary = path.parent / f".{key}.{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            fd = self._create(temporary)
            try:
                self._write(fd, value, deadline)
            finally:
                os.close(fd)
            remaining(deadline, self.name)
            with value.borrow():  # what was given up meanwhile gets no name
                pass
            temporary.rename(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                return refused("full", "it is full, or its quota is used up")
            raise
        return Outcome(Status.STORED, value.size)

    def _create(self, temporary: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(temporary, flags, 0o660)
        except FileNotFoundError:
            self._check_root()
            temporary.parent.mkdir(mode=0o770, exist_ok=True)
            return os.open(temporary, flags, 0o660)

    def _write(self, fd: int, value: Source, deadline: float) -> None:
        buffer, at = _buffer(), 0
        while taken := value.copy(at, buffer):
            piece = buffer[:taken]
            while piece.nbytes:
                remaining(deadline, self.name)
                piece = piece[os.write(fd, piece) :]
            at += taken
        if self._settings.sync:
            os.fsync(fd)

    def _exists(self, key: str, deadline: float) -> Outcome:
        remaining(deadline, self.name)
        try:
            status = self._path(key).lstat()
        except OSError as error:
            if error.errno in _GONE:
                return MISSING
            raise
        return MISSING if self._expired(status.st_mtime) else Outcome(Status.FOUND, status.st_size)

    def _delete(self, key: str, deadline: float) -> Outcome:
        remaining(deadline, self.name)
        try:
            self._path(key).unlink()
        except OSError as error:
            if error.errno in _GONE:
                return MISSING
            raise
        return DELETED

    # The directory.

    def _path(self, key: str) -> Path:
        if "/" in key or key.startswith(".") or not 0 < len(key.encode()) <= _MOST_NAME_BYTES or "\0" in key:
            raise ValueError(f"{key[:120]!r} is no key that a file can be named by")
        return self._root / hashlib.blake2b(key.encode(), digest_size=1).hexdigest() / f"{key}{_SUFFIX}"

    def _check_root(self) -> None:
        """
        Raises:
            OSError: there is no such directory; a mount that went away often leaves none, or an error.
        """
        if not os.path.isdir(self._root):  # noqa: PTH112 - the same call, and one that says why below
            os.stat(self._root)  # noqa: PTH116
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _entries(self, shard: Path) -> Iterator[Entry]:
        """The objects of a shard. Removes what has expired, and what writers left that died."""
        try:
            found = os.scandir(shard)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise
        with found:
            for each in found:
                with contextlib.suppress(FileNotFoundError):
                    if entry := self._entry(each):
                        yield entry

    def _entry(self, found: "os.DirEntry[str]") -> Entry | None:
        if not found.is_file(follow_symlinks=False):
            return None
        status = found.stat(follow_symlinks=False)
        if found.name.startswith(".") and found.name.endswith(_TEMPORARY):
            if time.time() > status.st_mtime + _ABANDONED_SECONDS:
                os.unlink(found.path)  # noqa: PTH108
            return None
        if not found.name.endswith(_SUFFIX):
            return None
        if self._expired(status.st_mtime):
            os.unlink(found.path)  # noqa: PTH108
            return None
        return Entry(found.name.removesuffix(_SUFFIX), status.st_size, status.st_mtime)

    def _expired(self, modified: float) -> bool:
        return bool(self._settings.ttl) and time.time() > modified + self._settings.ttl

    # Deadlines and errors.

    def _each(self, works: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
        """One object after the other; after what concerns the whole store, such as the deadline, the rest has failed."""
        if self._closed:
            raise StoreUnavailable(self.name, "closed", "it was closed")
        outcomes: list[Outcome] = []
        for work in works:
            try:
                outcomes.append(self._one(work))
            except (OSError, StoreUnavailable) as error:
                problem = error if isinstance(error, StoreUnavailable) else self._unavailable(error)
                if not outcomes:
                    raise problem from error
                late = failed(problem.cause, str(problem))
                return outcomes + [late] * (len(works) - len(outcomes))
        return outcomes

    def _one(self, work: Callable[[], Outcome]) -> Outcome:
        try:
            return work()
        except OSError as error:
            if error.errno not in _OF_ONE_OBJECT:
                raise
            return failed("io", self._unavailable(error).args[0])

    def _unavailable(self, error: OSError) -> StoreUnavailable:
        usual = ("io", os.strerror(error.errno) if error.errno else type(error).__name__)
        return StoreUnavailable(self.name, *_REASONS.get(error.errno or 0, usual))


def _buffer() -> memoryview:
    """This thread's piece."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, _PIECE_BYTES))
    return _local.buffer  # type: ignore[no-any-return]
