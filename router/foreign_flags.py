"""Flags of other routers, as ``warmroute serve`` reads them: production-stack, vllm-router, sglang-router and Dynamo.

What means the same is read as ours, with a note that names it. What needs nothing here is left out, with a note that
says why. What asks for something else is an error that names the way to have it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from router.errors import ConfigError

POLICIES = {
    "roundrobin": "round-robin",
    "round_robin": "round-robin",
    "kvaware": "longest-hit",
    "kv_aware": "longest-hit",
    "kv": "longest-hit",
    "prefixaware": "longest-hit",
    "prefix_hash": "longest-hit",
    "cache_aware": "longest-hit",
    "loadaware": "least-ttft",
    "least_loaded": "least-loaded",
    "power_of_two": "power-of-two",
    "consistent_hash": "session",
    "consistent_hashing": "session",
    "sticky_least_loaded": "session",
}
"""What policies are called elsewhere -> here."""

RENAMED = {
    "--static-backends": "--worker",
    "--worker-urls": "--worker",
    "--k8s-namespace": "--kubernetes-namespace",
    "--k8s-port": "--kubernetes-port",
    "--k8s-label-selector": "--kubernetes-selector",
    "--selector": "--kubernetes-selector",
    "--service-discovery-namespace": "--kubernetes-namespace",
    "--service-discovery-port": "--kubernetes-port",
    "--k8s-watcher-timeout-seconds": "--kubernetes-watch-seconds",
    "--routing-logic": "--policy",
    "--router-mode": "--policy",
    "--session-key": "--session-header",
    "--backend-health-check-timeout-seconds": "--health-timeout",
    "--health-check-timeout-secs": "--health-timeout",
    "--health-check-interval-secs": "--health-interval",
    "--max-instance-failover-reroute-attempts": "--retries",
    "--retry-max-retries": "--retries",
    "--max-concurrent-requests": "--max-in-flight",
    "--queue-size": "--max-queue",
    "--queue-timeout-secs": "--queue-timeout",
    "--max-payload-size": "--max-body-bytes",
    "--cb-failure-threshold": "--breaker-failures",
    "--cb-timeout-duration-secs": "--breaker-seconds",
    "--tokenizer-path": "--tokenizer",
    "--tls-cert-path": "--tls-cert",
    "--tls-key-path": "--tls-key",
    "--http-host": "--host",
    "--http-port": "--port",
}
"""Flag of another router -> ours that means the same."""

_MODELS = "what a worker serves is asked of itself, at /v1/models"
_HEALTH = "every worker's /health is asked, every --health-interval seconds"
_FIGURES = "figures are always at /metrics"
_REPORTS = "workers are asked at their report ports"
_BLOCKS = "workers tell their chunk size themselves"

UNNEEDED = {
    "--static-models": _MODELS,
    "--static-model-types": _MODELS,
    "--static-model-labels": _MODELS,
    "--static-backend-health-checks": _HEALTH,
    "--static-backend-health-check-interval": _HEALTH,
    "--static-backend-health-check-timeout-seconds": _HEALTH,
    "--k8s-service-discovery-type": "pods are found by their addresses",
    "--engine-stats-interval": "workers report what they hold and do, as it happens",
    "--request-stats-window": _FIGURES,
    "--log-stats": _FIGURES,
    "--log-stats-interval": _FIGURES,
    "--lmcache-controller-port": _REPORTS,
    "--lmcache-controller-reply-port": _REPORTS,
    "--lmcache-controller-heartbeat-port": _REPORTS,
    "--lmcache-health-check-interval": _REPORTS,
    "--lmcache-worker-timeout": _REPORTS,
    "--prefix-min-match-length": "every whole chunk counts",
    "--router-kv-events": _REPORTS,
    "--no-router-kv-events": _REPORTS,
    "--router-replica-sync": "every router reads every worker's reports",
    "--kv-cache-block-size": _BLOCKS,
    "--kv-event-block-size": _BLOCKS,
    "--kv-event-model": _MODELS,
}
"""Flag of what is so anyway -> how it is."""

_APART = (
    "prefill and decode apart are made by the overlay deploy/kubernetes/overlays/disaggregated: see docs/kubernetes.md"
)
_BATCHES = "files and batches are not served here: vllm run-batch computes a file of requests"
_EVENTS = "engines say themselves where their KV events are; otherwise say it with the worker: --worker URL,events=HOST:PORT,replay=HOST:PORT"

REFUSED = {
    "--static-aliases": "give the served names to vLLM: --served-model-name NAME ALIAS",
    "--prefill-model-labels": _APART,
    "--decode-model-labels": _APART,
    "--prefill": _APART,
    "--decode": _APART,
    "--pd-disaggregation": _APART,
    "--vllm-pd-disaggregation": _APART,
    "--prefill-selector": _APART,
    "--decode-selector": _APART,
    "--prefill-policy": _APART,
    "--decode-policy": _APART,
    "--dp-aware": "name the ranks with the worker: --worker URL,dp=N",
    "--intra-node-data-parallel-size": "name the ranks with the worker: --worker URL,dp=N",
    "--kv-event-source": _EVENTS,
    "--kv-event-replay-source": _EVENTS,
    "--dynamic-config-yaml": "name the file with --config: its changes are taken up while running",
    "--dynamic-config-json": "name a YAML file with --config: its changes are taken up while running",
    "--kv-aware-threshold": "how far the warmest worker may be ahead is --saturation-seconds or --saturation-tokens",
    "--balance-abs-threshold": "how far the warmest worker may be ahead is --saturation-seconds or --saturation-tokens",
    "--balance-rel-threshold": "how far the warmest worker may be ahead is --saturation-seconds or --saturation-tokens",
    "--request-timeout-secs": "waits are bounded by --connect-timeout, --first-byte-timeout and --idle-timeout",
    "--api-key": "the clients' keys are --api-keys-file, the workers' key is --worker-api-key",
    "--api-key-validation-urls": "the clients' keys are --api-keys-file, the workers' key is --worker-api-key",
    "--prometheus-port": "metrics are at /metrics, on the port of the gateway",
    "--otel-endpoint": "traces are sent by OTLP over HTTP: --otlp-traces-endpoint http://HOST:4318/v1/traces",
    "--otel-service-name": "set OTEL_SERVICE_NAME in the environment",
    "--enable-batch-api": _BATCHES,
    "--file-storage-class": _BATCHES,
    "--file-storage-path": _BATCHES,
    "--batch-processor": _BATCHES,
    "--callbacks": "requests and answers are passed on as they are",
    "--request-rewriter": "requests and answers are passed on as they are",
    "--feature-gates": "answers are always computed, and nothing is searched for in requests",
    "--router-temperature": "among equals a worker is drawn by lot",
    "--busy-threshold": "how many requests may wait is --max-queue; more are answered 429",
    "--migration-limit": "other workers are tried before a response has begun: --retries",
    "--external-providers-config": "only vLLM engines are routed to",
    "--cors-allowed-origins": 'name them in one text: --cors-origins "https://a https://b"',
}
"""Flag of what is had otherwise, or not at all -> the cure."""

_FLAG = re.compile(r"-\D")
"""How a flag begins; a negative number is a value."""

_DISCOVERY = {
    "static": "workers are named by --worker",
    "k8s": "pods are found where --kubernetes-selector is given",
    "": "pods are found where --kubernetes-selector is given",
}


class Read(NamedTuple):
    """Arguments as ``warmroute serve`` takes them, and what is to be told about how they were read."""

    arguments: list[str]
    notes: list[str]


def translate(arguments: Sequence[str]) -> Read:
    """The command line with other routers' flags replaced by ours.

    Raises:
        ConfigError: a flag asks for what is had otherwise; the text says how.
    """
    read = Read([], [])
    for flag, values, given in _flags(arguments):
        if flag == "--k8s-service-discovery-type" and values == ["service-name"]:
            raise ConfigError(f"{flag} {values[0]}: a Service's addresses are found by --discover dns://NAME:PORT")
        if flag in REFUSED:
            raise ConfigError(f"{flag} is none of our flags: {REFUSED[flag]}")
        if flag in UNNEEDED or flag == "--service-discovery":
            read.notes.append(f"{flag} is not needed: {UNNEEDED.get(flag) or _discovery(values)}")
        elif flag in RENAMED:
            _rename(flag, RENAMED[flag], values, read)
        elif flag == "--policy" and values and values[0] != _policy(values[0]):
            _rename(flag, flag, values, read)
        else:
            read.arguments.extend(given)
    return read


def hint(setting: str) -> str:
    """What a setting that is not ours is called here, or why there is none; empty where that is not known."""
    flag = "--" + setting.replace("_", "-")
    if flag in RENAMED:
        native = RENAMED[flag].removeprefix("--").replace("-", "_").replace("worker", "workers")
        return f"here it is {native!r}"
    if flag == "--service-discovery":
        return "workers are named by 'workers', and pods found where 'kubernetes_selector' is given"
    return UNNEEDED.get(flag) or REFUSED.get(flag) or ""


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each flag, its values and how it was written; the command has no arguments but flags."""
    at = 0
    while at < len(arguments):
        end = at + 1
        while end < len(arguments) and not _FLAG.match(arguments[end]):
            end += 1
        name, equals, value = arguments[at].partition("=")
        flag = name.replace("_", "-")
        yield flag, [*([value] if equals else []), *arguments[at + 1 : end]], list(arguments[at:end])
        at = end


