"""The connector's copies between KV cache and CPU tier: native against the torch and numpy copies they replace.

    python -m benchmarks.movers [--pairs 15] [--prompts 12] [--json FILE]

First the copies alone: save and load of 20 chunks of 256 tokens in layout LBHNC (32 layers, blocks of 16 tokens), by page
size, with block tables in one run and scattered, on one thread and on two. Then one real vLLM engine (CPU build, in this
process) whose prompt of 5,000 tokens comes back from the CPU tier, copied now by the one, now by the other: the time to
the first token, and of it the time of the load itself. Everything is measured in pairs whose order alternates, and
reported as the median of the ratios: machines are noisy, ratios less so.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import ENVIRONMENT

CHUNKS, LAYERS, BLOCKS_PER_CHUNK = 20, 32, 16
PAGES = (4 << 10, 16 << 10, 64 << 10)
HELD = 768 << 20  # bytes of the slab, and of the cache
PROMPT_TOKENS = 5000


class Taken(NamedTuple):
    """Seconds: on the clock, and of all processors, which other programs disturb less."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def paired(pairs: int, works: Sequence[Callable[[int], Any]]) -> list[list[Taken]]:
    """Every work by turns, each round in the other order; a work gets the number of its round."""
    taken: list[list[Taken]] = [[] for _ in works]
    for pair in range(pairs + 1):
        for at in range(len(works)) if pair % 2 else reversed(range(len(works))):
            one = timed(partial(works[at], pair * len(works) + at))
            if pair:
                taken[at].append(one)
    return taken


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Bench:
    """A cache and a slab of one page size, with both kinds of copies. Both are larger than what processors keep near,
    and every round takes other slots and blocks, as in a server."""

    def __init__(self, page: int, threads: int) -> None:
        import torch  # noqa: PLC0415 - the environment has to be set before

        from tests.worker_connector.reference_copier import ReferenceCopier  # noqa: PLC0415
        from worker_connector.copier import Copier  # noqa: PLC0415
        from worker_connector.regions import Region, SlotLayout  # noqa: PLC0415
        from worker_connector.slab import Slab  # noqa: PLC0415

        self.slots = HELD // (page * LAYERS * BLOCKS_PER_CHUNK)
        self.blocks = self.slots * BLOCKS_PER_CHUNK
        regions = [Region(layer * self.blocks * page, page, page) for layer in range(LAYERS)]
        self.layout = SlotLayout([regions], [BLOCKS_PER_CHUNK])
        self.cache = torch.randint(0, 256, (LAYERS * self.blocks * page,), dtype=torch.uint8)
        self.slab = Slab(self.slots, self.layout.slot_bytes)
        assert self.slab.bytes is not None
        self.ours = Copier(self.cache, self.slab.bytes, self.layout, threads=threads)
        self.checked = Copier(self.cache, self.slab.bytes, self.layout, threads=threads, verify=True)
        self.theirs = ReferenceCopier(self.cache, self.slab.bytes, self.layout)
        self.shuffled = random.Random(1).sample(range(self.blocks), self.blocks)

    def spans(self, number: int, *, scattered: bool) -> list[Any]:
        """A round's chunks: slots that follow on those of the round before, blocks in one run or anywhere."""
        from worker_connector.plan import Span  # noqa: PLC0415

        table = self.shuffled if scattered else range(self.blocks)
        slots = [(number * CHUNKS + at) % self.slots for at in range(CHUNKS)]
        per = BLOCKS_PER_CHUNK
        return [Span(slot, 0, 0, list(table[slot * per : (slot + 1) * per])) for slot in slots]

    def native(self, number: int, *, scattered: bool, load: bool, checked: bool = False) -> None:
        copier = self.checked if checked else self.ours
        receipts = []
        for batch in copier.batches(self.spans(number, scattered=scattered)):
            receipts += copier.to_cache(batch) if load else copier.to_slab(batch)
        if load:
            assert not copier.damaged(receipts)
        else:
            copier.record(receipts)

    def reference(self, number: int, *, scattered: bool, load: bool) -> None:
        for span in self.spans(number, scattered=scattered):
            (self.theirs.to_cache if load else self.theirs.to_slab)(span)

    def memcpy(self, number: int, *, load: bool) -> None:
        """As many bytes, in one piece."""
        assert self.slab.bytes is not None
        size = CHUNKS * self.layout.slot_bytes
        at = number * size % (self.slab.bytes.numel() - size + 1)
        source, target = (self.slab.bytes, self.cache) if load else (self.cache, self.slab.bytes)
        target.numpy()[at : at + size] = source.numpy()[at : at + size]

    def fill(self) -> None:
        """Have every slot's checksums noted, in both kinds of tables."""
        for number in range(-(-self.slots // CHUNKS)):
            self.native(number, scattered=True, load=False, checked=True)


def measure_copies(pairs: int) -> list[dict[str, Any]]:
    rows = []
    for page in PAGES:
        for threads in (1, 2):
            bench = Bench(page, threads)
            for scattered in (False, True):
                for load in (False, True):
                    row = {"page_bytes": page, "threads": threads, "scattered": scattered, "load": load}
                    rows.append(row | measure_copy(bench, pairs, scattered=scattered, load=load))
                    print(row_text(rows[-1]), flush=True)
    return rows


def measure_copy(bench: Bench, pairs: int, *, scattered: bool, load: bool) -> dict[str, Any]:
    which = {"scattered": scattered, "load": load}
    bench.fill()
    theirs, ours, whole, checked = paired(
        pairs,
        [
            partial(bench.reference, **which),
            partial(bench.native, **which),
            partial(bench.memcpy, load=load),
            partial(bench.native, checked=True, **which),
        ],
    )
    nbytes = CHUNKS * bench.layout.payload_bytes
    cpu, wall = (
        [[getattr(one, name) for one in each] for each in (theirs, ours, whole, checked)] for name in ("cpu", "wall")
    )
    return {
        "faster_by_cpu": median_ratio(cpu[0], cpu[1]),
        "faster_by_clock": median_ratio(wall[0], wall[1]),
        "of_memcpy_by_cpu": median_ratio(cpu[2], cpu[1]),
        "verify_costs_by_cpu": median_ratio(cpu[3], cpu[1]) - 1,
        "gigabytes_per_second": nbytes / statistics.median(wall[1]) / 1e9,
    }


def row_text(row: dict[str, Any]) -> str:
    return (
        f"{row['page_bytes'] >> 10:3d} KiB pages, {'scattered' if row['scattered'] else 'in runs  '}, "
        f"{row['threads']} thread(s), {'load' if row['load'] else 'save'}: "
        "{faster_by_cpu:.2f}x by CPU time, {faster_by_clock:.2f}x by the clock of what it replaces; "
        "{of_memcpy_by_cpu:.2f}x of memcpy; {gigabytes_per_second:.1f} GB/s; verify +{verify_costs_by_cpu:.0%}".format(
            **row
        )
    )


class Engine:
    """An engine whose copies are now the one kind, now the other."""

    def __init__(self, model: str) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415
        from vllm.config import KVTransferConfig  # noqa: PLC0415
        from vllm.distributed.kv_transfer import kv_transfer_state  # noqa: PLC0415

        extra = {"cpu_bytes": 4 << 30, "report_port": 0, "load_or_compute": False}
        transfer = KVTransferConfig(
            kv_connector="WarmrouteConnector", kv_role="kv_both", kv_connector_extra_config=extra
        )
        self.llm = LLM(model, enforce_eager=True, block_size=32, max_model_len=8192, kv_transfer_config=transfer)
        state: Any = kv_transfer_state
        self.transfers: Any = state._KV_CONNECTOR_AGENT._worker._transfers  # noqa: SLF001 - vLLM has no other way
        self.native = self.transfers._copier  # noqa: SLF001 - the part that is exchanged
        self.replaced = replaced(self.native)
        self.one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self.several = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        self.source = random.Random(1)

    def generate(self, prompt: list[int]) -> Any:
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], self.one, use_tqdm=False)
        return output

    def warm(self, prompt: list[int], copier: Any) -> tuple[float, float]:
        """Seconds to the first token, and of the load, of a prompt that only the CPU tier has."""
        self.llm.reset_prefix_cache()
        self.transfers._copier = copier  # noqa: SLF001 - as above
        before = self.loading()
        began = time.perf_counter()
        output = self.generate(prompt)
        taken = time.perf_counter() - began
        assert output.num_cached_tokens >= len(prompt) // 256 * 256
        return taken, self.loading() - before

    def mix(self) -> None:
        """Serve requests of many lengths at once, as a server does: free blocks lie scattered from then on."""
        for _ in range(3):
            prompts = [
                [self.source.randrange(3, 4096) for _ in range(self.source.randrange(50, 1500))] for _ in range(24)
            ]
            self.llm.generate([{"prompt_token_ids": each} for each in prompts], self.several, use_tqdm=False)
        self.settle()

    def settle(self) -> None:
        """An engine in this process only steps while it serves: let it learn that the saves have ended."""
        time.sleep(0.1)
        self.generate([self.source.randrange(3, 4096) for _ in range(100)])

    def loading(self) -> float:
        from worker_connector import get_cache_stats  # noqa: PLC0415

        return float(get_cache_stats()["tiers"].get("cpu", {}).get("load_seconds", 0.0))


