"""The saves of the scheduler half: which chunks a step fills, where they go, and who still reads which blocks.

The rules are those of ``worker_connector.planner``, which asks here in every step and holds the lock meanwhile.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any, NamedTuple, Protocol

from worker_connector.block_tables import NULL_BLOCK, Tables, is_fuller, missing_blocks
from worker_connector.geometry import Group
from worker_connector.ledger import CPU, Ledger, Slot
from worker_connector.plan import Comparison, SaveJob, Span
from worker_connector.request_state import RequestState
from worker_connector.shadow import Check, Shadow
from worker_connector.stats import Stats

OVERDUE_SECONDS = 60.0
"""An unacknowledged save or load keeps an idle engine stepping for no longer than this."""

TAIL_CHUNKS = 4
"""A tail takes a whole slot, so it is kept only behind so many whole chunks."""

_log = logging.getLogger("vllm.warmroute.planner")


class Blocks(Protocol):
    """Keeps the engine from giving blocks to others while a save still has to read them."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Count a use of each block."""

    def let_go(self, blocks: Sequence[int]) -> None:
        """End that use of each."""


class _Source(NamedTuple):
    """What slots get of the request that fills them. Its chunks from position ``exact`` on, and the tail behind them, are not
    exact; ``chunks`` are spared when room is made."""

    tables: Tables
    chunks: frozenset[bytes]
    confined: bool
    exact: int
    priority: int


class _Ended(NamedTuple):
    """A request that is over, whose last, unfinished chunk is still to be saved. ``blocks`` are held for that."""

    source: _Source
    at: int
    tail: bytes
    tokens: int
    blocks: list[int]


