"""The vision cache's figures as vLLM carries them; see metrics.py."""

from typing import ClassVar

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from worker_connector.metrics import CountsOfInterval, FigureMetrics
from worker_connector.stats import VISION_FIGURES, Figure


class VisionStats(CountsOfInterval, ECConnectorStats):  # type: ignore[misc]
    """The vision cache's figures of one interval."""

    figures: ClassVar[tuple[Figure, ...]] = VISION_FIGURES


class VisionPromMetrics(FigureMetrics, ECConnectorPromMetrics):  # type: ignore[misc]
    """The vision cache's figures on the engine's ``/metrics``."""

    figures: ClassVar[tuple[Figure, ...]] = VISION_FIGURES
