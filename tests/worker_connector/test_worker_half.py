import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the worker half needs torch")

import torch

from worker_connector.config import STAGING_CHUNKS, ConnectorConfig
from worker_connector.copier import Copier
from worker_connector.errors import NativeUnavailable
from worker_connector.plan import Comparison, LoadJob, Piece, SaveJob, Span, StepPlan, TierJob, WorkerReport
from worker_connector.worker_half import WorkerHalf

BLOCKS, PAGE, LAYERS = 40, 1024, 2


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture
def half(calls: list[Any]) -> WorkerHalf:
    made = WorkerHalf(ConnectorConfig(), None, SimpleNamespace(world_size=1))
    transfers: Any = SimpleNamespace(
        save=lambda job: calls.append(("save", job.job)), settle=lambda jobs: calls.append(("settle", jobs))
    )
    made._transfers = transfers
    return made


def test_a_save_is_begun_once(half: WorkerHalf, calls: list[Any]) -> None:
    plan = StepPlan(save=SaveJob(1, []))
    half.settle(plan)
    half.save(plan)
    half.settle(StepPlan(settle=[1]))
    assert calls == [("save", 1), ("settle", [1])]


def test_a_save_that_the_runner_did_not_ask_for_is_begun_before_the_next_step(
    half: WorkerHalf, calls: list[Any]
) -> None:
    half.settle(StepPlan(save=SaveJob(1, [])))
    half.settle(StepPlan(settle=[1]))
    assert calls == [("save", 1), ("settle", [1])]


class FullAttentionSpec(SimpleNamespace):
    """As vLLM's, by its name and the fields that are read."""


def described(size: int = LAYERS * BLOCKS * PAGE) -> Any:
    """A KVCacheConfig of one group, layer outermost."""
    spec = FullAttentionSpec(
        block_size=16, page_size_bytes=PAGE, num_states=16, state_content_size_bytes=1, num_heads=1
    )
    names = [f"l{layer}" for layer in range(LAYERS)]
    tensor = SimpleNamespace(size=size, layers=names, offset=0, layer_stride=BLOCKS * PAGE, block_stride=PAGE)
    return SimpleNamespace(
        num_blocks=BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec)],
    )


