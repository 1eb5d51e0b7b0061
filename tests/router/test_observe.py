"""Logs and traces of requests, and the figures kept beside them."""

import asyncio
import gzip
import json
import logging
import os
import time
from typing import Any

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router import logs, tracing
from router.errors import ConfigError
from router.logs import JsonFormatter, QueuedHandler, TextFormatter
from router.metrics import Metrics
from router.tracing import Tracer
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"


def traced(gateway: RunningGateway, ratio: float = 1.0) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    gateway.gateway._tracer = Tracer("http://collector", ratio, SimpleSpanProcessor(exporter))
    gateway.gateway.observe()
    return exporter


def received(worker: SimulatedWorker) -> dict[str, str]:
    return worker.served("/v1/chat/completions")[-1][1]


def hexed(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def test_simulated_a_trace_is_continued_through_to_the_worker() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            exporter = traced(gateway)
            headers = {"traceparent": PARENT, "tracestate": "x=1", "x-request-id": "r-1"}
            body = {"model": "simulated", "messages": [{"role": "user", "content": "secret words"}]}
            await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
            (span,) = exporter.get_finished_spans()
            trace, own = hexed(span)
            assert trace == PARENT.split("-")[1]
            assert span.parent is not None
            assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
            assert received(worker)["traceparent"] == f"00-{trace}-{own}-01"
            assert received(worker)["tracestate"] == "x=1"
            assert span.name == "POST /v1/chat/completions"
            told = dict(span.attributes or {})
            assert told["warmroute.request_id"] == "r-1"
            assert (told["warmroute.worker"], told["http.response.status_code"]) == ("a", 200)
            assert told["warmroute.outcome"] == "served"
            assert "secret" not in span.to_json()

    run(scenario())


def test_simulated_a_trace_begins_here_and_failures_are_marked() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            exporter = traced(gateway)
            await gateway.chat("x", model="nobody")
            await gateway.chat("x")
            worker.status = 500
            await gateway.chat("x")
            unknown, served, failed = exporter.get_finished_spans()
            assert dict(unknown.attributes or {})["http.response.status_code"] == 404
            assert "warmroute.worker" not in dict(unknown.attributes or {})
            assert served.parent is None
            assert received(worker)["traceparent"].split("-")[1] == hexed(failed)[0]
            assert [span.status.is_ok for span in (served, failed)] == [True, False]

    run(scenario())


def test_simulated_what_the_caller_does_not_sample_is_passed_on_and_not_kept() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            exporter = traced(gateway)
            await gateway.client.post(
                "/v1/chat/completions",
                json={"model": "simulated", "messages": [{"role": "user", "content": "x"}]},
                headers={"traceparent": UNSAMPLED},
            )
            assert exporter.get_finished_spans() == ()
            assert received(worker)["traceparent"].startswith(UNSAMPLED[:36])
            assert received(worker)["traceparent"].endswith("-00")

    run(scenario())


def test_simulated_without_tracing_headers_pass_untouched() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            assert gateway.gateway.handle == gateway.gateway.pipeline.handle
            await gateway.client.post(
                "/v1/chat/completions",
                json={"model": "simulated", "messages": [{"role": "user", "content": "x"}]},
                headers={"traceparent": PARENT},
            )
            assert received(worker)["traceparent"] == PARENT

    run(scenario())


def test_a_collector_that_is_not_there_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SHUTDOWN_S", 0.3)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        began = time.monotonic()
        async with running_gateway(worker, otlp_traces_endpoint="http://127.0.0.1:9") as gateway:
            assert (await gateway.chat("x")).status_code == 200
        assert time.monotonic() - began < 8

    run(scenario())


def test_simulated_spans_reach_a_collector() -> None:
    async def scenario() -> None:
        posted: list[tuple[bytes, bytes]] = []

        async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            posted.append((head.split(b" ")[1], await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            writer.close()

        collector = await asyncio.start_server(collect, "127.0.0.1", 0)
        endpoint = f"http://127.0.0.1:{collector.sockets[0].getsockname()[1]}"
        async with running_gateway(await SimulatedWorker().start(), otlp_traces_endpoint=endpoint) as gateway:
            request_id = (await gateway.chat("x")).headers["x-request-id"]
        assert [path for path, _ in posted] == [b"/v1/traces"]
        body = posted[0][1]
        assert request_id.encode() in (gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        collector.close()

    run(scenario())


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="http"):
        tracing.check_installed("collector:4317")


def test_simulated_the_access_log_says_what_became_of_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "warmroute.access")

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.admit = {"gpu": 16}
        async with running_gateway(worker) as gateway:
            await gateway.chat("hidden words")
            assert not caplog.records or all(record.name != "warmroute.access" for record in caplog.records)
            await gateway.client.patch("/admin/config", json={"access_log": True})
            answer = await gateway.chat("hidden words", stream=True)
            await gateway.chat("x", model="nobody")

        lines = [record.fields for record in caplog.records if record.name == "warmroute.access"]  # type: ignore[attr-defined]
        assert [line["status"] for line in lines] == [200, 404]
        assert lines[0]["request_id"] == answer.headers["x-request-id"]
        assert (lines[0]["worker"], lines[0]["outcome"], lines[0]["hit_tokens"]) == ("a", "served", {"gpu": 16})
        assert 0 < lines[0]["ttft_ms"] <= lines[0]["duration_ms"]
        assert "worker" not in lines[1]
        assert "hidden" not in msgspec.json.encode(lines).decode()

    run(scenario())


def record(**fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("x.y", logging.INFO, "file", 1, "said %d", (3,), None)
    made.fields = fields
    return made


def test_lines_as_json_and_as_text() -> None:
    line = json.loads(JsonFormatter(2).format(record(a=1, b="two words")))
    assert line["time"].endswith("+00:00")
    del line["time"]
    assert line == {"level": "info", "logger": "x.y", "message": "said 3", "process": 2, "a": 1, "b": "two words"}
    text = TextFormatter(2).format(record(a=1, b="two words", c=None))
    assert text.startswith("[2] ")
    assert text.endswith('INFO x.y: said 3 a=1 b="two words"')


def test_a_log_reader_that_stalls_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LONGEST_QUEUE", 100)
    monkeypatch.setattr(logs, "_FLUSH_S", 0.2)
    monkeypatch.setattr(logs, "dropped", 0)
    reading, writing = os.pipe()
    handler = QueuedHandler(writing)
    handler.setFormatter(logging.Formatter("%(message)s"))
    line = logging.LogRecord("x", logging.INFO, "f", 1, "y" * 2000, (), None)
    began = time.monotonic()
    for _ in range(1000):
        handler.emit(line)
    assert time.monotonic() - began < 15
    assert logs.dropped > 0
    os.set_blocking(reading, False)
    deadline = time.monotonic() + 5
    while (handler._lines or handler._thread.is_alive()) and time.monotonic() < deadline:
        try:
            os.read(reading, 1 << 20)
        except BlockingIOError:
            handler._ended = True
            handler._more.set()
            time.sleep(0.01)
    handler.close()
    assert not handler._thread.is_alive()
    os.close(reading)
    os.close(writing)


def test_simulated_figures_beside_the_request_path() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.pause = 0.03
        async with running_gateway(worker) as gateway:
            await gateway.chat("x", stream=True)
            await until(lambda: gateway.gateway.admission.in_flight == 0)
            assert await gateway.metric('warmroute_router_inter_token_seconds_count{worker="a"}') == 1
            gap = await gateway.metric('warmroute_router_inter_token_seconds_sum{worker="a"}')
            assert 0.015 < gap < 5
            assert await gateway.metric('warmroute_router_decisions_total{reason="no hit; least loaded"}') == 1
            assert await gateway.metric('warmroute_router_worker_breaker_state{state="closed",worker="a"}') == 1
            await asyncio.sleep(0.3)
            assert await gateway.metric("warmroute_router_event_loop_lag_seconds_count") >= 1
            assert 0 <= await gateway.metric('warmroute_router_worker_index_age_seconds{worker="a"}') < 10

    run(scenario())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("longest hit: 3 of 4 tokens", "longest hit"),
        ("first token in 12 ms: 3 waiting", "first token"),
        ("first token in 13 ms", "first token"),
        ("whatever a plugin says 7", "other"),
    ],
)
def test_reasons_are_counted_under_few_kinds(reason: str, kind: str) -> None:
    from router.admission import Admission
    from router.index import Index
    from router.workers import Registry

    metrics = Metrics(Registry(), Index(), Admission(1, 1, 1, 1))
    metrics.decided(reason)
    counted = {k: child.value for k, child in metrics._by_reason.items()}
    assert {k: value for k, value in counted.items() if value} == {kind: 1}
