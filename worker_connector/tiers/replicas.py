"""Several stores as one: each object lies on some of them, so that none is a single point of failure.

A put goes to the first ``copies`` stores of a key's order (``placement``) and has succeeded when one took it. A get asks
them in that order, and one more, so that objects are still found after a store was added. Whoever has not answered
after ``hedge`` seconds is overtaken: the next one is asked too, into memory of this module, and the first answer counts.
Copies that turn out to be missing are put back in the background.

The stores are ``Guarded``: one that is dead refuses at once, and costs nothing more than its breaker.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import (
    MISSING,
    LoanEnded,
    Outcome,
    Page,
    Sink,
    Source,
    Status,
    Store,
    failed,
)
from worker_connector.tiers.crew import Crew, CrewFull
from worker_connector.tiers.placement import Placement

T = TypeVar("T")

_REPAIR_SECONDS = 30.0
_REPAIRS_WAITING = 256
_REPAIR_BYTES = 256 << 20
_HEDGE_BYTES = 256 << 20
_SERVED_KEYS = 4096

_log = logging.getLogger("vllm.warmroute.store")


@dataclass(eq=False)
class _Wanted:
    """One key of a get: whom it was asked from, and what they said. ``order`` is whom it may be asked from."""

    key: str
    sink: Sink
    order: list[int]
    asked: int = 0
    under_way: int = 0
    outcome: Outcome | None = None
    problem: Outcome | None = None
    without: list[int] = field(default_factory=list)

    @property
    def next(self) -> int | None:
        return self.order[self.asked] if self.asked < len(self.order) else None


@dataclass(eq=False)
class _Attempt:
    """One call to one store for some of the keys. ``own`` is memory of this module, to be copied from when it won."""

    member: int
    wanted: list[_Wanted]
    sinks: list[Sink]
    began: float
    own: list[bytearray] | None = None
    outcomes: list[Outcome] | None = None
    overtaken: bool = False


class Replicas(Store):
    """``verify`` tells whether an object's bytes are good, before they are copied to another store."""

    def __init__(
        self,
        members: Sequence[Store],
        copies: int = 2,
        *,
        weights: Sequence[float] = (),
        hedge: float = 0.2,
        verify: Callable[[str, memoryview], bool] = lambda _key, _data: True,
    ) -> None:
        if not 1 <= copies <= len(members):
            raise ConfigurationError(
                f"replicas is {copies}, but {len(members)} stores are given: lower it, or give more stores"
            )
        self.name = " + ".join(member.name for member in members)
        self.max_object_bytes = min(member.max_object_bytes for member in members)
        self.members = list(members)
        self._copies = copies
        self._reach = min(copies + 1, len(members))
        self._hedge = hedge
        self._verify = verify
        self._placement = Placement([member.name for member in members], weights)
        self._crew = Crew("replicas", 8 * len(members), 64 * len(members))
        self._repairs = Crew("repair", 1, _REPAIRS_WAITING)
        self._lock = threading.Lock()
        self._repairing: set[str] = set()
        self._served: OrderedDict[str, int] = OrderedDict()
        self.figures: Counter[str] = Counter()

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        """As of any store. Where every store that should hold an object says it does not, it is missing."""
        pairs = zip(keys, into, strict=True)
        wanted = [_Wanted(key, sink, self._placement.order(key)[: self._reach]) for key, sink in pairs]
        outcomes = _Fetch(self, wanted, deadline).run()
        self._raise_if_all_failed(outcomes)
        return outcomes

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        """Stored when at least one store took it; ``reason`` names those that did, and ``cause`` is ``partial`` when
        some did not."""
        lent = [value.lend() for value in values]

        def work(member: Store, at: list[int]) -> list[Outcome]:
            return member.put([keys[each] for each in at], [lent[each] for each in at], deadline, ttl)

        try:
            found = self._spread(self._targets(keys, self._copies), work, deadline)
        finally:
            for loan in lent:
                loan.end()
        outcomes = [self._put_outcome(each) for each in found]
        self._raise_if_all_failed(outcomes)
        return outcomes

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        def work(member: Store, at: list[int]) -> list[Outcome]:
            return member.exists([keys[each] for each in at], deadline)

        found = self._spread(self._targets(keys, self._reach), work, deadline, enough=Status.FOUND)
        outcomes = [_best(list(each.values()), Status.FOUND, MISSING) for each in found]
        self._raise_if_all_failed(outcomes)
        return outcomes

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        """From every store, also from those that held an object before others were added."""

        def work(member: Store, at: list[int]) -> list[Outcome]:
            return member.delete([keys[each] for each in at], deadline)

        with self._lock:
            self._repairing.difference_update(keys)
        everywhere = {member: list(range(len(keys))) for member in range(len(self.members))}
        return [_worst(list(each.values())) for each in self._spread(everywhere, work, deadline)]

    def discard(self, keys: Sequence[str], reason: str, deadline: float) -> list[Outcome]:
        """From the store that gave the object last; from every store where that is not known any more."""
        targets: dict[int, list[int]] = {}
        with self._lock:
            for at, key in enumerate(keys):
                served = self._served.pop(key, None)
                for member in range(len(self.members)) if served is None else (served,):
                    targets.setdefault(member, []).append(at)

        def work(member: Store, at: list[int]) -> list[Outcome]:
            return member.discard([keys[each] for each in at], reason, deadline)

        return [_worst(list(each.values())) for each in self._spread(targets, work, deadline, len(keys))]

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """The pages of one store after the other; a copy on each is met once for each. Stores that fail are left out,
        unless all do."""
        at, reached, inner = _parse_cursor(cursor, self.name, len(self.members))
        try:
            page = self.members[at].scan(inner, deadline, limit)
        except StoreUnavailable:
            if at + 1 == len(self.members) and not reached:
                raise
            page = Page([], "")
        else:
            reached = 1
        if page.cursor:
            return Page(page.entries, f"{at} {reached} {page.cursor}")
        return Page(page.entries, f"{at + 1} {reached} " if at + 1 < len(self.members) else "")

    def ping(self, deadline: float) -> None:
        """One store at least would serve."""

        def work(member: Store, _at: list[int]) -> list[Outcome]:
            member.ping(deadline)
            return [Outcome(Status.FOUND)]

        targets = {member: [0] for member in range(len(self.members))}
        outcome = _best(
            list(self._spread(targets, work, deadline, enough=Status.FOUND)[0].values()), Status.FOUND, MISSING
        )
        if not outcome.ok:
            raise StoreUnavailable(self.name, outcome.cause, outcome.reason)

    def close(self) -> None:
        for member in self.members:
            member.close()
        self._crew.close()
        self._repairs.close()

    # Calls to several stores at once.

    def _targets(self, keys: Sequence[str], ranks: int) -> dict[int, list[int]]:
        targets: dict[int, list[int]] = {}
        for at, key in enumerate(keys):
            for member in self._placement.order(key)[:ranks]:
                targets.setdefault(member, []).append(at)
        return targets

    def _spread(
        self,
        targets: dict[int, list[int]],
        work: Callable[[Store, list[int]], list[Outcome]],
        deadline: float,
        keys: int = 0,
        enough: Status | None = None,
    ) -> list[dict[int, Outcome]]:
        """What each store said of each key. Returns early when every key has an outcome that is ``enough``."""
        count = max([keys, *(at + 1 for group in targets.values() for at in group)])
        found: list[dict[int, Outcome]] = [{} for _ in range(count)]
        answers: SimpleQueue[tuple[int, list[Outcome]]] = SimpleQueue()
        for member, at in targets.items():
            self.call(member, partial(work, self.members[member], at), len(at), partial(_answer, answers, member))
        missing = len(targets)
        while missing and not (enough and all(any(o.status is enough for o in each.values()) for each in found)):
            try:
                member, outcomes = answers.get(timeout=max(0.0, deadline - time.monotonic()) + 0.05)
            except Empty:
                break
            missing -= 1
            for each, outcome in zip(targets[member], outcomes, strict=True):
                found[each][member] = outcome
        late = failed("timeout", "no answer within the deadline")
        for member, group in targets.items():
            for each in group:
                found[each].setdefault(member, late)
        return found

    def call(
        self, member: int, work: Callable[[], list[Outcome]], keys: int, answered: Callable[[list[Outcome]], None]
    ) -> None:
        """Carry out ``work`` on a thread; ``answered`` gets its outcomes, also when the store as a whole failed."""

        def run() -> None:
            answered(self._outcomes(work, keys))

        try:
            self._crew.submit(run)
        except CrewFull:
            answered([failed("busy", f"{self.members[member].name}: too many operations are under way")] * keys)

    def _outcomes(self, work: Callable[[], list[Outcome]], keys: int) -> list[Outcome]:
        try:
            return work()
        except StoreUnavailable as error:
            return [failed(error.cause, str(error))] * keys
        except LoanEnded:
            return [failed("timeout", "overtaken by another store")] * keys
        except Exception as error:  # noqa: BLE001 - one store's, and the others may serve
            _log.exception("%s: an operation failed in a way that nobody foresaw", self.name)
            return [failed("error", type(error).__name__)] * keys

    def _put_outcome(self, found: dict[int, Outcome]) -> Outcome:
        took = [self.members[member].name for member, outcome in found.items() if outcome.ok]
        if not took:
            refusals = [outcome for outcome in found.values() if outcome.status is Status.REFUSED]
            return (refusals or list(found.values()))[0]
        size = next(outcome.size for outcome in found.values() if outcome.ok)
        self.figures["partial_puts"] += len(took) < len(found)
        return Outcome(Status.STORED, size, "" if len(took) == len(found) else "partial", ", ".join(took))

    def _raise_if_all_failed(self, outcomes: Sequence[Outcome]) -> None:
        if outcomes and all(each.status is Status.FAILED and each.cause != "size" for each in outcomes):
            raise StoreUnavailable(self.name, outcomes[0].cause, f"none of the stores serves ({outcomes[0].reason})")

    # What a get leaves behind.

    def served(self, wanted: Iterable[_Wanted], member: int) -> None:
        with self._lock:
            for each in wanted:
                self._served[each.key] = member
                self._served.move_to_end(each.key)
            while len(self._served) > _SERVED_KEYS:
                self._served.popitem(last=False)

    def repair_later(self, wanted: _Wanted, source: int) -> None:
        """Put the object on those of its stores that were found to lack it."""
        home = wanted.order[: self._copies]
        targets = [member for member in wanted.without if member in home]
        size = wanted.outcome.size if wanted.outcome else 0
        with self._lock:
            if not targets or wanted.key in self._repairing or size > _REPAIR_BYTES:
                return
            self._repairing.add(wanted.key)
        try:
            self._repairs.submit(partial(self._repair, wanted.key, size, source, targets))
        except CrewFull:
            self.figures["repairs_dropped"] += 1
            with self._lock:
                self._repairing.discard(wanted.key)

    def _repair(self, key: str, size: int, source: int, targets: list[int]) -> None:
        until = time.monotonic() + _REPAIR_SECONDS
        data = bytearray(size)
        try:
            found = self.members[source].get([key], [Sink(data)], until)[0]
            if not found.ok or found.size != size or not self._verify(key, memoryview(data)):
                return
            for member in targets:
                self._copy(key, data, member, until)
        except StoreUnavailable:
            self.figures["repairs_failed"] += 1
        finally:
            with self._lock:
                self._repairing.discard(key)

    def _copy(self, key: str, data: bytearray, member: int, until: float) -> None:
        """Put an object on one more store, unless it is deleted meanwhile."""
        if key not in self._repairing:
            return
        self.figures["repairs"] += self.members[member].put([key], [Source(data)], until)[0].ok
        if key not in self._repairing:
            self.members[member].delete([key], until)


