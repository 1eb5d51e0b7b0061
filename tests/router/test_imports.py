"""What importing the router brings along, seen in a fresh interpreter."""

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "vllm", "transformers", "worker_connector")


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("module", ["router", "router.cli", "router.app", "router.server", "router.api"])
def test_nothing_heavy_comes_along(module: str) -> None:
    loaded = fresh(f"import sys, {module}; print(*sys.modules)").split()
    assert not [name for name in HEAVY if name in loaded]


def test_importing_the_router_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import router; print(time.perf_counter() - t)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.5


def test_the_version_command_is_quick() -> None:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "router.cli", "version"], check=True, capture_output=True, timeout=30)
    assert time.perf_counter() - began < 10
