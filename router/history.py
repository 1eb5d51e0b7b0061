"""What workers gave up lately, so that it can be said why a hit ended.

A removal report is kept as it came, one byte string of hashes, for a cost per report and not per chunk; asking is a
search through the bytes. Memory is bounded: what is oldest goes first.
"""

import time
from collections import deque
from typing import Literal, NamedTuple

from kv_protocol.hashing import HASH_BYTES

BUDGET_BYTES = 64 << 20
LEAST_BYTES = 64 << 10
MOST_BYTES = 4 << 20


class Departure(NamedTuple):
    """When, in seconds of Unix time, a chunk left a tier, and how."""

    at: float
    tier: str
    how: Literal["evicted", "cleared"]


class _Entry(NamedTuple):
    at: float
    tier: str
    chunks: bytes


class _Log:
    """One worker's."""

    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque()
        self.bytes = 0
        self.cleared: dict[str, float] = {}
        self.since = time.time()
        self.epoch = ""


class History:
    """Departures of all workers."""

    def __init__(self) -> None:
        self._logs: dict[str, _Log] = {}

    def began(self, worker: str, epoch: str) -> None:
        """A report stream began; what is known of an earlier process of the worker is void."""
        log = self._logs.get(worker)
        if log is None or log.epoch != epoch:
            log = self._logs[worker] = _Log()
            log.epoch = epoch

    def removed(self, worker: str, tier: str, chunks: bytes) -> None:
        """Chunks left a tier. O(1)."""
        log = self._logs.get(worker)
        if log is None:
            return
        log.entries.append(_Entry(time.time(), tier, chunks))
        log.bytes += len(chunks)
        most = max(LEAST_BYTES, min(MOST_BYTES, BUDGET_BYTES // len(self._logs)))
        while log.bytes > most and len(log.entries) > 1:
            log.bytes -= len(log.entries.popleft().chunks)

    def cleared(self, worker: str, tier: str) -> None:
        """A tier was emptied."""
        if (log := self._logs.get(worker)) is not None:
            log.cleared[tier] = time.time()

    def forget(self, worker: str) -> None:
        self._logs.pop(worker, None)

    def since(self, worker: str) -> float | None:
        """Since when, in Unix time, a worker's present process has been watched."""
        log = self._logs.get(worker)
        return log.since if log is not None else None

    def last(self, worker: str, chunk: bytes) -> Departure | None:
        """The chunk's last departure from any tier of a worker, as far back as is remembered. O(bytes kept)."""
        log = self._logs.get(worker)
        if log is None:
            return None
        return next(
            (Departure(e.at, e.tier, "evicted") for e in reversed(log.entries) if _holds(e.chunks, chunk)), None
        )

    def last_clearing(self, worker: str) -> Departure | None:
        """The last time a tier of a worker was emptied."""
        log = self._logs.get(worker)
        if log is None or not log.cleared:
            return None
        tier = max(log.cleared, key=log.cleared.__getitem__)
        return Departure(log.cleared[tier], tier, "cleared")


def _holds(chunks: bytes, chunk: bytes) -> bool:
    at = chunks.find(chunk)
    while at >= 0 and at % HASH_BYTES:
        at = chunks.find(chunk, at + 1)
    return at >= 0
