"""Simulated report ports for mock workers that have none: the index then holds the prompts of a router benchmark.

    python -m benchmarks.simulated_reports --ports 19301 19302 --tokenizer DIRECTORY --model mock BODY.json …

Each chat body's prompt is rendered and tokenized as the router does it, and its chunks are reported as held in the gpu
tier: by one of the ports in turn, conversation by conversation, as if earlier turns had been served there.
"""

import argparse
import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated_worker import Ledger
from kv_protocol.hashing import root_hash
from kv_protocol.identity import Identity
from kv_protocol.messages import Hello, TierInfo
from router.prompt import PromptBuilder
from router.prompt_ids import PromptIds
from worker_connector.report_server import ReportServer

CAPACITY = 100_000


def serve_ledger(port: int, ledger: Ledger, model: str, chunk_size: int) -> ReportServer:
    tiers = [TierInfo(tier, CAPACITY, 1) for tier in ledger.tiers]
    hello = Hello(f"simulated-{port}", model, chunk_size, 16, Identity("simulated", "bf16", "LBNHC", ()), tiers)
    server = ReportServer("127.0.0.1", port, "", hello, ledger, {})
    server.start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bodies", nargs="*", type=Path)
    parser.add_argument("--ports", nargs="+", type=int, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", default="mock")
    parser.add_argument("--chunk-size", type=int, default=256)
    arguments = parser.parse_args()
    builder = PromptBuilder.load(arguments.tokenizer)
    root = root_hash(chunk_size=arguments.chunk_size, model=arguments.model)
    ledgers = [Ledger(CAPACITY, CAPACITY) for _ in arguments.ports]
    for number, path in enumerate(arguments.bodies):
        ids = PromptIds.of(builder.chat(json.loads(path.read_bytes())))
        ledgers[number % len(ledgers)].use(ids.chunks(root, arguments.chunk_size))
    for port, ledger in zip(arguments.ports, ledgers, strict=True):
        serve_ledger(port, ledger, arguments.model, arguments.chunk_size)
        print(f"port {port}: {len(ledger.tiers['gpu'])} chunks", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
