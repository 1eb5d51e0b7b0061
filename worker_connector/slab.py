"""The CPU tier's memory on one rank: fixed slots in one allocation, made once and never moved."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from worker_connector import native
from worker_connector.errors import ConfigurationError
from worker_connector.placement import ANY_NODE

_HUGE_PAGE = 2 << 20
_HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")

_log = logging.getLogger("vllm.warmroute.slab")


class Slab:
    """``slots`` times ``slot_bytes`` bytes of host memory, page-locked for a GPU where ``device`` is one.

    All of it is taken from the operating system at once: a page fault in the middle of a save would stall the engine's
    own allocations. That costs a fraction of a second per GiB. ``node`` is the NUMA node that it should be on, ``huge``
    asks for reserved huge pages; where either cannot be had, one warning says so. Children of fork() do not get it.
    ``purpose`` is what it is for and the setting that sizes it, for what is said of it.

    Raises:
        ConfigurationError: the machine, or the container, does not have that much memory.
        NativeError: the native library is missing or failed.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        *,
        device: torch.device | None = None,
        node: int = ANY_NODE,
        huge: bool = False,
        purpose: tuple[str, str] = ("the CPU tier", "cpu_bytes"),
    ) -> None:
        size = slots * slot_bytes
        available = _available_memory(size, huge=huge)
        if available is not None and size > available:
            raise ConfigurationError(
                f"{purpose[0]} needs {size >> 20} MiB on this rank, but only {available >> 20} MiB of memory are "
                f"available: lower {purpose[1]}"
            )
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.pinned = False
        self.granted = native.Granted(0)
        self.bytes: torch.Tensor | None = torch.empty(0, dtype=torch.uint8)
        if size:
            self._allocate(size, device or torch.device("cpu"), node, huge, purpose[0])

    def close(self) -> None:
        """Give the memory back. No transfer may be under way; views that others still hold keep it until they go."""
        self.bytes = None
        self.pinned = False

    def _allocate(self, size: int, device: torch.device, node: int, huge: bool, name: str) -> None:
        with native.Context(device) as context:
            memory = context.allocate(size, node=node, huge=huge)
        # Tensors hold the memory but do not export it: the last one to go gives it back.
        self.bytes = torch.frombuffer(memory.view(), dtype=torch.uint8)[:size]
        self.granted = memory.granted
        self.pinned = native.Granted.LOCKED in memory.granted
        for missing, consequence in _shortcomings(memory.granted, device, node, huge=huge):
            _log.warning("The memory of %s is not %s", name, f"{missing}: {consequence}")


def _shortcomings(granted: Any, device: torch.device, node: int, *, huge: bool) -> Iterator[tuple[str, str]]:
    """What was asked for and not given, and what to do about it."""
    if device.type == "cuda" and native.Granted.LOCKED not in granted:
        yield "page-locked", "transfers will be slow; raise the limit of locked memory (ulimit -l)"
    if huge and native.Granted.HUGE not in granted:
        yield "in huge pages", "reserve enough of them (vm.nr_hugepages), or set huge_pages to false"
    if node != ANY_NODE and native.Granted.BOUND not in granted:
        yield f"on NUMA node {node}", "transfers may be slower; free memory there, or set numa_node to any"


def _available_memory(size: int, *, huge: bool) -> int | None:
    """Bytes that can be had at most, None where nothing says so. Reserved huge pages count where they hold it all."""
    if huge and (pool := _huge_pages()) >= size:
        return pool
    free = [each for each in (_machine_memory(), *_container_memory()) if each is not None]
    return min(free, default=None)


def _huge_pages() -> int:
    with suppress(OSError, ValueError):
        return int((_HUGE_POOL / "free_hugepages").read_text(encoding="ascii")) * _HUGE_PAGE
    return 0


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else None


def _container_memory() -> Iterator[int]:
    """What the control group's limit leaves, file cache that the kernel would drop included (cgroups(7), both
    versions). Going over it ends the process without a word."""
    for folder, (limit, used, cache) in _control_groups():
        with suppress(OSError, ValueError):
            figures = [int((folder / name).read_text(encoding="ascii")) for name in (limit, used)]
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            dropped = dict(line.split() for line in lines).get(cache, "0")
            yield max(0, figures[0] - figures[1] + int(dropped))


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The process's own control group and those around it, whose limits count as well, and the files that have them. A
    container mostly sees its own as the root, whatever path it is told."""
    paths: dict[str, str] = {}
    with suppress(OSError, ValueError):
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
        paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for root, controller, files in (
        (_CGROUPS, "", ("memory.max", "memory.current", "inactive_file")),
        (_CGROUPS / "memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        own = PurePosixPath("/", paths.get(controller, ""))
        for path in (own, *own.parents):
            if ".." not in path.parts:
                yield root / path.relative_to("/"), files
