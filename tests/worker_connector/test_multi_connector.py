"""In vLLM's MultiConnector, whose handshake carries one connector's word only."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from worker_connector.config import ConnectorConfig
from worker_connector.plan import PLAIN
from worker_connector.scheduler_half import SchedulerHalf

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, as it is imported


@pytest.fixture
def half() -> Iterator[SchedulerHalf]:
    """Of an engine that has not begun."""
    model = SimpleNamespace(served_model_name="m", model="m", max_model_len=64, dtype="bfloat16", seed=0)
    vllm = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(world_size=2, tensor_parallel_size=2, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="dummy"),
    )
    cache = SimpleNamespace(kv_cache_groups=[], kv_cache_tensors=[], num_blocks=64)
    made = SchedulerHalf(ConnectorConfig(report_port=0), vllm, cache, may_load=False, may_save=False)
    yield made
    made.close()


def test_nothing_is_kept_or_reported_before_the_ranks_have_spoken(
    half: SchedulerHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half.planner, "plan_step", lambda _: PLAIN)
    half.await_ranks()
    half.plan_step(None)
    assert half._server is None
    assert half.ledger.capacity == 0
    half.introduced([9, 8], [None, None])
    assert half._server is not None
    assert half.ledger.capacity == 8, "a chunk is where every rank has room"


def test_ranks_may_speak_in_different_steps(half: SchedulerHalf) -> None:
    half.await_ranks()
    half.introduced([9], [None])
    assert half.ledger.capacity == 0, "the other rank may have less room"
    half.introduced([8], [None])
    assert half.ledger.capacity == 8


def test_what_ranks_say_twice_changes_nothing(half: SchedulerHalf) -> None:
    half.start([8, 8])
    server = half._server
    half.introduced([3, 3], [None, None])
    assert half._server is server
    assert half.ledger.capacity == 8


def connector(half: SchedulerHalf) -> Any:
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    from worker_connector.connector import WarmrouteConnector

    made = WarmrouteConnector.__new__(WarmrouteConnector)
    made._scheduler, made._worker, made._is_introduced = half, None, False
    return made


def test_a_foreign_handshake_is_left_alone_and_the_first_step_takes_its_place(half: SchedulerHalf) -> None:
    made = connector(half)
    from worker_connector.connector import Handshake, WorkerMetadata

    made.set_xfer_handshake_metadata({0: SimpleNamespace(agent="nixl"), 1: SimpleNamespace(agent="nixl")})
    assert half._server is None
    meta = WorkerMetadata(ranks=[Handshake(8)]).aggregate(WorkerMetadata(ranks=[Handshake(9)]))
    made.update_connector_output(SimpleNamespace(kv_connector_worker_meta=meta, finished_recving=None))
    assert half.ledger.capacity == 8
    assert half._server is not None


def test_an_own_handshake_is_enough(half: SchedulerHalf) -> None:
    made = connector(half)
    from worker_connector.connector import Handshake

    made.set_xfer_handshake_metadata({0: Handshake(8), 1: Handshake(5)})
    assert half.ledger.capacity == 5
    assert half._server is not None


def test_a_worker_introduces_itself_once() -> None:
    made = connector(None)  # type: ignore[arg-type]
    made._worker = SimpleNamespace(slots=4, objects=None, take_report=lambda: None)
    first = made.build_connector_worker_meta()
    assert [rank.slots for rank in first.ranks] == [4]
    assert made.build_connector_worker_meta() is None
