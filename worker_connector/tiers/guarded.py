"""What keeps a store from harming anybody: time limits, a bound on what is under way, a breaker, and a quiet log.

Each operation runs on a thread of the store's crew, and its caller waits for it until the deadline, whatever the client
library does. What was given up may end later: its result is dropped, and the memory it was lent is closed to it before
the caller goes on (see ``base.Loan``), so a late answer cannot reach a slot that belongs to another chunk by then.

After the first failure the store is left alone (``breaker``), and calls fail at once. Meanwhile one thread pings it, so
no request pays for finding out whether it is back.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import Loan, LoanEnded, Outcome, Page, Sink, Source, Status, Store, failed
from worker_connector.tiers.breaker import Breaker, Pauses
from worker_connector.tiers.crew import Crew, CrewFull, Job
from worker_connector.tiers.said import Said

T = TypeVar("T")

_FAIR_SECONDS = 0.1
_FAILED_CALLS = 5
_PROBES = 3

_log = logging.getLogger("vllm.warmroute.store")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``timeout`` is the most seconds one operation may take, whatever its deadline, and ``put_timeout``, unless 0, what a
    put may; ``threads`` run at once, and ``waiting`` more may wait for one of them."""

    timeout: float = 5.0
    put_timeout: float = 0.0
    threads: int = 4
    waiting: int = 64
    pauses: Pauses = field(default_factory=Pauses)


@dataclass(kw_only=True)
class Tally:
    """What came of one kind of operation: calls, keys by outcome, bytes moved, and seconds spent by callers."""

    calls: int = 0
    ok: int = 0
    missing: int = 0
    refused: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Operation(Generic[T]):
    """``salvage`` turns loans that have ended into what was found whole by then; ``tally`` counts a result."""

    name: str
    work: Callable[[float], T]
    tally: Callable[[Tally, T], None]
    keys: int = 1
    lent: Sequence[Loan] = ()
    salvage: Callable[[Sequence[Loan]], T | None] = lambda _lent: None


