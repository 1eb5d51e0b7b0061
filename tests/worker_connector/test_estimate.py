import pytest

from worker_connector import estimate
from worker_connector.estimate import PROBE_SECONDS, Estimator, Median


def measured(*, bandwidth: float, speed: float, latency: float = 0.0) -> Estimator:
    estimator = Estimator()
    estimator.observe_load(10**8, 10**8 / bandwidth)
    estimator.observe_round_trip(10**8, 10**8 / bandwidth + latency)
    estimator.observe_prefill(1000, 1000 / speed)
    return estimator


def test_a_median_ignores_one_odd_value() -> None:
    value = Median()
    for sample in (10.0, 11.0, 0.001, 9.0, 10.0):
        value.add(sample)
    assert value.value == 10.0


def test_until_both_sides_are_measured_it_loads() -> None:
    estimator = Estimator()
    assert estimator.worth_loading(10**12, 1)
    estimator.observe_load(10**8, 100.0)
    assert estimator.load_seconds(10**6) == pytest.approx(1.0)
    assert estimator.compute_seconds(1) is None
    assert estimator.worth_loading(10**12, 1)


def test_it_loads_where_loading_is_predicted_to_be_faster() -> None:
    estimator = measured(bandwidth=1e9, speed=1e4)
    # 256 tokens take 25.6 ms to compute.
    assert estimator.worth_loading(25_000_000, 256)
    assert not estimator.worth_loading(26_000_000, 256)


def test_latency_and_bytes_under_way_count() -> None:
    estimator = measured(bandwidth=1e9, speed=1e4, latency=0.02)
    assert estimator.load_latency == pytest.approx(0.02)
    assert estimator.worth_loading(5_000_000, 256)
    assert not estimator.worth_loading(6_000_000, 256)
    assert not estimator.worth_loading(5_000_000, 256, under_way=1_000_000)


def test_it_tries_a_load_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = measured(bandwidth=1e6, speed=1e6)
    assert not estimator.worth_loading(10**9, 256)
    later = estimate.monotonic() + PROBE_SECONDS + 1
    monkeypatch.setattr(estimate, "monotonic", lambda: later)
    assert estimator.worth_loading(10**9, 256)


def test_small_steps_and_transfers_do_not_count() -> None:
    estimator = Estimator()
    estimator.observe_prefill(1, 1.0)
    estimator.observe_load(1, 1.0)
    estimator.observe_save(1, 1.0)
    estimator.observe_round_trip(1, 1.0)
    assert (estimator.prefill_speed, estimator.load_bandwidth, estimator.save_bandwidth) == (0, 0, 0)
