"""Conversations that may go on: each keeps its chunks from eviction from the CPU tier for a while after its last turn.

A conversation is known by its last chunk: a request whose chunks contain it is its next turn. All of them together keep no
more than a share of the slots; a turn that ends when that is full takes the place of the conversations that have waited
longest, unless it is larger than all of it: then what fits of its beginning is kept. What operators and requests pinned themselves is not touched.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from worker_connector.pins import REQUESTS_SHARE, Pinned, Pins


class _Conversation(NamedTuple):
    chunks: tuple[bytes, ...]
    until: float


class Conversations:
    """``seconds``: how long after a turn its conversation is kept. Not thread-safe: the engine's thread calls."""

    def __init__(self, pins: Pins, seconds: float) -> None:
        self._pins = pins
        self._seconds = seconds
        self._kept: OrderedDict[bytes, _Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def turn_ended(self, chunks: Sequence[bytes]) -> None:
        """A request with these chunks, of which the last may be a tail, ended. O(chunks), and more for each conversation
        that has to give way."""
        self._forget_ended()
        for chunk in chunks:
            self._kept.pop(chunk, None)
        if not chunks:
            return
        turn = _Conversation(tuple(chunks), self._pins.now() + self._seconds)
        while self._keep(turn).refused and self._kept and len(chunks) <= self._pins.most(REQUESTS_SHARE):
            self._pins.retract(*self._kept.popitem(last=False)[1])
        self._kept[chunks[-1]] = turn

    def _keep(self, turn: _Conversation) -> Pinned:
        return self._pins.pin_until(turn.chunks, turn.until, share=REQUESTS_SHARE, extend=True)

    def _forget_ended(self) -> None:
        while self._kept and next(iter(self._kept.values())).until <= self._pins.now():
            self._kept.popitem(last=False)
