"""The connector's figures as vLLM logs them and as its ``/metrics`` shows them.

vLLM carries what each process counted since its last step to the front end, sums it there over the engine's processes,
and hands it to its log line and to Prometheus with the index of the engine, so several engines stay apart by label.
"""

from typing import Any, ClassVar, Self

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from worker_connector.stats import FIGURES, Counts, Figure, merge

PREFIX = "warmroute_"


class CountsOfInterval:
    """What one process, or one engine, counted in one interval. ``data`` is figure -> tier -> value."""

    figures: ClassVar[tuple[Figure, ...]] = FIGURES
    data: Counts

    def __init__(self, data: Counts | None = None) -> None:
        # A copy: vLLM's log adds up in place what its Prometheus side still has to read.
        super().__init__({name: dict(tiers) for name, tiers in (data or {}).items()})  # type: ignore[call-arg]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: Any) -> Self:
        merge(self.data, other.data)
        return self

    def is_empty(self) -> bool:
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        """One number per counter and tier; gauges belong to one engine and are left to Prometheus."""
        line: dict[str, int | float] = {}
        for figure in self.figures:
            if figure.is_gauge:
                continue
            for tier, value in self.data.get(figure.name, {}).items():
                line[f"{figure.name}[{tier}]" if tier else figure.name] = round(value, 4)
        return line


class FigureMetrics:
    """Every figure as ``warmroute_*`` on the engine's own ``/metrics``, labelled with vLLM's labels and the tier."""

    figures: ClassVar[tuple[Figure, ...]] = FIGURES
    per_engine_labelvalues: dict[int, list[object]]

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)  # type: ignore[call-arg]
        self._figures = {figure.name: figure for figure in self.figures}
        self._metrics = {figure.name: self._metric(figure, metric_types, labelnames) for figure in self.figures}
        for figure in self.figures:
            if not figure.by_tier:
                self._touch(figure)

    def observe(self, transfer_stats_data: Counts, engine_idx: int = 0) -> None:
        """Add one interval's figures of one engine."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, tiers in transfer_stats_data.items():
            figure = self._figures.get(name)
            if figure is None:
                continue
            for tier, value in tiers.items():
                metric = self._metrics[name].labels(*labels, *([tier] if figure.by_tier else []))
                if figure.is_gauge:
                    metric.set(value)
                else:
                    metric.inc(max(value, 0))

    def _metric(self, figure: Figure, metric_types: dict[type, type], labelnames: list[str]) -> Any:
        names = [*labelnames, "tier"] if figure.by_tier else list(labelnames)
        if figure.is_gauge:
            return metric_types[Gauge](
                name=PREFIX + figure.name,
                documentation=figure.help,
                labelnames=names,
                multiprocess_mode="mostrecent",
            )
        return metric_types[Counter](name=PREFIX + figure.name, documentation=figure.help, labelnames=names)

    def _touch(self, figure: Figure) -> None:
        """Show a figure as 0 before its first event."""
        for labels in self.per_engine_labelvalues.values():
            self._metrics[figure.name].labels(*labels)


class WarmrouteStats(CountsOfInterval, KVConnectorStats):  # type: ignore[misc]
    """The connector's figures of one interval."""


class WarmroutePromMetrics(FigureMetrics, KVConnectorPromMetrics):  # type: ignore[misc]
    """The connector's figures on the engine's ``/metrics``."""
