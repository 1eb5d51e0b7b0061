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
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

from kv_protocol.identity import in_generation
from worker_connector.chunk_object import ObjectKey
from worker_connector.errors import StoreUnavailable
from worker_connector.ledger import Ledger
from worker_connector.lower import TierRules
from worker_connector.tails import tail_identity
from worker_connector.tier_figures import figures_of
from worker_connector.tiers.base import Entry, Store, pages

_PAGE_SECONDS = 10.0
_MOST_QUESTIONS = 256
_SLICE = 512
_YIELD_SECONDS = 0.0002

_identity_in = lru_cache(1024)(in_generation)
_tail_identity = lru_cache(1024)(tail_identity)

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


class _Sought(NamedTuple):
    """A question that a tier is asked: chunks and tails, and until when somebody waits for the answer."""

    chunks: Sequence[bytes]
    tails: Sequence[bytes]
    question: Pending
    until: float


class Scope(Protocol):
    """What of a store is this engine's now. Read under the ledger's lock."""

    @property
    def generation(self) -> str:
        """Of the weights."""
        ...

    def may_be_found(self, tier: str, chunks: Iterable[bytes]) -> list[bytes]:
        """Those of these chunks that are not about to be deleted."""
        ...


class Always:
    """One generation, of which nothing is deleted."""

    generation = ""

    def may_be_found(self, _tier: str, chunks: Iterable[bytes]) -> list[bytes]:
        """All of them."""
        return list(chunks)


class _OtherGeneration(Exception):
    """The generation changed in the middle of a listing."""


