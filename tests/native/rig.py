"""Runs one backend of the native core on memory that is poisoned all around, and fetches every byte back.

The same tests drive each instruction set of the CPU backend and, where there is a GPU and PyTorch, the CUDA backend:
caches are then device memory and packed forms page-locked host memory.
"""

import ctypes
import importlib.util
import os
import platform
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from tests.native import abi, oracle
from tests.native.layouts import View

GUARD = 256
Place = Literal["cache", "packed", "staging"]


class Missing(Exception):
    """A backend or instruction set that this machine does not have."""


@dataclass(frozen=True)
class Backend:
    name: str
    library: str
    isa: int = 0
    path: int = 0


def backends() -> list[Backend]:
    """What can be tested here; ``WARMROUTE_TEST_BACKENDS`` (``cpu``, ``cuda``, with a comma between them) says what must be;
    ``emulated`` is the CUDA backend on an emulated GPU (test_cuda_emulated.py)."""
    wanted = os.environ.get("WARMROUTE_TEST_BACKENDS")
    names = wanted.split(",") if wanted else ["cpu", *(["cuda"] if Path("/dev/nvidia0").exists() else [])]
    found = []
    if "cpu" in names:
        vector = {"x86_64": [("avx2", abi.AVX2), ("avx512", abi.AVX512)], "aarch64": [("neon", abi.NEON)]}
        for label, isa in [("portable", abi.PORTABLE), *vector.get(platform.machine(), [])]:
            found.append(Backend(f"cpu-{label}", "libwarmroute_cpu.so", isa))
    for name in ("cuda", "emulated"):
        if name in names:
            paths = {"auto": 0, "copy-engine": 1, "kernel": 2, "staged": 3}
            found += [Backend(f"{name}-{label}", f"libwarmroute_{name}.so", path=path) for label, path in paths.items()]
    return found


def library_path(name: str) -> Path:
    """The library that the package would load."""
    directory = os.environ.get("WARMROUTE_NATIVE_DIR")
    if not directory:
        package = importlib.util.find_spec("worker_connector")
        assert package is not None
        assert package.submodule_search_locations
        directory = str(Path(package.submodule_search_locations[0]) / "lib")
    path = Path(directory) / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: install the package, or set WARMROUTE_NATIVE_DIR to a build's folder"
        )
    return path


class Memory:
    """A run of bytes with poison before and behind it. ``shift`` bytes take it off a 64-byte boundary."""

    def __init__(self, image: oracle.Bytes, tensor: Any, shift: int) -> None:
        self.size = image.size
        self._tensor = tensor
        self._start = GUARD + -(_address(tensor) + GUARD) % 64 + shift
        self.address = _address(tensor) + self._start
        self._poison = np.random.default_rng(image.size).integers(0, 256, _length(tensor), np.uint8)
        self.fill(image)

    @classmethod
    def room(cls, size: int) -> int:
        return size + 2 * GUARD + 128

    def fill(self, image: oracle.Bytes) -> None:
        """Set the bytes, and the poison around them."""
        everything = self._poison.copy()
        everything[self._start : self._start + self.size] = image
        _write(self._tensor, everything)

    def fetch(self) -> oracle.Bytes:
        """The bytes; an ``AssertionError`` if the poison around them was touched."""
        everything = _read(self._tensor)
        inside = slice(self._start, self._start + self.size)
        outside = everything != self._poison
        outside[inside] = False
        touched = np.flatnonzero(outside)
        assert not touched.size, f"bytes outside were written: {touched[:8] - self._start} of {self.size}"
        return everything[inside]


def _address(tensor: Any) -> int:
    return int(tensor.ctypes.data) if isinstance(tensor, np.ndarray) else int(tensor.data_ptr())


def _length(tensor: Any) -> int:
    return int(tensor.size) if isinstance(tensor, np.ndarray) else int(tensor.numel())


