"""What Prometheus sees: counters kept along the request path, and the state of workers and index as of the scrape."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router import logs, loop_lag
from router.admission import Admission
from router.index import Index
from router.tallies import Spreads, Tallies, Tally
from router.totals import Family, families_of
from router.workers import Registry, Worker

if TYPE_CHECKING:
    from router.accounting import Decision

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROUTING_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1)
_GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REASONS = frozenset(
    {
        "at random",
        "hot prefix",
        "least loaded",
        "less loaded of two",
        "longest hit",
        "no hit; least loaded",
        "no session; least loaded",
        "round robin",
        "saturated",
        "the session's worker",
    }
)


class Metrics:
    """One registry per gateway."""

    def __init__(self, registry: Registry, index: Index, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self._of_worker: dict[str, WorkerSeries] = {}
        self._tokenized_by: dict[tuple[str, str], Tally] = {}
        self._by_reason: dict[str, Tally] = {}
        self._registry.register(_State(registry, index, admission))
        self.requests = self._counter("requests", "Requests answered by a worker", "worker", "model", "status")
        self.rejected = self._counter("rejected_requests", "Requests answered by the router itself", "status", "code")
        self.abandoned = self._counter("abandoned_requests", "Requests whose client went away", "worker")
        self.broken = self._counter("broken_responses", "Responses that ended before they were complete", "worker")
        self.failures = self._counter("worker_failures", "Requests the worker failed", "worker", "kind")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens sent, where tokenized here", "worker")
        self.predicted = self._counter("predicted_hit_tokens", "Prompt tokens expected to be reused", "worker")
        self.actual = self._counter("actual_hit_tokens", "Prompt tokens reused, as reported", "worker", "tier")
        self.predictions = self._counter("predictions", "Predictions compared with the outcome", "worker", "result")
        self.token_counts = self._counter("token_counts", "Prompt lengths compared", "worker", "result")
        self.tokenized = self._counter("tokenized_prompts", "Who tokenized the prompts", "model", "by")
        self.config_changes = self._counter("config_changes", "Changes of settings while running", "result")
        self.handovers = self._counter("handovers", "Leaving workers told to hand chunks over", "result")
        self.warmups = self._counter("warmup_prompts", "Prompts computed by workers that started", "result")
        self.decisions = self._counter("decisions", "Choices by the kind of their reason", "reason")
        for kind in (*_REASONS, "first token", "other"):
            self._by_reason[kind] = self.decisions.labels(kind)
        self.loop_lag = self._histogram("event_loop_lag_seconds", "How late timers are", loop_lag.BUCKETS).labels()
        self.token_gap = self._histogram(
            "inter_token_seconds", "Between the parts of a stream, averaged over it", _GAP_SECONDS, "worker"
        )
        ProcessCollector(registry=self._registry)
        self.ttft = self._histogram("ttft_seconds", "From request to first response byte", _SECONDS, "worker")
        self.duration = self._histogram("request_seconds", "From request to last byte", _SECONDS, "worker")
        routing = self._histogram("routing_seconds", "From parsed request to chosen worker", _ROUTING_SECONDS)
        self.routing = routing.labels()

    def add(self, collector: Collector) -> None:
        """Show what another part keeps itself."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The text exposition format. O(series)."""
        return generate_latest(self._registry)

    def families(self) -> list[Family]:
        """The same as data, to be merged with other processes'. O(series)."""
        return families_of(self._registry)

    def decided(self, reason: str) -> None:
        """Count a choice under the kind of its reason: the words before its figures."""
        kind = reason.partition(":")[0]
        if kind not in _REASONS:
            kind = "first token" if kind.startswith("first token") else "other"
        self._by_reason[kind].inc()

    def tokenized_by(self, model: str, by: str) -> Tally:
        """The series of one tokenizing side of a model, looked up once."""
        key = (model, by)
        if key not in self._tokenized_by:
            self._tokenized_by[key] = self.tokenized.labels(model, by)
        return self._tokenized_by[key]

    def of_worker(self, worker: str) -> "WorkerSeries":
        """The series of one worker that every request touches, looked up once."""
        if worker not in self._of_worker:
            self._of_worker[worker] = WorkerSeries(self, worker)
        return self._of_worker[worker]

    def forget(self, worker: str) -> None:
        """Drop the series of a removed worker, so that they do not pile up."""
        self._of_worker.pop(worker, None)
        by_worker = (self.prompt_tokens, self.predicted, self.requests, self.actual, self.predictions, self.failures)
        for family in (
            *by_worker,
            self.token_counts,
            self.abandoned,
            self.broken,
            self.ttft,
            self.duration,
            self.token_gap,
        ):
            family.forget("worker", worker)

    def _counter(self, name: str, text: str, *labels: str) -> Tallies:
        family = Tallies(name, text, *labels)
        self._registry.register(family)
        return family

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Spreads:
        family = Spreads(name, text, bounds, *labels)
        self._registry.register(family)
        return family


