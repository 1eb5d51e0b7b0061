"""What the connector costs when nothing can be reused: token throughput with it against without it.

    python benchmarks/overhead.py [--rounds 4] [--pairs 80] [--null] [--json FILE]

Two real vLLM engines (CPU build, the demo's model) run side by side, one with the connector and one without. Each
pair sends a request of the same kind, with a prompt that no one has sent before, to one engine and then to the other,
in an order that alternates. Two processes of the very same program differ by some percent on a small machine, for as long as they
live, so each round starts two fresh engines, in alternating order, and the figure is the median over rounds of the
median ratio of a round's pairs. ``--null`` runs both engines without the connector: what it prints is the method's
own error.
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
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.engine import Engine, start_engine, wait_ready

PROMPT_TOKENS = 1500
ANSWER_TOKENS = 32


def throughput(engine: Engine, source: random.Random) -> float:
    """Prompt and answer tokens per second of one request with a prompt that nobody sent before."""
    body = {
        "model": "small",
        "prompt": [source.randrange(3, 4096) for _ in range(PROMPT_TOKENS)],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    started = time.perf_counter()
    httpx.post(engine.url + "/v1/completions", json=body, timeout=120).raise_for_status()
    return (PROMPT_TOKENS + ANSWER_TOKENS) / (time.perf_counter() - started)


def measure_round(model: str, folder: Path, number: int, pairs: int, connector: dict[str, int] | None) -> list[float]:
    """Ratios of throughput with the connector to throughput without it, one per pair."""
    source = random.Random(number)
    with ExitStack() as stack:
        configurations = {"with": connector, "without": None}
        engines = {}
        for name in sorted(configurations, reverse=bool(number % 2)):
            engines[name] = stack.enter_context(start_engine(model, folder, connector=configurations[name]))
        for engine in engines.values():
            wait_ready(engine)
        for engine in engines.values():
            for _ in range(20):
                throughput(engine, source)
        ratios = []
        for pair in range(pairs):
            order = ("with", "without") if pair % 2 else ("without", "with")
            seen = {name: throughput(engines[name], source) for name in order}
            ratios.append(seen["with"] / seen["without"])
        return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--null", action="store_true", help="both engines without the connector")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        subprocess.run([sys.executable, "-m", "router.demo_model", str(model)], check=True, capture_output=True)
        for number in range(arguments.rounds):
            connector = None if arguments.null else {}
            rounds.append(measure_round(str(model), folder, number, arguments.pairs, connector))
            print(f"round {number + 1}: median ratio {statistics.median(rounds[-1]):.4f}", flush=True)
    medians = sorted(statistics.median(ratios) for ratios in rounds)
    every = statistics.quantiles([ratio for ratios in rounds for ratio in ratios], n=4)
    result = statistics.median(medians)
    print(
        f"throughput with / without: median of rounds {result:.4f} ({medians[0]:.4f} to {medians[-1]:.4f}); "
        f"all pairs: median {every[1]:.4f}, quartiles {every[0]:.4f} to {every[2]:.4f}"
    )
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        figures = {"machine": machine, "null": arguments.null, "rounds": rounds, "median_of_rounds": result}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
