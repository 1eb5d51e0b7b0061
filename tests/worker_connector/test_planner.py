"""The planner, driven step by step by a stand-in for vLLM that checks what every forward reads."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from kv_protocol.hashing import Media, chunk_hashes, root_hash
from kv_protocol.messages import Admitted, Removed, Stored, unpack
from tests.worker_connector.scripted_engine import BLOCK, CHUNK, Engine, prompt
from worker_connector.ledger import CPU
from worker_connector.plan import PLAIN, StepPlan, WorkerReport
from worker_connector.planner import LOAD_SECONDS
from worker_connector.request_state import external_id
from worker_connector.saves import OVERDUE_SECONDS, TAIL_CHUNKS


def hashes(tokens: list[int], **root: str) -> list[bytes]:
    return chunk_hashes(root_hash(chunk_size=CHUNK, model="m", **root), tokens, CHUNK)


def cold_again(engine: Any) -> None:
    """Empty the GPU's cache, keep the connector's."""
    engine.run()
    engine.reset_prefix_cache()


# ---- hits ---------------------------------------------------------------------------------------------------------


def test_what_was_computed_is_saved_once_and_loaded_after_the_gpu_lost_it() -> None:
    engine, tokens = Engine(), prompt(1, 5 * CHUNK + 3)
    engine.serve("a", tokens)
    assert engine.ledger.content()[CPU] == hashes(tokens)
    cold_again(engine)
    again = engine.serve("b", tokens)
    assert again.loads == 1
    assert again.answers == [5 * CHUNK]
    assert sum(len(plan.save.spans) for plan in engine.plans if plan.save) == 5


def test_the_hit_continues_in_the_middle_of_a_chunk_where_the_gpu_hit_ends() -> None:
    engine, tokens = Engine(), prompt(2, 4 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.serve("short", tokens[: CHUNK + 2 * BLOCK + 1], max_tokens=1)
    engine.ledger.gpu_cleared()
    again = engine.serve("b", tokens)
    assert again.answers == [4 * CHUNK - (CHUNK + 2 * BLOCK)]
    (load,) = [plan.loads[0] for plan in engine.plans if plan.loads and plan.loads[0].request_id == "b"]
    assert [(span.at, len(span.blocks)) for span in load.spans] == [(2, 2), (0, 4), (0, 4)]


def test_a_hit_of_the_whole_prompt_is_taken() -> None:
    engine, tokens = Engine(), prompt(3, 3 * CHUNK)
    engine.serve("a", tokens)
    cold_again(engine)
    again = engine.serve("b", tokens)
    assert again.answers == [3 * CHUNK]
    assert len(again.outputs) == 1


def test_asking_again_changes_nothing() -> None:
    engine, tokens = Engine(), prompt(4, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    request = engine.add("b", tokens)
    before = engine.ledger.content(), engine.planner.has_unfinished_transfers()
    assert {engine.planner.match(request, 0) for _ in range(50)} == {(3 * CHUNK, True)}
    assert engine.planner.match(request, CHUNK + BLOCK) == (2 * CHUNK - BLOCK, True)
    assert engine.planner.match(request, 3 * CHUNK) == (0, False)
    assert (engine.ledger.content(), engine.planner.has_unfinished_transfers()) == before
    engine.run()


def test_hits_include_generated_tokens() -> None:
    engine = Engine()
    first = engine.serve("a", prompt(5, CHUNK + 4), max_tokens=2 * CHUNK)
    cold_again(engine)
    again = engine.serve("b", [*first.all_token_ids, 1, 2, 3])
    assert again.answers == [3 * CHUNK]


def test_another_salt_or_adapter_shares_nothing() -> None:
    engine, tokens = Engine(), prompt(6, 2 * CHUNK + 1)
    engine.serve("a", tokens, cache_salt="x")
    engine.serve("b", tokens, lora_request=SimpleNamespace(lora_name="x"))
    engine.run()
    assert set(engine.ledger.content()[CPU]) == {*hashes(tokens, cache_salt="x"), *hashes(tokens, lora="x")}
    request = engine.add("c", tokens)
    assert engine.planner.match(request, 0) == (0, False)


def adapter(path: str, number: int = 1) -> Any:
    return SimpleNamespace(lora_name="x", lora_path=path, lora_int_id=number)


@pytest.mark.parametrize("other", [adapter("/b"), adapter("/a", 2)], ids=["path", "number"])
def test_an_adapter_loaded_again_under_its_name_shares_nothing_with_the_one_before(
    other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine, tokens = Engine(), prompt(6, 2 * CHUNK + 1)
    engine.serve("a", tokens, lora_request=adapter("/a"))
    cold_again(engine)
    assert engine.serve("b", tokens, lora_request=adapter("/a")).answers == [2 * CHUNK]
    cold_again(engine)
    assert engine.serve("c", tokens, lora_request=other).answers == [0]
    cold_again(engine)
    assert engine.serve("d", tokens, lora_request=other).answers == [2 * CHUNK]
    assert len([record for record in caplog.records if "another one now" in record.message]) == 1


def test_a_request_of_the_adapter_before_saves_nothing_under_the_shared_name() -> None:
    engine, tokens = Engine(step_tokens=CHUNK), prompt(6, 4 * CHUNK + 1)
    engine.hold_saves = True
    engine.add("old", tokens, lora_request=adapter("/a"))
    engine.step()
    engine.add("new", prompt(7, CHUNK + 1), lora_request=adapter("/b"))
    engine.hold_saves = False
    cold_again(engine)
    assert engine.ledger.content()[CPU] == hashes(prompt(7, CHUNK + 1), lora="x")
    assert engine.serve("again", tokens, lora_request=adapter("/b")).answers == [0]


def test_a_session_that_gets_more_input_is_hashed_as_it_is_now() -> None:
    engine, tokens = Engine(), prompt(6, CHUNK - 1)
    request = engine.add("a", tokens)
    state = engine.planner._requests["a"]
    request.outputs.append(1)
    assert state.extend() == hashes([*tokens, 1])
    picture = SimpleNamespace(identifier="pic", mm_position=SimpleNamespace(offset=CHUNK - 1, length=3))
    request.outputs.clear()
    request.prompt_token_ids, request.mm_features = [*tokens, 2, 2, 2, *tokens], [picture]
    root = root_hash(chunk_size=CHUNK, model="m")
    assert state.extend() == chunk_hashes(root, request.prompt_token_ids, CHUNK, media=[Media("pic", CHUNK - 1, 3)])
    engine.run()


def test_media_are_part_of_a_chunks_name() -> None:
    engine, tokens = Engine(), prompt(7, 2 * CHUNK + 1)
    picture = SimpleNamespace(identifier="pic", mm_position=SimpleNamespace(offset=CHUNK + 2, length=5))
    engine.serve("a", tokens, mm_features=[picture])
    root = root_hash(chunk_size=CHUNK, model="m")
    assert engine.ledger.content()[CPU] == chunk_hashes(root, tokens, CHUNK, media=[Media("pic", CHUNK + 2, 5)])


@pytest.mark.parametrize(
    ("tokens", "fields"),
    [(None, {}), (prompt(8, 40), {"prompt_embeds": object()}), ([-1] * 40, {})],
    ids=["no tokens", "embeddings", "no token ids"],
)
def test_prompts_that_cannot_be_named_pass_through(tokens: list[int] | None, fields: dict[str, Any]) -> None:
    engine = Engine()
    request = engine.add("a", tokens, **fields)
    assert engine.planner.match(request, 0) == (0, False)
    if tokens:
        engine.run()
    assert engine.ledger.content()[CPU] == []


def test_a_tail_that_cannot_be_named_ends_the_caching_and_not_the_engine() -> None:
    engine, tokens = Engine(), prompt(8, TAIL_CHUNKS * CHUNK)
    engine.serve("a", [*tokens, *[-1] * BLOCK, 5])
    cold_again(engine)
    engine.serve("b", [*tokens, *[-1] * BLOCK, 6])
    assert set(engine.ledger.content()[CPU]) <= set(hashes(tokens))


def test_a_request_that_must_not_read_caches_loads_nothing() -> None:
    engine, tokens = Engine(), prompt(9, 3 * CHUNK)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", tokens, skip_reading_prefix_cache=True).answers == [0]


def test_short_loads_are_left_out_when_asked() -> None:
    engine, tokens = Engine(min_load_tokens=2 * CHUNK + 1), prompt(10, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", [*tokens[: 2 * CHUNK], 7]).answers == [0]
    cold_again(engine)
    assert engine.serve("c", tokens).answers == [3 * CHUNK]


@pytest.mark.parametrize("setting", [{"may_load": False}, {"enable_prefix_cache": False}])
def test_without_loading(setting: dict[str, Any]) -> None:
    engine, tokens = Engine(**setting), prompt(11, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", tokens).answers == [0]
    assert bool(engine.ledger.content()[CPU]) == ("may_load" in setting)


def test_without_saving() -> None:
    engine, tokens = Engine(may_save=False), prompt(12, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    assert engine.ledger.content()[CPU] == []
    assert not any(plan.save for plan in engine.plans)


def test_computing_is_preferred_where_it_is_predicted_to_be_faster() -> None:
    engine, tokens = Engine(load_or_compute=True), prompt(13, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    estimator = engine.planner.estimator
    estimator.observe_load(1 << 20, 10.0)
    for _ in range(20):
        estimator.observe_prefill(1000, 0.001)
    assert engine.serve("b", tokens).answers == [0]
    assert engine.planner.stats.total()["skipped_loads"] == {CPU: 3}
    cold_again(engine)
    for _ in range(20):
        estimator.observe_load(1 << 30, 0.001)
    assert engine.serve("c", tokens).answers == [3 * CHUNK]


# ---- one load of a chunk at a time ----------------------------------------------------------------------------------


def test_requests_with_one_prefix_start_one_load() -> None:
    engine, tokens = Engine(blocks=200), prompt(14, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_loads = True
    requests = [engine.add(name, [*tokens[: 3 * CHUNK], at]) for at, name in enumerate("bcd")]
    for _ in range(5):
        engine.step()
    assert [request.loads for request in requests] == [1, 0, 0]
    assert requests[1].answers == [None] * 5
    engine.hold_loads = False
    engine.run()
    assert [request.loads for request in requests] == [1, 0, 0]


def test_the_next_request_loads_when_the_first_was_aborted() -> None:
    engine, tokens = Engine(), prompt(15, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_loads = True
    engine.add("b", tokens)
    second = engine.add("c", tokens)
    engine.step()
    engine.abort("b")
    engine.step()
    assert second.answers == [None, None]
    engine.hold_loads = False
    engine.run()
    assert second.loads == 1


def test_waiting_for_anothers_load_ends() -> None:
    engine, tokens = Engine(), prompt(16, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_loads = True
    engine.add("b", tokens)
    second = engine.add("c", tokens)
    engine.step()
    engine.now += LOAD_SECONDS + 1
    engine.step()
    engine.step()
    assert second.answers[0] is None
    assert second.answers[-1] == 0
    engine.hold_loads = False
    engine.run()


# ---- failing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("blame", [True, False])
def test_a_failed_load_is_computed_and_not_tried_again(*, ranks: int, blame: bool) -> None:
    engine, tokens = Engine(ranks=ranks), prompt(17, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.fail_load = lambda job, rank: ({job.spans[1].slot} if blame else set()) if rank == ranks - 1 else None
    again = engine.add("b", tokens)
    assert engine.run() < 20
    assert again.failures == 1
    assert again.loads == 1
    assert len(again.outputs) == 1
    assert engine.planner.stats.total()["failed_loads"] == {CPU: 3}
    removed = [chunk for message in engine.messages if isinstance(message, Removed) for chunk in unpack(message.chunks)]
    assert removed == (hashes(tokens)[1:2] if blame else [])
    assert set(engine.ledger.content()[CPU]) == set(hashes(tokens)), "what was computed again is saved again"


def test_damaged_slots_are_counted_once_for_all_ranks() -> None:
    engine = Engine(ranks=2)
    report = WorkerReport(damaged={3, 4})
    report.merge(WorkerReport(damaged={4}))
    assert report
    engine.planner.absorb(report, ())
    assert engine.planner.stats.total()["damaged_chunks"] == {CPU: 2}


def test_other_requests_are_not_offered_the_failed_chunk() -> None:
    engine, tokens = Engine(may_save=True), prompt(18, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.fail_load = lambda job, _: {job.spans[0].slot}
    engine.add("b", tokens)
    engine.step()
    other = engine.add("c", tokens)
    assert engine.planner.match(other, 0) == (0, False)
    engine.run()


def test_a_rank_that_fails_before_the_others_are_done_counts() -> None:
    engine, tokens = Engine(ranks=2), prompt(19, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.fail_load = lambda job, rank: {span.slot for span in job.spans} if rank == 0 else None
    engine.delay = iter([0, 3]).__next__
    again = engine.add("b", tokens)
    engine.step()
    assert engine.ledger.content()[CPU] == []
    engine.planner.check()
    engine.delay = lambda: 0
    engine.run()
    assert again.failures == 1


def test_chunks_forgotten_between_question_and_load_are_computed() -> None:
    engine, tokens = Engine(), prompt(20, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    ask = engine.planner.match

    def match_then_clear(request: Any, computed: int) -> tuple[int | None, bool]:
        answer = ask(request, computed)
        engine.ledger.clear_cpu()
        return answer

    engine.planner.match = match_then_clear
    again = engine.serve("b", tokens)
    assert again.failures == 1
    assert len(again.outputs) == 1


# ---- aborts and resets ----------------------------------------------------------------------------------------------


def test_an_aborted_load_keeps_its_slots_until_it_is_reported() -> None:
    engine, tokens = Engine(slots=3), prompt(21, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_loads = True
    engine.add("b", tokens)
    engine.step()
    engine.abort("b")
    assert engine.planner.has_unfinished_transfers()
    engine.add("c", prompt(22, 3 * CHUNK + 1))
    for _ in range(5):
        engine.step()
    assert set(engine.ledger.content()[CPU]) == set(hashes(tokens)), "a slot was reused under a load"
    engine.hold_loads = False
    engine.run()


def test_a_load_that_nobody_reports_does_not_keep_an_idle_engine_stepping_for_ever() -> None:
    engine, tokens = Engine(), prompt(24, 2 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_loads = True
    engine.add("b", tokens)
    engine.step()
    engine.abort("b")
    assert engine.planner.has_unfinished_transfers()
    engine.now += OVERDUE_SECONDS
    assert not engine.planner.has_unfinished_transfers()


def test_a_request_that_never_ran_can_be_finished() -> None:
    engine = Engine()
    engine.add("a", prompt(23, 20))
    engine.abort("a")
    engine.planner.finished("unknown")
    engine.run()
    beat = engine.planner.heartbeat()
    assert (beat.running, beat.waiting, beat.uncached_tokens) == (0, 0, 0)


@pytest.mark.parametrize("held", ["hold_loads", "hold_saves"])
def test_clearing_while_transfers_are_under_way(held: str) -> None:
    engine, tokens = Engine(), prompt(24, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    setattr(engine, held, True)
    request = engine.add("b", tokens if held == "hold_loads" else prompt(25, 3 * CHUNK + 1))
    for _ in range(3):
        engine.step()
    engine.ledger.clear_cpu()
    assert engine.ledger.content()[CPU] == []
    setattr(engine, held, False)
    engine.run()
    assert len(request.outputs) == 1
    if held == "hold_saves":
        assert engine.ledger.content()[CPU] == []
    engine.ledger.check()


# ---- saves ----------------------------------------------------------------------------------------------------------


def test_chunks_filled_across_steps_are_saved_from_the_live_table() -> None:
    engine, tokens = Engine(step_tokens=CHUNK + 5), prompt(26, 6 * CHUNK + 2)
    engine.serve("a", tokens)
    assert engine.ledger.content()[CPU] == hashes(tokens)
    cold_again(engine)
    assert engine.serve("b", tokens).answers == [6 * CHUNK]


def test_chunks_that_only_the_gpu_has_are_saved_when_they_are_met() -> None:
    engine, tokens = Engine(), prompt(27, 4 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.ledger.clear_cpu()
    engine.serve("b", tokens)
    assert engine.ledger.content()[CPU] == hashes(tokens)
    cold_again(engine)
    engine.serve("c", tokens)


def test_a_save_is_settled_before_its_blocks_get_another_owner() -> None:
    engine = Engine(blocks=14)
    engine.hold_saves = True
    tokens = prompt(28, 3 * CHUNK + 1)
    engine.add("a", tokens)
    while engine.requests:
        engine.step()
    assert not any(plan.settle for plan in engine.plans)
    engine.add("b", prompt(29, 3 * CHUNK + 1))
    while engine.requests:
        engine.step()
    assert any(plan.settle for plan in engine.plans)
    engine.hold_saves = False
    cold_again(engine)
    engine.serve("c", tokens)


@pytest.mark.parametrize("kind", ["zeroed", "copied to"])
def test_a_save_of_blocks_that_are_written_before_it_is_settled_is_not_believed(kind: str) -> None:
    engine, tokens = Engine(), prompt(31, 2 * CHUNK + 1)
    engine.hold_saves = True
    engine.add("a", tokens)
    block = next(plan for plan in iter(engine.step, None) if plan.save).save.spans[0].blocks[0]
    schedule = engine._schedule

    def schedule_writes() -> Any:
        output = schedule()
        output.new_block_ids_to_zero = [block] if kind == "zeroed" else None
        output.kv_cache_block_copies = [(block + 1, block)] if kind == "copied to" else None
        return output

    engine._schedule = schedule_writes  # type: ignore[method-assign]
    engine.step()
    engine.hold_saves = False
    engine.run()
    assert engine.ledger.content()[CPU] == []


def test_a_save_is_settled_before_a_load_writes_to_its_blocks() -> None:
    engine, tokens = Engine(blocks=14), prompt(30, 3 * CHUNK)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.hold_saves = True
    other = prompt(31, 3 * CHUNK)
    engine.add("b", other)
    while engine.requests:
        engine.step()
    engine.add("c", tokens)
    while engine.requests:
        engine.step()
    assert any(plan.settle for plan in engine.plans), "the case did not arise"
    engine.hold_saves = False
    cold_again(engine)
    assert engine.serve("d", other).num_computed_tokens >= len(other), "served without reading a wrong token"


def test_shared_blocks_do_not_wait_for_their_save() -> None:
    engine, tokens = Engine(), prompt(32, 3 * CHUNK + 1)
    engine.hold_saves = True
    engine.add("a", tokens)
    while engine.requests:
        engine.step()
    engine.add("b", tokens)
    while engine.requests:
        engine.step()
    assert not any(plan.settle for plan in engine.plans)
    engine.hold_saves = False
    engine.run()


def test_a_chunk_counts_as_saved_when_every_rank_has_it() -> None:
    engine, tokens = Engine(ranks=3), prompt(33, CHUNK + 1)
    engine.delay = iter([0, 1, 4]).__next__
    engine.add("a", tokens)
    for _ in range(4):
        engine.step()
        assert engine.ledger.content()[CPU] == []
    engine.run()
    assert engine.ledger.content()[CPU] == hashes(tokens)


def test_an_idle_engine_keeps_stepping_until_saves_are_acknowledged_but_not_for_ever() -> None:
    engine = Engine()
    engine.hold_saves = True
    engine.add("a", prompt(34, CHUNK + 1))
    while engine.requests:
        engine.step()
    assert engine.planner.has_unfinished_transfers()
    engine.now += OVERDUE_SECONDS + 1
    assert not engine.planner.has_unfinished_transfers()
    engine.hold_saves = False
    engine.step()
    assert not engine.pending


def test_a_failed_save_is_forgotten() -> None:
    engine, tokens = Engine(), prompt(35, 2 * CHUNK + 1)
    engine.hold_saves = True
    engine.add("a", tokens)
    engine.step()
    (transfer,) = engine.pending
    engine.pending.clear()
    report = WorkerReport()
    report.saved[transfer.save.job] = 1
    report.failed_saves.add(transfer.save.job)
    engine.planner.absorb(report, ())
    assert not engine.ledger.holds(hashes(tokens)[0])
    engine.hold_saves = False
    engine.run()


@pytest.mark.parametrize("resumed_as_new", [False, True])
def test_preempted_requests_resume_and_their_cursor_goes_back(*, resumed_as_new: bool) -> None:
    engine = Engine(blocks=16, step_tokens=2 * CHUNK, resumed_as_new=resumed_as_new)
    first = engine.add("a", prompt(36, CHUNK + 1), max_tokens=2 * CHUNK)
    second = engine.add("b", prompt(37, CHUNK + 2), max_tokens=2 * CHUNK)
    engine.run()
    assert first.preempted + second.preempted > 0
    assert len(first.outputs) == len(second.outputs) == 2 * CHUNK
    held = set(engine.ledger.content()[CPU])
    for request in (first, second):
        assert set(hashes(request.all_token_ids[:-1])) <= held


@pytest.mark.parametrize("resumed_as_new", [False, True])
def test_blocks_that_a_resumed_request_gets_are_settled(*, resumed_as_new: bool) -> None:
    engine = Engine(blocks=16, step_tokens=2 * CHUNK, resumed_as_new=resumed_as_new)
    first = engine.add("a", prompt(36, CHUNK + 1), max_tokens=2 * CHUNK)
    engine.add("b", prompt(37, CHUNK + 2), max_tokens=2 * CHUNK)
    engine.hold_saves = True
    for _ in range(200):
        if not engine.requests:
            break
        engine.step()
    assert any(plan.settle for plan in engine.plans), "the case did not arise"
    engine.hold_saves = False
    cold_again(engine)
    engine.serve("c", first.all_token_ids)
    assert not engine.requests


def test_a_chunk_that_drafts_complete_is_not_saved_before_its_tokens_are_known() -> None:
    engine = Engine()
    request = engine.add("a", prompt(50, CHUNK - 2), max_tokens=9)
    engine.step()
    known = request.num_tokens
    assert known == CHUNK - 1
    output = SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["a"], new_block_ids=[None]),
        num_scheduled_tokens={"a": 1 + 4},
        total_num_scheduled_tokens=5,
        preempted_req_ids=set(),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ([1, 2, 3, 4, 5],)),
    )
    assert engine.planner.plan_step(output).save is None
    request.num_computed_tokens += 5
    request.outputs += [1, 2]
    request.num_computed_tokens -= 2
    output.num_scheduled_tokens = {"a": 1}
    save = engine.planner.plan_step(output).save
    assert save is not None
    assert [span.blocks for span in save.spans] == [[1, 2, 3, 4]]


def test_after_a_failed_load_tokens_before_the_cursor_are_saved_again() -> None:
    engine, tokens = Engine(), prompt(51, 3 * CHUNK + 1)
    request = engine.add("a", tokens)
    engine.step()
    engine.ledger.clear_cpu()
    request.num_computed_tokens = 0
    engine.run()
    assert engine.ledger.content()[CPU] == hashes(tokens)


def test_a_long_prompt_does_not_evict_its_own_head() -> None:
    engine, tokens = Engine(slots=4, blocks=100), prompt(38, 9 * CHUNK + 1)
    engine.serve("a", tokens)
    assert set(engine.ledger.content()[CPU]) == set(hashes(tokens)[:4])


def test_heads_outlive_tails() -> None:
    engine, tokens = Engine(slots=6, blocks=100), prompt(39, 6 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.serve("b", prompt(40, 2 * CHUNK + 1))
    held = set(engine.ledger.content()[CPU])
    assert held >= set(hashes(tokens)[:4])
    assert not held & set(hashes(tokens)[4:])


# ---- tails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(0,), (0, 10)])
def test_behind_enough_chunks_the_prompts_last_blocks_are_kept_too(windows: tuple[int, ...]) -> None:
    engine, tokens = Engine(windows=windows, blocks=200), prompt(60, 5 * CHUNK + 2 * BLOCK + 1)
    engine.serve("a", tokens)
    engine.run()
    assert engine.ledger.content()[CPU] == hashes(tokens), "a tail is no chunk to anybody outside"
    cold_again(engine)
    assert engine.serve("same", tokens).answers == [5 * CHUNK + 2 * BLOCK]
    cold_again(engine)
    assert engine.serve("longer", [*tokens, *prompt(61, 20)]).answers == [5 * CHUNK + 2 * BLOCK]
    cold_again(engine)
    other = [*tokens[: 5 * CHUNK], *prompt(62, 2 * BLOCK + 1)]
    assert engine.serve("other", other).answers == [5 * CHUNK]


def test_a_tail_of_a_whole_prompt_is_taken() -> None:
    engine, tokens = Engine(), prompt(63, TAIL_CHUNKS * CHUNK + BLOCK)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", tokens).answers == [TAIL_CHUNKS * CHUNK + BLOCK]


def test_short_prompts_keep_no_tail() -> None:
    engine, tokens = Engine(), prompt(64, TAIL_CHUNKS * CHUNK - 1)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", tokens).answers == [(TAIL_CHUNKS - 1) * CHUNK]


def test_a_tail_gives_its_slot_back_when_its_chunk_is_whole() -> None:
    engine, tokens = Engine(slots=10), prompt(65, 5 * CHUNK + BLOCK)
    first = engine.serve("a", tokens, max_tokens=2)
    engine.run()
    assert len(engine.ledger._slots) == 6
    engine.serve("b", [*first.all_token_ids, *prompt(66, CHUNK - BLOCK - 2)])
    engine.run()
    assert len(engine.ledger._slots) == 6
    assert len(engine.ledger.content()[CPU]) == 6


# ---- several groups ---------------------------------------------------------------------------------------------


def test_sliding_windows_are_saved_in_the_step_that_fills_them() -> None:
    engine, tokens = Engine(windows=(0, 10, 10), blocks=200), prompt(41, 5 * CHUNK + 1)
    engine.serve("a", tokens)
    cold_again(engine)
    again = engine.serve("b", tokens)
    assert again.answers == [5 * CHUNK]
    (load,) = [plan.loads[0] for plan in engine.plans if plan.loads]
    assert {span.group for span in load.spans} == {0, 1, 2}
    window_blocks = [block for span in load.spans if span.group == 1 for block in span.blocks]
    assert len(window_blocks) == 3, "only what the window still reads is loaded"


def test_blocks_that_a_window_passed_go_to_another_group_while_they_are_saved() -> None:
    engine = Engine(windows=(0, 6, 6), blocks=28, step_tokens=CHUNK, delay=lambda: 2)
    tokens = prompt(42, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    assert any(plan.settle for plan in engine.plans)
    cold_again(engine)
    engine.serve("b", tokens)


@pytest.mark.parametrize(("window", "chunks"), [(2 * BLOCK + 1, 2), (2 * BLOCK, 3)], ids=["odd", "even"])
def test_a_whole_prompt_is_loaded_only_if_its_last_token_can_be_computed_again(window: int, chunks: int) -> None:
    engine, tokens = Engine(windows=(window, 0), blocks=200, step_tokens=CHUNK), prompt(52, 3 * CHUNK)
    engine.serve("a", tokens)
    cold_again(engine)
    assert engine.serve("b", tokens).answers == [chunks * CHUNK]


def test_a_hit_ends_where_the_window_is_whole() -> None:
    engine, tokens = Engine(windows=(0, 10), blocks=200), prompt(43, 4 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.ledger.clear_cpu()
    # Met again as a local hit, all but the last chunk's window blocks are gone.
    engine.serve("b", tokens)
    cold_again(engine)
    half = engine.serve("c", [*tokens[: 2 * CHUNK], 5, 6])
    assert half.answers == [0]
    cold_again(engine)
    assert engine.serve("d", tokens).answers == [4 * CHUNK]


def test_a_block_that_a_slot_lacks_is_never_loaded_from_it() -> None:
    engine, tokens = Engine(windows=(0, 10), blocks=200), prompt(43, 4 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.ledger.clear_cpu()
    engine.serve("b", tokens)
    cold_again(engine)
    request = engine.add("c", tokens)
    engine.waiting.clear()
    assert engine.planner.match(request, 0) == (4 * CHUNK, True)
    # An engine that keeps more of the window than it reads wants blocks that were gone when the chunk was saved.
    blocks = 4 * CHUNK // BLOCK
    engine.planner.allocated(request, [list(range(1, blocks + 1)), list(range(100, 100 + blocks))], 4 * CHUNK)
    (load,) = engine.planner.plan_step(engine._schedule()).loads
    assert load.refused
    assert load.spans == []


def test_a_slot_without_window_blocks_is_saved_again_once_they_are_there() -> None:
    engine, tokens = Engine(windows=(0, 10), blocks=200), prompt(44, 4 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.ledger.clear_cpu()
    engine.serve("b", tokens)
    cold_again(engine)
    engine.serve("c", [*tokens[: 2 * CHUNK], 5, 6])
    cold_again(engine)
    assert engine.serve("d", [*tokens[: 2 * CHUNK], 7, 8]).answers == [2 * CHUNK]


# ---- what others learn ----------------------------------------------------------------------------------------------


def test_readers_are_told_of_changes_and_of_real_hits() -> None:
    engine, tokens = Engine(), prompt(45, 3 * CHUNK + 5)
    engine.serve("cmpl-me-0-0123abcd", tokens)
    stored = [unpack(message.chunks) for message in engine.messages if isinstance(message, Stored)]
    assert sorted(chunk for chunks in stored for chunk in chunks) == sorted(hashes(tokens))
    cold_again(engine)
    engine.serve("short", tokens[: 2 * BLOCK + 1])
    engine.serve("b", tokens)
    admitted = [message for message in engine.messages if isinstance(message, Admitted)]
    assert admitted[0] == Admitted("me", len(tokens), {})
    assert admitted[-1] == Admitted("b", len(tokens), {"gpu": 2 * BLOCK, "cpu": 3 * CHUNK - 2 * BLOCK})


def test_a_failed_load_is_no_hit() -> None:
    engine, tokens = Engine(), prompt(46, 3 * CHUNK + 5)
    engine.serve("a", tokens)
    cold_again(engine)
    engine.serve("short", tokens[: 2 * BLOCK + 1])
    engine.fail_load = lambda _job, _rank: set()
    engine.serve("b", tokens)
    (told,) = [message for message in engine.messages if isinstance(message, Admitted) and message.request_id == "b"]
    assert told.hit_tokens == {"gpu": 2 * BLOCK}


def test_a_heartbeat_tells_the_load() -> None:
    engine = Engine(step_tokens=CHUNK)
    engine.add("a", prompt(47, 4 * CHUNK), max_tokens=5)
    engine.add("b", prompt(48, 3 * CHUNK))
    engine.step()
    beat = engine.planner.heartbeat()
    assert (beat.running, beat.waiting) == (1, 1)
    assert beat.uncached_tokens == 6 * CHUNK
    engine.run()
    beat = engine.planner.heartbeat()
    assert (beat.running, beat.waiting, beat.uncached_tokens) == (0, 0, 0)
    assert beat.held_chunks == engine.ledger.counts()


def test_prefill_speed_is_measured_from_large_steps() -> None:
    engine = Engine(step_tokens=20 * CHUNK, blocks=300)

    def forward(*_: Any) -> None:
        engine.now += 0.5

    run, engine._run_workers = engine._run_workers, lambda *args: (run(*args), forward())
    engine.serve("a", prompt(49, 10 * CHUNK))
    assert engine.planner.estimator.prefill_speed == pytest.approx(10 * CHUNK / 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("internal", "external"),
    [
        ("cmpl-abc-0-12ab34cd", "abc"),
        ("cmpl-abc-0", "abc"),
        ("chatcmpl-abc-12ab34cd", "abc"),
        ("chatcmpl-abc", "abc"),
        ("1_chatcmpl-abc-12ab34cd", "abc"),
        ("cmpl-550e8400-e29b-41d4-a716-446655440000-2-12ab34cd", "550e8400-e29b-41d4-a716-446655440000"),
        ("chatcmpl-550e8400-e29b-41d4-a716-446655440000-12ab34cd", "550e8400-e29b-41d4-a716-446655440000"),
        ("0-12ab34cd", "0"),
        ("plain", "plain"),
    ],
)
def test_request_ids_as_clients_gave_them(internal: str, external: str) -> None:
    assert external_id(internal) == external


# ---- everything at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(0,), (0, 10), (0, 6, 6)], ids=["full", "window", "two windows"])
@pytest.mark.parametrize("seed", range(25))
def test_random_use_never_reads_a_wrong_token_and_always_ends(seed: int, windows: tuple[int, ...]) -> None:
    rng = random.Random(seed)
    engine = Engine(
        blocks=rng.choice([60, 90, 150]) * len(windows),
        slots=rng.choice([2, 7, 40]),
        ranks=rng.choice([1, 2]),
        windows=windows,
        step_tokens=rng.choice([5, CHUNK, 3 * CHUNK]),
        delay=lambda: rng.choice([0, 0, 1, 3]),
    )
    engine.fail_load = lambda job, _: (
        {span.slot for span in job.spans[: rng.randrange(3)]} if rng.random() < 0.1 else None
    )
    stems = [prompt(seed * 100 + at, rng.randrange(1, 6 * CHUNK)) for at in range(4)]
    for at in range(60):
        for _ in range(rng.randrange(3)):
            stem = rng.choice(stems)
            tokens = [*stem[: rng.randrange(len(stem) + 1)], *prompt(rng.randrange(5), rng.randrange(1, 20))]
            engine.add(f"{at}-{rng.random()}", tokens, max_tokens=rng.choice([1, 1, 30]))
        if engine.requests and rng.random() < 0.1:
            running = [name for name, request in engine.requests.items() if request.status != "aborted"]
            if running:
                engine.abort(rng.choice(running))
        if rng.random() < 0.03:
            engine.clear()
        if not engine.owners and rng.random() < 0.5:
            engine.reset_prefix_cache()
        engine.step()
    engine.run(3000)
    assert not engine.owners
    engine.planner.check()


def test_decoding_within_a_block_needs_no_plan_and_loses_no_chunk() -> None:
    engine, tokens = Engine(), prompt(9, CHUNK + 1)
    request = engine.serve("a", tokens, max_tokens=2 * CHUNK)
    plain = [plan is PLAIN for plan in engine.plans]
    assert sum(plain) > len(plain) // 2
    assert not plain[0]
    assert engine.ledger.content()[CPU] == hashes([*tokens, *request.outputs][: 3 * CHUNK])
    assert StepPlan() == PLAIN
