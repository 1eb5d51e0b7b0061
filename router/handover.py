"""A worker that leaves hands its hottest chunks to the remote tier first.

``flush`` has the worker write what the remote tier lacks, those used last first; requests that still run go on. An engine
without requests sleeps, so it is woken by asking for one token. What could not be written in a while, because the store
paused, is asked for again until the deadline. The chunks stay in the worker's own tiers, and whatever is cut off costs
what was not handed over yet: nothing waits for it and nothing fails with it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from kv_protocol.errors import ProtocolError
from router.reports import call
from router.workers import Worker

Result = Literal["done", "late", "impossible"]
POLL_S = 0.2
STALLED_S = 2.0
"""Without progress for so long, the worker is told again."""

_log = logging.getLogger(__name__)


class Handover(msgspec.Struct):
    """What became of one: the chunks that the tier lacked, how many of them were not written in time, and why."""

    result: Result
    tier: str = ""
    chunks: int = 0
    left: int = 0
    seconds: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.result == "impossible":
            return f"no chunks were handed over: {self.why}"
        told = (
            f"{self.chunks - self.left} of {self.chunks} chunks handed to the {self.tier} tier in {self.seconds:.1f} s"
        )
        return f"{told}; {self.why}" if self.why else told


async def hand_over(
    address: tuple[str, int],
    wake: Callable[[], Awaitable[object]],
    *,
    token: str = "",
    tier: str = "",
    seconds: float,
) -> Handover:
    """Have the worker with this report port write its hottest chunks to a lower tier, for so many seconds at most. ``wake``
    has the engine take a step."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    outcome = Handover("late", tier or "remote")
    try:
        async with asyncio.timeout(seconds):
            await _write(address, wake, token, tier, outcome)
        outcome.result = "done"
    except TimeoutError:
        outcome.why = outcome.why or f"the rest was not written within {seconds:g} s"
    except (OSError, ProtocolError) as error:
        said = str(error) or type(error).__name__
        outcome.result, outcome.why = ("late" if outcome.chunks else "impossible"), said
    except (LookupError, TypeError, ValueError):  # another version's, say
        _log.debug("the handover by %s:%d", *address, exc_info=True)
        outcome.result = "late" if outcome.chunks else "impossible"
        outcome.why = "its answer cannot be understood"
    outcome.seconds = loop.time() - began
    return outcome


async def _write(
    address: tuple[str, int], wake: Callable[[], Awaitable[object]], token: str, tier: str, outcome: Handover
) -> None:
    """Ends when the tier lacks nothing."""
    arguments = {"tier": tier} if tier else {}
    before = 0
    while True:
        told = await call(address, "flush", arguments, token)
        lacking = int(told["chunks"])
        outcome.tier = str(told["tier"])
        outcome.chunks = max(outcome.chunks, lacking)
        if not lacking:
            outcome.left = 0
            return
        if lacking == before:
            await asyncio.sleep(STALLED_S)  # the store took none of them
        outcome.left = before = lacking
        waking = asyncio.ensure_future(wake())
        try:
            await _progress(address, token, outcome)
        finally:
            waking.cancel()
            await asyncio.gather(waking, return_exceptions=True)


async def _progress(address: tuple[str, int], token: str, outcome: Handover) -> None:
    """Until all of it is written, or nothing more is for a while."""
    loop = asyncio.get_running_loop()
    moved = loop.time()
    before: tuple[int, int] | None = None
    while loop.time() - moved < STALLED_S:
        await asyncio.sleep(POLL_S)
        figures = await call(address, "stats", {}, token)
        unwritten, begun = _figures(figures, outcome.tier)
        if begun:
            outcome.left = min(outcome.left, unwritten)
            if not unwritten:
                return
        if (unwritten, begun) != before:
            before, moved = (unwritten, begun), loop.time()


def _figures(figures: Any, tier: str) -> tuple[int, bool]:
    """Chunks that are yet to be written, and whether the engine has begun what it was told."""
    return int(figures["tiers"][tier].get("unwritten", 0)), not figures.get("queued")


class Handovers:
    """Those that a router asks workers for, at most one of each at a time."""

    def __init__(self, counted: Callable[[Result], None]) -> None:
        self._counted = counted
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(
        self,
        worker: Worker,
        address: tuple[str, int],
        wake: Callable[[], Awaitable[object]],
        *,
        token: str,
        seconds: float,
    ) -> None:
        """Begin one, unless this worker has one under way."""
        if worker.hands_over:
            return
        worker.hands_over = True
        task = asyncio.create_task(self._run(worker.name, address, wake, token, seconds))
        self._tasks.add(task)

        def ended(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            worker.hands_over = False

        task.add_done_callback(ended)

    def close(self) -> "list[asyncio.Task[None]]":
        """Stop waiting for them; the tasks to be awaited."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks

    async def _run(
        self, name: str, address: tuple[str, int], wake: Callable[[], Awaitable[object]], token: str, seconds: float
    ) -> None:
        try:
            outcome = await hand_over(address, wake, token=token, seconds=seconds)
        except Exception:  # noqa: BLE001 - whatever a worker answers
            _log.exception("worker %s answered its handover in a way that cannot be understood", name)
            outcome = Handover("impossible", why="its answer cannot be understood")
        self._counted(outcome.result)
        _log.info("worker %s leaves: %s", name, outcome)
