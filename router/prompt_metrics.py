"""What tokenizing costs and saves, for Prometheus, as of the scrape."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.pool_prompts import PoolPrompts

_COUNTERS = {
    "tokens_remembered": "Prompt tokens known from earlier prompts",
    "tokens_encoded": "Prompt tokens that had to be encoded",
    "encode_seconds": "Time spent encoding",
    "prompt_memory_evictions": "Beginnings of prompts forgotten",
    "renders_by_heart": "Chats rendered without running their template",
}


class PromptState(Collector):
    """Figures of every base model whose prompts are tokenized here."""

    def __init__(self, prompts: Mapping[str, PoolPrompts]) -> None:
        self._prompts = prompts

    def collect(self) -> Iterator[Metric]:
        figures = {model: each.builder.figures() for model, each in list(self._prompts.items()) if each.builder}
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"warmroute_router_{name}", text, labels=("model",))
            for model, values in figures.items():
                family.add_metric((model,), values[name])
            yield family
        kept = GaugeMetricFamily(
            "warmroute_router_prompt_memory_bytes", "Memory taken by beginnings of prompts", labels=("model",)
        )
        for model, values in figures.items():
            kept.add_metric((model,), values["prompt_memory_bytes"])
        yield kept
