"""Which fetches are made for requests that wait, and how long they wait, on a stand-in engine that checks every token."""

import time
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, Request, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector.estimate import MIN_PREFILL_TOKENS
from worker_connector.fetch_pace import FetchPace
from worker_connector.fetches import FETCHES_AT_ONCE, JOBS_OF_BYTES
from worker_connector.lower import TierRules
from worker_connector.request_state import RequestState

MIB = 1 << 20


def written(count: int, chunks: int, **options: Any) -> tuple[TieredEngine, list[list[int]]]:
    """An engine, and prompts that lie in its lower tiers only."""
    engine = TieredEngine(**{"blocks": 400, "slots": 64, **options})
    prompts = [prompt(700 + at, chunks * CHUNK + 1) for at in range(count)]
    for at, tokens in enumerate(prompts):
        engine.serve(f"cold-{at}", tokens)
    lose(engine)
    return engine, prompts


def lose(engine: TieredEngine) -> None:
    engine.reset_prefix_cache()
    engine.lose_cpu()
    engine.plans.clear()


def fetched(engine: TieredEngine) -> list[bytes]:
    """What was fetched, in this order."""
    jobs = [job for plan in engine.plans for job in plan.tiers if job.kind == "fetch"]
    return [piece.chunk for job in jobs for piece in job.pieces]


def test_prompts_that_are_larger_than_the_tier_are_fetched_once_each() -> None:
    engine, prompts = written(6, 10, slots=64)
    engine.lose_cpu()
    engine.ledger.set_capacity(24)
    engine.delay = lambda: 2
    requests = [engine.add(f"warm-{at}", tokens) for at, tokens in enumerate(prompts)]
    engine.run(600)
    assert [request.loads for request in requests] == [1] * 6
    assert len(fetched(engine)) == len(set(fetched(engine))) == 60


def test_those_that_wait_longest_come_first_and_one_that_is_alone_may_have_it_all() -> None:
    engine, prompts = written(3, 10)
    engine.ledger.set_capacity(12)
    engine.hold_tiers = True
    for at, tokens in enumerate(prompts):
        engine.add(str(at), tokens)
    for _ in range(5):
        engine.step()
    under = {piece.chunk for each in engine.under for piece in each.job.pieces}
    assert under == set(RequestState(engine.requests["0"], CHUNK, "m").extend())
    engine.hold_tiers = False
    engine.run()


def test_what_was_evicted_unused_is_fetched_again_and_not_for_ever() -> None:
    engine, prompts = written(1, 6)
    for _ in range(2):
        engine.hold_tiers = True
        request = engine.add("late", prompts[0])
        engine.step()
        engine.hold_tiers = False
        engine.step()
        assert engine.ledger.counts()["cpu"] == 6
        engine.lose_cpu()  # before the engine has any of it
        engine.run()
        assert request.loads == 1
        lose(engine)


def test_a_slow_tier_is_asked_for_no_more_than_so_much_at_once() -> None:
    engine, prompts = written(FETCHES_AT_ONCE + 8, 1, slots=200)
    engine.hold_tiers = True
    for at, tokens in enumerate(prompts):
        engine.add(str(at), tokens)
    for _ in range(10):
        engine.step()
    assert len(engine.under) == FETCHES_AT_ONCE
    engine.hold_tiers = False
    engine.run()
    assert len(fetched(engine)) == len(prompts)


def test_and_for_no_more_bytes() -> None:
    engine, prompts = written(1, 20, slots=200)
    engine.planner.lower.fetches._job_pieces = 4
    engine.hold_tiers = True
    request = engine.add("a", prompts[0])
    for _ in range(10):
        engine.step()
    assert sum(len(each.job.pieces) for each in engine.under) == 4 * JOBS_OF_BYTES
    engine.hold_tiers = False
    engine.run()
    assert request.loads == 1
    assert engine.messages[-1] is not None
    assert len(fetched(engine)) == 20


@pytest.mark.parametrize("way", ["abort", "give up"])
def test_what_was_not_sent_is_never_sent_for_a_request_that_is_gone(way: str) -> None:
    engine, prompts = written(FETCHES_AT_ONCE + 8, 1, slots=200, lower_tier_patience=1.0)
    engine.hold_tiers = True
    for at, tokens in enumerate(prompts):
        engine.add(str(at), tokens)
    if way == "abort":
        for at in range(len(prompts)):
            engine.abort(str(at))
        engine.hold_tiers = False
        engine.run()
        assert not fetched(engine)
        return
    for _ in range(5):
        engine.step()
    engine.now += 2
    for _ in range(40):
        engine.step()
    engine.hold_tiers = False
    engine.run()
    assert len(fetched(engine)) == FETCHES_AT_ONCE


