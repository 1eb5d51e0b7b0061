"""What the connector costs when nothing can be reused: token throughput with it against without it.

    python benchmarks/overhead.py [--pairs 20] [--json FILE]

Two real vLLM engines (CPU build, the demo's model) run side by side, one with the connector and one without. Each
pair sends the same kind of work, prompts that no one has sent before, to one engine and then to the other, in an order
that alternates. Reported: the ratio of token throughputs pair by pair, its median and quartiles.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.engine import Engine, start_engine, wait_ready

PROMPTS = 8
PROMPT_TOKENS = 1500
ANSWER_TOKENS = 32


def throughput(engine: Engine, source: random.Random) -> float:
    """Prompt and answer tokens per second over a batch of unique prompts, four at a time."""
    bodies = [
        {
            "model": "small",
            "prompt": [source.randrange(3, 4096) for _ in range(PROMPT_TOKENS)],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        for _ in range(PROMPTS)
    ]
    started = time.perf_counter()
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(4) as pool:
        for response in pool.map(lambda body: client.post(engine.url + "/v1/completions", json=body), bodies):
            response.raise_for_status()
    return PROMPTS * (PROMPT_TOKENS + ANSWER_TOKENS) / (time.perf_counter() - started)


def measure(pairs: int) -> list[tuple[float, float]]:
    source = random.Random(7)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        subprocess.run([sys.executable, "-m", "router.demo_model", str(model)], check=True)
        engines = [
            stack.enter_context(start_engine(str(model), folder, connector=connector)) for connector in ({}, None)
        ]
        for engine in engines:
            wait_ready(engine)
            for _ in range(3):
                throughput(engine, source)
        results = []
        for number in range(pairs):
            order = (0, 1) if number % 2 else (1, 0)
            seen = {which: throughput(engines[which], source) for which in order}
            results.append((seen[0], seen[1]))
            print(
                f"{number + 1:3}: with {seen[0]:8.0f}, without {seen[1]:8.0f} tokens/s, ratio {seen[0] / seen[1]:.4f}"
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.pairs)
    ratios = [with_it / without for with_it, without in results]
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"throughput with / without the connector: median {quartiles[1]:.4f}, quartiles {quartiles[0]:.4f}..{quartiles[2]:.4f}"
    )
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        figures = {"machine": machine, "pairs": results, "median_ratio": quartiles[1]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
