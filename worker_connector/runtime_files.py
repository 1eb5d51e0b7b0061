"""Where running report servers say how to reach them, for programs of the same user on the same machine.

One file per server in a directory that only its user can enter: process id and start time (so that a reused id is not
mistaken for it), the ids of its ancestors, address, token. Removed when the server closes; files of dead processes are
passed over and cleaned up by the next reader.
"""

import contextlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

_log = logging.getLogger("vllm.warmroute.report")


@dataclass(frozen=True)
class Running:
    """A report server that runs now. ``ancestors`` are its process's parent, grandparent and so on."""

    pid: int
    started: str
    ancestors: list[int]
    host: str
    port: int
    token: str


class RuntimeFile:
    """One server's file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @classmethod
    def write(cls, host: str, port: int, *, token: str) -> Self:
        """Announce a server of this process. Where the directory cannot be used, a warning is logged instead."""
        pid = os.getpid()
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        record = Running(pid, _start_time(pid) or "", ancestors(pid), reachable, port, token)
        try:
            directory = _directory(create=True)
            path = directory / f"{pid}-{port}.json"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - from a descriptor
                json.dump(asdict(record), file)
        except OSError as error:
            _log.warning("get_cache_stats() will need an address, because no runtime file could be written: %s", error)
            return cls(None)
        return cls(path)

    def remove(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def running() -> Iterator[Running]:
    """Every report server of this user that is alive."""
    try:
        directory = _directory(create=False)
        paths = sorted(directory.glob("*.json"))
    except OSError:
        return
    for path in paths:
        record = _read(path)
        if record is None:
            continue
        if _start_time(record.pid) == record.started:
            yield record
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def ancestors(pid: int) -> list[int]:
    """Process ids of the parent, grandparent and so on, as far as they can be told."""
    found: list[int] = []
    while (fields := _stat_fields(pid)) is not None and (pid := int(fields[1])) > 0 and pid not in found:
        found.append(pid)
    return found


def _directory(*, create: bool) -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(base) / "warmroute" if base else Path(tempfile.gettempdir()) / f"warmroute-{os.getuid()}"
    if create:
        directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{directory} must be a directory that belongs to this user with mode 0700")
    return directory


def _read(path: Path) -> Running | None:
    try:
        return Running(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _start_time(pid: int) -> str | None:
    fields = _stat_fields(pid)
    return fields[19] if fields is not None else None


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the process's state on (proc_pid_stat(5)); None when there is no such process."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command's name stands in parentheses and may hold anything, parentheses included.
    return line.rpartition(")")[2].split()