class Lookups:
    """``names`` gives the objects of a chunk, one for each rank, of the weights of the start: it is there when all of them
    are. ``rules`` say how many chunks of a tier are kept on record, and whether it is listed. ``found`` is told after the
    record was changed while no request waits, so that readers hear of it. ``scope`` tells whose objects count: what was
    looked up in another generation is not put on record."""

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
        scope: "Scope | None" = None,
    ) -> None:
        scope = scope or Always()
        self._ledger = ledger
        self._timeout = timeout
        self._ended = threading.Event()
        self._asked: deque[Pending] = deque(maxlen=_MOST_QUESTIONS)
        self._tiers = [
            _TierLookups(ledger, stores[each.name], names, each, scope, rescan_seconds=rescan_seconds, found=found)
            for each in rules
        ]

    def ask(self, chunks: Sequence[bytes], tails: Sequence[bytes] = ()) -> Pending:
        """Have every tier look for these chunks and tails. Returns at once."""
        until = time.monotonic() + self._timeout
        question = Pending(len(self._tiers), until, self._ended)
        self._asked.append(question)
        for tier in self._tiers:
            tier.ask(_Sought(chunks, tails, question, until))
        return question

    def wait(self, seconds: float) -> None:
        """Return when a question was answered or none is open, after ``seconds`` at the latest."""
        while self._asked and not self._asked[0].pending:
            self._asked.popleft()
        if self._asked:
            self._ended.wait(seconds)
        self._ended.clear()

    def list_again(self) -> None:
        """List now what is listed: the generation is another one. Returns at once."""
        for tier in self._tiers:
            tier.list_again()

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
        scope: Scope,
        *,
        rescan_seconds: float,
        found: Callable[[], None],
    ) -> None:
        self._scope = scope
        self._again = threading.Event()
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
        self._questions: deque[_Sought] = deque()
        self._threads = [
            threading.Thread(target=work, name=f"warmroute-{name}-{what}", daemon=True)
            for what, work, on in (("lookup", self._answer, True), ("list", self._list, rules.listed))
            if on
        ]
        for thread in self._threads:
            thread.start()

    def figures(self) -> dict[str, Any]:
        return {"scanned": self.scanned, "questions": len(self._questions), **figures_of(self._store)}

    def ask(self, sought: _Sought) -> None:
        with self._wake:
            if len(self._questions) >= _MOST_QUESTIONS:
                sought.question.answered()
                return
            self._questions.append(sought)
            self._wake.notify()

    def list_again(self) -> None:
        self._again.set()

    def close(self) -> None:
        self._stop.set()
        self._again.set()
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
                sought = self._questions.popleft()
            present: list[bytes] = []
            generation = self._scope.generation
            try:
                present = self._present(sought, generation) if time.monotonic() < sought.until else []
            except Exception:  # noqa: BLE001 - this thread goes on, whatever happens
                _log.exception("A look-up in tier %s failed", self.name)
            with self._ledger.lock:
                if generation == self._scope.generation:
                    present, tails = self._scope.may_be_found(self.name, present), set(sought.tails)
                    self._ledger.stored(self.name, [each for each in present if each not in tails], self._most)
                    self._ledger.tails_stored(self.name, [each for each in present if each in tails], self._most)
                sought.question.answered()

    def _names_in(self, generation: str, chunk: bytes) -> list[ObjectKey]:
        names = self._names(chunk)
        return [name._replace(identity=_identity_in(name.identity, generation)) for name in names]

    def _tail_names_in(self, generation: str, tail: bytes) -> list[ObjectKey]:
        return [name._replace(identity=_tail_identity(name.identity)) for name in self._names_in(generation, tail)]

    def _present(self, sought: _Sought, generation: str) -> list[bytes]:
        """What of that is there, every rank's object of it."""
        names = [*(self._names_in(generation, chunk) for chunk in sought.chunks)]
        names += (self._tail_names_in(generation, tail) for tail in sought.tails)
        chunks = [*sought.chunks, *sought.tails]
        try:
            outcomes = self._store.exists([str(key) for ranks in names for key in ranks], sought.until)
        except StoreUnavailable as error:
            _log.debug("Look-up in tier %s: %s", self.name, error)
            return []
        parts = (outcomes[at : at + self._ranks] for at in range(0, len(outcomes), self._ranks))
        return [chunk for chunk, part in zip(chunks, parts, strict=True) if all(each.ok for each in part)]

    def _list(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._again.clear()
            try:
                listed = self._list_once(self._scope.generation)
            except _OtherGeneration:
                continue
            except StoreUnavailable as error:
                _log.debug("Listing tier %s: %s", self.name, error)
                self._rest(min(30.0, self._rescan_seconds))
                continue
            except Exception:  # noqa: BLE001 - this thread goes on, whatever happens
                _log.exception("Listing tier %s failed", self.name)
                self._rest(self._rescan_seconds)
                continue
            if not self.scanned:
                self.scanned = True
                _log.info(
                    "Tier %s holds %d chunks of this engine, listed in %.1f s",
                    self.name,
                    listed,
                    time.monotonic() - began,
                )
            self._rest(self._rescan_seconds)

    def _rest(self, seconds: float) -> None:
        if not self._stop.is_set():
            self._again.wait(seconds)

    def _list_once(self, generation: str) -> int:
        """Put on record what the tier has of this engine's identity, and take out what was on record before and is not
        there any more; how many chunks it has. They are on record in the order in which they were last used, as far as
        the store tells."""
        with self._ledger.lock:
            self._check_generation(generation)
            before = set(self._ledger.newest(self.name, self._most))

        def stored(chunks: Iterable[bytes]) -> None:
            self._check_generation(generation)
            self._ledger.stored(self.name, self._scope.may_be_found(self.name, chunks), self._most)

        def removed(chunks: Iterable[bytes]) -> None:
            self._check_generation(generation)
            self._ledger.removed(self.name, chunks)

        parts: dict[bytes, set[int]] = {}
        used: dict[bytes, float] = {}
        for page in pages(self._store, self._stop, _PAGE_SECONDS):
            whole = dict(self._whole(page.entries, parts, generation))
            used |= whole
            if whole:
                self._in_slices(whole, stored)
                self._found()
        if self._stop.is_set():
            return len(used)
        if not self.scanned:
            self._in_slices(sorted(used, key=used.__getitem__), stored)
        self._in_slices(before - used.keys(), removed)
        self._found()
        return len(used)

    def _check_generation(self, generation: str) -> None:
        if generation != self._scope.generation:
            raise _OtherGeneration

    def _in_slices(self, chunks: Collection[bytes], change: Callable[[list[bytes]], None]) -> None:
        """Change the record in portions, with the ledger free in between for as long as whoever waits needs to take it: the
        engine's step does not wait for a million chunks."""
        rest = iter(chunks)
        while part := list(islice(rest, _SLICE)):
            with self._ledger.lock:
                change(part)
            time.sleep(_YIELD_SECONDS)

    def _whole(
        self, entries: Iterable[Entry], parts: dict[bytes, set[int]], generation: str
    ) -> Iterable[tuple[bytes, float]]:
        """Chunks that are complete with these objects, and when they were last used; ``parts`` has the ranks met of those
        that are not."""
        for entry in entries:
            try:
                key = ObjectKey.parse(entry.key)
            except ValueError:
                continue
            if key not in self._names_in(generation, key.chunk):
                continue
            met = parts.setdefault(key.chunk, set())
            met.add(key.rank)
            if len(met) == self._ranks:
                del parts[key.chunk]
                yield key.chunk, entry.modified
