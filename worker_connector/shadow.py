"""The shadow check: of a sample of requests, what could have been loaded is computed again and compared.

It answers whether a cache gives back what computing would give, on the traffic and the machine at hand: a wrong chunk name,
weights that are not those a chunk was computed with, memory that loses bits. A request of the sample loads nothing, so it
waits as if there were no cache. Its chunks are saved to slots of their own, compared with those that are held, and given
up again. Computing twice gives KV that differs a little, since the order of sums depends on what else is in a batch: what
counts is the difference's share of the whole, as the norm of all values of a chunk.
"""

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from worker_connector.ledger import Ledger, Slot
from worker_connector.request_state import RequestState
from worker_connector.stats import Stats

DIFFERENT = 0.1
"""A chunk that differs by more of its norm is not the same. KV of other tokens differs by 1 and more, bf16 computed in
another order by some hundredths."""
MOST_COMPARED = 64
"""Chunks compared at once: each takes a slot for a moment, in a full tier that of another chunk."""
SLOTS_SHARE = 1 / 16
"""Share of the slots that they take, which is one slot at least."""

_log = logging.getLogger("vllm.warmroute.shadow")


@dataclass(slots=True)
class Check:
    """One chunk that is being compared: its own slot, which is pinned, and the one with what was computed again."""

    held: Slot
    again: Slot


class Shadow:
    """``share`` of the requests with a hit are checked. ``delete`` is told the chunks that proved wrong: their copies in lower
    tiers are no better. Everything here runs under the ledger's lock."""

    def __init__(
        self,
        ledger: Ledger,
        stats: Stats,
        share: float,
        rng: random.Random | None = None,
        *,
        delete: Callable[[list[bytes]], object] = lambda _chunks: None,
    ) -> None:
        self._delete = delete
        self._ledger = ledger
        self._stats = stats
        self._share = share
        self._rng = rng or random.Random()  # noqa: S311 - a sample
        self._under_way = 0

    def takes(self, state: RequestState) -> bool:
        """Whether a request that has a hit is one of the sample; asked again, the answer is the same."""
        if not self._share:
            return False
        if state.shadowed is None:
            state.shadowed = self._rng.random() < self._share
        return state.shadowed

    def begin(self, chunk: bytes, own: frozenset[bytes]) -> Check | None:
        """Compare a chunk that was computed again with its slot; None where that cannot be done now."""
        held = self._ledger.lookup(chunk)
        if held is None or held.approximate or any(held.missing) or self._under_way >= self._most():
            return None
        self._ledger.pin(held)
        again = self._ledger.reserve(sha256(b"shadow" + chunk).digest()[:16], held.missing, own)
        if again is None:
            self._ledger.unpin(held)
            return None
        self._under_way += 1
        return Check(held, again)

    def _most(self) -> int:
        return min(MOST_COMPARED, max(1, int(self._ledger.capacity * SLOTS_SHARE)))

    def end(self, checks: Iterable[Check], found: Mapping[int, float], *, failed: bool) -> None:
        """The slots were compared on every rank; ``found`` is the largest difference for each slot that held a chunk."""
        wrong = []
        for check in checks:
            self._under_way -= 1
            self._ledger.abandon(check.again)
            self._ledger.unpin(check.held)
            difference = None if failed else found.get(check.held.index)
            if difference is not None and not self._is_same(check.held, difference):
                wrong.append(check.held.chunk)
        if wrong:
            self._delete(wrong)

    def _is_same(self, held: Slot, difference: float) -> bool:
        self._stats.add("compared_chunks", 1)
        if difference <= DIFFERENT:
            return True
        self._stats.add("different_chunks", 1)
        _log.error(
            "Chunk %s of the CPU tier differs from what was computed again by %.0f %% of its norm, and is dropped from every "
            "tier. Did the weights change without a reset, or does memory lose bits (set verify)?",
            held.chunk.hex(),
            100 * difference,
        )
        if not held.forgotten:
            self._ledger.forget(held.chunk)
        return False
