"""The vLLM facade: vLLM's connector interface on top of the two halves, and nothing else.

Written against vLLM 0.29 to 0.33. What an older version lacks is looked up once, below; what a younger one adds is
defined whether or not it is called.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.platforms import current_platform

from worker_connector.chunk_object import ObjectKey
from worker_connector.config import ConnectorConfig
from worker_connector.copier import Copier
from worker_connector.metrics import WarmroutePromMetrics, WarmrouteStats
from worker_connector.plan import PLAIN, StepPlan, WorkerReport
from worker_connector.scheduler_half import SchedulerHalf
from worker_connector.vision_cache_settings import require_connector
from worker_connector.worker_half import WorkerHalf

_TransferResults: Any = getattr(vllm_base, "KVConnectorTransferResults", None)
_HitSource: Any = getattr(vllm_base, "CacheHitSource", None)

OWN_NAME = "WarmrouteConnector"
_BLOCK_SIZES_OF_ANY_KERNEL = (16, 32, 64)

_log = logging.getLogger("vllm.warmroute.connector")


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler half to workers, once per step."""

    plan: StepPlan = field(default_factory=StepPlan)


_PLAIN = StepMetadata(PLAIN)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler half, in steps that have something to tell. ``ranks`` is what each rank says of itself in its
    first step: of several connectors in one engine, vLLM's handshake carries the first one's word only."""

    report: WorkerReport = field(default_factory=WorkerReport)
    ranks: list["Handshake"] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerMetadata":
        assert isinstance(other, WorkerMetadata)
        self.report.merge(other.report)
        self.ranks += other.ranks
        return self


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """One rank to the scheduler half, once: how many slots its slab has, and what its objects in lower tiers are called."""

    slots: int
    objects: ObjectKey | None = None


def _settings_of(vllm_config: Any) -> dict[str, Any]:
    """What stands in ``kv_connector_extra_config``, and the size that vLLM keeps to itself where its backend is LMCache's."""
    transfer, wanted = vllm_config.kv_transfer_config, getattr(vllm_config.cache_config, "kv_offloading_size", None)
    settings = dict(transfer.kv_connector_extra_config or {})
    if wanted and transfer.kv_connector == "LMCacheMPConnector":
        settings.setdefault("cpu_bytes_to_use", wanted * (1 << 30))
    return settings


class WarmrouteConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Keeps the engine's KV cache in tiers behind its GPU and reports what is where."""

    if _HitSource is not None:
        _cache_hit_source = _HitSource.HOST

    make_copier: Any = Copier

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        is_scheduler = role is KVConnectorRole.SCHEDULER
        config = ConnectorConfig.resolve(_settings_of(vllm_config), os.environ, tell=is_scheduler)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._failed_blocks: set[int] = set()
        self._is_introduced = False
        if is_scheduler:
            require_connector(config, vllm_config)
            if transfer.kv_connector != OWN_NAME:
                _log.info("kv_connector: %s is read as %s", transfer.kv_connector, OWN_NAME)
            # The scheduler reads this right after it made the connector. A cache that cannot deliver must cost
            # computing, never the request, which is what vLLM's default would make of it.
            transfer.kv_load_failure_policy = "recompute"
            may_load = transfer.is_kv_consumer and _can_report_failures(kv_cache_config)
            self._scheduler = SchedulerHalf(
                config, vllm_config, kv_cache_config, may_load=may_load, may_save=transfer.is_kv_producer
            )
        else:
            parallel = vllm_config.parallel_config
            self._worker = WorkerHalf(config, kv_cache_config, parallel, type(self).make_copier, vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A lost save is a later miss, nothing more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Ask for one run of bytes per block where that cannot stop the engine from starting: kernels that split
        blocks refuse it, and they may where blocks are larger than every kernel takes."""
        if current_platform.is_cpu() or getattr(vllm_config.model_config, "is_hybrid", False):
            return None
        cache = vllm_config.cache_config
        chosen = getattr(cache, "user_specified_block_size", True)
        return None if chosen and cache.block_size not in _BLOCK_SIZES_OF_ANY_KERNEL else "BLHNC"

    # ---- scheduler half -----------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind(gpu_block_pool)

    def set_xfer_handshake_metadata(self, metadata: Mapping[Any, Any]) -> None:
        if self._scheduler is None:
            return
        ranks = [rank for rank in metadata.values() if isinstance(rank, Handshake)]
        if len(ranks) < len(metadata):
            self._scheduler.await_ranks()
        else:
            self._scheduler.start([rank.slots for rank in ranks], [rank.objects for rank in ranks])

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        self.set_xfer_handshake_metadata(metadata)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.added(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.planner.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        tables = blocks.get_block_ids() if num_external_tokens else ()
        self._scheduler.planner.allocated(request, tables, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._scheduler is not None
        plan = self._scheduler.plan_step(scheduler_output)
        return _PLAIN if plan is PLAIN else StepMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        meta, finished = connector_output.kv_connector_worker_meta, connector_output.finished_recving
        if meta is None and not finished:
            return  # vLLM goes on to take_events, which publishes
        if isinstance(meta, WorkerMetadata) and meta.ranks:
            self._scheduler.introduced([rank.slots for rank in meta.ranks], [rank.objects for rank in meta.ranks])
        report = meta.report if isinstance(meta, WorkerMetadata) else None
        self._scheduler.absorb(report, finished or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.planner.finished(request.request_id, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_unfinished_transfers()

    def take_events(self) -> Iterable[Any]:
        if self._scheduler is not None:
            self._scheduler.drain_and_publish()
        return ()

    def reset_cache(self) -> bool:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # ---- worker half --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._handshake(self._worker) if self._worker is not None else None

    @staticmethod
    def _handshake(worker: WorkerHalf) -> Handshake:
        return Handshake(worker.slots, worker.objects)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.settle(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        del forward_context, kwargs
        if (plan := self._plan()) is not None and self._worker is not None:
            self._worker.load(plan)

    def has_connector_metadata(self) -> bool:
        """No, as far as vLLM's attention layers go, which ask it: that spares each layer of each step two calls."""
        return False

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole before a request runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are made after the step, of whole blocks."""

    def wait_for_save(self) -> None:
        if (plan := self._plan()) is not None and self._worker is not None:
            self._worker.save(plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        del finished_req_ids
        assert self._worker is not None
        results = self._worker.take_results()
        if results is None:
            return None, None
        self._failed_blocks |= results.failed_blocks
        return None, results.finished

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        del finished_req_ids
        assert self._worker is not None
        results = self._worker.take_results()
        if results is None:
            return _TransferResults()
        return _TransferResults(finished_recving=results.finished, failed_recving=results.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks, for versions that do not take failures by request."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.take_report() if self._worker is not None else None
        if self._worker is not None and not self._is_introduced:
            self._is_introduced = True
            return WorkerMetadata(report or WorkerReport(), [self._handshake(self._worker)])
        return WorkerMetadata(report) if report is not None else None

    # ---- both halves --------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Any:
        if self._scheduler is None:
            return None
        counts = self._scheduler.take_stats()
        return WarmrouteStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return WarmrouteStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        return WarmroutePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()

    def _plan(self) -> StepPlan | None:
        """What there is to do in this step; None where that is nothing."""
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, StepMetadata) and metadata is not _PLAIN else None


def _can_report_failures(cache: Any) -> bool:
    """Without results by request, a failed load is reported by its blocks, which takes a single KV-cache group."""
    return _TransferResults is not None or len(cache.kv_cache_groups) == 1
