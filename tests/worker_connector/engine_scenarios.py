"""What test_connector_engine.py looks at: one engine per scenario, run in a process of its own.

``python -m tests.worker_connector.engine_scenarios SCENARIO MODEL`` prints one line of JSON with what happened. Models
run in float32: bfloat16 results depend on how a prompt was cut into steps, with or without a cache.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from worker_connector import get_cache_stats

SETTINGS = {"cpu_bytes": 1 << 30, "report_port": 0, "load_or_compute": False}
MANY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


class Bench:
    """An engine and what tests ask of it."""

    def __init__(
        self, model: str, *, transfer: KVTransferConfig | None = None, verify: bool = False, **options: Any
    ) -> None:
        self.random = random.Random(11)
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_num_batched_tokens=2048,
            max_model_len=8192,
            skip_tokenizer_init=True,
            kv_transfer_config=transfer
            or KVTransferConfig(
                kv_connector="FaultyConnector",
                kv_connector_module_path="tests.worker_connector.faulty_connector",
                kv_role="kv_both",
                kv_connector_extra_config={**SETTINGS, "verify": verify},
            ),
            **options,
        )
        self.generate([self.prompt(2100)], ONE)
        self.generate([self.prompt(300)], ONE)

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(10, 4000) for _ in range(length)]

    def generate(self, prompts: list[list[int]], sampling: SamplingParams = MANY) -> list[Any]:
        return self.llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)

    def reset(self, *, connector: bool = False) -> bool:
        deadline = time.monotonic() + 10
        while not (done := self.llm.reset_prefix_cache(reset_connector=connector)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(done)

    def until_saved(self) -> None:
        """Return when no more chunks come into the CPU tier."""
        before, since = -1, time.monotonic()
        while time.monotonic() - since < 0.5:
            if (saved := get_cache_stats()["tiers"]["cpu"].get("save_chunks", 0)) != before:
                before, since = saved, time.monotonic()
            time.sleep(0.05)

    def seconds(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self.generate([prompt], ONE)
        return time.perf_counter() - began

    def cold_and_warm(self, prompt: list[int]) -> dict[str, Any]:
        """Tokens with nothing cached, and with what the connector saved then."""
        self.reset(connector=True)
        (cold,) = self.generate([prompt])
        self.reset()
        (warm,) = self.generate([prompt])
        return {"prompt": len(prompt), "cold": tokens(cold), "warm": tokens(warm), "cached": warm.num_cached_tokens}


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def loaded_chunks() -> int:
    return int(get_cache_stats()["tiers"].get("cpu", {}).get("load_chunks", 0))


def fault(kind: str) -> None:
    Path(os.environ["KV_TEST_FAULT"]).write_text(kind, encoding="utf-8")


def main_scenario(model: str) -> dict[str, Any]:
    """Every check that one engine with a small GPU cache can make."""
    bench = Bench(model, num_gpu_blocks_override=400)
    long = bench.prompt(5000)
    parts: list[Callable[[Bench, list[int]], dict[str, Any]]] = [
        _equality,
        _corruption,
        _failure,
        _overflow,
        _sharing,
        _abort,
        _ttft,
        _clear,
    ]
    found: dict[str, Any] = {}
    for part in parts:
        fault("")
        found |= part(bench, long)
    found["stats"] = get_cache_stats()
    return found


def _equality(bench: Bench, long: list[int]) -> dict[str, Any]:
    return {"runs": [bench.cold_and_warm(each) for each in (long, *map(bench.prompt, (700, 2048, 2600)))]}


def _corruption(bench: Bench, long: list[int]) -> dict[str, Any]:
    fault("corrupt 0")
    return {"corrupted": bench.cold_and_warm(long)}


def _failure(bench: Bench, long: list[int]) -> dict[str, Any]:
    fault("fail")
    failed = bench.cold_and_warm(long)
    fault("")
    bench.reset()
    (again,) = bench.generate([long])
    return {"failed": failed, "after_failure": {"tokens": tokens(again), "cached": again.num_cached_tokens}}


def _overflow(bench: Bench, long: list[int]) -> dict[str, Any]:
    del long
    bench.reset(connector=True)
    prompts = [bench.prompt(5000) for _ in range(4)]
    rounds = [[bench.generate([each])[0] for each in prompts] for _ in range(2)]
    first, second = ([tokens(each) for each in outputs] for outputs in rounds)
    return {"overflow": {"first": first, "second": second, "cached": [each.num_cached_tokens for each in rounds[1]]}}


def _sharing(bench: Bench, long: list[int]) -> dict[str, Any]:
    prompts = [[*long[:4096], *bench.prompt(40)] for _ in range(4)]
    cold = []
    for each in prompts:
        bench.reset(connector=True)
        cold.append(tokens(bench.generate([each])[0]))
    bench.reset()
    before = loaded_chunks()
    warm = bench.generate(prompts)
    return {"sharing": {"cold": cold, "warm": [tokens(each) for each in warm], "loaded": loaded_chunks() - before}}


def _abort(bench: Bench, long: list[int]) -> dict[str, Any]:
    cold = bench.cold_and_warm(long)["cold"]
    bench.reset()
    fault("slow")
    engine = bench.llm.llm_engine
    # The engine runs in a process of its own and needs no steps from here.
    name = engine.add_request("doomed", {"prompt_token_ids": long}, ONE)
    time.sleep(0.3)
    engine.abort_request([name], internal=True)
    fault("")
    (other,) = bench.generate([long[:700]])
    was_reset = bench.reset()
    (again,) = bench.generate([long])
    return {
        "abort": {"cold": cold, "again": tokens(again), "other": len(tokens(other)), "blocks_were_freed": was_reset}
    }


def _ttft(bench: Bench, long: list[int]) -> dict[str, Any]:
    del long
    cold, warm = [], []
    for _ in range(5):
        each = bench.prompt(5000)
        cold.append(bench.seconds(each))
        bench.reset()
        warm.append(bench.seconds(each))
    return {"ttft": {"cold": sorted(cold)[2], "warm": sorted(warm)[2]}}


def _clear(bench: Bench, long: list[int]) -> dict[str, Any]:
    bench.generate([long])
    bench.reset(connector=True)
    (again,) = bench.generate([long], ONE)
    return {"cached_after_clear": again.num_cached_tokens}


def tensor_parallel_scenario(model: str) -> dict[str, Any]:
    """Two ranks; the CPU tier sized by vLLM's own flag, the class found under vLLM's own name."""
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_connector_module_path="worker_connector",
        kv_role="kv_both",
        kv_connector_extra_config={"report_port": 0, "load_or_compute": False},
    )
    bench = Bench(model, transfer=transfer, tensor_parallel_size=2, kv_offloading_size=0.5)
    runs = [bench.cold_and_warm(bench.prompt(length)) for length in (5000, 700)]
    return {"runs": runs, "stats": get_cache_stats()}


def hybrid_scenario(model: str) -> dict[str, Any]:
    """Sliding-window and full attention: several KV-cache groups. Checksums are compared."""
    bench = Bench(model, verify=True)
    runs = [bench.cold_and_warm(bench.prompt(length)) for length in (5000, 2048, 700)]
    long = bench.prompt(5000)
    corrupted = []
    for group in range(3):
        fault(f"corrupt {group}")
        corrupted.append(bench.cold_and_warm(long))
    fault("fail")
    failed = bench.cold_and_warm(long)
    fault("damage")
    damaged = bench.cold_and_warm(long)
    fault("")
    stats = get_cache_stats()["tiers"]["cpu"]
    bench.reset(connector=True)
    half = [*long[:1024], *bench.prompt(30)]
    (cold,) = bench.generate([half])
    bench.reset(connector=True)
    bench.generate([long], ONE)
    bench.reset()
    (warm,) = bench.generate([half])
    part = {"cold": tokens(cold), "warm": tokens(warm), "cached": warm.num_cached_tokens}
    return {"runs": runs, "corrupted": corrupted, "failed": failed, "damaged": damaged, "stats": stats, "part": part}


def turns_scenario(model: str) -> dict[str, Any]:
    """Conversations of two turns, and hits that are computed again to be compared: about every other."""
    transfer = KVTransferConfig(
        kv_connector="WarmrouteConnector",
        kv_role="kv_both",
        kv_connector_extra_config={**SETTINGS, "conversation_mode": True, "shadow_check": 0.5},
    )
    bench = Bench(model, transfer=transfer)
    runs: list[dict[str, Any]] = []
    while len({bool(run["cached"]) for run in runs}) < 2 or len(runs) < 4:
        number = len(runs)
        said = bench.prompt(1100 + 13 * number)
        (first,) = bench.generate([said])
        bench.until_saved()
        bench.reset()
        asked = [*said, *tokens(first), *bench.prompt(20)]
        (warm,) = bench.generate([asked])
        bench.reset(connector=True)
        (cold,) = bench.generate([asked])
        ends = len(said) + len(tokens(first)) - 1  # of the last token there is no KV
        run = {"prompt": len(asked), "cold": tokens(cold), "warm": tokens(warm), "cached": warm.num_cached_tokens}
        runs.append({**run, "ends": ends})
    return {"runs": runs, "stats": get_cache_stats()}


SCENARIOS = {
    "main": main_scenario,
    "turns": turns_scenario,
    "tensor_parallel": tensor_parallel_scenario,
    "hybrid": hybrid_scenario,
}

if __name__ == "__main__":
    print("RESULT " + json.dumps(SCENARIOS[sys.argv[1]](sys.argv[2])))
