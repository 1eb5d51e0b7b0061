"""Tails in lower tiers: what their objects hold, and that they are never taken for whole chunks, nor whole chunks for them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker_connector.test_tier_movers import until
from worker_connector.chunk_object import HEADER_BYTES, Codec, ObjectKey, Section, read_header
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.lookups import Lookups
from worker_connector.lower import TierRules
from worker_connector.plan import Piece, TierJob, TierResult
from worker_connector.tails import gather, spread, tail_identity, tail_shape
from worker_connector.tier_movers import Shape, Tier, TierMovers
from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskSettings, DiskStore

SLOTS, SLOT_BYTES, PAYLOAD = 6, 12_288, 9_000
BLOCKS = 4
SECTIONS = (Section(0, 16, BLOCKS, 0, 6_000), Section(1, 16, BLOCKS, 0, 3_000))
RUNS = [[(0, 500), (2_000, 1_000)], [(6_000, 750)]]
SHAPE = Shape(bytes(16), 0, 1, "LBHNC", "bfloat16", 64, SECTIONS, (False, True), PAYLOAD)
TAIL, OTHER = bytes([7]) * 16, bytes([8]) * 16


class Rig:
    def __init__(self, directory: Path, codec: str = "raw") -> None:
        self.memory = np.random.default_rng(1).integers(0, 8, SLOTS * SLOT_BYTES, dtype=np.uint8)
        self.directory = directory
        self.store: Store = DiskStore(DiskSettings(directory=directory, max_bytes=64 << 20))
        tier = Tier(store=self.store, codec=Codec.parse(codec))
        self.movers = TierMovers({"disk": tier}, memoryview(self.memory), SLOT_BYTES, SHAPE, runs=RUNS)
        self._job = 0

    def run(self, kind: str, *pieces: Piece) -> TierResult:
        self._job += 1
        self.movers.submit([TierJob(self._job, "disk", kind, list(pieces), 5.0)])  # type: ignore[arg-type]
        until(lambda: self.movers.has_results)
        (result,) = self.movers.take().values()
        return result

    def blocks(self, slot: int, count: int) -> list[bytes]:
        """The first blocks of every region of a slot."""
        content = self.memory[slot * SLOT_BYTES :][:PAYLOAD].tobytes()
        return [content[start : start + count * size] for group in RUNS for start, size in group]

    def objects(self) -> list[Path]:
        return sorted(self.directory.rglob("*.object"))


@pytest.fixture(params=["raw", "zstd", "lz4"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "cache", request.param)
    yield made
    made.movers.close()


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_blocks_of_a_tail_come_back_into_another_slot(rig: Rig, blocks: int) -> None:
    before = rig.blocks(0, blocks)
    assert not rig.run("write", Piece(TAIL, 0, (), 16 * blocks)).failed
    (path,) = rig.objects()
    assert path.stat().st_size <= 2 * HEADER_BYTES + PAYLOAD * blocks // BLOCKS
    rig.memory[SLOT_BYTES:] = 99
    result = rig.run("fetch", Piece(TAIL, 1, (), 16 * blocks))
    assert not result.failed
    assert rig.blocks(1, blocks) == before
    assert (rig.memory[2 * SLOT_BYTES :] == 99).all()
    assert rig.blocks(0, blocks) == before


def test_what_a_tail_lacks_is_told(rig: Rig) -> None:
    rig.run("write", Piece(TAIL, 0, (0, 2), 48))
    assert rig.run("fetch", Piece(TAIL, 1, (), 48)).missing == {TAIL: (0, 2)}


def test_whole_chunks_and_tails_of_one_name_are_two_things(rig: Rig) -> None:
    rig.run("write", Piece(TAIL, 0, (), 32))
    assert rig.run("fetch", Piece(TAIL, 1)).failed == {TAIL: "missing"}
    rig.run("write", Piece(OTHER, 0))
    assert rig.run("fetch", Piece(OTHER, 1, (), 32)).failed == {OTHER: "missing"}


def test_a_tail_of_another_length_or_a_whole_chunk_in_its_place_is_refused(rig: Rig) -> None:
    rig.run("write", Piece(TAIL, 0, (), 32))
    assert rig.run("fetch", Piece(TAIL, 1, (), 48)).failed == {TAIL: "layout"}
    (path,) = rig.objects()
    whole = str(SHAPE.key(TAIL))
    renamed = path.with_name(path.name.replace(str(tail_shape(SHAPE, 32).key(TAIL)), whole))
    if renamed != path:
        path.rename(renamed)
        assert rig.run("fetch", Piece(TAIL, 1)).failed[TAIL] in {"bad", "missing"}


def test_a_flipped_bit_is_found(rig: Rig) -> None:
    rig.run("write", Piece(TAIL, 0, (), 32))
    (path,) = rig.objects()
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 10] ^= 1
    path.write_bytes(content)
    assert rig.run("fetch", Piece(TAIL, 1, (), 32)).failed == {TAIL: "bad"}
    assert rig.run("fetch", Piece(TAIL, 1, (), 32)).failed == {TAIL: "missing"}


def test_emptying_takes_the_tails_too(rig: Rig) -> None:
    rig.run("write", Piece(TAIL, 0, (), 32), Piece(OTHER, 1))
    assert len(rig.objects()) == 2
    assert not rig.run("drop").failed
    assert not rig.objects()
    rig.run("write", Piece(TAIL, 0, (), 32))
    rig.run("drop", Piece(TAIL, -1, (), 32))
    assert not rig.objects()


@pytest.mark.parametrize("tokens", [5, 64, 96])
def test_what_is_no_tail_is_refused(rig: Rig, tokens: int) -> None:
    assert rig.run("write", Piece(TAIL, 0, (), tokens)).failed == {TAIL: "failed"}
    assert not rig.objects()


def test_the_header_says_what_it_holds(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache")
    rig.run("write", Piece(TAIL, 0, (), 48))
    (path,) = rig.objects()
    header = read_header(path.read_bytes()[:HEADER_BYTES])
    assert (header.tokens, header.payload_bytes) == (48, PAYLOAD * 3 // 4)
    assert [section.blocks for section in header.sections] == [3, 3]
    assert header.key == ObjectKey(tail_identity(SHAPE.identity), TAIL, 0, 1, 3)
    rig.movers.close()


def test_look_ups_tell_tails_from_chunks_and_listings_leave_them_out(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache")
    rig.run("write", Piece(TAIL, 0, (), 32), Piece(OTHER, 1))
    ledger = Ledger(LeastRecentlyUsed())
    ledger.add_tier("disk")
    lookups = Lookups(
        ledger, {"disk": rig.store}, lambda chunk: [SHAPE.key(chunk)], [TierRules(name="disk")], timeout=10
    )
    until(lambda: lookups.scanned)
    assert ledger.content()["disk"] == [OTHER]
    assert not ledger.tail_below(TAIL)
    question = lookups.ask([TAIL], [TAIL, OTHER])
    until(lambda: not question.pending)
    assert ledger.tail_below(TAIL) == ["disk"]
    assert not ledger.tail_below(OTHER)
    assert ledger.content()["disk"] == [OTHER], "nobody outside hears of tails"
    ledger.check()
    ledger.removed("disk", [TAIL])
    assert not ledger.tail_below(TAIL)
    lookups.close()
    rig.movers.close()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(2, 6),
    st.data(),
)
def test_spreading_undoes_gathering(regions: list[list[int]], blocks: int, data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, blocks)) for _ in regions]
    runs, at = [], 0
    for group in regions:
        runs.append([(at + blocks * sum(group[:number]), size) for number, size in enumerate(group)])
        at += blocks * sum(group)
    slot = np.random.default_rng(at).integers(0, 256, at, dtype=np.uint8)
    packed = bytearray(sum(count * sum(group) for count, group in zip(counts, regions, strict=True)))
    gather(memoryview(slot), runs, counts, memoryview(packed))
    other = np.zeros(at, np.uint8)
    other[: len(packed)] = np.frombuffer(packed, np.uint8)
    spread(memoryview(other), runs, counts)
    for group, count in zip(runs, counts, strict=True):
        for start, size in group:
            assert (other[start : start + count * size] == slot[start : start + count * size]).all()
