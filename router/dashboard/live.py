"""Decisions as they are made. The request path knows nothing of who watches: it keeps its latest decisions and counts
them, and every watcher looks a few times a second which came since."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from router.accounting import Accounting
from router.errors import Busy

LOOK_S = 0.5
HEARTBEAT_S = 10.0
LIFETIME_S = 900.0
"""After which a stream ends; whoever still watches asks again."""
MOST_WATCHERS = 16
BACKLOG = 50
MOST_AT_ONCE = 50
"""Decisions shown of one look; the others are counted."""
_FINISHED_AMONG = 256
_OVERLAP_S = 0.05

Ask = Callable[[Mapping[str, Any]], Awaitable[Mapping[int, "Changes"]]]


class Cursor(msgspec.Struct, array_like=True):
    """Up to where a process's decisions are known: how many it had made, and when that was looked at."""

    count: int
    at: float


class Changes(msgspec.Struct):
    """Decisions made or finished since a cursor, oldest first; ``skipped`` is how many more were made."""

    cursor: Cursor
    skipped: int
    decisions: list[dict[str, Any]]


def changes(accounting: Accounting, since: Cursor | None) -> Changes:
    """What happened since ``since``; without it, the latest. O(decisions made since, and a bounded number before)."""
    now, count = time.time(), accounting.routed
    known = since.count if since is not None and since.count <= count else max(0, count - BACKLOG)
    fresh = count - known
    recent = list(accounting.recent(max(min(fresh, MOST_AT_ONCE), _FINISHED_AMONG)))
    shown = recent[: min(fresh, MOST_AT_ONCE)]
    if since is not None:
        after = since.at - _OVERLAP_S
        known_ones = recent[fresh:] if fresh < len(recent) else []
        shown += [d for d in known_ones if d.duration_s is not None and d.at + d.duration_s > after][:MOST_AT_ONCE]
    decisions = [msgspec.to_builtins(decision) for decision in reversed(shown)]
    return Changes(Cursor(count, now), max(0, fresh - MOST_AT_ONCE), decisions)


class Live:
    """Gives every watcher a stream of its own, and bounds how many there are."""

    def __init__(self, look: Ask, ended: Callable[[], bool]) -> None:
        self._look = look
        self._ended = ended
        self.watchers = 0

    async def open(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """Server-sent events: ``decisions`` with what is fresh, ``end`` where the stream ends in time, and a comment
        as a heartbeat. Ends when the watcher is ``gone``, the gateway stops, or the stream is old.

        Raises:
            Busy: as many watch as may.
        """
        if self.watchers >= MOST_WATCHERS:
            raise Busy(f"{MOST_WATCHERS} streams of decisions are open already: close one", retry_after=5)
        events = self._counted(gone)
        await anext(events)  # begun, it counts at once, until it is closed or forgotten
        return events

    async def _counted(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        self.watchers += 1
        try:
            yield b""
            async for event in self._events(gone):
                yield event
        finally:
            self.watchers -= 1

    async def _events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        cursors: dict[int, Cursor] = {}
        began = beaten = time.monotonic()
        yield b"retry: 2000\n\n"
        while time.monotonic() - began < LIFETIME_S and not self._ended() and not await gone():
            found = await self._look({str(number): msgspec.to_builtins(cursor) for number, cursor in cursors.items()})
            cursors |= {number: part.cursor for number, part in found.items()}
            decisions = sorted((d for part in found.values() for d in part.decisions), key=lambda d: float(d["at"]))
            if decisions:
                yield _event("decisions", {"decisions": decisions, "skipped": sum(p.skipped for p in found.values())})
                beaten = time.monotonic()
            elif time.monotonic() - beaten >= HEARTBEAT_S:
                yield b": still here\n\n"
                beaten = time.monotonic()
            await asyncio.sleep(LOOK_S)
        yield _event("end", {})


def _event(name: str, content: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(content) + b"\n\n"
