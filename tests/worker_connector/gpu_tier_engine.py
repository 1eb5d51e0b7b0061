"""Runs a real engine in this process, so that its block pool can be asked, and compares with what it reports.

``python -m tests.worker_connector.gpu_tier_engine MODEL`` prints one JSON object; see test_gpu_tier_engine.py.
"""

import json
import random
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from kv_protocol.hashing import chunk_hashes, root_hash
from tests.support.reports import read_content
from worker_connector import get_cache_stats, runtime_files

CHUNK, BLOCK, BLOCKS = 64, 32, 100


class Watched:
    """The engine and every request it ever computed."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(
            model=model,
            served_model_name="small",
            enforce_eager=True,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_model_len=2048,
            max_num_batched_tokens=512,
            kv_transfer_config=KVTransferConfig(
                kv_connector="WarmrouteConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"chunk_size": CHUNK, "cpu_bytes": "64MiB", "report_port": 0},
            ),
        )
        core = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]  # in this process
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self.reports = next(f"{server.host}:{server.port}" for server in runtime_files.running())
        self.requests: dict[int, Any] = {}
        hasher = core.request_block_hasher
        core.request_block_hasher = lambda request: self._noting(request, hasher(request))

    def generate(self, prompts: list[list[int]], tokens: int = 1) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self.llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)

    def held(self) -> set[bytes]:
        """Chunks whose every block is in the engine's own cache, asked of the engine's own cache."""
        root, found = root_hash(chunk_size=CHUNK, model="small"), set()
        for request in self.requests.values():
            hashes = chunk_hashes(root, list(request.all_token_ids), CHUNK)
            for at, chunk in enumerate(hashes):
                names = request.block_hashes[at * (CHUNK // BLOCK) : (at + 1) * (CHUNK // BLOCK)]
                keys = [make_block_hash_with_group_id(name, 0) for name in names]
                cached = [self.pool.cached_block_hash_to_block.get_one_block(key) for key in keys]
                if len(cached) == CHUNK // BLOCK and None not in cached:
                    found.add(chunk)
        return found

    def reported(self) -> set[bytes]:
        return read_content(self.reports)["gpu"]

    def _noting(self, request: Any, hashes: list[Any]) -> list[Any]:
        self.requests[id(request)] = request
        return hashes


def main(model: str) -> dict[str, Any]:
    chance, engine = random.Random(5), Watched(model)
    rounds: list[list[Any]] = []

    def compare(what: str) -> None:
        held, reported = engine.held(), engine.reported()
        rounds.append([what, len(held), len(reported), held == reported])

    bases = [[chance.randrange(100, 4000) for _ in range(chance.randrange(100, 900))] for _ in range(4)]
    for number in range(12):
        prompts = []
        for _ in range(chance.randrange(1, 4)):
            base = chance.choice(bases)
            tail = [chance.randrange(100, 4000) for _ in range(chance.randrange(1, 300))]
            prompts.append(base[: chance.randrange(1, len(base))] + tail)
        engine.generate(prompts, chance.choice([1, 70]))
        compare(f"round {number}")
    evicted = sum(rounds[at][1] < rounds[at - 1][1] for at in range(1, len(rounds)))
    compare("before the reset")
    began = time.monotonic()
    reset = engine.llm.reset_prefix_cache()
    compare("after the reset, without a step")
    cleared = time.monotonic() - began
    engine.generate([bases[0]])
    compare("after the reset")
    figures = get_cache_stats()
    return {"rounds": rounds, "evicted": evicted, "reset": reset, "cleared_seconds": cleared, "figures": figures}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
