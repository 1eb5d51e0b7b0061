"""What was sent to workers that do not say what they hold: knowledge of last resort.

A prompt that was sent to an engine is in its prefix cache until others have pushed it out. So its chunks count as held by
the worker, as many of the latest as its cache has room for. Nobody confirms that: other routers' requests push out too,
and a worker that reuses less than this promises loses trust like any other.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from router.config import WorkerSpec
from router.errors import UpstreamError
from router.index import Index
from router.upstream import Upstream
from router.workers import Worker

CHUNK_TOKENS = 256
"""Size of the chunks that are made of the prompts, where the engine's blocks divide it."""
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{.*\} .*$", re.MULTILINE)
_METRICS_TIMEOUT_S = 5.0
_LARGEST_BLOCK = 1 << 20


class EngineCache(msgspec.Struct, frozen=True):
    """An engine's prefix cache. ``block_size`` in tokens; ``tokens`` is its room, 0 where it keeps none."""

    block_size: int
    tokens: int

    @property
    def chunk_size(self) -> int:
        """Tokens of the chunks made of its blocks: a multiple of theirs."""
        return max(self.block_size, CHUNK_TOKENS // self.block_size * self.block_size)


async def ask_cache(upstream: Upstream, spec: WorkerSpec, unsaid: int) -> EngineCache:
    """What an engine's metrics say of its prefix cache; ``unsaid`` tokens where they say nothing."""
    unknown = EngineCache(16, unsaid)
    try:
        answer = await upstream.fetch("GET", "/metrics", timeout=_METRICS_TIMEOUT_S)
    except UpstreamError:
        return unknown
    return read_cache(answer.body.decode("utf-8", "replace"), spec.rank or 0) or unknown


def read_cache(metrics: str, rank: int = 0) -> EngineCache | None:
    """``vllm:cache_config_info`` of an engine's ``/metrics``; None where it is missing or not understood."""
    lines = _CACHE_INFO.findall(metrics)
    try:
        families = [family for line in lines for family in text_string_to_metric_families(line + "\n")]
    except ValueError:
        return None
    samples = [sample for family in families for sample in family.samples]
    if not samples:
        return None
    labels: Mapping[str, str] = next(
        (s.labels for s in samples if s.labels.get("engine") == str(rank)), samples[0].labels
    )
    if labels.get("enable_prefix_caching") == "False":
        return EngineCache(16, 0)
    try:
        size, blocks = int(labels["block_size"]), int(labels["num_gpu_blocks"])
    except (KeyError, ValueError):
        return None
    return EngineCache(size, size * blocks) if 0 < size <= _LARGEST_BLOCK and blocks > 0 else None


class SentMemory:
    """Writes to the index what was sent to workers that do not report, as their ``gpu`` tier."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def begin(self, worker: Worker) -> None:
        """Nothing is known of a worker's cache from now on but what is sent there."""
        if worker.gone:
            return  # its name may be another's
        self._held[worker.name] = OrderedDict()
        self._index.drop(worker.name)
        self._index.open(worker.name)

    def forget(self, worker: Worker) -> None:
        """Another source tells of a worker's cache, and the index is that one's; or the worker is gone."""
        self._held.pop(worker.name, None)

    def sent(self, worker: Worker, prompts: Sequence[Sequence[bytes]]) -> list[bytes]:
        """A request with prompts of these chunks goes to a worker; the chunks that were not known there before. O(chunks)."""
        if worker.name not in self._held:
            self.begin(worker)
        held = self._held[worker.name]
        fresh: list[bytes] = []
        for chunks in prompts:
            for chunk in reversed(chunks):  # an engine drops a prompt's end before its beginning
                if chunk not in held:
                    fresh.append(chunk)
                    held[chunk] = None
                else:
                    held.move_to_end(chunk)
            self._index.stored(worker.name, "gpu", chunks)
        self._make_room(worker, held)
        return fresh

    def unsent(self, worker: Worker, chunks: Sequence[bytes]) -> None:
        """A request failed, was refused or given up before it was answered: what ``sent`` gave for it is not held.
        O(chunks)."""
        held = self._held.get(worker.name)
        if held is None or worker.gone:
            return
        for chunk in chunks:
            held.pop(chunk, None)
        self._index.removed(worker.name, "gpu", chunks)

    def _make_room(self, worker: Worker, held: OrderedDict[bytes, None]) -> None:
        excess = len(held) - worker.assumed_chunks
        if excess > 0:
            self._index.removed(worker.name, "gpu", [held.popitem(last=False)[0] for _ in range(excess)])
