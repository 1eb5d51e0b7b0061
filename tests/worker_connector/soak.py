"""Turns chunks over in ledger and lower tiers for a long time, without an engine, and looks at what that costs.

    python -m tests.worker_connector.soak [--turnovers 1000000] [--held 20000] [--json FILE]

Chunks are saved, written below, evicted, looked up, fetched back, lost and dropped, as engine steps would have it. Printed are
bytes of bookkeeping for each chunk on record, and the process's size after the first tenth and at the end.
"""

import argparse
import gc
import json
import random
import resource
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from worker_connector.estimate import Estimator
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.lower import LowerTiers, TierRules
from worker_connector.plan import TierJob, TierResult
from worker_connector.stats import Stats

SLOTS = 256
STEP = 16
UNIT = 64
CAUSES = ("missing", "bad", "timeout", "full")


class Turnover:
    """``held`` chunks are kept on record for each tier."""

    def __init__(
        self,
        held: int,
        *,
        seed: int = 1,
        ranks: int = 1,
        fail: float = 0.02,
        slots: int = SLOTS,
        late: float = 0.0,
    ) -> None:
        self.late = late
        self.random = random.Random(seed)
        self.ledger = Ledger(LeastRecentlyUsed())
        self.ledger.set_capacity(slots)
        self.now = 0.0
        self.ranks = ranks
        self.fail = fail
        self.lower = LowerTiers(
            self.ledger,
            [TierRules(name="disk", most=held), TierRules(name="remote", most=held)],
            ranks=ranks,
            groups=1,
            chunk_size=256,
            chunk_bytes=1 << 20,
            may_load=True,
            may_save=True,
            patience=5.0,
            stats=Stats(),
            estimator=Estimator(),
            load_or_compute=False,
            clock=lambda: self.now,
        )
        self.turnovers = 0
        self.operations = 0
        self.names = 0
        self.known: list[bytes] = []
        self.lower.fetches.unit = UNIT
        self.under: list[list[TierJob]] = [[] for _ in range(ranks)]
        self.waiting: dict[str, Any] = {}

    def step(self) -> None:
        """A prompt of new chunks is saved, one that is below is fetched, the ranks do what they were told."""
        self.now += 0.05
        self._save([self.random.randbytes(16) for _ in range(STEP)])
        if self.turnovers and self.random.random() < 0.5:
            self._want(self.ledger.newest(self.random.choice(["disk", "remote"]), 2000)[-STEP:])
        newest = self.ledger.newest("disk", 100)
        lost = {"disk": set(newest[::20])} if self.random.random() < 0.2 else {}
        for rank in range(self.ranks):
            self.lower.absorb(self._results(rank), lost if not rank else {})
        self.operations += self.ranks
        if self.ledger.has_changes and self.random.random() < 0.5:
            self.ledger.take_changes()

    def disturb(self) -> None:
        """What operators, other engines and time may do."""
        chunk = self.random.choice(self.known) if self.known else bytes(16)
        tier = self.random.choice(["disk", "remote"])
        for chance, action in (
            (0.2, lambda: self.ledger.forget(chunk)),
            (0.2, lambda: self.ledger.touch([chunk])),
            (0.1, lambda: self.ledger.stored(tier, [chunk], 40)),
            (0.1, lambda: self.ledger.removed(tier, [chunk])),
            (0.1, lambda: self.lower.demote(tier, [chunk])),
            (0.05, lambda: self.lower.drop(tier, [chunk])),
            (0.02, lambda: self.lower.promote(tier, self.ledger.newest(tier, 4))),
            (0.01, lambda: self.lower.drop(tier)),
            (0.01, lambda: self.lower.begin_drop(tier, [chunk])),
            (0.01, self._enter),
            (0.01, self.ledger.clear_cpu),
        ):
            if self.random.random() < chance:
                action()
                self.operations += 1

    def _enter(self) -> None:
        self.names += 1
        if self.random.random() < 0.5:
            self.lower.rename(str(self.names))
        else:
            self.ledger.clear_cpu()
            self.lower.enter(str(self.names))

    def _save(self, chunks: list[bytes]) -> None:
        slots = []
        self.known = [*self.known, *chunks][-200:]
        self.operations += 2 * len(chunks)
        tails = tails_behind(chunks)
        for chunk in [*chunks, *self.random.sample(tails, 1)]:
            slot = self.ledger.reserve(chunk, tokens=UNIT * (tails.index(chunk) + 1) if chunk in tails else 0)
            if slot is None:
                continue
            if self.random.random() < self.fail:
                self.ledger.abandon(slot)
            else:
                self.ledger.commit(slot)
                slots.append(slot)
        self.turnovers += sum(not slot.tokens for slot in slots)
        self.lower.committed(slots)

    def _want(self, chunks: list[bytes]) -> None:
        self.names += 1
        request = SimpleNamespace(request_id=str(self.names))
        controls = SimpleNamespace(priority=0)
        state: Any = SimpleNamespace(
            request=request,
            adapter=None,
            eligible=True,
            chunks=chunks,
            extend=lambda: chunks,
            tails=lambda at, _unit: tails_behind(chunks[:at]),
            controls=controls,
        )
        self.waiting[request.request_id] = state
        self.lower.bring(state, 0, ahead=self.random.random() < 0.3)
        for request_id, other in list(self.waiting.items()):
            chance = self.random.random()
            if chance < 0.3:
                self.waiting.pop(request_id)
                self.lower.forget(request_id)
            elif chance < 0.8:
                self.lower.bring(other, 0)
            elif chance < 0.9:
                self.lower.served(request_id)

    def _results(self, rank: int) -> dict[int, TierResult]:
        if not rank:
            planned = self.lower.plan_step()
            for under in self.under:
                under.extend(planned)
        results = {}
        late = [job for job in self.under[rank] if self.random.random() < self.late]
        ended, self.under[rank] = [job for job in self.under[rank] if job not in late], late
        for job in ended:
            self.operations += len(job.pieces)
            failed = {
                piece.chunk: self.random.choice(CAUSES) for piece in job.pieces if self.random.random() < self.fail
            }
            results[job.job] = TierResult(failed=failed, nbytes=1 << 20, seconds=0.001)
        return results

    def check(self) -> None:
        self.ledger.check()
        self.lower.check()


