"""The native core (``csrc/warmroute.h``): the only place where addresses leave Python.

A ``Context`` is one backend, ready to work: ``Context("cpu")`` in host memory, ``Context("cuda:0")`` on a GPU. It moves
blocks between a cache, which a ``View`` describes, and packed forms, which spans describe. What only Python can know is
checked here: types, sizes and kinds of the memory behind every address. What arithmetic can tell (bounds of layers,
blocks, heads and tokens, packed sizes, overflow) the core checks, in every call, before it writes anything.

Calls release the interpreter lock. Those of the CPU backend return when the bytes are there. Those of the CUDA backend
only enqueue on ``stream``: memory that they name must stay until the stream has come by.

The libraries are looked for in ``$WARMROUTE_NATIVE_DIR`` if that is set, else in ``lib/`` beside this module, and nowhere
else. A library that is missing or cannot work is an error that says so; nothing takes its place.
"""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from math import prod
from pathlib import Path
from struct import Struct
from struct import error as StructError  # noqa: N812 - it is an exception
from types import TracebackType
from typing import Any, Self

from worker_connector.errors import Corrupt, Incompressible, NativeError, NativeRefusal, NativeUnavailable
from worker_connector.native_memory import Memory, memory_of
from worker_connector.native_types import (
    ALL_TOKENS,
    ElementType,
    Encoding,
    Granted,
    InstructionSet,
    Range,
    Rotation,
    Route,
    Span,
    Status,
    View,
    array_of,
)

__all__ = [
    "ALL_TOKENS",
    "Context",
    "Corrupt",
    "ElementType",
    "Encoding",
    "Granted",
    "Incompressible",
    "InstructionSet",
    "Library",
    "NativeError",
    "NativeRefusal",
    "NativeUnavailable",
    "Range",
    "Rotation",
    "Route",
    "Slab",
    "Span",
    "View",
    "crc32c",
    "library",
]

_log = logging.getLogger("vllm.warmroute.native")

ABI_VERSION = 1

_OWN_FOLDER = str(Path(__file__).parent.absolute() / "lib")
_SPAN = Struct("=QQiiii")


class _Options(ctypes.Structure):
    _fields_ = (*((name, c_int32) for name in ("device", "threads", "path", "isa")), ("reserved", c_int32 * 4))


class Slab:
    """Host memory that ``Context.allocate`` took. It is given back when this object and all that was made with ``view``
    are gone, whatever becomes of the context."""

    def __init__(self, library: "Library", address: int, size: int, granted: Granted) -> None:
        self.address, self.size, self.granted = address, size, granted
        self._bytes = (ctypes.c_uint8 * size).from_address(address)
        self._freeing = weakref.finalize(self._bytes, _give_back, library, os.getpid(), address, size)
        self._freeing.atexit = False

    def view(self) -> memoryview:
        """The bytes, writable. What is made of it keeps the slab."""
        return memoryview(self._bytes).cast("B")


class Library:
    """A loaded library of the core. Use ``library``, which loads each once.

    Raises:
        NativeUnavailable: it is missing, or cannot work here.
    """

    def __init__(self, backend: str, path: Path) -> None:
        if not path.is_file():
            raise NativeUnavailable(f"{path} is missing: {_CURES[backend]}")
        try:
            self.functions = ctypes.CDLL(str(path))
            for name, (result, *arguments) in _FUNCTIONS.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{path} cannot be loaded: {error}: {_CURES[backend]}") from error
        if (abi := self.functions.wr_abi()) != ABI_VERSION:
            raise NativeUnavailable(
                f"{path} has ABI version {abi}, but this package needs {ABI_VERSION}: they are of different releases; "
                f"{_CURES[backend]}"
            )
        self.backend, self.path = backend, path
        self.build = _text(self.functions.wr_build())

    @property
    def devices(self) -> int:
        """How many devices this backend can use here."""
        return int(self.functions.wr_devices())


def _give_back(library: Library, owner: int, address: int, size: int) -> None:
    # A child of fork() does not have the slab, and may have one of its own at the same address.
    if os.getpid() == owner:
        library.functions.wr_slab_free(None, address, size)


