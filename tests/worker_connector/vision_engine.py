"""What test_vision_cache_engine.py looks at: a real engine with the vision cache, or without.

``python -m tests.worker_connector.vision_engine MODEL [plain]`` prints one line of JSON with what happened; ``plain`` is the
engine without connectors. The engine runs inside this process, so that the encoder's runs can be counted and its host memory
be damaged.
"""

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import numpy as np
from PIL import Image
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.config import ECTransferConfig, KVTransferConfig
from vllm.distributed.ec_transfer import get_ec_transfer

from worker_connector import get_cache_stats

OUTPUT_BYTES = 16 * 128 * 4
"""Of one image: 16 embeddings of 128 float32."""
ROOM = 8
IMAGES = 12
SAMPLING = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
LONG = "where is it? " * 40
"""Computed in several steps."""
KV = {"report_port": 0, "cpu_bytes": 64 << 20, "enable_vision_cache": True, "vision_cache_bytes": ROOM * OUTPUT_BYTES}


class Bench:
    """An engine whose own encoder cache has room for four images, and whose steps divide an image."""

    def __init__(self, model: str, **options: Any) -> None:
        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=512,
            max_num_batched_tokens=64,
            long_prefill_token_threshold=10,
            max_num_seqs=4,
            mm_processor_cache_gb=0,
            seed=0,
            **options,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.encoded = 0
        self._count_encoder_runs()

    def ask(self, image: int, text: str = "what is it?") -> list[int]:
        """The answer's tokens; the engine's prefix cache is emptied before, so that the image is looked at."""
        self.llm.reset_prefix_cache()
        prompt: Any = {"prompt": text, "multi_modal_data": {"image": picture(image)}}
        return list(self.llm.generate(prompt, SAMPLING, use_tqdm=False)[0].outputs[0].token_ids)

    def _count_encoder_runs(self) -> None:
        model = self.core.model_executor.driver_worker.worker.model_runner.get_model()
        encode = model.embed_multimodal

        def counted(**inputs: Any) -> Any:
            outputs = encode(**inputs)
            self.encoded += len(outputs)
            return outputs

        model.embed_multimodal = counted


def picture(number: int) -> Any:
    pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def look(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {"cold": [bench.ask(image) for image in range(IMAGES)]}
    found["encoded_cold"] = bench.encoded
    found["after_cold"] = vision()
    # The last four are still in vLLM's own cache, the four before in this one, and no more.
    found["warm"] = [bench.ask(image) for image in (7, 6, 5, 4)]
    found["encoded_warm"] = bench.encoded - found["encoded_cold"]
    found["after_warm"] = vision()
    found["other_text"] = bench.ask(11, "where?")
    found["long_text"] = [bench.ask(image, LONG) for image in (11, 10)]
    found["after_texts"] = vision()
    return found


def reset(bench: Bench) -> dict[str, Any]:
    """Both ways to say that the weights are others."""
    found: dict[str, Any] = {}
    bench.llm.reset_prefix_cache(reset_connector=True)
    found["after_kv_reset"] = vision()["entries"]
    for image in (0, 1):
        bench.ask(image)
    found["kept_again"] = vision()["entries"]
    bench.core.reset_encoder_cache()
    found["after_encoder_reset"] = vision()["entries"]
    before = bench.encoded
    found["again"] = bench.ask(0)
    found["encoded_again"] = bench.encoded - before
    return found


def damage(bench: Bench) -> dict[str, Any]:
    """Whether the answers would tell if wrong bytes were loaded."""
    for image in (0, 1, 2, 3, 4):
        bench.ask(image)
    get_ec_transfer()._rank._slab.bytes.zero_()  # type: ignore[attr-defined]
    return {"damaged": bench.ask(0)}


def vision() -> dict[str, int]:
    figures: dict[str, int] = get_cache_stats()["vision"]
    return figures


def shown() -> dict[str, float]:
    """What the engine's /metrics shows of the vision cache."""
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("warmroute_vision")}


def plain(model: str) -> None:
    """The answers of an engine without connectors."""
    bench = Bench(model)
    found = {"cold": [bench.ask(image) for image in range(IMAGES)], "other_text": bench.ask(11, "where?")}
    found["long_text"] = [bench.ask(image, LONG) for image in (11, 10)]
    print("RESULT " + json.dumps(found), flush=True)


def main(model: str) -> None:
    kv = KVTransferConfig(kv_connector="WarmrouteConnector", kv_role="kv_both", kv_connector_extra_config=KV)
    ec = ECTransferConfig(ec_connector="WarmrouteECConnector", ec_role="ec_both")
    bench = Bench(model, kv_transfer_config=kv, ec_transfer_config=ec, disable_log_stats=False)
    found = look(bench)
    found["metrics"] = shown()
    found |= reset(bench)
    found |= damage(bench)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    (plain if sys.argv[2:] == ["plain"] else main)(sys.argv[1])
