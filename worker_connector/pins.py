"""Chunks that are kept from eviction from the CPU and the disk tier, each until its time.

A pin belongs to a chunk's name, not to a slot: it holds while the chunk comes and goes, and one that is set before the
chunk is there counts from its arrival. Pins end by themselves. Since a pinned slot serves nobody else, no more chunks than
a share of the slots can be pinned; what is beyond that is refused.

Everything here runs under the ledger's lock, which each call takes; ``expire`` looks at the time without it.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from worker_connector.ledger import Ledger

MOST_SHARE = 0.75
"""Share of the CPU tier's slots that may be pinned."""
REQUESTS_SHARE = 0.25
"""Share of them up to which requests may pin."""
_SLACK = 64


class Pinned(NamedTuple):
    """What became of the chunks named: ``changed`` are protected now and were not before, ``waiting`` will be once
    they are in the CPU tier, ``refused`` were too many."""

    changed: int
    waiting: int
    refused: int


class Pins:
    """See the module's text. ``clock`` is in seconds, from any start."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._until: dict[bytes, float] = {}
        self._ends: list[tuple[float, bytes]] = []
        ledger.pinned = self._until
        self.changed: Callable[[list[bytes], bool], object] = lambda _chunks, _pinned: None
        """Told, under the lock, which chunks are pinned now or no longer."""

    def __len__(self) -> int:
        return len(self._until)

    def pin(
        self, chunks: Iterable[bytes], seconds: float | None = None, *, share: float = MOST_SHARE, extend: bool = False
    ) -> Pinned:
        """Keep chunks for so many seconds from now, or for good. Of a chunk that is pinned already the end is set
        anew; with ``extend``, only to a later one. O(log pins) each."""
        until = math.inf if seconds is None else self._clock() + seconds
        return self.pin_until(chunks, until, share=share, extend=extend)

    def pin_until(self, chunks: Iterable[bytes], until: float, *, share: float, extend: bool = False) -> Pinned:
        """The same until a time of the clock's."""
        with self._ledger.lock:
            most = self.most(share)
            taken, refused = [], 0
            for chunk in dict.fromkeys(chunks):
                before = self._until.get(chunk)
                if before is None and len(self._until) >= most:
                    refused += 1
                    continue
                taken.append(chunk)
                if before is None or until > before or not extend:
                    self._set(chunk, until)
            self.changed(taken, True)
            waiting = sum(self._ledger.lookup(chunk) is None for chunk in taken)
            return Pinned(self._ledger.keep(taken), waiting, refused)

    def unpin(self, chunks: Iterable[bytes]) -> int:
        """End the pins of these chunks; how many had one. O(1) each."""
        with self._ledger.lock:
            ended = [chunk for chunk in dict.fromkeys(chunks) if self._until.pop(chunk, None) is not None]
            self._ledger.keep(ended, keep=False)
            self.changed(ended, False)
            self._compact()
            return len(ended)

    def retract(self, chunks: Iterable[bytes], until: float) -> int:
        """End those pins of these chunks that end at exactly that time, so none that was set anew since; how many."""
        with self._ledger.lock:
            return self.unpin([chunk for chunk in chunks if self._until.get(chunk) == until])

    def most(self, share: float) -> int:
        """How many chunks may be pinned with such a share of the slots."""
        return int(self._ledger.capacity * share)

    def now(self) -> float:
        """The clock's time, in seconds."""
        return self._clock()

    def clear(self) -> int:
        """End all pins; how many there were."""
        return self.unpin(list(self._until))

    def expire(self) -> None:
        """End what has reached its end. O(1) where that is nothing."""
        ends = self._ends  # which another thread may replace
        if not ends or ends[0][0] > self._clock():
            return
        with self._ledger.lock:
            now = self._clock()
            ended = []
            while self._ends and self._ends[0][0] <= now:
                until, chunk = heapq.heappop(self._ends)
                if self._until.get(chunk) == until:
                    ended.append(chunk)
            self.unpin(ended)

    def entries(self, most: int) -> list[tuple[bytes, float | None]]:
        """Up to ``most`` pinned chunks, with the seconds left; None for those that stay. O(pins)."""
        with self._ledger.lock:
            now = self._clock()
            pairs = [pair for pair, _ in zip(self._until.items(), range(most), strict=False)]
            return [(chunk, None if until == math.inf else max(0.0, until - now)) for chunk, until in pairs]

    def waiting(self) -> int:
        """How many pinned chunks are not in the CPU tier. Takes no lock, so it is as of about now. O(pins)."""
        return sum(self._ledger.lookup(chunk) is None for chunk in list(self._until))

    def check(self) -> None:
        """Assert every invariant. O(pins)."""
        with self._ledger.lock:
            ends = set(self._ends)
            for chunk, until in self._until.items():
                assert until == math.inf or (until, chunk) in ends, "a pin does not end"
                slot = self._ledger.lookup(chunk)
                assert slot is None or slot.kept, "a pinned chunk may be evicted"

    def _set(self, chunk: bytes, until: float) -> None:
        self._until[chunk] = until
        if until != math.inf:
            heapq.heappush(self._ends, (until, chunk))
        self._compact()

    def _compact(self) -> None:
        """Forget the ends of pins that were set anew or ended early, once they are the greater part."""
        if len(self._ends) > 2 * len(self._until) + _SLACK:
            self._ends = [(until, chunk) for chunk, until in self._until.items() if until != math.inf]
            heapq.heapify(self._ends)
