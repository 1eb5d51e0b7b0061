"""What the planner looks at in a step, against a planner that looks at everything in every step."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, PER_CHUNK, Engine, Request, prompt
from worker_connector.config import ConnectorConfig
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.geometry import Group
from worker_connector.ledger import Ledger
from worker_connector.plan import PLAIN, Sample, StepPlan, WorkerReport
from worker_connector.planner import Planner
from worker_connector.request_state import RequestState
from worker_connector.saves import TAIL_CHUNKS, Saves


class Thorough(Planner):
    """Plans every step in full, and considers every request of it for saving."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._saves.__class__ = ThoroughSaves

    def _is_plain(self, output: Any) -> bool:
        del output
        return False


class ThoroughSaves(Saves):
    def due(self, output: Any) -> list[tuple[RequestState, int]]:
        scheduled = output.num_scheduled_tokens.items()
        states = [(self._requests.get(request_id), tokens) for request_id, tokens in scheduled]
        return [(state, tokens) for state, tokens in states if state is not None and state.eligible]


@dataclass
class Client:
    """A request of the traffic. ``drafts`` are proposed per step; ``in_flight`` are the drafts of steps whose outcome
    the scheduler does not know yet, None for a request whose outcomes come at once."""

    request: Request
    drafts: int
    in_flight: list[int] | None
    turns: int
    status: str = "waiting"
    is_resumed: bool = False
    tables: list[list[int]] = field(default_factory=list)


