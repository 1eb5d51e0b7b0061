"""A real engine with lower tiers, in a process of its own that does what its driver says.

``EngineProcess`` is the driver's side: test_tier_engine.py starts engines, harms their stores from outside and looks at
what they answer. Models run in float32: bfloat16 results depend on how a prompt was cut into steps.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
SETTINGS = {"cpu_bytes": 256 << 20, "report_port": 0, "load_or_compute": False}
START_SECONDS = 240.0
CALL_SECONDS = 120.0


def prompt(seed: int, length: int = 5000) -> list[int]:
    """``length`` tokens that no other seed begins with."""
    rng = random.Random(seed)
    return [rng.randrange(10, 4000) for _ in range(length)]


class EngineProcess:
    """One engine; ``settings`` are the connector's, ``options`` vLLM's. Ends with the block."""

    def __init__(
        self,
        model: str,
        workspace: Path,
        name: str,
        settings: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.log = workspace / f"{name}.log"
        self._order = {"model": model, "settings": {**SETTINGS, **settings}, "options": dict(options or {})}
        self._fault = workspace / f"{name}.fault"
        self._fault.write_text("")
        self._connection: Connection | None = None
        listener = Listener(str(workspace / f"{name}.socket"))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.worker_connector.tier_scenarios", listener.address],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, "KV_TEST_FAULT": str(self._fault), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._listener = listener

    def wait_ready(self) -> Self:
        self._connection = self._listener.accept()
        self._connection.send(self._order)
        assert self._receive(START_SECONDS) == "ready"
        return self

    def __enter__(self) -> Self:
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, what: str, **arguments: Any) -> Any:
        """The result of one of the functions below, by its name."""
        assert self._connection is not None
        self._connection.send((what, arguments))
        return self._receive(CALL_SECONDS)

    def serve(self, *prompts: list[int], tokens: int = 32) -> list[dict[str, Any]]:
        """Tokens, cached tokens and seconds of each, one after the other."""
        return list(self.call("serve", prompts=prompts, tokens=tokens))

    def lose(self) -> None:
        """Empty the GPU and the CPU tier, after what is being written was written."""
        self.call("settle")
        self.call("lose")

    def stats(self) -> dict[str, Any]:
        return dict(self.call("stats"))

    def fault(self, kind: str) -> None:
        self._fault.write_text(kind)

    def lines(self, *words: str) -> list[str]:
        """Lines of the log that hold all words."""
        text = self.log.read_text(errors="replace")
        return [line for line in text.splitlines() if all(word in line for word in words)]

    def kill(self) -> None:
        """SIGKILL to everything at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def _receive(self, seconds: float) -> Any:
        assert self._connection is not None
        assert self._connection.poll(seconds), f"no answer: {self.log.read_text(errors='replace')[-4000:]}"
        try:
            answer = self._connection.recv()
        except EOFError:
            raise AssertionError(self.log.read_text(errors="replace")[-8000:]) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class Bench:
    """The engine's side."""

    def __init__(self, model: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.llm = LLM(
            model=model,
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": 32,
                "max_num_batched_tokens": 2048,
                "max_model_len": 8192,
                "skip_tokenizer_init": True,
                **options,
            },
            kv_transfer_config=KVTransferConfig(
                kv_connector="FaultyTiers",
                kv_connector_module_path="tests.worker_connector.faulty_tiers",
                kv_role="kv_both",
                kv_connector_extra_config=dict(settings),
            ),
        )
        for length in (2100, 300):
            self.serve([prompt(-length, length)], 1)

    def serve(self, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, Any]]:
        return [self._serve_one(each, tokens) for each in prompts]

    def _serve_one(self, tokens_in: list[int], tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": tokens_in}], _sampling(tokens), use_tqdm=False)
        seconds = time.perf_counter() - began
        return {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "seconds": seconds,
            "reason": output.outputs[0].finish_reason,
        }

    def beside(self, decoding: list[int], prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
        """Answers to ``prompts`` while another request decodes; ``gaps`` are the seconds between its tokens."""
        engine = self.llm.llm_engine
        engine.add_request("decoding", {"prompt_token_ids": decoding}, _sampling(7000 - len(decoding)))
        arrivals: list[float] = []
        answers: dict[str, dict[str, Any]] = {}
        began = 0.0
        while len(answers) < len(prompts) or not answers:
            for output in engine.step():
                if output.request_id.startswith("decoding"):
                    arrivals.append(time.perf_counter())
                elif output.finished:
                    answers[output.request_id] = {
                        "tokens": list(output.outputs[0].token_ids),
                        "cached": output.num_cached_tokens,
                        "seconds": time.perf_counter() - began,
                        "reason": output.outputs[0].finish_reason,
                    }
            if len(arrivals) >= 5 and not began:
                began = time.perf_counter()
                for number, each in enumerate(prompts):
                    engine.add_request(f"prompt-{number}", {"prompt_token_ids": each}, _sampling(tokens))
        engine.abort_request(["decoding"])
        while engine.has_unfinished_requests():
            engine.step()
        first = next(at for at, arrival in enumerate(arrivals) if arrival >= began) if began else 0
        gaps = [later - earlier for earlier, later in zip(arrivals[first - 1 :], arrivals[first:], strict=False)]
        return {"answers": [answers[name] for name in sorted(answers)], "gaps": gaps}

    def lose(self) -> None:
        self.reset(connector=False)
        self.control("clear", tier="cpu")

    def reset(self, *, connector: bool) -> bool:
        deadline = time.monotonic() + 10
        while not (done := self.llm.reset_prefix_cache(reset_connector=connector)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(done)

    def control(self, operation: str, **arguments: Any) -> Any:
        """What the report port answers."""
        from worker_connector.client import ControlClient
        from worker_connector.runtime_files import running

        (server,) = (server for server in running() if os.getpid() in server.ancestors)
        with ControlClient(server.host, server.port, token=server.token) as client:
            return client.call(operation, **arguments)

    def change_weights(self, path: str) -> None:
        """In place, as vLLM reloads them; nobody is told."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def settle(self, seconds: float = 15.0) -> None:
        """Wait until nothing more is written to the lower tiers."""
        known, since, until = -1.0, time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < until and time.monotonic() - since < 0.6:
            tiers = self.stats()["tiers"]
            moved = sum(tier.get("save_bytes", 0) + tier.get("failed_saves", 0) for tier in tiers.values())
            if moved != known:
                known, since = moved, time.monotonic()
            time.sleep(0.05)

    def stats(self) -> dict[str, Any]:
        from worker_connector import get_cache_stats

        return dict(get_cache_stats())


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def main(address: str) -> None:
    connection = Client(address)
    bench = Bench(**connection.recv())
    connection.send("ready")
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(bench, what)(**arguments))
        except Exception as error:  # noqa: BLE001 - told to the driver
            connection.send(AssertionError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(sys.argv[1])
