"""The directory of a disk tier: names, and the few operations that its files go through.

    <root>/account                  what engines share (``disk_account``)
    <root>/00 … ff/<key>.object     objects, by the first byte of the chunk's hash
    <root>/xx/.<key>.<random>.tmp   an object that is being written, locked by its writer
    <root>/quarantine/              objects that proved bad

Every path below the root is opened relative to an open directory and never through a symbolic link. Directories are
0700 and files 0600. Whatever else lies there is foreign: left alone, and counted.
"""

import contextlib
import fcntl
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from worker_connector.errors import ConfigurationError

PAGE = 4096
AREAS = 258
"""Parts of the directory that are accounted for one by one: the shards, the quarantine, and the rest."""
QUARANTINE = 256
REST = 257
SUFFIX = ".object"
UNIT_BYTES = 32

_TEMPORARY = re.compile(r"\.w1-[0-9a-z-]+\.[0-9a-f]{16}\.tmp")
_PART = re.compile(r"(0|[1-9]\d{0,4})of([1-9]\d{0,4})-([1-9a-f][0-9a-f]{0,15})")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_FOREIGN = 20_000
_DEEPEST_FOREIGN = 8
_LISTED_AT_ONCE = 48
_BREATH_SECONDS = 0.0002


class Found(NamedTuple):
    """An object met in a shard. ``unit`` is identity and chunk hash; ``part`` is the rest of its key."""

    unit: bytes
    part: str
    size: int
    modified: float


class Shard(NamedTuple):
    """What a shard holds: ``used`` bytes in all, temporary and foreign files included."""

    objects: list[Found]
    used: int
    foreign: int
    removed: int


