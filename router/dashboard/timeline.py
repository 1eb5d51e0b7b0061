"""The last hour in figures, in fixed memory: what the counters grew by in each slot of a few seconds.

The request path only adds to its counters; here they are read now and then, and the difference to the last look goes into
the slot of the moment. Slots lie on the wall clock, so those of several processes can be added up.
"""

import asyncio
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Any

from kv_protocol.messages import TIERS
from router.admission import Admission
from router.metrics import Metrics
from router.tallies import Spread, Tally

SLOT_S = 5
KEPT_S = 3600
MOST_POINTS = 60
NOW_S = 60
"""What is said of now is said of so many seconds."""
SOURCES = (*TIERS, "unknown")
"""Where reused tokens came from; ``unknown`` is a worker that does not say the tier."""

_COUNTED = ("requests", "failed", "rejected", "prompt_tokens", "predicted", "exact", "over", "under")
_SECONDS, _IN_FLIGHT, _QUEUED = 0, 1, 2
_COUNTERS = 3
_FAILED = _COUNTERS + 1
_HITS = _COUNTERS + len(_COUNTED)
_TTFT_SUM = _HITS + len(SOURCES)
_TTFT = _TTFT_SUM + 1

# A row: seconds covered, load · seconds, counters, reused tokens by source, TTFT's sum and buckets.
Rows = list[tuple[int, list[float]]]


