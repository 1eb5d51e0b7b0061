"""The worker half's transfers on real memory, without an engine: save, evict, load, while a "forward" keeps overwriting
blocks the moment they are free. On a GPU everything runs at once: the forward on its stream, saves and loads on theirs."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the worker half needs torch")

from worker_connector.copier import Copier  # noqa: E402
from worker_connector.movers import CudaStream, Stream, Transfers, stream_for  # noqa: E402
from worker_connector.plan import LoadJob, SaveJob, Span, WorkerReport  # noqa: E402
from worker_connector.regions import Region, SlotLayout  # noqa: E402
from worker_connector.slab import Slab  # noqa: E402

ROUNDS = int(os.environ.get("WARMROUTE_MOVER_ROUNDS", "0"))
LAYERS, BLOCKS, PER_CHUNK, SLOTS = 6, 192, 8, 12
PAGES = {"small pages": 4096, "large pages": 65536}
DEADLINE = 30.0
FIRST, SECOND = 0x5851F42D4C957F2D, 0x14057B7EF767814F
LATE_CYCLES = 300_000  # of the GPU's clock: some tenths of a millisecond


@dataclass
class Held:
    """Blocks and what is, or was, in them."""

    chunk: int
    slot: int
    blocks: list[int]


class Cycles:
    """One worker. ``wrong`` counts, on the device, the words that loads brought and that are not those saved."""

    def __init__(self, device: Any, page: int, *, make_stream: Callable[[], Stream], verify: bool = False) -> None:
        self.device = torch.device(device)
        self.page = page
        size = LAYERS * BLOCKS * page
        self.cache = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.pages = self.cache.view(torch.int64).view(LAYERS, BLOCKS, page // 8)
        self.regions = SlotLayout([[Region(layer * BLOCKS * page, page, page) for layer in range(LAYERS)]], [PER_CHUNK])
        self.slab = Slab(SLOTS, self.regions.slot_bytes, device=self.device)
        assert self.slab.bytes is not None
        copier = Copier(self.cache, self.slab.bytes, self.regions, verify=verify)
        self.transfers = Transfers(copier, make_stream)
        words = LAYERS * PER_CHUNK * (page // 8)
        self.pattern = torch.arange(words, device=self.device).view(LAYERS, PER_CHUNK, page // 8) * FIRST
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.forward = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.weight = torch.rand(1024, 1024, device=self.device) if self.forward else None
        if self.forward is not None:
            torch.cuda.synchronize()  # all of this was made on another stream than it is used on
        self.free = set(range(BLOCKS))
        self.saves: dict[int, Held] = {}
        self.loads: dict[str, Held] = {}
        self.ready: dict[int, int] = {}
        self.report = WorkerReport()
        self.serial = self.loaded = self.saved = 0
        self.random = random.Random(page)

    def content(self, chunk: int) -> Any:
        return self.pattern ^ (chunk * SECOND % (1 << 62))

    def compute(self) -> None:
        """What makes the forward late, so that nobody is right by luck. It takes longer than a mover needs to wake up."""
        if self.weight is not None:
            torch.cuda._sleep(1 + self.random.randrange(4) * LATE_CYCLES)
            torch.mm(self.weight, self.weight)

    def index(self, blocks: list[int]) -> Any:
        """Block ids to index with. On a GPU, a list would be copied there at once: the host would wait for the forward, and
        the forward would never be late."""
        if self.forward is None:
            return blocks
        return torch.tensor(blocks, pin_memory=True).to(self.device, non_blocking=True)

    def overwrite(self, blocks: list[int]) -> None:
        """Another request's tokens."""
        self.serial += 1
        self.pages[:, self.index(blocks)] = self.serial * SECOND % (1 << 62)

    def take(self, count: int) -> list[int]:
        taken = self.random.sample(sorted(self.free), count)
        self.free -= set(taken)
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self.overwrite(blocks)
        self.free |= set(blocks)

    def begin_save(self) -> None:
        used = set(self.ready) | {each.slot for each in (*self.saves.values(), *self.loads.values())}
        slots = sorted(set(range(SLOTS)) - used)
        if not slots or len(self.free) < PER_CHUNK:
            return
        self.serial += 1
        held = Held(self.serial, slots[0], self.take(PER_CHUNK))
        self.compute()
        self.pages[:, self.index(held.blocks)] = self.content(held.chunk)
        self.saves[held.chunk] = held
        self.transfers.save(SaveJob(held.chunk, [Span(held.slot, 0, 0, held.blocks)]))

    def reuse(self) -> None:
        """Give some blocks of a save to another request at once: settle, then overwrite."""
        for job, held in list(self.saves.items()):
            if held.blocks and self.random.random() < 0.5:
                self.transfers.settle([job])
                self.give_back(held.blocks)
                held.blocks = []

    def begin_load(self) -> None:
        busy = {each.slot for each in self.loads.values()}
        slots = sorted(set(self.ready) - busy)
        if not slots or len(self.free) < PER_CHUNK:
            return
        self.serial += 1
        slot = self.random.choice(slots)
        held = Held(self.ready[slot], slot, self.take(PER_CHUNK))
        self.compute()
        self.overwrite(held.blocks)
        self.loads[str(self.serial)] = held
        self.transfers.load([LoadJob(str(self.serial), [Span(slot, 0, 0, held.blocks)], DEADLINE, held.blocks)])

    def evict(self) -> None:
        busy = {each.slot for each in self.loads.values()}
        for slot in sorted(set(self.ready) - busy):
            if self.random.random() < 0.15:
                del self.ready[slot]

    def collect(self) -> None:
        finished, failed = self.transfers.take()
        assert not failed
        for request in sorted(finished):
            held = self.loads.pop(request)
            self.wrong += (self.pages[:, self.index(held.blocks)] != self.content(held.chunk)).sum()
            self.loaded += 1
            self.give_back(held.blocks)
        report = self.transfers.take_report()
        assert not report.failed_saves
        assert not report.damaged
        for job in report.saved:
            held = self.saves.pop(job)
            self.ready[held.slot] = held.chunk
            self.saved += 1
            if held.blocks:
                self.give_back(held.blocks)

    def step(self) -> None:
        self.collect()
        self.begin_save()
        self.begin_load()
        self.reuse()
        self.evict()
        while len(self.loads) + len(self.saves) > 8:
            self.wait()

    def wait(self) -> None:
        time.sleep(0.00005)
        self.collect()

    def run(self, rounds: int) -> int:
        """Words that were wrong."""
        on_stream = torch.cuda.stream(self.forward) if self.forward is not None else _nothing()
        with on_stream:
            for _ in range(rounds):
                self.step()
            deadline = time.monotonic() + DEADLINE
            while (self.loads or self.saves) and time.monotonic() < deadline:
                self.wait()
            assert not self.loads
            assert not self.saves
            return int(self.wrong.item())

    def close(self) -> None:
        assert self.transfers.close()
        self.slab.close()


