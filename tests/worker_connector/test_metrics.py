import importlib
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import prometheus_client
import pytest

from worker_connector.stats import FIGURES, Stats


@pytest.fixture(scope="module")
def metrics() -> ModuleType:
    """``worker_connector.metrics``, imported late: it imports vLLM."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("worker_connector.metrics")


@pytest.fixture
def exposed(metrics: ModuleType) -> Any:
    """Prometheus metrics of two engines in a registry of their own."""
    registry = prometheus_client.CollectorRegistry()

    def kind(cls: type) -> Any:
        return lambda **options: cls(registry=registry, **options)

    types = {each: kind(each) for each in (prometheus_client.Counter, prometheus_client.Gauge)}
    types[prometheus_client.Histogram] = kind(prometheus_client.Histogram)
    prom = metrics.WarmroutePromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        types,
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    return SimpleNamespace(prom=prom, value=registry.get_sample_value, registry=registry)


def _stats(prompt_tokens: int, cpu_hits: int) -> dict[str, Any]:
    stats = Stats()
    stats.request(prompt_tokens, {"cpu": cpu_hits}, prefill_speed=100.0)
    stats.set("held_chunks", cpu_hits, "cpu")
    return stats.take()


def test_every_figure_is_exposed_with_the_engines_labels(exposed: Any) -> None:
    text = prometheus_client.generate_latest(exposed.registry).decode()
    for figure in FIGURES:
        name = f"warmroute_{figure.name}" + ("" if figure.is_gauge else "_total")
        assert f"# HELP {name} {figure.help}" in text
        if not figure.by_tier:
            assert f'{name}{{engine="1",model_name="m"}} 0.0' in text


def test_counters_add_up_and_gauges_follow_per_engine(exposed: Any) -> None:
    exposed.prom.observe(_stats(1000, 300), 0)
    exposed.prom.observe(_stats(500, 200), 0)
    exposed.prom.observe(_stats(10, 7), 1)
    for engine, prompt, hits, held in (("0", 1500, 500, 200), ("1", 10, 7, 7)):
        labels = {"model_name": "m", "engine": engine}
        tier = {**labels, "tier": "cpu"}
        assert exposed.value("warmroute_prompt_tokens_total", labels) == prompt
        assert exposed.value("warmroute_hit_tokens_total", tier) == hits
        assert exposed.value("warmroute_held_chunks", tier) == held


def test_a_figure_of_another_version_is_passed_over(exposed: Any) -> None:
    exposed.prom.observe({"promotions": {"": 3}, "requests": {"": 2}}, 0)
    assert exposed.value("warmroute_requests_total", {"model_name": "m", "engine": "0"}) == 2


def test_processes_are_summed_without_touching_what_they_sent(metrics: ModuleType) -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(_stats(1000, 300)))
    copy = {name: dict(tiers) for name, tiers in sent.items()}
    line = metrics.WarmrouteStats(sent).aggregate(metrics.WarmrouteStats(_stats(500, 200))).reduce()
    assert sent == copy
    assert line["prompt_tokens"] == 1500
    assert line["hit_tokens[cpu]"] == 500
    assert line["avoided_seconds"] == 5.0
    assert not any(name.startswith("held_chunks") for name in line)


def test_what_vllm_asks_of_stats(metrics: ModuleType) -> None:
    stats = metrics.WarmrouteStats()
    assert stats.is_empty()
    stats.aggregate(metrics.WarmrouteStats(_stats(1, 1)))
    assert not stats.is_empty()
    assert metrics.WarmrouteStats(stats.to_dict()).reduce() == stats.reduce()
    stats.reset()
    assert stats.is_empty()
    assert stats.reduce() == {}


def test_vllms_own_log_line(metrics: ModuleType) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    class Connector:
        build_kv_connector_stats = staticmethod(metrics.WarmrouteStats)

    logging, lines = KVConnectorLogging(None), []
    logging.connector_cls = Connector
    for payload in (_stats(1000, 300), _stats(500, 200)):
        logging.observe(payload)
    logging.log(lambda text, *arguments: lines.append(text % arguments))
    assert len(lines) == 1
    assert "prompt_tokens=1500" in lines[0]
    logging.log(lines.append)
    assert len(lines) == 1
