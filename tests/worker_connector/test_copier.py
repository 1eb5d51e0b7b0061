"""The native copies, held against the torch and numpy copies that they replace."""

import logging
import random
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the worker half needs torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.worker_connector.reference_copier import ReferenceCopier  # noqa: E402
from worker_connector import copier as copier_module  # noqa: E402
from worker_connector.copier import Copier, Lane  # noqa: E402
from worker_connector.errors import NativeError  # noqa: E402
from worker_connector.plan import Span  # noqa: E402
from worker_connector.regions import Region, SlotLayout  # noqa: E402

PER_CHUNK = 4


def random_bytes(size: int, seed: int) -> Any:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@st.composite
def caches(draw: st.DrawFn) -> tuple[SlotLayout, int, int]:
    """A layout of one or two groups of mixed regions, the cache's size, and its blocks."""
    blocks, at = draw(st.integers(5, 20)), draw(st.integers(0, 7))
    groups = []
    for _ in range(draw(st.integers(1, 2))):
        regions = []
        for _ in range(draw(st.integers(1, 5))):
            nbytes = draw(st.sampled_from([1, 16, 24, 200, 512, 4096]))
            stride = nbytes + draw(st.sampled_from([0, 0, 8, 100]))
            regions.append(Region(at, stride, nbytes))
            at += stride * blocks
        groups.append(regions)
    return SlotLayout(groups, [draw(st.integers(1, 6)) for _ in groups]), at, blocks


@settings(max_examples=80, deadline=None)
@given(cache=caches(), seed=st.integers(0, 2**32), threads=st.sampled_from([1, 2]), verify=st.booleans())
def test_every_byte_is_as_the_reference_has_it(
    cache: tuple[SlotLayout, int, int], seed: int, threads: int, verify: bool
) -> None:
    layout, size, blocks = cache
    rng = random.Random(seed)
    held, slab = random_bytes(size, 1), random_bytes(5 * layout.slot_bytes, 2)
    ours = Copier(held.clone(), slab.clone(), layout, threads=threads, verify=verify)
    theirs = ReferenceCopier(held.clone(), slab.clone(), layout)
    for _ in range(3):
        saved = spans(rng, layout, blocks)
        ours.record(ours.to_slab(saved))
        for span in saved:
            theirs.to_slab(span)
        assert torch.equal(ours._slab, theirs._slab)
        loaded = moved(rng, saved, blocks)
        assert not ours.damaged(ours.to_cache(loaded))
        for span in loaded:
            theirs.to_cache(span)
        assert torch.equal(ours._cache, theirs._cache)


def spans(rng: random.Random, layout: SlotLayout, blocks: int) -> list[Span]:
    made = []
    for slot in rng.sample(range(5), rng.randint(1, 5)):
        for group, per_chunk in enumerate(layout.blocks_per_chunk):
            at = rng.randrange(per_chunk)
            count = min(rng.randint(1, per_chunk - at), blocks)
            first = rng.randint(0, blocks - count)
            run = list(range(first, first + count))
            made.append(Span(slot, group, at, run if rng.random() < 0.5 else rng.sample(range(blocks), count)))
    return made


def moved(rng: random.Random, saved: list[Span], blocks: int) -> list[Span]:
    """Of saved spans, all or the end comes back, into other blocks, each of which has one owner."""
    loaded, free = [], {span.group: rng.sample(range(blocks), blocks) for span in saved}
    for span in saved:
        skipped = rng.randrange(len(span.blocks))
        targets = [free[span.group].pop() for _ in span.blocks[skipped:] if free[span.group]]
        if targets:
            loaded.append(Span(span.slot, span.group, span.at + skipped, targets))
    return loaded


@pytest.mark.parametrize("stride", [512, 520])
def test_a_block_that_the_cache_lacks_fails_its_copy(stride: int) -> None:
    layout = SlotLayout([[Region(8, stride, 512)]], [PER_CHUNK])
    cache, slab = random_bytes(8 + 4 * stride, 1), random_bytes(layout.slot_bytes, 2)
    copier = Copier(cache, slab, layout)
    copier.to_slab([Span(0, 0, 0, [0, 3])])
    copier.to_cache([Span(0, 0, 0, [0, 3])])
    before = cache.clone(), slab.clone()
    for copy in (copier.to_slab, copier.to_cache):
        for wrong in (Span(0, 0, 0, [0, 4]), Span(0, 0, 0, [-1]), Span(1, 0, 0, [0]), Span(0, 0, 3, [0, 1])):
            with pytest.raises(IndexError):
                copy([Span(0, 0, 0, [1, 2]), wrong])
    assert torch.equal(cache, before[0])
    assert torch.equal(slab, before[1])


