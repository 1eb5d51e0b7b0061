"""The vision cache inside a real vLLM engine (CPU build) with a small model that reads images; see vision_engine.py."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OUTPUT_BYTES = 16 * 128 * 4

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was found with the vision cache, and in an engine without it beside."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    workspace = tmp_path_factory.mktemp("vision")
    make = [sys.executable, "-m", "tests.worker_connector.vision_model", str(workspace / "model")]
    subprocess.run(make, check=True, timeout=180, cwd=ROOT)
    with ThreadPoolExecutor(2) as pool:
        cached, plain = pool.map(lambda words: run(workspace, *words), [(), ("plain",)])
    return cached, plain


def run(workspace: Path, *words: str) -> dict[str, Any]:
    log = workspace / f"engine{'-'.join(words)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker_connector.vision_engine", str(workspace / "model"), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)
    text = log.read_text(errors="replace")
    results = [line for line in text.splitlines() if line.startswith("RESULT ")]
    assert results, text[-8000:]
    result: dict[str, Any] = json.loads(results[0].removeprefix("RESULT "))
    return result


@pytest.fixture(scope="module")
def found(both: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def test_an_image_that_comes_again_is_not_encoded_again(found: dict[str, Any]) -> None:
    assert found["encoded_cold"] == 12
    assert found["encoded_warm"] == 0
    assert found["after_warm"]["hits"] == 4
    assert found["after_warm"]["hit_embeddings"] == 4 * 16
    assert found["after_warm"]["encoded"] == 12


def test_the_tokens_are_those_of_the_encoder(found: dict[str, Any]) -> None:
    assert found["warm"] == [found["cold"][image] for image in (7, 6, 5, 4)]
    assert found["again"] == found["cold"][0]


def test_the_tokens_are_those_of_an_engine_without_it(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    cached, plain = both
    for name in ("cold", "other_text", "long_text"):
        assert cached[name] == plain[name]
    # Each of these three loads what vLLM's own cache had let go.
    assert cached["after_texts"]["hits"] - cached["after_warm"]["hits"] >= 2


def test_the_tokens_depend_on_the_image(found: dict[str, Any]) -> None:
    assert len({tuple(tokens) for tokens in found["cold"]}) > 6
    assert found["damaged"] != found["cold"][0], "wrong bytes would not be noticed"


def test_its_memory_is_bounded(found: dict[str, Any]) -> None:
    figures = found["after_cold"]
    assert figures["capacity_bytes"] == 8 * OUTPUT_BYTES
    assert figures["bytes"] <= figures["capacity_bytes"]
    assert figures["saves"] == 12
    assert figures["failed_saves"] == 0
    assert figures["entries"] == 8
    assert figures["evictions"] == 4


def test_resets_empty_it(found: dict[str, Any]) -> None:
    assert found["after_kv_reset"] == 0
    assert found["kept_again"] == 2
    assert found["after_encoder_reset"] == 0
    assert found["encoded_again"] == 1


def test_figures_are_on_the_engines_metrics(found: dict[str, Any]) -> None:
    assert found["metrics"]["warmroute_vision_saves_total"] >= 12
    assert found["metrics"]["warmroute_vision_hits_total"] >= 4
    assert found["metrics"]["warmroute_vision_capacity_bytes"] == 8 * OUTPUT_BYTES
