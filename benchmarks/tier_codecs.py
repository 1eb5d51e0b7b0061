"""How fast and how small the codecs of lower tiers are, on a real directory: docs/kv-codecs.md has the table.

    python benchmarks/tier_codecs.py [DIRECTORY] [--rounds 5] [--json benchmarks/results/tier_codecs.json]

Chunks of 256 tokens hold KV of a forward pass by a model with random weights (benchmarks/codecs.py). Each round writes them
from slots to a disk tier and fetches them into slots again, in every codec in turn, one job at a time: so many bytes of raw KV
per second of wall clock, encoding, compression, checksums and the disk together, by the tier's two threads. Medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.codecs import BLOCK_TOKENS, HEAD_SIZE, KV_HEADS, from_forward_pass
from worker_connector.chunk_object import Codec, Section
from worker_connector.kv_geometry import Part, SlotGeometry
from worker_connector.native import ElementType
from worker_connector.plan import Piece, TierJob
from worker_connector.slot_codec import SlotCodec
from worker_connector.tier_movers import Shape, Tier, TierMovers
from worker_connector.tiers.disk import DiskSettings, DiskStore

CODECS = ("raw", "exp12", "fp8", "k16v8", "int8", "lz4", "zstd", "exp12+lz4", "exp12+zstd", "fp8+zstd")
CHUNKS, CHUNK_TOKENS, REPEATS = 8, 256, 5


class Pace(NamedTuple):
    """MB of raw KV per second, and how many times smaller objects are."""

    written: float
    fetched: float
    ratio: float


def geometry(layers: int, blocks: int) -> SlotGeometry:
    half, page = HEAD_SIZE * 2, KV_HEADS * BLOCK_TOKENS * HEAD_SIZE * 4
    part = Part(
        group=0,
        places=tuple(layer * blocks * page for layer in range(layers)),
        block_stride=page,
        head_stride=BLOCK_TOKENS * 2 * half,
        token_stride=2 * half,
        blocks=blocks,
        heads=KV_HEADS,
        tokens=BLOCK_TOKENS,
        content_bytes=2 * half,
        element=ElementType.BF16,
        k=(0, half),
        v=(half, half),
    )
    return SlotGeometry((part,), (), (((0, page),),), layers * blocks * page)


def chunks_of(content: Any) -> Any:
    """Chunks as raw slots ``[chunk, byte]``: the model's layers several times, to be as large as those of real models."""
    per_chunk = CHUNK_TOKENS // BLOCK_TOKENS
    parts = content.split(per_chunk, 1)
    slots = [part.repeat(REPEATS, 1, 1, 1, 1).contiguous().view(torch.uint8).flatten() for part in parts]
    return torch.stack(slots).numpy()


class Bench:
    def __init__(self, slots: Any, directory: Path, name: str) -> None:
        count, size = slots.shape
        described = geometry(6 * REPEATS, CHUNK_TOKENS // BLOCK_TOKENS)
        assert described.payload_bytes == size
        self.memory = np.concatenate([slots, np.zeros_like(slots)])
        self.count, self.size = count, size
        section = Section(0, BLOCK_TOKENS, CHUNK_TOKENS // BLOCK_TOKENS, 0, size)
        shape = Shape(bytes(16), 0, 1, "LBHNC", "bfloat16", CHUNK_TOKENS, (section,), (False,), size)
        store = DiskStore(DiskSettings(directory=directory / name, max_bytes=4 << 30))
        assert store.wait_scanned(10)
        tier = Tier(store=store, codec=Codec.parse(name), takes_lossy=True)
        self.movers = TierMovers({"disk": tier}, memoryview(self.memory).cast("B"), size, shape, SlotCodec(described))

    def run(self, kind: str, first: int) -> tuple[float, int]:
        pieces = [Piece(bytes([at]) * 16, first + at) for at in range(self.count)]
        began = time.perf_counter()
        self.movers.submit([TierJob(1, "disk", kind, pieces, 60.0)])  # type: ignore[arg-type]
        while not self.movers.has_results:
            time.sleep(0.0002)
        seconds = time.perf_counter() - began
        (result,) = self.movers.take().values()
        assert not result.failed, result.failed
        return self.count * self.size / seconds / 1e6, result.nbytes

    def round(self) -> Pace:
        written, nbytes = self.run("write", 0)
        fetched, _ = self.run("fetch", self.count)
        return Pace(written, fetched, self.count * self.size / nbytes)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", nargs="?", type=Path)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for kind in ("llama", "qwen2"):
        slots = chunks_of(from_forward_pass(kind, CHUNKS * CHUNK_TOKENS))
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            benches = {name: Bench(slots, Path(folder), name) for name in CODECS}
            rounds = [{name: bench.round() for name, bench in benches.items()} for _ in range(given.rounds)]
            for bench in benches.values():
                bench.movers.close()
        for name in CODECS:
            columns = zip(*(each[name] for each in rounds), strict=True)
            pace = Pace(*(round(statistics.median(column), 3) for column in columns))
            found.setdefault(kind, {})[name] = pace._asdict()
            print(f"{kind:6} {name:11} {pace.written:7.0f} {pace.fetched:7.0f} MB/s, {pace.ratio:.3f} times smaller")
    if given.json:
        given.json.write_text(json.dumps({"chunk_bytes": int(slots.shape[1]), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