class _nothing:  # noqa: N801 - as a context manager is called
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def rounds_of(device: str) -> int:
    return ROUNDS or (10_000 if device == "cuda" else 250)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.timeout(480)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pages", PAGES)
def test_no_byte_is_ever_wrong(device: str, pages: str) -> None:
    rounds = rounds_of(device) // (2 if device == "cuda" or pages == "small pages" else 10)
    cycles = Cycles(device, PAGES[pages], make_stream=lambda: stream_for(torch.device(device)))
    try:
        began = time.monotonic()
        assert cycles.run(rounds) == 0
        print(f"{rounds} rounds, {cycles.saved} saves, {cycles.loaded} loads: {time.monotonic() - began:.1f} s")
        assert cycles.loaded > rounds / 4
        assert cycles.saved > rounds / 20
    finally:
        cycles.close()


@pytest.mark.parametrize("device", DEVICES)
def test_checksums_agree_along_the_way(device: str) -> None:
    cycles = Cycles(device, 4096, make_stream=lambda: stream_for(torch.device(device)), verify=True)
    try:
        assert cycles.run(rounds_of(device) // 20) == 0
    finally:
        cycles.close()


class Hasty(CudaStream):
    """Copies that do not wait for the forward."""

    def begin(self, after: Any) -> None:
        del after
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: without one, nothing runs late")
def test_a_missing_wait_is_seen() -> None:
    cycles = Cycles("cuda", 4096, make_stream=lambda: Hasty(torch.device("cuda")))
    try:
        assert cycles.run(500) > 0
    finally:
        cycles.close()


def test_a_wrong_byte_is_seen() -> None:
    cycles = Cycles("cpu", 4096, make_stream=Stream)
    try:
        assert cycles.slab.bytes is not None
        cycles.run(50)
        assert cycles.ready
        slot = next(iter(cycles.ready))
        cycles.slab.bytes[slot * cycles.regions.slot_bytes + 77] ^= 1
        cycles.ready = {slot: cycles.ready[slot]}
        cycles.begin_load()
        assert cycles.run(0) == 1
    finally:
        cycles.close()
