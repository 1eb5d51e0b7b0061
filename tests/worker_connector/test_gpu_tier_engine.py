"""What a real engine reports equals what it really holds; its figures reach every place they are read from."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _run(code: list[str], runtime: Path, **environment: str) -> Any:
    result = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, "XDG_RUNTIME_DIR": str(runtime), **environment},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("{"))
    return json.loads(line)


@pytest.fixture(scope="module")
def programs(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What two programs printed, each with an engine: at once, since most of a start keeps one core busy."""
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(_PROGRAM)
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    commands = {
        "held": (["-m", "tests.worker_connector.gpu_tier_engine", small_model], one_process),
        "figures": ([str(program), small_model], {"PYTHONPATH": str(ROOT)}),
    }
    with ThreadPoolExecutor(len(commands)) as pool:
        yield {
            name: pool.submit(_run, code, tmp_path_factory.mktemp(name), **environment)
            for name, (code, environment) in commands.items()
        }


def test_the_reported_gpu_tier_is_what_the_engine_holds(programs: dict[str, Future[Any]]) -> None:
    found = programs["held"].result()
    assert [each for each in found["rounds"] if not each[3]] == []
    assert found["evicted"] > 0, "the pool was meant to overflow"
    assert found["reset"]
    held = {what: count for what, count, *_ in found["rounds"]}
    assert held["before the reset"] > 0
    assert held["after the reset, without a step"] == 0
    assert held["after the reset"] > 0
    assert found["cleared_seconds"] < 10
    assert found["figures"]["engines"] == 1
    assert 0 < found["figures"]["hit_rate"] < 1


_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from worker_connector import get_cache_stats
if __name__ == "__main__":
    transfer = KVTransferConfig(kv_connector="WarmrouteConnector", kv_role="kv_both", kv_connector_extra_config={
        "chunk_size": 64, "cpu_bytes": "64MiB", "report_port": 0, "report_token": "s3cret"})
    llm = LLM(model=sys.argv[1], enforce_eager=True, block_size=32, max_model_len=2048, kv_transfer_config=transfer)
    sampling, prompt = SamplingParams(max_tokens=4, temperature=0.0), {"prompt_token_ids": list(range(100, 740))}
    for _ in range(3):
        llm.generate([prompt], sampling, use_tqdm=False)
        llm.reset_prefix_cache()
    print(json.dumps(get_cache_stats()))
"""


def test_a_program_reads_the_figures_of_its_engine_process(programs: dict[str, Future[Any]]) -> None:
    figures = programs["figures"].result()
    assert figures["engines"] == 1
    assert figures["requests"] == 3
    # Twice the whole prompt came from the CPU tier, but for its last token, which is always computed.
    assert figures["tiers"]["cpu"]["load_chunks"] == 20
    assert figures["tiers"]["cpu"]["hit_tokens"] == 2 * 639
    assert figures["hit_rate"] == pytest.approx(2 * 639 / (3 * 640))
    assert figures["tiers"]["cpu"]["load_bytes"] > 0


def test_metrics_of_a_server(small_engine: Engine) -> None:
    body = {"model": "small", "prompt": list(range(100, 740)), "max_tokens": 2}
    before = _metrics(small_engine.url)
    for _ in range(2):
        assert small_engine.post("/v1/completions", body).status_code == 200
    small_engine.reset_gpu_cache()
    assert small_engine.post("/v1/completions", body).status_code == 200
    now = _metrics(small_engine.url)

    def more(name: str, labels: str = 'engine="0",model_name="small",tier="cpu"') -> float:
        key = f"warmroute_{name}{{{labels}}}"
        return now[key] - before.get(key, 0)

    server = 'engine="0",model_name="small"'
    assert more("requests_total", server) == 3
    assert more("prompt_tokens_total", server) == 1920
    assert more("hit_tokens_total", server + ',tier="gpu"') >= 576
    assert more("hit_tokens_total") >= 576
    assert more("load_bytes_total") > 0
    assert more("held_chunks") >= 9
    assert now[f'warmroute_capacity_chunks{{{server},tier="cpu"}}'] > 9


def _metrics(url: str) -> dict[str, float]:
    import httpx

    lines = httpx.get(url + "/metrics", timeout=10).text.splitlines()
    found = (re.fullmatch(r"(warmroute_\S+) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}
