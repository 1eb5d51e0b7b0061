"""The real gateway as a process, for tests on real engines."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from router.demo_fleet import free_port


@dataclass
class Gateway:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **parameters: Any) -> Any:
        response = httpx.get(self.url + path, params=parameters, timeout=10)
        response.raise_for_status()
        return response.json()

    def wait_for(self, path: str, condition: Any, timeout: float = 30) -> Any:
        """The first answer of ``path`` that meets ``condition``."""
        deadline = time.monotonic() + timeout
        while True:
            answer = self.get(path)
            if condition(answer):
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"{path} did not come true in {timeout} s: {answer}")
            time.sleep(0.05)


@contextmanager
def serve_gateway(workspace: Path, flags: Sequence[str], *, ready: str = "/ready") -> Iterator[Gateway]:
    """Run ``warmroute serve`` until the block ends, which begins when ``ready`` answers 200."""
    port = free_port()
    workspace.mkdir(parents=True, exist_ok=True)
    log = workspace / f"gateway-{port}.log"
    command = [sys.executable, "-m", "router.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    gateway = Gateway(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_ready(gateway, ready)
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=5)


def _wait_ready(gateway: Gateway, path: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if gateway.process.poll() is not None:
            raise AssertionError(f"the gateway ended early:\n{gateway.log.read_text()[-6000:]}")
        try:
            if httpx.get(gateway.url + path, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the gateway was not ready after {timeout} s:\n{gateway.log.read_text()[-6000:]}")