_CURES = {
    "cpu": "install warmroute again (pip install --force-reinstall --no-deps warmroute), or let WARMROUTE_NATIVE_DIR "
    "name the folder that has it",
    "cuda": "this installation has no working library for GPUs; where the CUDA toolkit's nvcc is found (12.8 or later; "
    "CUDACXX names it), install warmroute from its sources again, or let WARMROUTE_NATIVE_DIR name the folder that has it",
}

_MOVE = (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "wr_abi": (c_int32,),
    "wr_build": (c_char_p,),
    "wr_devices": (c_int32,),
    "wr_open": (c_int32, c_void_p, c_void_p),
    "wr_close": (None, c_void_p),
    "wr_explain": (c_char_p, c_void_p),
    "wr_describe": (c_int32, c_void_p, c_void_p, c_size_t),
    "wr_unit_bytes": (c_int64, c_void_p, c_int32),
    "wr_gather": (*_MOVE, c_void_p, c_void_p),
    "wr_scatter": (*_MOVE, c_void_p, c_void_p, c_void_p),
    "wr_rotate": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p),
    "wr_copy_batch": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_void_p),
    "wr_finish": (c_int32, c_void_p, c_void_p),
    "wr_calibrate": (c_int32, c_void_p, c_void_p, c_void_p),
    "wr_checksum": (c_int32, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p),
    "wr_crc32c": (c_uint32, c_uint32, c_void_p, c_size_t),
    "wr_slab_alloc": (c_int32, c_void_p, c_size_t, c_int32, c_int32, c_int32, c_void_p, c_void_p),
    "wr_slab_free": (c_int32, c_void_p, c_void_p, c_size_t),
}


def library(backend: str) -> Library:
    """The library of a backend, ``cpu`` or ``cuda``.

    Raises:
        NativeUnavailable: it is missing, or cannot work here.
    """
    folder = os.environ.get("WARMROUTE_NATIVE_DIR") or _OWN_FOLDER
    # Absolute: a name without a slash would be looked for in the system's folders.
    return _loaded_from(backend, folder if folder[0] == "/" else str(Path(folder).absolute()))


@cache
def _loaded_from(backend: str, folder: str) -> Library:
    return _loaded(backend, Path(folder) / f"libwarmroute_{backend}.so")


@cache
def _loaded(backend: str, path: Path) -> Library:
    return Library(backend, path)


@cache
def _announce(build: str, description: str, path: Path) -> None:
    _log.info("Native core: %s, %s (%s)", build, description, path)


