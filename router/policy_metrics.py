"""What policies know, as metrics: the shadow policy's comparison, and the pace learned of each worker."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.policies import Comparison, Policy, comparison_of
from router.workers import Worker


class PolicyState(Collector):
    """Read when scraped. Shows nothing while no shadow policy is on and no pace was learned."""

    def __init__(self, policy: Callable[[], Policy], workers: Callable[[], Iterable[Worker]]) -> None:
        self._policy = policy
        self._workers = workers

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        comparison = comparison_of(self._policy())
        if comparison is not None:
            yield from _shadow(comparison)
        learned = [worker for worker in self._workers() if worker.pace.learned_speed]
        if learned:
            yield from _paces(learned)


def _shadow(comparison: Comparison) -> Iterator[Metric]:
    results = {"same": comparison.same, "other": comparison.other, "failed": comparison.failed}
    seconds = {"saved": comparison.saved_seconds, "lost": comparison.lost_seconds}
    tokens = {"saved": comparison.saved_tokens, "lost": comparison.lost_tokens}
    yield _counted("shadow_decisions", "What the shadow policy would have chosen", comparison, "result", results)
    yield _counted("shadow_ttft_seconds", "Predicted time to first token it would save", comparison, "effect", seconds)
    yield _counted("shadow_hit_tokens", "Reused prompt tokens it would add", comparison, "effect", tokens)


def _counted(name: str, text: str, comparison: Comparison, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"warmroute_router_{name}", text, labels=("policy", label))
    for value, count in values.items():
        family.add_metric((comparison.policy, value), count)
    return family


def _paces(workers: Iterable[Worker]) -> Iterator[Metric]:
    speed = _gauge("worker_learned_tokens_per_second", "Prefill speed as first tokens came")
    fixed = _gauge("worker_learned_fixed_seconds", "Time to a first token beside the prompt's computing")
    for worker in workers:
        speed.add_metric((worker.name,), worker.pace.learned_speed)
        fixed.add_metric((worker.name,), worker.pace.fixed)
    yield speed
    yield fixed


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"warmroute_router_{name}", text, labels=("worker",))