def _write(tensor: Any, image: oracle.Bytes) -> None:
    if isinstance(tensor, np.ndarray):
        tensor[:] = image
    else:
        import torch

        tensor.copy_(torch.from_numpy(image))
        if tensor.is_cuda:
            torch.cuda.synchronize()  # what follows is on another stream


def _read(tensor: Any) -> oracle.Bytes:
    return tensor.copy() if isinstance(tensor, np.ndarray) else tensor.cpu().numpy().copy()


@dataclass(frozen=True)
class Outcome:
    status: int
    checksums: list[int]


class Rig:
    """A context of one backend. Calls return statuses; what went wrong is in ``explain``."""

    def __init__(self, backend: Backend, threads: int = 1) -> None:
        self.backend = backend
        self.on_device = backend.library == "libwarmroute_cuda.so"
        self.library = abi.load(library_path(backend.library))
        # A GPU that was asked for by name and cannot be used is a failure with a reason.
        may_lack = not (self.on_device and os.environ.get("WARMROUTE_TEST_BACKENDS"))
        if self.on_device and may_lack and self.library.wr_devices() == 0:
            raise Missing("no usable GPU")
        self._context = c_void_p()
        options = abi.Options(0, threads, backend.path, backend.isa)
        status = self.library.wr_open(ctypes.byref(options), ctypes.byref(self._context))
        if status == abi.UNSUPPORTED and may_lack:
            raise Missing(self.explain())
        assert status == abi.OK, f"{status}: {self.explain()}"
        self._stream = self._make_stream()

    def _make_stream(self) -> Any:
        if self.backend.name.startswith("emulated"):
            return SimpleNamespace(cuda_stream=0x5000)
        if not self.on_device:
            return None
        import torch

        return torch.cuda.Stream()

    def close(self) -> None:
        self.library.wr_close(self._context)
        self._context = c_void_p()

    @property
    def stream(self) -> int | None:
        """The handle that calls take."""
        return self._stream.cuda_stream if self._stream is not None else None

    def explain(self) -> str:
        """What the last failed call said."""
        return str(self.library.wr_explain(self._context or None).decode())

    def describe(self) -> str:
        """The context in one line."""
        text = ctypes.create_string_buffer(512)
        assert self.library.wr_describe(self._context, text, len(text)) == abi.OK
        return text.value.decode()

    def memory(self, image: oracle.Bytes, place: Place, shift: int = 0) -> Memory:
        """Memory with these bytes: the cache's, a packed form's, or staging next to the cache."""
        room = Memory.room(image.size)
        if not self.on_device:
            return Memory(image, np.empty(room, np.uint8), shift)
        import torch

        where: dict[str, Any] = {"pin_memory": True} if place == "packed" else {"device": "cuda"}
        return Memory(image, torch.empty(room, dtype=torch.uint8, **where), shift)

    def unit_bytes(self, view: View, encoding: int) -> int:
        """Bytes of an encoded unit, or a negative status."""
        described, _keep = _describe(view, 0)
        return int(self.library.wr_unit_bytes(ctypes.byref(described), encoding))

    def gather(
        self,
        view: View,
        cache: Memory,
        part: oracle.Range,
        spans: Sequence[tuple[oracle.Span, Memory]],
        encoding: int = abi.RAW,
        *,
        checksums: bool = False,
    ) -> Outcome:
        """Cache to packed forms; what the stream says in the end is the status."""
        return self._move(self.library.wr_gather, (encoding,), view, cache, part, spans, checksums)

    def scatter(
        self,
        view: View,
        cache: Memory,
        part: oracle.Range,
        spans: Sequence[tuple[oracle.Span, Memory]],
        encoding: int = abi.RAW,
        *,
        rotation: oracle.Rotation | None = None,
        checksums: bool = False,
    ) -> Outcome:
        """Packed forms to cache."""
        turned = ctypes.byref(_rotation(rotation)) if rotation else None
        return self._move(self.library.wr_scatter, (encoding, turned), view, cache, part, spans, checksums)

    def rotate(
        self, view: View, cache: Memory, part: oracle.Range, blocks: Sequence[int], rotation: oracle.Rotation
    ) -> int:
        """Rotate K where it is."""
        described, _keep = _describe(view, cache.address)
        ids = (c_int32 * max(len(blocks), 1))(*blocks)
        status = self.library.wr_rotate(
            self._context,
            ctypes.byref(described),
            ctypes.byref(_range(part)),
            ids,
            len(blocks),
            ctypes.byref(_rotation(rotation)),
            self.stream,
        )
        return self._finished(status)

    def _move(  # noqa: PLR0917 - one place to call both from
        self,
        function: Any,
        arguments: tuple[Any, ...],
        view: View,
        cache: Memory,
        part: oracle.Range,
        spans: Sequence[tuple[oracle.Span, Memory]],
        checksums: bool,
    ) -> Outcome:
        described, _keep = _describe(view, cache.address)
        blocks = [block for span, _ in spans for block in span.blocks]
        pages = len(view.layers) * len(blocks)
        sums = self.memory(np.full(8 * pages, 0x5A, np.uint8), "packed") if checksums else None
        status = function(
            self._context,
            ctypes.byref(described),
            ctypes.byref(_range(part)),
            (c_int32 * max(len(blocks), 1))(*blocks),
            (abi.Span * max(len(spans), 1))(*[_span(span, memory) for span, memory in spans]),
            len(spans),
            *arguments,
            sums.address if sums else None,
            self.stream,
        )
        status = self._finished(status)
        return Outcome(status, sums.fetch().view(np.uint64).tolist() if sums else [])

    def _finished(self, status: int) -> int:
        ended = int(self.library.wr_finish(self._context, self.stream))
        return int(status) or ended

    def checksum(self, memory: Memory, size: int | None = None, at: int = 0) -> int:
        """``wr_checksum`` of a part of memory."""
        result = self.memory(np.full(8, 0x5A, np.uint8), "packed")
        status = self.library.wr_checksum(
            self._context,
            memory.address + at,
            memory.size - at if size is None else size,
            result.address,
            self.stream,
        )
        assert self._finished(status) == abi.OK, self.explain()
        return int(result.fetch().view(np.uint64)[0])

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *, loads: bool) -> int:
        """Many copies between addresses."""
        words = [(c_uint64 * max(len(each), 1))(*each) for each in (targets, sources, sizes)]
        return self._finished(self.library.wr_copy_batch(self._context, *words, len(sizes), int(loads), self.stream))

    def crc32c(self, data: bytes, crc: int = 0) -> int:
        return int(self.library.wr_crc32c(crc, data, len(data)))