def tails_behind(chunks: list[bytes]) -> list[bytes]:
    """Names of the beginnings of the chunk behind these."""
    return [sha256(chunks[-1] + bytes([units])).digest()[:16] for units in range(1, 4)]


def bookkeeping(held: int) -> float:
    """Bytes for each chunk that is on record, of all tiers together, beyond the first few."""
    turnover = Turnover(held)
    while turnover.turnovers < 2000:
        turnover.step()
    gc.collect()
    tracemalloc.start()
    before, known = tracemalloc.get_traced_memory()[0], _on_record(turnover)
    while _on_record(turnover) - known < held:
        turnover.step()
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / (_on_record(turnover) - known)


def _on_record(turnover: Turnover) -> int:
    counts = turnover.ledger.counts()
    return counts["disk"] + counts["remote"]


def soak(turnovers: int, held: int) -> Iterator[int]:
    """The process's size in bytes after every tenth of the way."""
    turnover = Turnover(held)
    for tenth in range(1, 11):
        while turnover.turnovers < turnovers * tenth // 10:
            turnover.step()
        turnover.check()
        yield _resident()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turnovers", type=int, default=1_000_000)
    parser.add_argument("--held", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    each = bookkeeping(arguments.held)
    sizes = list(soak(arguments.turnovers, arguments.held))
    print(f"{each:.0f} bytes of bookkeeping for each chunk on record of a lower tier")
    print("MB resident after each tenth:", " ".join(f"{size / 1e6:.1f}" for size in sizes))
    if arguments.json:
        figures = {"turnovers": arguments.turnovers, "bytes_per_chunk": round(each), "resident_bytes": sizes}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
