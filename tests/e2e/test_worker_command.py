"""``warmroute worker`` on a real engine: it registers by itself, serves warm, and leaves the router when it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.demo_fleet import ENGINE_ENVIRONMENT, ENGINE_FLAGS, free_port
from tests.support.gateway import Gateway, serve_gateway

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENVIRONMENT = {"ENABLE_LMCACHE": "1", "VLLM_KV_OFFLOADING_SIZE": "1", "LMCACHE_CHUNK_SIZE": "64"}


def until(condition: Callable[[], Any], timeout: float, log: Path) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
        time.sleep(0.2)
    return found


def start(model: str, router: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "router.cli", "worker", model, "--served-model-name", "small", *ENGINE_FLAGS]
    command += ["--port", str(port), "--router", router, "--worker-name", "own"]
    environment = {**os.environ, **ENGINE_ENVIRONMENT, **ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "worker.log").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def ask(gateway: Gateway) -> httpx.Response:
    body = {"model": "small", "prompt": "a b c d e f g h " * 60, "max_tokens": 2}
    answer = httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=180)
    assert answer.status_code == 200, answer.text
    return answer


def workers(gateway: Gateway) -> list[dict[str, Any]]:
    return list(gateway.get("/admin/workers")["workers"])


def test_a_worker_registers_serves_warm_and_leaves(small_model: str, tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "worker.log"
    with serve_gateway(tmp_path / "gateway", ["--tokenizer", small_model], ready="/health") as gateway:
        process = start(small_model, gateway.url, port, tmp_path)
        try:
            until(lambda: process.poll() is not None or workers(gateway), 240, log)
            assert process.poll() is None, log.read_text()[-6000:]
            (known,) = until(lambda: [w for w in workers(gateway) if w["reports"]["synced"]], 60, log)
            assert known["name"] == "own"
            ask(gateway)
            usage = until(lambda: _cached(ask(gateway)), 30, log)
            assert usage >= 64
            os.kill(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
            until(lambda: not workers(gateway), 60, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=10)
    text = log.read_text(errors="replace")
    assert "warmroute: ENABLE_LMCACHE is read as" in text
    assert f"VLLM_KV_OFFLOADING_SIZE is read as cpu_bytes: {1 << 30}" in text


def _cached(answer: httpx.Response) -> int:
    return int((answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
