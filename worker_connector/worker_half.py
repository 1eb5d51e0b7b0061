"""The half of the connector that runs beside the model: one per rank, with its slab and its movers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from worker_connector.config import ConnectorConfig
from worker_connector.errors import UnsupportedCache
from worker_connector.geometry import describe_groups
from worker_connector.movers import Copier, Transfers, stream_for
from worker_connector.plan import SaveJob, StepPlan, WorkerReport
from worker_connector.regions import SlotLayout, group_regions
from worker_connector.slab import Slab

IDLE_WAIT_SECONDS = 0.005
"""How long a step without a forward waits for loads, so that they are reported in it and not in a later one."""

_log = logging.getLogger("vllm.warmroute.worker")


@dataclass(slots=True)
class LoadResults:
    """Requests whose loads ended, those of them that failed, and the blocks that failed loads leave undefined."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class WorkerHalf:
    """One rank's part. Until ``register`` it has no slots; it keeps none when the KV cache cannot be stored.

    ``make_copier`` stands in for ``Copier`` where a test wants copies that go wrong.
    """

    def __init__(
        self, config: ConnectorConfig, cache: Any, parallel: Any, make_copier: Callable[..., Copier] = Copier
    ) -> None:
        self.slots = 0
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
        """
        try:
            self._allocate(kv_caches)
        except UnsupportedCache as reason:
            # The scheduler half finds the same and says so once per engine.
            _log.debug("No slab: %s", reason)

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
        """Begin the step's loads; in a step without a forward, wait for them for a moment."""
        if self._transfers is None or not (plan.loads or plan.idle):
            return
        for job in plan.loads:
            self._targets[job.request_id] = job.blocks
        self._transfers.load(plan.loads)
        if plan.idle:
            self._transfers.wait_for_loads(IDLE_WAIT_SECONDS)

    def save(self, plan: StepPlan) -> None:
        """After the forward: begin the step's saves."""
        self._timed_step = plan.step
        self._due = None
        if self._transfers is not None and plan.save is not None:
            self._transfers.save(plan.save)

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
        if not step and not told:
            return None
        report = transfers.take_report() if transfers is not None and told else WorkerReport()
        report.step, self._timed_step = step, 0
        return report

    def close(self) -> None:
        """End the threads and give the slab back. Safe to call more than once."""
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
        buffer = _backing(kv_caches)
        budget = self._config.cpu_budget(buffer.numel() * self._ranks) // self._ranks
        if not self._config.enable_prefix_cache:
            return
        self.slots = budget // layout.slot_bytes
        if not self.slots:
            if self._config.enable_cpu:
                _log.warning(
                    "The CPU tier is empty: a chunk takes %d bytes on each of %d ranks, more than its %d: raise "
                    "cpu_bytes",
                    layout.slot_bytes,
                    self._ranks,
                    budget,
                )
            return
        on_gpu = buffer.device.type == "cuda"
        self._slab = Slab(self.slots, layout.slot_bytes, pin=on_gpu)
        assert self._slab.bytes is not None
        copier = self._make_copier(buffer, self._slab.bytes, layout)
        self._transfers = Transfers(copier, lambda: stream_for(buffer.device))
        _log.info(
            "CPU tier: %d chunks of %d tokens, %.1f MiB each, %.2f GiB on this rank",
            self.slots,
            self._config.chunk_size,
            layout.slot_bytes / (1 << 20),
            self.slots * layout.slot_bytes / (1 << 30),
        )


def _backing(kv_caches: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The one allocation behind all layers' KV cache, as bytes."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kv_caches.values()}
    if len(storages) != 1:
        raise UnsupportedCache("the KV cache is not one allocation")
    (tensor,) = storages.values()
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))
