"""The half of the connector that runs beside the model: one per rank, with its slab and its movers."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_protocol.hashing import HASH_BYTES
from worker_connector.chunk_object import ObjectKey
from worker_connector.comparer import Comparer, dtype_of
from worker_connector.config import STAGING_CHUNKS, ConnectorConfig
from worker_connector.copier import Copier
from worker_connector.errors import NativeUnavailable, UnsupportedCache
from worker_connector.geometry import Group, describe_groups
from worker_connector.movers import Transfers, stream_for
from worker_connector.placement import node_of_cpus, node_of_gpu
from worker_connector.plan import SaveJob, StepPlan, TierResult, WorkerReport
from worker_connector.regions import SlotLayout, group_regions
from worker_connector.shape import shape_of
from worker_connector.slab import Slab
from worker_connector.tails import runs_of
from worker_connector.tier_movers import TierMovers
from worker_connector.tier_stores import announce, divided, open_stores, slot_codec_of, tiers_of

IDLE_WAIT_SECONDS = 0.005
"""How long a step without a forward waits for loads, so that they are reported in it and not in a later one."""

STORES_SECONDS = 1.0
"""So often does a rank look whether the state of its stores is to be told."""

_log = logging.getLogger("vllm.warmroute.worker")


@dataclass(slots=True)
class LoadResults:
    """Requests whose loads ended, those of them that failed, and the blocks that failed loads leave undefined."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class WorkerHalf:
    """One rank's part. Until ``register`` it has no slots; it keeps none when the KV cache cannot be stored.

    ``make_copier`` stands in for ``Copier`` where a test wants copies that go wrong. Without a ``vllm_config`` there
    are no lower tiers.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        cache: Any,
        parallel: Any,
        make_copier: Callable[..., Copier] = Copier,
        vllm_config: Any = None,
    ) -> None:
        self.slots = 0
        self.objects: ObjectKey | None = None
        """What this rank's objects in lower tiers are called, here that of a chunk of zeros."""
        self._vllm_config = vllm_config
        self._tiers: TierMovers | None = None
        self._refused: dict[int, TierResult] = {}
        self._stores: dict[str, dict[str, Any]] = {}
        self._stores_due = 0.0
        self._config = config
        self._cache = cache
        self._parallel = parallel
        self._ranks: int = parallel.world_size
        self._make_copier = make_copier
        self._slab: Slab | None = None
        self._transfers: Transfers | None = None
        self._timed_step = 0
        self._due: SaveJob | None = None
        self._targets: dict[str, Sequence[int]] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's KV cache tensors and allocate the slab.

        Raises:
            ConfigurationError: chunk size or CPU tier size do not fit this engine.
            NativeUnavailable: there is a CPU tier to keep, and no native library that could copy to it.
        """
        try:
            self._allocate(kv_caches)
        except UnsupportedCache as reason:
            # What the description of the cache tells, the scheduler half says once per engine; what only its memory
            # tells, nobody else sees.
            _log.warning("This rank has no CPU tier: %s", reason)

    def settle(self, plan: StepPlan) -> None:
        """Before anything writes to reallocated blocks: finish the saves that read them."""
        due, self._due = self._due, plan.save
        if self._transfers is None or (due is None and not plan.settle):
            return
        if due is not None:
            # With draft models, pipeline ranks before the last are never told that the step's forward is done.
            self._transfers.save(due)
        if plan.settle:
            self._transfers.settle(plan.settle)

    def load(self, plan: StepPlan) -> None:
        """Begin the step's loads and transfers of lower tiers; in a step without a forward, wait for a moment."""
        if plan.tiers:
            self._submit(plan)
        if self._transfers is None or not (plan.loads or plan.idle):
            return
        for job in plan.loads:
            self._targets[job.request_id] = job.blocks
        self._transfers.load(plan.loads)
        if plan.idle:
            self._transfers.wait_for_loads(IDLE_WAIT_SECONDS)
            if self._tiers is not None:
                self._tiers.wait_for_fetches(IDLE_WAIT_SECONDS)

    def save(self, plan: StepPlan) -> None:
        """After the forward: begin the step's saves; without ``async_write``, end them too."""
        self._timed_step = plan.step
        self._due = None
        if self._transfers is not None and plan.save is not None:
            self._transfers.save(plan.save)
            if not self._config.async_write:
                self._transfers.settle([plan.save.job])

    def take_results(self) -> LoadResults | None:
        """What became of loads since the last call, None where none ended. Each load is named once."""
        if self._transfers is None or not self._transfers.has_results:
            return None
        finished, failed = self._transfers.take()
        blocks = {request_id: self._targets.pop(request_id, ()) for request_id in finished}
        return LoadResults(finished, failed, {block for request_id in failed for block in blocks[request_id]})

    def take_report(self) -> WorkerReport | None:
        """What the scheduler half must know; None when there is nothing."""
        transfers, step = self._transfers, self._timed_step
        told = transfers is not None and transfers.has_report
        below = self._refused or (self._tiers is not None and self._tiers.has_results)
        stores = self._changed_stores()
        if not step and not told and not below and not stores:
            return None
        report = transfers.take_report() if transfers is not None and told else WorkerReport()
        report.step, self._timed_step = step, 0
        if below:
            report.tiers, self._refused = self._refused, {}
        if self._tiers is not None:
            report.tiers |= self._tiers.take()
            report.lost = self._tiers.take_lost()
        if stores:
            report.stores = {self._parallel.rank: stores}
        return report

    def _changed_stores(self) -> dict[str, dict[str, Any]]:
        """The state of this rank's stores if it is another than was told last; looked at now and then."""
        if self._tiers is None or time.monotonic() < self._stores_due:
            return {}
        self._stores_due = time.monotonic() + STORES_SECONDS
        before, self._stores = self._stores, self._tiers.stores()
        return self._stores if self._stores != before else {}

    def close(self) -> None:
        """End the threads and give the slab back. Safe to call more than once."""
        tiers, self._tiers = self._tiers, None
        if tiers is not None:
            tiers.close()
        transfers, self._transfers = self._transfers, None
        if transfers is not None and not transfers.close():
            _log.error("A transfer did not end; its memory is left to the operating system")
            return
        slab, self._slab = self._slab, None
        if slab is not None:
            slab.close()

    def _allocate(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        groups = describe_groups(self._cache, self._parallel, self._config.chunk_size)
        layout = SlotLayout(group_regions(self._cache), [group.blocks_per_chunk for group in groups])
        buffer = _backing(kv_caches, self._cache)
        budget = self._config.cpu_budget(buffer.numel() * self._ranks) // self._ranks
        if not self._config.enable_prefix_cache:
            return
        slots = budget // layout.slot_bytes
        if not self._config.enable_cpu and self._config.has_lower_tiers:
            slots = max(slots, STAGING_CHUNKS)
        if not slots:
            if self._config.enable_cpu:
                _log.warning(
                    "The CPU tier is empty: a chunk takes %d bytes on each of %d ranks, more than its %d: raise "
                    "cpu_bytes",
                    layout.slot_bytes,
                    self._ranks,
                    budget,
                )
            return
        try:
            self._build(buffer, layout, slots, groups, kv_caches=kv_caches)
        except NativeUnavailable as error:
            raise NativeUnavailable(f"{error}. To run without a CPU tier, set enable_cpu to false") from error
        self.slots = slots
        _log.info(
            "CPU tier: %d chunks of %d tokens, %.1f MiB each, %.2f GiB on this rank%s",
            slots,
            self._config.chunk_size,
            layout.slot_bytes / (1 << 20),
            slots * layout.slot_bytes / (1 << 30),
            ", checksums are compared" if self._config.verify else "",
        )
        self._warn_of_few(slots, layout)

    def _warn_of_few(self, slots: int, layout: SlotLayout) -> None:
        """Say it where the longest prompt does not fit: what is loaded for one request is in slots all at once."""
        if self._vllm_config is None or self._parallel.rank:
            return
        longest, size = int(self._vllm_config.model_config.max_model_len), self._config.chunk_size
        if slots * size < longest // size * size:
            needed = longest // size * layout.slot_bytes * self._ranks
            _log.warning(
                "The %s has room for %d chunks, so no more than %d tokens of a prompt can be loaded, and the longest has %d: "
                "set %scpu_bytes to %.1fGiB or more",
                "CPU tier" if self._config.enable_cpu else "memory that lower tiers pass through (enable_cpu is false)",
                slots,
                slots * size,
                longest,
                "" if self._config.enable_cpu else "enable_cpu to true and ",
                needed / (1 << 30) + 0.05,
            )

    def _submit(self, plan: StepPlan) -> None:
        if self._tiers is not None and self._transfers is not None:
            fetched = [piece.slot for job in plan.tiers if job.kind == "fetch" for piece in job.pieces]
            self._transfers.expect_others(fetched)
            self._tiers.submit(plan.tiers)
            return
        for job in plan.tiers:
            named = [piece.chunk for piece in job.pieces] or [b""]
            self._refused[job.job] = TierResult(failed=dict.fromkeys(named, "closed"))

    def _build(
        self,
        buffer: torch.Tensor,
        layout: SlotLayout,
        slots: int,
        groups: Sequence[Group],
        *,
        kv_caches: Mapping[str, torch.Tensor],
    ) -> None:
        config, device = self._config, buffer.device
        node = _near(device) if config.numa_node is None else config.numa_node
        slab = Slab(slots, layout.slot_bytes, device=device, node=node, huge=config.huge_pages)
        assert slab.bytes is not None
        copier = self._make_copier(buffer, slab.bytes, layout, threads=config.copy_threads, verify=config.verify)
        cache_config = getattr(self._vllm_config, "cache_config", None)
        elements = dtype_of(kv_caches, str(getattr(cache_config, "cache_dtype", "")))
        comparer = Comparer(slab.bytes, layout.slot_bytes, layout.payload_bytes, elements)
        self._transfers = Transfers(copier, lambda: stream_for(device), comparer.compare)
        self._slab = slab
        if config.has_lower_tiers and self._vllm_config is not None:
            shape = shape_of(config, self._vllm_config, self._cache, groups, layout, rank=self._parallel.rank)
            memory = memoryview(slab.bytes.numpy())
            cache_dtype = str(self._vllm_config.cache_config.cache_dtype)
            codec = slot_codec_of(config, self._cache, layout, cache_dtype=cache_dtype, kv_caches=kv_caches)
            shape = divided(shape, self._cache, kv_caches)
            self._tiers = TierMovers(
                tiers_of(config, open_stores(config)), memory, layout.slot_bytes, shape, codec, runs=runs_of(layout)
            )
            self.objects = shape.key(bytes(HASH_BYTES))
            if self._parallel.rank == 0:
                announce(config)


def _near(device: torch.device) -> int:
    """The NUMA node from which transfers have the shortest way."""
    if device.type == "cuda":
        return node_of_gpu(torch.cuda.get_device_properties(device))
    return node_of_cpus(os.sched_getaffinity(0))


def _backing(kv_caches: Mapping[str, torch.Tensor], cache: Any) -> torch.Tensor:
    """The one allocation behind all layers' KV cache, as bytes."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kv_caches.values()}
    if len(storages) != 1:
        raise UnsupportedCache(f"the KV cache is {len(storages)} allocations, not one")
    (tensor,) = storages.values()
    storage = tensor.untyped_storage()
    described = max(each.size for each in cache.kv_cache_tensors)
    if storage.nbytes() < described:
        raise UnsupportedCache(f"the KV cache has {storage.nbytes()} bytes, but {described} are described")
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))
