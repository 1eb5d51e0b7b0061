import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from worker_connector import placement
from worker_connector.placement import node_of_cpus, node_of_gpu, roam


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes: processors 0-3 and 8, and 4-7."""
    for node, cpus in ((0, "0-3,8"), (1, "4-7")):
        folder = tmp_path / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(placement, "_NODES", tmp_path / "node")
    monkeypatch.setattr(placement, "_PCI", tmp_path / "pci")
    (tmp_path / "status").write_text("Name:\tx\nMems_allowed:\t3\nMems_allowed_list:\t0-1\n")
    monkeypatch.setattr(placement, "_STATUS", tmp_path / "status")
    return tmp_path


@pytest.mark.parametrize(
    ("cpus", "node"), [({0}, 0), ({1, 8}, 0), ({4, 5, 6, 7}, 1), ({3, 4}, -1), ({9}, -1), (set(), -1)]
)
def test_processors_have_a_node_when_they_share_one(machine: Path, cpus: set[int], node: int) -> None:
    assert machine
    assert node_of_cpus(cpus) == node


@pytest.mark.parametrize(("told", "node"), [("1", 1), ("0", 0), ("-1", -1), ("7", -1), ("", -1), (None, -1)])
def test_a_gpu_has_the_node_that_its_bus_tells(machine: Path, told: str | None, node: int) -> None:
    device = machine / "pci" / "0000:c1:00.0"
    device.mkdir(parents=True)
    if told is not None:
        (device / "numa_node").write_text(told)
    assert node_of_gpu(SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)) == node


@pytest.mark.parametrize(("status", "node"), [("Mems_allowed_list:\t0\n", -1), ("Name:\tx\n", 1), (None, 1)])
def test_memory_of_a_node_that_a_container_may_not_use_is_not_asked_for(
    machine: Path, status: str | None, node: int
) -> None:
    (machine / "status").unlink()
    if status is not None:
        (machine / "status").write_text(status)
    device = machine / "pci" / "0000:c1:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1")
    assert node_of_gpu(SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)) == node
    assert node_of_cpus({4, 5}) == node


def test_a_gpu_that_does_not_tell_its_address_has_no_node(machine: Path) -> None:
    assert machine
    assert node_of_gpu(SimpleNamespace(name="GPU")) == -1


def test_a_machine_of_one_node_needs_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text("0-3")
    monkeypatch.setattr(placement, "_NODES", tmp_path)
    assert node_of_cpus({0, 1}) == -1


class Processors:
    """What threads may run on, in place of the system."""

    def __init__(self, own: set[int], above: set[int]) -> None:
        self.own, self.above = own, above

    def get(self, process: int) -> set[int]:
        return self.own if process == 0 else self.above

    def set(self, process: int, cpus: set[int]) -> None:
        assert process == 0
        self.own = set(cpus)


@pytest.mark.parametrize(
    ("own", "above", "then"),
    [
        ({0}, {*range(9)}, {0, 1, 2, 3, 8}),
        ({0, 5}, {*range(9)}, {*range(9)}),
        ({0}, {0, 1, 4}, {0, 1}),
        ({2, 3}, {0}, {0, 2, 3}),
    ],
)
def test_a_bound_thread_gets_the_processors_of_the_process_above_on_its_node(
    own: set[int], above: set[int], then: set[int], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine
    processors = Processors(own, above)
    monkeypatch.setattr(os, "sched_getaffinity", processors.get)
    monkeypatch.setattr(os, "sched_setaffinity", processors.set)
    roam(on_host=False)
    assert processors.own == own
    roam(on_host=True)
    assert processors.own == then


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_real_thread_is_widened_and_its_maker_is_not() -> None:
    whole = os.sched_getaffinity(0)
    if len(whole) < 2:
        pytest.skip("one processor")
    found: list[set[int]] = []

    def run() -> None:
        roam(on_host=True)
        found.append(os.sched_getaffinity(0))

    try:
        os.sched_setaffinity(0, {min(whole)})
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert os.sched_getaffinity(0) == {min(whole)}
    finally:
        os.sched_setaffinity(0, whole)
    assert found == [whole]
