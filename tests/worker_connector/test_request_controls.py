"""What requests say about their own cache, read and obeyed."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker_connector.scripted_engine import CHUNK, Engine, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector import request_controls
from worker_connector.ledger import CPU
from worker_connector.pins import REQUESTS_SHARE, Pins
from worker_connector.request_controls import MOST_KEEP_SECONDS, NONE, Controls, controls_of


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    request_controls._said.clear()


def read(given: Any) -> Controls:
    return controls_of(SimpleNamespace(kv_transfer_params={"warmroute": given, "prompt_token_ids": [1]}))


def with_controls(**controls: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"warmroute": controls}}


def test_what_makes_sense_is_taken() -> None:
    assert read({"skip_save": True, "keep": 60}) == Controls(skip_save=True, keep=60.0)
    assert read({"tags": ["a", "b"]}).tags == ("a", "b")
    for no_tags in ("a", ["a", 1], [""], ["a" * 129], ["a"] * 9, {"a": 1}):
        assert read({"tags": no_tags}) == NONE
    assert read({"skip_load": True}) == Controls(skip_load=True)
    assert [read({"priority": each}).priority for each in ("low", "normal", "high", "urgent", 1)] == [-1, 0, 1, 0, 0]
    for seconds in (1e12, 10**400, MOST_KEEP_SECONDS):
        assert read({"keep": seconds}).keep == MOST_KEEP_SECONDS
    for nonsense in (float("nan"), float("inf"), -1, True, -(10**400)):
        assert read({"keep": nonsense}).keep == 0
    for request in (
        SimpleNamespace(),
        SimpleNamespace(kv_transfer_params=None),
        SimpleNamespace(kv_transfer_params=[]),
    ):
        assert controls_of(request) is NONE


def test_what_makes_none_is_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            wrong = {"skip_save": 1, "skip_load": True, "keep": "long", "urgency": 3}
            assert read(wrong) == Controls(skip_load=True)
            assert read("fast") is NONE
    assert len(caplog.messages) == 4
    assert "'urgency' is unknown and ignored; known: skip_save, skip_load, keep, tags, priority" in caplog.text
    assert "skip_save is true or false" in caplog.text


def test_names_without_end_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        read({f"name{number}" * 100: 1})
    assert len(caplog.messages) == 64
    assert max(map(len, caplog.messages)) < 250


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["keep", "skip_save"]), inner),
        max_leaves=10,
    )
)
def test_nothing_that_can_be_sent_raises(anything: Any) -> None:
    assert isinstance(read(anything), Controls)
    assert isinstance(controls_of(SimpleNamespace(kv_transfer_params=anything)), Controls)


def test_a_request_that_is_not_to_be_saved_leaves_nothing_behind() -> None:
    engine, tokens = TieredEngine(), prompt(1, 6 * CHUNK + 3)
    engine.serve("a", tokens, max_tokens=2 * CHUNK, **with_controls(skip_save=True))
    assert engine.ledger.counts()[CPU] == 0
    assert not engine.chunks_in("disk")
    engine.serve("b", tokens)
    engine.reset_prefix_cache()
    assert engine.serve("c", tokens, **with_controls(skip_save=True)).loads == 1, "it may still load"


def test_a_request_that_is_not_to_load_computes_and_asks_no_tier() -> None:
    engine, tokens = TieredEngine(), prompt(1, 3 * CHUNK + 1)
    engine.serve("a", tokens)
    engine.reset_prefix_cache()
    assert engine.serve("b", tokens, **with_controls(skip_load=True)).loads == 0
    engine.reset_prefix_cache()
    engine.lose_cpu()
    engine.serve("c", tokens, **with_controls(skip_load=True, skip_save=True))
    assert not [job for plan in engine.plans for job in plan.tiers if job.kind == "fetch"]
    assert engine.ledger.counts()[CPU] == 0


def test_chunks_are_kept_after_their_request_for_its_time_and_within_its_share() -> None:
    engine = Engine(slots=16)
    pins = Pins(engine.ledger, lambda: engine.now)
    engine.planner.mark = lambda chunks, asked: pins.pin(chunks, asked.keep, share=REQUESTS_SHARE, extend=True)
    engine.serve("a", prompt(1, 2 * CHUNK + 1), **with_controls(keep=1000))
    kept = set(engine.ledger.content()[CPU])
    for number in range(2, 12):
        engine.serve(f"r{number}", prompt(number, 4 * CHUNK + 1), **with_controls(keep=1000))
        assert len(pins) <= 4
    assert kept <= set(engine.ledger.content()[CPU])
    engine.now += 1001
    pins.expire()
    for number in range(12, 20):
        engine.serve(f"r{number}", prompt(number, 4 * CHUNK + 1))
    assert not kept & set(engine.ledger.content()[CPU])


def test_a_low_priority_takes_no_slot_from_others_for_long() -> None:
    engine = Engine(blocks=400, slots=8)
    engine.serve("kept", prompt(1, 4 * CHUNK), max_tokens=1)
    for number in range(10, 14):
        engine.serve(f"batch {number}", prompt(number, 4 * CHUNK), max_tokens=1, **with_controls(priority="low"))
    engine.serve("later", prompt(2, 4 * CHUNK), max_tokens=1)
    engine.reset_prefix_cache()
    for name, seed in (("kept", 1), ("later", 2)):
        assert held(engine, f"{name} again", [*prompt(seed, 4 * CHUNK), 7]) == 4


def test_a_high_priority_outlives_normal_requests_up_to_half_of_the_slots() -> None:
    engine = Engine(blocks=400, slots=8)
    engine.serve("system", prompt(1, 4 * CHUNK), max_tokens=1, **with_controls(priority="high"))
    engine.serve("greedy", prompt(2, 4 * CHUNK), max_tokens=1, **with_controls(priority="high"))
    for number in range(10, 14):
        engine.serve(f"normal {number}", prompt(number, 4 * CHUNK), max_tokens=1)
    engine.reset_prefix_cache()
    assert held(engine, "system again", [*prompt(1, 4 * CHUNK), 7]) == 4
    assert held(engine, "greedy again", [*prompt(2, 4 * CHUNK), 7]) == 0


def test_a_chunk_that_a_normal_request_uses_is_not_of_low_priority_any_more() -> None:
    engine = Engine(blocks=400, slots=8)
    shared = prompt(1, 4 * CHUNK)
    engine.serve("batch", shared, max_tokens=1, **with_controls(priority="low"))
    engine.serve("chat", [*shared, 7], max_tokens=1)
    engine.serve("another batch", prompt(2, 4 * CHUNK), max_tokens=1, **with_controls(priority="low"))
    engine.serve("other", prompt(3, 4 * CHUNK), max_tokens=1)
    engine.reset_prefix_cache()
    assert held(engine, "chat again", [*shared, 8]) == 4


def held(engine: Engine, name: str, tokens: list[int]) -> int:
    """Chunks that a request loads."""
    engine.loaded_chunks.clear()
    engine.serve(name, tokens, max_tokens=1)
    return sum(map(len, engine.loaded_chunks))
