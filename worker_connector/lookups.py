"""Looking chunks up in the lower tiers without keeping the engine waiting.

A tier that others share may hold what this engine never wrote. Each tier has a thread that answers questions (the
chunks of one request, in one call of the store), and a tier of one machine another that lists it: at the start, so that what
survived a restart is known and reported, and again every ``rescan_seconds``. A remote tier may hold what a whole fleet ever
computed, and every worker would report it: of that only what was asked for or written is on record. What is found is put on the ledger's record;
whether the bytes are good, their fetch will tell.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from worker_connector.chunk_object import ObjectKey
from worker_connector.errors import StoreUnavailable
from worker_connector.ledger import Ledger
from worker_connector.lower import TierRules
from worker_connector.tier_figures import figures_of
from worker_connector.tiers.base import Entry, Store, pages

_PAGE_SECONDS = 10.0
_MOST_QUESTIONS = 256
_SLICE = 512
_YIELD_SECONDS = 0.0002

_log = logging.getLogger("vllm.warmroute.tiers")


class Pending:
    """A question asked of several tiers. It waits for them no longer than until ``until``."""

    __slots__ = ("_ended", "_left", "_until")

    def __init__(self, tiers: int, until: float, ended: threading.Event | None = None) -> None:
        self._left = tiers
        self._until = until
        self._ended = ended

    @property
    def pending(self) -> bool:
        """Whether a tier has not answered, and may still do so in time."""
        return self._left > 0 and time.monotonic() < self._until

    def answered(self) -> None:
        self._left -= 1
        if not self._left and self._ended is not None:
            self._ended.set()


class Lookups:
    """``names`` gives the objects of a chunk, one for each rank: it is there when all of them are. ``rules`` say how many
    chunks of a tier are kept on record, and whether it is listed. ``found`` is told after the record was changed while no
    request waits, so that readers hear of it."""

    def __init__(
        self,
        ledger: Ledger,
        stores: Mapping[str, Store],
        names: Callable[[bytes], Sequence[ObjectKey]],
        rules: Sequence[TierRules],
        *,
        timeout: float = 0.2,
        rescan_seconds: float = 300.0,
        found: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._timeout = timeout
        self._ended = threading.Event()
        self._asked: deque[Pending] = deque(maxlen=_MOST_QUESTIONS)
        self._tiers = [
            _TierLookups(ledger, stores[each.name], names, each, rescan_seconds=rescan_seconds, found=found)
            for each in rules
        ]

    def ask(self, chunks: Sequence[bytes]) -> Pending:
        """Have every tier look for these chunks. Returns at once."""
        until = time.monotonic() + self._timeout
        question = Pending(len(self._tiers), until, self._ended)
        self._asked.append(question)
        for tier in self._tiers:
            tier.ask(chunks, question, until)
        return question

    def wait(self, seconds: float) -> None:
        """Return when a question was answered or none is open, after ``seconds`` at the latest."""
        while self._asked and not self._asked[0].pending:
            self._asked.popleft()
        if self._asked:
            self._ended.wait(seconds)
        self._ended.clear()

    @property
    def scanned(self) -> bool:
        """Whether every tier that is listed has been listed once."""
        return all(tier.scanned for tier in self._tiers)

    def figures(self) -> dict[str, dict[str, Any]]:
        """By tier: whether it has been listed, questions waiting for it, and the figures of the store behind it. O(1) each."""
        return {tier.name: tier.figures() for tier in self._tiers}

    def close(self) -> None:
        """End the threads; their stores are closed."""
        for tier in self._tiers:
            tier.close()


class _TierLookups:
    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        names: Callable[[bytes], Sequence[ObjectKey]],
        rules: TierRules,
        *,
        rescan_seconds: float,
        found: Callable[[], None],
    ) -> None:
        self.scanned = not rules.listed
        self._ledger = ledger
        self.name = name = rules.name
        self._store = store
        self._names = names
        self._ranks = len(names(bytes(16)))
        self._most = rules.most
        self._rescan_seconds = rescan_seconds
        self._found = found
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._questions: deque[tuple[Sequence[bytes], Pending, float]] = deque()
        self._threads = [
            threading.Thread(target=work, name=f"warmroute-{name}-{what}", daemon=True)
            for what, work, on in (("lookup", self._answer, True), ("list", self._list, rules.listed))
            if on
        ]
        for thread in self._threads:
            thread.start()

    def figures(self) -> dict[str, Any]:
        return {"scanned": self.scanned, "questions": len(self._questions), **figures_of(self._store)}

    def ask(self, chunks: Sequence[bytes], question: Pending, until: float) -> None:
        with self._wake:
            if len(self._questions) >= _MOST_QUESTIONS:
                question.answered()
                return
            self._questions.append((chunks, question, until))
            self._wake.notify()

    def close(self) -> None:
        self._stop.set()
        with self._wake:
            self._wake.notify()
        self._store.close()
        for thread in self._threads:
            thread.join(_PAGE_SECONDS)

    def _answer(self) -> None:
        while not self._stop.is_set():
            with self._wake:
                self._wake.wait_for(lambda: self._questions or self._stop.is_set())
                if self._stop.is_set():
                    return
                chunks, question, until = self._questions.popleft()
            present: list[bytes] = []
            try:
                present = self._present(chunks, until) if time.monotonic() < until else []
            except Exception:  # noqa: BLE001 - this thread goes on, whatever happens
                _log.exception("A look-up in tier %s failed", self.name)
            with self._ledger.lock:
                self._ledger.stored(self.name, present, self._most)
                question.answered()

    def _present(self, chunks: Sequence[bytes], until: float) -> list[bytes]:
        """Those of ``chunks`` of which every rank's object is there."""
        keys = [str(key) for chunk in chunks for key in self._names(chunk)]
        try:
            outcomes = self._store.exists(keys, until)
        except StoreUnavailable as error:
            _log.debug("Look-up in tier %s: %s", self.name, error)
            return []
        parts = (outcomes[at : at + self._ranks] for at in range(0, len(outcomes), self._ranks))
        return [chunk for chunk, part in zip(chunks, parts, strict=True) if all(each.ok for each in part)]

    def _list(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                listed = self._list_once()
            except StoreUnavailable as error:
                _log.debug("Listing tier %s: %s", self.name, error)
                self._stop.wait(min(30.0, self._rescan_seconds))
                continue
            except Exception:  # noqa: BLE001 - this thread goes on, whatever happens
                _log.exception("Listing tier %s failed", self.name)
                self._stop.wait(self._rescan_seconds)
                continue
            if not self.scanned:
                self.scanned = True
                _log.info(
                    "Tier %s holds %d chunks of this engine, listed in %.1f s",
                    self.name,
                    listed,
                    time.monotonic() - began,
                )
            self._stop.wait(self._rescan_seconds)

    def _list_once(self) -> int:
        """Put on record what the tier has of this engine's identity, and take out what was on record before and is not
        there any more; how many chunks it has. They are on record in the order in which they were last used, as far as
        the store tells."""
        before = set(self._ledger.newest(self.name, self._most))
        parts: dict[bytes, set[int]] = {}
        used: dict[bytes, float] = {}
        for page in pages(self._store, self._stop, _PAGE_SECONDS):
            whole = dict(self._whole(page.entries, parts))
            used |= whole
            if whole:
                self._in_slices(whole, self._stored)
                self._found()
        if self._stop.is_set():
            return len(used)
        if not self.scanned:
            self._in_slices(sorted(used, key=used.__getitem__), self._stored)
        self._in_slices(before - used.keys(), lambda chunks: self._ledger.removed(self.name, chunks))
        self._found()
        return len(used)

    def _stored(self, chunks: Iterable[bytes]) -> None:
        self._ledger.stored(self.name, chunks, self._most)

    def _in_slices(self, chunks: Collection[bytes], change: Callable[[list[bytes]], None]) -> None:
        """Change the record in portions, with the ledger free in between for as long as whoever waits needs to take it: the
        engine's step does not wait for a million chunks."""
        rest = iter(chunks)
        while part := list(islice(rest, _SLICE)):
            change(part)
            time.sleep(_YIELD_SECONDS)

    def _whole(self, entries: Iterable[Entry], parts: dict[bytes, set[int]]) -> Iterable[tuple[bytes, float]]:
        """Chunks that are complete with these objects, and when they were last used; ``parts`` has the ranks met of those
        that are not."""
        for entry in entries:
            try:
                key = ObjectKey.parse(entry.key)
            except ValueError:
                continue
            if key not in self._names(key.chunk):
                continue
            met = parts.setdefault(key.chunk, set())
            met.add(key.rank)
            if len(met) == self._ranks:
                del parts[key.chunk]
                yield key.chunk, entry.modified
