"""How many bytes the directory of a disk tier holds, agreed on by all engines that share it.

A file has one number for each area of the directory; their sum is what the bound is held against. Whoever adds or
removes a file does so under the file lock, together with changing the number. Before an area is changed it is marked:
should the process die in between, the next holder of the lock finds the mark and counts that area again. The lock is
``flock``'s, which ends with its process.

    0   8 bytes   "WRDISK1\\n"
    8   u32       the marked area plus one, 0 for none
    12  u32       0
    16  258 u64   bytes in each area
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from worker_connector.tiers.disk_files import AREAS, Files

_MAGIC = b"WRDISK1\n"
_FORM = struct.Struct(f"<8sII{AREAS}Q")
_PAUSES = (0.0002, 0.005)
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class LockBusy(Exception):
    """Another engine, or another thread, held the lock until the deadline."""


class Held:
    """The account, while its lock is held."""

    def __init__(self, fd: int, areas: list[int], marked: int) -> None:
        self._fd = fd
        self._areas = areas
        self.marked = marked
        self._changed = False

    @property
    def total(self) -> int:
        return sum(self._areas)

    def __getitem__(self, area: int) -> int:
        return self._areas[area]

    def mark(self, area: int) -> None:
        """``area`` is about to be changed. Comes before the change of a file."""
        if self.marked != area:
            self._write(area)

    def add(self, area: int, change: int) -> None:
        """Files of ``area``, which is marked, take so many bytes more."""
        self._areas[area] = max(0, self._areas[area] + change)

    def settle(self, area: int, used: int) -> None:
        """``area`` was counted."""
        if self._areas[area] != used:
            self._areas[area] = used
            self._changed = True

    def finish(self) -> None:
        if self.marked >= 0 or self._changed:
            self._write(-1)

    def _write(self, marked: int) -> None:
        os.pwrite(self._fd, _FORM.pack(_MAGIC, marked + 1, 0, *self._areas), 0)
        self.marked = marked
        self._changed = False


class Account:
    """``count`` counts an area: it is called for one that was left marked, and for each of a new or damaged account."""

    def __init__(self, files: Files, count: Callable[[int], int]) -> None:
        self._files = files
        self._count = count
        self._thread_lock = threading.Lock()
        self._fd = -1
        _accounts.add(self)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    @contextmanager
    def hold(self, deadline: float) -> Iterator[Held]:
        """The account under its lock. If the block fails, what it marked stays marked and is counted by the next.

        Raises:
            LockBusy: the lock was not to be had until the deadline.
            OSError: the file cannot be read or written.
        """
        if not self._thread_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise LockBusy
        try:
            self._lock_file(deadline)
            try:
                held = self._read()
                yield held
                held.finish()
            finally:
                if self._fd >= 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def _lock_file(self, deadline: float) -> None:
        pause = _PAUSES[0]
        while True:
            if self._fd < 0:
                self._fd = os.open("account", _OPEN, 0o600, dir_fd=self._files.fd)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() + pause > deadline:
                    raise LockBusy from None
                time.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
                continue
            if self._is_current():
                return
            os.close(self._fd)
            self._fd = -1

    def _is_current(self) -> bool:
        """Whether the file is still the one of that name: somebody may have removed it."""
        try:
            named = os.stat("account", dir_fd=self._files.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._fd))

    def _read(self) -> Held:
        data = os.pread(self._fd, _FORM.size, 0)
        if len(data) == _FORM.size:
            magic, marked, zero, *areas = _FORM.unpack(data)
            if magic == _MAGIC and marked <= AREAS and not zero:
                held = Held(self._fd, areas, marked - 1)
                if marked:
                    held.settle(marked - 1, self._count(marked - 1))
                return held
        return self._made()

    def _made(self) -> Held:
        os.ftruncate(self._fd, _FORM.size)
        held = Held(self._fd, [0] * AREAS, -1)
        for area in range(AREAS):
            held.settle(area, self._count(area))
        held.mark(0)  # written now, even if there is nothing in it
        return held

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, and stays with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._thread_lock = threading.Lock()


_accounts: "WeakSet[Account]" = WeakSet()


def _forget_all() -> None:
    for account in list(_accounts):
        account.forget()


os.register_at_fork(after_in_child=_forget_all)
