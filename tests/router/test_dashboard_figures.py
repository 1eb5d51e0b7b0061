"""What the dashboard's figures are made of: slots of time, decisions since a cursor, branches of prompts."""

import asyncio
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.messages import Admitted
from router.accounting import Accounting, Decision
from router.admission import Admission
from router.breaker import Breaker
from router.config import WorkerSpec
from router.dashboard import live, prefixes, timeline
from router.dashboard.live import Changes, Cursor, changes
from router.dashboard.prefixes import MOST_NODES, Prompt, described, paths, tree
from router.dashboard.timeline import Timeline, now, points
from router.index import Index
from router.metrics import Metrics
from router.upstream import Timeouts, Upstream
from router.workers import Registry, Worker

BOUNDS = (0.1, 1.0, 10.0)


class Clock:
    """Told what time it is."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def made(clock: Clock) -> tuple[Metrics, Timeline]:
    admission = Admission(10, 10, 1.0, 1 << 20)
    metrics = Metrics(Registry(), Index(), admission)
    return metrics, Timeline(metrics, admission, clock)


def test_growth_falls_into_the_slot_of_its_moment() -> None:
    clock = Clock(1000.0)
    metrics, line = made(clock)
    metrics.prompt_tokens.labels("a").inc(100)
    metrics.actual.labels("a", "cpu").inc(40)
    clock.at = 1002.0
    line.look()
    metrics.prompt_tokens.labels("a").inc(100)
    clock.at = 1004.0
    line.look()
    metrics.requests.labels("a", "m", 200).inc(5)
    metrics.requests.labels("a", "m", 503).inc()
    clock.at = 1009.0
    line.look()
    rows = line.rows(60)
    assert [number for number, _ in rows] == [200, 201]
    first, second = (now([row], line.bounds) for row in rows)
    assert (first["prompt_tokens"], first["hit_rate"]["cpu"], first["hit_rate"]["gpu"]) == (200, 0.2, 0.0)
    assert (second["requests_per_s"], second["failed"]) == (1.2, 1)
    assert second["hit_rate"]["cpu"] is None


def test_a_worker_that_goes_takes_nothing_of_what_was_counted() -> None:
    clock = Clock(1000.0)
    metrics, line = made(clock)
    metrics.prompt_tokens.labels("a").inc(100)
    line.look()
    metrics.forget("a")
    metrics.prompt_tokens.labels("b").inc(7)
    line.look()
    assert now(line.rows(60), line.bounds)["prompt_tokens"] == 107


def test_memory_is_fixed_and_a_clock_set_back_is_survived() -> None:
    clock = Clock(1000.0)
    _, line = made(clock)
    for _ in range(1000):
        clock.at += timeline.SLOT_S
        line.look()
    assert len(line.rows(1e9)) == timeline.KEPT_S // timeline.SLOT_S
    clock.at -= 1000.0
    line.look()
    numbers = [number for number, _ in line.rows(1e9)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == clock.at // timeline.SLOT_S


def test_points_cover_the_whole_time_and_add_up_processes() -> None:
    clock = Clock(60_000.0)
    metrics, line = made(clock)
    clock.at += 4
    metrics.requests.labels("a", "m", 200).inc(8)
    line.look()
    one = line.rows(3600)
    told = points([*one, *one], line.bounds, 3600)
    assert told["step_s"] == 60
    assert len(told["at"]) == 60
    assert told["at"][-1] == 60_000
    assert told["requests_per_s"][-1] == 4.0  # 16 in the 4 seconds that both lived through
    assert told["ttft_p50_s"] == [None] * 60
    assert points([], line.bounds, 300) == {"step_s": 5, "at": []}


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.sampled_from([0.5, 0.95]))
def test_quantiles_lie_in_the_bucket_that_holds_them(counts: Sequence[int], share: float) -> None:
    found = timeline._quantile(counts, BOUNDS, share)
    if not sum(counts):
        assert found is None
        return
    values = [number for number, count in enumerate(counts) for _ in range(count)]
    rank = share * len(values)
    bucket = values[max(0, -int(-rank // 1) - 1)]
    low, high = (0.0, *BOUNDS)[bucket], (*BOUNDS, BOUNDS[-1])[bucket]
    assert found is not None
    assert low <= found <= high


# Decisions.


def accounting(keep: int = 1000) -> tuple[Accounting, Worker]:
    metrics = Metrics(Registry(), Index(), Admission(1, 1, 1.0, 1))
    worker = Worker(WorkerSpec(url="http://h:1"), Upstream("h", "http://h:1", Timeouts(1, 1, 1)), Breaker(5, 5.0))
    return Accounting(keep, metrics, lambda _: None, lambda *_: None), worker


def decide(kept: Accounting, worker: Worker, name: str, at: float = 0.0) -> Decision:
    decision = Decision(name, at, "chat", "m", attempts=1)
    kept.sent(decision, worker, 1, 0)
    return decision


def names(found: Changes) -> list[str]:
    return [decision["request_id"] for decision in found.decisions]


def test_a_cursor_gets_each_decision_once_and_again_when_it_ends() -> None:
    kept, worker = accounting()
    first = decide(kept, worker, "1")
    found = changes(kept, None)
    assert names(found) == ["1"]
    assert names(changes(kept, found.cursor)) == []
    decide(kept, worker, "2")
    first.at, first.duration_s = found.cursor.at, 1.0
    after = changes(kept, found.cursor)
    assert names(after) == ["1", "2"]
    assert names(changes(kept, Cursor(after.cursor.count, after.cursor.at + 5))) == []


def test_tokens_of_an_answer_that_came_before_its_report_are_counted_once() -> None:
    kept, worker = accounting()
    late, prompt = decide(kept, worker, "late"), decide(kept, worker, "prompt")
    for decision in (late, prompt):
        decision.worker, decision.cached_tokens = worker.name, 100
    kept.finished(late)
    kept.admitted(worker, Admitted("late", 200, {"gpu": 60, "cpu": 40}))
    kept.admitted(worker, Admitted("prompt", 200, {"gpu": 60, "cpu": 40}))
    kept.finished(prompt)
    counted = {labels[-1]: tally.value for labels, tally in kept._metrics.actual.series.items()}
    assert counted == {"unknown": 100, "gpu": 60, "cpu": 40}
    assert late.actual_hit_tokens == {"gpu": 60, "cpu": 40}


def test_a_flood_is_cut_and_counted_and_a_restarted_process_begins_anew() -> None:
    kept, worker = accounting()
    for number in range(live.MOST_AT_ONCE + 30):
        decide(kept, worker, str(number))
    found = changes(kept, Cursor(0, 0.0))
    assert found.skipped == 30
    assert names(found) == [str(number) for number in range(30, live.MOST_AT_ONCE + 30)]
    assert len(names(changes(kept, Cursor(10_000, 0.0)))) >= live.BACKLOG
    none_kept, worker = accounting(0)
    decide(none_kept, worker, "1")
    assert names(changes(none_kept, Cursor(0, 0.0))) == []


# Prefixes.


def chunk(*path: int) -> bytes:
    """A chunk whose name covers everything before it, as hashes do."""
    return bytes(path).ljust(16, b".")


def prompt(*path: int) -> Prompt:
    return Prompt("m", 16, [chunk(*path[: end + 1]) for end in range(len(path))])


def test_what_prompts_share_is_a_branch() -> None:
    nodes = tree([prompt(1, 2, 3, 4), prompt(1, 2, 3, 5, 6), prompt(1, 2, 9), prompt(7)])
    assert [(node.depth, node.start, node.end, node.prompts) for node in nodes] == [
        (0, 0, 2, 3),
        (1, 2, 3, 2),
        (0, 0, 1, 1),
    ]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(lambda path: prompt(*path)), max_size=60))
def test_branches_are_real_and_few(of: list[Prompt]) -> None:
    nodes = tree(of)
    assert len(nodes) <= MOST_NODES
    for node in nodes:
        mine = node.path.chunks[: node.end]
        assert node.prompts == sum(path.chunks[: node.end] == mine for path in of)
        assert 0 <= node.start < node.end <= len(node.path.chunks)


def test_long_prompts_are_cut_and_those_without_a_chunk_left_out() -> None:
    long = [chunk(1)] * (prefixes.MOST_CHUNKS + 5)
    (found,) = paths([{("m", 16): [long, []]}, {}])
    assert len(found.chunks) == prefixes.MOST_CHUNKS


def test_a_branch_names_the_workers_that_hold_the_most_of_it() -> None:
    index = Index()
    of = prompt(1, 2, 3, 4)
    for number, worker in enumerate(["all", "half", "none", *(f"w{n}" for n in range(prefixes.MOST_HOLDERS))]):
        index.open(worker)
        if worker != "none":
            index.stored(worker, "cpu", of.chunks if worker == "all" else of.chunks[: 2 - number % 2])
    index.stored("half", "gpu", of.chunks[:2])
    workers = {("m", 16): ["none", "half", "all", *(f"w{n}" for n in range(prefixes.MOST_HOLDERS))]}
    (told,) = asyncio.run(described(index, tree([of, of]), workers))
    assert (told["start_tokens"], told["end_tokens"], told["prompts"]) == (0, 64, 2)
    assert [holder["worker"] for holder in told["holders"][:2]] == ["all", "half"]
    assert told["holders"][0] == {"worker": "all", "tokens": 64, "tiers": {"cpu": 64}}
    assert told["holders"][1]["tiers"] == {"gpu": 32}
    assert told["more_holders"] == 2
