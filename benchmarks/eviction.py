"""Hit ratios of the eviction policies on recorded traffic.

A tier of so many blocks serves a trace alone. A request uses the blocks of its prompt up to the first one that is not
there: the others must be computed, and are stored. The hit ratio counts tokens: used blocks over all whole blocks of all
prompts. ``infinite`` is a tier that never evicts.

    python benchmarks/eviction.py TRACE... [--json benchmarks/results/eviction.json]
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.traces import Request, conversations, read_trace, resample, shared_prompt
from worker_connector.eviction import POLICIES

CAPACITIES = (1_024, 4_096, 16_384, 32_768)


class Tier:
    """``capacity`` blocks under a policy, told of everything as the ledger tells it."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.policy = POLICIES[policy]()
        self.capacity = capacity
        self.held: set[bytes] = set()

    def serve(self, blocks: Sequence[bytes]) -> int:
        """Blocks that were hit."""
        hit = next((index for index, block in enumerate(blocks) if block not in self.held), len(blocks))
        for block in reversed(blocks[:hit]):
            self.policy.touch(block)
        for block in reversed(blocks[hit:]):
            self.store(block)
        for block in reversed(blocks):
            self.policy.refresh(block)
        return hit

    def store(self, block: bytes) -> None:
        if block not in self.held:
            if len(self.held) >= self.capacity:
                victim = self.policy.victim()
                assert victim is not None
                self.policy.discard(victim)
                self.held.remove(victim)
            self.policy.add(block)
            self.held.add(block)


def hit_ratio(requests: Sequence[Request], policy: str, capacity: int) -> tuple[float, float]:
    """Share of the whole blocks that were hit, and microseconds per block for the policy and its tier."""
    tier, began = Tier(policy, capacity), time.perf_counter()
    hits = sum(tier.serve(request.whole) for request in requests)
    total = sum(len(request.whole) for request in requests)
    return hits / total, (time.perf_counter() - began) / total * 1e6


def infinite(requests: Sequence[Request]) -> float:
    seen: set[bytes] = set()
    hits = 0
    for request in requests:
        hits += next((i for i, block in enumerate(request.whole) if block not in seen), len(request.whole))
        seen.update(request.whole)
    return hits / sum(len(request.whole) for request in requests)


def workloads(paths: Sequence[Path]) -> dict[str, list[Request]]:
    named = {}
    for path in paths:
        named[path.stem] = read_trace(path)
        named[f"{path.stem}, resampled"] = resample(named[path.stem], 7)
    named["made up: 4,000 users, up to 8 turns"] = conversations(users=4000, turns=8, per_second=2.0)
    named["made up: one system prompt"] = shared_prompt(requests=6000, per_second=5.0)
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for name, requests in workloads(arguments.traces).items():
        best = infinite(requests)
        print(f"\n{name}: {len(requests)} requests, infinite {best:.3f}\n{'blocks':>8}", *(f"{p:>8}" for p in POLICIES))
        for capacity in CAPACITIES:
            row = {policy: hit_ratio(requests, policy, capacity) for policy in POLICIES}
            print(f"{capacity:>8}", *(f"{ratio:8.4f}" for ratio, _ in row.values()))
            results.append(
                {
                    "workload": name,
                    "blocks": capacity,
                    "infinite": round(best, 4),
                    "hit_ratio": {policy: round(ratio, 4) for policy, (ratio, _) in row.items()},
                    "us_per_block": {policy: round(cost, 2) for policy, (_, cost) in row.items()},
                }
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
