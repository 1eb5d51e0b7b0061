"""Conversations that go on find what they computed before, the beginning of their last chunk too."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, Engine, Request, prompt
from worker_connector.conversations import Conversations
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.pins import REQUESTS_SHARE, Pins


def next_turn(engine: Engine, name: str, tokens: list[int], **fields: int) -> list[int]:
    """Serve a turn; all of the conversation after it."""
    request = engine.serve(name, tokens, **fields)
    return [*tokens, *request.outputs]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("windows", [(0,), (0, 6)])
def test_the_next_turn_loads_up_to_the_last_block_of_the_turn_before(windows: tuple[int, ...], ranks: int) -> None:
    engine = Engine(blocks=200, windows=windows, ranks=ranks, conversation_mode=True)
    said = next_turn(engine, "first", prompt(1, 5 * CHUNK), max_tokens=CHUNK + 2 * BLOCK + 1)
    engine.reset_prefix_cache()
    second = engine.serve("second", [*said, *prompt(2, CHUNK)], max_tokens=1)
    assert second.answers[-1] == 6 * CHUNK + 2 * BLOCK
    assert not engine.owners, "blocks are still held"


def test_without_the_mode_nothing_generated_is_kept_beyond_whole_chunks() -> None:
    engine = Engine(blocks=200)
    said = next_turn(engine, "first", prompt(1, 5 * CHUNK), max_tokens=CHUNK + 2 * BLOCK + 1)
    engine.reset_prefix_cache()
    assert engine.serve("second", [*said, *prompt(2, CHUNK)], max_tokens=1).answers[-1] == 6 * CHUNK


def test_a_request_that_is_not_to_be_saved_leaves_no_end() -> None:
    engine = Engine(blocks=200, conversation_mode=True)
    controls = {"kv_transfer_params": {"warmroute": {"skip_save": True}}}
    request = engine.serve("first", prompt(1, 5 * CHUNK), max_tokens=2 * BLOCK + 1, **controls)
    engine.reset_prefix_cache()
    again = engine.serve("second", [*prompt(1, 5 * CHUNK), *request.outputs, 1, 2], max_tokens=1)
    assert again.answers[-1] == 0


def test_the_end_of_a_turn_is_not_saved_under_other_weights() -> None:
    engine = Engine(blocks=200, conversation_mode=True)
    request = engine.add("first", prompt(1, 5 * CHUNK), max_tokens=2 * BLOCK + 1)
    while "first" in engine.requests:
        engine.step()
    engine.planner.clear("others")
    assert not engine.owners, "blocks are held for a save that will not come"
    engine.run()
    engine.reset_prefix_cache()
    again = engine.serve("second", [*prompt(1, 5 * CHUNK), *request.outputs, 1, 2], max_tokens=1)
    assert again.answers[-1] == 0


def test_a_reset_of_the_engine_finds_all_blocks_free() -> None:
    engine = Engine(blocks=200, conversation_mode=True, delay=lambda: 5)
    engine.add("first", prompt(1, 5 * CHUNK), max_tokens=2 * BLOCK + 1)
    while "first" in engine.requests:
        engine.step()
    assert engine.owners
    engine.reset_prefix_cache()
    engine.run()


@pytest.mark.parametrize("seed", range(6))
def test_conversations_in_a_small_engine_read_no_wrong_token_and_give_all_blocks_back(seed: int) -> None:
    source = random.Random(seed)
    windows = source.choice([(0,), (0, 6), (9, 0, 30)])
    engine = Engine(
        blocks=60 * len(windows),
        slots=12,
        windows=windows,
        ranks=2,
        conversation_mode=True,
        delay=lambda: source.randrange(4),
    )
    said = {number: prompt(number, 3 * CHUNK) for number in range(4)}
    for turn in range(24):
        number = source.randrange(4)
        if len(said[number]) > 8 * CHUNK:
            said[number] = prompt(100 + turn, 4 * CHUNK)
        asked = [*said[number], *prompt(1000 + turn, source.randrange(1, CHUNK))]
        said[number] = next_turn(engine, f"turn {turn}", asked, max_tokens=source.randrange(1, CHUNK))
    assert not engine.owners, "blocks are still held"


def turn_with_a_tail(engine: Engine) -> tuple[list[int], list[int]]:
    """A prompt of five chunks and what was generated behind it, of which the beginning of a chunk is whole blocks."""
    asked = prompt(1, 5 * CHUNK)
    return asked, next_turn(engine, "first", asked, max_tokens=3 * BLOCK + 1)


def preempted_again(engine: Engine, asked: list[int], said: list[int]) -> Request:
    """A request that was preempted when it had generated the same, and is loaded again, tail and all."""
    engine.reset_prefix_cache()
    request = engine.add("again", asked, max_tokens=64)
    request.outputs = list(said[len(asked) :])
    engine.hold_loads = True
    engine.step()
    assert request.status == "loading"
    return request


def forget_tails(engine: Engine) -> None:
    with engine.ledger.lock:
        for slot in [slot for slot in engine.ledger._slots.values() if slot.hidden]:
            engine.ledger.forget(slot.chunk)


@pytest.mark.parametrize("delay", [0, 8])
def test_what_was_still_being_loaded_when_a_request_was_given_up_is_not_saved(delay: int) -> None:
    engine = Engine(blocks=200, conversation_mode=True)
    asked, said = turn_with_a_tail(engine)
    preempted_again(engine, asked, said)
    forget_tails(engine)
    engine.abort("again")
    for _ in range(delay):
        engine.step()
    engine.hold_loads = False
    engine.run()
    engine.reset_prefix_cache()
    engine.serve("third", [*said, *prompt(2, CHUNK)], max_tokens=1)
    assert not engine.owners, "blocks are still held"


def test_what_was_not_computed_again_when_a_request_was_given_up_is_not_saved() -> None:
    engine = Engine(blocks=200, conversation_mode=True)
    asked, said = turn_with_a_tail(engine)
    request = preempted_again(engine, asked, said)
    forget_tails(engine)
    engine.fail_load = lambda _job, _rank: set()
    engine.hold_loads = False
    tables = [list(table) for table in request.tables]
    engine.step()
    assert request.num_computed_tokens == 0
    engine.planner.finished("again", tables)  # vLLM frees the blocks of a failed load when it asks next
    assert not engine.owners, "blocks are held for what nobody computed"


def test_the_end_of_a_turn_is_not_saved_for_another_adapter_of_the_same_name() -> None:
    engine = Engine(blocks=200, conversation_mode=True)
    before, after = (SimpleNamespace(lora_name="a", lora_path=path, lora_int_id=1) for path in ("/one", "/other"))
    asked = prompt(1, 5 * CHUNK)
    first = engine.add("first", asked, max_tokens=2 * BLOCK + 1, lora_request=before)
    while "first" in engine.requests:
        engine.step()
    said = [*asked, *first.outputs]
    engine.serve("second", said[: 5 * CHUNK + 1], max_tokens=1, lora_request=after)
    engine.reset_prefix_cache()
    engine.serve("third", [*said, *prompt(2, CHUNK)], max_tokens=1, lora_request=after)
    assert not engine.owners, "blocks are still held"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def kept(slots: int = 40) -> tuple[Conversations, Pins]:
    ledger = Ledger(LeastRecentlyUsed())
    ledger.set_capacity(slots)
    pins = Pins(ledger, Clock())
    return Conversations(pins, 60.0), pins


def chunks(conversation: int, count: int) -> list[bytes]:
    return [bytes([conversation, at]) * 8 for at in range(count)]


def test_a_later_turn_takes_the_place_of_the_one_before_it() -> None:
    conversations, pins = kept()
    conversations.turn_ended([*chunks(1, 3), b"a tail"])
    conversations.turn_ended(chunks(1, 4))
    assert len(conversations) == 2, "a tail is not among the next turn's chunks"
    conversations.turn_ended(chunks(1, 6))
    assert len(conversations) == 2
    assert len(pins) == 7


def test_when_the_share_is_full_the_conversation_that_waited_longest_gives_way() -> None:
    conversations, pins = kept()
    for number in range(5):
        conversations.turn_ended(chunks(number, 4))
    held = {chunk for chunk, _ in pins.entries(100)}
    assert held == {*chunks(3, 4), *chunks(4, 4)}


def test_chunks_that_conversations_share_stay_while_one_of_them_does() -> None:
    conversations, pins = kept()
    shared = chunks(9, 2)
    conversations.turn_ended([*shared, *chunks(1, 3)])
    conversations.turn_ended([*shared, *chunks(2, 3)])
    conversations.turn_ended(chunks(3, 5))
    held = {chunk for chunk, _ in pins.entries(100)}
    assert held >= {*shared, *chunks(2, 3), *chunks(3, 5)}
    assert chunks(1, 3)[0] not in held


def test_a_conversation_larger_than_the_share_pushes_nobody_out() -> None:
    conversations, pins = kept()
    conversations.turn_ended(chunks(1, 4))
    conversations.turn_ended(chunks(2, 20))
    held = {chunk for chunk, _ in pins.entries(100)}
    assert held == {*chunks(1, 4), *chunks(2, 20)[:6]}


def test_operators_pins_stay() -> None:
    conversations, pins = kept()
    pins.pin(chunks(1, 2))
    conversations.turn_ended(chunks(1, 4))
    for number in range(2, 6):
        conversations.turn_ended(chunks(number, 4))
    held = {chunk for chunk, _ in pins.entries(100)}
    assert held >= set(chunks(1, 2))


def test_what_has_ended_is_forgotten() -> None:
    conversations, pins = kept()
    conversations.turn_ended(chunks(1, 4))
    clock = pins._clock
    assert isinstance(clock, Clock)
    clock.now += 100
    pins.expire()
    conversations.turn_ended(chunks(2, 4))
    assert len(conversations) == 1
    assert {chunk for chunk, _ in pins.entries(100)} == set(chunks(2, 4))


def long_conversation(number: int, count: int) -> list[bytes]:
    return [number.to_bytes(8, "big") + at.to_bytes(8, "big") for at in range(count)]


@pytest.mark.parametrize("slots", [0, 400])
@pytest.mark.parametrize("shared", [0, 90])
def test_what_is_remembered_is_bounded_by_the_tier(slots: int, shared: int) -> None:
    conversations, pins = kept(slots)
    for number in range(300):
        conversations.turn_ended([*long_conversation(1, shared), *long_conversation(10 + number, 120 - shared)])
    remembered = sum(len(each.chunks) for each in conversations._kept.values())
    assert remembered <= 4 * pins.most(REQUESTS_SHARE)
    assert len(pins) >= min(pins.most(REQUESTS_SHARE), shared or 100)


def test_a_turn_that_takes_the_place_of_many_looks_through_its_chunks_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conversations, pins = kept(4000)
    pins.pin(long_conversation(0, 600))  # an operator's, beyond what requests may pin
    for number in range(400):
        conversations.turn_ended(long_conversation(1 + number, 1))
    times, pin_until = list[int](), pins.pin_until

    def counted(*arguments: Any, **settings: Any) -> Any:
        times.append(1)
        return pin_until(*arguments, **settings)

    monkeypatch.setattr(pins, "pin_until", counted)
    turn = long_conversation(5000, 300)
    conversations.turn_ended(turn)
    held = {chunk for chunk, _ in pins.entries(5000)}
    assert held >= set(turn)
    assert len(held) == 1000
    assert len(times) <= 3
