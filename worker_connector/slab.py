"""The CPU tier's memory on one rank: fixed slots in one allocation, made once and never moved."""

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from worker_connector.errors import ConfigurationError

_MADV_POPULATE_WRITE = 23
_CGROUPS = Path("/sys/fs/cgroup")

_log = logging.getLogger("vllm.warmroute.slab")


class Slab:
    """``slots`` times ``slot_bytes`` bytes of host memory, page-locked for a GPU where ``pin`` asks for it.

    All of it is taken from the operating system at once: a page fault in the middle of a save would stall the engine's
    own allocations. That costs a fraction of a second per GiB.

    Raises:
        ConfigurationError: the machine, or the container, does not have that much memory.
    """

    def __init__(self, slots: int, slot_bytes: int, *, pin: bool = False) -> None:
        size = slots * slot_bytes
        available = _available_memory()
        if available is not None and size > available:
            raise ConfigurationError(
                f"the CPU tier needs {size >> 20} MiB on this rank, but only {available >> 20} MiB of memory are "
                "available: lower cpu_bytes"
            )
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.pinned = False
        memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.bytes: torch.Tensor | None = whole[:size]
        self._address = whole.data_ptr()
        if size:
            _populate(self._address, size)
        if pin and size:
            self._pin(size)

    def close(self) -> None:
        """Give the memory back. No transfer may be under way; views that others still hold keep it until they go."""
        # Tensors hold the mapping but do not export it, so that closing it would unmap it under them: the last one to
        # go does that.
        self.bytes = None
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self.pinned = False

    def _pin(self, size: int) -> None:
        # torch's own pinned allocator rounds sizes up to a power of two, which wastes up to half of a large slab.
        result = torch.cuda.cudart().cudaHostRegister(self._address, size, 0)
        self.pinned = int(result) == 0
        if not self.pinned:
            _log.warning("The CPU tier's memory cannot be page-locked (CUDA error %d); transfers will be slow", result)


def _populate(address: int, size: int) -> None:
    """Fault all pages in. Kernels before 5.14 cannot; there, first writes do."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
        _log.info("The CPU tier's memory is not populated ahead: %s", os.strerror(ctypes.get_errno()))


def _available_memory() -> int | None:
    free = [each for each in (_machine_memory(), *_container_memory()) if each is not None]
    return min(free, default=None)


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
    for folder, limit, used, cache in (
        (_CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            figures = [int((folder / name).read_text(encoding="ascii")) for name in (limit, used)]
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            dropped = dict(line.split() for line in lines).get(cache, "0")
            yield max(0, figures[0] - figures[1] + int(dropped))
