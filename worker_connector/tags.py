"""Which chunks the requests with a tag used, so that operators can name them together.

A tag is remembered by this engine alone and not over a restart. The book is bounded: what was used longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Iterable

from worker_connector.ledger import Ledger

MOST_TAGS = 1000
MOST_CHUNKS = 1 << 18
"""Chunks remembered, each counted once for every tag: about 100 bytes each."""


class Tags:
    """Everything here takes the ledger's lock."""

    def __init__(self, ledger: Ledger, most_chunks: int = MOST_CHUNKS) -> None:
        self._ledger = ledger
        self._most = most_chunks
        self._tags: OrderedDict[str, dict[bytes, None]] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return len(self._tags)

    def add(self, tags: Iterable[str], chunks: Iterable[bytes]) -> None:
        """These chunks were used under these tags. O(tags x chunks)."""
        with self._ledger.lock:
            named = dict.fromkeys(chunks)
            for tag in tags:
                held = self._tags.setdefault(tag, {})
                self._tags.move_to_end(tag)
                before = len(held)
                held |= named
                self._held += len(held) - before
            while self._tags and (len(self._tags) > MOST_TAGS or self._held > self._most):
                self._held -= len(self._tags.popitem(last=False)[1])

    def chunks(self, tag: str) -> list[bytes]:
        """What is remembered of a tag; nothing of one that is not known."""
        with self._ledger.lock:
            return list(self._tags.get(tag, ()))

    def counts(self, most: int) -> dict[str, int]:
        """Chunks of up to ``most`` tags, those used last first."""
        with self._ledger.lock:
            return {tag: len(self._tags[tag]) for tag, _ in zip(reversed(self._tags), range(most), strict=False)}
