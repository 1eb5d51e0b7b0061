"""The vision cache's vLLM facade: vLLM's encoder cache connector on top of its two halves, and nothing else.

Outputs of the vision encoder are kept in host memory of each rank and put back into vLLM's encoder cache when a request
has the same media again, whatever is around it. Written against vLLM 0.32.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.platforms import current_platform

from worker_connector import vision_cache_resets
from worker_connector.vision_cache_figures import VisionPromMetrics, VisionStats
from worker_connector.vision_cache_ledger import VisionLedger
from worker_connector.vision_cache_plan import NOTHING, VisionPlan, VisionReport
from worker_connector.vision_cache_scheduler import VisionScheduler
from worker_connector.vision_cache_settings import rank_bytes, ranks_with_encoder
from worker_connector.vision_cache_worker import VisionRank

_log = logging.getLogger("vllm.warmroute.vision")


@dataclass
class VisionMetadata(ECConnectorMetadata):  # type: ignore[misc]
    """Scheduler half to ranks, once per step."""

    plan: VisionPlan = field(default_factory=VisionPlan)


_NOTHING = VisionMetadata(NOTHING)


@dataclass
class VisionWorkerMetadata(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """Ranks to scheduler half, in steps that have something to tell."""

    report: VisionReport = field(default_factory=VisionReport)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> "VisionWorkerMetadata":
        assert isinstance(other, VisionWorkerMetadata)
        self.report.merge(other.report)
        return self


class WarmrouteECConnector(ECConnectorBase):  # type: ignore[misc]
    """Keeps outputs of the vision encoder, so that media that come again are not encoded again.

    Raises:
        ConfigurationError: a setting is impossible, or the engine's role is not ``ec_both``.
    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._scheduler: VisionScheduler | None = None
        self._rank: VisionRank | None = None
        size = rank_bytes(vllm_config, os.environ)
        if role is ECConnectorRole.SCHEDULER:
            ledger = VisionLedger(size, ranks_with_encoder(vllm_config))
            self._scheduler = VisionScheduler(ledger, _embed_bytes(vllm_config))
            if not vision_cache_resets.watch(vllm_config, self._scheduler):
                _log.warning("This vLLM does not tell when its encoder cache is reset: restart after changing weights")
        else:
            self._rank = VisionRank(size, _device())

    # ---- scheduler half -----------------------------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        assert self._scheduler is not None
        return self._scheduler.has(identifier)

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Always: what is here is loaded within the step."""
        assert self._scheduler is not None
        self._scheduler.expect(request, num_computed_tokens)
        return True

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        assert self._scheduler is not None
        plan = self._scheduler.plan(scheduler_output)
        return _NOTHING if plan is NOTHING else VisionMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        meta = connector_output.ec_connector_worker_meta
        if isinstance(meta, VisionWorkerMetadata):
            self._scheduler.absorb(meta.report)

    # ---- rank ---------------------------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        del kwargs
        assert self._rank is not None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, VisionMetadata)
        self._rank.begin(metadata.plan, encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        del kwargs
        if self._rank is not None:
            self._rank.save(encoder_cache, mm_hash)

    def build_connector_worker_meta(self) -> ECConnectorWorkerMetadata | None:
        report = self._rank.take_report() if self._rank is not None else None
        return VisionWorkerMetadata(report) if report is not None else None

    # ---- both halves --------------------------------------------------------------------------------------------

    def get_ec_connector_stats(self) -> Any:
        counts = self._scheduler.take_stats() if self._scheduler is not None else None
        return VisionStats(data=counts) if counts else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return VisionStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        return VisionPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._rank is not None:
            self._rank.close()


def _device() -> torch.device:
    if current_platform.is_cuda_alike():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _embed_bytes(vllm_config: Any) -> Mapping[str, int]:
    """As vLLM measured it when it started, where it does."""
    widths = getattr(vllm_config.ec_transfer_config, "mm_encoder_output_widths", None) or {}
    dtype = vllm_config.model_config.dtype
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return {modality: int(width) * size for modality, width in widths.items()}
