import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.engine import Engine, serve_engine

# How long one example takes says something about the machine, and nothing about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


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
