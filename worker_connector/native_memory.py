"""What memory an object is: tensors of torch and arrays of NumPy, without importing either, and other buffers."""

import ctypes
from dataclasses import dataclass
from typing import Any

from worker_connector.errors import NativeRefusal

_TYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "<f4": "F32",
    "<f2": "F16",
    "<f8": "F64",
}


@dataclass(frozen=True, slots=True)
class Memory:
    """An array in memory. ``[begin, end)`` is all that belongs to it; strides are in bytes; ``dtype`` is the name of a
    ``native.ElementType``; ``locked`` says whether host memory is known to be page-locked."""

    address: int
    begin: int
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int
    dtype: str = "BYTES"
    device: str = "cpu"
    locked: bool = False
    writable: bool = True

    @property
    def size(self) -> int:
        """Bytes from its first element to the end of its last."""
        return self.end - self.address

    @property
    def alike(self) -> tuple[Any, ...]:
        """What the layers of one view have in common."""
        return self.shape, self.strides, self.element_bytes, self.dtype, self.device


def memory_of(thing: Any, *, contiguous: bool = True) -> Memory:
    """The memory of a tensor, an array or a buffer. The caller keeps ``thing`` alive.

    Raises:
        NativeRefusal: it has none, or is not contiguous where that is asked for.
    """
    if hasattr(thing, "data_ptr"):
        memory = _of_tensor(thing)
    elif hasattr(thing, "__array_interface__"):
        memory = _of_interface(thing.__array_interface__)
    else:
        memory = _of_buffer(thing)
    if contiguous and memory.strides != _packed_strides(memory.shape, memory.element_bytes):
        raise NativeRefusal(f"an array of shape {memory.shape} and strides {memory.strides} is not contiguous")
    return memory


def _of_tensor(tensor: Any) -> Memory:
    size = tensor.element_size()
    shape, strides = tuple(tensor.shape), tuple(size * stride for stride in tensor.stride())
    address, device = tensor.data_ptr(), str(tensor.device)
    begin, end = _extent(address, shape, strides, size)
    dtype = _TYPES.get(str(tensor.dtype), "BYTES")
    locked = device == "cpu" and bool(tensor.is_pinned())
    return Memory(address, begin, end, shape, _normal(shape, strides, size), size, dtype, device, locked)


def _of_interface(interface: dict[str, Any]) -> Memory:
    address, read_only = interface["data"]
    size = int(interface["typestr"][2:])
    shape = tuple(interface["shape"])
    strides = tuple(interface.get("strides") or _packed_strides(shape, size))
    begin, end = _extent(address, shape, strides, size)
    dtype = _TYPES.get(interface["typestr"], "BYTES")
    return Memory(address, begin, end, shape, _normal(shape, strides, size), size, dtype, writable=not read_only)


def _of_buffer(thing: Any) -> Memory:
    try:
        view = memoryview(thing)
    except TypeError as error:
        raise NativeRefusal(f"a {type(thing).__name__} is no tensor, array or buffer") from error
    if not view.c_contiguous:
        raise NativeRefusal("a buffer is not contiguous")
    address = _address_of(view) if view.nbytes else 0
    return Memory(address, address, address + view.nbytes, (view.nbytes,), (1,), 1, writable=not view.readonly)


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("shape", "strides", "suboffsets", "internal")),
    )


def _address_of(view: memoryview) -> int:
    # Py_buffer of the stable ABI: the only way to the address of what is read-only.
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def _packed_strides(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    strides = []
    for count in reversed(shape):
        strides.append(size)
        size *= max(count, 1)
    return tuple(reversed(strides))


def _normal(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Strides of dimensions that are never stepped along, as if they were packed."""
    packed = _packed_strides(shape, size)
    if 0 in shape:
        return packed
    return tuple(wanted if count == 1 else stride for count, stride, wanted in zip(shape, strides, packed, strict=True))


def _extent(address: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, int]:
    if 0 in shape:
        return address, address
    steps = [(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]
    return address + sum(step for step in steps if step < 0), address + sum(step for step in steps if step > 0) + size