@dataclass(slots=True)
class _Save:
    """One step's saves. ``heads`` are the chunks before the saved ones, whose use a save renews."""

    job: SaveJob
    slots: list[Slot] = field(default_factory=list)
    heads: list[list[bytes]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    differences: dict[int, float] = field(default_factory=dict)
    began: float = 0.0
    ranks: int = 0
    failed: bool = False


class Saves:
    """Saves under way, and the planning of more. ``requests`` are the planner's, by id."""

    def __init__(
        self,
        ledger: Ledger,
        groups: Sequence[Group],
        requests: Mapping[str, RequestState],
        *,
        chunk_size: int,
        ranks: int,
        allowed: bool,
        stats: Stats,
        shadow: Shadow | None = None,
        committed: Callable[[Iterable[Slot]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.unit = lcm(*(group.block_size for group in groups)) if groups else chunk_size
        self._ledger = ledger
        self._groups = tuple(groups)
        self._requests = requests
        self._size = chunk_size
        self._ranks = ranks
        self._allowed = allowed
        self._stats = stats
        self._shadow = shadow
        self._committed = committed
        self._clock = clock
        self._saves: dict[int, _Save] = {}
        self._readers_of: dict[int, int] = {}
        self.blocks: Blocks | None = None
        self._ended: list[_Ended] = []

    def __bool__(self) -> bool:
        """Whether a save is under way or waits for the next step."""
        return bool(self._saves or self._ended)

    def is_expected(self) -> bool:
        """Whether a save is under way that is not overdue, or waits for the next step."""
        horizon = self._clock() - OVERDUE_SECONDS
        return bool(self._ended) or any(save.began > horizon for save in self._saves.values())

    def end(self, state: RequestState, tables: Tables) -> bytes:
        """A request is over, of which more may come: the beginning of the chunk in which it ended, as far as the engine
        computed whole blocks of it, is saved in the next step, and its blocks are held until then. Returns its name, empty
        where nothing is saved. ``tables`` are the request's blocks, into which nothing is being loaded."""
        request = state.request
        # Of the token that was sampled last nobody computed anything, and of one that was preempted perhaps of none.
        computed = min(request.num_tokens - 1, request.num_computed_tokens)
        whole = computed // self._size
        tokens = (computed - whole * self._size) // self.unit * self.unit
        if self.blocks is None or not self._allowed or not self._ledger.capacity or not tables:
            return b""
        if computed < request.num_prompt_tokens or whole < TAIL_CHUNKS or not tokens:
            return b""
        chunks = state.extend()[:whole]
        tail = state.name_tail(whole, tokens) if state.eligible else b""
        if not tail or self._ledger.holds(tail):
            return tail
        held = [block for _, blocks in self._parts(whole, tables, tokens) for block in blocks if block != NULL_BLOCK]
        self.blocks.hold(held)
        self._ended.append(_Ended(self._source(state, tables, chunks), whole, tail, tokens, held))
        return tail

    def drop_ended(self) -> None:
        """What waits for the next step is not saved."""
        ended, self._ended = self._ended, []
        for each in ended:
            self._let_go(each.blocks)

    def plan(self, step: int, output: Any, due: list[tuple[RequestState, int]]) -> SaveJob | None:
        """What the step saves for the requests that are ``due``; None where that is nothing."""
        if not due and not self._ended:
            return None
        save = _Save(SaveJob(step, []), began=self._clock())
        for state, scheduled in due:
            self._save_request(state, scheduled, output.kv_connector_block_state, save)
        ended, self._ended = self._ended, []
        for each in ended:
            self._save_ended(each, save)
        if not save.slots and not save.checks:
            return None
        self._saves[step] = save
        self._readers_of.update(dict.fromkeys(save.blocks, step))
        return save.job

    def due(self, output: Any) -> list[tuple[RequestState, int]]:
        """Requests that may fill a chunk in this step, with their scheduled tokens. This is all that a step of pure
        decoding costs, so it costs little per request."""
        due: list[tuple[RequestState, int]] = []
        if not self._allowed or not self._ledger.capacity:
            return due
        requests = self._requests
        for entry in output.scheduled_new_reqs:
            # A session that streams its input comes back with a longer prompt, whose end may be short of the boundary.
            if (state := requests.get(entry.req_id)) is not None:
                state.boundary = 0
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = requests.get(request_id)
            if state is None or not state.eligible:
                continue
            computed = state.request.num_computed_tokens
            end = computed + scheduled
            if computed < state.seen or end >= state.boundary:
                due.append((state, scheduled))
            state.seen = end if scheduled == 1 else min(end, state.request.num_tokens)
        return due

    def _save_request(self, state: RequestState, scheduled: int, blocks: Any, save: _Save) -> None:
        computed, known = state.request.num_computed_tokens, state.request.num_tokens
        # Computed tokens fall behind the cursor after a failed load, a preemption or a rejected draft.
        first = min(state.saved, computed // self._size)
        end = min(computed + scheduled, known) // self._size
        prompt = state.request.num_prompt_tokens
        ends_prompt = computed < prompt <= computed + scheduled
        state.boundary = (max(first, end) + 1) * self._size
        if computed + scheduled < prompt < state.boundary:
            state.boundary = prompt
        if end <= first and not ends_prompt:
            return
        state.saved = max(first, end)
        chunks = state.extend()
        full = range(first, min(end, len(chunks)))
        wanted = [at for at in full if self._lacks(chunks[at])]
        tail = self._new_tail(state) if ends_prompt else b""
        anything = wanted or tail or state.shadowed
        tables = blocks.get_block_ids(state.request.request_id) if anything and blocks is not None else None
        if tables is None:
            return
        if state.shadowed:
            self._check_chunks([at for at in full if at >= state.local // self._size], chunks, tables, save)
        source = self._source(state, tables, chunks)
        saved = [at for at in wanted if self._save_chunk(save, source, at, chunks[at])]
        if saved and saved[0] >= TAIL_CHUNKS:
            # The first chunk behind what was there may make a tail superfluous.
            for superfluous in state.tails(saved[0], self.unit):
                self._ledger.forget(superfluous)
        if tail and self._save_chunk(save, source, len(chunks), tail, self._tail_tokens(state)):
            saved.append(len(chunks))
        if saved:
            save.heads.append(chunks[: saved[0]])

    def _source(self, state: RequestState, tables: Tables, chunks: Sequence[bytes]) -> _Source:
        exact = self._exact_chunks(state, chunks)
        return _Source(tables, frozenset(chunks), state.adapter is not None, exact, state.controls.priority)

    def _check_chunks(self, computed: list[int], chunks: Sequence[bytes], tables: Tables, save: _Save) -> None:
        """Compare chunks that were computed again with those that are held."""
        own, shadow = frozenset(chunks), self._shadow
        for at in computed if shadow is not None else ():
            parts = self._parts(at, tables)
            if any(len(blocks) < group.blocks_per_chunk or NULL_BLOCK in blocks for group, blocks in parts):
                continue
            if shadow is None or (check := shadow.begin(chunks[at], own)) is None:
                continue
            save.checks.append(check)
            save.job.compare.append(Comparison(check.held.index, check.again.index))
            for group, blocks in parts:
                save.blocks += blocks
                save.job.spans.append(Span(check.again.index, group.index, 0, blocks))

    def _parts(self, at: int, tables: Tables, tokens: int = 0) -> list[tuple[Group, list[int]]]:
        """The blocks that a request has of a chunk, or of so many of its first tokens, by group."""
        found = []
        for group in self._groups:
            first = at * group.blocks_per_chunk
            end = first + (tokens or self._size) // group.block_size
            found.append((group, list(tables[group.index][first:end])))
        return found

    def _save_ended(self, ended: _Ended, save: _Save) -> None:
        self._save_chunk(save, ended.source, ended.at, ended.tail, ended.tokens)
        # From now on the blocks are known to be read by a save, which is settled before they get another owner.
        self._let_go(ended.blocks)

    def _let_go(self, blocks: Sequence[int]) -> None:
        if self.blocks is not None and blocks:
            self.blocks.let_go(blocks)

    def _exact_chunks(self, state: RequestState, chunks: Sequence[bytes]) -> int:
        """How many of a request's chunks, and of the tail behind them, were computed from exact KV only: those before the
        first that a lossy copy went into, by itself or through what it was computed from."""
        ledger = self._ledger
        if not ledger.has_approximate:
            return len(chunks) + 1
        exact = ledger.first_approximate(chunks)
        exact += exact == len(chunks)
        offered = ledger.first_approximate(state.wanted)
        if offered < len(state.wanted):
            exact = min(exact, state.local // self._size + offered)
        if state.local % self._size:
            # The engine had the beginning of a chunk of its own, of which the name is not known.
            exact = min(exact, state.local // self._size)
        ledger.mark_approximate(chunks[exact:])
        return exact

    def _tail_tokens(self, state: RequestState) -> int:
        left: int = state.request.num_prompt_tokens % self._size
        return left // self.unit * self.unit

    def _new_tail(self, state: RequestState) -> bytes:
        """The name of the prompt's tail if it is worth a slot and has none."""
        units, whole = self._tail_tokens(state) // self.unit, state.request.num_prompt_tokens // self._size
        if not units or not TAIL_CHUNKS <= whole == len(state.chunks):
            return b""
        tail = state.name_tail(whole, units * self.unit)
        return b"" if self._ledger.holds(tail) else tail

    def _lacks(self, chunk: bytes) -> bool:
        """Whether a chunk is not in the cpu tier, or is there without some of its blocks."""
        slot = self._ledger.lookup(chunk)
        return any(slot.missing) if slot is not None else not self._ledger.holds(chunk)

    def _save_chunk(self, save: _Save, source: _Source, at: int, chunk: bytes, tail_tokens: int = 0) -> bool:
        """Have a chunk saved, or a tail of so many tokens; whether it is."""
        parts, lacking = [], []
        for group, blocks in self._parts(at, source.tables, tail_tokens):
            missing = missing_blocks(blocks)
            if len(blocks) < (tail_tokens or self._size) // group.block_size or (missing and group.reads_everything):
                return False
            lacking.append(missing)
            parts.append((group.index, missing, blocks[missing:]))
        if (held := self._ledger.lookup(chunk)) is not None:
            if not is_fuller(tuple(lacking), held.missing):
                return False
            self._ledger.forget(chunk)
        slot = self._ledger.reserve(
            chunk,
            tuple(lacking),
            source.chunks,
            tokens=tail_tokens,
            confined=source.confined,
            approximate=at >= source.exact,
            priority=source.priority,
        )
        if slot is None:
            return False
        save.slots.append(slot)
        for group_index, missing, blocks in parts:
            if blocks:
                save.blocks += blocks
                save.job.spans.append(Span(slot.index, group_index, missing, blocks))
        return True

    def _end_save(self, job: int) -> None:
        save = self._saves.pop(job)
        for block in save.blocks:
            if self._readers_of.get(block) == job:
                del self._readers_of[block]
        if self._shadow is not None:
            self._shadow.end(save.checks, save.differences, failed=save.failed)
        for slot in reversed(save.slots):
            if save.failed:
                self._ledger.abandon(slot)
            else:
                self._ledger.commit(slot)
        if not save.failed:
            self._committed(save.slots)
        for head in save.heads:
            self._ledger.refresh(reversed(head))

    def reading(self, taken: list[int]) -> list[int]:
        """The saves under way that still read one of the blocks ``taken``, in order."""
        if not self._readers_of:
            return []
        return sorted({self._readers_of[block] for block in taken if block in self._readers_of})

    def distrust(self, output: Any) -> None:
        """Count as failed what reads blocks that the engine writes to in this step before any save is settled."""
        written = {target for _, target in getattr(output, "kv_cache_block_copies", None) or ()}
        written.update(getattr(output, "new_block_ids_to_zero", None) or ())
        for save in self._saves.values() if written else ():
            save.failed |= not written.isdisjoint(save.blocks)

    def acknowledge(self, job: int, ranks: int, *, failed: bool) -> None:
        """So many more ranks ended a save; with the last of them its chunks become visible, or are given up."""
        save = self._saves.get(job)
        if save is None:
            _log.error("The save of an unknown batch %d ended", job)
            return
        save.ranks += ranks
        save.failed |= failed
        if save.ranks >= self._ranks:
            self._stats.saved(CPU, 0 if save.failed else len(save.slots), 0, 0.0)
            self._end_save(job)

    def compared(self, job: int, differences: Mapping[int, float]) -> None:
        """How much slots of that save differ from those of the cache, by slot, on some rank. Before it is acknowledged."""
        if (save := self._saves.get(job)) is not None:
            for slot, value in differences.items():
                save.differences[slot] = max(value, save.differences.get(slot, 0.0))

    def check(self) -> None:
        """Assert every invariant."""
        assert all(job in self._saves for job in self._readers_of.values()), "a block waits for no save"
