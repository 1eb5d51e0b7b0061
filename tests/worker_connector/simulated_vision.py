"""A stand-in for what vLLM does with an encoder cache connector: its encoder cache manager is the real one, ranks and model
are not. What a request finds in a rank's encoder cache is compared with what the encoder makes."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from worker_connector.slab import Slab
from worker_connector.vision_cache_plan import VisionReport
from worker_connector.vision_cache_scheduler import VisionScheduler
from worker_connector.vision_cache_worker import VisionRank

CPU = torch.device("cpu")
WIDTH = 64


class PlainSlab(Slab):
    """Memory without the native library."""

    def __init__(self, slots: int, slot_bytes: int, **_: Any) -> None:
        self.bytes = torch.zeros(slots * slot_bytes, dtype=torch.uint8)


def digest(item: int) -> str:
    """What vLLM calls an item after its content."""
    return hashlib.sha256(str(item).encode()).hexdigest()


def output_of(item: int, weights: int = 0) -> torch.Tensor:
    """What the encoder makes of an item; sizes differ."""
    return torch.arange((item % 5 + 1) * WIDTH, dtype=torch.float32).view(-1, WIDTH) + item * 1000 + weights


def request_of(name: str, *items: int, embeds: int | None = None) -> Any:
    features, offset = [], 0
    for item in items:
        length = embeds or item % 5 + 1
        position = SimpleNamespace(offset=offset, length=length, get_num_embeds=lambda length=length: length)
        features.append(SimpleNamespace(identifier=digest(item), modality="image", mm_position=position, item=item))
        offset += length
    return SimpleNamespace(
        request_id=name,
        mm_features=features,
        get_num_encoder_embeds=lambda index: features[index].mm_position.get_num_embeds(),
    )


@dataclass
class Rank:
    """One rank with its encoder cache. ``fails`` makes saves fail, ``late`` keeps its reports back."""

    half: VisionRank
    cache: dict[str, torch.Tensor] = field(default_factory=dict)
    fails: bool = False
    reports: list[VisionReport] = field(default_factory=list)


class Engine:
    """Steps of an engine with ``ranks`` ranks and ``slots`` embeddings of room in vLLM's own encoder cache."""

    def __init__(self, scheduler: VisionScheduler, *, size: int, ranks: int = 1, slots: int = 12) -> None:
        from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

        self.scheduler = scheduler
        self.manager = EncoderCacheManager(slots)
        self.ranks = [Rank(VisionRank(size, CPU, PlainSlab)) for _ in range(ranks)]
        self.weights = 0
        self.encoded = 0

    def step(self, *requests: Any, tokens: bool = True, preempted: frozenset[str] = frozenset()) -> None:
        """Schedule these requests whole, run the ranks and end the requests. Of ``preempted`` ones the encoder is not run,
        unless a load was planned for them."""
        encode: dict[str, list[int]] = {}
        for request in requests:
            self.scheduler.expect(request, 0)
            self._schedule(request, encode, is_preempted=request.request_id in preempted)
        output = SimpleNamespace(
            total_num_scheduled_tokens=int(tokens),
            scheduled_encoder_inputs=encode,
            free_encoder_mm_hashes=self.manager.get_freed_mm_hashes(),
        )
        plan = self.scheduler.plan(output)
        for rank in self.ranks:
            self._run(rank, plan, output, requests, preempted)
        for request in requests:
            self.manager.free(request)

    def absorb(self) -> None:
        """Hand over what the ranks reported so far."""
        whole = VisionReport()
        for rank in self.ranks:
            for report in rank.reports:
                whole.merge(report)
            rank.reports.clear()
        if whole:
            self.scheduler.absorb(whole)

    def reset(self) -> None:
        """Other weights: vLLM's encoder cache is emptied on both sides."""
        self.weights += 1
        self.manager.reset()
        self.scheduler.reset(also_loads=True)
        for rank in self.ranks:
            rank.cache.clear()

    def _schedule(self, request: Any, encode: dict[str, list[int]], *, is_preempted: bool) -> None:
        for index, feature in enumerate(request.mm_features):
            if self.manager.check_and_update_cache(request, index):
                continue
            if not self.manager.can_allocate(request, index, 1 << 30, 0):
                continue
            is_load = self.scheduler.has(feature.identifier)
            self.manager.allocate(request, index)
            self.scheduler.allocated(request, index)
            if not is_load and not is_preempted:
                encode.setdefault(request.request_id, []).append(index)

    def _run(self, rank: Rank, plan: Any, output: Any, requests: Any, preempted: frozenset[str]) -> None:
        for identifier in output.free_encoder_mm_hashes:
            rank.cache.pop(identifier, None)
        if not output.total_num_scheduled_tokens:
            return
        rank.half.begin(plan, rank.cache)
        for request in requests:
            for index in output.scheduled_encoder_inputs.get(request.request_id, ()):
                self._encode(rank, request.mm_features[index])
        for request in requests:
            if request.request_id not in preempted:
                self._look(rank, request)
        if (report := rank.half.take_report()) is not None:
            rank.reports.append(report)

    def _encode(self, rank: Rank, feature: Any) -> None:
        self.encoded += 1
        rank.cache[feature.identifier] = output_of(feature.item, self.weights)
        if rank.fails:
            rank.half.save({}, feature.identifier)
        else:
            rank.half.save(rank.cache, feature.identifier)

    def _look(self, rank: Rank, request: Any) -> None:
        for index in self.manager.get_cached_input_ids(request):
            feature = request.mm_features[index]
            if feature.identifier in rank.cache or self.manager.cached.get(feature.identifier):
                assert torch.equal(rank.cache[feature.identifier], output_of(feature.item, self.weights))
