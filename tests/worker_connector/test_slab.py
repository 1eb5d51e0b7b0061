import gc
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the worker half needs torch")

from worker_connector import slab as slab_module  # noqa: E402
from worker_connector.errors import ConfigurationError  # noqa: E402
from worker_connector.slab import Slab  # noqa: E402


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_slab_has_room_for_its_slots_and_keeps_bytes() -> None:
    slab = Slab(7, 4096)
    assert slab.bytes is not None
    assert slab.bytes.numel() == 7 * 4096
    slab.bytes[-1] = 9
    assert int(slab.bytes[-1]) == 9
    slab.close()


def test_memory_is_taken_at_once_and_given_back_on_close() -> None:
    gc.collect()
    before = resident_bytes()
    slab = Slab(64, 1 << 20)
    assert resident_bytes() - before > 60 << 20
    assert slab.bytes is not None
    slab.bytes.fill_(1)
    slab.close()
    gc.collect()
    assert resident_bytes() - before < 16 << 20


def test_closing_twice_is_harmless() -> None:
    slab = Slab(1, 4096)
    slab.close()
    slab.close()


def test_a_slab_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_available_memory", lambda: 1 << 20)
    with pytest.raises(ConfigurationError, match="lower cpu_bytes"):
        Slab(2, 1 << 20)
