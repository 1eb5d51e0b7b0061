"""What is in a disk tier's directory, and room for more.

Every change of a name happens here, under the account's lock, with the account changed alike and the index told.
"""

import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from worker_connector.tiers.disk_account import Account, Held
from worker_connector.tiers.disk_files import PAGE, QUARANTINE, REST, Files, Found, charge
from worker_connector.tiers.disk_index import Index

_LEARN_SECONDS = 5.0
_UNREAD = 1 << 20


Listed: TypeAlias = tuple[float, bytes, str, int]
"""When it was modified, unit, part and size: a plain tuple, which the garbage collector need not visit."""


class NoRoom(Exception):
    """Nothing that may go would make enough room."""


@dataclass(kw_only=True)
class Temporary:
    """An object on its way in: an open, locked file under a name that no reader looks for."""

    unit: bytes
    part: str
    size: int
    fd: int = -1
    name: str = ""

    def close(self) -> None:
        """Close the descriptor, once: later its number is another file's."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Space:
    """``max_bytes`` bound everything below the root but directories; one page of it is kept for probes."""

    def __init__(self, files: Files, index: Index, max_bytes: int, quarantine_bytes: int) -> None:
        self.account = Account(files, self.count)
        self.unread: deque[tuple[bytes, str]] = deque(maxlen=_UNREAD)
        self.first_scan: dict[int, list[Listed]] | None = {}
        self.foreign = [0] * (REST + 1)
        self.evictions = self.expirations = self.quarantined = self.removed = 0
        self._files = files
        self._index = index
        self._limit = max_bytes - PAGE
        self._quarantine_bytes = min(quarantine_bytes, max_bytes // 20)
        self._learned = float("-inf")

    @property
    def largest(self) -> int:
        """The largest object there could be room for."""
        return self._limit - 2 * PAGE

    # ---- objects coming and going -------------------------------------------------------------------------------

    def begin(self, unit: bytes, part: str, size: int, flags: int, deadline: float) -> Temporary:
        """A file for an object of ``size`` bytes, after evicting what is in its way.

        Raises:
            NoRoom: there is none.
            LockBusy: others worked on the directory until the deadline.
            OSError: the disk failed, or is full.
        """
        area, made = self._files.area_of(unit), Temporary(unit=unit, part=part, size=size)
        try:
            with self.account.hold(deadline) as held:
                self._make_room(held, charge(size))
                held.mark(area)
                made.fd, made.name = self._files.create(unit, part, size, flags)
                held.add(area, charge(size))
        except BaseException:
            made.close()  # not locked any more, it goes when its shard is counted
            raise
        return made

    def commit(self, made: Temporary, expires: float, deadline: float) -> None:
        """Make a written object visible.

        Raises:
            LockBusy, OSError: as ``begin``. It is not visible then, and to be dropped.
        """
        area = self._files.area_of(made.unit)
        with self.account.hold(deadline) as held:
            held.mark(area)
            older = self._files.stat(made.unit, made.part)
            self._files.publish(made.name, made.unit, made.part)
            held.add(area, -charge(older.st_size) if older else 0)
            self._index.add(made.unit, made.part, charge(made.size), expires)
        made.close()

    def drop(self, made: Temporary, deadline: float) -> None:
        """Give up an object that was begun. If that fails, whoever counts its shard next removes it: it is not locked
        any more.

        Raises:
            LockBusy, OSError: as ``begin``.
        """
        area = self._files.area_of(made.unit)
        try:
            with self.account.hold(deadline) as held:
                held.mark(area)
                held.add(area, -self._files.remove(area, made.name))
        finally:
            made.close()

    def delete(self, unit: bytes, part: str, deadline: float) -> bool:
        """Remove an object; whether it was there.

        Raises:
            LockBusy, OSError: as ``begin``.
        """
        with self.account.hold(deadline) as held:
            taken = self._remove(held, unit, part)
            self._index.remove(unit, part)
            return taken > 0

    def quarantine(self, unit: bytes, part: str, deadline: float) -> bool:
        """Keep a bad object where nobody loads it from, for inspection; whether it was there.

        Raises:
            LockBusy, OSError: as ``begin``.
        """
        with self.account.hold(deadline) as held:
            self._index.remove(unit, part)
            found = self._files.stat(unit, part)
            if found is None:
                return False
            self.quarantined += 1
            if charge(found.st_size) > self._quarantine_bytes:
                return self._remove(held, unit, part) > 0
            self._trim_quarantine(held, self._quarantine_bytes - charge(found.st_size))
            # Counted there before it is moved: should we die in between, too much is counted and not too little.
            held.mark(QUARANTINE)
            held.add(QUARANTINE, charge(found.st_size))
            area = self._files.area_of(unit)
            held.mark(area)
            held.add(area, -self._files.quarantine(unit, part, time.time_ns()))
            return True

    def expire(self, area: int, now: float, deadline: float) -> None:
        """Remove a shard's objects that have expired.

        Raises:
            LockBusy, OSError: as ``begin``.
        """
        due = self._index.due(area, now)
        if due:
            with self.account.hold(deadline) as held:
                for unit, part in due:
                    self._remove(held, unit, part)
                    self._index.remove(unit, part)
            self.expirations += len(due)

    def enforce(self, deadline: float, most: int = 64) -> bool:
        """Evict up to ``most`` units while the bound is exceeded; whether it still is."""
        with self.account.hold(deadline) as held:
            for _ in range(most):
                if held.total <= self._limit:
                    return False
                if not self._evict_one(held):
                    self._trim_quarantine(held, 0)
                    return False
            return held.total > self._limit

    def probe(self, size: int, deadline: float) -> None:
        """Find out whether the disk takes ``size`` bytes more, or what the bound leaves of them.

        Raises:
            LockBusy: as ``begin``.
            OSError: it does not.
        """
        unit = os.urandom(32)
        with self.account.hold(deadline) as held:
            size = max(PAGE, min(size, self._limit - held.total))
            held.mark(self._files.area_of(unit))
            fd, name = self._files.create(unit, "0of1-1", 0)
            try:
                os.posix_fallocate(fd, 0, size)
                os.pwrite(fd, bytes(PAGE), 0)
            finally:
                self._files.remove(self._files.area_of(unit), name)
                os.close(fd)

    # ---- counting -----------------------------------------------------------------------------------------------

    def recount(self, area: int, deadline: float) -> None:
        """Look at what an area really holds.

        Raises:
            LockBusy, OSError: as ``begin``.
        """
        used = self.count(area) if area == REST else 0  # foreign files come and go without the lock anyway
        with self.account.hold(deadline) as held:
            held.settle(area, used if area == REST else self.count(area))

    def count(self, area: int) -> int:
        """Bytes in an area, listed now; the index learns what came and went. Under the account's lock."""
        if area == QUARANTINE:
            return sum(size for _, size in self._files.list_quarantine())
        if area == REST:
            used, files = self._files.weigh_rest()
            self.foreign[REST] = max(0, files - 1)
            return used
        shard = self._files.list_shard(area)
        self.foreign[area] = shard.foreign
        self.removed += shard.removed
        if self.first_scan is not None:
            self.first_scan[area] = sorted((each.modified, each.unit, each.part, each.size) for each in shard.objects)
        else:
            self._learn(area, shard.objects)
        return shard.used

    def learn_one(self, unit: bytes, part: str, size: int) -> None:
        """An object was met in a listing. Its header is to be read when there is time: it may tell when it expires."""
        if not self._index.holds(unit, part):
            self._index.add(unit, part, charge(size))
            self.unread.append((unit, part))

    def _learn(self, area: int, objects: list[Found]) -> None:
        there = {(found.unit, found.part) for found in objects}
        for unit in self._index.units(area):
            for known in self._index.parts(unit):
                if (unit, known.part) not in there:
                    self._index.remove(unit, known.part)
        for found in sorted(objects, key=lambda found: found.modified):
            self.learn_one(found.unit, found.part, found.size)

    # ---- room ---------------------------------------------------------------------------------------------------

    def _make_room(self, held: Held, need: int) -> None:
        while held.total + need > self._limit:
            if self._evict_one(held):
                continue
            if held[QUARANTINE] and self._trim_quarantine(held, 0):
                continue
            if not self._look_again(held):
                raise NoRoom(f"{held.total} bytes are there, and none of them may be evicted")

    def _look_again(self, held: Held) -> bool:
        """List everything, since nothing that is known may go; not more often than every few seconds."""
        now = time.monotonic()
        if now - self._learned < _LEARN_SECONDS:
            return False
        for area in range(REST + 1):
            held.settle(area, self.count(area))
        self._learned = time.monotonic()
        return True

    def _evict_one(self, held: Held) -> bool:
        unit = self._index.victim()
        if unit is None:
            return False
        self._remove_unit(held, unit)
        self.evictions += 1
        return True

    def _remove_unit(self, held: Held, unit: bytes) -> None:
        for known in self._index.parts(unit):
            self._remove(held, unit, known.part)
        self._index.forget(unit)

    def _remove(self, held: Held, unit: bytes, part: str) -> int:
        area = self._files.area_of(unit)
        held.mark(area)
        taken = self._files.remove_object(unit, part)
        held.add(area, -taken)
        return taken

    def _trim_quarantine(self, held: Held, most: int) -> bool:
        removed = False
        for name, _ in self._files.list_quarantine() if held[QUARANTINE] > most else ():
            if held[QUARANTINE] <= most:
                break
            held.mark(QUARANTINE)
            held.add(QUARANTINE, -self._files.remove(QUARANTINE, name))
            removed = True
        return removed