def _describe(view: View, base: int) -> tuple[abi.View, Any]:
    """The view as the ABI takes it, and what must live as long."""
    addresses = (c_uint64 * max(len(view.layers), 1))(*[base + offset for offset in view.layers])
    described = abi.View(
        addresses,
        base,
        base + view.size,
        view.block_stride,
        view.head_stride,
        view.token_stride,
        len(view.layers),
        view.blocks,
        view.heads,
        view.tokens,
        view.content,
        view.dtype,
        view.k_offset,
        view.k_bytes,
        view.v_offset,
        view.v_bytes,
    )
    return described, addresses


def _range(part: oracle.Range) -> abi.Range:
    return abi.Range(
        part.first_head, part.heads, part.packed_first_head, part.packed_heads, part.first_token, part.token_count
    )


def _span(span: oracle.Span, memory: Memory) -> abi.Span:
    return abi.Span(memory.address, memory.size, len(span.blocks), span.first, span.packed_blocks, 0)


def _rotation(rotation: oracle.Rotation) -> abi.Rotation:
    count = len(rotation.cosines)
    cosines, sines = (c_double * max(count, 1))(*rotation.cosines), (c_double * max(count, 1))(*rotation.sines)
    return abi.Rotation(cosines, sines, count, rotation.offset, int(rotation.interleaved), 0)
