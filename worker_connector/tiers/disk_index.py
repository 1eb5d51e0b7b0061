"""What this engine knows of a disk tier's directory: which units are there, and in which order they go.

A unit is everything of one chunk of one engine identity: the objects of all its ranks and groups. It is evicted as a
whole, because the ranks of an engine need all of it or none, and any of them may be the one that makes room. Per unit the
index keeps no object that the garbage collector visits.
"""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from worker_connector.eviction import EvictionPolicy, Expiry

_PAGE = 4096
_SIZE_BITS = 40


class Known(NamedTuple):
    """One object of a unit; ``charge`` is the bytes that its file takes."""

    part: str
    charge: int


class Index:
    """Thread-safe. Every call is O(1) per unit, and what the policy costs."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.lock = threading.RLock()
        self._policy = policy
        self._areas: tuple[dict[bytes, int | tuple[int, ...]], ...] = tuple({} for _ in range(256))
        self._parts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._expiry = Expiry()
        self._pins: dict[bytes, int] = {}
        self._objects = 0
        self._bytes = 0

    def __len__(self) -> int:
        """Units."""
        return sum(map(len, self._areas))

    @property
    def objects(self) -> int:
        return self._objects

    @property
    def used(self) -> int:
        return self._bytes

    def holds(self, unit: bytes, part: str) -> bool:
        return any(known.part == part for known in self.parts(unit))

    def parts(self, unit: bytes) -> list[Known]:
        """What is known of a unit."""
        with self.lock:
            return [Known(self._parts[code >> _SIZE_BITS], self._charge(code)) for code in self._codes(unit)]

    def add(self, unit: bytes, part: str, charge: int, expires: float = float("inf")) -> None:
        """An object came, or came again."""
        with self.lock:
            kept = tuple(code for code in self._codes(unit) if self._parts[code >> _SIZE_BITS] != part)
            self._count(unit, -1)
            codes = (*kept, self._number(part) << _SIZE_BITS | charge // _PAGE)
            self._areas[unit[16]][unit] = codes[0] if len(codes) == 1 else codes
            self._count(unit, 1)
            self._policy.add(unit)
            if unit in self._pins:
                self._policy.hold(unit)
            if expires != float("inf"):
                self._expiry.set(unit, expires)
            elif not kept:
                self._expiry.discard(unit)

    def expire(self, unit: bytes, expires: float) -> None:
        """A unit that may be known expires at a time, in seconds since the epoch."""
        with self.lock:
            if unit in self._areas[unit[16]] and expires != float("inf"):
                self._expiry.set(unit, expires)

    def remove(self, unit: bytes, part: str) -> None:
        """An object is gone."""
        with self.lock:
            kept = tuple(code for code in self._codes(unit) if self._parts[code >> _SIZE_BITS] != part)
            if not kept:
                self.forget(unit)
                return
            self._count(unit, -1)
            self._areas[unit[16]][unit] = kept[0] if len(kept) == 1 else kept
            self._count(unit, 1)

    def forget(self, unit: bytes) -> None:
        """All of a unit is gone."""
        with self.lock:
            self._count(unit, -1)
            self._areas[unit[16]].pop(unit, None)
            self._policy.discard(unit)
            self._expiry.discard(unit)

    def touch(self, units: Iterable[bytes]) -> None:
        """Units were used."""
        with self.lock:
            for unit in units:
                self._policy.touch(unit)

    def pin(self, unit: bytes, *, pin: bool) -> None:
        """Keep a unit, now or when it comes, from eviction by this engine; pins are counted."""
        with self.lock:
            pins = self._pins.get(unit, 0) + (1 if pin else -1)
            if pins > 0:
                self._pins[unit] = pins
                self._policy.hold(unit)
            else:
                self._pins.pop(unit, None)
                self._policy.release(unit)

    def has_expired(self, unit: bytes, now: float) -> bool:
        at = self._expiry.at(unit)
        return at is not None and at <= now

    def victim(self, now: float) -> bytes | None:
        """The unit to evict next: one that has expired, or else the policy's choice."""
        with self.lock:
            due = self._expiry.due(now)
            return due[0] if due else self._policy.victim()

    def due(self, now: float, most: int) -> list[bytes]:
        """Units that have expired."""
        with self.lock:
            return self._expiry.due(now, most)

    def units(self, area: int) -> list[bytes]:
        """The units of a shard. O(their number)."""
        with self.lock:
            return list(self._areas[area])

    def check(self) -> None:
        """Assert every invariant. O(units)."""
        with self.lock:
            self._policy.check()
            self._expiry.check()
            units = {unit for area in self._areas for unit in area}
            codes = [code for unit in units for code in self._codes(unit)]
            assert self._objects == len(codes), "objects are miscounted"
            assert self._bytes == sum(map(self._charge, codes)), "bytes are miscounted"
            assert all(map(self._codes, units)), "a unit without objects is kept"
            assert set(self._expiry) <= units, "a unit that is gone will expire"

    def _codes(self, unit: bytes) -> tuple[int, ...]:
        codes = self._areas[unit[16]].get(unit, ())
        return codes if isinstance(codes, tuple) else (codes,)

    @staticmethod
    def _charge(code: int) -> int:
        return (code & (1 << _SIZE_BITS) - 1) * _PAGE

    def _number(self, part: str) -> int:
        number = self._numbers.get(part)
        if number is None:
            number = self._numbers[part] = len(self._parts)
            self._parts.append(part)
        return number

    def _count(self, unit: bytes, sign: int) -> None:
        codes = self._codes(unit)
        self._objects += sign * len(codes)
        self._bytes += sign * sum(map(self._charge, codes))