class _Fetch:
    """One batch of gets: attempts go out, answers come back through a queue, and this thread alone decides."""

    def __init__(self, group: Replicas, wanted: list[_Wanted], deadline: float) -> None:
        self._group = group
        self._wanted = wanted
        self._deadline = deadline
        self._answers: SimpleQueue[_Attempt] = SimpleQueue()
        self._attempts: list[_Attempt] = []
        self._hedged_bytes = 0

    def run(self) -> list[Outcome]:
        try:
            self._ask(self._wanted)
            while self._unresolved() and time.monotonic() < self._deadline:
                self._step()
        finally:
            for attempt in self._attempts:
                _end(attempt.sinks)
        late = failed("timeout", "no answer within the deadline")
        return [each.outcome or each.problem or late for each in self._wanted]

    def _unresolved(self) -> bool:
        return any(each.outcome is None for each in self._wanted)

    def _step(self) -> None:
        try:
            attempt = self._answers.get(timeout=max(0.0, self._wake_at() - time.monotonic()))
        except Empty:
            self._overtake()
            return
        self._attempts.remove(attempt)
        self._take(attempt)

    def _wake_at(self) -> float:
        hedges = [each.began + self._group._hedge for each in self._attempts if not each.overtaken]  # noqa: SLF001
        return min([self._deadline, *hedges])

    def _ask(self, wanted: Iterable[_Wanted], *, own: bool = False) -> None:
        """Ask the next store of each key; into memory of our own where another store may still write into the sink."""
        groups: dict[int, list[_Wanted]] = {}
        for each in wanted:
            member = each.next
            if member is not None:
                groups.setdefault(member, []).append(each)
        for member, group in groups.items():
            for each in group:
                each.asked += 1
                each.under_way += 1
            self._start(member, group, own=own)

    def _start(self, member: int, group: list[_Wanted], *, own: bool) -> None:
        rooms = [bytearray(each.sink.size) for each in group] if own else None
        sinks = [Sink(room) for room in rooms] if rooms else [each.sink.lend() for each in group]
        attempt = _Attempt(member, group, sinks, time.monotonic(), rooms)
        self._attempts.append(attempt)

        def answered(outcomes: list[Outcome]) -> None:
            attempt.outcomes = outcomes
            self._answers.put(attempt)

        store = self._group.members[member]
        keys = [each.key for each in group]
        self._group.call(member, partial(store.get, keys, sinks, self._deadline), len(keys), answered)

    def _overtake(self) -> None:
        """Ask the next stores for what was asked ``hedge`` seconds ago and has not come."""
        now = time.monotonic()
        for attempt in list(self._attempts):
            if attempt.overtaken or now < attempt.began + self._group._hedge:  # noqa: SLF001
                continue
            attempt.overtaken = True
            late = [
                each
                for each in attempt.wanted
                if each.outcome is None and each.under_way == 1 and each.next is not None
            ]
            size = sum(each.sink.size for each in late)
            if late and self._hedged_bytes + size <= _HEDGE_BYTES:
                self._hedged_bytes += size
                self._group.figures["hedges"] += 1
                self._ask(late, own=True)

    def _take(self, attempt: _Attempt) -> None:
        won = []
        again = []
        for at, (each, outcome) in enumerate(zip(attempt.wanted, attempt.outcomes or [], strict=True)):
            each.under_way -= 1
            if each.outcome is not None:
                continue
            if outcome.ok:
                self._win(attempt, at, outcome)
                won.append(each)
            elif self._lost(each, attempt.member, outcome):
                again.append(each)
        _end(attempt.sinks)
        self._group.served(won, attempt.member)
        for each in won:
            self._group.repair_later(each, attempt.member)
        self._ask(again)

    def _win(self, attempt: _Attempt, at: int, outcome: Outcome) -> None:
        each = attempt.wanted[at]
        if attempt.own is not None:
            for other in self._attempts:
                _end(sink for sink, its in zip(other.sinks, other.wanted, strict=True) if its is each)
            each.sink.rewind()
            each.sink.write(memoryview(attempt.own[at])[: outcome.size])
        each.outcome = outcome

    def _lost(self, each: _Wanted, member: int, outcome: Outcome) -> bool:
        """Note what a store said that did not give the object. True when the next one is to be asked."""
        if outcome.status is Status.MISSING:
            each.without.append(member)
        elif member in each.order[: self._group._copies]:  # noqa: SLF001
            each.problem = outcome
        if each.under_way:
            return False
        if each.next is not None:
            return True
        each.outcome = each.problem or MISSING
        return False


def _end(sinks: Iterable[Sink]) -> None:
    for sink in sinks:
        sink.end()


def _answer(answers: "SimpleQueue[tuple[int, list[Outcome]]]", member: int, outcomes: list[Outcome]) -> None:
    answers.put((member, outcomes))


def _best(outcomes: Sequence[Outcome], good: Status, otherwise: Outcome) -> Outcome:
    for outcome in outcomes:
        if outcome.status is good:
            return outcome
    return next((outcome for outcome in outcomes if outcome.status is Status.FAILED), otherwise)


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    for status in (Status.FAILED, Status.DELETED):
        if (outcome := next((each for each in outcomes if each.status is status), None)) is not None:
            return outcome
    return MISSING


def _parse_cursor(cursor: str, name: str, members: int) -> tuple[int, int, str]:
    if not cursor:
        return 0, 0, ""
    at, reached, inner = (*cursor.split(" ", 2), "", "")[:3]
    if not at.isdecimal() or int(at) >= members or reached not in ("0", "1"):
        raise StoreUnavailable(name, "cursor", "the cursor is not of this group of stores")
    return int(at), int(reached), inner
