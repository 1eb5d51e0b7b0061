"""OpenTelemetry traces: one span per request, continuing the caller's trace, continued by vLLM.

Off, nothing of this is imported and nothing is done. On, the request's ``traceparent`` is read before the request path
begins and replaced by the span's own, which then travels to the worker with the other headers.
"""

import asyncio
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from router.client import Client
from router.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

    from router.accounting import Decision

SHUTDOWN_S = 5.0
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_ATTRIBUTES: Mapping[str, Callable[["Decision"], Any]] = {
    "gen_ai.request.model": lambda d: d.model,
    "warmroute.worker": lambda d: d.worker,
    "warmroute.reason": lambda d: d.reason,
    "warmroute.outcome": lambda d: d.outcome,
    "warmroute.attempts": lambda d: d.attempts,
    "warmroute.tokenized_by": lambda d: d.tokenized_by,
    "warmroute.prompt_tokens": lambda d: d.prompt_tokens,
    "warmroute.predicted_hit_tokens": lambda d: d.predicted_hit_tokens,
    "warmroute.cached_tokens": lambda d: d.cached_tokens,
    "warmroute.ttft_seconds": lambda d: d.ttft_s,
}


def check_installed(endpoint: str) -> None:
    """Raises:
    ConfigError: traces are asked for, and what sends them is not installed.
    """
    wanted = "opentelemetry.exporter.otlp.proto.http"
    try:
        missing = bool(endpoint) and importlib.util.find_spec(wanted) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise ConfigError("otlp_traces_endpoint: traces need OpenTelemetry: pip install 'warmroute[otel]'")
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"otlp_traces_endpoint is an http(s) URL such as http://collector:4318, got {endpoint!r}")


class Tracer:
    """Makes spans and sends them in the background; ``processor`` replaces the OTLP exporter in tests."""

    def __init__(self, endpoint: str, ratio: float = 1.0, processor: "SpanProcessor | None" = None) -> None:
        check_installed(endpoint)
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "warmroute"}
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)), resource=Resource.create(named), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor or _exporting(endpoint))
        self._tracer = self._provider.get_tracer("warmroute")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, client: Client, request_id: str) -> "Span":
        """A span for the request; the request's headers now name it as the parent."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415 - an extra

        scope = client.scope
        given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT_HEADERS}
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            context=self._propagator.extract(given),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "warmroute.request_id": request_id,
            },
        )
        carried: dict[str, str] = {}
        self._propagator.inject(carried, context=set_span_in_context(span))
        kept = [header for header in scope["headers"] if header[0] not in _CONTEXT_HEADERS]
        scope["headers"] = kept + [(name.encode(), value.encode("latin-1")) for name, value in carried.items()]
        return span

    def end(self, client: Client, span: "Span") -> None:
        """End a request's span with what is known of it by now."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415 - an extra

        if span.is_recording():
            span.set_attribute("http.response.status_code", client.status)
            if client.decision is not None:
                _describe(span, client.decision)
            if client.status >= 500 or (client.decision is not None and client.decision.outcome == "broken"):
                span.set_status(StatusCode.ERROR)
        span.end()

    async def close(self) -> None:
        """Send what is left, within ``SHUTDOWN_S``."""
        work = threading.Thread(target=self._provider.shutdown, daemon=True)
        work.start()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SHUTDOWN_S
        while work.is_alive() and loop.time() < deadline:  # noqa: ASYNC110 - a thread's end
            await asyncio.sleep(0.01)


def _describe(span: "Span", decision: "Decision") -> None:
    for name, value in _ATTRIBUTES.items():
        if (found := value(decision)) is not None:
            span.set_attribute(name, found)
    for tier, tokens in (decision.actual_hit_tokens or {}).items():
        span.set_attribute(f"warmroute.hit_tokens.{tier}", tokens)


def _exporting(endpoint: str) -> "SpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    whole = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=whole, timeout=SHUTDOWN_S))