def views(buffer: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {f"l{layer}": buffer.view(LAYERS, BLOCKS, PAGE)[layer] for layer in range(LAYERS)}


class SlowSaves(Copier):
    """A copier whose saves take a while."""

    def to_slab(self, *arguments: Any) -> Any:
        time.sleep(0.3)
        return super().to_slab(*arguments)


@contextmanager
def registered(buffer: torch.Tensor, copier: type[Copier] = Copier, **settings: Any) -> Iterator[WorkerHalf]:
    config = ConnectorConfig(**{"chunk_size": 64, "cpu_bytes": 1 << 20, **settings})
    half = WorkerHalf(config, described(), SimpleNamespace(world_size=1), copier)
    half.register(views(buffer))
    try:
        yield half
    finally:
        half.close()


def cache() -> torch.Tensor:
    return torch.randint(0, 256, (LAYERS * BLOCKS * PAGE,), dtype=torch.uint8)


def ended(half: WorkerHalf) -> Any:
    deadline = time.monotonic() + 5
    while (results := half.take_results()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return results


def cycle(half: WorkerHalf, buffer: torch.Tensor, *, spoil: bool = False) -> Any:
    """Save four blocks, overwrite them, load them into others; the results, and whether the bytes are those saved."""
    before = buffer.view(LAYERS, BLOCKS, PAGE)[:, 1:5].clone()
    half.save(StepPlan(save=SaveJob(1, [Span(3, 0, 0, [1, 2, 3, 4])])))
    half.settle(StepPlan(settle=[1]))
    buffer.view(LAYERS, BLOCKS, PAGE)[:, 1:5] = 0
    if spoil:
        assert half._slab is not None
        assert half._slab.bytes is not None
        half._slab.bytes[3 * half._slab.slot_bytes + 77] ^= 1
    half.load(StepPlan(loads=[LoadJob("a", [Span(3, 0, 0, [9, 7, 8, 20])], 5.0, [9, 7, 8, 20])]))
    results = ended(half)
    return results, torch.equal(buffer.view(LAYERS, BLOCKS, PAGE)[:, [9, 7, 8, 20]], before)


@pytest.mark.parametrize("settings", [{}, {"verify": True}, {"copy_threads": 2}, {"numa_node": -1}])
def test_blocks_come_back_from_the_slab(settings: dict[str, Any]) -> None:
    buffer = cache()
    with registered(buffer, **settings) as half:
        assert half.slots == (1 << 20) // (4 * LAYERS * PAGE)
        results, same = cycle(half, buffer)
        assert (results.finished, results.failed, results.failed_blocks) == ({"a"}, set(), set())
        assert same


@pytest.mark.parametrize("waits", [False, True])
def test_without_asynchronous_writes_a_step_ends_with_its_save(*, waits: bool) -> None:
    with registered(cache(), SlowSaves, async_write=not waits) as half:
        half.save(StepPlan(save=SaveJob(1, [Span(3, 0, 0, [1, 2, 3, 4])])))
        report = half.take_report()
        assert (report is not None and report.saved == {1: 1}) is waits


@pytest.mark.parametrize("spoil", [False, True])
def test_slots_of_a_chunk_computed_twice_are_compared(*, spoil: bool) -> None:
    buffer = cache()
    with registered(buffer) as half:
        half.save(StepPlan(save=SaveJob(1, [Span(3, 0, 0, [1, 2, 3, 4])])))
        half.settle(StepPlan(settle=[1]))
        if spoil:
            buffer.view(LAYERS, BLOCKS, PAGE)[1, 4, 7] ^= 1
        half.save(StepPlan(save=SaveJob(2, [Span(5, 0, 0, [1, 2, 3, 4])], [Comparison(3, 5)])))
        half.settle(StepPlan(settle=[2]))
        report, deadline = WorkerReport(), time.monotonic() + 30
        while report.saved != {1: 1, 2: 1}:
            assert time.monotonic() < deadline
            report.merge(half.take_report() or WorkerReport())
            time.sleep(0.001)
        assert report.compared == {2: {3: float(spoil)}}


def test_damage_in_the_slab_fails_the_load_where_it_is_looked_for() -> None:
    buffer = cache()
    with registered(buffer, verify=True) as half:
        results, _ = cycle(half, buffer, spoil=True)
        assert (results.failed, results.failed_blocks) == ({"a"}, {9, 7, 8, 20})
        report = half.take_report()
        assert report is not None
        assert (report.failed_loads, report.damaged) == ({"a": {3}}, {3})


def test_without_the_library_there_is_no_engine_but_without_a_cpu_tier_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", str(tmp_path))
    with (
        pytest.raises(NativeUnavailable, match=r"install warmroute again.*set enable_cpu to false"),
        registered(cache()),
    ):
        pass
    for settings in ({"enable_cpu": False}, {"enable_prefix_cache": False}):
        with registered(cache(), **settings) as half:
            assert half.slots == 0


def test_a_cache_that_is_not_what_was_described_has_no_cpu_tier_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    apart = {name: view.clone() for name, view in views(cache()).items()}
    half = WorkerHalf(ConnectorConfig(chunk_size=64, cpu_bytes=1 << 20), described(), SimpleNamespace(world_size=1))
    with caplog.at_level(logging.WARNING):
        half.register(apart)
        assert half.slots == 0
        assert "2 allocations" in caplog.text
        half.register({"l0": torch.zeros(100, dtype=torch.uint8)})
        assert "100 bytes" in caplog.text
    half.close()


def test_closing_during_a_transfer_waits_for_it() -> None:
    buffer = cache()
    with registered(buffer) as half:
        for job in range(200):
            half.save(StepPlan(save=SaveJob(job, [Span(job % half.slots, 0, 0, [1, 2, 3, 4])])))
    assert half._slab is None
    half.close()


def test_lower_tiers_without_a_cpu_tier_have_room_for_some_chunks_at_least(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("worker_connector.config.STAGING_BYTES", 1)
    below = {"enable_cpu": False, "enable_disk": True, "disk_path": str(tmp_path)}
    with registered(cache(), **below) as half:
        assert half.slots == STAGING_CHUNKS
    with registered(cache(), enable_cpu=False) as half:
        assert half.slots == 0


@pytest.mark.parametrize(("longest", "said"), [(64 * 4, False), (64 * 5 + 1, True)])
def test_it_is_said_where_the_longest_prompt_has_no_room(
    longest: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vllm: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    config = ConnectorConfig(chunk_size=64, cpu_bytes=4 * LAYERS * 4 * PAGE)
    parallel = SimpleNamespace(world_size=1, rank=0)
    half = WorkerHalf(config, described(), parallel, vllm_config=vllm)
    half.register(views(cache()))
    half.close()
    assert half.slots == 4
    lines = [record.getMessage() for record in caplog.records if "the longest has" in record.getMessage()]
    assert bool(lines) == said
    assert not said or "set cpu_bytes to 0." in lines[0]


def test_a_rank_without_slots_has_emptied_no_tier(half: WorkerHalf) -> None:
    half._transfers = None
    half.load(StepPlan(tiers=[TierJob(1, "disk", "drop", [], 1.0), TierJob(2, "disk", "drop", [Piece(b"a", -1)], 1.0)]))
    report = half.take_report()
    assert report is not None
    assert {job: result.failed for job, result in report.tiers.items()} == {1: {b"": "closed"}, 2: {b"a": "closed"}}
