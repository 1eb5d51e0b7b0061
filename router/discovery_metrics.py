"""Where workers come from, as metrics: whether each source answers, how old its word is, and what it names."""

from collections.abc import Callable, Iterable, Iterator
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.discovery.dns import NameWatch
from router.discovery.kubernetes import PodWatch

Watch = NameWatch | PodWatch


class DiscoveryState(Collector):
    """Read when scraped. Shows nothing while workers are neither looked up nor watched. ``clock`` is the loop's."""

    def __init__(self, watches: Callable[[], Iterable[Watch]], clock: Callable[[], float] = monotonic) -> None:
        self._watches = watches
        self._clock = clock

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        watches = list(self._watches())
        if not watches:
            return
        up = GaugeMetricFamily("warmroute_router_discovery_up", "Whether the source answers", labels=("source",))
        age = GaugeMetricFamily(
            "warmroute_router_discovery_age_seconds", "Since the source last answered", labels=("source",)
        )
        workers = GaugeMetricFamily(
            "warmroute_router_discovery_workers", "Workers that the source names", labels=("source", "state")
        )
        for watch in watches:
            title = watch.spec.title
            up.add_metric((title,), float(not watch.error))
            if watch.answered_at is not None:
                age.add_metric((title,), self._clock() - watch.answered_at)
            for state, count in zip(("usable", "held"), watch.counts, strict=True):
                workers.add_metric((title, state), count)
        yield from (up, age, workers)
        pods = [watch for watch in watches if isinstance(watch, PodWatch)]
        if pods:
            yield _relists(pods)


def _relists(watches: Iterable[PodWatch]) -> Metric:
    family = CounterMetricFamily(
        "warmroute_router_discovery_relists", "Times all pods were listed", labels=("source", "cause")
    )
    for watch in watches:
        for cause, count in watch.relists.items():
            family.add_metric((watch.spec.title, cause), count)
    return family
