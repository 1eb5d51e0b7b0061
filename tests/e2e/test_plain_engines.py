"""Engines without the connector behind the real gateway: what their KV events say, and what was sent there, is what the
gateway routes by."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.demo_fleet import free_port
from tests.e2e.test_fleet import words
from tests.support.engine import Engine, start_engine, wait_ready
from tests.support.gateway import Gateway, serve_gateway

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNK = 256
ROOM_TOKENS = 8192
FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--num-gpu-blocks-override", str(ROOM_TOKENS // 32))


@dataclass
class Fleet:
    talking: Engine
    mute: Engine
    gateway: Gateway
    flags: list[str]


@pytest.fixture(scope="module")
def fleet(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One engine that publishes its KV events, and one that says nothing."""
    workspace: Path = tmp_path_factory.mktemp("plain")
    events = {
        "enable_kv_cache_events": True,
        "endpoint": f"tcp://127.0.0.1:{free_port()}",
        "replay_endpoint": f"tcp://127.0.0.1:{free_port()}",
        "topic": "kv@small",
    }
    events["endpoint"] = events["endpoint"].replace("127.0.0.1", "*")  # bound, not connected
    telling = ("--kv-events-config", json.dumps(events))
    with (
        start_engine(small_model, workspace, connector=None, flags=(*FLAGS, *telling)) as talking,
        start_engine(small_model, workspace, connector=None, flags=FLAGS) as mute,
    ):
        wait_ready(talking)
        wait_ready(mute)
        flags = ["--tokenizer", small_model]
        flags += [
            "--worker",
            f"{talking.url},reports=none,name=talking",
            "--worker",
            f"{mute.url},reports=none,name=mute",
        ]
        with serve_gateway(workspace, flags) as gateway:
            gateway.wait_for("/admin/index", lambda seen: sources(seen) == {"talking": "events", "mute": "routed"})
            yield Fleet(talking, mute, gateway, flags)


def sources(seen: Any) -> dict[str, str]:
    return {name: worker["source"] for name, worker in seen["workers"].items()}


def chat(url: str, text: str, **more: Any) -> httpx.Response:
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        "temperature": 0,
        **more,
    }
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer


def cached(answer: httpx.Response) -> int:
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def predicted(answer: httpx.Response) -> int:
    return int(answer.headers["x-warmroute-hit-tokens"])


def believed(gateway: Gateway, worker: str, text: str, **more: Any) -> int:
    """The hit in tokens that a prompt would have at a worker."""
    body = {"model": "small", "messages": [{"role": "user", "content": text}], **more}
    answer = httpx.post(gateway.url + "/admin/explain", json=body, timeout=10)
    answer.raise_for_status()
    return next(int(item["hit_tokens"]) for item in answer.json()["candidates"] if item["worker"] == worker)


def wait_until(condition: Any, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def test_what_another_client_computed_is_known_by_its_events(fleet: Fleet) -> None:
    text = words("told by events", 1500)
    chat(fleet.talking.url, text)  # past the gateway
    wait_until(lambda: believed(fleet.gateway, "talking", text) > 4 * CHUNK)
    answer = chat(fleet.gateway.url, text)
    assert answer.headers["x-warmroute-worker"] == "talking"
    assert 0 <= cached(answer) - predicted(answer) < CHUNK
    seen = fleet.gateway.get("/admin/index")["workers"]["talking"]
    assert seen["predictions"]["over"] == 0


def test_salts_are_told_apart_by_events(fleet: Fleet) -> None:
    text = words("salted", 900)
    chat(fleet.talking.url, text, cache_salt="tenant a")
    wait_until(lambda: believed(fleet.gateway, "talking", text, cache_salt="tenant a") > CHUNK)
    assert believed(fleet.gateway, "talking", text, cache_salt="tenant b") == 0
    assert believed(fleet.gateway, "talking", text) == 0


def test_what_was_pushed_out_is_not_believed(fleet: Fleet) -> None:
    text = words("pushed out", 1200)
    chat(fleet.talking.url, text)
    wait_until(lambda: believed(fleet.gateway, "talking", text) > 3 * CHUNK)
    for number in range(6):
        chat(fleet.talking.url, words(f"pushing {number}", 1800))
    wait_until(lambda: believed(fleet.gateway, "talking", text) == 0)
    assert cached(chat(fleet.talking.url, text)) < CHUNK


def test_a_reset_cache_is_known_with_the_next_step(fleet: Fleet) -> None:
    text = words("reset", 1200)
    chat(fleet.talking.url, text)
    wait_until(lambda: believed(fleet.gateway, "talking", text) > 3 * CHUNK)
    fleet.talking.reset_gpu_cache()
    chat(fleet.talking.url, "x")  # an idle engine publishes with its next step
    wait_until(lambda: believed(fleet.gateway, "talking", text) == 0)


def test_a_gateway_that_comes_later_has_the_past_replayed(fleet: Fleet, tmp_path: Path) -> None:
    text = words("before it came", 1200)
    chat(fleet.talking.url, text)
    with serve_gateway(tmp_path, fleet.flags) as late:
        late.wait_for("/admin/index", lambda seen: sources(seen)["talking"] == "events")
        wait_until(lambda: believed(late, "talking", text) > 3 * CHUNK)
        worker = next(w for w in late.get("/admin/workers")["workers"] if w["name"] == "talking")
        assert worker["events"]["following"]["complete"] is True


def test_conversations_return_to_an_engine_that_says_nothing(fleet: Fleet) -> None:
    text = words("remembered", 1000)
    first = chat(fleet.gateway.url, text)
    worker = first.headers["x-warmroute-worker"]
    if worker == "talking":  # have one that only the mute one has
        for number in range(12):
            text = words(f"remembered {number}", 1000)
            first = chat(fleet.gateway.url, text)
            if first.headers["x-warmroute-worker"] == "mute":
                break
    assert first.headers["x-warmroute-worker"] == "mute"
    again = chat(fleet.gateway.url, text + " and more")
    assert again.headers["x-warmroute-worker"] == "mute"
    assert predicted(again) >= 2 * CHUNK
    assert 0 <= cached(again) - predicted(again) < CHUNK
    known = next(w for w in fleet.gateway.get("/admin/workers")["workers"] if w["name"] == "mute")
    assert known["assumed"] == {"chunk_size": CHUNK, "chunks": ROOM_TOKENS // CHUNK}
    assert fleet.gateway.get("/admin/index")["workers"]["mute"]["chunks"]["gpu"] <= ROOM_TOKENS // CHUNK
