"""What the connector costs when nothing can be reused: token throughput with it against without it.

    python benchmarks/overhead.py [--pairs 120] [--hidden-size 256 --layers 4] [--floor] [--set NAME=VALUE ...] [--json FILE]

One real vLLM engine (CPU build, in this process) with a model made on the spot. Two processes of the very same program
differ by 5 to 7 % on a small machine, for as long as they live, so both sides run in one: from request to request the
connector is attached to the engine and detached from it, in an order that alternates. Each request has a prompt that
nobody sent before. Reported are the medians of wall time, and of the engine thread's CPU time, which other load on the
machine disturbs less. ``--floor`` puts a connector that does nothing in ours' place: what vLLM itself spends on having one.
``--set`` gives the connector a setting: ``--set disk_path=/data/kv --set remote_url=redis://127.0.0.1`` switches all tiers on.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
WARM_UP = 40
IDLE_NAMES = (
    "on_new_request",
    "update_connector_output",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "wait_for_save",
    "start_load_kv",
    "handle_preemptions",
    "update_state_after_alloc",
)


class Taken(NamedTuple):
    """Seconds one request took: on the clock, and on the engine thread's CPU."""

    wall: float
    cpu: float


class Engine:
    """An engine whose connector can be taken off while it is idle."""

    def __init__(self, model: str, prompt_tokens: int, answer_tokens: int, settings: dict[str, str]) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415 - the environment has to be set before
        from vllm.config import KVTransferConfig  # noqa: PLC0415
        from vllm.distributed.kv_transfer import kv_transfer_state  # noqa: PLC0415

        transfer = KVTransferConfig(
            kv_connector="WarmrouteConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes": 1 << 30, "report_port": 0, **settings},
        )
        self._llm = LLM(
            model, enforce_eager=True, block_size=32, max_num_batched_tokens=2048, kv_transfer_config=transfer
        )
        core: Any = self._llm.llm_engine.engine_core
        self._scheduler = core.engine_core.scheduler
        self._workers_side: Any = kv_transfer_state
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self.connectors = (self._scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT)  # noqa: SLF001 - vLLM has no other way
        self._sampling = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
        self._prompt_tokens = prompt_tokens
        self._source = random.Random(1)
        self.watch = True

    def attach(self, *, attached: bool) -> None:
        """Put the connector on, or take it off as if the engine had none."""
        self._scheduler.connector = self.connectors[0] if attached else None
        self._workers_side._KV_CONNECTOR_AGENT = self.connectors[1] if attached else None  # noqa: SLF001 - as above
        self._pool.enable_kv_cache_events = attached and self.watch
        self._pool.kv_event_queue.clear()

    def serve(self, *, attached: bool) -> Taken:
        self.attach(attached=attached)
        prompt = [self._source.randrange(3, 4096) for _ in range(self._prompt_tokens)]
        wall, cpu = time.perf_counter(), time.thread_time()
        self._llm.generate([{"prompt_token_ids": prompt}], self._sampling, use_tqdm=False)
        return Taken(time.perf_counter() - wall, time.thread_time() - cpu)


def make_idle(engine: Engine) -> None:
    """Have the connector do nothing whatever vLLM asks of it."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base  # noqa: PLC0415

    metadata, results = base.KVConnectorMetadata(), base.KVConnectorTransferResults()
    for connector in engine.connectors:
        for name in IDLE_NAMES:
            setattr(connector, name, lambda *_, **__: None)
        connector.build_connector_meta = lambda _: metadata
        connector.take_events = tuple
        connector.get_transfer_results = lambda _: results
        connector.get_num_new_matched_tokens = lambda *_: (0, False)
        connector.request_finished = connector.request_finished_all_groups = lambda *_: (False, None)
        connector.get_block_ids_with_load_errors = set
    engine.watch = False


def measure(engine: Engine, pairs: int) -> dict[bool, list[Taken]]:
    """``pairs`` requests each, with (True) and without (False) the connector."""
    for _ in range(WARM_UP):
        for attached in (True, False):
            engine.serve(attached=attached)
    taken: dict[bool, list[Taken]] = {True: [], False: []}
    for pair in range(pairs):
        for attached in (True, False) if pair % 2 else (False, True):
            taken[attached].append(engine.serve(attached=attached))
    return taken


def summary(taken: dict[bool, list[Taken]]) -> dict[str, float]:
    """Throughput with the connector over without it, by either clock; its standard error; milliseconds of CPU."""
    ratios = [without.wall / with_.wall for with_, without in zip(taken[True], taken[False], strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4)
    cpu = {attached: statistics.median(one.cpu for one in served) for attached, served in taken.items()}
    return {
        "throughput": statistics.median(ratios),
        "standard_error": (third - first) / 1.35 * 1.25 / len(ratios) ** 0.5,
        "throughput_by_cpu": cpu[False] / cpu[True],
        "cpu_ms_with": cpu[True] * 1e3,
        "cpu_ms_without": cpu[False] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--floor", action="store_true", help="a connector that does nothing in ours' place")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the connector")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from router.demo_fleet import cpu_build_metadata  # noqa: PLC0415 - the environment has to be set before
    from router.demo_model import make_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        sys.path += cpu_build_metadata(Path(folder)).split(os.pathsep)
        make_model(Path(folder) / "model", hidden_size=arguments.hidden_size, layers=arguments.layers)
        settings = dict(each.split("=", 1) for each in arguments.set)
        engine = Engine(str(Path(folder) / "model"), arguments.prompt_tokens, arguments.answer_tokens, settings)
        if arguments.floor:
            make_idle(engine)
        figures = summary(measure(engine, arguments.pairs))
    print("throughput with / without: {throughput:.4f} ± {standard_error:.4f}".format(**figures))
    print("by CPU time of the engine's thread: {throughput_by_cpu:.4f}".format(**figures))
    print("ms of CPU a request: {cpu_ms_with:.2f} with, {cpu_ms_without:.2f} without".format(**figures))
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        chosen = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"machine": machine, "options": chosen, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
