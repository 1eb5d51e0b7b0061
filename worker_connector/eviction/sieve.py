"""SIEVE: a queue in order of coming, and a hand that goes through it from the oldest to the newest.

The hand passes chunks that were used since it last came by, taking that mark from them, and evicts the first one
without. Survivors keep their places, so newcomers are judged soon and old favourites rarely. (Zhang et al., "SIEVE is
simpler than LRU", NSDI 2024, algorithm 1.)
"""

from worker_connector.eviction.ring import NOWHERE, Ring


class Sieve:
    """Evicts the first chunk before the hand that was not used. ``victim`` is O(1) amortised over uses."""

    def __init__(self) -> None:
        self._ring = Ring()
        self._used: set[bytes] = set()
        self._held: set[bytes] = set()
        self._hand = NOWHERE

    def add(self, chunk: bytes) -> None:
        if chunk in self._ring.places or chunk in self._held:
            self.refresh(chunk)
        else:
            self._ring.append(chunk)

    def touch(self, chunk: bytes) -> None:
        if chunk in self._ring.places or chunk in self._held:
            self._used.add(chunk)

    def refresh(self, chunk: bytes) -> None:
        if (place := self._ring.places.get(chunk)) is not None:
            self._pass_by(place)
            self._ring.renew(place)

    def hold(self, chunk: bytes) -> None:
        if chunk in self._ring.places:
            self._remove(chunk)
            self._held.add(chunk)

    def release(self, chunk: bytes) -> None:
        if chunk in self._held:
            self._held.remove(chunk)
            self._ring.append(chunk)

    def discard(self, chunk: bytes) -> None:
        if chunk in self._ring.places:
            self._remove(chunk)
        self._held.discard(chunk)
        self._used.discard(chunk)

    def victim(self) -> bytes | None:
        if not len(self._ring):
            return None
        while True:
            if self._hand == NOWHERE:
                self._hand = self._ring.oldest
            chunk = self._ring.chunk_at(self._hand)
            if chunk not in self._used:
                return chunk
            self._used.remove(chunk)
            self._hand = self._ring.newer(self._hand)

    def order(self) -> list[bytes]:
        return [*sorted(self._ring, key=self._used.__contains__), *self._held]

    def check(self) -> None:
        self._ring.check()
        assert self._held.isdisjoint(self._ring.places), "a held chunk may be evicted"
        assert self._used <= self._held | self._ring.places.keys(), "a chunk that is gone is marked"
        assert self._hand == NOWHERE or self._hand in self._ring.places.values(), "the hand points at no chunk"

    def _remove(self, chunk: bytes) -> None:
        self._pass_by(self._ring.places[chunk])
        self._ring.remove(chunk)

    def _pass_by(self, place: int) -> None:
        if place == self._hand:
            self._hand = self._ring.newer(place)