class Context:
    """One backend at work: its threads, or its GPU. One thread uses it at a time; ``close`` it in the end.

    ``device`` is ``cpu`` or ``cuda:N``, as text or as torch has it. ``threads`` is how many share a call, the caller
    included, 0 for the usable cores up to 8; on a GPU, the most thread blocks, 0 for 16.

    Raises:
        NativeUnavailable: there is no library for that device, or it cannot work here.
    """

    def __init__(
        self,
        device: Any = "cpu",
        *,
        threads: int = 0,
        route: Route = Route.AUTO,
        instruction_set: InstructionSet = InstructionSet.BEST,
    ) -> None:
        self._handle: int | None = None
        backend, _, ordinal = str(device).partition(":")
        if backend not in _CURES or (ordinal and not ordinal.isdecimal()):
            raise NativeUnavailable(f"there is no native backend for {str(device)!r}: it is cpu or cuda:N")
        self.library = library(backend)
        self.device = "cpu" if backend == "cpu" else f"cuda:{ordinal or 0}"
        self._on_host = backend == "cpu"
        if not 0 <= threads <= 1024:
            raise NativeRefusal(f"{threads} threads")
        self._open(_Options(int(ordinal or 0), threads, int(route), int(instruction_set)))
        functions = self.library.functions
        self._gather, self._scatter = functions.wr_gather, functions.wr_scatter
        self._busy = threading.Lock()
        self._scratch = bytearray()
        self._reserve(64)
        self.description = self._describe()
        _announce(self.library.build, self.description, self.library.path)
        _contexts.add(self)

    def _open(self, options: _Options) -> None:
        functions, handle = self.library.functions, c_void_p()
        if functions.wr_open(ctypes.addressof(options), ctypes.addressof(handle)) != Status.OK:
            reason = _text(functions.wr_explain(None))
            raise NativeUnavailable(
                f"{self.library.path} ({self.library.build}) cannot work on {self.device}: {reason}"
            )
        self._handle = handle.value

    def _describe(self) -> str:
        text = ctypes.create_string_buffer(256)
        self._check(self.library.functions.wr_describe(self._handle, ctypes.addressof(text), len(text)))
        return _text(text.value)

    def close(self) -> None:
        """Wait for what was begun, and give back threads and memory. Slabs stay."""
        with self._busy:
            handle, self._handle = self._handle, None
        if handle is not None:
            self.library.functions.wr_close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._handle is not None:
            self.library.functions.wr_close(self._handle)

    def unit_bytes(self, view: View, encoding: Encoding) -> int:
        """Bytes of one encoded (layer, block, head).

        Raises:
            NativeError: the encoding cannot hold the view's elements.
        """
        size: int = self.library.functions.wr_unit_bytes(view.address, encoding)
        if size < 0:
            raise NativeError(f"{Encoding(encoding).name} cannot hold this cache's elements ({Status(size).name})")
        return size

    def span(
        self, memory: Any, block_count: int, packed_first_block: int = 0, packed_blocks: int | None = None
    ) -> Span:
        """A span whose packed form is a tensor, an array or a buffer, which the span keeps.

        Raises:
            NativeRefusal: it is not contiguous, not writable, or of a kind that this backend cannot reach.
        """
        held = self._reachable(memory)
        total = block_count if packed_blocks is None else packed_blocks
        span = Span(held.address, held.size, block_count, packed_first_block, total)
        span.owner = memory
        return span

    def gather(
        self,
        view: View,
        blocks: Any,
        spans: Sequence[Span | tuple[int, ...]],
        *,
        range: Range | None = None,  # noqa: A002 - the core's word
        encoding: int = Encoding.RAW,
        checksums: Any = None,
        stream: int = 0,
    ) -> None:
        """Copy blocks from the cache into the packed forms of ``spans``.

        ``blocks`` are the ids of all spans, one after the other: integers, or an ``int32`` array in host memory.
        ``checksums``, 8 bytes for each page of every span, ``[layer][block]``, receive those of what was moved; with
        CUDA they are page-locked or on the GPU. Costs about 3 µs more than the copies.

        Raises:
            Incompressible: EXP12 cannot hold a unit; what was written is undefined. With CUDA, ``finish`` raises it.
            NativeRefusal: something does not fit; nothing was written.
            NativeError: the backend failed; what was written is undefined.
        """
        self._move(self._gather, (stream,), view, blocks, spans, range, encoding, checksums)

    def scatter(
        self,
        view: View,
        blocks: Any,
        spans: Sequence[Span | tuple[int, ...]],
        *,
        range: Range | None = None,  # noqa: A002 - the core's word
        encoding: int = Encoding.RAW,
        rotation: Rotation | None = None,
        checksums: Any = None,
        stream: int = 0,
    ) -> None:
        """Copy from the packed forms of ``spans`` into blocks of the cache, with K rotated if asked for; else as
        ``gather``. No block may be named twice.

        Raises:
            NativeRefusal: something does not fit; nothing was written.
            Corrupt: the packed form is damaged; what was written is undefined.
            NativeError: the backend failed; what was written is undefined.
        """
        turn = rotation.address if rotation is not None else 0
        self._move(self._scatter, (turn, stream), view, blocks, spans, range, encoding, checksums)

    def _move(  # noqa: PLR0917 - as its callers have them
        self,
        call: Callable[..., int],
        extra: tuple[int, ...],
        view: View,
        blocks: Any,
        spans: Sequence[Span | tuple[int, ...]],
        part: Range | None,
        encoding: int,
        checksums: Any,
    ) -> None:
        at, count, kept = _block_ids(blocks)
        sums = 0 if checksums is None else self._sums(checksums, view.layer_count * count)
        where = view.whole if part is None else part
        self._take(view)
        try:
            packed = self._pack_spans(spans, count)
            *before, stream = extra
            status = call(
                self._handle, view.address, where.address, at, packed, len(spans), encoding, *before, sums, stream
            )
            del kept
            if status:
                self._fail(status)
        finally:
            self._busy.release()

    def rotate(
        self,
        view: View,
        blocks: Any,
        rotation: Rotation,
        *,
        range: Range | None = None,  # noqa: A002 - the core's word
        stream: int = 0,
    ) -> None:
        """Rotate K of blocks in the cache, which must be an original.

        Raises:
            NativeRefusal: something does not fit; nothing was written.
            NativeError: the backend failed; what was written is undefined.
        """
        at, count, kept = _block_ids(blocks)
        where = view.whole if range is None else range
        self._take(view)
        try:
            rotate = self.library.functions.wr_rotate
            self._check(rotate(self._handle, view.address, where.address, at, count, rotation.address, stream))
            del kept
        finally:
            self._busy.release()

    def copy_batch(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *, loads: bool, stream: int = 0
    ) -> None:
        """Copy ``sizes[i]`` bytes from address ``sources[i]`` to ``targets[i]``, for all i. ``loads``: nothing that the
        stream still has to run writes the sources. What is copied must not overlap.

        Raises:
            NativeRefusal: the lists differ in length, or hold what is no address; nothing was written.
            NativeError: the backend failed; what was written is undefined.
        """
        lists = [array_of("Q", values) for values in (targets, sources, sizes)]
        if len({len(each) for each in lists}) != 1:
            raise NativeRefusal(f"{len(targets)} targets, {len(sources)} sources and {len(sizes)} sizes")
        self._take()
        try:
            addresses = [each.buffer_info()[0] for each in lists]
            copy = self.library.functions.wr_copy_batch
            self._check(copy(self._handle, *addresses, len(lists[0]), int(loads), stream))
        finally:
            self._busy.release()

    def finish(self, stream: int = 0) -> None:
        """Wait for the stream, and raise what the gathers since the last call failed with.

        Raises:
            Incompressible: EXP12 cannot hold a unit; what was written is undefined.
            NativeError: the backend failed; what was written is undefined.
        """
        self._take()
        try:
            self._check(self.library.functions.wr_finish(self._handle, stream))
        finally:
            self._busy.release()

    def calibrate(self) -> tuple[int, int]:
        """Measure from which page size the copy engines beat the kernel, and use it from then on: (loads, saves), in
        bytes. Takes some tens of milliseconds on a GPU, and nothing in host memory.

        Raises:
            NativeError: the backend failed.
        """
        cutoffs = (c_uint64 * 2)()
        at = ctypes.addressof(cutoffs)
        self._take()
        try:
            self._check(self.library.functions.wr_calibrate(self._handle, at, at + 8))
            self.description = self._describe()
        finally:
            self._busy.release()
        return cutoffs[0], cutoffs[1]

    def checksum(self, memory: Any, *, out: Any = None, stream: int = 0) -> int:
        """The checksum of a tensor, an array or a buffer (docs/kv-codecs.md). On a GPU it is only enqueued, and written
        to ``out``, 8 bytes that are page-locked or on the GPU; 0 is returned.

        Raises:
            NativeRefusal: the memory is not contiguous, or this backend cannot reach it.
            NativeError: the backend failed.
        """
        held, local = self._reachable(memory, written=False), c_uint64()
        if out is None and not self._on_host:
            raise NativeRefusal("a checksum on a GPU needs 8 bytes of page-locked memory to be written to")
        target = ctypes.addressof(local) if out is None else self._sums(out, 1)
        self._take()
        try:
            self._check(self.library.functions.wr_checksum(self._handle, held.address, held.size, target, stream))
        finally:
            self._busy.release()
        return local.value

    def allocate(self, size: int, *, node: int = -1, huge: bool = False, lock: bool = True) -> Slab:
        """Zeroed host memory, all of it taken now, which costs a fraction of a second per GiB. On NUMA node ``node`` (-1:
        where it is first written), in explicit huge pages if ``huge`` and there are enough, page-locked if ``lock`` and this
        is a GPU's context. ``Slab.granted`` says which of it was given. Children of fork() do not get it.

        Raises:
            NativeRefusal: there is no such node, or the size is none.
            NativeError: the machine does not have that much, or it cannot be page-locked.
        """
        if not 0 < size < 2**63 or not -1 <= node < 2**31:
            raise NativeRefusal(f"a slab of {size} bytes on NUMA node {node}")
        address, granted = c_void_p(), c_uint32()
        places = (ctypes.addressof(address), ctypes.addressof(granted))
        self._take()
        try:
            take = self.library.functions.wr_slab_alloc
            self._check(take(self._handle, size, node, int(huge), int(lock and not self._on_host), *places))
        finally:
            self._busy.release()
        assert address.value is not None
        return Slab(self.library, address.value, size, Granted(granted.value))

    def _take(self, view: View | None = None) -> None:
        if not self._busy.acquire(blocking=False):
            raise NativeError("another thread uses this native context: each thread needs its own")
        refusal: NativeError | None = None
        if self._handle is None:
            refusal = NativeError("this native context is closed")
        elif view is not None and view.device is not None and view.device != self.device:
            refusal = NativeRefusal(f"a view of memory on {view.device} is used on {self.device}")
        if refusal is not None:
            self._busy.release()
            raise refusal

    def _pack_spans(self, spans: Sequence[Span | tuple[int, ...]], count: int) -> int:
        if len(self._scratch) < len(spans) * _SPAN.size:
            self._reserve(2 * len(spans))
        at, blocks, scratch = 0, 0, self._scratch
        try:
            for span in spans:
                _SPAN.pack_into(scratch, at, *span)
                blocks += span[2]
                at += _SPAN.size
        except (StructError, IndexError) as error:
            raise NativeRefusal(f"{span} is no span: {error}") from error
        if blocks != count:
            raise NativeRefusal(f"the spans have {blocks} blocks, but {count} are named")
        return self._scratch_address

    def _reserve(self, spans: int) -> None:
        self._scratch = bytearray(spans * _SPAN.size)
        self._scratch_address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))

    def _sums(self, array: Any, count: int) -> int:
        interface = getattr(array, "__array_interface__", None)
        if interface is not None and interface["typestr"] in _WORDS and interface["strides"] is None:
            address, read_only = interface["data"]
            if not read_only and prod(interface["shape"]) >= count:
                return int(address)
        held = self._reachable(array)
        if held.element_bytes != 8 or held.size < 8 * count:
            raise NativeRefusal(f"{count} checksums need as many integers of 8 bytes, not {held.shape}")
        return held.address

    def _reachable(self, thing: Any, *, written: bool = True) -> Memory:
        held = memory_of(thing)
        if written and not held.writable:
            raise NativeRefusal("memory that is to be written is read-only")
        if held.device not in {"cpu", self.device}:
            raise NativeRefusal(f"memory on {held.device} is used on {self.device}")
        if not self._on_host and held.locked is False:
            raise NativeRefusal("a GPU reaches page-locked host memory only: allocate it with pin_memory=True")
        return held

    def _check(self, status: int) -> None:
        if status:
            self._fail(status)

    def _fail(self, status: int) -> None:
        reason = _text(self.library.functions.wr_explain(self._handle))
        known = Status(status)
        kind = _ERRORS.get(known, NativeError)
        raise kind(f"native core: {reason} ({known.name.lower().replace('_', ' ')})")


