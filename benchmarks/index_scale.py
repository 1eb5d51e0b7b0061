"""The chunk index at scale: memory, look-ups, and look-ups while reports come in.

    python benchmarks/index_scale.py [memory] [lookup] [ingest] [--workers 1000] [--chunks 10000] [--json FILE]

``memory`` fills an index in a process of its own for each way in which chunks can be shared, and reads the resident size
before and after. ``lookup`` times single look-ups of prompts that are held in part. ``ingest`` runs the router's own report
streams: a second process plays all workers over TCP, lists what they hold, and then sends ``--rate`` chunk events a second,
half of them stored and half removed, in frames of 20 chunks, with heartbeats and digests; meanwhile prompts are looked up.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_protocol.digests import RunningDigest
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.identity import Identity
from kv_protocol.messages import (
    Digest,
    Heartbeat,
    Hello,
    Removed,
    Snapshot,
    SnapshotEnd,
    Stored,
    TierInfo,
    encode,
    pack,
    unpack,
)
from router.breaker import Breaker
from router.config import WorkerSpec
from router.index import Index
from router.reports import Sweeper, Watcher
from router.turns import Turns
from router.upstream import Timeouts, Upstream
from router.workers import Worker

PROMPT = 512
FRAME = 20
SHARING = ("distinct", "two-tiers", "two-to-five", "nine", "shared-prompt")


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory, as the kernel counts them."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) * 1024


def fresh(count: int) -> list[bytes]:
    return unpack(os.urandom(count * HASH_BYTES))


def holdings(sharing: str, workers: int, chunks: int) -> Iterator[tuple[int, str, list[bytes]]]:
    """(worker, tier, chunks) until every worker holds ``chunks`` of them."""
    common = fresh(256)
    source = random.Random(7)
    for worker in range(workers) if sharing in ("distinct", "two-tiers", "shared-prompt") else ():
        mine = fresh(chunks)
        if sharing == "shared-prompt":
            mine[: len(common)] = common
        yield worker, "gpu", mine
        if sharing == "two-tiers":
            yield worker, "cpu", mine
    for _ in range(workers * chunks) if sharing in ("two-to-five", "nine") else ():
        holders = source.sample(range(workers), 9 if sharing == "nine" else source.randint(2, 5))
        chunk = fresh(1)
        for worker in holders:
            yield worker, "gpu", chunk


def fill(index: Index, sharing: str, workers: int, chunks: int) -> int:
    """How many chunks, each counted once for every worker that holds it, were put in."""
    for worker in range(workers):
        index.open(f"worker-{worker}")
    held = 0
    for worker, tier, mine in holdings(sharing, workers, chunks):
        index.stored(f"worker-{worker}", tier, mine)
        held += len(mine) if tier == "gpu" else 0
        if held >= workers * chunks:
            break
    return held


def measure_memory(sharing: str, workers: int, chunks: int) -> dict[str, Any]:
    before = resident()
    index = Index()
    started = time.process_time()
    held = fill(index, sharing, workers, chunks)
    return {
        "sharing": sharing,
        "held": held,
        "entries": len(index),
        "rss_before_mib": round(before / 2**20),
        "rss_mib": round(resident() / 2**20),
        "peak_mib": round(resident("VmHWM") / 2**20),
        "fill_cpu_s": round(time.process_time() - started, 1),
    }


def quantiles(times: list[float]) -> dict[str, float]:
    """In microseconds."""
    ordered = sorted(times)
    return {
        "p50_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
        "max_us": round(ordered[-1] * 1e6, 1),
    }


def timed(work: Callable[[], object], times: int = 300) -> dict[str, float]:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return quantiles(spent)


def prompt_holdings(kind: str, workers: int, source: random.Random) -> Iterator[tuple[int, str, slice]]:  # noqa: C901 - a list of cases
    """Who holds which part of a prompt of 512 chunks."""
    for worker in range(workers):
        match kind:
            case "one holds all, all hold the first 16":
                yield worker, "gpu", slice(0, 512 if worker == workers // 2 else 16)
            case "a tenth hold random lengths":
                if worker % 10 == 0:
                    yield worker, "gpu", slice(0, source.randrange(PROMPT))
            case "everybody holds all":
                yield worker, "gpu", slice(0, PROMPT)
            case "one holds all, four random others each chunk":
                if worker == workers // 2:
                    yield worker, "gpu", slice(0, PROMPT)
                    for at in range(PROMPT):
                        for other in source.sample(range(workers), min(workers, 4)):
                            yield other, "gpu", slice(at, at + 1)
            case "everybody holds another length":
                yield worker, "gpu", slice(0, source.randrange(PROMPT))
            case "everybody holds another length, continued behind the gpu":
                length = source.randrange(PROMPT)
                yield worker, "gpu", slice(0, length)
                yield worker, "cpu", slice(length, source.randrange(length, PROMPT + 1))


KINDS = (
    "one holds all, all hold the first 16",
    "a tenth hold random lengths",
    "everybody holds all",
    "one holds all, four random others each chunk",
    "everybody holds another length",
    "everybody holds another length, continued behind the gpu",
)


def measure_lookups() -> list[dict[str, Any]]:
    results = []
    for workers in (2, 16, 1000):
        for kind in KINDS:
            index, prompt = Index(), fresh(PROMPT)
            names = [f"worker-{number}" for number in range(workers)]
            for name in names:
                index.open(name)
            for worker, tier, part in prompt_holdings(kind, workers, random.Random(5)):
                index.stored(names[worker], tier, prompt[part])
            for length in (4, PROMPT):
                asked = prompt[:length]
                figures = timed(lambda index=index, asked=asked, names=names: index.lookup(asked, names))
                results.append({"workers": workers, "chunks": length, "held": kind, **figures})
    return results


# The process that plays the workers.


def promised(worker: int) -> bytes:
    """The prompt that a worker holds all the time."""
    return random.Random(worker).randbytes(PROMPT * HASH_BYTES)


class PlayedWorker:
    """One worker's ledger and its connection."""

    def __init__(self, number: int, chunks: int) -> None:
        kept = promised(number)
        others = os.urandom((chunks - PROMPT) * HASH_BYTES)
        self.listing = kept + others
        self.oldest = deque(unpack(others))
        self.digest = RunningDigest()
        for chunk in unpack(self.listing):
            self.digest.add(chunk)

    def turn_over(self) -> bytes:
        """Frames for ``FRAME`` chunks gone and as many come."""
        gone = [self.oldest.popleft() for _ in range(FRAME)]
        come = fresh(FRAME)
        self.oldest.extend(come)
        for chunk in gone:
            self.digest.discard(chunk)
        for chunk in come:
            self.digest.add(chunk)
        return encode(Removed("gpu", pack(gone))) + encode(Stored("gpu", pack(come)))


