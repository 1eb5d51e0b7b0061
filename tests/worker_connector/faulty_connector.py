"""The connector with loads that go wrong on command.

The file named by ``KV_TEST_FAULT`` says how: ``fail``, ``slow``, or ``corrupt`` and the KV-cache group in which the first
block loaded is to be spoilt.
"""

import os
import time
from ctypes import memset
from pathlib import Path
from typing import Any

from worker_connector.connector import WarmrouteConnector
from worker_connector.movers import Copier
from worker_connector.plan import Span


class FaultyCopier(Copier):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._done = ""

    def to_cache(self, span: Span) -> None:
        fault = Path(os.environ["KV_TEST_FAULT"]).read_text(encoding="utf-8")
        if fault == "fail":
            raise OSError("a load that fails on command")
        if fault == "slow":
            time.sleep(0.05)
        super().to_cache(span)
        if fault == f"corrupt {span.group}" != self._done:
            self._spoil(Span(span.slot, span.group, span.at, span.blocks[:1]))
            self._done = fault

    def _spoil(self, block: Span) -> None:
        """Overwrite one block, in every layer of its group."""
        for in_cache, _, count in self._pieces(block):
            memset(self._cache_start + in_cache, 0x3C, count)


class FaultyConnector(WarmrouteConnector):
    make_copier = FaultyCopier