class Timeline:
    """One process's. Memory: about 350 bytes a slot, 720 slots."""

    def __init__(self, metrics: Metrics, admission: Admission, clock: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._admission = admission
        self._clock = clock
        self._slots: deque[tuple[int, array[float]]] = deque(maxlen=KEPT_S // SLOT_S)
        self._last: dict[Tally, float] = {}
        self._spreads: dict[Spread, tuple[float, ...]] = {}
        self._looked = clock()
        self.bounds: Sequence[float] = metrics.ttft.bounds
        self._width = _TTFT + len(self.bounds) + 1
        deque(self._grown(), maxlen=0)  # what was counted before is not of this hour

    async def run(self) -> None:
        """Look once in every slot."""
        while True:
            await asyncio.sleep(SLOT_S - self._clock() % SLOT_S)
            self.look()

    def look(self) -> None:
        """Take into the slot of now what was counted since the last look. O(series)."""
        now = self._clock()
        seconds, self._looked = max(0.0, now - self._looked), now
        row = self._row(int(now // SLOT_S))
        row[_SECONDS] += seconds
        row[_IN_FLIGHT] += seconds * self._admission.in_flight
        row[_QUEUED] += seconds * self._admission.queued
        for column, growth in self._grown():
            row[column] += growth

    def rows(self, seconds: float) -> Rows:
        """The slots of the latest ``seconds``, by number."""
        first = (self._clock() - seconds) // SLOT_S
        return [(number, row.tolist()) for number, row in self._slots if number > first]

    def _row(self, number: int) -> "array[float]":
        while self._slots and self._slots[-1][0] > number:
            self._slots.pop()  # the clock was set back
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append((number, array("d", bytes(8 * self._width))))
        return self._slots[-1][1]

    def _grown(self) -> Iterator[tuple[int, float]]:
        """By column, what the series grew by. A worker's series go with it, so each is compared with itself."""
        before, self._last = self._last, {}
        for column, tally in self._tallies():
            value = self._last[tally] = tally.value
            if growth := value - before.get(tally, 0.0):
                yield column, growth
        yield from self._answered()

    def _answered(self) -> Iterator[tuple[int, float]]:
        before, self._spreads = self._spreads, {}
        for spread in self._metrics.ttft.series.values():
            held = self._spreads[spread] = (spread.sum, *spread.counts)
            if held != (known := before.get(spread, ())):
                for column, (now_, then) in enumerate(zip_longest(held, known, fillvalue=0.0), _TTFT_SUM):
                    yield column, now_ - then

    def _tallies(self) -> Iterator[tuple[int, Tally]]:
        metrics = self._metrics
        for labels, tally in metrics.requests.series.items():
            yield _COUNTERS, tally
            if labels[-1] >= "500":
                yield _FAILED, tally
        for column, family in enumerate((metrics.rejected, metrics.prompt_tokens, metrics.predicted), _FAILED + 1):
            for tally in family.series.values():
                yield column, tally
        for labels, tally in metrics.predictions.series.items():
            yield _COUNTERS + _COUNTED.index(labels[-1]), tally
        for labels, tally in metrics.actual.series.items():
            yield _HITS + SOURCES.index(labels[-1]), tally


def points(rows: Iterable[tuple[int, Sequence[float]]], bounds: Sequence[float], seconds: float) -> dict[str, Any]:
    """The latest ``seconds`` as at most ``MOST_POINTS`` points, a list for each figure; None where nothing happened.

    ``rows`` may be of several processes. Times in seconds of Unix time, rates per second, ``hit_rate`` and ``predicted``
    as shares of prompt tokens; quantiles of TTFT are interpolated within the histogram's buckets.
    """
    step = max(SLOT_S, SLOT_S * -(-int(seconds) // (MOST_POINTS * SLOT_S)))
    binned: dict[int, list[float]] = {}
    for number, row in together(rows):
        at = number * SLOT_S // step
        held = binned.get(at)
        binned[at] = list(row) if held is None else [a + b for a, b in zip(held, row, strict=True)]
    if not binned:
        return {"step_s": step, "at": []}
    last = max(binned)
    first = last - int(seconds) // step + 1
    figures = [_figures(binned.get(at), bounds) for at in range(first, last + 1)]
    columns = {name: [figure[name] for figure in figures] for name in figures[0] if name != "hit_rate"}
    hits = {source: [figure["hit_rate"][source] for figure in figures] for source in SOURCES}
    return {"step_s": step, "at": [at * step for at in range(first, last + 1)], **columns, "hit_rate": hits}


def together(rows: Iterable[tuple[int, Sequence[float]]]) -> Rows:
    """Slots of several processes made one: counts add up, the seconds they lived through do not."""
    slots: dict[int, list[float]] = {}
    for number, row in rows:
        held = slots.get(number)
        slots[number] = list(row) if held is None else _beside(held, row)
    return sorted(slots.items())


def _beside(one: Sequence[float], other: Sequence[float]) -> list[float]:
    both = [a + b for a, b in zip(one, other, strict=True)]
    both[_SECONDS] = max(one[_SECONDS], other[_SECONDS])
    return both


def now(rows: Iterable[tuple[int, Sequence[float]]], bounds: Sequence[float]) -> dict[str, Any]:
    """The figures of all the rows together."""
    total: list[float] | None = None
    for _, row in together(rows):
        total = list(row) if total is None else [a + b for a, b in zip(total, row, strict=True)]
    return _figures(total, bounds)


def _figures(row: Sequence[float] | None, bounds: Sequence[float]) -> dict[str, Any]:
    if row is None:
        row = [0.0] * (_TTFT + len(bounds) + 1)
    seconds, tokens = row[_SECONDS], row[_COUNTERS + 3]
    counted = dict(zip(_COUNTED, row[_COUNTERS:_HITS], strict=True))
    counts = row[_TTFT:]
    answered = sum(counts)
    return {
        "requests_per_s": _rounded(_ratio(counted["requests"], seconds)),
        "failed": round(counted["failed"]),
        "rejected": round(counted["rejected"]),
        "in_flight": _rounded(_ratio(row[_IN_FLIGHT], seconds)),
        "queued": _rounded(_ratio(row[_QUEUED], seconds)),
        "prompt_tokens": round(tokens),
        "predicted": _share(counted["predicted"], tokens),
        "hit_rate": {
            source: _share(value, tokens) for source, value in zip(SOURCES, row[_HITS:_TTFT_SUM], strict=True)
        },
        "judged": round(counted["exact"] + counted["over"] + counted["under"]),
        "exact": round(counted["exact"]),
        "ttft_mean_s": _rounded(_ratio(row[_TTFT_SUM], answered)),
        "ttft_p50_s": _rounded(_quantile(counts, bounds, 0.5)),
        "ttft_p95_s": _rounded(_quantile(counts, bounds, 0.95)),
    }


def _quantile(counts: Sequence[float], bounds: Sequence[float], share: float) -> float | None:
    sums = list(accumulate(counts))
    if not sums[-1]:
        return None
    rank = share * sums[-1]
    at = bisect_left(sums, rank)
    if at >= len(bounds):
        return bounds[-1]
    low = bounds[at - 1] if at else 0.0
    before = sums[at - 1] if at else 0.0
    return min(bounds[at], low + (bounds[at] - low) * (rank - before) / (sums[at] - before))


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None


def _share(value: float, by: float) -> float | None:
    return min(1.0, round(value / by, 4)) if by else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
