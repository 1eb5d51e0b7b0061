"""A doubly linked list of chunks in arrays: no object per chunk for the garbage collector to visit."""

from array import array
from collections.abc import Iterator

NOWHERE = 0
"""The place that is no chunk's: before the oldest and after the newest."""


class Ring:
    """Chunks from the oldest to the newest, each at a place that stays its own. Every operation is O(1)."""

    def __init__(self) -> None:
        self.places: dict[bytes, int] = {}
        self._chunks: list[bytes] = [b""]
        self._newer = array("q", [NOWHERE])
        self._older = array("q", [NOWHERE])
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[bytes]:
        place = self.oldest
        while place != NOWHERE:
            yield self._chunks[place]
            place = self.newer(place)

    @property
    def oldest(self) -> int:
        """The place of the oldest chunk, or NOWHERE."""
        return self._newer[NOWHERE]

    def newer(self, place: int) -> int:
        """The place of the next newer chunk; NOWHERE after the newest."""
        return self._newer[place]

    def chunk_at(self, place: int) -> bytes:
        return self._chunks[place]

    def append(self, chunk: bytes) -> int:
        """Add a chunk that is not there as the newest; its place."""
        place = self._free.pop() if self._free else self._grow()
        self._chunks[place] = chunk
        self.places[chunk] = place
        self._link(place)
        return place

    def renew(self, place: int) -> None:
        """Make the chunk at a place the newest."""
        self._unlink(place)
        self._link(place)

    def remove(self, chunk: bytes) -> int:
        """Take a chunk out; the place it had, which may be another's from now on."""
        place = self.places.pop(chunk)
        self._unlink(place)
        self._chunks[place] = b""
        self._free.append(place)
        return place

    def check(self) -> None:
        """Assert every invariant. O(chunks)."""
        assert len(list(self)) == len(self.places), "the list and the places differ"
        assert all(self._chunks[place] == chunk for chunk, place in self.places.items()), "a place has another chunk"
        assert len(self._free) + len(self.places) + 1 == len(self._chunks), "a place is lost"

    def _grow(self) -> int:
        self._chunks.append(b"")
        self._newer.append(NOWHERE)
        self._older.append(NOWHERE)
        return len(self._chunks) - 1

    def _link(self, place: int) -> None:
        last = self._older[NOWHERE]
        self._newer[last] = self._older[NOWHERE] = place
        self._older[place], self._newer[place] = last, NOWHERE

    def _unlink(self, place: int) -> None:
        older, newer = self._older[place], self._newer[place]
        self._newer[older], self._older[newer] = newer, older
