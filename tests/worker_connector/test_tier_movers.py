"""Moves between slots and a real directory, and look-ups in it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.worker_connector.tiers.scripted import ScriptedStore
from worker_connector.chunk_object import HEADER_BYTES, Codec, Section, seal
from worker_connector.errors import StoreUnavailable
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.lookups import Always, Lookups
from worker_connector.lower import TierRules
from worker_connector.plan import Piece, TierJob, TierResult
from worker_connector.tier_movers import Shape, Tier, TierMovers
from worker_connector.tier_stores import is_sound
from worker_connector.tiers.base import Outcome, Status, Store
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.said import Said

SLOTS, SLOT_BYTES, PAYLOAD = 8, 12_288, 9_000
SECTIONS = (Section(0, 16, 4, 0, 6_000), Section(1, 16, 4, 0, 3_000))
SHAPE = Shape(bytes(16), 0, 1, "LBHNC", "bfloat16", 64, SECTIONS, (False, True), PAYLOAD)
CHUNKS = [bytes([number]) * 16 for number in range(1, 7)]


class Rig:
    def __init__(self, directory: Path, codec: str = "raw", shape: Shape = SHAPE) -> None:
        self.memory = np.random.default_rng(1).integers(0, 256, SLOTS * SLOT_BYTES, dtype=np.uint8)
        self.memory[:: SLOT_BYTES // 4] = 0
        self.store = DiskStore(DiskSettings(directory=directory, max_bytes=64 << 20))
        assert self.store.wait_scanned(60)
        self.movers = TierMovers(
            {"disk": Tier(store=self.store, codec=Codec.parse(codec))}, memoryview(self.memory), SLOT_BYTES, shape
        )
        self._job = 0

    def run(self, kind: str, pieces: list[Piece], deadline: float = 30.0, generation: str = "") -> TierResult:
        self._job += 1
        self.movers.submit([TierJob(self._job, "disk", kind, pieces, deadline, generation)])  # type: ignore[arg-type]
        until(lambda: self.movers.has_results)
        (result,) = self.movers.take().values()
        return result

    def slot(self, index: int) -> bytes:
        return self.memory[index * SLOT_BYTES :][:PAYLOAD].tobytes()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


@pytest.fixture(params=["raw", "zstd", "lz4"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "cache", request.param)
    yield made
    made.movers.close()


def objects(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("w1-*") if path.is_file()] or [
        path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > HEADER_BYTES
    ]


def test_what_is_written_comes_back_into_another_slot(rig: Rig) -> None:
    written = rig.run("write", [Piece(CHUNKS[0], 0), Piece(CHUNKS[1], 1, (0, 2))])
    assert not written.failed
    assert written.nbytes > HEADER_BYTES
    before = rig.slot(0), rig.slot(1)
    fetched = rig.run("fetch", [Piece(CHUNKS[1], 5), Piece(CHUNKS[0], 4)])
    assert not fetched.failed
    assert (rig.slot(4), rig.slot(5)) == before
    assert fetched.missing == {CHUNKS[1]: (0, 2)}
    assert (rig.slot(0), rig.slot(1)) == before


def test_what_is_not_there_is_missing_and_the_rest_is_fetched(rig: Rig) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])
    fetched = rig.run("fetch", [Piece(CHUNKS[2], 3), Piece(CHUNKS[0], 4)])
    assert fetched.failed == {CHUNKS[2]: "missing"}
    assert rig.slot(4) == rig.slot(0)


def test_a_spoilt_object_is_bad_and_is_met_once(rig: Rig, tmp_path: Path) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])
    (path,) = objects(tmp_path / "cache")
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 17] ^= 1
    path.write_bytes(content)
    assert rig.run("fetch", [Piece(CHUNKS[0], 4)]).failed == {CHUNKS[0]: "bad"}
    assert rig.run("fetch", [Piece(CHUNKS[0], 4)]).failed == {CHUNKS[0]: "missing"}


def test_an_engine_of_another_identity_finds_nothing(rig: Rig, tmp_path: Path) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])
    other = Rig(tmp_path / "cache", shape=SHAPE._replace(identity=b"x" * 16))
    assert other.run("fetch", [Piece(CHUNKS[0], 4)]).failed == {CHUNKS[0]: "missing"}
    other.run("drop", [])
    other.movers.close()
    assert not rig.run("fetch", [Piece(CHUNKS[0], 4)]).failed


def test_a_full_attention_group_must_be_whole(rig: Rig) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0, (1, 0))])
    assert rig.run("fetch", [Piece(CHUNKS[0], 4)]).failed == {CHUNKS[0]: "bad"}


def test_dropping_some_and_dropping_all(rig: Rig) -> None:
    rig.run("write", [Piece(chunk, 0) for chunk in CHUNKS])
    rig.run("drop", [Piece(CHUNKS[0], -1)])
    result = rig.run("fetch", [Piece(chunk, 4) for chunk in CHUNKS[:2]])
    assert result.failed == {CHUNKS[0]: "missing"}
    rig.run("drop", [])
    assert set(rig.run("fetch", [Piece(chunk, 4) for chunk in CHUNKS]).failed.values()) == {"missing"}


def test_a_store_that_was_closed_fails_every_piece_with_its_cause(rig: Rig) -> None:
    rig.store.close()
    for kind in ("write", "fetch"):
        assert rig.run(kind, [Piece(chunk, 0) for chunk in CHUNKS]).failed == dict.fromkeys(CHUNKS, "closed")


def test_every_job_is_answered_also_when_something_unforeseen_happens(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rig.store, "get", lambda *_: 1 / 0)
    assert rig.run("fetch", [Piece(CHUNKS[0], 4)]).failed == {CHUNKS[0]: "failed"}
    assert "ZeroDivisionError" in caplog.text


def test_closing_while_jobs_are_queued(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.movers.submit(TierJob(at, "disk", "write", [Piece(CHUNKS[0], 0)], 5.0) for at in range(200))
    began = time.monotonic()
    rig.movers.close()
    assert time.monotonic() - began < 5


def test_objects_are_told_sound_from_damaged(rig: Rig, tmp_path: Path) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])
    (path,) = objects(tmp_path / "cache")
    content, key = path.read_bytes(), str(SHAPE.key(CHUNKS[0]))
    assert is_sound(key, memoryview(content))
    assert not is_sound(key, memoryview(content[:-4096]))
    assert not is_sound(str(SHAPE.key(CHUNKS[1])), memoryview(content))


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_told_that_copies_could_not_be_deleted(rig: Rig, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])

    def delete(keys: Sequence[str], _deadline: float) -> list[Outcome]:
        if whole:
            raise StoreUnavailable("disk", "unreachable", "it is away")
        return [Outcome(Status.FAILED, cause="unreachable") for _ in keys]

    monkeypatch.setattr(rig.store, "delete", delete)
    assert rig.run("drop", []).failed == {b"": "unreachable"}
    assert rig.run("drop", [Piece(CHUNKS[0], -1)]).failed == {CHUNKS[0]: "unreachable"}
    monkeypatch.undo()
    assert not rig.run("drop", [Piece(CHUNKS[0], -1), Piece(CHUNKS[1], -1)]).failed
    assert not rig.run("drop", []).failed


# ---- look-ups -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger(LeastRecentlyUsed())
    made.add_tier("disk")
    return made


def look(ledger: Ledger, store: Store, shapes: list[Shape], **options: Any) -> Lookups:
    return Lookups(
        ledger,
        {"disk": store},
        lambda chunk: [shape.key(chunk) for shape in shapes],
        [TierRules(name="disk")],
        **options,
    )  # type: ignore[arg-type]


def fresh_store(tmp_path: Path) -> DiskStore:
    return DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=64 << 20))


def test_a_listing_finds_what_survived_a_restart_and_puts_the_last_used_last(
    rig: Rig, tmp_path: Path, ledger: Ledger
) -> None:
    assert not rig.run("write", [Piece(chunk, 0) for chunk in CHUNKS]).failed
    lookups = look(ledger, fresh_store(tmp_path), [SHAPE])
    until(lambda: lookups.scanned)
    assert set(ledger.content()["disk"]) == set(CHUNKS)
    lookups.close()


def test_a_listing_takes_out_what_is_gone(rig: Rig, tmp_path: Path, ledger: Ledger) -> None:
    assert not rig.run("write", [Piece(CHUNKS[0], 0)]).failed
    ledger.stored("disk", CHUNKS)
    lookups = look(ledger, fresh_store(tmp_path), [SHAPE])
    until(lambda: lookups.scanned)
    assert ledger.content()["disk"] == CHUNKS[:1]
    lookups.close()


def test_questions_are_answered_for_all_ranks_together(rig: Rig, tmp_path: Path, ledger: Ledger) -> None:
    rig.run("write", [Piece(chunk, 0) for chunk in CHUNKS[:2]])
    other = Rig(tmp_path / "cache", shape=SHAPE)
    ranks = [SHAPE, SHAPE._replace(rank=1)]
    lookups = look(ledger, fresh_store(tmp_path), [shape._replace(ranks=2) for shape in ranks])
    question = lookups.ask(CHUNKS)
    until(lambda: not question.pending)
    assert not ledger.content()["disk"]
    lookups.close()
    single = look(ledger, fresh_store(tmp_path), [SHAPE], timeout=5.0)
    question = single.ask(CHUNKS)
    until(lambda: not question.pending)
    assert set(ledger.content()["disk"]) == set(CHUNKS[:2])
    single.close()
    other.movers.close()


class Scope(Always):
    generation = "of others"

    def may_be_found(self, _tier: str, chunks: Iterable[bytes]) -> list[bytes]:
        return [chunk for chunk in chunks if chunk != CHUNKS[1]]


def test_jobs_and_look_ups_keep_to_their_generation(rig: Rig, tmp_path: Path, ledger: Ledger) -> None:
    scope, all_of_them = Scope(), [Piece(chunk, 0) for chunk in CHUNKS[:3]]
    rig.run("write", all_of_them, generation="1")
    assert rig.run("fetch", all_of_them).failed == dict.fromkeys(CHUNKS[:3], "missing")
    assert rig.run("fetch", [Piece(CHUNKS[2], 3)], generation="1").failed == {}
    assert rig.slot(3) == rig.slot(0)
    assert rig.run("drop", []).failed == {}
    assert len(objects(tmp_path / "cache")) == 3
    lookups = look(ledger, fresh_store(tmp_path), [SHAPE], timeout=5.0, scope=scope)
    until(lambda: lookups.scanned)
    assert not ledger.content()["disk"]
    scope.generation = "1"
    question = lookups.ask(CHUNKS)
    until(lambda: not question.pending)
    assert set(ledger.content()["disk"]) == {CHUNKS[0], CHUNKS[2]}
    ledger.cleared("disk")
    lookups.list_again()
    until(lambda: set(ledger.content()["disk"]) == {CHUNKS[0], CHUNKS[2]})
    lookups.close()
    rig.run("drop", [], generation="1")
    assert not objects(tmp_path / "cache")


def test_an_answer_that_comes_in_another_generation_is_not_put_on_record(
    rig: Rig, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.run("write", [Piece(chunk, 0) for chunk in CHUNKS])
    scope, store = Scope(), fresh_store(tmp_path)
    scope.generation = ""
    exists = store.exists

    def late(keys: Sequence[str], deadline: float) -> list[Outcome]:
        found = exists(keys, deadline)
        scope.generation = "1"
        ledger.cleared("disk")
        return found

    monkeypatch.setattr(store, "exists", late)
    lookups = look(ledger, store, [SHAPE], timeout=5.0, scope=scope)
    until(lambda: lookups.scanned)
    question = lookups.ask(CHUNKS)
    until(lambda: not question.pending)
    assert not ledger.content()["disk"]
    lookups.close()


def test_a_question_does_not_wait_for_a_store_that_hangs(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fresh_store(tmp_path)
    monkeypatch.setattr(
        store, "exists", lambda _keys, deadline: time.sleep(max(0.0, deadline - time.monotonic())) or []
    )
    lookups = look(ledger, store, [SHAPE], timeout=0.1)
    question = lookups.ask(CHUNKS)
    assert question.pending
    time.sleep(0.15)
    assert not question.pending
    lookups.close()


def test_what_the_store_gives_up_is_told_of_this_engines_chunks(rig: Rig, tmp_path: Path) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0), Piece(CHUNKS[1], 1)])
    other = SHAPE._replace(identity=bytes([9]) * 16)
    keys = [str(SHAPE.key(CHUNKS[0])), str(other.key(CHUNKS[1]))]
    for path in objects(tmp_path / "cache"):
        path.unlink()
    rig.store.exists(keys, time.monotonic() + 5)
    rig.run("fetch", [Piece(CHUNKS[0], 2), Piece(CHUNKS[1], 3)])
    assert rig.movers.take_lost() == {"disk": {CHUNKS[0], CHUNKS[1]}}
    assert rig.movers.take_lost() == {}


def test_damage_is_said_once_however_much_there_is(rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pieces = [Piece(chunk, slot) for slot, chunk in enumerate(CHUNKS)]
    rig.run("write", pieces)
    for path in objects(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    fetched = rig.run("fetch", pieces)
    assert set(fetched.failed.values()) == {"bad"}
    assert len([record for record in caplog.records if "is bad" in record.getMessage()]) == 1


def test_what_has_expired_is_missing_and_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig, store = Rig(tmp_path / "unused"), ScriptedStore("plain")  # which knows of no time to live
    movers = TierMovers({"remote": Tier(store=store, ttl=60)}, memoryview(rig.memory), SLOT_BYTES, SHAPE)
    made = seal(SHAPE.held(Piece(CHUNKS[0], 0)), rig.slot(0), Codec(), ttl=60, created=time.time() - 61)
    key = str(SHAPE.key(CHUNKS[0]))
    store.held[key] = bytes(made.header) + bytes(made.payload)
    movers.submit([TierJob(1, "remote", "fetch", [Piece(CHUNKS[0], 1)], 30.0)])
    until(lambda: movers.has_results)
    assert movers.take()[1].failed == {CHUNKS[0]: "missing"}
    assert not store.held
    assert not caplog.records
    movers.close()
    rig.movers.close()


def test_damage_is_counted_over_all_jobs(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rig.movers, "_said", Said(0.0))
    for slot, chunk in enumerate(CHUNKS[:3]):
        rig.run("write", [Piece(chunk, slot)])
        (path,) = objects(tmp_path / "cache")
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        assert rig.run("fetch", [Piece(chunk, slot)]).failed == {chunk: "bad"}
        for moved in (tmp_path / "cache" / "quarantine").iterdir():
            moved.unlink()
    assert [record.getMessage()[-10:] for record in caplog.records] == ["(1 so far)", "(2 so far)", "(3 so far)"]


class ChangesAtOnce:
    """Counts the chunks that the record of a tier is changed by in one call."""

    def __init__(self, ledger: Ledger) -> None:
        self.most = 0
        for name in ("stored", "removed"):
            setattr(ledger, name, self._counting(getattr(ledger, name)))

    def _counting(self, change: Callable[..., None]) -> Callable[..., None]:
        def counted(tier: str, chunks: Iterable[bytes], *rest: int) -> None:
            every = list(chunks)
            self.most = max(self.most, len(every))
            change(tier, every, *rest)

        return counted


def test_a_long_listing_takes_the_ledger_for_a_moment_at_a_time(tmp_path: Path, ledger: Ledger) -> None:
    gone = [number.to_bytes(16, "big") for number in range(5000)]
    ledger.stored("disk", gone)
    changes = ChangesAtOnce(ledger)
    lookups = look(ledger, fresh_store(tmp_path), [SHAPE])
    until(lambda: lookups.scanned)
    assert not ledger.content()["disk"]
    assert 0 < changes.most <= 512
    lookups.close()


def test_waiting_for_look_ups_ends_with_the_answer_or_the_time(rig: Rig) -> None:
    rig.run("write", [Piece(CHUNKS[0], 0)])
    ledger = Ledger(LeastRecentlyUsed())
    ledger.add_tier("disk")
    lookups = look(ledger, rig.store, [SHAPE], timeout=5.0)
    began = time.monotonic()
    lookups.wait(5.0)
    assert time.monotonic() - began < 4, "nothing was asked"
    began = time.monotonic()
    question = lookups.ask(CHUNKS[:2])
    lookups.wait(5.0)
    assert time.monotonic() - began < 4.5, "the answer ended nothing"
    until(lambda: not question.pending)
    assert ledger.below(CHUNKS[0]) == ["disk"]
    lookups.close()
