"""What this engine knows of a disk tier's directory: which units are there, and in which order they go.

A unit is everything of one chunk of one engine identity: the objects of all its ranks and groups. It is evicted as a
whole, because the ranks of an engine need all of it or none, and any of them may be the one that makes room. Per unit the
index keeps no object that the garbage collector visits.
"""

import math
import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from worker_connector.eviction import EvictionPolicy

_PAGE = 4096
_PAGE_BITS, _TIME_BITS = 26, 32  # with the part's number mostly below 2^60, which Python keeps in 32 bytes
_FOR_EVER = (1 << _TIME_BITS) - 1
_MOST_GONE = 1 << 16


class Known(NamedTuple):
    """One object of a unit; ``charge`` is the bytes that its file takes, ``expires`` is in seconds since the epoch."""

    part: str
    charge: int
    expires: float


class Index:
    """Thread-safe. Every call is O(1) per unit, and what the policy costs."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.lock = threading.RLock()
        self._policy = policy
        self._areas: tuple[dict[bytes, int | tuple[int, ...]], ...] = tuple({} for _ in range(256))
        self._parts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._pins: dict[bytes, int] = {}
        self._gone: deque[bytes] = deque(maxlen=_MOST_GONE)
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
        return self.find(unit, part) is not None

    def find(self, unit: bytes, part: str) -> Known | None:
        """What is known of one object."""
        return next((known for known in self.parts(unit) if known.part == part), None)

    def parts(self, unit: bytes) -> list[Known]:
        """What is known of a unit."""
        with self.lock:
            return [self._known(code) for code in self._codes(unit)]

    def add(self, unit: bytes, part: str, charge: int, expires: float = math.inf) -> None:
        """An object came, or came again."""
        with self.lock:
            code = self._code(part, charge, expires)
            self._set(unit, (*self._others(unit, part), code))
            self._policy.add(unit)
            if unit in self._pins:
                self._policy.hold(unit)

    def expire(self, unit: bytes, part: str, expires: float) -> None:
        """An object that may be known expires at a time, in seconds since the epoch."""
        with self.lock:
            if (known := self.find(unit, part)) is not None:
                self._set(unit, (*self._others(unit, part), self._code(part, known.charge, expires)))

    def remove(self, unit: bytes, part: str) -> None:
        """An object is gone."""
        with self.lock:
            if self._codes(unit):
                self._gone.append(unit)
            if kept := self._others(unit, part):
                self._set(unit, kept)
            else:
                self.forget(unit)

    def forget(self, unit: bytes) -> None:
        """All of a unit is gone."""
        with self.lock:
            if self._codes(unit):
                self._gone.append(unit)
            self._set(unit, ())
            self._policy.discard(unit)

    def take_gone(self) -> list[bytes]:
        """Units that lost an object since the last call and do not have it again, the last 65,536 of them."""
        with self.lock:
            gone, self._gone = self._gone, deque(maxlen=_MOST_GONE)
            return [unit for unit in dict.fromkeys(gone) if not self._codes(unit)]

    def touch(self, units: Iterable[bytes]) -> None:
        """Units were used, in this order."""
        with self.lock:
            for unit in units:
                self._policy.touch(unit)

    def refresh(self, units: Iterable[bytes]) -> None:
        """Units are to go in this order, as far as they go at all."""
        with self.lock:
            for unit in units:
                self._policy.refresh(unit)

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

    def has_expired(self, unit: bytes, part: str, now: float) -> bool:
        known = self.find(unit, part)
        return known is not None and known.expires <= now

    def victim(self) -> bytes | None:
        """The unit to evict next."""
        with self.lock:
            return self._policy.victim()

    def due(self, area: int, now: float) -> list[tuple[bytes, str]]:
        """The objects of a shard that have expired. O(the shard's units)."""
        with self.lock:
            return [
                (unit, known.part) for unit in self._areas[area] for known in self.parts(unit) if known.expires <= now
            ]

    def units(self, area: int) -> list[bytes]:
        """The units of a shard. O(their number)."""
        with self.lock:
            return list(self._areas[area])

    def check(self) -> None:
        """Assert every invariant. O(units)."""
        with self.lock:
            self._policy.check()
            units = {unit for area in self._areas for unit in area}
            known = [known for unit in units for known in self.parts(unit)]
            assert self._objects == len(known), "objects are miscounted"
            assert self._bytes == sum(each.charge for each in known), "bytes are miscounted"
            assert all(map(self._codes, units)), "a unit without objects is kept"

    # ---- codes: an object as one integer ------------------------------------------------------------------------

    def _codes(self, unit: bytes) -> tuple[int, ...]:
        codes = self._areas[unit[16]].get(unit, ())
        return codes if isinstance(codes, tuple) else (codes,)

    def _others(self, unit: bytes, part: str) -> tuple[int, ...]:
        return tuple(code for code in self._codes(unit) if self._known(code).part != part)

    def _set(self, unit: bytes, codes: tuple[int, ...]) -> None:
        for sign, several in ((-1, self._codes(unit)), (1, codes)):
            self._objects += sign * len(several)
            self._bytes += sign * sum(self._known(code).charge for code in several)
        area = self._areas[unit[16]]
        if codes:
            area[unit] = codes[0] if len(codes) == 1 else codes
        else:
            area.pop(unit, None)

    def _code(self, part: str, charge: int, expires: float) -> int:
        number = self._numbers.get(part)
        if number is None:
            number = self._numbers[part] = len(self._parts)
            self._parts.append(part)
        second = min(_FOR_EVER, math.ceil(max(0.0, expires))) if expires != math.inf else _FOR_EVER
        return (number << _TIME_BITS | second) << _PAGE_BITS | charge // _PAGE

    def _known(self, code: int) -> Known:
        second = code >> _PAGE_BITS & _FOR_EVER
        charge = (code & (1 << _PAGE_BITS) - 1) * _PAGE
        return Known(self._parts[code >> _PAGE_BITS + _TIME_BITS], charge, math.inf if second == _FOR_EVER else second)
