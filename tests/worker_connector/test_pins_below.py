import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import CHUNK, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector.chunk_object import ObjectKey
from worker_connector.pins import Pins
from worker_connector.pins_below import Keeper, PinsBelow
from worker_connector.tiers.base import Source
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.filesystem import DirectorySettings, DirectoryStore
from worker_connector.tiers.guarded import Guarded

A, B, C = (bytes([number]) * 16 for number in range(1, 4))


def key(chunk: bytes) -> str:
    return str(ObjectKey(bytes(16), chunk, 0, 1, 1))


def pins(most: int = 10) -> PinsBelow:
    made = PinsBelow()
    made.most = most
    return made


def test_ranks_are_told_of_changes_once() -> None:
    below = pins()
    below.changed([A, B], pinned=True)
    below.changed([A], pinned=True)
    assert below.take() == [("pin", [A, B])]
    assert not below
    below.changed([A, C], pinned=False)
    assert below.take() == [("unpin", [A])]
    below.changed([A], pinned=True)
    below.changed([A], pinned=False)
    assert not below, "nothing is different in the end"


def test_no_more_is_pinned_below_than_leaves_room_for_others() -> None:
    below = pins(1)
    below.changed([A, B], pinned=True)
    assert below.take() == [("pin", [A])]
    below.changed([B], pinned=False)
    assert not below
    assert not pins(0).take()


def test_another_generation_is_told_everything_anew() -> None:
    below = pins()
    below.changed([A, B], pinned=True)
    below.take()
    below.changed([B], pinned=False)
    below.begin_again()
    assert below.take() == [("unpin", []), ("pin", [A])]
    below.changed([A], pinned=False)
    below.begin_again()
    assert below.take() == [("unpin", [])]
    below.begin_again()
    assert not below


@pytest.mark.parametrize("seed", range(5))
def test_what_ranks_were_told_is_what_is_pinned(seed: int) -> None:
    rng, below, told, pinned = random.Random(seed), pins(), set(), set()
    for _ in range(300):
        chunk = rng.choice([A, B, C])
        if rng.random() < 0.1:
            below.begin_again()
        below.changed([chunk], pinned=(now := rng.random() < 0.5))
        (pinned.add if now else pinned.discard)(chunk)
        if rng.random() < 0.3:
            for kind, chunks in below.take():
                told = told | set(chunks) if kind == "pin" else told - set(chunks or told)
            assert told == pinned


def test_a_disk_keeps_what_is_pinned_while_others_go(tmp_path: Path) -> None:
    disk = DiskStore(DiskSettings(directory=tmp_path, max_bytes=1 << 20))
    store, keeper = Guarded(disk), Keeper()
    try:
        assert disk.wait_scanned(5)
        keeper.pin(store, [key(A), key(A)])
        chunks = [A, *(random.Random(number).randbytes(16) for number in range(40))]

        def put(names: list[bytes]) -> None:
            for chunk in names:
                source = Source(bytes(60_000))
                (outcome,) = store.put([key(chunk)], [source], time.monotonic() + 10)
                source.end()
                assert outcome.ok

        def held(chunk: bytes) -> bool:
            return store.exists([key(chunk)], time.monotonic() + 5)[0].ok

        put(chunks)
        assert held(A)
        assert not held(chunks[1])
        keeper.unpin(store, [])
        put([random.Random(100 + number).randbytes(16) for number in range(40)])
        assert not held(A)
    finally:
        store.close()


def test_a_store_that_cannot_keep_anything_is_left_alone(tmp_path: Path) -> None:
    store = DirectoryStore(DirectorySettings(path=tmp_path))
    keeper = Keeper()
    keeper.pin(store, [key(A)])
    keeper.unpin(store, [])
    store.close()


def test_every_rank_is_told_what_to_keep_and_again_after_a_reset() -> None:
    engine = TieredEngine(ranks=2)
    lower, made = engine.planner.lower, Pins(engine.ledger, lambda: engine.now)
    lower.pins_below.most = 10
    made.changed = lambda chunks, pinned: lower.pins_below.changed(chunks, pinned=pinned)
    engine.serve("a", prompt(1, 2 * CHUNK + 1))
    held: list[Any] = engine.ledger.content()["cpu"]
    made.pin(held, 5.0)
    engine.run()
    engine.clear()
    engine.run()
    engine.now += 6
    made.expire()
    engine.run()
    told = [
        (job.kind, len(job.pieces), job.generation) for plan in engine.plans for job in plan.tiers if "pin" in job.kind
    ]
    generation = lower.generation
    assert told == [("pin", 2, ""), ("unpin", 0, generation), ("pin", 2, generation), ("unpin", 2, generation)]
