"""The thread that keeps a disk tier's index and account true, and removes what has expired.

At start it lists the directory, shard by shard; the oldest objects come first in the eviction order. Later it lists one
shard after the other again, where names have changed, and so learns what other engines did. Headers are read when there is
nothing else to do: they tell when objects expire, and show objects that were damaged. It never works long without a
pause, since every pause lets the engine's threads run.
"""

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable

from worker_connector.chunk_object import HEADER_BYTES, Check, read_header
from worker_connector.errors import BadObject
from worker_connector.tiers.disk_account import LockBusy
from worker_connector.tiers.disk_files import QUARANTINE, REST, Files, charge, key_of
from worker_connector.tiers.disk_gate import Gate
from worker_connector.tiers.disk_index import Index
from worker_connector.tiers.disk_space import Space
from worker_connector.tiers.said import Said

_PATIENCE_SECONDS = 30.0
_RETRY_SECONDS = 1.0
_ADDED_AT_ONCE = 32
_HEADERS_AT_ONCE = 32
_BREATH_SECONDS = 0.0002
_COARSE_SECONDS = 2.0
_QUIET_SECONDS = 60.0
_TICK_SECONDS = 0.05
_LISTINGS_AT_ONCE = 64

_log = logging.getLogger("vllm.warmroute.disk")


class Keeper:
    """``scanned`` is set when the directory has been listed for the first time, after ``scan_seconds``."""

    def __init__(
        self, name: str, files: Files, index: Index, space: Space, *, gate: Gate, rescan_seconds: float
    ) -> None:
        self.scanned = threading.Event()
        self.scan_seconds = 0.0
        self._name = name
        self._files = files
        self._index = index
        self._space = space
        self._gate = gate
        self._pace = rescan_seconds / (REST + 1)
        self._stop = threading.Event()
        self._said = Said()
        self._seen: dict[int, int] = {}
        self._next_area = 0
        self._over = False
        self._damaged = 0
        self._reported = float("-inf")
        threading.Thread(target=self._run, name=f"warmroute-{name}-keeper", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        self.scanned.set()  # whoever waits for a listing waits no longer; the store is closed

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.is_set() and not self._succeeds(self._scan):
            self._stop.wait(_RETRY_SECONDS)
        self.scan_seconds = time.monotonic() - began
        owed, last = 0.0, time.monotonic()
        while not self._stop.wait(max(_TICK_SECONDS, self._pace)):
            owed, last = owed + (time.monotonic() - last) / self._pace, time.monotonic()
            listings = min(int(owed), _LISTINGS_AT_ONCE)
            owed = min(owed - listings, _LISTINGS_AT_ONCE)
            for duty in (self._open_gate, *[self._list_next] * listings, self._enforce, self._read_headers):
                self._succeeds(duty)

    def _succeeds(self, duty: Callable[[], None]) -> bool:
        """Failures of the disk are told by those who move objects, but for those of the first listing; here they only mean to
        try again later."""
        try:
            duty()
        except (OSError, LockBusy) as error:
            if not self.scanned.is_set() and self._said.anew("scan"):
                _log.warning(
                    "%s: its directory cannot be listed, and nothing is stored until it is: %r", self._name, error
                )
            _log.debug("%s: %s failed: %r", self._name, duty.__name__, error)
            return False
        return True

    # ---- the first listing --------------------------------------------------------------------------------------

    def _scan(self) -> None:
        for area in range(REST + 1):
            if self._stop.is_set():
                return
            changed = self._changed(area)
            self._space.recount(area, self._patience())
            self._remember(area, changed)
        self._take_over()
        self._over = True
        self._enforce()
        self.scanned.set()

    def _take_over(self) -> None:
        """Put what was listed into the index, the oldest first."""
        listed, self._space.first_scan = self._space.first_scan or {}, None
        for number, (_, unit, part, size) in enumerate(heapq.merge(*listed.values())):
            self._space.learn_one(unit, part, size)
            if number % _ADDED_AT_ONCE == 0:
                time.sleep(_BREATH_SECONDS)

    # ---- from then on -------------------------------------------------------------------------------------------

    def _open_gate(self) -> None:
        if self._gate.is_open or not self._gate.is_due:
            return
        try:
            self._space.probe(self._gate.size, self._patience())
        except OSError:
            self._gate.still_shut()
            return
        _log.warning("%s takes objects again", self._name)
        self._gate.open()

    def _list_next(self) -> None:
        area, self._next_area = self._next_area, (self._next_area + 1) % (REST + 1)
        if area < QUARANTINE:
            self._space.expire(area, time.time(), self._patience())
        changed = self._changed(area)
        if changed != self._seen.get(area) or area in (QUARANTINE, REST):
            self._space.recount(area, self._patience())
            self._remember(area, changed)
            self._over = True

    def _remember(self, area: int, changed: int) -> None:
        """Clocks of filesystems are coarse: what is changed right after it was listed may look as it did."""
        self._seen[area] = changed if time.time() - changed / 1e9 > _COARSE_SECONDS else -1

    def _enforce(self) -> None:
        while self._over and not self._stop.is_set():
            self._over = self._space.enforce(self._patience())

    def _read_headers(self) -> None:
        for _ in range(min(_HEADERS_AT_ONCE, len(self._space.unread))):
            self._read_header(*self._space.unread.popleft())

    def _read_header(self, unit: bytes, part: str) -> None:
        try:
            fd = self._files.open(unit, part)
        except FileNotFoundError:
            self._index.remove(unit, part)
            return
        try:
            block, size = os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size
        finally:
            os.close(fd)
        try:
            expires = _expiry_of(block, size, key_of(unit, part))
        except BadObject as error:
            self._report(key_of(unit, part), error)
            self._space.quarantine(unit, part, self._patience())
        else:
            self._index.expire(unit, part, expires)

    def _report(self, key: str, error: BadObject) -> None:
        self._damaged += 1
        if time.monotonic() - self._reported > _QUIET_SECONDS:
            self._reported = time.monotonic()
            _log.warning("%s: %s is damaged and was put aside: %s (%d so far)", self._name, key, error, self._damaged)

    def _changed(self, area: int) -> int:
        return self._files.changed(area) if area <= QUARANTINE else 0

    def _patience(self) -> float:
        return time.monotonic() + _PATIENCE_SECONDS


def _expiry_of(block: bytes, size: int, key: str) -> float:
    header = read_header(block)
    if str(header.key) != key:
        raise BadObject(Check.CHUNK, "its header names another object")
    if size not in (header.object_bytes, charge(header.object_bytes)):
        raise BadObject(Check.LENGTH, f"{size} bytes where its header says {header.object_bytes}")
    return header.expires
