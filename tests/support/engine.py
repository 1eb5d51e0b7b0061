"""Real vLLM servers (CPU build) with the small model, for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from router.demo_fleet import ENGINE_ENVIRONMENT, ENGINE_FLAGS, cpu_build_metadata, free_port


@dataclass
class Engine:
    """A running ``vllm serve``. ``reports`` is its connector's HOST:PORT, or None without the connector."""

    url: str
    reports: str | None
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 120) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout)

    def reset_gpu_cache(self) -> None:
        """Empty the engine's own prefix cache; the connector's tiers stay."""
        deadline = time.monotonic() + 20
        while True:
            response = self.post("/reset_prefix_cache")
            if response.status_code == 200:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"reset_prefix_cache: {response.status_code} {response.text}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and everything it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)


@contextmanager
def serve_engine(
    model: str,
    workspace: Path,
    *,
    connector: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    port: int | None = None,
    reports_port: int | None = None,
    environment: Mapping[str, str] | None = None,
    name: str = "small",
) -> Iterator[Engine]:
    """Run ``vllm serve`` until the block ends; ``connector=None`` runs it without the connector, otherwise
    ``connector`` holds its kv_connector_extra_config."""
    with start_engine(
        model,
        workspace,
        connector=connector,
        flags=flags,
        port=port,
        reports_port=reports_port,
        environment=environment,
        name=name,
    ) as engine:
        wait_ready(engine)
        yield engine


@contextmanager
def start_engine(
    model: str,
    workspace: Path,
    *,
    connector: Mapping[str, Any] | None,
    flags: Sequence[str] = (),
    port: int | None = None,
    reports_port: int | None = None,
    environment: Mapping[str, str] | None = None,
    name: str = "small",
) -> Iterator[Engine]:
    """Like serve_engine, but does not wait until it is ready: several can start side by side."""
    port = port or free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port)]
    command += ["--served-model-name", name, "--enable-prompt-tokens-details", *ENGINE_FLAGS, *flags]
    reports = None
    if connector is not None:
        reports_port = reports_port or free_port()
        reports = f"127.0.0.1:{reports_port}"
        config = {
            "kv_connector": "WarmrouteConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"report_port": reports_port, "cpu_bytes": 1 << 30, **connector},
        }
        command += ["--kv-transfer-config", json.dumps(config)]
    workspace.mkdir(parents=True, exist_ok=True)
    log = workspace / f"engine-{port}.log"
    path = cpu_build_metadata(workspace / "metadata")
    own_ports = {"VLLM_PORT": str(free_port())}
    env = {**os.environ, **ENGINE_ENVIRONMENT, **own_ports, "PYTHONPATH": path, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    engine = Engine(f"http://127.0.0.1:{port}", reports, process, log)
    try:
        yield engine
    finally:
        _stop(process)


def wait_ready(engine: Engine, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if engine.process.poll() is not None:
            raise AssertionError(f"vllm serve ended early:\n{engine.log.read_text()[-6000:]}")
        try:
            if httpx.get(engine.url + "/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"vllm serve was not ready after {timeout:.0f} s:\n{engine.log.read_text()[-6000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
