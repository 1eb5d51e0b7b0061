"""Conversations that may go on: each keeps its chunks from eviction from the CPU tier for a while after its last turn.

A conversation is known by its last chunk: a request whose chunks contain it is its next turn. All of them together keep no
more than a share of the slots; a turn that ends when that is full takes the place of the conversations that have waited
longest, unless it is larger than all of it: then what fits of its beginning is kept. What operators and requests pinned
themselves is not touched.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from worker_connector.pins import REQUESTS_SHARE, Pins

_NAMES = 4
"""So many names of chunks are remembered for each that may be kept: conversations that begin alike share chunks."""


class _Conversation(NamedTuple):
    chunks: tuple[bytes, ...]
    until: float


class Conversations:
    """``seconds``: how long after a turn its conversation is kept. Not thread-safe: the engine's thread calls."""

    def __init__(self, pins: Pins, seconds: float) -> None:
        self._pins = pins
        self._seconds = seconds
        self._kept: OrderedDict[bytes, _Conversation] = OrderedDict()
        self._names = 0

    def __len__(self) -> int:
        return len(self._kept)

    def turn_ended(self, chunks: Sequence[bytes]) -> None:
        """A request with these chunks, of which the last may be a tail, ended. O(chunks), and more for those of each
        conversation that has to give way."""
        while self._kept and next(iter(self._kept.values())).until <= self._pins.now():
            self._pop(next(iter(self._kept)))
        for chunk in chunks:
            if chunk in self._kept:
                self._pop(chunk)
        most, until = self._pins.most(REQUESTS_SHARE), self._pins.now() + self._seconds
        refused = self._keep(chunks, until)
        if refused and self._kept and len(chunks) <= most:
            self._make_room(len(self._pins) + refused - most)
            refused = self._keep(chunks, until)
        if len(chunks) > refused:
            turn = self._kept[chunks[-1]] = _Conversation(tuple(chunks[: len(chunks) - refused]), until)
            self._names += len(turn.chunks)
        while self._names > _NAMES * most:
            self._give_up_oldest()

    def _keep(self, chunks: Sequence[bytes], until: float) -> int:
        """Keep those that there is room for; how many there is none for."""
        return self._pins.pin_until(chunks, until, share=REQUESTS_SHARE, extend=True).refused

    def _make_room(self, needed: int) -> None:
        while needed > 0 and self._kept:
            needed -= self._give_up_oldest()

    def _give_up_oldest(self) -> int:
        """How many chunks nobody keeps any more."""
        return self._pins.retract(*self._pop(next(iter(self._kept))))

    def _pop(self, last: bytes) -> _Conversation:
        popped = self._kept.pop(last)
        self._names -= len(popped.chunks)
        return popped
