from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from worker_connector import scheduler_half
from worker_connector.chunk_object import ObjectKey
from worker_connector.config import ConnectorConfig
from worker_connector.ledger import CPU, GPU
from worker_connector.scheduler_half import SchedulerHalf
from worker_connector.tier_movers import Shape


@pytest.fixture
def half() -> Iterator[SchedulerHalf]:
    """The part of an engine without a KV cache that could be stored; its report port is open."""
    model = SimpleNamespace(served_model_name="m", model="m", max_model_len=64, dtype="bfloat16", seed=0)
    parallel = SimpleNamespace(world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1)
    vllm = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="dummy"),
    )
    cache = SimpleNamespace(kv_cache_groups=[], kv_cache_tensors=[], num_blocks=64)
    made = SchedulerHalf(ConnectorConfig(report_port=0), vllm, cache, may_load=False, may_save=False)
    made.start([8])
    yield made
    made.close()


def fill(half: SchedulerHalf, chunks: int) -> None:
    for number in range(chunks):
        slot = half.ledger.reserve(bytes([number] * 16))
        assert slot is not None
        half.ledger.commit(slot)


def test_chunks_held_are_told_in_the_next_step_whatever_else_happened(half: SchedulerHalf) -> None:
    fill(half, 3)
    assert half.take_stats()["held_chunks"] == {GPU: 0, CPU: 3}
    assert half.take_stats() == {}
    half.operations.table()["clear"]({})
    assert half.take_stats() == {"held_chunks": {CPU: 0}}
    half.ledger.gpu_stored([bytes(16)])
    assert half.take_stats() == {"held_chunks": {GPU: 1}}


def test_an_idle_engine_tells_what_it_holds_now(half: SchedulerHalf) -> None:
    half.take_stats()
    fill(half, 3)
    assert half.operations.table()["stats"]({})["counts"]["held_chunks"] == {GPU: 0, CPU: 3}
    half.operations.table()["clear"]({})
    assert half.operations.table()["stats"]({})["counts"]["held_chunks"] == {GPU: 0, CPU: 0}
    assert half._server is not None
    half._server.relists, half._server.dropped_readers = 5, 2
    counts = half.operations.table()["stats"]({})["counts"]
    assert (counts["relists"], counts["dropped_readers"]) == ({"": 5}, {"": 2})
    assert counts["report_readers"] == {"": 0}


def test_objects_are_called_what_the_ranks_call_them(half: SchedulerHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    half._ranks = 2
    told = [ObjectKey(bytes([rank]) * 16, bytes(16), rank, 2) for rank in (1, 0)]
    assert half._names_of(told, None) == told[::-1]  # type: ignore[arg-type]
    shape = Shape(bytes([7]) * 16, 0, 2, "", "", 64, (), (), 0)
    monkeypatch.setattr(scheduler_half, "shape_of", lambda *_args, **_rank: shape)
    for silent in ([], [None, None], told[:1]):
        names = half._names_of(silent, None)  # type: ignore[arg-type]
        assert names == [ObjectKey(bytes([7]) * 16, bytes(16), rank, 2, 0) for rank in (0, 1)]


class Pool:
    """As vLLM's BlockPool, as far as a reset goes."""

    enable_caching = False

    def __init__(self) -> None:
        self.used = 0
        self.cached_block_hash_to_block = {1: 1}

    def get_usage(self) -> float:
        return self.used / 10

    def reset_prefix_cache(self) -> bool:
        if not self.used:
            self.cached_block_hash_to_block = {}
        return not self.used


def test_a_reset_makes_the_weights_a_generation_of_their_own(half: SchedulerHalf) -> None:
    pool = Pool()
    half.bind(pool)
    fill(half, 3)
    pool.reset_prefix_cache()
    half.reset()
    first = half.planner.lower.generation
    assert (half.ledger.counts()[CPU], half.planner.is_stale) == (0, False)
    half.reset()
    assert first
    assert half.planner.lower.generation not in ("", first)


def test_what_a_reset_could_not_empty_is_emptied_when_no_request_runs(half: SchedulerHalf) -> None:
    pool = Pool()
    half.bind(pool)
    pool.used = 3
    half.reset()
    half.drain_and_publish()
    assert half.planner.is_stale
    pool.used = 0
    half.drain_and_publish()
    assert (half.planner.is_stale, pool.cached_block_hash_to_block) == (False, {})
    pool.cached_block_hash_to_block = {1: 1}
    half.reset()
    assert half.planner.is_stale
    half.added(
        SimpleNamespace(request_id="a", prompt_token_ids=[1], num_prompt_tokens=1, num_tokens=1, lora_request=None)
    )
    assert not half.planner.is_stale


def test_it_is_said_which_rank_keeps_all_from_keeping_anything(
    half: SchedulerHalf, caplog: pytest.LogCaptureFixture
) -> None:
    half.start([8, 0])
    assert any("rank 1 has no room" in record.getMessage() for record in caplog.records)
    assert half.ledger.capacity == 0
