"""The gateway's own OpenAPI document, and requests made from it: sound ones and unsound ones, none answered with 5xx."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from router.endpoints import TABLE
from tests.support.simulated_worker import SimulatedWorker, running_gateway

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "6"))


class CarefulWorker(SimulatedWorker):
    """Answers 400 to what it cannot read, as an engine does."""

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
        try:
            self.tokenize(json.loads(raw))
        except (ValueError, LookupError, TypeError, AttributeError):
            self._json(writer, 400, {"error": {"message": "not understood", "type": "BadRequestError", "code": 400}})
            return True
        return await super()._answer(writer, headers, raw)

    def _control(self, path: str, body: bytes) -> tuple[int, Any]:
        try:
            return super()._control(path, body)
        except (ValueError, LookupError, TypeError, AttributeError):
            return 400, {"error": {"message": "not understood", "type": "BadRequestError", "code": 400}}


@contextmanager
def gateway_in_thread() -> Iterator[str]:
    """The URL of a gateway with two simulated workers, one of them without reports."""
    ready, over, url = threading.Event(), threading.Event(), list[str]()

    async def serve() -> None:
        workers = [await CarefulWorker().start(), await CarefulWorker(reports=False).start()]
        for worker in workers:
            worker.generating = set(TABLE)
        async with running_gateway(*workers, drain_timeout=0) as gateway:
            url.append(str(gateway.client.base_url))
            ready.set()
            while not over.is_set():  # noqa: ASYNC110 - set from another thread
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield url[0]
    finally:
        over.set()
        thread.join(20)
        assert not thread.is_alive()


def operations(url: str, mode: Any) -> list[Any]:
    document = httpx.get(url + "/openapi.json").raise_for_status().json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    schema.config.generation.update(modes=[mode])
    return [result.ok() for result in schema.get_all_operations()]


def call_with_examples(operation: Any, most: int) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        response = case.call(timeout=10)
        assert response.status_code < 500, f"{case.method} {case.path}: {response.status_code} {response.text[:500]}"

    call()


def test_every_endpoint_is_described() -> None:
    with gateway_in_thread() as url:
        document = httpx.get(url + "/openapi.json").raise_for_status().json()
    assert document["openapi"].startswith("3.1")
    assert set(TABLE) <= set(document["paths"])
    assert {"/v1/models", "/health", "/metrics", "/admin/workers"} <= set(document["paths"])
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_simulated_no_request_that_can_be_made_from_the_document_fails_the_gateway(mode: str) -> None:
    chosen = getattr(schemathesis.GenerationMode, mode.upper())
    with gateway_in_thread() as url:
        found = [item for item in operations(url, chosen) if not item.path.startswith("/admin")]
        assert len(found) > len(TABLE)
        for operation in found:
            call_with_examples(operation, EXAMPLES)
        assert httpx.get(url + "/ready").status_code == 200
        workers = httpx.get(url + "/admin/workers").json()["workers"]
        assert [worker["in_flight"] for worker in workers] == [0, 0]


def test_simulated_no_admin_request_fails_the_gateway() -> None:
    """Apart from the others: it takes the workers away."""
    with gateway_in_thread() as url:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            for operation in operations(url, mode):
                if operation.path.startswith("/admin"):
                    call_with_examples(operation, EXAMPLES)
        assert httpx.get(url + "/health").status_code == 200
