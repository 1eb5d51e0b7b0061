"""Where a rank's memory and threads belong: NUMA nodes and processors, as Linux tells them in /sys (sysfs-devices-system-
node in its ABI documentation). Everything is -1 or unchanged where it cannot be found out."""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_STATUS = Path("/proc/self/status")

ANY_NODE = -1


def node_of_gpu(properties: Any) -> int:
    """The NUMA node that a GPU hangs on, from torch's device properties."""
    with suppress(OSError, ValueError, AttributeError):
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return _usable(int((_PCI / address / "numa_node").read_text(encoding="ascii")), _nodes())
    return ANY_NODE


def node_of_cpus(cpus: Iterable[int]) -> int:
    """The NUMA node that has all these processors; -1 where they belong to several, or the machine has only one."""
    nodes = _nodes()
    wanted = frozenset(cpus)
    if len(nodes) < 2:
        return ANY_NODE
    return _usable(next((node for node, members in nodes.items() if wanted and wanted <= members), ANY_NODE), nodes)


def roam(*, on_host: bool) -> None:
    """Let the calling thread use every processor that this process's parent may use on the nodes of its own.

    An engine that computes on processors binds the thread that starts others to a single one, and what it starts would
    compete with it there for good. Threads that only drive a GPU stay where they are."""
    if not on_host:
        return
    with suppress(OSError, AttributeError):
        own, allowed = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
        near = [members for members in _nodes().values() if members & own]
        os.sched_setaffinity(0, own | (allowed & frozenset().union(*near) if near else allowed))


def _usable(node: int, nodes: Collection[int]) -> int:
    return node if len(nodes) > 1 and node in nodes and _allowed(node) else ANY_NODE


def _allowed(node: int) -> bool:
    """Whether this process may have memory there: a container (cpuset.mems) may be kept from the GPU's node."""
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Mems_allowed_list:"):
                return node in _parse(line.partition(":")[2])
    return True


def _nodes() -> dict[int, frozenset[int]]:
    """Nodes that have memory, with their processors."""
    found = {}
    for folder in _NODES.glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(folder.name.removeprefix("node"))] = _parse((folder / "cpulist").read_text(encoding="ascii"))
    return found


def _parse(ranges: str) -> frozenset[int]:
    """``0-3,8`` as the numbers it stands for."""
    numbers: set[int] = set()
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)