def charge(size: int) -> int:
    """Bytes that a file of ``size`` bytes takes: whole pages."""
    return -(-size // PAGE) * PAGE


def unit_of(key: str) -> bytes:
    """Identity and chunk hash of an object's key. ``key`` must be one."""
    return bytes.fromhex(key[3:35] + key[36:68])


def key_of(unit: bytes, part: str) -> str:
    text = unit.hex()
    return f"w1-{text[:32]}-{text[32:]}-{part}"


@lru_cache(maxsize=4096)
def is_part(text: str) -> bool:
    """Whether ``text`` is the end of a key: ``<rank>of<ranks>-<groups>``."""
    match = _PART.fullmatch(text)
    return match is not None and int(match[1]) < int(match[2]) < 1 << 16


def parse_name(name: str) -> tuple[bytes, str] | None:
    """Unit and part of an object's file name, None for any other name."""
    if not (name.endswith(SUFFIX) and name.startswith("w1-") and name[35:36] == "-" == name[68:69]):
        return None
    part = name[69 : -len(SUFFIX)]
    identity, chunk = name[3:35], name[36:68]
    if not is_part(part) or not _is_hex(identity) or not _is_hex(chunk):
        return None
    return bytes.fromhex(identity + chunk), part


def _is_hex(text: str) -> bool:
    return len(text) == 32 and not text.strip("0123456789abcdef")


class Files:
    """The directory ``root``, made if only its last part is missing.

    Raises:
        ConfigurationError: it cannot be used; the text says why and what to do.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fd = -1
        self._lock = threading.Lock()
        self._directories: dict[str, int] = {}
        self.fd = _open_root(root)

    def __del__(self) -> None:
        # Not before the last operation has ended: its next step would go to whatever got the descriptor's number.
        for fd in (*self._directories.values(), self.fd):
            if fd >= 0:
                os.close(fd)

    # ---- directories --------------------------------------------------------------------------------------------

    @staticmethod
    def area_of(unit: bytes) -> int:
        """The shard of a unit: the first byte of its chunk's hash."""
        return unit[16]

    def directory(self, area: int) -> int:
        """A descriptor of a shard's or of the quarantine's directory, made where it is missing.

        Raises:
            OSError: it cannot be made or opened, or is a symbolic link.
        """
        name = "quarantine" if area == QUARANTINE else f"{area:02x}"
        with self._lock:
            fd = self._directories.get(name)
            if fd is not None and os.fstat(fd).st_nlink:
                return fd
            if fd is not None:  # somebody removed the directory under us
                os.close(self._directories.pop(name))
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fd)
            self._directories[name] = os.open(name, _DIRECTORY, dir_fd=self.fd)
            return self._directories[name]

    def has_directory(self, area: int) -> bool:
        """Whether a shard's directory is there, without making it."""
        name = "quarantine" if area == QUARANTINE else f"{area:02x}"
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def changed(self, area: int) -> int:
        """A number that is another one when names came to or left a shard; 0 when it is not there."""
        return os.fstat(self.directory(area)).st_mtime_ns if self.has_directory(area) else 0

    # ---- objects ------------------------------------------------------------------------------------------------

    def open(self, unit: bytes, part: str, flags: int = 0) -> int:
        """A descriptor to read an object.

        Raises:
            FileNotFoundError: it is not there, or something else is there that is no regular file.
            OSError: it cannot be opened.
        """
        area = self.area_of(unit)
        name = key_of(unit, part) + SUFFIX
        flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        if not self.has_directory(area):
            raise FileNotFoundError(name)
        try:
            fd = os.open(name, flags, dir_fd=self.directory(area))
        except OSError:
            if self.stat(unit, part) is None:
                raise FileNotFoundError(name) from None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileNotFoundError(f"{name} is no regular file")
        return fd

    def stat(self, unit: bytes, part: str) -> os.stat_result | None:
        """The status of an object's file, None where there is none."""
        area = self.area_of(unit)
        if not self.has_directory(area):
            return None
        try:
            found = os.stat(key_of(unit, part) + SUFFIX, dir_fd=self.directory(area), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def create(self, unit: bytes, part: str, size: int, flags: int = 0) -> tuple[int, str]:
        """A temporary file of ``size`` bytes, locked for as long as its descriptor is open; descriptor and name.

        Raises:
            OSError: it cannot be made.
        """
        directory = self.directory(self.area_of(unit))
        name = f".{key_of(unit, part)}.{secrets.token_hex(8)}.tmp"
        fd = os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=directory
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, size)
        except BaseException:
            os.unlink(name, dir_fd=directory)
            os.close(fd)
            raise
        return fd, name

    def publish(self, temporary: str, unit: bytes, part: str) -> None:
        """Give a written temporary file its object's name, atomically, in the place of an older one."""
        directory = self.directory(self.area_of(unit))
        os.replace(temporary, key_of(unit, part) + SUFFIX, src_dir_fd=directory, dst_dir_fd=directory)

    def remove(self, area: int, name: str) -> int:
        """Remove a file by its name; the bytes it took, 0 if it was not there."""
        directory = self.directory(area)
        try:
            taken = charge(os.stat(name, dir_fd=directory, follow_symlinks=False).st_size)
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return 0
        return taken

    def remove_object(self, unit: bytes, part: str) -> int:
        """Remove an object; the bytes it took, 0 if it was not there."""
        area = self.area_of(unit)
        return self.remove(area, key_of(unit, part) + SUFFIX) if self.has_directory(area) else 0

    def quarantine(self, unit: bytes, part: str, stamp: int) -> int:
        """Move an object to the quarantine; the bytes it takes, 0 if it was not there."""
        found = self.stat(unit, part)
        if found is None:
            return 0
        name = key_of(unit, part)
        source, target = self.directory(self.area_of(unit)), self.directory(QUARANTINE)
        os.replace(name + SUFFIX, f"{stamp:020d}-{name}", src_dir_fd=source, dst_dir_fd=target)
        return charge(found.st_size)

    # ---- listing ------------------------------------------------------------------------------------------------

    def list_shard(self, area: int) -> Shard:
        """A shard's objects and all its bytes. Temporary files of writers that are dead are removed; those of living
        ones are locked. The caller holds the account's lock, so that no name comes or goes meanwhile.

        About 4 µs per file.
        """
        objects: list[Found] = []
        used = foreign = removed = 0
        for name, status in self._entries(area):
            parsed = parse_name(name) if stat.S_ISREG(status.st_mode) else None
            if parsed is not None and self.area_of(parsed[0]) == area:
                objects.append(Found(*parsed, status.st_size, status.st_mtime))
            elif _TEMPORARY.fullmatch(name):
                if self._remove_if_dead(area, name):
                    removed += 1
                    continue
            else:
                foreign += 1
            used += charge(status.st_size)
        return Shard(objects, used, foreign, removed)

    def list_objects(self, area: int) -> list[Found]:
        """A shard's objects, as they are found; names may come and go meanwhile."""
        found = []
        for name, status in self._entries(area):
            parsed = parse_name(name) if stat.S_ISREG(status.st_mode) else None
            if parsed is not None:
                found.append(Found(*parsed, status.st_size, status.st_mtime))
        return found

    def list_quarantine(self) -> list[tuple[str, int]]:
        """Names and bytes of the bad objects that are kept, the oldest first."""
        return sorted((name, charge(status.st_size)) for name, status in self._entries(QUARANTINE))

    def weigh_rest(self) -> tuple[int, int]:
        """Bytes and number of all files outside the shards and the quarantine, other than the tier's own, which are
        among the bytes. Looks at no more than 20,000 of them, and follows no link."""
        own = {"quarantine", *(f"{area:02x}" for area in range(256))}
        used = count = 0
        for path, directories, names, fd in os.fwalk(".", dir_fd=self.fd, follow_symlinks=False):
            depth = path.count("/")
            directories[:] = [] if depth >= _DEEPEST_FOREIGN else [n for n in directories if depth or n not in own]
            for name in names:
                with contextlib.suppress(OSError):  # of a directory that may be listed and not searched, too
                    used += charge(os.stat(name, dir_fd=fd, follow_symlinks=False).st_size)
                    count += 1
            if count > _MOST_FOREIGN:
                break
        return used, count

    def _entries(self, area: int) -> Iterator[tuple[str, os.stat_result]]:
        if not self.has_directory(area):
            return
        # Opened anew: all copies of one descriptor read on from one place, and two listings would share the names.
        directory = os.open(".", _DIRECTORY, dir_fd=self.directory(area))
        try:
            with os.scandir(directory) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % _LISTED_AT_ONCE == 0:
                        time.sleep(_BREATH_SECONDS)  # the engine's threads wait for the interpreter's lock
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)
        finally:
            os.close(directory)

    def _remove_if_dead(self, area: int, name: str) -> bool:
        directory = self.directory(area)
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=directory)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


def _open_root(root: Path) -> int:
    try:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigurationError(
            f"cache_dir is {root}, but {root.parent} does not exist: mount or make it, or name another directory"
        ) from None
    except NotADirectoryError:
        raise ConfigurationError(f"cache_dir is {root}, which is no directory: name another one") from None
    except OSError as error:
        raise ConfigurationError(f"cache_dir is {root}, which cannot be used: {error.strerror}") from error
    try:
        name = f".write-test-{secrets.token_hex(8)}"
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd))
        os.unlink(name, dir_fd=fd)
    except OSError as error:
        os.close(fd)
        raise ConfigurationError(
            f"cache_dir is {root}, which cannot be written to ({error.strerror}): let the engine's user (uid "
            f"{os.geteuid()}) write there, or name another directory"
        ) from error
    return fd