def replaced(native: Any) -> Any:
    """What copied before, behind the interface of what copies now."""
    from tests.worker_connector.reference_copier import ReferenceCopier  # noqa: PLC0415
    from worker_connector.copier import Copier  # noqa: PLC0415

    class Replaced(Copier):
        def to_cache(self, spans: Sequence[Any], stream: int = 0) -> list[Any]:
            del stream
            for span in spans:
                reference.to_cache(span)
            return []

        def to_slab(self, spans: Sequence[Any], stream: int = 0) -> list[Any]:
            del stream
            for span in spans:
                reference.to_slab(span)
            return []

    reference = ReferenceCopier(native._cache, native._slab, native._layout)  # noqa: SLF001 - the same memory
    return Replaced(native._cache, native._slab, native._layout)  # noqa: SLF001 - as above


def measure_engine(model: str, prompts: int) -> dict[str, float]:
    engine = Engine(model)
    engine.mix()
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(prompts):
        prompt = [engine.source.randrange(3, 4096) for _ in range(PROMPT_TOKENS)]
        engine.generate(prompt)
        engine.settle()
        for again in range(4):
            for native in (True, False) if (again + number) % 2 else (False, True):
                taken = engine.warm(prompt, engine.native if native else engine.replaced)
                if number:
                    seconds[native].append(taken)
    found = {}
    for at, name in enumerate(("first_token", "load")):
        ours, theirs = ([each[at] for each in seconds[native]] for native in (True, False))
        found |= {
            f"{name}_ms": statistics.median(ours) * 1e3,
            f"{name}_ms_replaced": statistics.median(theirs) * 1e3,
            f"{name}_faster": median_ratio(theirs, ours),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", choices=("copies", "engine"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "options": {key: str(value) for key, value in vars(arguments).items()},
    }
    if arguments.only != "engine":
        found["copies"] = measure_copies(arguments.pairs)
    if arguments.only != "copies":
        from router.demo_fleet import cpu_build_metadata  # noqa: PLC0415
        from router.demo_model import make_model  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as folder:
            sys.path += cpu_build_metadata(Path(folder)).split(os.pathsep)
            make_model(Path(folder) / "model", hidden_size=arguments.hidden_size, layers=arguments.layers)
            found["engine"] = measure_engine(str(Path(folder) / "model"), arguments.prompts)
        print(json.dumps(found["engine"], indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