def _rename(flag: str, native: str, values: Sequence[str], read: Read) -> None:
    if not values:
        raise ConfigError(f"{flag} needs a value; here it is {native}")
    parsed = _READERS.get(native, list)(values)
    if native == "--policy":
        read.notes.append(f"{flag} {values[0]} is read as {native} {parsed[0]}")
    else:
        read.notes.append(f"{flag} is read as {native}")
    for value in parsed:
        read.arguments.extend((native, value))


def _urls(values: Sequence[str]) -> list[str]:
    return [url for value in values for url in re.split(r"[\s,]+", value) if url]


def _policies(values: Sequence[str]) -> list[str]:
    if values[0].startswith("disaggregated"):
        raise ConfigError(f"{values[0]} is no policy here: {_APART}")
    return [_policy(values[0])]


def _policy(name: str) -> str:
    return POLICIES.get(name, name)


def _discovery(values: Sequence[str]) -> str:
    kind = values[0] if values else ""
    if kind not in _DISCOVERY:
        raise ConfigError(f"--service-discovery is {kind}, but only vLLM engines are routed to: name them by --worker")
    return _DISCOVERY[kind]


_READERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "--worker": _urls,
    "--policy": _policies,
    "--kubernetes-selector": lambda values: [",".join(values)],
}
