"""Hot prefixes: what many requests share belongs on more than one worker.

A conversation's own prefix is asked for by one request at a time, and is best asked for where it is. A prefix that
every user has, a system prompt, would by the same rule draw everybody to the worker that was first to compute it. The
two are told apart by where hits end: a conversation's next turn ends at a chunk where no other request's hit ended, a
shared prefix at the same chunk again and again.

A copy costs its tokens once. It pays when what is gained from it, the lead in load that this request escapes and the
lasting lead that as many later requests escape as lately came, exceeds ``COPY_WEIGHT`` times that. The lasting lead is
the difference of load averages, so that many prefixes spread over a balanced fleet are not copied for every ripple.
"""

from collections import deque
from collections.abc import Sequence

from router.policies.base import Candidate, Query, short

WINDOW = 1024
"""Requests that count as recent."""
COPY_WEIGHT = 5.0
"""What a token computed for a copy weighs beside a token of load escaped: it also evicts another's."""


class HotPrefixes:
    """Where the hits of the last ``window`` requests ended. O(1) a request."""

    def __init__(self, window: int = WINDOW) -> None:
        self._last: deque[bytes] = deque()
        self._counts: dict[bytes, int] = {}
        self._window = window

    def met(self, chunk: bytes) -> int:
        """How many recent requests had their longest hit end at this chunk, before this one, which is counted."""
        seen = self._counts.get(chunk, 0)
        self._counts[chunk] = seen + 1
        self._last.append(chunk)
        if len(self._last) > self._window:
            oldest = self._last.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        return seen

    def copy_instead(self, query: Query, warm: Candidate, idle: Candidate) -> str:
        """Why ``idle`` should compute the prefix that ``warm`` holds, or nothing. Counts the request."""
        missing = warm.hit_tokens - idle.hit_tokens
        if missing <= 0 or (chunk := hit_end(query, warm)) is None:
            return ""
        asked = self.met(chunk)
        lasting = warm.worker.average_load - idle.worker.average_load
        if not asked or lasting <= 0 or warm.load - idle.load + asked * lasting <= COPY_WEIGHT * missing:
            return ""
        return (
            f"hot prefix: {asked} recent requests share {short(warm.hit_tokens)} tokens of {warm.worker.name}; copied"
        )


def hit_end(query: Query, candidate: Candidate) -> bytes | None:
    """The last chunk of a worker's hit; None without one, and for several prompts at once."""
    prompts: Sequence[Sequence[bytes]] = query.hashes.get(candidate.worker.namespace or ("", 0), ())
    if len(prompts) != 1 or candidate.worker.namespace is None:
        return None
    chunks = candidate.hit_tokens // candidate.worker.namespace[1]
    return prompts[0][chunks - 1] if 0 < chunks <= len(prompts[0]) else None
