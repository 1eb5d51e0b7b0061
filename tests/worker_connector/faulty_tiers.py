"""The connector with a disk that fails on command: while the file named by ``KV_TEST_FAULT`` says ``eio``, no read of the
disk tier succeeds."""

import errno
import os
from pathlib import Path
from typing import Any

from worker_connector.connector import WarmrouteConnector
from worker_connector.tiers import disk


class FaultyTiers(WarmrouteConnector):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        disk.read_object = _read_object  # type: ignore[assignment, attr-defined]


_whole_read = disk.read_object  # type: ignore[attr-defined]


def _read_object(*args: Any) -> int:
    if Path(os.environ["KV_TEST_FAULT"]).read_text(encoding="utf-8") == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return _whole_read(*args)