async def play(workers: int, chunks: int, rate: int) -> None:
    played = [PlayedWorker(number, chunks) for number in range(workers)]
    waiting = iter(range(workers))
    writers: dict[int, asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(waiting, None)
        if number is None:
            os._exit(1)  # a stream was lost: there is nothing to measure
        await reader.read(4096)
        identity = Identity("weights", "bf16", "LBNHC", ())
        hello = Hello(f"epoch-{number}", "model", 256, 16, identity, [TierInfo("gpu", 2 * chunks, 1)])
        writer.write(encode(hello) + encode(Snapshot("gpu", played[number].listing)) + encode(SnapshotEnd()))
        await writer.drain()
        writers[number] = writer

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    while len(writers) < workers:
        for writer in writers.values():
            writer.write(beat())
        await asyncio.sleep(0.5)
    await publish(played, writers, rate)


def beat() -> bytes:
    return encode(Heartbeat(0, 0, 0, 0.5, 8000.0, {}, {}))


async def publish(played: list[PlayedWorker], writers: dict[int, asyncio.StreamWriter], rate: int) -> None:
    """Every worker in turn, at ``rate`` events a second all together; heartbeats each second, digests each five."""
    began, sent, number = time.monotonic(), 0, 0
    next_beats = dict.fromkeys(writers, 0.0)
    next_digests = {worker: began + worker * 5 / len(writers) for worker in writers}
    while True:
        now = time.monotonic()
        began = max(began, now - sent / rate - 0.1)  # what was missed is not made up for
        while sent < (now - began) * rate:
            writers[number].write(played[number].turn_over())
            sent += 2 * FRAME
            if now >= next_beats[number]:
                writers[number].write(beat())
                next_beats[number] = now + 1
            if now >= next_digests[number]:
                writers[number].write(encode(Digest({"gpu": played[number].digest.take()})))
                next_digests[number] = now + 5
            number = (number + 1) % len(writers)
        await asyncio.sleep(0.002)


# The router's side.


def make_worker(number: int, port: int) -> Worker:
    spec = WorkerSpec(url=f"http://127.0.0.1:{port}/{number}", reports=f"127.0.0.1:{port}", name=f"worker-{number}")
    return Worker(spec, Upstream(spec.title, spec.url, Timeouts(2, 2, 2)), Breaker(5, 5))


def start_watching(index: Index, followed: list[Worker]) -> list[asyncio.Task[None]]:
    turns = Turns()
    watchers = [
        Watcher(
            worker,
            index,
            turns,
            token="",
            heartbeat=10.0,
            most_chunks=4_000_000,
            admitted=lambda *_: None,
            lost=lambda _: None,
            rng=random.Random(1),
        )
        for worker in followed
    ]
    sweeper = Sweeper(index, audit_entries=20_000, wrong=lambda name: sys.exit(f"the audit found {name} wrong"))
    return [asyncio.create_task(work.run()) for work in (*watchers, sweeper)]


async def measure_ingest(port: int, workers: int, seconds: float) -> dict[str, Any]:
    index = Index()
    followed = [make_worker(number, port) for number in range(workers)]
    started, spent = time.monotonic(), time.process_time()
    tasks = start_watching(index, followed)
    while not all(worker.synced for worker in followed):  # noqa: ASYNC110 - plain state, nobody signals it
        await asyncio.sleep(0.1)
    listed = {"listing_s": round(time.monotonic() - started, 1), "listing_cpu_s": round(time.process_time() - spent, 1)}
    await asyncio.sleep(2)
    figures = await look_up_meanwhile(index, [worker.name for worker in followed], seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    mismatches = sum(worker.digest_mismatches for worker in followed)
    checked = sum(worker.digests_checked for worker in followed)
    return {
        "workers": workers,
        **listed,
        **figures,
        "digests_checked": checked,
        "digest_mismatches": mismatches,
        "relists": sum(sum(worker.relists.values()) for worker in followed),
        "rss_mib": round(resident() / 2**20),
    }


async def look_up_meanwhile(index: Index, names: list[str], seconds: float) -> dict[str, Any]:
    prompts = [unpack(promised(number)) for number in range(0, len(names), max(1, len(names) // 50))]
    counted = Counted(index)
    alone, with_wait, of_cpu = [], [], []
    began, spent, last = time.monotonic(), time.process_time(), counted.events
    due = time.perf_counter()
    while time.monotonic() - began < seconds:
        due += 0.005
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        started, cpu = time.perf_counter(), time.thread_time()
        hits = index.lookup(prompts[len(alone) % len(prompts)], names)
        ended, cpu = time.perf_counter(), time.thread_time() - cpu
        of_cpu.append(cpu)
        assert max(hit.total for hit in hits.values()) == PROMPT, "a prompt that is held was not found"
        alone.append(ended - started)
        with_wait.append(ended - due)
        due = max(due, ended)
    took = time.monotonic() - began
    return {
        "events_per_s": round((counted.events - last) / took),
        "cpu_share": round((time.process_time() - spent) / took, 2),
        "lookups": len(alone),
        "lookup": quantiles(alone),
        "lookup_cpu": quantiles(of_cpu),
        "lookup_and_wait_for_the_loop": quantiles(with_wait),
    }


class Counted:
    """Counts the chunks that go through an index."""

    def __init__(self, index: Index) -> None:
        self.events = 0
        index.stored = self._counting(index.stored)  # type: ignore[method-assign]
        index.removed = self._counting(index.removed)  # type: ignore[method-assign]

    def _counting(self, apply: Callable[[str, str, list[bytes]], None]) -> Any:
        def counted(worker: str, tier: str, chunks: list[bytes]) -> None:
            self.events += len(chunks)
            apply(worker, tier, chunks)

        return counted


def run_ingest(arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "play"]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("workers", "chunks", "rate")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as player:
        try:
            assert player.stdout is not None
            port = int(player.stdout.readline())
            return asyncio.run(measure_ingest(port, arguments.workers, arguments.seconds))
        finally:
            player.kill()


def run_memory(arguments: argparse.Namespace, sharing: str) -> Any:
    command = [sys.executable, __file__, "memory", f"--sharing={sharing}"]
    command += [f"--workers={arguments.workers}", f"--chunks={arguments.chunks}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="memory, lookup, ingest; default: all")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sharing", choices=SHARING, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.parts == ["play"]:
        asyncio.run(play(arguments.workers, arguments.chunks, arguments.rate))
        return
    if arguments.sharing:
        print(json.dumps(measure_memory(arguments.sharing, arguments.workers, arguments.chunks)))
        return
    parts = arguments.parts or ["memory", "lookup", "ingest"]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine}
    if "lookup" in parts:
        figures["lookup"] = measure_lookups()
        for row in figures["lookup"]:
            print(row, flush=True)
    if "memory" in parts:
        figures["memory"] = []
        for sharing in SHARING:
            figures["memory"].append(run_memory(arguments, sharing))
            print(figures["memory"][-1], flush=True)
    if "ingest" in parts:
        figures["ingest"] = run_ingest(arguments)
        print(json.dumps(figures["ingest"], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