class Guarded(Store):
    """``store`` behind all of this. What it raises is StoreUnavailable, at the deadline at the latest.

    Causes of its own: ``timeout`` (no answer within the deadline), ``paused`` (left alone after a failure), ``busy``
    (too much under way), ``closed``.
    """

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self.store = store
        self.name = store.name
        self.max_object_bytes = store.max_object_bytes
        self._limits = limits or Limits()
        self._crew = Crew(f"store-{store.name}", self._limits.threads, self._limits.waiting)
        self._breaker = Breaker(self._limits.pauses)
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}
        self._failed_calls = 0
        self._closed = threading.Event()
        self._said = Said()
        self._outage_said = False

    # The interface.

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        """As of any store. After a deadline passed, what had been found whole by then is still found."""
        lent = [sink.lend() for sink in into]
        work = partial(self.store.get, list(keys), lent)
        return self._call("get", work, deadline, len(keys), lent)

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        lent = [value.lend() for value in values]

        def work(until: float) -> list[Outcome]:
            return self.store.put(list(keys), lent, until, ttl)

        outcomes = self._call("put", work, deadline, len(keys), lent)
        self._report_refusals(outcomes)
        return outcomes

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._call("exists", partial(self.store.exists, list(keys)), deadline, len(keys))

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._call("delete", partial(self.store.delete, list(keys)), deadline, len(keys))

    def discard(self, keys: Sequence[str], reason: str, deadline: float) -> list[Outcome]:
        return self._call("discard", partial(self.store.discard, list(keys), reason), deadline, len(keys))

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        def work(until: float) -> Page:
            return self.store.scan(cursor, until, limit)

        return self._guard(_Operation(name="scan", work=work, tally=_tally_page), deadline)

    def ping(self, deadline: float) -> None:
        self._guard(_Operation(name="ping", work=self.store.ping, tally=_tally_one), deadline)

    def take_lost(self) -> list[bytes]:
        return self.store.take_lost()

    def close(self) -> None:
        self._closed.set()
        self._crew.close()
        threading.Thread(target=self.store.close, name=f"warmroute-close-{self.name}", daemon=True).start()

    # Figures.

    @property
    def state(self) -> str:
        """``closed`` while the store serves, ``open`` while it is left alone, ``trial`` when it may serve again."""
        return self._breaker.state

    @property
    def openings(self) -> int:
        return self._breaker.openings

    @property
    def late(self) -> int:
        """Operations that ended after they had been given up."""
        return self._crew.late

    @property
    def hung(self) -> int:
        """Operations that were given up and have not ended yet."""
        return self._crew.hung

    def tallies(self) -> dict[str, Tally]:
        """Since the start, by operation: get, put, exists, delete, discard, scan, ping."""
        with self._lock:
            return {operation: replace(tally) for operation, tally in self._tallies.items()}

    # How an operation runs.

    def _call(
        self,
        name: str,
        work: Callable[[float], list[Outcome]],
        deadline: float,
        keys: int,
        lent: Sequence[Sink] | Sequence[Source] = (),
    ) -> list[Outcome]:
        if not keys:
            return []
        tally = partial(_tally_outcomes, moves=name in ("get", "put"))
        operation = _Operation(name=name, work=work, tally=tally, keys=keys, lent=lent, salvage=_found_so_far)
        return self._guard(operation, deadline)

    def _guard(self, operation: _Operation[T], deadline: float) -> T:
        began = time.monotonic()
        try:
            result = self._run(operation, began, deadline)
        except BaseException:
            self._count(operation, began, _tally_failure(operation.keys))
            raise
        finally:
            for loan in operation.lent:
                loan.end()
        self._count(operation, began, lambda tally: operation.tally(tally, result))
        return result

    def _run(self, operation: _Operation[T], began: float, deadline: float) -> T:
        ticket = self._admit()
        limits = self._limits
        longest = (limits.put_timeout if operation.name == "put" else 0.0) or limits.timeout
        until = min(deadline, began + longest)
        try:
            job = self._crew.submit(partial(operation.work, until))
        except CrewFull:
            self._breaker.forgone(ticket)
            raise StoreUnavailable(self.name, "busy", "too many operations are under way") from None
        if self._crew.wait(job, until):
            return self._settle(job, ticket)
        if not job.started and not self._crew.stuck:
            self._breaker.forgone(ticket)
            raise StoreUnavailable(self.name, "busy", "all its threads were busy until the deadline")
        return self._late(operation, ticket, until - began)

    def _admit(self) -> int:
        if self._closed.is_set():
            raise StoreUnavailable(self.name, "closed", "it was closed")
        ticket = self._breaker.admit()
        if ticket is None:
            raise StoreUnavailable(self.name, "paused", f"left alone after a failure: {self._breaker.text}")
        return ticket

    def _late(self, operation: _Operation[T], ticket: int, given: float) -> T:
        error = StoreUnavailable(self.name, "timeout", f"no answer within {given:.3g} s")
        if given >= min(_FAIR_SECONDS, self._limits.timeout):
            self._open(ticket, error)
        else:
            self._failed_call(ticket, error)
        for loan in operation.lent:
            loan.end()
        saved = operation.salvage(operation.lent)
        if saved is None:
            raise error
        return saved

    def _settle(self, job: Job[T], ticket: int) -> T:
        try:
            result = job.result()
        except StoreUnavailable as error:
            self._open(ticket, error)
            raise
        except LoanEnded:
            self._breaker.forgone(ticket)
            raise StoreUnavailable(self.name, "timeout", "the memory was taken back") from None
        except Exception as error:
            _log.exception("%s: an operation failed in a way that nobody foresaw", self.name)
            unforeseen = StoreUnavailable(self.name, "error", f"{type(error).__name__} in its client")
            self._open(ticket, unforeseen)
            raise unforeseen from error
        self._judge(ticket, result)
        return result

    def _judge(self, ticket: int, result: object) -> None:
        if isinstance(result, list) and all(each.status is Status.FAILED for each in result):
            self._failed_call(ticket, StoreUnavailable(self.name, result[-1].cause, result[-1].reason))
            return
        with self._lock:
            self._failed_calls = 0
        if self._breaker.succeeded(ticket):
            self._report_recovery()

    def _failed_call(self, ticket: int, error: StoreUnavailable) -> None:
        """The store answered, but nothing useful, or had little time to: only several in a row tell of trouble."""
        with self._lock:
            self._failed_calls += 1
            often = self._failed_calls >= _FAILED_CALLS
        if often:
            self._open(ticket, error)
        else:
            self._breaker.forgone(ticket)

    # How it is left alone and comes back.

    def _open(self, ticket: int, error: StoreUnavailable) -> None:
        if error.cause in ("busy", "closed"):
            self._breaker.forgone(ticket)
            return
        if not self._breaker.failed(ticket, error.cause, _without_name(error)):
            return
        self._report_failure(error)
        try:
            threading.Thread(target=self._recover, name=f"warmroute-probe-{self.name}", daemon=True).start()
        except RuntimeError:  # the system has no thread to spare: the next operation finds out
            self._breaker.answered()

    def _recover(self) -> None:
        probes = Crew(f"probe-{self.name}", _PROBES, 1)
        while not self._closed.wait(self._breaker.pause()):
            if self._probe(probes):
                self._breaker.answered()
                break
        probes.close()

    def _probe(self, probes: Crew) -> bool:
        until = time.monotonic() + self._limits.timeout
        try:
            job = probes.submit(partial(self.store.ping, until))
        except CrewFull:
            return False
        if not probes.wait(job, until):
            return False
        try:
            job.result()
        except StoreUnavailable as error:
            if self._breaker.still_failing(error.cause, _without_name(error)):
                self._report_failure(error)
            return False
        except Exception as error:  # noqa: BLE001 - a store that cannot even be asked stays alone
            _log.debug("%s: the ping failed: %r", self.name, error)
            return False
        return True

    # What is said and counted.

    def _report_failure(self, error: StoreUnavailable) -> None:
        if self._said.anew(error.cause):
            self._outage_said = True
            _log.warning("%s. It is left alone and tried again in the background; prompts are computed", error)

    def _report_recovery(self) -> None:
        if self._outage_said:
            self._outage_said = False
            _log.warning("%s serves again", self.name)

    def _report_refusals(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.status is Status.REFUSED and self._said.anew(outcome.cause):
                _log.warning("%s does not take objects: %s", self.name, outcome.reason)

    def _count(self, operation: _Operation[T], began: float, tally: Callable[[Tally], None]) -> None:
        with self._lock:
            total = self._tallies.setdefault(operation.name, Tally())
            total.calls += 1
            total.seconds += time.monotonic() - began
            tally(total)


def _found_so_far(lent: Sequence[Loan]) -> list[Outcome] | None:
    late = failed("timeout", "no answer within the deadline")
    outcomes = [
        Outcome(Status.FOUND, sink.filled) if isinstance(sink, Sink) and sink.complete else late for sink in lent
    ]
    return outcomes if any(each.ok for each in outcomes) else None


def _tally_outcomes(total: Tally, outcomes: list[Outcome], *, moves: bool) -> None:
    for outcome in outcomes:
        total.ok += outcome.ok
        total.missing += outcome.status is Status.MISSING
        total.refused += outcome.status is Status.REFUSED
        total.failed += outcome.status is Status.FAILED
        if moves and outcome.ok:
            total.bytes += outcome.size


def _tally_page(total: Tally, page: Page) -> None:
    total.ok += len(page.entries)


def _tally_one(total: Tally, _nothing: None) -> None:
    total.ok += 1


def _tally_failure(keys: int) -> Callable[[Tally], None]:
    def tally(total: Tally) -> None:
        total.failed += keys

    return tally


def _without_name(error: StoreUnavailable) -> str:
    return str(error).removeprefix(f"{error.store}: ")