def test_an_abort_leaves_what_others_want() -> None:
    engine, prompts = written(1, 4)
    engine.hold_tiers = True
    engine.add("one", prompts[0])
    engine.step()
    other = engine.add("two", prompts[0])
    engine.step()
    engine.abort("one")
    engine.hold_tiers = False
    engine.run()
    assert other.loads == 1
    assert len(fetched(engine)) == 4


def test_requests_that_nobody_asked_for_give_way() -> None:
    engine, prompts = written(2, 6)
    engine.ledger.set_capacity(14)
    # Of a queue with priorities the later one may be asked for first.
    first = Request("first", prompts[0])
    engine.planner.added(first)
    for _ in range(5):
        engine.step()
    assert engine.ledger.counts()["cpu"] == 6
    second = engine.add("second", prompts[1])
    engine.run()
    assert second.loads == 1
    engine.planner.finished("first")
    assert not engine.planner.lower.fetches._holders


def test_what_waits_is_not_pushed_out_by_what_others_save() -> None:
    engine, prompts = written(1, 6)
    engine.ledger.set_capacity(14)
    waiting = Request("waiting", prompts[0])
    engine.planner.added(waiting)
    for at in range(8):
        engine.serve(f"other-{at}", prompt(900 + at, 6 * CHUNK + 1))
    engine.planner.finished("waiting")
    assert engine.serve("waiting", prompts[0]).loads == 1
    assert len(set(fetched(engine))) == len(fetched(engine)) == 6


def test_what_is_held_goes_when_the_engine_has_it() -> None:
    engine, prompts = written(1, 6)
    engine.serve("a", prompts[0], max_tokens=3)
    assert not engine.planner.lower.fetches._holders
    assert not any(slot.pins for slot in engine.ledger._slots.values())


def count_looks(engine: TieredEngine) -> list[int]:
    looks = [0]
    find = engine.planner.lower.fetches._find

    def counted(*arguments: Any, **options: Any) -> Any:
        looks[0] += 1
        return find(*arguments, **options)

    engine.planner.lower.fetches._find = counted  # type: ignore[method-assign]
    return looks


def test_waiting_requests_are_not_looked_through_in_every_step() -> None:
    engine, prompts = written(4, 8, slots=200)
    engine.hold_tiers = True
    for at, tokens in enumerate(prompts):
        engine.add(str(at), tokens)
    looks = count_looks(engine)
    for _ in range(100):
        engine.step()  # 10 ms each
    assert all(request.answers.count(None) >= 100 for request in engine.requests.values())
    assert looks[0] <= 4 * 6
    engine.hold_tiers = False
    engine.run()


def test_a_step_costs_the_same_however_long_the_prompts_are_that_wait() -> None:
    def seconds(chunks: int) -> float:
        engine, prompts = written(1, chunks, slots=2 * chunks + 8, blocks=4 * chunks + 60)
        engine.hold_tiers = True
        request = engine.add("a", prompts[0])
        engine.step()
        began = time.process_time()
        for _ in range(2000):
            assert engine.planner.match(request, 0) == (None, False)
        taken = time.process_time() - began
        engine.hold_tiers = False
        engine.run()
        return taken

    assert seconds(400) < 5 * max(seconds(10), seconds(10))


# ---- whether, and how long ------------------------------------------------------------------------------------------


def known(engine: TieredEngine, *, prefill: float, fetch: float) -> None:
    """Prefill takes so many seconds per chunk, a fetch of one so many."""
    estimator = engine.planner.estimator
    for _ in range(20):
        estimator.observe_prefill(MIN_PREFILL_TOKENS, prefill * MIN_PREFILL_TOKENS / CHUNK)
        estimator.observe_load(64 * MIB, 1e-6)
        engine.planner.lower.fetches.paces["disk"].observe(MIB, fetch, fetch, 0.0, engine.now)


@pytest.mark.parametrize(("fetch", "loads"), [(0.05, 1), (0.2, 0)])
def test_what_is_computed_faster_is_not_fetched_and_that_is_counted_once(fetch: float, loads: int) -> None:
    engine, prompts = written(1, 6, load_or_compute=True)
    known(engine, prefill=0.1, fetch=fetch)
    engine.delay = lambda: 3
    blocked = engine.add("a", prompts[0])
    for _ in range(50):
        engine.planner.match(blocked, 0)
        engine.now += 0.3 if not loads else 0.0
    engine.run()
    assert blocked.loads == loads
    assert engine.planner.stats.total().get("skipped_loads", {}) == ({} if loads else {"disk": 6})


