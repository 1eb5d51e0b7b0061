"""A stand-in for vLLM's scheduler and workers that drives a Planner in the order vLLM does, and checks every byte.

What a block holds is modelled per token: the group and a hash of the whole prefix up to that token. A forward asserts
that every earlier token it reads is right. Saves read their blocks, and loads write theirs, only when the script lets
them end, so a block that was given away too early shows up as a wrong token.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from worker_connector.config import ConnectorConfig
from worker_connector.eviction import LeastRecentlyUsed, Prioritised
from worker_connector.geometry import Group
from worker_connector.ledger import Ledger
from worker_connector.plan import LoadJob, Sample, SaveJob, StepPlan, WorkerReport
from worker_connector.planner import Planner

BLOCK, CHUNK = 4, 16
PER_CHUNK = CHUNK // BLOCK

Content = tuple[int, int]


@dataclass(eq=False)
class Request:
    """The fields of vLLM's Request that the planner reads, and the stand-in's own."""

    request_id: str
    prompt_token_ids: list[int] | None
    max_tokens: int = 1
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: Any = None
    num_computed_tokens: int = 0
    outputs: list[int] = field(default_factory=list)
    status: str = "waiting"
    preempted: int = 0
    tables: list[list[int]] = field(default_factory=list)
    loads: int = 0
    failures: int = 0
    answers: list[int | None] = field(default_factory=list)

    @property
    def all_token_ids(self) -> list[int]:
        return [*(self.prompt_token_ids or ()), *self.outputs]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids or ())

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.outputs)

    @property
    def block_hashes(self) -> list[int]:
        return self.prefixes()[BLOCK - 1 :: BLOCK]

    def prefixes(self) -> list[int]:
        """A hash of the prefix that ends with each token."""
        value, hashes = hash((self.cache_salt, getattr(self.lora_request, "lora_path", ""))), []
        for token in self.all_token_ids:
            value = hash((value, token))
            hashes.append(value)
        return hashes


class Engine:
    """``windows`` gives one KV-cache group per entry: the tokens its layers read back, 0 for all. ``resumed_as_new``:
    list resumed requests among the new ones, as vLLM's second model runner wants it."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        slots: int = 32,
        ranks: int = 1,
        windows: tuple[int, ...] = (0,),
        step_tokens: int = 2 * CHUNK,
        delay: Callable[[], int] = lambda: 0,
        resumed_as_new: bool = False,
        **settings: Any,
    ) -> None:
        self.resumed_as_new = resumed_as_new
        roles = {name: settings.pop(name) for name in ("may_load", "may_save", "tiers") if name in settings}
        self.config = ConnectorConfig(**{"chunk_size": CHUNK, "load_or_compute": False, **settings})
        self.groups = tuple(Group(at, "", BLOCK, PER_CHUNK, window) for at, window in enumerate(windows))
        self.ledger = Ledger(Prioritised(LeastRecentlyUsed))
        self.ledger.set_capacity(slots)
        self.now = 0.0
        self.messages: list[Any] = []
        self.planner = Planner(
            self.config,
            self.ledger,
            self.groups,
            model="m",
            ranks=ranks,
            chunk_bytes=1 << 20,
            publish=self.messages.extend,
            clock=lambda: self.now,
            **roles,
        )
        self.planner.hold_blocks(self)
        self.ranks, self.step_tokens, self.delay = ranks, step_tokens, delay
        self.memory: list[dict[int, dict[int, Content]]] = [{} for _ in range(ranks)]
        self.slots: list[dict[tuple[int, int, int], dict[int, Content]]] = [{} for _ in range(ranks)]
        self.free: deque[int] = deque(range(1, blocks))
        self.owners: dict[int, int] = {}
        self.cached: dict[tuple[int, int], int] = {}
        self.names: dict[int, tuple[int, int]] = {}
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted: set[str] = set()
        self.pending: list[_Transfer] = []
        self.hold_loads = False
        self.hold_saves = False
        self.fail_load: Callable[[LoadJob, int], set[int] | None] = lambda _job, _rank: None
        self.loaded_chunks: list[list[int]] = []
        self.plans: list[StepPlan] = []
        self.resets = 0
        self.weights = 0
        self._ended: dict[str, int] = {}
        self._failed: set[str] = set()

    # ---- what tests do ------------------------------------------------------------------------------------------

    def add(self, name: str, tokens: Iterable[int] | None, **fields: Any) -> Request:
        request = Request(name, None if tokens is None else list(tokens), **fields)
        self.requests[name] = request
        self.waiting.append(request)
        self.planner.added(request)
        return request

    def abort(self, name: str) -> None:
        request = self.requests[name]
        was, request.status = request.status, "aborted"
        self.waiting = [each for each in self.waiting if each is not request]
        self.running = [each for each in self.running if each is not request]
        self.planner.finished(name, [list(table) for table in request.tables])
        if was != "loading":
            self._free(request)
            del self.requests[name]

    def run(self, limit: int = 300) -> int:
        """Step until nothing is left to do; the number of steps."""
        for step in range(limit):
            if not self.requests and not self.planner.has_unfinished_transfers():
                return step
            self.step()
        raise AssertionError(f"still busy after {limit} steps: {[each.request_id for each in self.requests.values()]}")

    def serve(self, name: str, tokens: Iterable[int], **fields: Any) -> Request:
        request = self.add(name, tokens, **fields)
        self.run()
        return request

    def reset_prefix_cache(self) -> None:
        self.planner.let_blocks_go()
        assert not self.owners, "blocks are in use"
        self.cached.clear()
        self.names.clear()
        self.planner.gpu_emptied()

    def clear(self) -> bool:
        """As before or after a change of weights: preempt what runs, if nothing is being loaded, and reset what can be;
        whether that is everything."""
        if not any(request.status in ("loading", "aborted") for request in self.requests.values()):
            while self.running:
                self._preempt_last()
        is_empty = not self.owners
        if is_empty:
            self.reset_prefix_cache()
        self.resets += 1
        self.planner.clear(f"reset {id(self)} {self.resets}", gpu_is_empty=is_empty)
        return is_empty

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self) -> StepPlan:
        self.now += 0.01
        output = self._schedule()
        plan = self.planner.plan_step(output)
        self.plans.append(plan)
        self._run_workers(plan, output)
        for request_id, count in output.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += count
        self._absorb(plan)
        self._sample(output)
        self.planner.check()
        return plan

    def _schedule(self) -> Any:
        budget, scheduled = self.step_tokens, {}
        new: list[Any] = []
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            while (fresh := self._extend(request, request.num_computed_tokens + count)) is None:
                if self._preempt_last() is request:
                    break
            if request not in self.running or fresh is None:
                continue
            budget -= count
            scheduled[request.request_id] = count
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append(tuple(fresh) if any(fresh) else None)
        if not self.preempted:
            budget = self._admit(budget, scheduled, new, cached)
        preempted, self.preempted = self.preempted, set()
        for name in preempted:
            scheduled.pop(name, None)
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            preempted_req_ids=preempted,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: tuple(self.requests[name].tables)),
        )

    def _admit(self, budget: int, scheduled: dict[str, int], new: list[Any], cached: Any) -> int:
        # Requests that hold blocks come first, as in vLLM: they must never wait behind one that lacks them.
        for request in sorted(self.waiting, key=lambda each: not each.tables):
            if not budget:
                break
            if request.status == "loading":
                continue
            local: list[list[int]] = [[] for _ in self.groups]
            external = 0
            if request.num_computed_tokens == 0:
                local, hit = self._local_hit(request)
                answer, is_async = self.planner.match(request, hit)
                request.answers.append(answer)
                if answer is None:
                    continue
                assert is_async == (answer > 0), "vLLM asserts that no tokens are not loaded asynchronously"
                external = 0 if request.skip_reading_prefix_cache else answer
                if not self._adopt(request, local, hit, external):
                    break
                self.planner.allocated(request, [list(table) for table in request.tables], external)
                if external:
                    request.loads += 1
                    request.status, request.num_computed_tokens = "loading", hit + external
                    continue
                request.num_computed_tokens = hit
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            if self._extend(request, request.num_computed_tokens + count) is None:
                if not external and request.tables and not request.loads:
                    self._free(request)
                    request.num_computed_tokens = 0
                break
            self._start(request, count, scheduled, new, cached)
            budget -= count
        return budget

    def _start(self, request: Request, count: int, scheduled: dict[str, int], new: list[Any], cached: Any) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        request.status = "running"
        scheduled[request.request_id] = count
        tables = tuple(list(table) for table in request.tables)
        if request.preempted and not self.resumed_as_new:
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append(tables)
            cached.resumed_req_ids.add(request.request_id)
        else:
            new.append(
                SimpleNamespace(
                    req_id=request.request_id, block_ids=tables, num_computed_tokens=request.num_computed_tokens
                )
            )

    def _sample(self, output: Any) -> None:
        for name in output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is None or request.num_computed_tokens < request.num_tokens:
                continue
            request.outputs.append(hash((name, len(request.outputs))) % 50)
            if len(request.outputs) >= request.max_tokens:
                request.status = "finished"
                self.running.remove(request)
                self.planner.finished(name, [list(table) for table in request.tables])
                self._free(request)
                del self.requests[name]

    # ---- blocks -------------------------------------------------------------------------------------------------

    def _local_hit(self, request: Request) -> tuple[list[list[int]], int]:
        prefixes = request.prefixes()
        for hit in range((request.num_tokens - 1) // BLOCK * BLOCK, -1, -BLOCK):
            tables = [self._hit_table(group, prefixes, hit) for group in self.groups]
            if all(table is not None for table in tables):
                return [table for table in tables if table is not None], hit
        raise AssertionError("a hit of no tokens is always possible")

    def _hit_table(self, group: Group, prefixes: list[int], hit: int) -> list[int] | None:
        first = group.first_needed(hit) // BLOCK
        table = [0] * first
        for at in range(first, hit // BLOCK):
            block = self.cached.get((group.index, prefixes[at * BLOCK + BLOCK - 1]))
            if block is None:
                return None
            table.append(block)
        return table

    def _adopt(self, request: Request, local: list[list[int]], hit: int, external: int) -> bool:
        end = (hit + external) // BLOCK
        skip = [group.first_needed(hit + external) // BLOCK for group in self.groups]
        wanted = [max(0, end - max(hit // BLOCK, first)) for first in skip]
        held = {block for table in local for block in table if block and block not in self.owners}
        if sum(wanted) > len(self.free) - len(held) - (self._reserved(request) if external else 0):
            return False
        tables = []
        for group, table, first in zip(self.groups, local, skip, strict=True):
            kept = [block if at >= first else 0 for at, block in enumerate(table)]
            for block in kept:
                self._own(block)
            tables.append(kept)
            assert group.index == len(tables) - 1
        for table, first in zip(tables, skip, strict=True):
            table += [self._take() if at >= first else 0 for at in range(len(table), end)]
        request.tables = tables
        return True

    def _reserved(self, request: Request) -> int:
        """Blocks that a load must leave to requests which hold theirs without being able to give them back."""
        holders = [each for each in self.waiting if each.tables] + self.running[:1]
        return sum(self._whole(each) for each in [request, *holders]) if holders else 0

    def _whole(self, request: Request) -> int:
        """At most so many blocks does a request come to hold."""
        tokens = request.num_prompt_tokens + request.max_tokens
        reach = [group.window + self.step_tokens + BLOCK if group.window else tokens for group in self.groups]
        return sum(-(-min(tokens, most) // BLOCK) for most in reach)

    def _extend(self, request: Request, tokens: int) -> list[list[int]] | None:
        """Blocks for the first ``tokens`` tokens; drops what windows have passed, as vLLM does before allocating."""
        for group, table in zip(self.groups, request.tables, strict=True):
            for at in range(min(len(table), group.first_needed(request.num_computed_tokens) // BLOCK)):
                if table[at]:
                    self._disown(table[at])
                    table[at] = 0
        need = [-(-tokens // BLOCK) - len(table) for table in request.tables]
        if sum(max(0, count) for count in need) > len(self.free):
            return None
        fresh = [[self._take() for _ in range(count)] for count in need]
        for table, blocks in zip(request.tables, fresh, strict=True):
            table.extend(blocks)
        return fresh

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._own(block)

    def let_go(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._disown(block)

    def _take(self) -> int:
        block = self.free.popleft()
        if (name := self.names.pop(block, None)) is not None:
            self.cached.pop(name, None)
        self.owners[block] = 1
        return block

    def _own(self, block: int) -> None:
        if block:
            if block not in self.owners:
                self.free.remove(block)
            self.owners[block] = self.owners.get(block, 0) + 1

    def _disown(self, block: int) -> None:
        self.owners[block] -= 1
        if not self.owners[block]:
            del self.owners[block]
            self.free.append(block)

    def _free(self, request: Request) -> None:
        for table in request.tables:
            for block in reversed(table):
                if block:
                    self._disown(block)
        request.tables = []

    def _preempt_last(self) -> Request:
        request = self.running.pop()
        self._free(request)
        request.status, request.num_computed_tokens = "waiting", 0
        request.preempted += 1
        self.preempted.add(request.request_id)
        self.waiting.insert(0, request)
        return request

    def _cache(self, request: Request, tokens: int) -> None:
        prefixes = request.prefixes()
        for group, table in zip(self.groups, request.tables, strict=True):
            for at in range(min(tokens, request.num_tokens) // BLOCK):
                name = (group.index, prefixes[at * BLOCK + BLOCK - 1])
                if table[at] and name not in self.cached and table[at] not in self.names:
                    self.cached[name] = table[at]
                    self.names[table[at]] = name

    # ---- workers ------------------------------------------------------------------------------------------------

    def _run_workers(self, plan: StepPlan, output: Any) -> None:
        for transfer in [each for each in self.pending if each.settles(plan.settle)]:
            self._end(transfer)
        for name, count in output.num_scheduled_tokens.items():
            self._forward(self.requests[name], count)
        for job in plan.loads:
            self.loaded_chunks.append(sorted({span.slot for span in job.spans}))
            self.pending += [_Transfer(rank, self.delay(), load=job) for rank in range(self.ranks)]
        if plan.save is not None:
            self.pending += [_Transfer(rank, self.delay(), save=plan.save) for rank in range(self.ranks)]

    def _forward(self, request: Request, count: int) -> None:
        start, prefixes = request.num_computed_tokens, request.prefixes()
        for rank in range(self.ranks):
            for group, table in zip(self.groups, request.tables, strict=True):
                for at in range(group.first_needed(start), start):
                    found = self.memory[rank].get(table[at // BLOCK], {}).get(at % BLOCK)
                    assert table[at // BLOCK], f"{request.request_id} reads token {at} from the null block"
                    assert found == (group.index, self._kv(prefixes[at])), (
                        f"{request.request_id} reads a wrong token {at}"
                    )
                for at in range(start, start + count):
                    block = self.memory[rank].setdefault(table[at // BLOCK], {})
                    block[at % BLOCK] = (group.index, self._kv(prefixes[at]))
        self._cache(request, start + count)

    def _kv(self, prefix: int) -> int:
        """What a token's KV is with the weights of now."""
        return hash((self.weights, prefix)) if self.weights else prefix

    def _absorb(self, plan: StepPlan) -> None:
        self._report = WorkerReport(step=plan.step)
        for transfer in list(self.pending):
            held = self.hold_loads if transfer.load is not None else self.hold_saves
            if not held and transfer.delay <= 0:
                self._end(transfer)
            transfer.delay -= 1
        finished = {name for name, count in self._ended.items() if count == self.ranks}
        report = self._take_report()
        report.step = plan.step
        self.planner.absorb(report or None, finished)
        for name in finished:
            self._finish_load(name)

    def _finish_load(self, name: str) -> None:
        del self._ended[name]
        failed = name in self._failed
        self._failed.discard(name)
        assert name in self.requests, "vLLM asserts that it knows every request whose load ended"
        request = self.requests[name]
        if request.status == "aborted":
            self._free(request)
            del self.requests[name]
            return
        assert request.status == "loading"
        request.status = "waiting"
        if failed:
            request.failures += 1
            request.num_computed_tokens = 0
            self._free(request)
            return
        self._cache(request, request.num_computed_tokens)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1

    def _take_report(self) -> WorkerReport:
        report, self._next_report = getattr(self, "_next_report", WorkerReport()), WorkerReport()
        return report

    def _end(self, transfer: "_Transfer") -> None:
        self.pending.remove(transfer)
        if not hasattr(self, "_next_report"):
            self._next_report = WorkerReport()
        if transfer.save is not None:
            self._end_save(transfer.rank, transfer.save)
        elif transfer.load is not None:
            self._end_load(transfer.rank, transfer.load)

    def _end_save(self, rank: int, job: SaveJob) -> None:
        for span in job.spans:
            for at, block in enumerate(span.blocks, span.at):
                self.slots[rank][span.slot, span.group, at] = dict(self.memory[rank].get(block, {}))
        if job.compare:
            differences = {
                pair.held: 2.0 * (self._in(rank, pair.held) != self._in(rank, pair.again)) for pair in job.compare
            }
            mine = self._next_report.compared.setdefault(job.job, {})
            mine |= {slot: max(value, mine.get(slot, 0.0)) for slot, value in differences.items()}
        self._next_report.saved[job.job] += 1
        self._next_report.saves.append(Sample(1 << 20, 0.001))

    def _in(self, rank: int, slot: int) -> dict[tuple[int, int], dict[int, Content]]:
        """What a slot holds, by group and position."""
        return {place[1:]: content for place, content in self.slots[rank].items() if place[0] == slot}

    def _end_load(self, rank: int, job: LoadJob) -> None:
        bad = set() if job.refused else self.fail_load(job, rank)
        if bad is None:
            for span in job.spans:
                for at, block in enumerate(span.blocks, span.at):
                    self.memory[rank][block] = dict(self.slots[rank][span.slot, span.group, at])
            self._next_report.loads.append(Sample(1 << 20, 0.001))
        else:
            self._failed.add(job.request_id)
            self._next_report.failed_loads.setdefault(job.request_id, set()).update(bad)
        self._ended[job.request_id] = self._ended.get(job.request_id, 0) + 1


@dataclass(eq=False)
class _Transfer:
    rank: int
    delay: int
    load: LoadJob | None = None
    save: SaveJob | None = None

    def settles(self, jobs: list[int]) -> bool:
        return self.save is not None and self.save.job in jobs


def prompt(seed: int, length: int) -> list[int]:
    """``length`` random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]