class WorkerSeries:
    """Children of the labelled families for one worker."""

    def __init__(self, metrics: Metrics, worker: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(worker)
        self.predicted = metrics.predicted.labels(worker)
        self.ttft = metrics.ttft.labels(worker)
        self.duration = metrics.duration.labels(worker)
        self.token_gap = metrics.token_gap.labels(worker)
        self._counts = {
            equal: metrics.token_counts.labels(worker, result)
            for equal, result in ((True, "equal"), (False, "different"))
        }
        self._requests = metrics.requests
        self._worker = worker
        self._by_status: dict[tuple[str, int], Tally] = {}

    def ended(self, decision: "Decision") -> None:
        """Observe how long a request took, and what lay between the parts of its stream."""
        if (seconds := decision.duration_s) is None:
            return
        self.duration.observe(seconds)
        if decision.parts > 1 and decision.ttft_s is not None:
            self.token_gap.observe((seconds - decision.ttft_s) / (decision.parts - 1))

    def counted(self, *, equal: bool) -> None:
        """Count a comparison of a prompt's length here and at the worker."""
        self._counts[equal].inc()

    def answered(self, model: str, status: int) -> None:
        """Count a response."""
        key = (model, status)
        if key not in self._by_status:
            self._by_status[key] = self._requests.labels(self._worker, model, status)
        self._by_status[key].inc()


class _State(Collector):
    """Read when scraped, so that keeping it costs nothing."""

    def __init__(self, registry: Registry, index: Index, admission: Admission) -> None:
        self._workers = registry
        self._index = index
        self._admission = admission

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield _gauge("in_flight_requests", "Requests being served", self._admission.in_flight)
        yield _gauge("queued_requests", "Requests waiting to be served", self._admission.queued)
        yield _gauge("held_body_bytes", "Request bodies held", self._admission.bytes)
        yield _gauge("index_entries", "Chunks that some worker holds", len(self._index))
        yield CounterMetricFamily("warmroute_router_log_lines_dropped", "Log lines not written", value=logs.dropped)
        yield from self._of_workers()
        yield self._breakers()
        yield self._ages()
        yield self._sources()
        yield self._synced()
        yield self._chunks()
        yield self._relists()

    def _of_workers(self) -> Iterator[Metric]:
        gauges: dict[str, tuple[str, Callable[[Worker], float]]] = {
            "worker_up": ("Whether the worker answers", lambda w: w.up),
            "worker_draining": ("Whether the worker is being drained", lambda w: w.draining),
            "worker_breaker_open": ("Whether the worker's breaker keeps it out", lambda w: w.breaker.state != "closed"),
            "worker_in_flight_requests": ("Requests sent and not finished", lambda w: w.load.in_flight),
            "worker_uncached_tokens": ("Prompt tokens to compute", lambda w: w.load.uncached_tokens),
            "worker_prefill_tokens_per_second": ("Prefill speed the worker measured", lambda w: w.prefill_speed),
            "worker_trust": ("How right predictions have been, 0 to 1", lambda w: w.trust),
            "worker_exact_tokenization": ("Whether tokens equal the worker's own", lambda w: w.parity == "exact"),
            "worker_takes_token_ids": ("Whether token ids are sent along", lambda w: w.takes_token_ids),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"warmroute_router_{name}", text, labels=("worker",))
            for worker in self._workers.workers:
                family.add_metric((worker.name,), value(worker))
            yield family
        yield self._counted("worker_digest_mismatches", "Index found different", lambda w: w.digest_mismatches)
        yield self._counted("worker_digests_checked", "Digests compared", lambda w: w.digests_checked)
        yield self._counted("worker_epochs", "Worker processes seen", lambda w: w.epochs)

    def _counted(self, name: str, text: str, value: Callable[[Worker], float]) -> Metric:
        family = CounterMetricFamily(f"warmroute_router_{name}", text, labels=("worker",))
        for worker in self._workers.workers:
            family.add_metric((worker.name,), value(worker))
        return family

    def _breakers(self) -> Metric:
        text = "The state the worker's breaker is in: 1 for that, 0 for the others"
        family = GaugeMetricFamily("warmroute_router_worker_breaker_state", text, labels=("worker", "state"))
        for worker in self._workers.workers:
            for state in ("closed", "open", "half-open"):
                family.add_metric((worker.name, state), worker.breaker.state == state)
        return family

    def _ages(self) -> Metric:
        text = "Since the worker's last heartbeat: the age of what is known of its cache"
        family = GaugeMetricFamily("warmroute_router_worker_index_age_seconds", text, labels=("worker",))
        for worker in self._workers.workers:
            if worker.heartbeat is not None:
                family.add_metric((worker.name,), max(0.0, time.monotonic() - worker.heartbeat_at))
        return family

    def _sources(self) -> Metric:
        text = "Where knowledge of the worker's cache comes from"
        family = GaugeMetricFamily("warmroute_router_worker_cache_source", text, labels=("worker", "source"))
        for worker in self._workers.workers:
            family.add_metric((worker.name, worker.source), 1)
        return family

    def _synced(self) -> Metric:
        text = "Whether the worker's cache is fully known"
        family = GaugeMetricFamily("warmroute_router_worker_index_synced", text, labels=("worker",))
        for worker in self._workers.workers:
            if worker.knows_all or worker.spec.report_address is not None:
                family.add_metric((worker.name,), worker.knows_all)
        return family

    def _chunks(self) -> Metric:
        text = "Chunks the worker holds by tier"
        family = GaugeMetricFamily("warmroute_router_worker_chunks", text, labels=("worker", "tier"))
        for worker in self._workers.workers:
            for tier, count in self._index.sizes(worker.name).items():
                family.add_metric((worker.name, tier), count)
        return family

    def _relists(self) -> Metric:
        text = "Times the worker's cache was listed again"
        family = CounterMetricFamily("warmroute_router_worker_relists", text, labels=("worker", "cause"))
        for worker in self._workers.workers:
            for cause, count in worker.relists.items():
                family.add_metric((worker.name, cause), count)
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"warmroute_router_{name}", text, value=value)
