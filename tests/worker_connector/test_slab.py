import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the worker half needs torch")

from worker_connector import slab as slab_module  # noqa: E402
from worker_connector.errors import ConfigurationError, NativeUnavailable  # noqa: E402
from worker_connector.native import Granted  # noqa: E402
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


def test_a_view_keeps_the_memory_of_a_closed_slab() -> None:
    code = (
        "from worker_connector.slab import Slab; slab = Slab(64, 4096); view = slab.bytes[-9:].numpy();"
        "view[:] = 7; slab.close(); del slab; print(view.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "63\n"), done.stderr


def test_closing_twice_is_harmless() -> None:
    slab = Slab(1, 4096)
    slab.close()
    slab.close()
    assert slab.bytes is None


def test_a_slab_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_available_memory", lambda *_, **__: 1 << 20)
    with pytest.raises(ConfigurationError, match="lower cpu_bytes"):
        Slab(2, 1 << 20)


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("", ("memory.max", "memory.current", "inactive_file")),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_slab_larger_than_the_container_is_refused(
    folder: str, files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used, cache = files
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, content in ((limit, 10 << 20), (used, 8 << 20), ("memory.stat", f"anon 1\n{cache} {1 << 20}")):
        (tmp_path / folder / name).write_text(f"{content}\n")
    monkeypatch.setattr(slab_module, "_CGROUPS", tmp_path)
    Slab(3, 1 << 20).close()
    with pytest.raises(ConfigurationError, match="only 3 MiB"):
        Slab(4, 1 << 20)


@pytest.mark.parametrize("limited", ["system.slice/engine.service", "system.slice"])
@pytest.mark.parametrize(
    ("controller", "files"),
    [("", ("memory.max", "memory.current")), ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))],
)
def test_limits_of_a_service_and_of_what_is_around_it_count(
    controller: str, files: tuple[str, str], limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / controller / limited
    group.mkdir(parents=True)
    for name, content in ((files[0], 10 << 20), (files[1], 7 << 20), ("memory.stat", "anon 1")):
        (group / name).write_text(f"{content}\n")
    own = tmp_path / "cgroup"
    monkeypatch.setattr(slab_module, "_CGROUPS", tmp_path)
    monkeypatch.setattr(slab_module, "_OWN_GROUPS", own)
    own.write_text(f"9:cpu,cpuacct:/elsewhere\n3:{controller}:/system.slice/engine.service\n")
    assert slab_module._available_memory(1, huge=False) == 3 << 20
    for other in ("nonsense\n", f"3:{controller}:/../system.slice/engine.service\n", f"3:{controller}:/gone\n"):
        own.write_text(other)
        assert (slab_module._available_memory(1, huge=False) or 0) > 3 << 20


def test_a_container_without_a_limit_has_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = slab_module._available_memory(1, huge=False)
    (tmp_path / "memory.max").unlink()
    assert unlimited == pytest.approx(slab_module._available_memory(1, huge=False), rel=0.2)
    Slab(4, 1 << 20).close()


def test_no_slots_take_no_memory() -> None:
    slab = Slab(0, 4096)
    assert slab.bytes is not None
    assert slab.bytes.numel() == 0
    slab.close()


def test_a_slab_starts_on_a_memory_page_and_is_zero() -> None:
    slab = Slab(3, 4096)
    assert slab.bytes is not None
    assert slab.bytes.data_ptr() % 4096 == 0
    assert not slab.bytes.any()


def test_reserved_huge_pages_count_only_where_they_hold_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_HUGE_POOL", tmp_path)
    monkeypatch.setattr(slab_module, "_machine_memory", lambda: 1 << 20)
    (tmp_path / "free_hugepages").write_text("3\n")
    assert slab_module._available_memory(6 << 20, huge=True) == 6 << 20
    assert slab_module._available_memory(7 << 20, huge=True) == 1 << 20
    assert slab_module._available_memory(6 << 20, huge=False) == 1 << 20


def test_what_was_asked_for_and_not_given_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_module.native.Context, "allocate", lambda _, size, **__: FakeMemory(size))
    Slab(1, 4096, node=0, huge=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "vm.nr_hugepages" in caplog.text
    assert "NUMA node 0" in caplog.text
    caplog.clear()
    Slab(1, 4096)
    assert not caplog.records


class FakeMemory:
    granted = Granted.TRANSPARENT

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)

    def view(self) -> memoryview:
        return memoryview(self._bytes)


def test_without_the_library_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="install warmroute again"):
        Slab(1, 4096)


def test_a_forked_child_may_drop_its_copy_without_harm() -> None:
    slab = Slab(64, 4096)
    assert slab.bytes is not None
    slab.bytes.fill_(5)
    child = os.fork()
    if not child:
        slab.close()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert int(slab.bytes.sum()) == 5 * 64 * 4096
