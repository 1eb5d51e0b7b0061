"""The connector with loads that go wrong on command.

The file named by ``KV_TEST_FAULT`` says how: ``fail``, ``slow``, ``corrupt`` and the KV-cache group in which the first
block loaded is to be spoilt, or ``damage`` for one bit of the first slot, before it is loaded.
"""

import os
import time
from collections.abc import Sequence
from ctypes import memset
from pathlib import Path
from typing import Any

from worker_connector.connector import WarmrouteConnector
from worker_connector.copier import Copier, Receipt
from worker_connector.plan import Span


class FaultyCopier(Copier):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._done = ""

    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        fault = Path(os.environ["KV_TEST_FAULT"]).read_text(encoding="utf-8")
        if fault == "fail":
            raise OSError("a load that fails on command")
        if fault == "slow":
            time.sleep(0.05 * len(spans))
        if fault == "damage" != self._done:
            self._flip(spans[0])
            self._done = fault
        receipts = super().to_cache(spans, stream)
        for span in spans:
            if fault == f"corrupt {span.group}" != self._done:
                self._spoil(span.group, span.blocks[0])
                self._done = fault
        return receipts

    def _flip(self, span: Span) -> None:
        """Change one bit of what a span is about to read."""
        layout = self._layout
        at = layout.starts[span.group][0] + span.at * layout.regions[span.group][0].nbytes
        self._slab[span.slot * layout.slot_bytes + at + 5] ^= 8

    def _spoil(self, group: int, block: int) -> None:
        """Overwrite one block, in every layer of its group."""
        for region in self._layout.regions[group]:
            memset(self._cache.data_ptr() + region.offset + block * region.block_stride, 0x3C, region.nbytes)


class FaultyConnector(WarmrouteConnector):
    make_copier = FaultyCopier