_WORDS = frozenset({"<i8", "<u8"})
_ERRORS: dict[Status, type[NativeError]] = {
    Status.INVALID: NativeRefusal,
    Status.OUT_OF_BOUNDS: NativeRefusal,
    Status.UNSUPPORTED: NativeRefusal,
    Status.INCOMPRESSIBLE: Incompressible,
    Status.CORRUPT: Corrupt,
}

_contexts: weakref.WeakSet[Context] = weakref.WeakSet()


def _free_in_child() -> None:
    # A thread of the parent may have been in a call; here there is none.
    for context in _contexts:
        context._busy = threading.Lock()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_free_in_child)


def crc32c(memory: Any, crc: int = 0) -> int:
    """CRC-32C of a buffer or array in host memory, continued from ``crc``.

    Raises:
        NativeRefusal: it is not contiguous, or not in host memory.
        NativeUnavailable: the CPU backend is missing.
    """
    held = memory_of(memory)
    if held.device != "cpu":
        raise NativeRefusal(f"memory on {held.device} has no CRC")
    return int(library("cpu").functions.wr_crc32c(crc, held.address, held.size))


def _block_ids(blocks: Any) -> tuple[int, int, Any]:
    """Their address and number, and what keeps them there."""
    interface = getattr(blocks, "__array_interface__", None)
    if interface is not None:
        if interface["typestr"] != "<i4" or interface["strides"] is not None or len(interface["shape"]) != 1:
            raise NativeRefusal("block ids are integers, or one contiguous row of 32-bit ones")
        return interface["data"][0], interface["shape"][0], blocks
    ids = array_of("i", blocks)
    address, count = ids.buffer_info()
    return address, count, ids


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")
