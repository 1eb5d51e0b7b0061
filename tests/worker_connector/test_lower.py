"""Lower tiers as the scheduler half uses them, on a stand-in engine that checks every token it reads."""

import random
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, prompt
from tests.worker_connector.tiered_engine import TieredEngine, spoil
from worker_connector.ledger import CPU
from worker_connector.lower import EMPTY_AGAIN_SECONDS, PAUSE_SECONDS, TierRules

DISK, REMOTE = TierRules(name="disk"), TierRules(name="remote")


def forget_above(engine: TieredEngine) -> None:
    engine.reset_prefix_cache()
    engine.lose_cpu()


def hits(engine: TieredEngine) -> dict[str, int]:
    """Of the request that began to run last."""
    return [message.hit_tokens for message in engine.messages if type(message).__name__ == "Admitted"][-1]


def test_what_was_saved_is_written_down_and_fetched_back() -> None:
    engine, tokens = TieredEngine(), prompt(1, 3 * CHUNK + 2)
    engine.serve("a", tokens)
    assert len(engine.chunks_in("disk")) == 3
    assert engine.ledger.counts() == {"gpu": 0, CPU: 3, "disk": 3}
    forget_above(engine)
    request = engine.serve("b", tokens)
    assert request.loads == 1
    assert hits(engine) == {"disk": 3 * CHUNK}
    assert engine.ledger.counts()[CPU] == 3


