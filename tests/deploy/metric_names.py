"""Which series the router and the engines expose, and which ones an expression of Prometheus asks for."""

import asyncio
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.app import Gateway
from router.config import Settings
from router.discovery.kubernetes import PodWatch
from router.discovery.names import PodSpec
from router.discovery_metrics import DiscoveryState
from worker_connector.stats import FIGURES

TARGET = frozenset({"namespace", "job", "instance", "pod", "service"})
"""Labels that Prometheus adds to whatever it scrapes in a cluster."""
ENGINE = frozenset({"model_name", "engine"})
"""vLLM's own."""
_SELECTED = re.compile(r"\b((?:warmroute|process)[_:][a-zA-Z0-9_:]*)(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)")
_MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*"')


@functools.cache
def exposed() -> Mapping[str, frozenset[str]]:
    """Every series by its name in an expression, with its labels, from the registries themselves."""
    return asyncio.run(_router()) | _connector()


async def _router() -> dict[str, frozenset[str]]:
    """Of a gateway in which everything that has metrics is switched on."""
    gateway = Gateway(Settings(api_keys=f"team:{'k' * 40}", shadow_policy="least-ttft"))  # type: ignore[arg-type]
    found: dict[str, frozenset[str]] = {}
    watch = PodWatch(PodSpec(selector="app=vllm"), lambda _: None, watch_seconds=60, timeout=5)
    watch.answered_at = 0.0
    for collector in (*gateway.metrics._registry._collector_to_names, DiscoveryState(lambda: [watch])):
        own: Any = collector
        for family in collector.collect():
            names = set(getattr(own, "_names", ())) | set(getattr(family, "_labelnames", ()))
            for sample in family.samples:
                names |= sample.labels.keys() - {"le"}
            found |= _series(family.name, family.type, frozenset(names))
    return found


def _series(name: str, kind: str, labels: frozenset[str]) -> dict[str, frozenset[str]]:
    if kind == "counter":
        return {f"{name}_total": labels}
    if kind == "histogram":
        return {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
    return {name: labels}


def _connector() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for figure in FIGURES:
        labels = ENGINE | ({"tier"} if figure.by_tier else frozenset())
        found |= _series(f"warmroute_{figure.name}", "gauge" if figure.is_gauge else "counter", labels)
    return found


@dataclass(frozen=True)
class Asked:
    """A series in an expression, with the labels it is selected by."""

    name: str
    labels: frozenset[str]


def asked(expression: str) -> list[Asked]:
    return [Asked(name, frozenset(_MATCHER.findall(inside or ""))) for name, inside in _SELECTED.findall(expression)]


def grouped(expression: str) -> frozenset[str]:
    """Labels that an expression groups or matches by."""
    names = (name.strip() for inside in _GROUPED.findall(expression) for name in inside.split(","))
    return frozenset(filter(None, names))


def wrong(expression: str, recorded: Mapping[str, frozenset[str]] | None = None) -> list[str]:
    """What an expression asks for that nobody exposes; ``recorded`` are series made by rules, with their labels."""
    known = {**exposed(), **(recorded or {})}
    faults = []
    available: set[str] = set()
    for series in asked(expression):
        if series.name not in known:
            faults.append(f"nobody exposes {series.name}")
            continue
        labels = known[series.name] | TARGET
        available |= labels
        faults += [f"{series.name} has no label {label}" for label in sorted(series.labels - labels)]
    faults += [f"nothing here has a label {label}" for label in sorted(grouped(expression) - available)]
    return faults
