"""Control of a real worker's cache through the real gateway and the command: look up, pin, move, warm, clear."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.engine import Engine, serve_engine
from tests.support.gateway import Gateway, serve_gateway

pytestmark = pytest.mark.engine

CHUNKS = 8
"""More than so many chunks of 64 tokens are in the prompt."""


class Bench:
    def __init__(self, engine: Engine, gateway: Gateway, workspace: Path) -> None:
        self.engine = engine
        self.gateway = gateway
        self.file = workspace / "request.json"
        self.body = {
            "model": "small",
            "messages": [{"role": "user", "content": "what is asked for again and again " * 120}],
            "max_tokens": 4,
            "temperature": 0,
        }
        self.file.write_text(json.dumps(self.body))

    def ask(self, **members: Any) -> tuple[str, int]:
        answer = httpx.post(self.gateway.url + "/v1/chat/completions", json=self.body | members, timeout=120)
        assert answer.status_code == 200, answer.text
        content = answer.json()
        cached = (content["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return content["choices"][0]["message"]["content"], cached

    def wake(self) -> None:
        """Have the engine take a step: a request that leaves nothing behind."""
        controls = {"warmroute": {"skip_save": True, "skip_load": True}}
        self.ask(messages=[{"role": "user", "content": "x"}], max_tokens=1, kv_transfer_params=controls)

    def command(self, operation: str, *arguments: str) -> Any:
        command = [sys.executable, "-m", "router.cli", "cache", operation, *arguments]
        done = subprocess.run(
            [*command, "--url", self.gateway.url, "--json"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (entry,) = json.loads(done.stdout)["workers"]
        return entry

    def held(self, *arguments: str) -> dict[str, int]:
        return dict(self.command("lookup", str(self.file), *arguments)["held"])

    def wait_for_held(self, condition: Callable[[dict[str, int]], bool], *arguments: str) -> dict[str, int]:
        deadline = time.monotonic() + 20
        while not condition(held := self.held(*arguments)):
            assert time.monotonic() < deadline, held
            time.sleep(0.2)
        return held


def test_a_workers_cache_obeys(small_model: str, tmp_path: Path) -> None:
    connector = {"chunk_size": 64, "enable_disk": True, "disk_path": str(tmp_path / "disk"), "load_or_compute": False}
    with (
        serve_engine(small_model, tmp_path, connector=connector) as engine,
        serve_gateway(tmp_path, ["--worker", f"{engine.url},reports={engine.reports}"]) as gateway,
    ):
        bench = Bench(engine, gateway, tmp_path)
        gateway.wait_for("/admin/index", lambda index: all(w["synced"] for w in index["workers"].values()))
        bench.ask(kv_transfer_params={"warmroute": {"skip_save": True}})
        assert not bench.held().get("cpu")
        engine.reset_gpu_cache()

        text, cached = bench.ask()
        assert cached == 0
        chunks = bench.wait_for_held(lambda held: held.get("cpu", 0) == held.get("disk", 0) > CHUNKS)["disk"]
        shown = gateway.get("/admin/index")["workers"]
        assert next(iter(shown.values()))["chunks"]["disk"] >= chunks

        assert bench.command("pin", str(bench.file), "--for", "60")["result"]["changed"] == chunks
        assert bench.command("pins")["result"]["count"] == chunks
        assert bench.command("move", str(bench.file))["result"]["refused"] == chunks
        assert bench.command("unpin", "--all")["result"]["changed"] == chunks

        engine.reset_gpu_cache()
        moved = bench.command("move", str(bench.file), "--tier", "disk")["result"]
        assert (moved["chunks"], moved["queued"]) == (chunks, ["disk"])
        assert bench.held() == {"cpu": chunks, "disk": chunks}, "the engine sleeps"
        bench.wake()
        bench.wait_for_held(lambda held: held == {"disk": chunks})

        assert bench.command("warm", str(bench.file))["result"]["queued"] == ["disk"]
        bench.wake()
        bench.wait_for_held(lambda held: held == {"cpu": chunks, "disk": chunks})
        again, cached = bench.ask()
        assert (again, cached >= chunks * 64 - 64) == (text, True)

        figures = bench.command("stats")["result"]
        assert figures["tiers"]["disk"]["scanned"]
        assert figures["tiers"]["disk"]["serving"]
        assert figures["counts"]["load_chunks"]["disk"] >= chunks
        direct = bench.command("stats", "--worker", str(engine.reports))["result"]
        assert direct["held_chunks"]["disk"] == figures["held_chunks"]["disk"]

        engine.reset_gpu_cache()
        cleared = bench.command("clear", "--all")["result"]
        assert cleared["tiers"]["disk"] >= chunks
        assert bench.held() == {}
        bench.wake()
        bench.wait_for_held(lambda held: held == {}, "--ask")
        answer = httpx.post(gateway.url + "/admin/explain", params={"live": True}, json=bench.body, timeout=30)
        (end,) = answer.json()["ends"]
        assert (end["held_chunks"], end["live"]["cause"]) == (0, "absent")
        text, cached = bench.ask()
        assert (text, cached) == (again, 0)
        assert "Traceback" not in engine.log.read_text()
