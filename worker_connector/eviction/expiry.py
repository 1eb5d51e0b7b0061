"""What has outlived its time goes first."""

import math
import time
from collections.abc import Callable, Iterator

from sortedcontainers import SortedDict

from worker_connector.eviction.base import EvictionPolicy


class Expiry:
    """When chunks expire, kept to whole seconds, rounded up. O(log s) for s different seconds."""

    def __init__(self) -> None:
        self._at: dict[bytes, int] = {}
        self._due: SortedDict[int, set[bytes]] = SortedDict()

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._at)

    def at(self, chunk: bytes) -> int | None:
        """The second at which ``chunk`` expires."""
        return self._at.get(chunk)

    def set(self, chunk: bytes, at: float) -> None:
        """``chunk`` expires at ``at``, whatever was set before."""
        self.discard(chunk)
        second = math.ceil(at)
        self._at[chunk] = second
        if (same := self._due.get(second)) is None:
            same = self._due[second] = set()
        same.add(chunk)

    def discard(self, chunk: bytes) -> None:
        """``chunk`` is gone or never expires."""
        if (second := self._at.pop(chunk, None)) is not None:
            same = self._due[second]
            same.remove(chunk)
            if not same:
                del self._due[second]

    def due(self, now: float, most: int = 1) -> list[bytes]:
        """Up to ``most`` chunks that have expired, the earliest first. They stay until they are discarded."""
        found: list[bytes] = []
        for second, chunks in self._due.items():
            if second > now or len(found) >= most:
                break
            found += list(chunks)[: most - len(found)]
        return found

    def check(self) -> None:
        """Assert every invariant. O(chunks)."""
        filed = {chunk: second for second, chunks in self._due.items() for chunk in chunks}
        assert filed == self._at, "a chunk is filed under another second"
        assert all(self._due.values()), "a second without chunks was kept"


class Expiring:
    """A policy whose first victims are expired chunks, and then those of another policy.

    ``clock`` gives the seconds that ``expire`` counts in. Costs O(log s) on top of the policy's own.
    """

    def __init__(self, policy: EvictionPolicy, clock: Callable[[], float] = time.time) -> None:
        self._policy = policy
        self._clock = clock
        self._expiry = Expiry()
        self._held: dict[bytes, int | None] = {}
        self.add = policy.add
        self.touch = policy.touch
        self.refresh = policy.refresh

    def expire(self, chunk: bytes, at: float) -> None:
        """A chunk that was added is of no use to anybody from ``at`` on."""
        if chunk in self._held:
            self._held[chunk] = math.ceil(at)
        else:
            self._expiry.set(chunk, at)

    def expired(self, most: int = 1) -> list[bytes]:
        """Up to ``most`` chunks that have expired and are not held, for the caller to discard."""
        return self._expiry.due(self._clock(), most)

    def hold(self, chunk: bytes) -> None:
        if chunk not in self._held:
            self._held[chunk] = self._expiry.at(chunk)
            self._expiry.discard(chunk)
        self._policy.hold(chunk)

    def release(self, chunk: bytes) -> None:
        if chunk in self._held:
            if (at := self._held.pop(chunk)) is not None:
                self._expiry.set(chunk, at)
            self._policy.release(chunk)

    def discard(self, chunk: bytes) -> None:
        self._held.pop(chunk, None)
        self._expiry.discard(chunk)
        self._policy.discard(chunk)

    def victim(self) -> bytes | None:
        expired = self.expired()
        return expired[0] if expired else self._policy.victim()

    def order(self) -> list[bytes]:
        expired = set(self.expired(len(self._expiry)))
        return [chunk for chunk in self._policy.order() if chunk not in expired]

    def check(self) -> None:
        self._policy.check()
        self._expiry.check()
        assert not any(chunk in self._held for chunk in self._expiry), "a held chunk may expire"
