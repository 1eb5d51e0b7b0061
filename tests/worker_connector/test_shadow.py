"""What the shadow check finds, and that it leaves everything else as it was."""

import logging
import random

import pytest

from tests.worker_connector.scripted_engine import CHUNK, Engine, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector.lower import TierRules


def figure(engine: Engine, name: str) -> float:
    return engine.planner.stats.total().get(name, {}).get("", 0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("windows", [(0,), (0, 6)])
def test_a_hit_of_the_sample_is_computed_and_found_to_be_the_same(windows: tuple[int, ...], ranks: int) -> None:
    engine = Engine(blocks=200, windows=windows, ranks=ranks, shadow_check=1.0)
    engine.serve("first", prompt(1, 4 * CHUNK + 3))
    engine.reset_prefix_cache()
    again = engine.serve("second", prompt(1, 4 * CHUNK + 3))
    assert again.answers == [0]
    assert not again.loads
    assert (figure(engine, "compared_chunks"), figure(engine, "different_chunks")) == (4, 0)
    assert len(engine.ledger.content()["cpu"]) == 4


def test_what_differs_is_told_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(blocks=200, shadow_check=1.0)
    engine.serve("first", prompt(1, 4 * CHUNK + 3))
    engine.reset_prefix_cache()
    engine.weights = "others"  # and nobody told the connector
    with caplog.at_level(logging.ERROR):
        engine.serve("second", prompt(1, 4 * CHUNK + 3))
    assert figure(engine, "different_chunks") == 4
    assert "differs from what was computed again by 200 % of its norm" in caplog.text
    assert engine.ledger.content()["cpu"] == []


@pytest.mark.parametrize("writing", [False, True])
def test_what_differs_is_deleted_below_too(writing: bool) -> None:
    engine = TieredEngine(blocks=200, shadow_check=1.0, rules=(TierRules(name="disk"), TierRules(name="remote")))
    engine.hold_tiers = writing
    engine.add("first", prompt(1, 4 * CHUNK + 3))
    for _ in range(20):
        engine.step()
    engine.reset_prefix_cache()
    engine.weights = 1  # and nobody told the connector
    engine.add("second", prompt(1, 4 * CHUNK + 3))
    for _ in range(20):
        engine.step()
    engine.hold_tiers = False
    engine.run()
    assert figure(engine, "different_chunks") == 4
    assert not any(engine.ledger.counts().values())
    assert not engine.chunks_in("disk") | engine.chunks_in("remote")
    engine.planner.check()


def test_without_the_check_everything_is_loaded() -> None:
    engine = Engine(blocks=200)
    engine.serve("first", prompt(1, 4 * CHUNK + 3))
    engine.reset_prefix_cache()
    assert engine.serve("second", prompt(1, 4 * CHUNK + 3)).answers == [4 * CHUNK]
    assert not figure(engine, "compared_chunks")


def test_what_the_engine_has_itself_is_not_compared() -> None:
    engine = Engine(blocks=200, shadow_check=1.0)
    engine.serve("first", prompt(1, 4 * CHUNK))
    engine.serve("second", [*prompt(1, 4 * CHUNK), *prompt(2, CHUNK)])
    assert not figure(engine, "compared_chunks")


@pytest.mark.parametrize("seed", range(8))
def test_random_use_with_the_check_ends_and_loses_no_slot(seed: int) -> None:
    source = random.Random(seed)
    windows = source.choice([(0,), (0, 6), (9, 0, 30)])
    engine = Engine(
        blocks=40 * len(windows),
        slots=10,
        windows=windows,
        ranks=2,
        shadow_check=0.5,
        conversation_mode=source.random() < 0.5,
        delay=lambda: source.randrange(4),
    )
    for number in range(40):
        tokens = [
            *prompt(source.randrange(3), source.randrange(1, 5) * CHUNK),
            *prompt(50 + number, source.randrange(4)),
        ]
        engine.add(f"r{number}", tokens, max_tokens=source.randrange(1, CHUNK))
        for _ in range(source.randrange(6)):
            engine.step()
        if source.random() < 0.2 and engine.requests:
            engine.abort(source.choice(list(engine.requests)))
        if source.random() < 0.1:
            engine.clear()
    engine.run()
    assert figure(engine, "different_chunks") == 0
    assert not engine.planner._shadow._under_way
    assert not engine.owners


def test_comparing_takes_a_small_part_of_a_full_tier() -> None:
    engine = Engine(blocks=400, slots=64, shadow_check=1.0, step_tokens=40 * CHUNK)
    wanted = prompt(1, 20 * CHUNK + 1)
    engine.serve("others", prompt(2, 44 * CHUNK + 1))
    engine.serve("first", wanted)
    engine.reset_prefix_cache()
    before = len(engine.ledger.content()["cpu"])
    engine.serve("second", wanted)
    assert figure(engine, "compared_chunks") > 0
    assert before - len(engine.ledger.content()["cpu"]) <= 64 // 16