def test_the_engine_steps_on_while_a_fetch_is_under_way() -> None:
    engine, tokens = TieredEngine(), prompt(2, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.hold_tiers = True
    waiting = engine.add("b", tokens)
    other = engine.add("c", prompt(3, CHUNK), max_tokens=5)
    for _ in range(10):
        engine.step()
    assert other.status == "finished"
    assert waiting.answers[-1] is None
    engine.hold_tiers = False
    engine.run()
    assert waiting.loads == 1


def test_waiting_ends_when_patience_does() -> None:
    engine, tokens = TieredEngine(lower_tier_patience=1.0), prompt(4, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.hold_tiers = True
    late = engine.add("b", tokens)
    steps = 0
    while late.status != "finished":
        engine.step()
        steps += 1
        assert steps < 200
    assert late.loads == 0
    assert engine.planner.stats.total()["lower_tier_timeouts"] == {"": 1}
    engine.hold_tiers = False
    engine.run()


@pytest.mark.parametrize("cause", ["missing", "bad"])
def test_a_bad_copy_is_taken_off_the_record_and_the_next_tier_is_asked(cause: str) -> None:
    engine, tokens = TieredEngine(rules=(DISK, REMOTE)), prompt(5, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.fail = lambda job, _chunk, _rank: cause if (job.tier, job.kind) == ("disk", "fetch") else ""
    request = engine.serve("b", tokens)
    assert request.loads == 1
    assert hits(engine) == {"remote": 2 * CHUNK}
    counts = engine.planner.stats.total()
    assert counts["missing_chunks" if cause == "missing" else "damaged_chunks"] == {"disk": 2}


def test_what_comes_from_a_slower_tier_is_written_to_the_faster_one() -> None:
    engine, tokens = TieredEngine(rules=(DISK, REMOTE)), prompt(50, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.stores["disk"].clear()
    engine.serve("b", tokens)
    assert hits(engine) == {"remote": 2 * CHUNK}
    assert len(engine.chunks_in("disk")) == 2


def test_what_a_store_gave_up_is_off_the_record_even_if_it_was_written_just_before() -> None:
    engine, tokens = TieredEngine(), prompt(51, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    (first, _) = engine.ledger.newest("disk", 2)
    with engine.ledger.lock:
        engine.planner.lower.absorb({}, {"disk": {first}})
    assert engine.ledger.counts()["disk"] == 1


def test_a_store_that_is_away_costs_one_try_and_keeps_its_record() -> None:
    engine, tokens = TieredEngine(), prompt(6, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.fail = lambda _job, _chunk, _rank: "unreachable"
    assert engine.serve("b", tokens).loads == 0
    assert engine.ledger.counts()["disk"] == 2
    forget_above(engine)
    began = len([job for plan in engine.plans for job in plan.tiers])
    assert engine.serve("c", tokens).loads == 0
    jobs = [job for plan in engine.plans for job in plan.tiers][began:]
    assert not [job for job in jobs if job.kind == "fetch"]
    engine.fail = lambda _job, _chunk, _rank: ""
    engine.now += PAUSE_SECONDS + 1
    forget_above(engine)
    assert engine.serve("d", tokens).loads == 1


@pytest.mark.parametrize("cause", ["throttled", "clusterdown", "tls"])
def test_what_a_store_fails_for_as_a_whole_leaves_the_record(cause: str) -> None:
    engine, tokens = TieredEngine(), prompt(60, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    engine.fail = lambda job, _chunk, _rank: cause if job.kind == "fetch" else ""
    assert engine.serve("b", tokens).loads == 0
    assert engine.ledger.counts()["disk"] == 2


@pytest.mark.parametrize("cause", ["full", "readonly", "read_only"])
def test_a_tier_that_takes_nothing_is_still_read_and_is_not_asked_to_take_more_for_a_while(cause: str) -> None:
    engine, tokens = TieredEngine(), prompt(61, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.fail = lambda job, _chunk, _rank: cause if job.kind == "write" else ""
    engine.serve("b", prompt(62, 2 * CHUNK + 1))
    forget_above(engine)
    engine.plans.clear()
    assert engine.serve("c", tokens).loads == 1
    assert {job.kind for plan in engine.plans for job in plan.tiers} == {"fetch"}


def test_a_chunk_is_there_only_if_every_rank_has_it() -> None:
    engine, tokens = TieredEngine(ranks=2), prompt(7, 2 * CHUNK + 1)
    engine.fail = lambda job, _chunk, rank: "full" if (job.kind, rank) == ("write", 1) else ""
    engine.serve("a", tokens)
    assert engine.ledger.counts()["disk"] == 0
    engine.fail = lambda _job, _chunk, _rank: ""


def test_what_another_engine_wrote_is_found_by_looking_it_up() -> None:
    writer, tokens = TieredEngine(), prompt(8, 3 * CHUNK + 1)
    writer.serve("a", tokens)
    reader = TieredEngine()
    reader.stores, reader.planner.lower.asks = writer.stores, reader
    request = reader.add("b", tokens)
    reader.step()
    assert request.answers == [None]
    reader.answer()
    reader.run()
    assert request.loads == 1
    assert hits(reader) == {"disk": 3 * CHUNK}


def test_a_look_up_without_an_answer_delays_by_its_own_time_only() -> None:
    engine = TieredEngine()
    engine.planner.lower.asks = engine
    request = engine.add("a", prompt(9, 2 * CHUNK))
    engine.step()
    assert request.answers == [None]
    engine.questions[0].pending = False
    engine.run()
    assert request.loads == 0


def test_second_touch_writes_only_what_was_used_again() -> None:
    engine, tokens = TieredEngine(rules=(TierRules(name="disk", second_touch=True),)), prompt(10, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    assert not engine.chunks_in("disk")
    engine.serve("b", tokens)
    assert len(engine.chunks_in("disk")) == 2


def test_write_back_writes_when_slots_run_short() -> None:
    engine = TieredEngine(rules=(TierRules(name="disk", writes="back"),), slots=8)
    engine.serve("a", prompt(11, 3 * CHUNK + 1))
    assert not engine.chunks_in("disk")
    engine.serve("b", prompt(12, 4 * CHUNK + 1))
    engine.serve("c", prompt(13, 4 * CHUNK + 1))
    assert engine.chunks_in("disk")


@pytest.mark.parametrize("role", ["may_load", "may_save"])
def test_roles(role: str) -> None:
    engine, tokens = TieredEngine(**{role: False}), prompt(14, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    assert bool(engine.chunks_in("disk")) is (role == "may_load")
    forget_above(engine)
    assert engine.serve("b", tokens).loads == 0


def test_chunks_under_an_adapter_stay_above() -> None:
    engine = TieredEngine()
    adapter = type("Lora", (), {"lora_name": "x", "lora_path": "/x", "lora_int_id": 1})()
    engine.serve("a", prompt(15, 2 * CHUNK + 1), lora_request=adapter)
    assert engine.ledger.counts()[CPU] == 2
    assert not engine.chunks_in("disk")


def test_tails_under_an_adapter_stay_above() -> None:
    engine = TieredEngine(blocks=200, conversation_mode=True)
    adapter = type("Lora", (), {"lora_name": "x", "lora_path": "/x", "lora_int_id": 1})()
    request = engine.serve("a", prompt(15, 5 * CHUNK + 2 * BLOCK + 1), lora_request=adapter, max_tokens=BLOCK + 1)
    assert len(request.outputs) == BLOCK + 1
    assert not engine.stores["disk"], "another engine may have another adapter of that name"


def test_after_a_reset_nothing_below_is_used_and_nothing_is_deleted() -> None:
    engine, tokens = TieredEngine(ranks=2), prompt(16, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.planner.lower.asks = engine
    engine.clear()
    assert engine.ledger.counts() == {"gpu": 0, CPU: 0, "disk": 0}
    assert len(engine.stores["disk"]) == 4
    engine.weights = 1
    after = engine.add("b", tokens)
    engine.answer()
    engine.run()
    assert after.loads == 0
    assert len(engine.stores["disk"]) == 8
    forget_above(engine)
    assert engine.serve("c", tokens).loads == 1


def test_what_is_under_way_at_a_reset_belongs_to_the_weights_of_before() -> None:
    engine, tokens = TieredEngine(), prompt(60, 3 * CHUNK + 1)
    engine.hold_tiers = True
    engine.add("a", tokens)
    for _ in range(8):
        engine.step()
    assert any(under.job.kind == "write" for under in engine.under)
    old = engine.planner.lower.generation
    assert engine.clear()
    engine.weights = 1
    engine.add("b", tokens)
    for _ in range(8):
        engine.step()
    engine.hold_tiers = False
    engine.run()
    assert old == ""
    assert len(engine.stores["disk"]) == 6, "three chunks of either weights"
    forget_above(engine)
    assert engine.serve("c", tokens).loads == 1
    assert engine.clear()
    engine.weights = 0
    engine.planner.lower.rename("")
    engine.planner.ledger.stored("disk", [chunk for chunk in engine.chunks_in("disk") if engine.has("disk", chunk)])
    assert engine.serve("d", tokens).loads == 1


def test_saves_and_loads_rest_until_what_a_reset_left_in_the_engine_is_gone() -> None:
    engine, tokens = TieredEngine(), prompt(61, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.hold_loads = True
    engine.ledger.clear_cpu()
    engine.reset_prefix_cache()
    engine.add("b", tokens)
    for _ in range(10):
        engine.step()
    assert engine.requests["b"].status == "loading"
    assert not engine.clear()
    engine.hold_loads = False
    engine.run()
    written = len(engine.stores["disk"])
    engine.serve("c", tokens)
    assert (engine.ledger.counts()[CPU], len(engine.stores["disk"])) == (0, written)
    engine.reset_prefix_cache()
    engine.serve("d", tokens)
    assert (engine.ledger.counts()[CPU], len(engine.stores["disk"])) == (3, 2 * written)


def test_engines_that_name_their_weights_alike_share_again() -> None:
    one, two, tokens = TieredEngine(), TieredEngine(), prompt(62, 3 * CHUNK + 1)
    two.stores = one.stores
    two.planner.lower.asks = two
    for engine in (one, two):
        assert engine.clear()
        engine.weights = 1
    one.serve("a", tokens)

    def hit() -> int:
        two.ledger.clear_cpu()
        two.reset_prefix_cache()
        request = two.add(f"b{two.now}", tokens)
        two.answer()
        two.run()
        return request.loads

    two.planner.lower._may_save = False
    assert not hit()
    one.planner.lower.rename("step 1")
    one.run()
    assert not hit()
    two.planner.lower.rename("step 1")
    assert hit()


@pytest.mark.parametrize("seed", range(12))
def test_engines_whose_weights_change_at_random_never_mix_them(seed: int) -> None:
    rng = random.Random(seed)
    engines = [
        TieredEngine(
            rules=(DISK, REMOTE), blocks=90, slots=rng.choice([7, 40]), ranks=2, delay=lambda: rng.choice([0, 0, 1, 3])
        )
        for _ in range(2)
    ]
    engines[1].stores = engines[0].stores
    stems = [prompt(seed * 100 + at, rng.randrange(CHUNK, 6 * CHUNK)) for at in range(3)]
    named = 0
    for at in range(150):
        for engine in engines:
            engine.planner.lower.asks = engine
            if rng.random() < 0.3:
                engine.add(f"{at}", rng.choice(stems)[: rng.randrange(1, 6 * CHUNK)], max_tokens=rng.choice([1, 9]))
            if rng.random() < 0.05 and engine.clear():
                engine.weights = rng.randrange(3)
            if rng.random() < 0.1 and not engine.planner.is_stale and engine.planner.lower.generation[:1] != "w":
                named += bool(engine.planner.lower.generation)
                if engine.planner.lower.generation:
                    engine.planner.lower.rename(f"w{engine.weights}")
            if not engine.owners and rng.random() < 0.3:
                engine.reset_prefix_cache()
            if rng.random() < 0.5:
                engine.answer()
            engine.step()
    for engine in engines:
        engine.answer()
        engine.planner.lower.asks = None
        engine.run(3000)
        engine.planner.check()
    assert named


def test_a_tier_that_is_emptied_is_empty() -> None:
    engine, tokens = TieredEngine(ranks=2), prompt(16, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.planner.lower.drop("disk")
    engine.run()
    assert not engine.chunks_in("disk")
    assert engine.ledger.counts() == {"gpu": 0, CPU: 2, "disk": 0}


def test_nothing_is_fetched_from_a_tier_that_is_being_emptied() -> None:
    engine, tokens = TieredEngine(), prompt(53, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.planner.lower.asks = engine
    engine.reset_prefix_cache()
    engine.hold_tiers = True
    engine.lose_cpu()
    engine.planner.lower.drop("disk")
    after = engine.add("b", tokens)
    engine.answer()  # the store still has it all
    assert engine.ledger.counts()["disk"] == 0
    chunks = list(engine.chunks_in("disk"))
    engine.ledger.stored("disk", chunks)
    with engine.ledger.lock:
        assert not engine.planner.lower.promote("disk", chunks)
    for _ in range(5):
        engine.step()
    assert not any(under.job.kind == "fetch" for under in engine.under)
    engine.hold_tiers = False
    engine.run()
    assert after.loads == 0
    engine.planner.check()


def test_a_tier_that_could_not_be_emptied_gives_nothing_until_it_is() -> None:
    engine, tokens = TieredEngine(), prompt(54, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.planner.lower.asks = engine
    engine.reset_prefix_cache()
    engine.drops_fail = True
    engine.lose_cpu()
    engine.planner.lower.drop("disk")
    engine.run()
    engine.add("b", tokens)
    engine.answer()
    engine.run()
    assert engine.ledger.counts()["disk"] == 2
    forget_above(engine)
    assert engine.serve("c", tokens).loads == 0
    engine.drops_fail, engine.planner.lower.asks = False, None
    engine.now += EMPTY_AGAIN_SECONDS
    engine.serve("d", prompt(55, CHUNK + 1))
    engine.run()
    engine.planner.check()
    forget_above(engine)
    engine.serve("e", tokens)
    forget_above(engine)
    assert engine.serve("f", tokens).loads == 1


def test_chunks_that_could_not_be_deleted_are_not_found_until_they_are() -> None:
    engine, tokens = TieredEngine(ranks=2), prompt(56, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.serve("other", prompt(57, 2 * CHUNK + 1))
    chunks = list(engine.chunks_in("disk"))[:2]
    engine.planner.lower.asks = engine
    forget_above(engine)
    engine.drops_fail = True
    with engine.ledger.lock:
        engine.planner.lower.drop("disk", chunks)
    engine.run()
    engine.planner.check()
    assert engine.planner.lower.may_be_found("disk", chunks) == []
    engine.drops_fail, engine.planner.lower.asks = False, None
    engine.now += EMPTY_AGAIN_SECONDS
    engine.serve("c", prompt(58, 2))
    engine.planner.check()
    assert engine.planner.lower.may_be_found("disk", chunks) == chunks
    assert not engine.chunks_in("disk") & set(chunks)
    assert len(engine.chunks_in("disk")) == 2


def test_a_write_that_failed_under_another_name_of_the_weights_is_done_under_this_one() -> None:
    engine = TieredEngine()
    engine.hold_tiers = True
    engine.add("a", prompt(59, 2 * CHUNK + 1))
    for _ in range(10):
        engine.step()
    assert any(under.job.kind == "write" for under in engine.under)
    engine.fail = lambda job, _chunk, _rank: "" if job.generation else "failed"
    with engine.ledger.lock:
        engine.planner.lower.rename("shared")
    engine.hold_tiers = False
    engine.run()
    assert len(engine.chunks_in("disk")) == 2


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_writes_leave_half_of_few_slots_unpinned(slots: int) -> None:
    engine = TieredEngine(rules=(DISK, REMOTE), slots=slots)
    engine.hold_tiers = True
    for number in range(12):
        engine.add(str(number), prompt(300 + number, CHUNK + 1))
        for _ in range(3):
            engine.step()
    pinned = {piece.slot for under in engine.under for piece in under.job.pieces}
    assert 0 < len(pinned) <= max(2, slots // 2)
    engine.hold_tiers = False
    engine.run()


def test_what_is_gone_before_it_was_written_is_not_remembered() -> None:
    engine = TieredEngine(rules=(TierRules(name="disk", writes="back"),), slots=16)
    for number in range(40):
        engine.serve(str(number), prompt(100 + number, 4 * CHUNK + 1))
        forget_above(engine)
    assert not engine.chunks_in("disk")
    assert len(engine.planner.lower._unwritten["disk"]) <= 2 * 16 + 64


def test_chunks_can_be_promoted_without_a_request() -> None:
    engine, tokens = TieredEngine(), prompt(17, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    forget_above(engine)
    with engine.ledger.lock:
        assert engine.planner.lower.promote("disk", engine.ledger.newest("disk", 10)) == 3
    engine.run()
    assert engine.ledger.counts()[CPU] == 3


def test_readers_hear_of_every_tier() -> None:
    engine, tokens = TieredEngine(), prompt(18, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    told = {message.tier for message in engine.messages if type(message).__name__ == "Stored"}
    assert told >= {CPU, "disk"}
    assert set(engine.planner.content()) == {"gpu", CPU, "disk"}
    assert set(engine.planner.heartbeat().load_bandwidth) == {CPU, "disk"}


@pytest.mark.parametrize("windows", [(0,), (0, 10)], ids=["full", "window"])
@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_reads_a_wrong_token_and_always_ends(seed: int, windows: tuple[int, ...]) -> None:
    rng = random.Random(seed)
    rules: list[Any] = [
        TierRules(name=name, writes=rng.choice(["through", "back"]), second_touch=rng.random() < 0.3)
        for name in ("disk", "remote")[: rng.choice([1, 2])]
    ]
    engine = TieredEngine(
        rules=rules,
        blocks=rng.choice([60, 90, 150]) * len(windows),
        slots=rng.choice([2, 7, 40]),
        ranks=rng.choice([1, 2]),
        windows=windows,
        step_tokens=rng.choice([5, CHUNK, 3 * CHUNK]),
        delay=lambda: rng.choice([0, 0, 1, 3]),
        lower_tier_patience=rng.choice([0.05, 5.0]),
    )
    if rng.random() < 0.5:
        engine.planner.lower.asks = engine
    engine.fail = spoil(rng, ["missing", "bad", "timeout", "full", "unreachable"], rng.choice([0, 0.1, 0.5]))
    stems = [prompt(seed * 100 + at, rng.randrange(1, 6 * CHUNK)) for at in range(4)]
    for at in range(60):
        for _ in range(rng.randrange(3)):
            stem = rng.choice(stems)
            tokens = [*stem[: rng.randrange(len(stem) + 1)], *prompt(rng.randrange(5), rng.randrange(1, 20))]
            engine.add(f"{at}-{rng.random()}", tokens, max_tokens=rng.choice([1, 1, 30]))
        disturb(engine, rng)
        engine.step()
    engine.answer()
    engine.planner.lower.asks = None
    engine.run(3000)
    assert not engine.owners
    engine.planner.check()


def disturb(engine: TieredEngine, rng: random.Random) -> None:
    """What clients, operators and other engines may do at any time."""
    running = [name for name, request in engine.requests.items() if request.status != "aborted"]
    if running and rng.random() < 0.1:
        engine.abort(rng.choice(running))
    if rng.random() < 0.03:
        engine.clear()
    if rng.random() < 0.1:
        engine.lose_cpu()
    if rng.random() < 0.5:
        engine.answer()
    if rng.random() < 0.1 and engine.stores["disk"]:
        del engine.stores["disk"][rng.choice(list(engine.stores["disk"]))]
    if not engine.owners and rng.random() < 0.5:
        engine.reset_prefix_cache()
