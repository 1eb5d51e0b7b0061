"""vLLM's own KVCacheManager driven directly, watched by a gpu tier: no engine, no model. Imports vLLM."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from kv_protocol.hashing import Media, chunk_hashes, root_hash
from worker_connector.eviction import POLICIES
from worker_connector.gpu_tier import GpuTier
from worker_connector.ledger import Ledger

BLOCK, CHUNK = 4, 16
MODEL = "m"

init_none_hash(sha256)
_hasher = get_request_block_hasher(BLOCK, sha256)


def full() -> Any:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)


def window() -> Any:
    return SlidingWindowSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=8)


def group(spec: Any) -> Any:
    return KVCacheGroupSpec(["layer"], spec)


class Bench:
    """A manager, the tier that watches it and a ledger; requests come and go as a scheduler makes them."""

    def __init__(
        self, *specs: Any, blocks: int = 200, events: bool = False, watch: bool = True, caching: bool = True
    ) -> None:
        groups = [KVCacheGroupSpec([f"layer{at}"], spec) for at, spec in enumerate(specs or (full(),))]
        self.config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(
            self.config,
            max_model_len=4096,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=caching,
            enable_kv_cache_events=events,
        )
        self.ledger = Ledger(POLICIES["lru"]())
        self.resets = 0
        self.prompts: list[tuple[Request, bytes, list[Media]]] = []
        self.running: list[Request] = []
        if watch:
            self.tier = GpuTier(self.manager, groups, chunk_size=CHUNK, model=MODEL, on_cleared=self.cleared)

    def cleared(self) -> None:
        self.resets += 1
        self.tier.drain(self.ledger)

    def admit(
        self,
        tokens: Sequence[int],
        *,
        salt: str | None = None,
        lora: str | None = None,
        media: Iterable[Media] = (),
        step: int = 1000,
        full_report: bool = False,
    ) -> Request | None:
        """Prefill a prompt in steps of so many tokens; None when it does not fit."""
        items = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=item.hash,
                mm_position=PlaceholderRange(offset=item.offset, length=item.length),
            )
            for item in media
        ]
        request = Request(
            f"request-{len(self.prompts)}",
            list(tokens),
            SamplingParams(max_tokens=8),
            None,
            cache_salt=salt,
            lora_request=LoRARequest(lora, 1, f"/adapters/{lora}") if lora else None,
            mm_features=items or None,
            block_hasher=_hasher,
        )
        request.kv_cache_report_mode = "full" if full_report else "incremental"
        root = root_hash(chunk_size=CHUNK, model=MODEL, lora=lora or "", cache_salt=salt or "")
        self.prompts.append((request, root, list(media)))
        hit_blocks, hits, *_ = self.manager.get_computed_blocks(request)
        first = True
        while request.num_computed_tokens < len(tokens):
            scheduled = min(step, len(tokens) - max(hits if first else 0, request.num_computed_tokens))
            allocated = (
                self.manager.allocate_slots(request, scheduled, hits, hit_blocks)
                if first
                else self.manager.allocate_slots(request, scheduled)
            )
            if allocated is None:
                self.manager.free(request)
                return None
            request.num_computed_tokens += scheduled + (hits if first else 0)
            first = False
        self.running.append(request)
        return request

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        self.manager.free(request)

    def drain(self) -> set[bytes]:
        """What the ledger holds after draining."""
        self.tier.drain(self.ledger)
        self.ledger.check()
        for group in self.tier._groups.values():
            group.check()
        return set(self.ledger.content()["gpu"])

    def held(self, groups: Sequence[int] = (0,)) -> set[bytes]:
        """Chunks whose every block the engine's own cache has, asked of the engine's own cache."""
        cached = self.manager.block_pool.cached_block_hash_to_block
        per_chunk, chunks = CHUNK // BLOCK, set()
        for request, root, media in self.prompts:
            tokens = list(request.all_token_ids)
            for at, chunk in enumerate(chunk_hashes(root, tokens, CHUNK, media=media)):
                names = request.block_hashes[at * per_chunk : (at + 1) * per_chunk]
                keys = [make_block_hash_with_group_id(name, group) for name in names for group in groups]
                if all(cached.get_one_block(key) is not None for key in keys):
                    chunks.add(chunk)
        return chunks
