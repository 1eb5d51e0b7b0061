"""Keys, queue and retries as Prometheus sees them, read when scraped so that keeping them costs a request nothing."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.access import Access
from router.admission import Admission
from router.retries import RetryBudget


class AccessState(Collector):
    """One series per key; keys are few, and named by the operator."""

    def __init__(self, access: Access | None, admission: Admission, retries: RetryBudget) -> None:
        self._access = access
        self._admission = admission
        self._retries = retries

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield _count("retries", "Retries that the budget was charged for", self._retries.taken)
        yield _count("retries_refused", "Retries that were not made for want of budget", self._retries.exhausted)
        yield _count(
            "displaced_requests", "Requests that left a full queue to a better claim", self._admission.displaced
        )
        if self._access is not None:
            yield _count("refused_keys", "Requests without a key that is in force", self._access.refused)
            error = "Whether the file of keys could not be used when it last changed"
            yield GaugeMetricFamily("warmroute_router_keys_stale", error, value=bool(self._access.error))
            yield from self._of_keys(self._access)

    def _of_keys(self, access: Access) -> Iterator[Metric]:
        requests = CounterMetricFamily("warmroute_router_key_requests", "Requests let in", labels=("key",))
        tokens = CounterMetricFamily("warmroute_router_key_tokens", "Tokens counted", labels=("key", "kind"))
        limited = CounterMetricFamily("warmroute_router_key_limited", "Requests over a limit", labels=("key", "limit"))
        in_flight = GaugeMetricFamily("warmroute_router_key_in_flight", "Requests being served", labels=("key",))
        queued = GaugeMetricFamily("warmroute_router_key_queued", "Requests waiting", labels=("key",))
        waiting = self._admission.queued_by_tenant
        for name, tenant in access.tenants.items():
            usage = tenant.usage
            requests.add_metric((name,), usage.requests)
            in_flight.add_metric((name,), usage.in_flight)
            queued.add_metric((name,), waiting.get(name, 0))
            for kind, count in usage.tokens.items():
                tokens.add_metric((name, kind), count)
            for limit, count in usage.limited.items():
                limited.add_metric((name, limit), count)
        yield from (requests, tokens, limited, in_flight, queued)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"warmroute_router_{name}", text, value=value)
