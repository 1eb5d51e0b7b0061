"""The scheduler half: decides what is loaded, what is saved, and what the engine is told.

The engine asks, per request, how many tokens can be loaded beyond its own prefix cache (``match``), tells which blocks
it gave the request (``allocated``), and then, once per step, takes the step's plan (``plan_step``) and hands back what
the workers did (``absorb``). Loads are asynchronous: the engine parks the request until its load is reported.

Rules kept here:

- A chunk is loaded by one request at a time. Others that need it wait, for no longer than a load may take, and then
  find it in the engine's own prefix cache.
- A load that fails makes the engine compute the request's tokens. The chunks at fault are forgotten and the request is
  not offered another load, so failing ends.
- A chunk is saved in the step that fills it, or in the first step that meets it full, from the blocks that the
  request's table names in that very step: tables change behind the window of sliding-window groups.
- Behind enough whole chunks, the beginning of a prompt's last chunk (its tail) is saved too, down to whole blocks, in
  a slot that nobody outside sees; it goes when the chunk is whole.
- Blocks that get another owner while a save still reads them are named in the next plan, and workers finish those
  saves before anything writes to the blocks. Blocks that the engine zeroes or copies to may be written to even before
  that: a save that still reads them is not believed.
- A reset means that the weights may have changed. What is behind the GPU goes or, below, is another generation's; what
  requests computed before it is neither saved nor added to. Where the engine could not empty its own prefix cache,
  nothing is saved or loaded until it has: new requests find KV of former weights there.
- A chunk's hash binds a LoRA adapter by name. When a name gets another adapter, all that was saved goes, and requests
  that still run with the one before neither load nor save.

Nothing here knows vLLM's classes, only the names of their fields; everything runs on the engine's thread except
``heartbeat``, ``content`` and ``digests``.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kv_protocol.digests import SetDigest
from kv_protocol.messages import Admitted, Heartbeat, Message
from worker_connector.block_tables import NULL_BLOCK, Tables, blocks_from, present_runs
from worker_connector.config import ConnectorConfig
from worker_connector.estimate import Estimator, StepTimer
from worker_connector.geometry import Group
from worker_connector.ledger import CPU, GPU, Change, Ledger, Slot
from worker_connector.lower import LowerTiers, TierRules
from worker_connector.plan import PLAIN, LoadJob, Span, StepPlan, WorkerReport
from worker_connector.request_controls import Controls
from worker_connector.request_state import Adapter, RequestState, external_id
from worker_connector.saves import OVERDUE_SECONDS, TAIL_CHUNKS, Blocks, Saves
from worker_connector.shadow import Shadow
from worker_connector.stats import Stats

LOAD_SECONDS = 10.0
"""A load that takes longer is given up and its tokens are computed."""
_NEVER = 1 << 62
"""A token that no request comes to."""

_log = logging.getLogger("vllm.warmroute.planner")


@dataclass(slots=True)
class _Load:
    slots: list[Slot]
    chunks: list[bytes]
    nbytes: int
    tokens: int
    began: float
    failed: bool = False


class Planner:
    """See the module's text. ``chunk_bytes`` is what a chunk takes on one rank; ``publish`` gets messages for report
    readers, in order, while the ledger's lock is held."""

    def __init__(
        self,
        config: ConnectorConfig,
        ledger: Ledger,
        groups: Sequence[Group],
        *,
        model: str,
        ranks: int = 1,
        chunk_bytes: int = 0,
        may_load: bool = True,
        may_save: bool = True,
        stats: Stats | None = None,
        publish: Callable[[list[Message]], None] = lambda _: None,
        gpu_usage: Callable[[], float] = lambda: 0.0,
        tiers: Sequence[TierRules] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.lock = ledger.lock
        self.stats = stats or Stats()
        self.estimator = Estimator()
        self.publish = publish
        self.mark: Callable[[list[bytes], Controls], object] = lambda _chunks, _controls: None
        self.turn_ended: Callable[[Sequence[bytes]], object] = lambda _chunks: None
        self.gpu_usage = gpu_usage
        self._config = config
        self._size = config.chunk_size
        self._groups = tuple(groups)
        self._partial_groups = tuple(group for group in groups if not group.reads_everything)
        self._model = model
        self._ranks = ranks
        self._chunk_bytes = chunk_bytes
        self._may_load = may_load and config.enable_prefix_cache
        self._clock = clock
        self.is_stale = False
        self._requests: dict[str, RequestState] = {}
        self._adapters: dict[str, Adapter] = {}
        self._loads: dict[str, _Load] = {}
        self._loading: dict[bytes, str] = {}
        self._bytes_loading = 0
        self.lower = LowerTiers(
            ledger,
            tiers,
            ranks=ranks,
            groups=len(self._groups),
            chunk_size=config.chunk_size,
            chunk_bytes=chunk_bytes,
            may_load=self._may_load,
            may_save=may_save and config.enable_prefix_cache,
            patience=config.lower_tier_patience,
            stats=self.stats,
            estimator=self.estimator,
            load_or_compute=config.load_or_compute,
            clock=clock,
        )
        self._shadow = Shadow(ledger, self.stats, config.shadow_check, delete=self.lower.delete)
        self._saves = Saves(
            ledger,
            groups,
            self._requests,
            chunk_size=config.chunk_size,
            ranks=ranks,
            allowed=may_save and config.enable_prefix_cache,
            stats=self.stats,
            shadow=self._shadow,
            committed=self.lower.committed,
            clock=clock,
        )
        self._unit = self._saves.unit
        self.lower.fetches.unit = self._unit if self._unit < config.chunk_size else 0
        self._next_loads: list[LoadJob] = []
        self._taken_blocks: list[int] = []
        self._admitted: list[Message] = []
        self._timer = StepTimer(self.estimator, clock)
        self._step = self._evictions_seen = 0

    # ---- requests -----------------------------------------------------------------------------------------------

    def added(self, request: Any) -> None:
        """The engine got a request."""
        with self.lock:
            state = self._state(request)
            if self.lower and not state.controls.skip_load:
                self.lower.bring(state, 0, ahead=True)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens to load beyond the ``computed`` ones, and whether the load is asynchronous; None: ask again.

        Changes nothing that matters, so it may be asked in every step. O(chunks of the prompt).
        """
        with self.lock:
            state = self._state(request)
            state.local, state.offered = computed, 0
            self.ledger.expire()
            tokens = self._loadable(state, computed)
            if tokens is None:
                return None, False
            state.offered = tokens
            return tokens, tokens > 0

    def allocated(self, request: Any, tables: Tables, tokens: int) -> None:
        """The engine gave the request its blocks and wants ``tokens`` tokens loaded into them, 0 for none."""
        with self.lock:
            state = self._state(request)
            state.offered = tokens
            if state.skipped:
                self.stats.load_skipped(CPU, state.skipped)
                state.skipped = 0
            if tokens:
                self._begin_load(state, tables, state.local, state.local + tokens)
            self.lower.served(request.request_id)

    def finished(self, request_id: str, tables: Tables = ()) -> None:
        """The engine is done with a request, or gave it up; ``tables`` are its blocks. A load that is still under way stays
        on record."""
        with self.lock:
            state = self._requests.pop(request_id, None)
            self.lower.forget(request_id)
            if state is None or not state.eligible:
                return
            if self._config.conversation_mode and not state.controls.skip_save and not self.is_stale:
                tail = self._saves.end(state, tables) if request_id not in self._loads else b""
                self.turn_ended([*state.extend(), tail] if tail else state.extend())
            if state.controls.keep or state.controls.tags:
                self.mark(state.extend(), state.controls)

    def hold_blocks(self, blocks: Blocks) -> None:
        """How to keep the engine's blocks for saves of requests that are over; without it there are none."""
        self._saves.blocks = blocks

    def let_blocks_go(self) -> None:
        """Hold no block any more: the engine is about to empty its prefix cache, which it can only if it has them all."""
        with self.lock:
            self._saves.drop_ended()

    # ---- steps --------------------------------------------------------------------------------------------------

    def plan_step(self, output: Any) -> StepPlan:
        """The plan of the step that a ``SchedulerOutput`` describes. O(requests in it)."""
        due = self._saves.due(output)
        if self.is_stale:
            for state, _ in due:
                state.eligible = False
            due = []
        if due:
            due = [pair for pair in due if self._may_be_saved(pair[0])]
        if not due and self._is_plain(output):
            self._step += 1
            self.publish_changes()
            return PLAIN
        with self.lock:
            self._step += 1
            plan = StepPlan(loads=self._next_loads, idle=not output.total_num_scheduled_tokens)
            self._next_loads = []
            taken, self._taken_blocks = self._taken_blocks, []
            self._meet_scheduled(output, taken)
            self._meet_preempted(output)
            self._saves.distrust(output)
            plan.settle = self._saves.reading(taken)
            plan.save = self._saves.plan(self._step, output, due)
            plan.step = self._timer.begin(self._step, self._prompt_tokens(output))
            plan.tiers = self.lower.plan_step() if self.lower else []
            self.publish_changes()
            return plan

    @staticmethod
    def _may_be_saved(state: RequestState) -> bool:
        if state.controls.skip_save:
            state.boundary = _NEVER
            return False
        return True

    def _is_plain(self, output: Any) -> bool:
        """Whether a step only decodes, within blocks and chunks that its requests have. Most steps do, so this comes
        before everything else, and without the lock: nothing that it looks at changes on other threads."""
        cached = output.scheduled_cached_reqs
        return not (
            output.total_num_scheduled_tokens != len(output.num_scheduled_tokens)
            or output.scheduled_new_reqs
            or self._next_loads
            or self._taken_blocks
            or self._saves
            or self.lower.has_work
            or not output.total_num_scheduled_tokens
            or output.preempted_req_ids
            or any(cached.new_block_ids)
        )

    def absorb(self, report: WorkerReport | None, finished: Iterable[str]) -> None:
        """What the workers did, and the requests whose loads every rank has ended. Before the next ``match``."""
        if report is None and not finished:
            self.publish_changes()
            return
        with self.lock:
            if report is not None:
                self._absorb(report)
            for request_id in finished:
                self._end_load(request_id)
            self.publish_changes()

    def has_unfinished_transfers(self) -> bool:
        """Whether an engine without requests must keep stepping so that saves are acknowledged."""
        horizon = self._clock() - OVERDUE_SECONDS
        loads = any(load.began > horizon for load in self._loads.values())
        return loads or self._saves.is_expected() or self.lower.is_expected()

    def clear(self, generation: str, *, gpu_is_empty: bool = True) -> None:
        """The engine's weights may be others now: empty the CPU tier, and leave to others what is in lower tiers.
        ``generation`` is a name that nobody else has. Without ``gpu_is_empty``, the engine's own prefix cache still has KV of
        before, until ``gpu_emptied`` is called."""
        with self.lock:
            self._saves.drop_ended()
            self.ledger.clear_cpu()
            self.lower.enter(generation)
            self.is_stale = not gpu_is_empty
            for request_id, state in self._requests.items():
                if state.request.num_computed_tokens or request_id in self._loads:
                    state.eligible, self.is_stale = False, True
            self.publish_changes()
        if self.is_stale:
            _log.warning(
                "The engine's cache was reset while requests use it: nothing is saved or loaded until its own prefix cache is "
                "empty too, which happens when no request runs. To reset all at once, set reset_running_requests"
            )

    def gpu_emptied(self) -> None:
        """The engine's own prefix cache holds nothing, and no request has KV of before the last reset."""
        self.is_stale = False

    # ---- reports ------------------------------------------------------------------------------------------------

    def publish_changes(self) -> None:
        """Tell readers what changed since the last call."""
        if not self.ledger.has_changes and not self._admitted and self.ledger.evictions == self._evictions_seen:
            return
        with self.lock:
            messages: list[Message] = [*self.ledger.take_changes(), *self._admitted]
            self._admitted.clear()
            if (evictions := self.ledger.evictions - self._evictions_seen) > 0:
                self._evictions_seen = self.ledger.evictions
                self.stats.evicted(CPU, evictions)
            if messages:
                self.publish(messages)

    def publish_found(self) -> None:
        """Tell readers, from another thread, of changes that come without a step."""
        with self.lock:
            if messages := self.ledger.take_changes():
                self.publish(list(messages))

    def take_changes(self) -> list[Change]:
        """Visible changes that were not published yet."""
        return self.ledger.take_changes()

    def content(self) -> dict[str, list[bytes]]:
        """Every tier's visible chunks."""
        return self.ledger.content()

    def digests(self) -> dict[str, SetDigest]:
        """Every tier's digest."""
        return self.ledger.digests()

    def heartbeat(self) -> Heartbeat:
        """Load as of now. O(requests)."""
        with self.lock:
            running = sum(state.running for state in self._requests.values())
            return Heartbeat(
                running=running,
                waiting=len(self._requests) - running,
                uncached_tokens=sum(state.uncached_tokens for state in self._requests.values()),
                gpu_usage=self.gpu_usage(),
                prefill_speed=self.estimator.prefill_speed,
                held_chunks=self.ledger.counts(),
                load_bandwidth={CPU: self.estimator.load_bandwidth * self._ranks, **self.lower.bandwidth()},
            )

    def check(self) -> None:
        """Assert every invariant."""
        with self.lock:
            self.ledger.check()
            pinned = [slot for load in self._loads.values() for slot in load.slots]
            assert all(slot.pins >= pinned.count(slot) for slot in pinned), "a loading slot is not pinned"
            for chunk, request_id in self._loading.items():
                assert chunk in self._loads[request_id].chunks, "a chunk is marked loading without a load"
            self._saves.check()
            self.lower.check()
            assert self._bytes_loading == sum(load.nbytes for load in self._loads.values()), "bytes under way are wrong"

    # ---- hits ---------------------------------------------------------------------------------------------------

    def _state(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None or state.request is not request:
            state = RequestState(request, self._size, self._model)
            if state.adapter is not None:
                self._meet_adapter(*state.adapter)
            self._requests[request.request_id] = state
        return state

    def _meet_adapter(self, name: str, loaded: Adapter) -> None:
        if self._adapters.setdefault(name, loaded) == loaded:
            return
        self._adapters[name] = loaded
        _log.warning("The LoRA adapter %s is another one now: the CPU tier is emptied", name)
        self.ledger.clear_cpu()
        self._saves.drop_ended()
        for other in self._requests.values():
            if other.adapter is not None and other.adapter[0] == name:
                other.eligible = False

    def _loadable(self, state: RequestState, computed: int) -> int | None:
        state.skipped = 0
        if not self._may_load or not state.eligible or state.barred or state.controls.skip_load or self.is_stale:
            return 0
        if getattr(state.request, "skip_reading_prefix_cache", False):
            return 0
        if self.lower and self.lower.bring(state, computed // self._size):
            return None
        end = self._hit_end(state, computed)
        tokens = end - computed
        if tokens <= 0 or tokens < self._config.min_load_tokens:
            return 0
        if self._loading and any(chunk in self._loading for chunk in state.wanted):
            return None if self._may_wait(state) else 0
        state.waiting_since = None
        if self._shadow.takes(state):
            return 0
        return tokens if self._is_worth_loading(state, tokens) else 0

    def _hit_end(self, state: RequestState, computed: int) -> int:
        """The token up to which KV can be loaded; leaves the names of what is wanted for it in ``state.wanted``."""
        chunks, first = state.extend(), computed // self._size
        whole = first
        while whole < len(chunks) and self.ledger.lookup(chunks[whole]) is not None:
            whole += 1
        tails = state.tails(whole, self._unit) if state.eligible and whole >= TAIL_CHUNKS else []
        for units in range(len(tails), 0, -1):
            end = whole * self._size + units * self._unit
            wanted = [*chunks[first:whole], tails[units - 1]]
            if self.ledger.lookup(tails[units - 1]) is not None and self._reaches_back(state, wanted, end):
                state.wanted = wanted
                return end
        while whole > first and not self._reaches_back(state, chunks[first:whole], whole * self._size):
            whole -= 1
        state.wanted = chunks[first:whole]
        return whole * self._size

    def _reaches_back(self, state: RequestState, wanted: list[bytes], end: int) -> bool:
        """Whether the slots of ``wanted``, the chunks from the one of token ``state.local`` on, hold all that groups
        with a limited reach still read after ``end`` tokens. Of a whole prompt, the engine computes the last again."""
        if end == state.request.num_tokens and not all(group.can_repeat_last(end) for group in self._partial_groups):
            return False
        for group in self._partial_groups:
            needed = max(group.first_needed(end), state.local)
            for at in range(needed // self._size, -(-end // self._size)):
                first = max(0, needed - at * self._size) // group.block_size
                slot = self.ledger.lookup(wanted[at - state.local // self._size])
                if slot is None or slot.missing[group.index] > first:
                    return False
        return True

    def _may_wait(self, state: RequestState) -> bool:
        if state.waiting_since is None:
            state.waiting_since = self._clock()
        return self._clock() - state.waiting_since <= LOAD_SECONDS

    def _is_worth_loading(self, state: RequestState, tokens: int) -> bool:
        if not self._config.load_or_compute:
            return True
        nbytes = self._chunk_bytes * tokens // self._size
        worth = self.estimator.worth_loading(nbytes, tokens, self._bytes_loading)
        state.skipped = 0 if worth else -(-tokens // self._size)
        return worth

    # ---- loads --------------------------------------------------------------------------------------------------

    def _begin_load(self, state: RequestState, tables: Tables, start: int, end: int) -> None:
        request_id, refused = state.request.request_id, False
        chunks = state.wanted[: -(-end // self._size) - start // self._size]
        slots: list[Slot] = []
        spans: list[Span] = []
        for at, chunk in enumerate(chunks, start // self._size):
            slot = self.ledger.lookup(chunk)
            found = self._load_spans(slot, at, tables, start, end) if slot is not None else None
            if slot is None or found is None:
                # Forgotten since the query, or a block is wanted that the slot lacks.
                refused = True
                break
            slots.append(slot)
            spans += found
        for slot in slots:
            self.ledger.pin(slot)
        nbytes = self._chunk_bytes * (end - start) // self._size
        self._loads[request_id] = _Load(slots, chunks, nbytes, end - start, self._clock())
        self._loading.update(dict.fromkeys(chunks, request_id))
        self._bytes_loading += nbytes
        blocks = [block for block in blocks_from(self._groups, tables, start) if block != NULL_BLOCK]
        self._next_loads.append(LoadJob(request_id, [] if refused else spans, LOAD_SECONDS, blocks, refused))
        self._taken_blocks += blocks

    def _load_spans(self, slot: Slot, at: int, tables: Tables, start: int, end: int) -> list[Span] | None:
        """The parts of a chunk to load between two tokens; None if the slot lacks one of them."""
        spans = []
        for group in self._groups:
            base = at * group.blocks_per_chunk
            low = max(start // group.block_size, base)
            high = min(end // group.block_size, base + group.blocks_per_chunk)
            for first, blocks in present_runs(tables[group.index][low:high]):
                position = low - base + first
                if slot.missing and position < slot.missing[group.index]:
                    return None
                spans.append(Span(slot.index, group.index, position, blocks))
        return spans

    def _end_load(self, request_id: str) -> None:
        load = self._loads.pop(request_id, None)
        if load is None:
            _log.error("The load of an unknown request %s ended", request_id)
            return
        # From the last to the first: the head of a prompt is then the most recently used.
        for slot in reversed(load.slots):
            self.ledger.unpin(slot)
        for chunk in load.chunks:
            if self._loading.get(chunk) == request_id:
                del self._loading[chunk]
        self._bytes_loading -= load.nbytes
        seconds = self._clock() - load.began
        if load.failed:
            self.stats.load_failed(CPU, len(load.chunks))
        else:
            self.estimator.observe_round_trip(load.nbytes, seconds)
            self.stats.loaded(CPU, len(load.chunks), load.nbytes * self._ranks, seconds)
        state = self._requests.get(request_id)
        if state is not None:
            state.barred = state.barred or load.failed
            state.loaded = 0 if load.failed else load.tokens
            state.offered = 0

    def _fail_load(self, request_id: str, bad_slots: set[int]) -> None:
        load = self._loads.get(request_id)
        if load is None:
            return
        load.failed = True
        for slot in load.slots:
            if slot.index in bad_slots and not slot.forgotten:
                self.ledger.forget(slot.chunk)

    # ---- steps, inside ------------------------------------------------------------------------------------------

    def _meet_scheduled(self, output: Any, taken: list[int]) -> None:
        """Note who runs, and add the blocks that got an owner in this step to ``taken``."""
        for entry in output.scheduled_new_reqs:
            taken += blocks_from(self._groups, entry.block_ids, entry.num_computed_tokens)
            if (state := self._requests.get(entry.req_id)) is not None:
                self._start(state, entry.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        if not any(cached.new_block_ids):
            return
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks:
                taken += [block for table in blocks for block in table]
                if (state := self._requests.get(request_id)) is not None:
                    state.running = True

    def _meet_preempted(self, output: Any) -> None:
        for request_id in output.preempted_req_ids or ():
            state = self._requests.get(request_id)
            if state is not None and request_id not in output.num_scheduled_tokens:
                state.running = False

    def _start(self, state: RequestState, computed: int) -> None:
        state.running = True
        if state.started:
            return
        state.started = True
        request = state.request
        hits = self._loaded_from(state, min(state.loaded, computed))
        hits[GPU] = computed - sum(hits.values())
        hits = {tier: tokens for tier, tokens in hits.items() if tokens}
        self._admitted.append(Admitted(external_id(request.request_id), request.num_prompt_tokens, hits))
        load = self.estimator.load_seconds(self._chunk_bytes * state.loaded // self._size) if state.loaded else 0.0
        self.stats.request(
            request.num_prompt_tokens, hits, prefill_speed=self.estimator.prefill_speed, load_seconds=load or 0.0
        )
        if computed >= self._size:
            used = state.extend()[: computed // self._size]
            self.ledger.touch(reversed(used))
            self.ledger.raise_priority(used, state.controls.priority)
            self.lower.touched([*used, *(state.wanted[-1:] if state.loaded else ())])

    def _loaded_from(self, state: RequestState, loaded: int) -> dict[str, int]:
        """Loaded tokens by the tier from which their chunks were brought for this request."""
        fetched = self.lower.origins(state.request.request_id, state.wanted) if loaded and self.lower else {}
        hits = {}
        for tier, tokens in fetched.items():
            hits[tier] = min(tokens, loaded)
            loaded -= hits[tier]
        hits[CPU] = loaded
        return hits

    def _prompt_tokens(self, output: Any) -> int:
        """How many tokens of prompts a step computes; 0 for one that decodes only."""
        if output.total_num_scheduled_tokens == len(output.num_scheduled_tokens):
            return 0
        tokens = 0
        for request_id, scheduled in output.num_scheduled_tokens.items():
            if scheduled > 1 and (state := self._requests.get(request_id)) is not None:
                left = state.request.num_prompt_tokens - state.request.num_computed_tokens
                tokens += max(0, min(scheduled, left))
        return tokens

    def _absorb(self, report: WorkerReport) -> None:
        for job, differences in report.compared.items():
            self._saves.compared(job, differences)
        for job, ranks in report.saved.items():
            self._saves.acknowledge(job, ranks, failed=job in report.failed_saves)
        for request_id, slots in report.failed_loads.items():
            self._fail_load(request_id, slots)
        if report.tiers or report.lost:
            self.lower.absorb(report.tiers, report.lost)
        if report.damaged:
            self.stats.add("damaged_chunks", len(report.damaged), CPU)
        for sample in report.loads:
            self.estimator.observe_load(sample.nbytes, sample.seconds)
        for sample in report.saves:
            self.estimator.observe_save(sample.nbytes, sample.seconds)
            self.stats.saved(CPU, 0, sample.nbytes, sample.seconds)
        self._timer.end(report.step)