class Traffic:
    """Random requests in the order in which vLLM's scheduler tells of them, for both planners at once: prefill by
    parts, drafts, outcomes that come a step late, preemption (resumed as either model runner wants it), sessions,
    adapters, late and failing transfers."""

    def __init__(self, seed: int, windows: tuple[int, ...]) -> None:
        self.random = random.Random(seed)
        self.groups = tuple(Group(at, "", BLOCK, PER_CHUNK, window) for at, window in enumerate(windows))
        self.messages: tuple[list[Any], list[Any]] = ([], [])
        self.planners = (self._planner(Planner, 0), self._planner(Thorough, 1))
        self.clients: dict[str, Client] = {}
        self.blocks, self.names = 0, 0
        self.saving: list[int] = []
        self.loading: list[str] = []
        self.lora_path = "a"
        self.plain = self.saved = 0
        self.resumed_as_cached = bool(seed % 2)

    def _planner(self, kind: type[Planner], at: int) -> Planner:
        ledger = Ledger(LeastRecentlyUsed())
        ledger.set_capacity(24)
        config = ConnectorConfig(chunk_size=CHUNK, load_or_compute=False)
        return kind(
            config, ledger, self.groups, model="m", chunk_bytes=1, publish=self.messages[at].extend, clock=lambda: 0.0
        )

    def both(self, call: str, *arguments: Any) -> Any:
        fast, thorough = (getattr(planner, call)(*arguments) for planner in self.planners)
        assert fast == thorough, call
        return fast

    def step(self) -> None:
        dice = self.random
        if dice.random() < 0.15 and len(self.clients) < 5:
            self._arrive()
        if dice.random() < 0.004:
            self.both("clear", f"generation {dice.random()}")
        if dice.random() < 0.2:
            self.both("gpu_emptied")
        if dice.random() < 0.01:
            self.lora_path = dice.choice("ab")
        for name in [name for name in self.clients if dice.random() < 0.005]:
            self._finish(name)
        output = self._schedule()
        plan = self._plan(output)
        for name, count in output.num_scheduled_tokens.items():
            self.clients[name].request.num_computed_tokens += count
        self._absorb(plan)
        for name in output.num_scheduled_tokens:
            self._sample(name)

    def _plan(self, output: Any) -> StepPlan:
        fast, thorough = (planner.plan_step(output) for planner in self.planners)
        assert fast == thorough
        assert StepPlan() == PLAIN
        self.plain += fast is PLAIN
        return fast

    def _arrive(self) -> None:
        dice, self.names = self.random, self.names + 1
        tokens = prompt(dice.randrange(3), dice.randrange(1, 120)) + prompt(dice.randrange(9), dice.randrange(40))
        lora = SimpleNamespace(lora_name="x", lora_path=self.lora_path) if dice.random() < 0.2 else None
        request = Request(f"r{self.names}", tokens, max_tokens=dice.choice([1, 30, 90]), lora_request=lora)
        drafts, late = dice.choice([0, 0, 0, 3]), dice.random() < 0.5
        self.clients[request.request_id] = Client(request, drafts, [] if late else None, dice.choice([1, 1, 4]))
        self.both("added", request)

    def _finish(self, name: str) -> None:
        self.both("finished", name)
        self.clients.pop(name)

    def _schedule(self) -> Any:
        scheduled: dict[str, int] = {}
        preempted: set[str] = set()
        new: list[Any] = []
        cached = SimpleNamespace(req_ids=[], new_block_ids=[])
        for name, client in self.clients.items():
            if client.status == "running" and self.random.random() < 0.01:
                client.status, client.tables, client.request.num_computed_tokens = "waiting", [], 0
                client.in_flight = [] if client.in_flight is not None else None
                client.is_resumed = self.resumed_as_cached
                preempted.add(name)
                continue
            if client.status == "waiting" and client.request.num_computed_tokens == 0:
                self._admit(client)
            if client.status == "loading" or (client.status == "running" and self.random.random() < 0.1):
                continue
            scheduled[name] = count = self._count(client)
            fresh = self._extend(client, client.request.num_computed_tokens + count)
            tables = tuple(map(list, client.tables))
            if client.status == "waiting" and not client.is_resumed:
                computed = client.request.num_computed_tokens
                new.append(SimpleNamespace(req_id=name, block_ids=tables, num_computed_tokens=computed))
            else:
                fresh = tables if client.is_resumed else fresh
                cached.req_ids.append(name)
                cached.new_block_ids.append(fresh if any(fresh) else None)
            client.status, client.is_resumed = "running", False
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            preempted_req_ids=preempted,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: self.clients[name].tables),
        )

    def _admit(self, client: Client) -> None:
        request, client.tables = client.request, [[] for _ in self.groups]
        local = self.random.randrange(request.num_tokens) // BLOCK * BLOCK if self.random.random() < 0.3 else 0
        tokens, _ = self.both("match", request, local)
        if tokens is None:
            client.status = "waiting"
            tokens = 0
        self._extend(client, local + tokens)
        self.both("allocated", request, client.tables, tokens)
        request.num_computed_tokens = local + tokens
        if tokens:
            client.status = "loading"
            self.loading.append(request.request_id)

    def _count(self, client: Client) -> int:
        left: int = client.request.num_tokens - client.request.num_computed_tokens
        if left > 1:
            return min(left, self.random.choice([3, CHUNK, 2 * CHUNK]))
        return 1 + (self.random.randrange(client.drafts + 1) if client.drafts else 0)

    def _extend(self, client: Client, tokens: int) -> tuple[list[int], ...]:
        fresh: tuple[list[int], ...] = tuple([] for _ in self.groups)
        for group, table, ids in zip(self.groups, client.tables, fresh, strict=True):
            while len(table) * BLOCK < tokens:
                self.blocks += 1
                ids.append(self.blocks)
                table.append(self.blocks)
            passed = group.first_needed(client.request.num_computed_tokens) // BLOCK
            table[:passed] = [0] * len(table[:passed])
        return fresh

    def _absorb(self, plan: StepPlan) -> None:
        if plan.save is not None:
            self.saved += len(plan.save.spans)
            self.saving.append(plan.save.job)
        report, done = WorkerReport(step=plan.step), set()
        for job in [job for job in self.saving if job in plan.settle or self.random.random() < 0.5]:
            self.saving.remove(job)
            report.saved[job] += 1
            report.saves.append(Sample(1, 1.0))
            if self.random.random() < 0.1:
                report.failed_saves.add(job)
        for name in [name for name in self.loading if self.random.random() < 0.3]:
            self.loading.remove(name)
            done.add(name)
            if self.random.random() < 0.3:
                report.failed_loads[name] = set()
        self.both("absorb", report or None, done)
        for name in done & self.clients.keys():
            self._end_load(self.clients[name], failed=name in report.failed_loads)

    def _end_load(self, client: Client, *, failed: bool) -> None:
        request, client.status = client.request, "waiting"
        if failed:
            request.num_computed_tokens = 0
        elif request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1

    def _sample(self, name: str) -> None:
        client = self.clients[name]
        request = client.request
        late = client.in_flight
        if late:
            self._accept(request, late.pop(0))
        ahead = request.num_computed_tokens - request.num_tokens
        if ahead >= 0 and late is not None:
            late.append(ahead - sum(late) - len(late))
        elif ahead >= 0:
            self._accept(request, ahead)
        if len(request.outputs) >= request.max_tokens:
            self._end_turn(client)

    def _accept(self, request: Request, drafts: int) -> None:
        accepted = self.random.randrange(drafts + 1)
        request.outputs += [self.random.randrange(9) for _ in range(accepted + 1)]
        request.num_computed_tokens -= drafts - accepted

    def _end_turn(self, client: Client) -> None:
        request, client.turns = client.request, client.turns - 1
        if not client.turns:
            self._finish(request.request_id)
            return
        request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        kept = request.all_token_ids[: request.num_computed_tokens]
        request.prompt_token_ids, request.outputs = kept + prompt(self.names, self.random.randrange(1, 20)), []
        client.status, client.in_flight = "waiting", [] if client.in_flight is not None else None


@pytest.mark.parametrize("windows", [(0,), (0, 6), (9, 0, 30)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_looking_at_less_saves_the_same(seed: int, windows: tuple[int, ...]) -> None:
    traffic = Traffic(seed, windows)
    fast, thorough = traffic.planners
    for _ in range(600):
        traffic.step()
        assert fast.ledger.content() == thorough.ledger.content()
    assert traffic.messages[0] == traffic.messages[1]
    assert fast.stats.total() == thorough.stats.total()
    fast.check()
    assert traffic.saved > 100
    assert traffic.plain > 10


def test_a_session_that_streams_its_input_saves_its_tail_in_every_turn() -> None:
    engine = Engine()
    request = engine.add("session", prompt(5, TAIL_CHUNKS * CHUNK + BLOCK), max_tokens=99)
    for _ in range(4):
        engine.step()
    slots = len(engine.ledger._slots)
    engine.running.remove(request)
    engine.waiting.append(request)
    kept = request.all_token_ids[: request.num_computed_tokens]
    request.prompt_token_ids, request.outputs, request.max_tokens = [*kept, *prompt(6, BLOCK)], [], 1
    engine.run()
    assert request.num_prompt_tokens < (TAIL_CHUNKS + 1) * CHUNK
    assert len(engine.ledger._slots) == slots + 1