def test_batches_keep_the_order_and_end_where_they_are_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SlotLayout([[Region(0, 512, 512)]], [PER_CHUNK])
    copier = Copier(random_bytes(40 * 512, 1), random_bytes(layout.slot_bytes, 2), layout)
    monkeypatch.setattr(copier_module, "BATCH_BYTES", 3 * 512)
    made = [Span(0, 0, 0, [block] * count) for block, count in enumerate((1, 1, 2, 4, 1))]
    assert [list(batch) for batch in copier.batches(made)] == [made[:3], made[3:4], made[4:]]
    assert list(copier.batches([])) == []
    monkeypatch.setattr(copier_module, "BATCH_BYTES", 1 << 20)
    assert [list(batch) for batch in copier.batches(made)] == [made]


def test_every_flipped_bit_of_a_slot_is_seen() -> None:
    layout = SlotLayout([[Region(0, 64, 64), Region(2560, 64, 64)], [Region(5120, 32, 24)]], [PER_CHUNK, 2])
    slab = random_bytes(3 * layout.slot_bytes, 2)
    copier = Copier(random_bytes(5120 + 40 * 32, 1), slab, layout, verify=True)
    saved = [Span(slot, group, 0, [*range(blocks)]) for slot in range(3) for group, blocks in ((0, PER_CHUNK), (1, 2))]
    copier.record(copier.to_slab(saved))
    first = layout.slot_bytes
    for bit in range(8 * layout.payload_bytes):
        slab[first + bit // 8] ^= 1 << bit % 8
        assert copier.damaged(copier.to_cache(saved)) == {1}
        slab[first + bit // 8] ^= 1 << bit % 8
    assert not copier.damaged(copier.to_cache(saved))


def test_damage_in_blocks_that_are_not_loaded_does_not_count() -> None:
    layout = SlotLayout([[Region(0, 64, 64), Region(2560, 64, 64)]], [PER_CHUNK])
    slab = random_bytes(2 * layout.slot_bytes, 2)
    copier = Copier(random_bytes(5120, 1), slab, layout, verify=True)
    copier.record(copier.to_slab([Span(1, 0, 1, [4, 9, 8])]))
    slab[layout.slot_bytes + 64] ^= 1
    assert copier.damaged(copier.to_cache([Span(1, 0, 1, [1, 2, 3])])) == {1}
    assert not copier.damaged(copier.to_cache([Span(1, 0, 2, [1, 2])]))


def test_what_others_write_to_a_slot_is_not_compared_until_it_is_saved_to() -> None:
    layout = SlotLayout([[Region(0, 64, 64)]], [PER_CHUNK])
    slab = random_bytes(2 * layout.slot_bytes, 2)
    copier = Copier(random_bytes(2560, 1), slab, layout, verify=True)
    whole = [Span(slot, 0, 0, [*range(4 * slot, 4 * slot + 4)]) for slot in (0, 1)]
    copier.record(copier.to_slab(whole))
    copier.forget([1])
    slab[0] ^= 1
    slab[layout.slot_bytes] ^= 1
    assert copier.damaged(copier.to_cache(whole)) == {0}
    copier.record(copier.to_slab(whole))
    slab[layout.slot_bytes] ^= 1
    assert copier.damaged(copier.to_cache(whole)) == {1}


def test_a_lane_is_refused_to_a_second_thread_while_the_first_copies() -> None:
    page = 1 << 20
    layout = SlotLayout([[Region(0, page, page)]], [64])
    copier = Copier(random_bytes(64 * page, 1), torch.zeros(layout.slot_bytes, dtype=torch.uint8), layout)
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def save() -> None:
        start.wait()
        for _ in range(20):
            try:
                copier.to_slab([Span(0, 0, 0, list(range(64)))])
            except Exception as error:  # noqa: BLE001 - looked at below
                errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors
    assert "another thread" in str(errors[0])


class FakeGpuContext:
    """A GPU's context whose measurement ends as it is told."""

    def __init__(self, error: NativeError | None) -> None:
        self.error = error
        self.closed = False

    def calibrate(self) -> tuple[int, int]:
        if self.error is not None:
            raise self.error
        return 65536, 32768

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("error", [None, NativeError("the GPU's memory is full")])
def test_a_gpu_is_measured_at_start_and_a_failed_measurement_costs_nothing_else(
    error: NativeError | None, caplog: pytest.LogCaptureFixture
) -> None:
    context: Any = FakeGpuContext(error)
    lane = Lane(lambda: context, on_host=False)
    with caplog.at_level(logging.INFO):
        lane.open()
        lane.open()
    assert len(caplog.records) == 1
    assert ("memory is full" if error else "65536 bytes") in caplog.text
    assert lane.context is context
    lane.close()
    lane.close()
    assert context.closed
