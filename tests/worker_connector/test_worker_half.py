from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the worker half needs torch")

from worker_connector.config import ConnectorConfig
from worker_connector.plan import SaveJob, StepPlan
from worker_connector.worker_half import WorkerHalf


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
