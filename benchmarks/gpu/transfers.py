"""How fast each path is, as a ratio to one large copy of page-locked memory in the same run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measure import GIB, Memory, apart, llama, once, pages, rotation, seconds, spans
from worker_connector import native
from worker_connector.native_types import Encoding, Route

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 32 * MIB
PAGES = [4 * KIB << step for step in range(10)]
BLOCKS = (2, 4, 8, 12, 16, 32)
WAYS = {
    "copy engine": (Route.COPY_ENGINE, 16),
    "staged": (Route.STAGED, 16),
    **{f"kernel, {blocks} blocks": (Route.KERNEL, blocks) for blocks in BLOCKS},
}
"""What a sweep measures: the route, and how many thread blocks it may use."""


class Bench:
    """Measurements on one device. ``peak`` has bytes per second of the large copies."""

    def __init__(self, device: Any, size: int) -> None:
        self.device = torch.device(device)
        self.memory = Memory.of(size, self.device)
        self.stream = torch.cuda.Stream(self.device)
        self.other = torch.cuda.Stream(self.device)
        self.peak: dict[str, float] = {}

    def move(
        self, context: native.Context, view: Any, blocks: list[int], load: bool, packed: Any, **more: Any
    ) -> Callable[[], None]:
        """One call for all blocks. Their ids are ready for it: making an array of a list is not what is measured."""
        call, ids = context.scatter if load else context.gather, np.asarray(blocks, np.int32)
        return lambda: call(view, ids, packed, stream=self.stream.cuda_stream, **more)

    def rate(self, nbytes: int, work: Callable[[], None], rounds: int = 5) -> float:
        return nbytes / seconds(self.stream, work, rounds=rounds)

    # ---- one large copy ---------------------------------------------------------------------------------------

    def large_copies(self) -> dict[str, float]:
        """GB/s of one copy of 1 GiB in each direction, and of both at once."""
        size = min(GIB, self.memory.host.numel() // 2)
        there, here = self.memory.cache[:size], self.memory.host[:size]
        there_too, here_too = self.memory.cache[size : 2 * size], self.memory.host[size : 2 * size]
        # The link and the clocks wake up first.
        seconds(self.stream, lambda: there.copy_(here, non_blocking=True), rounds=5)
        self.peak["load"] = self.rate(size, lambda: there.copy_(here, non_blocking=True))
        self.peak["save"] = self.rate(size, lambda: here.copy_(there, non_blocking=True))

        def both() -> None:
            with torch.cuda.stream(self.other):
                self.other.wait_stream(self.stream)
                here_too.copy_(there_too, non_blocking=True)
            there.copy_(here, non_blocking=True)
            self.stream.wait_stream(self.other)

        self.peak["both"] = self.rate(2 * size, both)
        return {name: value / 1e9 for name, value in self.peak.items()}

    # ---- pages ------------------------------------------------------------------------------------------------

    def sweep(self, route: Route, blocks: int) -> list[dict[str, Any]]:
        """Pages of 4 KiB to 2 MiB, few and many, one way with so many thread blocks."""
        with native.Context(self.device, threads=blocks, route=route) as context:
            return [
                self._page_row(context, (route, blocks), page, total, load=load)
                for page in PAGES
                for total in (16 * MIB, 256 * MIB)
                for load in (True, False)
            ]

    def _page_row(
        self, context: native.Context, way: tuple[Route, int], page: int, total: int, *, load: bool
    ) -> dict[str, Any]:
        (route, blocks), count = way, total // page
        # Small pages are those of many layers.
        layers = next((each for each in (32, 16) if count >= 2048 and count % each == 0), 1)
        packed = spans(self.memory, [total], count // layers)
        view = pages(self.memory, page, count // layers, layers)
        work = self.move(context, view, apart(count // layers), load, packed)
        rate = self.rate(total, work, rounds=3)
        direction = "load" if load else "save"
        return {
            "path": route.name.lower(),
            "thread_blocks": blocks if route != Route.COPY_ENGINE else 0,
            "page": page,
            "pages": count,
            "layers": layers,
            "direction": direction,
            "gbps": rate / 1e9,
            "ratio": rate / self.peak[direction],
        }

    def many_pages(self) -> list[dict[str, Any]]:
        """64 KiB pages in the number that engines are judged by: 50,000, or as many as fit."""
        count = min(50_000, self.memory.host.numel() // (64 * KIB))
        with native.Context(self.device, route=Route.COPY_ENGINE) as context:
            return [
                self._page_row(context, (Route.COPY_ENGINE, 0), 64 * KIB, count * 64 * KIB, load=load)
                for load in (True, False)
            ]

    def both_ways(self) -> dict[str, float]:
        """Loads and saves at once, as the worker half does, of Llama's pages: GB/s together, and of the large copies."""
        view = llama(self.memory, 256)
        first, second = np.arange(128, dtype=np.int32), np.arange(128, 256, dtype=np.int32)
        half = 8 * CHUNK
        packed = [(self.memory.host.data_ptr() + at * half, half, 128, 0, 128, 0) for at in range(2)]
        with native.Context(self.device) as loads, native.Context(self.device) as saves:
            loads.calibrate()
            saves.calibrate()

            def work() -> None:
                self.other.wait_stream(self.stream)
                saves.gather(view, second, packed[1:], stream=self.other.cuda_stream)
                loads.scatter(view, first, packed[:1], stream=self.stream.cuda_stream)
                self.stream.wait_stream(self.other)

            rate = self.rate(2 * half, work)
        return {"gbps": rate / 1e9, "ratio": rate / self.peak["both"]}

    # ---- chunks of a model ------------------------------------------------------------------------------------

    def chunks(
        self, encoding: int, load: bool, route: Route = Route.AUTO, count: int = 8, **more: Any
    ) -> dict[str, Any]:
        """Chunks of 256 tokens of Llama-3.1-8B in one call: seconds per chunk, and GB/s of what they hold unencoded."""
        view = llama(self.memory, 16 * count)
        with native.Context(self.device, route=route) as context:
            size = context.unit_bytes(view, encoding) * 8 * 16 * 32
            packed = spans(self.memory, [size] * count, 16)
            blocks = apart(16 * count)
            context.gather(view, blocks, packed, encoding=encoding, stream=self.stream.cuda_stream)
            context.finish(self.stream.cuda_stream)
            if more.pop("sums", False):
                more["checksums"] = torch.empty(16 * count * 32, dtype=torch.int64, pin_memory=True)
            work = self.move(context, view, blocks, load, packed, encoding=encoding, **more)
            taken = seconds(self.stream, work)
            context.finish(self.stream.cuda_stream)
        direction = "load" if load else "save"
        rate = count * CHUNK / taken
        return {
            "ms_per_chunk": taken / count * 1e3,
            "gbps": rate / 1e9,
            "ratio": rate / self.peak[direction],
            "bytes_per_chunk": size,
        }

    def encodings(self) -> dict[str, Any]:
        """Every encoding end to end, both ways; rotation and checksums against a plain scatter by the same kernel."""
        found: dict[str, Any] = {}
        for encoding in (Encoding.RAW, Encoding.FP8, Encoding.EXP12, Encoding.K16_V8, Encoding.INT8):
            for load in (True, False):
                found[f"{encoding.name.lower()} {'load' if load else 'save'}"] = self.chunks(int(encoding), load)
        raw = int(Encoding.RAW)
        found["plain scatter"] = self.chunks(raw, True, Route.KERNEL)
        found["scatter with rotation"] = self.chunks(raw, True, Route.KERNEL, rotation=rotation(1000))
        found["scatter with checksums"] = self.chunks(raw, True, Route.KERNEL, sums=True)
        return found

    # ---- what the model feels ---------------------------------------------------------------------------------

    def slowdown(self, size: int = 8192) -> dict[str, Any]:
        """A bf16 product of two ``size`` by ``size`` matrices, alone and beside transfers on each path."""
        one, two = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        into = torch.empty_like(one)
        compute = torch.cuda.Stream(self.device)
        product = lambda: torch.mm(one, two, out=into)  # noqa: E731 - named where it is used
        alone = seconds(compute, product, rounds=15, warm=5)
        found: dict[str, Any] = {"alone_ms": alone * 1e3, "tflops": 2 * size**3 / alone / 1e12}
        for name, route, load in (
            ("loads by copy engine", Route.COPY_ENGINE, True),
            ("loads by kernel", Route.KERNEL, True),
            ("saves by copy engine", Route.COPY_ENGINE, False),
            ("saves staged", Route.STAGED, False),
        ):
            beside = self._beside(compute, product, route, load)
            found[name] = beside / alone if beside is not None else None
        return found

    def _beside(self, compute: Any, product: Callable[[], Any], route: Route, load: bool) -> float | None:
        """Seconds of a product while transfers never cease; None if they always did."""
        view = llama(self.memory, 128)
        with native.Context(self.device, route=route) as context:
            work = self.move(context, view, apart(128), load, spans(self.memory, [8 * CHUNK], 128))
            once(self.stream, work)
            taken = []
            for _ in range(4):
                for _ in range(4):
                    work()
                time.sleep(0.001)
                began = [once(compute, lambda: [product() for _ in range(3)] and None) / 3]
                if not self.stream.query():
                    taken += began
                self.stream.synchronize()
        return statistics.median(taken) if taken else None
