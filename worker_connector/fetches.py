"""Which chunks are fetched from the lower tiers for requests that wait, and how long each may wait for them.

- What is fetched for a request is kept from eviction until the engine has given it its blocks, in half of the CPU tier at
  most. A fetch begins if that has room for all of it, and those that wait longest come first; only a request that nobody
  else waits beside may take more. So prompts that together are larger than the tier come in one after the other.
- A tier has so many fetches and bytes under way at a time (``FETCHES_AT_ONCE``, ``JOBS_OF_BYTES``). The rest is not planned
  before they end, nor at all once its request is gone; what is planned and not yet sent is withdrawn with its request.
- A request waits for ``patience`` seconds without a chunk, and in all no longer than it takes to compute what it waits for.
- The engine asks in every step. An answer holds until a fetch it waits for ended, a look-up was answered, it is the
  request's turn, or a moment has passed; until then it costs O(1).
- Of the chunk behind the last whole one, the longest beginning (tail) that a tier has is fetched with the rest. Nobody
  waits for the look-up of a tail.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from worker_connector.estimate import Estimator
from worker_connector.eviction import NORMAL
from worker_connector.fetch_pace import FetchPace
from worker_connector.ledger import Ledger, Slot
from worker_connector.plan import Piece, TierResult
from worker_connector.request_state import RequestState
from worker_connector.saves import TAIL_CHUNKS
from worker_connector.stats import Stats
from worker_connector.waits import ANSWERED, Asks, Jobs, Question, Wait, Wanted

FETCHES_AT_ONCE = 16
"""Fetches from one tier that may be under way."""
JOBS_OF_BYTES = 2
"""So many jobs of full size may be under way from one tier, by their bytes."""
RECHECK_SECONDS = 0.25
"""An answer holds no longer, whatever happened."""
TRIES = 3
"""A chunk that was evicted before its request had it is fetched so often in all."""
_LATELY = 0.5
"""A request that the engine did not ask for so long keeps nobody behind it."""


@dataclass(slots=True)
class _Fetch:
    tier: str
    slots: list[Slot]
    began: float
    front: float
    owner: Wait | None
    waiters: list[Wait]


@dataclass(slots=True)
class _Found:
    """What a request's chunks are up to, from the first on: ``ready``, under way in ``jobs``, ``wanted`` from below.
    ``coming`` chunks are under way, ``brought`` came for it. ``end`` is the first chunk that is nowhere."""

    ready: list[bytes]
    jobs: set[int]
    wanted: list[Wanted]
    coming: int
    brought: int
    end: int
    asking: bool


class Fetches:
    """See the module's text. Everything here runs on the engine's thread, under the ledger's lock."""

    def __init__(
        self,
        ledger: Ledger,
        tiers: Iterable[str],
        jobs: Jobs,
        *,
        groups: int,
        chunk_size: int,
        chunk_bytes: int,
        job_pieces: int,
        patience: float,
        stats: Stats,
        estimator: Estimator,
        load_or_compute: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.asks: Asks | None = None
        self.unit = 0
        """Tails are so many tokens long, times a number; 0 where there are none."""
        self.least = 0
        """Hits of fewer tokens are not loaded."""
        self.paces = {name: FetchPace() for name in tiers}
        self._ledger = ledger
        self._jobs = jobs
        self._whole = (0,) * groups
        self._size = chunk_size
        self._chunk_bytes = chunk_bytes
        self._job_pieces = job_pieces
        self._patience = patience
        self._stats = stats
        self._estimator = estimator
        self._load_or_compute = load_or_compute
        self._clock = clock
        self._waits: dict[str, Wait] = {}
        self._arrivals = 0
        self._under: dict[int, _Fetch] = {}
        self._fetching: dict[bytes, int] = {}
        self._holders: dict[bytes, Wait] = {}
        self._behind: dict[Wait, None] = {}
        self._asking: deque[tuple[Wait, Question]] = deque()
        self._claimed = 0
        self._due = False

    @property
    def under_way(self) -> int:
        """Chunks that are being fetched."""
        return len(self._fetching)

    @property
    def has_work(self) -> bool:
        """Whether requests wait for their turn, and it may have come."""
        return (self._due and bool(self._behind)) or bool(self._asking and not self._asking[0][1].pending)

    # ---- requests -----------------------------------------------------------------------------------------------

    def bring(self, state: RequestState, first: int, *, ahead: bool = False) -> bool:
        """Look up and fetch what the request lacks in the CPU tier from chunk ``first`` on; whether to wait for it.
        ``ahead``: the engine does not wait yet, and may find the beginning in its own cache. O(1) while nothing changed,
        else O(chunks)."""
        if state.adapter is not None or not state.eligible or not self._ledger.capacity:
            return False
        wait = self._wait_of(state.request.request_id)
        if wait.served and not ahead:
            # It was preempted, or goes on: what it waits for now, it did not wait for then.
            wait.began, wait.paid_since, wait.ready, wait.over = None, None, 0, False
        if wait.over:
            return False
        now = self._clock()
        if not ahead:
            wait.asked_at, wait.served = now, False
            if wait.began is None:
                wait.began = wait.since = now
        question = (first, len(state.extend()), ahead)
        if not self._is_known(wait, question, now):
            wait.state, wait.first = state, first
            return self._look(wait, question, now)
        if wait.answer and not ahead and self._is_enough(wait, now):
            self._give_up(wait)
            return False
        return wait.answer

    def origins(self, request_id: str, chunks: Iterable[bytes]) -> dict[str, int]:
        """How many tokens of these chunks were fetched for a request, by tier."""
        wait = self._waits.get(request_id)
        counts: dict[str, int] = {}
        for chunk in chunks if wait is not None and wait.origins else ():
            if wait is not None and (origin := wait.origins.get(chunk)) is not None:
                counts[origin[0]] = counts.get(origin[0], 0) + origin[1]
        return counts

    def served(self, request_id: str) -> None:
        """The engine gave a request its blocks: what was fetched for it is being loaded, or of no use."""
        if (wait := self._waits.get(request_id)) is not None:
            wait.served = True
            self._release(wait)

    def forget(self, request_id: str) -> None:
        """The engine is done with a request. Fetches that were sent go on: others may want the same."""
        if (wait := self._waits.pop(request_id, None)) is not None:
            self._leave(wait)

    def clear(self) -> None:
        """Start anew with every request: what lies below is something else now."""
        for wait in list(self._waits.values()):
            self._leave(wait)
        self._waits.clear()

    def plan_step(self) -> None:
        """Begin the fetches that there is room for now, for those that wait longest first."""
        while self._asking and not self._asking[0][1].pending:
            wait, _ = self._asking.popleft()
            if self._is_waiting(wait) and wait.began is None and wait.question is not None:
                self._look(wait, wait.question, self._clock())
        if not self._due or not self._behind:
            return
        self._due = False
        for wait in sorted(self._behind, key=lambda each: each.arrival):
            if not any(self._free_pieces(tier) for tier in self.paces):
                return
            if wait.state is None or wait.question is None:
                self._stop(wait)
                continue
            self._look(wait, wait.question, self._clock())
            if wait.left and not wait.has_turn:
                return

    def start(self, wait: Wait | None, wanted: Sequence[Wanted], own: frozenset[bytes]) -> int:
        """Reserve slots and plan fetches, up to the first chunk that gets none; how many got one."""
        planned: dict[str, list[tuple[Piece, Slot]]] = {}
        number = 0
        priority = wait.state.controls.priority if wait is not None and wait.state is not None else NORMAL
        for tier, chunk, tokens in wanted:
            slot = self._ledger.reserve(chunk, (), own, tokens=tokens, priority=priority)
            if slot is None:
                break
            number += 1
            planned.setdefault(tier, []).append((Piece(chunk, slot.index, (), tokens), slot))
        for tier, pairs in planned.items():
            for at in range(0, len(pairs), self._job_pieces):
                self._send(wait, tier, pairs[at : at + self._job_pieces])
        return number

    # ---- fetches ------------------------------------------------------------------------------------------------

    def ended(self, number: int, result: TierResult) -> list[Slot]:
        """A fetch ended: its slots that hold what was wanted, from the last to the first."""
        fetch, now = self._under.pop(number), self._clock()
        self._drop(fetch, number)
        holder = next((wait for wait in fetch.waiters if self._is_waiting(wait)), None)
        good = []
        # From the last to the first: the head of a prompt is then the most recently used.
        for slot in reversed(fetch.slots):
            if slot.chunk in result.failed:
                self._ledger.abandon(slot)
                continue
            slot.missing = result.missing.get(slot.chunk, self._whole)
            slot.approximate = slot.chunk in result.lossy
            self._ledger.commit(slot)
            good.append(slot)
            if fetch.owner is not None:
                fetch.owner.came.add(slot.chunk)
            if holder is not None:
                self._hold(holder, slot)
        for wait in fetch.waiters:
            wait.question = wait.question and (-1, -1, False)
        nbytes = sum(self._bytes(slot.tokens) for slot in good)
        self.paces[fetch.tier].observe(nbytes, result.seconds, now - fetch.began, fetch.front, now)
        return good

    def _bytes(self, tokens: int) -> int:
        return self._chunk_bytes * tokens // self._size if tokens else self._chunk_bytes

    def _send(self, wait: Wait | None, tier: str, pairs: Sequence[tuple[Piece, Slot]]) -> None:
        now, slots = self._clock(), [slot for _, slot in pairs]
        front = self.paces[tier].sent(sum(self._bytes(slot.tokens) for slot in slots), now)
        number = self._jobs.fetch(tier, pairs)
        self._under[number] = _Fetch(tier, slots, now, front, wait, [wait] if wait is not None else [])
        for slot in slots:
            self._fetching[slot.chunk] = number
            if wait is not None:
                wait.tried[tier, slot.chunk] = wait.tried.get((tier, slot.chunk), 0) + 1
                wait.origins[slot.chunk] = (tier, slot.tokens or self._size)

    def _drop(self, fetch: _Fetch, number: int) -> None:
        self.paces[fetch.tier].ended(sum(self._bytes(slot.tokens) for slot in fetch.slots))
        for slot in fetch.slots:
            if self._fetching.get(slot.chunk) == number:
                del self._fetching[slot.chunk]
        self._due = True

    def _withdraw(self, wait: Wait) -> None:
        """Take back what was planned for nobody but this request, and not sent."""
        own = [number for number, fetch in self._under.items() if fetch.owner is wait]
        for number in own:
            if any(self._is_waiting(other) for other in self._under[number].waiters if other is not wait):
                continue
            if self._jobs.withdraw(number):
                fetch = self._under.pop(number)
                self._drop(fetch, number)
                for slot in fetch.slots:
                    self._ledger.abandon(slot)

    # ---- what a request waits for -------------------------------------------------------------------------------

    def _wait_of(self, request_id: str) -> Wait:
        wait = self._waits.get(request_id)
        if wait is None:
            self._arrivals += 1
            wait = self._waits[request_id] = Wait(self._arrivals)
        return wait

    def _is_known(self, wait: Wait, question: tuple[int, int, bool], now: float) -> bool:
        if wait.question != question or now >= wait.recheck:
            return False
        if wait.pending != sum(each.pending for each in wait.questions):
            return False
        return wait.answer or wait.version == self._ledger.version

    def _look(self, wait: Wait, question: tuple[int, int, bool], now: float) -> bool:
        """Where the request's chunks are now; begins what can be begun."""
        state, ahead = wait.state, question[2]
        assert state is not None, "a request is looked at before it was asked for"
        if question[0] < 0:  # what it waited for ended; the engine will ask again
            question = (wait.first, len(state.chunks), wait.began is None)
            ahead = question[2]
        for slot in [slot for slot in wait.held.values() if slot.forgotten]:
            self._let_go(wait, slot)
        found = self._find(wait, state, question[0], ahead=ahead)
        if not found.asking and self._size * (len(found.ready) + found.coming + len(found.wanted)) < self.least:
            found = replace(found, jobs=set(), wanted=[], coming=0)
        wait.question, wait.recheck = question, now + RECHECK_SECONDS
        wait.gain = found.coming + found.brought + len(found.wanted)
        if len(found.ready) > wait.ready:
            wait.ready, wait.since = len(found.ready), now
        if not ahead and wait.gain and wait.paid_since is None:
            wait.paid_since = now
        if not ahead and (found.jobs or found.wanted or found.asking) and self._is_enough(wait, now):
            self._give_up(wait)
            return False
        for number in found.jobs:
            if wait not in self._under[number].waiters:
                self._under[number].waiters.append(wait)
        wait.answer = bool(found.jobs) or found.asking
        if found.wanted and self._is_worth(wait, found.wanted, now):
            wait.answer |= self._begin(wait, found, state, ahead=ahead)
        else:
            self._stop(wait)
        wait.version = self._ledger.version
        wait.pending = sum(each.pending for each in wait.questions)
        return wait.answer

    def _find(self, wait: Wait, state: RequestState, first: int, *, ahead: bool) -> _Found:
        chunks, ledger, fetching = state.extend(), self._ledger, self._fetching
        found = _Found([], set(), [], 0, 0, len(chunks), asking=False)
        for at in range(first, len(chunks)):
            chunk = chunks[at]
            if ledger.lookup(chunk) is not None or (ahead and ledger.in_gpu(chunk)):
                found.ready.append(chunk)
                found.brought += chunk in wait.came
            elif (number := fetching.get(chunk)) is not None:
                found.jobs.add(number)
                found.coming += 1
            elif not ledger.holds(chunk) and (tier := self._source(chunk, wait)) is not None:
                found.wanted.append(Wanted(tier, chunk))
            else:
                found.end = at
                found.asking = self._is_asked(wait, state, at)
                break
        if self.unit and found.end >= TAIL_CHUNKS and (found.coming or found.wanted or found.brought):
            self._find_tail(wait, state, found)
        return found

    def _source(self, chunk: bytes, wait: Wait) -> str | None:
        return next((tier for tier in self._ledger.below(chunk) if self._may_try(tier, chunk, wait)), None)

    def _may_try(self, tier: str, chunk: bytes, wait: Wait) -> bool:
        tried = wait.tried.get((tier, chunk), 0)
        if tried and (chunk not in wait.came or tried >= TRIES):
            return False
        return self._jobs.may_fetch(tier, chunk)

    def _is_asked(self, wait: Wait, state: RequestState, at: int) -> bool:
        """Look up, once per chunk, what is on no record; whether an answer is still to come."""
        chunks = state.chunks
        if self.asks is not None and len(chunks) > max(at, wait.asked):
            unknown = [chunk for chunk in chunks[max(at, wait.asked) :] if not self._ledger.below(chunk)]
            wait.asked = len(chunks)
            if unknown:
                wait.questions[:1] = [self.asks.ask(unknown, self._tails_to_ask(wait, state, len(chunks)))]
                if wait.began is None:
                    self._asking.append((wait, wait.questions[0]))
        return bool(wait.questions) and wait.questions[0].pending

    def _tails_to_ask(self, wait: Wait, state: RequestState, at: int) -> list[bytes]:
        if not self.unit or at < TAIL_CHUNKS or at in wait.asked_tails or len(wait.asked_tails) >= TRIES:
            return []
        wait.asked_tails.add(at)
        return [tail for tail in state.tails(at, self.unit) if tail and not self._ledger.tail_below(tail)]

    def _find_tail(self, wait: Wait, state: RequestState, found: _Found) -> None:
        """The longest tail behind what is found, and a look-up of those that are on no record."""
        tails = state.tails(found.end, self.unit)
        for units in range(len(tails), 0, -1):
            tail = tails[units - 1]
            if self._ledger.lookup(tail) is not None:
                found.ready.append(tail)
                return
            if (number := self._fetching.get(tail)) is not None:
                found.jobs.add(number)
                return
            for tier in self._ledger.tail_below(tail) if not self._ledger.holds(tail) else ():
                if self._may_try(tier, tail, wait):
                    found.wanted.append(Wanted(tier, tail, units * self.unit))
                    return
        unknown = self._tails_to_ask(wait, state, found.end) if self.asks is not None else []
        if unknown and self.asks is not None:
            wait.questions = [*(wait.questions or [ANSWERED]), self.asks.ask((), unknown)]

    # ---- how long, and whether ----------------------------------------------------------------------------------

    def _is_enough(self, wait: Wait, now: float) -> bool:
        """Whether a request waited as long as it may."""
        if now - wait.since > self._patience:
            return True
        if wait.paid_since is None or not self._load_or_compute:
            return False
        compute = self._estimator.compute_seconds(wait.gain * self._size)
        return compute is not None and now - wait.paid_since > compute

    def _give_up(self, wait: Wait) -> None:
        wait.over, wait.answer = True, False
        self._leave(wait)
        self._stats.add("lower_tier_timeouts", 1)

    def _is_worth(self, wait: Wait, wanted: Sequence[Wanted], now: float) -> bool:
        """Whether the chunks are fetched and loaded faster than computed, with what is under way in front of them."""
        tokens = sum(each.tokens or self._size for each in wanted)
        compute = self._estimator.compute_seconds(tokens)
        if not self._load_or_compute or compute is None:
            return True
        by_tier: dict[str, int] = {}
        for each in wanted:
            by_tier[each.tier] = by_tier.get(each.tier, 0) + self._bytes(each.tokens)
        if not all(self.paces[tier].is_known(now) for tier in by_tier):
            return True
        # What is under way for the request itself is in nobody's way: it waits for that in any case.
        is_first = not any(fetch.owner is wait for fetch in self._under.values())
        seconds = max(self.paces[tier].seconds(nbytes, now, behind=is_first) for tier, nbytes in by_tier.items())
        worth = seconds + (self._estimator.load_seconds(sum(by_tier.values())) or 0.0) < compute
        if not worth and not wait.counted:
            wait.counted = True
            self._stats.load_skipped(wanted[0].tier, len(wanted))
        return worth

    # ---- room ---------------------------------------------------------------------------------------------------

    def _begin(self, wait: Wait, found: _Found, state: RequestState, *, ahead: bool) -> bool:
        """Fetch what there is room for; whether something was begun or will be."""
        self._unclaim(wait)
        wanted, own = found.wanted, frozenset(state.chunks)
        if not wait.has_turn and not self._is_next(wait, len(wanted), ahead=ahead):
            wait.left = len(wanted)
            self._behind[wait] = None
            return not wait.held  # who holds what others wait for does not wait for what they hold
        wait.has_turn = True
        for chunk in found.ready:
            if (slot := self._ledger.lookup(chunk)) is not None:
                self._hold(wait, slot)
        now = self._within(wanted)
        begun = self.start(wait, now, own)
        rest = len(wanted) - len(now) if begun == len(now) else 0
        if rest:
            wait.left = rest
            self._claimed += rest
            self._behind[wait] = None
        else:
            self._stop(wait)
        return bool(begun or rest)

    def _within(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """The first of these that the tiers may be asked for at once."""
        free = {tier: self._free_pieces(tier) for tier in self.paces}
        first: list[Wanted] = []
        for each in wanted:
            if not free[each.tier]:
                break
            free[each.tier] -= 1
            first.append(each)
        return first

    def _free_pieces(self, tier: str) -> int:
        pace = self.paces[tier]
        if pace.jobs >= FETCHES_AT_ONCE:
            return 0
        under = -(-pace.nbytes // self._chunk_bytes) if self._chunk_bytes else 0
        return max(0, JOBS_OF_BYTES * self._job_pieces - under)

    def _share(self) -> int:
        return max(1, self._ledger.capacity // 2)

    def _is_next(self, wait: Wait, need: int, *, ahead: bool) -> bool:
        """Whether there is room for so many chunks, and nobody was there first."""
        lately = self._clock() - _LATELY
        if any(each.arrival < wait.arrival and not each.has_turn and each.asked_at > lately for each in self._behind):
            return False
        if not ahead and need > self._room(wait):
            self._take_from_others()
        return need <= self._room(wait)

    def _room(self, wait: Wait) -> int:
        """For how many more chunks of a request: for as many as there are while nobody else needs any."""
        used = len(self._holders) + len(self._fetching) + self._claimed
        own = len(wait.held) + sum(len(fetch.slots) for fetch in self._under.values() if fetch.owner is wait)
        return self._share() - used if used > own else 1 << 62

    def _take_from_others(self) -> None:
        """Those that the engine did not ask for yet give up what they hold."""
        for other in [each for each in self._waits.values() if each.began is None and each.held]:
            self._release(other)

    def _hold(self, wait: Wait, slot: Slot) -> None:
        if slot.chunk in self._holders or slot.forgotten or len(self._holders) >= self._share():
            return
        self._ledger.pin(slot)
        self._holders[slot.chunk] = wait
        wait.held[slot.chunk] = slot

    def _let_go(self, wait: Wait, slot: Slot) -> None:
        del wait.held[slot.chunk]
        del self._holders[slot.chunk]
        self._ledger.unpin(slot)

    def _release(self, wait: Wait) -> None:
        """A request needs nothing of what it holds any more, or has to do without."""
        if wait.held:
            # From the last to the first, as they came.
            for slot in reversed(list(wait.held.values())):
                self._let_go(wait, slot)
            self._due = True
        self._stop(wait)

    def _leave(self, wait: Wait) -> None:
        self._release(wait)
        self._withdraw(wait)

    def _unclaim(self, wait: Wait) -> None:
        if wait.has_turn:
            self._claimed -= wait.left
        wait.left = 0

    def _stop(self, wait: Wait) -> None:
        """There is nothing left to be planned for a request."""
        self._unclaim(wait)
        wait.has_turn = False
        if wait in self._behind:
            del self._behind[wait]
            self._due = True

    def _is_waiting(self, wait: Wait) -> bool:
        return (
            not (wait.over or wait.served)
            and wait.state is not None
            and self._waits.get(wait.state.request.request_id) is wait
        )

    def check(self) -> None:
        """Assert every invariant."""
        for chunk, number in self._fetching.items():
            slots = {slot.chunk: slot for slot in self._under[number].slots}
            assert self._ledger.holds(chunk) or slots[chunk].forgotten, "a fetched chunk has no slot"
        held = {chunk: wait for wait in self._waits.values() for chunk in wait.held}
        assert held == self._holders, "a chunk is held for nobody, or twice"
        assert all(slot.pins for wait in self._waits.values() for slot in wait.held.values()), "a held slot may go"
        assert len(held) <= self._share(), "more is held than may be"
        assert self._claimed == sum(each.left for each in self._waits.values() if each.has_turn), "claims are wrong"
        assert {each for each in self._waits.values() if each.left} == set(self._behind), "a turn never comes"
        for tier, pace in self.paces.items():
            under = [fetch for fetch in self._under.values() if fetch.tier == tier]
            nbytes = sum(self._bytes(slot.tokens) for fetch in under for slot in fetch.slots)
            assert (pace.jobs, pace.nbytes) == (len(under), nbytes), "bytes under way are wrong"
