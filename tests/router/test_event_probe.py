"""The doctor's look at KV events: what an engine names that cannot be used."""

import asyncio
from typing import Any

import httpx
import pytest

from router.config import WorkerSpec
from router.event_probe import examine_events


def examined(sources: Any) -> tuple[str, str]:
    async def ask() -> tuple[str, str]:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=sources))
        async with httpx.AsyncClient(transport=transport, base_url="http://a:1") as client:
            result, found, _ = await examine_events(client, WorkerSpec(url="http://a:1", reports="none"))
        return result, found

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("sources", "result", "said"),
    [
        ({}, "warn", "publishes no KV events"),
        ({"0": {"endpoint": "tcp://127.0.0.1:many"}}, "fail", "tcp://127.0.0.1:many"),
        ({"0": {"endpoint": "tcp://127.0.0.1:99999"}}, "fail", "99999"),
        ({str(rank): {"endpoint": "tcp://*:5557"} for rank in range(4)}, "warn", "dp=4"),
    ],
    ids=["none", "no port", "no such port", "several caches"],
)
def test_what_cannot_be_used_is_said(sources: Any, result: str, said: str) -> None:
    answer = examined(sources)
    assert answer[0] == result
    assert said in answer[1]