def test_the_queue_in_front_counts() -> None:
    engine, prompts = written(2, 6, load_or_compute=True)
    known(engine, prefill=0.1, fetch=0.06)
    engine.hold_tiers = True
    engine.add("a", prompts[0])
    engine.add("b", prompts[1])
    engine.step()
    # The first is fetched in 0.36 s instead of computed in 0.6 s; the second would be there after 0.72 s.
    assert len(fetched(engine)) == 6
    engine.hold_tiers = False
    engine.run()


def test_what_is_under_way_for_a_request_does_not_keep_the_rest_from_it() -> None:
    engine, prompts = written(1, 20, load_or_compute=True, slots=200)
    known(engine, prefill=0.1, fetch=0.06)
    engine.planner.lower.fetches._job_pieces = 8
    engine.delay = lambda: 30 * len(engine.under)  # one after the other
    request = engine.add("a", prompts[0])
    for _ in range(5):
        engine.step()
    assert len(fetched(engine)) == 20
    engine.run()
    assert request.loads == 1
    assert len(fetched(engine)) == 20


def test_nobody_waits_longer_than_computing_takes() -> None:
    engine, prompts = written(1, 6, load_or_compute=True, lower_tier_patience=60.0)
    known(engine, prefill=0.1, fetch=0.01)
    engine.hold_tiers = True
    request = engine.add("a", prompts[0])
    began = engine.now
    while request.status == "waiting":
        engine.step()
    assert 0.6 < engine.now - began < 0.8
    assert engine.planner.stats.total()["lower_tier_timeouts"] == {"": 1}
    engine.hold_tiers = False
    engine.run()


def test_a_pace_is_that_of_the_tier_without_the_queue() -> None:
    pace = FetchPace()
    now, fronts = 0.0, []
    for _ in range(20):
        pace.sent(MIB, now)
        fronts.append(pace.sent(MIB, now))
        pace.observe(MIB, 0.1, 0.11, 0.0, now)
        pace.ended(MIB)
        pace.observe(MIB, 0.1, fronts[-1] + 0.11, fronts[-1], now)
        pace.ended(MIB)
        now += 1
    assert pace.bandwidth == pytest.approx(10 * MIB)
    assert fronts[-1] == pytest.approx(0.1)
    assert pace.seconds(2 * MIB, now) == pytest.approx(0.21, rel=0.05)
    assert not pace.is_known(now + 100)


def test_what_was_withdrawn_is_in_nobodys_way() -> None:
    pace = FetchPace()
    for _ in range(5):
        pace.sent(MIB, 0.0)
        pace.ended(MIB)
        pace.observe(MIB, 1.0, 1.0, 0.0, 0.0)
    for _ in range(10):
        pace.sent(MIB, 1.0)
    assert pace.front(1.0) == pytest.approx(10.0)
    for _ in range(9):
        pace.ended(MIB)
    assert pace.front(1.0) == pytest.approx(1.0)
    pace.ended(MIB)
    assert not pace.front(1.0)


def test_a_tier_that_was_measured_long_ago_is_tried_again() -> None:
    engine, prompts = written(1, 6, load_or_compute=True)
    known(engine, prefill=0.001, fetch=1.0)
    engine.now += 100
    assert engine.serve("a", prompts[0]).loads == 1


def test_while_a_request_queues_what_a_look_up_found_is_fetched() -> None:
    writer, prompts = written(1, 4)
    reader = TieredEngine()
    reader.stores, reader.planner.lower.asks = writer.stores, reader
    queued = Request("queued", prompts[0])
    reader.planner.added(queued)
    reader.answer()
    for _ in range(4):
        reader.step()
    assert reader.ledger.counts()["cpu"] == 4
    reader.planner.finished("queued")


# ---- tails ----------------------------------------------------------------------------------------------------------

TAIL = 2 * BLOCK


def with_tail(seed: int, chunks: int = 5) -> list[int]:
    return prompt(seed, chunks * CHUNK + TAIL + 1)


def test_the_tail_of_a_prompt_comes_back_from_below() -> None:
    engine, tokens = TieredEngine(blocks=200), with_tail(30)
    engine.serve("a", tokens)
    assert engine.ledger.counts() == {"gpu": 0, "cpu": 5, "disk": 5}, "nobody outside hears of a tail"
    lose(engine)
    request = engine.serve("b", tokens)
    assert request.loads == 1
    assert admitted(engine) == {"disk": 5 * CHUNK + TAIL}
    assert len({job.job for plan in engine.plans for job in plan.tiers if job.kind == "fetch"}) == 1


