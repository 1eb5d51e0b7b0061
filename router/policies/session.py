"""Session affinity: requests of one session go to one worker, found by rendezvous hashing.

Every worker has a rank for every session, drawn from a hash of both names. The worker with the highest rank serves the
session. When one leaves, its sessions go to their next in rank, spread over all others, and no other session moves; when
it comes back, they come back. A worker that is saturated, by the rule of ``longest-hit``, is passed over in the same
order, so that a session that has to leave its worker again and again meets the same second one. Routers agree without
talking to each other. Requests that name no session go to the least loaded worker.
"""

import hashlib
import random
from collections.abc import Sequence

from router.policies.base import Candidate, Choice, Query, short
from router.policies.load import least_loaded
from router.policies.saturation import Saturation


class Session:
    name = "session"
    uses_hits = uses_tiers = learns = False

    def __init__(self, rng: random.Random, header: str, saturation: Saturation) -> None:
        self._rng = rng
        self._header = header.lower().encode("ascii")
        self._saturation = saturation

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        session = query.header(self._header)
        if not session:
            return least_loaded(candidates, self._rng, "no session; ")
        ranked = sorted(candidates, key=lambda c: rank(session, c.worker.name), reverse=True)
        least = min(c.load for c in candidates)
        limit = self._saturation.limit
        chosen = next(c for c in ranked if c.load - least <= limit(c.prefill_speed))
        if chosen is ranked[0]:
            return Choice(chosen.worker, "the session's worker")
        lead = short(ranked[0].load - least)
        return Choice(chosen.worker, f"saturated: the session's worker {ranked[0].worker.name} leads by {lead} tokens")


def rank(session: bytes, worker: str) -> bytes:
    """A worker's rank for a session: the same in every router. About 1 µs."""
    return hashlib.blake2b(
        session, digest_size=8, key=hashlib.blake2b(worker.encode(), digest_size=16).digest()
    ).digest()
