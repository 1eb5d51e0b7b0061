"""What operators changed while the gateway runs: settings, workers added, removed, drained, and leases.

It is one value that is only ever replaced as a whole. With one process it lives in memory; several processes share it
as a file, changed under a lock, and every process makes itself as the file says.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from pydantic import SecretStr

from router.config import WorkerSpec
from router.errors import Unavailable

LOCK_TIMEOUT_S = 2.0


class Entry(msgspec.Struct, frozen=True):
    """A worker added through the API. ``ttl`` in seconds, 0 without a lease; ``until`` on the monotonic clock, which
    all processes of a machine share."""

    spec: dict[str, str]
    ttl: float = 0.0
    until: float = 0.0

    def expired(self, now: float) -> bool:
        return bool(self.ttl) and now >= self.until

    def worker(self) -> WorkerSpec:
        return WorkerSpec.model_validate(self.spec)


class AdminState(msgspec.Struct, frozen=True):
    """``workers`` is keyed by URL; ``removed`` and ``drained`` hold URLs."""

    version: int = 0
    overrides: dict[str, Any] = {}
    workers: dict[str, Entry] = {}
    removed: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()

    def replace(self, **members: Any) -> "AdminState":
        """The same with other members, and the next version."""
        return msgspec.structs.replace(self, version=self.version + 1, **members)

    def with_worker(self, spec: WorkerSpec, ttl: float) -> "AdminState":
        """A worker added, or its lease renewed."""
        entry = Entry(_members(spec), ttl, time.monotonic() + ttl if ttl else 0.0)
        return self.replace(workers={**self.workers, spec.url: entry}, removed=self.removed - {spec.url})

    def without_worker(self, url: str, *, overrule: bool) -> "AdminState":
        """A worker removed by hand; ``overrule`` where others than the API want it."""
        workers = {key: entry for key, entry in self.workers.items() if key != url}
        removed = self.removed | {url} if overrule else self.removed
        return self.replace(workers=workers, removed=removed, drained=self.drained - {url})

    def with_drain(self, url: str, *, drain: bool) -> "AdminState":
        return self.replace(drained=self.drained | {url} if drain else self.drained - {url})

    def without_expired(self, now: float) -> "AdminState":
        """The same object where no lease has ended."""
        kept = {url: entry for url, entry in self.workers.items() if not entry.expired(now)}
        return self if len(kept) == len(self.workers) else self.replace(workers=kept)


Change = Callable[[AdminState], AdminState]


def _members(spec: WorkerSpec) -> dict[str, str]:
    values = {name: getattr(spec, name) for name in spec.model_fields_set}
    return {name: v.get_secret_value() if isinstance(v, SecretStr) else str(v) for name, v in values.items()}


class Store(Protocol):
    """Where the state is."""

    async def read(self) -> AdminState: ...

    async def update(self, change: Change) -> AdminState:
        """The state after ``change``, which may raise and then changes nothing; no two changes overlap."""
        ...


class Memory:
    """The state of a gateway of one process."""

    def __init__(self) -> None:
        self._state = AdminState()

    async def read(self) -> AdminState:
        return self._state

    async def update(self, change: Change) -> AdminState:
        self._state = change(self._state)
        return self._state


class SharedFile:
    """The state in a directory that the processes of one gateway share."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "admin.json"
        self._lock = directory / "admin.lock"
        self._seen: tuple[int, int] = (0, 0)
        self._state = AdminState()

    async def read(self) -> AdminState:
        return self._read()

    async def update(self, change: Change) -> AdminState:
        """Raises:
        Unavailable: another process kept the lock for too long.
        """
        with self._lock.open("a") as lock:
            await _locked(lock.fileno())
            before = self._read()
            after = change(before)
            if after is not before:
                self._write(after)
            return after

    def _read(self) -> AdminState:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return self._state
        if (signature := (stat.st_ino, stat.st_mtime_ns)) != self._seen:
            self._state = msgspec.json.decode(self._path.read_bytes(), type=AdminState)
            self._seen = signature
        return self._state

    def _write(self, state: AdminState) -> None:
        beside = self._path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(msgspec.json.encode(state))
        beside.replace(self._path)


async def _locked(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise Unavailable("another process of the gateway holds the admin state: try again") from error
            await asyncio.sleep(0.005)
        else:
            return