def admitted(engine: TieredEngine) -> dict[str, int]:
    found: dict[str, int] = [each.hit_tokens for each in engine.messages if type(each).__name__ == "Admitted"][-1]
    return found


def test_another_engine_finds_the_tail_by_looking_it_up_also_of_a_prompt_that_goes_on() -> None:
    writer, tokens = TieredEngine(blocks=200), with_tail(31)
    writer.serve("a", tokens)
    for more in ([], prompt(32, 2 * CHUNK)):
        reader = TieredEngine(blocks=200)
        reader.stores, reader.planner.lower.asks = writer.stores, reader
        reader.delay = lambda: 2
        request = reader.add("b", [*tokens, *more])
        for _ in range(100):
            reader.step()
            reader.answer()
        assert request.loads == 1
        assert admitted(reader) == {"disk": 5 * CHUNK + TAIL}


def test_nobody_waits_for_the_look_up_of_a_tail() -> None:
    engine, tokens = TieredEngine(blocks=200), with_tail(33)
    engine.serve("a", tokens)
    lose(engine)
    engine.ledger.removed("disk", [chunk for chunk in engine.chunks_in("disk") if engine.ledger.tail_below(chunk)])
    engine.planner.lower.asks = engine
    request = engine.serve("b", tokens)  # nobody answers
    assert engine.questions
    assert request.loads == 1
    assert admitted(engine) == {"disk": 5 * CHUNK}


@pytest.mark.parametrize("cause", ["missing", "bad"])
def test_a_tail_that_is_bad_is_computed_and_off_the_record(cause: str) -> None:
    engine, tokens = TieredEngine(blocks=200), with_tail(34)
    engine.serve("a", tokens)
    lose(engine)
    (tail,) = [chunk for chunk in engine.chunks_in("disk") if engine.ledger.tail_below(chunk)]
    engine.fail = lambda job, chunk, _rank: cause if (job.kind, chunk) == ("fetch", tail) else ""
    assert engine.serve("b", tokens).loads == 1
    assert admitted(engine) == {"disk": 5 * CHUNK}
    engine.fail = lambda job, _chunk, _rank: "full" if job.kind == "write" else ""
    assert not engine.ledger.tail_below(tail) or engine.chunks_in("disk")


def test_a_tail_is_written_only_where_its_tier_admits_it() -> None:
    engine = TieredEngine(blocks=200, rules=(TierRules(name="disk", second_touch=True),))
    tokens = with_tail(35)
    engine.serve("a", tokens)
    assert not engine.chunks_in("disk")
    engine.reset_prefix_cache()
    engine.serve("b", tokens)
    assert len(engine.chunks_in("disk")) == 6


def test_an_approximate_tail_is_written_nowhere() -> None:
    engine = TieredEngine(blocks=200, rules=(TierRules(name="disk", lossy=True),))
    lower, slot = engine.planner.lower, engine.ledger.reserve(bytes(16), tokens=BLOCK, approximate=True)
    assert slot is not None
    engine.ledger.commit(slot)
    lower.committed([slot])
    engine.run()
    assert not engine.chunks_in("disk")


def test_a_request_that_was_preempted_waits_anew() -> None:
    engine, (tokens,) = written(1, 3, lower_tier_patience=1.0)
    request = engine.add("a", tokens, max_tokens=300)
    while request.status != "running":
        engine.step()
    engine.now += 100
    for _ in range(20):
        engine.step()
    assert request.loads == 1
    while engine.running:
        engine._preempt_last()
    lose(engine)
    for _ in range(30):
        engine.step()
    assert request.loads == 2
    assert "lower_tier_timeouts" not in engine.planner.stats.total()


def test_without_slots_nobody_waits() -> None:
    engine = TieredEngine(slots=0)
    engine.planner.lower.asks = engine
    request = engine.add("a", prompt(1, 3 * CHUNK + 1))
    engine.step()
    assert request.answers == [0]
    assert not engine.questions


@pytest.mark.parametrize(("chunks", "fetches"), [(2, 0), (5, 5)])
def test_what_is_too_short_to_be_loaded_is_not_fetched(chunks: int, fetches: int) -> None:
    engine, (tokens,) = written(1, chunks, min_load_tokens=4 * CHUNK)
    engine.planner.lower.fetches.least = 4 * CHUNK
    request = engine.serve("a", [*tokens, *prompt(9, 6 * CHUNK)])
    assert len(fetched(engine)) == fetches
    assert (0 in request.answers) is (not fetches)
