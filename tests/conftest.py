import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small Llama whose greedy output depends on every block of its KV cache."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    directory: Path = tmp_path_factory.mktemp("models") / "small"
    subprocess.run([sys.executable, "-m", "router.demo_model", str(directory)], check=True, timeout=180)
    return str(directory)
