"""The connector inside real vLLM engines (CPU build). Each scenario starts one engine; see engine_scenarios.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHUNK = 256

pytestmark = pytest.mark.engine


def run_scenario(name: str, model: str, workspace: Path) -> dict[str, Any]:
    """What the scenario found; fails if its processes outlive it."""
    fault = workspace / "fault"
    fault.write_text("")
    log = workspace / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker_connector.engine_scenarios", name, model],
            cwd=ROOT,
            env={**os.environ, "KV_TEST_FAULT": str(fault), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)
    left = survivors(process.pid)
    text = log.read_text(errors="replace")
    found = [line for line in text.splitlines() if line.startswith("RESULT ")]
    assert found, text[-8000:]
    assert not left, f"processes were left behind: {left}"
    assert "Traceback" not in text.partition("RESULT ")[2], text[-4000:]
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def survivors(group: int, patience: float = 10) -> list[str]:
    """Command lines of the processes in a process group that do not end within ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (alive := processes_of(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        os.killpg(group, signal.SIGKILL)
    return alive


def processes_of(group: int) -> list[str]:
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                alive.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue
    return alive


def assert_same_tokens(run: dict[str, Any]) -> None:
    assert run["warm"] == run["cold"], f"prompt of {run.get('prompt')} tokens"
    assert len(run["cold"]) == 32


@pytest.fixture(scope="module")
def main(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_scenario("main", small_model, tmp_path_factory.mktemp("main"))


def test_loaded_prompts_give_the_tokens_of_a_cold_run(main: dict[str, Any]) -> None:
    assert [run["prompt"] for run in main["runs"]] == [5000, 700, 2048, 2600]
    for run in main["runs"]:
        assert_same_tokens(run)
        # A hit of a whole prompt still computes its last token.
        assert run["cached"] >= run["prompt"] // CHUNK * CHUNK - 1


def test_a_corrupted_block_changes_the_tokens(main: dict[str, Any]) -> None:
    assert main["corrupted"]["cached"] == 4992
    assert main["corrupted"]["warm"] != main["corrupted"]["cold"]


def test_failed_loads_are_computed_with_the_same_tokens(main: dict[str, Any]) -> None:
    assert_same_tokens(main["failed"])
    assert main["failed"]["cached"] == 0
    assert main["after_failure"] == {"tokens": main["failed"]["cold"], "cached": 4992}


def test_what_the_gpu_cache_dropped_comes_back(main: dict[str, Any]) -> None:
    overflow = main["overflow"]
    assert overflow["second"] == overflow["first"]
    assert overflow["cached"] == [4992] * 4


def test_requests_with_one_prefix_load_it_once(main: dict[str, Any]) -> None:
    sharing = main["sharing"]
    assert sharing["warm"] == sharing["cold"]
    # Sixteen shared chunks, and the tail of the only prompt that was saved whole.
    assert sharing["loaded"] in (16, 17)


def test_an_abort_during_a_load_frees_its_blocks(main: dict[str, Any]) -> None:
    abort = main["abort"]
    assert abort["blocks_were_freed"]
    assert abort["other"] == 32
    assert abort["again"] == abort["cold"]


def test_clearing_the_connector_leaves_nothing_to_load(main: dict[str, Any]) -> None:
    assert main["cached_after_clear"] == 0


def test_figures_tell_what_happened(main: dict[str, Any]) -> None:
    cpu = main["stats"]["tiers"]["cpu"]
    assert cpu["load_chunks"] > 0
    assert cpu["failed_loads"] == 20
    assert cpu["save_bytes"] > cpu["load_bytes"] / 10
    assert cpu["load_bandwidth"] > 1 << 20


def test_loading_is_much_faster_than_computing(main: dict[str, Any]) -> None:
    ttft = main["ttft"]
    print(f"TTFT of 5,000 tokens: cold {ttft['cold'] * 1e3:.1f} ms, from the CPU tier {ttft['warm'] * 1e3:.1f} ms")
    assert ttft["warm"] <= ttft["cold"] / 8  # on a machine that does other work; docs/performance.md has figures


def test_two_ranks_agree(side_by_side: dict[str, Future[dict[str, Any]]]) -> None:
    found = side_by_side["tensor_parallel"].result()
    for run in found["runs"]:
        assert_same_tokens(run)
    assert [run["cached"] for run in found["runs"]] == [4992, 512]
    # Half a GiB over both ranks, in slots of half a MiB of float32 on each.
    assert found["stats"]["tiers"]["cpu"]["capacity_chunks"] == 512


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Gemma 3 with sliding windows, weights spread so widely that its output depends on its KV cache."""
    path = tmp_path_factory.mktemp("models") / "hybrid"
    code = f"""
import torch
from transformers import Gemma3TextConfig, Gemma3ForCausalLM
torch.manual_seed(0)
model = Gemma3ForCausalLM(Gemma3TextConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, max_position_embeddings=32768, sliding_window=128,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2))
with torch.no_grad():
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.05 if "embed" in name else 0.15)
        elif "q_norm" in name or "k_norm" in name:
            weight.fill_(3.0)
model.save_pretrained({str(path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
    return str(path)


@pytest.fixture(scope="module")
def side_by_side(
    small_model: str, hybrid_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Scenarios that measure no time, at once: most of a start keeps one core busy."""
    models = {"hybrid": hybrid_model, "tensor_parallel": small_model, "turns": small_model}
    with ThreadPoolExecutor(len(models)) as pool:
        yield {
            name: pool.submit(run_scenario, name, model, tmp_path_factory.mktemp(f"{name}-run"))
            for name, model in models.items()
        }


@pytest.fixture(scope="module")
def hybrid(side_by_side: dict[str, Future[dict[str, Any]]]) -> dict[str, Any]:
    return side_by_side["hybrid"].result()


def test_a_hybrid_model_gives_the_tokens_of_a_cold_run(hybrid: dict[str, Any]) -> None:
    for run in hybrid["runs"]:
        assert_same_tokens(run)
        assert run["cached"] >= run["prompt"] // CHUNK * CHUNK - 1


def test_a_hybrid_models_tokens_depend_on_what_is_loaded(hybrid: dict[str, Any]) -> None:
    # One block at the head of a long prompt may not matter to full attention; one inside a window does.
    changed = [run["warm"] != run["cold"] for run in hybrid["corrupted"]]
    assert sum(changed) >= 2, changed


def test_a_hybrid_models_failed_loads_are_computed(hybrid: dict[str, Any]) -> None:
    assert_same_tokens(hybrid["failed"])
    assert hybrid["failed"]["cached"] == 0


def test_damage_in_the_cpu_tier_is_seen_and_computed(hybrid: dict[str, Any]) -> None:
    assert_same_tokens(hybrid["damaged"])
    assert hybrid["damaged"]["cached"] == 0
    assert hybrid["stats"]["damaged_chunks"] == 1


def test_a_hybrid_model_reuses_the_head_of_a_longer_prompt(hybrid: dict[str, Any]) -> None:
    assert hybrid["part"]["warm"] == hybrid["part"]["cold"]
    assert hybrid["part"]["cached"] == 1024


@pytest.fixture(scope="module")
def turns(side_by_side: dict[str, Future[dict[str, Any]]]) -> dict[str, Any]:
    return side_by_side["turns"].result()


def test_a_next_turn_loads_up_to_the_last_block_of_the_turn_before(turns: dict[str, Any]) -> None:
    loaded = [run for run in turns["runs"] if run["cached"]]
    assert loaded, "every hit was of the shadow check's sample"
    for run in loaded:
        assert_same_tokens(run)
        assert run["cached"] == run["ends"] // 32 * 32


def test_hits_that_were_computed_again_were_the_same(turns: dict[str, Any]) -> None:
    computed = [run for run in turns["runs"] if not run["cached"]]
    assert computed, "no hit was of the shadow check's sample"
    for run in computed:
        assert_same_tokens(run)
    assert turns["stats"]["compared_chunks"] == sum(run["ends"] // CHUNK for run in computed)
    assert turns["stats"]["different_chunks"] == 0
