import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.engine import Engine, serve_engine
from tests.support.files import has_engines

# How long examples take says something about the machine, and nothing about the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: tests with real engines stay with one process, whatever else the others do."""
    from tests.support.dealing import make_scheduler

    return make_scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("engine") and not has_engines(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} starts an engine: move it to a file *_engine.py, or below e2e")
    if hasattr(config, "workerinput"):
        # What takes longest, and cannot be divided, begins first.
        items.sort(key=lambda item: not has_engines(item.nodeid))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small Llama whose greedy output depends on every block of its KV cache."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    directory: Path = tmp_path_factory.mktemp("models") / "small"
    subprocess.run([sys.executable, "-m", "router.demo_model", str(directory)], check=True, timeout=180)
    return str(directory)


@pytest.fixture(scope="session")
def small_engine(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server of that model with the connector, for whoever takes it as it comes; chunks are of 64 tokens."""
    with serve_engine(small_model, tmp_path_factory.mktemp("small-engine"), connector={"chunk_size": 64}) as engine:
        yield engine
