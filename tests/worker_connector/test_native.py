import gc
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worker_connector import native
from worker_connector.errors import ConnectorError, NativeError, NativeRefusal, NativeUnavailable
from worker_connector.native import Context, ElementType, Encoding, InstructionSet, Range, Rotation, Span, View

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 2, 8, 4, 8, 16
ROOT = Path(__file__).parents[2]


@pytest.fixture(name="context")
def _context() -> Iterator[Context]:
    with Context("cpu", threads=2) as context:
        yield context


def cache_of(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT), np.uint8)


def room(blocks: int = 2) -> Any:
    return np.full((LAYERS, blocks, HEADS, TOKENS, CONTENT), 0xA5, np.uint8)


class FakeTensor:
    """What torch tells of a tensor in a GPU's memory."""

    shape, dtype, device = (4096,), "torch.uint8", "cuda:0"

    def data_ptr(self) -> int:
        return 1 << 40

    def element_size(self) -> int:
        return 1

    def stride(self) -> tuple[int, ...]:
        return (1,)


# Loading


def test_a_missing_library_names_file_and_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=rf"{tmp_path}/libwarmroute_cpu.so is missing: install warmroute again"):
        Context("cpu")


def test_a_relative_folder_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(native.library("cpu").path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", ".")
    assert native.library("cpu").path == tmp_path / "libwarmroute_cpu.so"
    with Context("cpu") as context:
        assert context.library.path.parent == tmp_path


def test_a_missing_library_for_gpus_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(native.library("cpu").path, tmp_path)
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"libwarmroute_cuda.so is missing.*nvcc"):
        Context("cuda:0")
    assert Context("cpu").library.path == tmp_path / "libwarmroute_cpu.so"


def test_a_file_that_is_no_library_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "libwarmroute_cpu.so"
    path.write_bytes(b"not ELF")
    with pytest.raises(NativeUnavailable, match=r"cannot be loaded: .*install warmroute again"):
        native.Library("cpu", path)


def test_another_library_is_refused() -> None:
    libc = next(
        Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line
    )
    with pytest.raises(NativeUnavailable, match="wr_abi"):
        native.Library("cpu", libc)


def test_a_library_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(NativeUnavailable, match=r"ABI version 1, but this package needs 99.*different releases"):
        native.Library("cpu", native.library("cpu").path)


@pytest.mark.parametrize("device", ["xpu", "cpu:x", "cuda:-1", ""])
def test_devices_without_a_backend_are_refused(device: str) -> None:
    with pytest.raises(NativeUnavailable, match=re.escape(repr(device))):
        Context(device)


def test_what_is_used_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    native._announce.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.warmroute.native"), Context("cpu", threads=1), Context("cpu", threads=1):
        pass
    (line,) = caplog.messages
    assert re.search(r"cpu \d+\.\d+\.\d+ [0-9a-f]{8} \S+, (AVX-512|AVX2|NEON|portable), 1 threads \(/.*\.so\)", line)


def test_an_instruction_set_of_another_processor_is_unavailable() -> None:
    foreign = InstructionSet.NEON if os.uname().machine == "x86_64" else InstructionSet.AVX2
    with pytest.raises(NativeUnavailable, match="lacks instruction set"):
        Context("cpu", instruction_set=foreign)


def test_errors_of_the_core_are_errors_of_the_connector() -> None:
    assert issubclass(NativeError, ConnectorError)
    assert issubclass(NativeUnavailable, NativeError)
    assert issubclass(NativeRefusal, ValueError)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing")
def test_the_library_needs_nothing_but_libc_and_exports_only_its_functions() -> None:
    path = str(native.library("cpu").path)
    dynamic = subprocess.run(["readelf", "-dW", path], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert all(re.match(r"(libc|libm|libpthread|ld-linux.*)\.so", name) for name in needed), needed
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", path], check=True, capture_output=True, text=True).stdout
    fields = [line.split() for line in symbols.splitlines() if re.match(r"\s*\d+:", line)]
    exported = {each[7] for each in fields if len(each) > 7 and each[6] != "UND"}
    assert exported == set(native._FUNCTIONS)
    # Of the C++ runtime's random numbers: they alone would ask for a libc that Ubuntu 22.04 does not have.
    assert not [each[7] for each in fields if len(each) > 7 and each[7].startswith("arc4random")]


# Views


ORDERS = [(0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (2, 0, 1, 3, 4)]


@pytest.mark.parametrize("order", ORDERS, ids=["LBHNC", "LBNHC", "BLHNC", "LHBNC", "HLBNC"])
def test_any_order_of_strides_is_a_view(context: Context, order: tuple[int, ...]) -> None:
    wanted = cache_of()
    stored = np.ascontiguousarray(wanted.transpose(order))
    view = View.of_arrays(list(stored.transpose(np.argsort(order))))
    out = room()
    context.gather(view, [5, 2], [context.span(out, 2)])
    assert (out == wanted[:, [5, 2]]).all()
    stored[:] = 0
    context.scatter(view, [5, 2], [context.span(out, 2)])
    logical = stored.transpose(np.argsort(order))
    assert (logical[:, [5, 2]] == wanted[:, [5, 2]]).all()
    assert not logical[:, [0, 1, 3, 4, 6, 7]].any()


def test_tensors_of_torch_are_views(context: Context) -> None:
    torch = pytest.importorskip("torch")
    cache = torch.randn(LAYERS, BLOCKS, TOKENS, HEADS, CONTENT, dtype=torch.bfloat16).transpose(2, 3)
    view = View.of_arrays(list(cache), value_elements=6)
    out = torch.zeros(LAYERS, 1, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    context.gather(view, torch.tensor([3], dtype=torch.int32).numpy(), [context.span(out, 1)])
    assert torch.equal(out[:, 0], cache[:, 3])


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "one array"),
        ([np.zeros((2, 2, 2), np.uint8)], "one array"),
        ([np.zeros((2, 2, 2, 4), np.uint8), np.zeros((3, 2, 2, 4), np.uint8)], "same shape"),
        ([np.zeros((2, 2, 2, 4), np.float32), np.zeros((2, 2, 2, 4), np.float16)], "same shape"),
        ([np.zeros((2, 2, 2, 8), np.uint8)[..., ::2]], "lies apart"),
        ([object()], "no tensor"),
    ],
)
def test_what_is_no_cache_makes_no_view(layers: list[Any], text: str) -> None:
    with pytest.raises(NativeRefusal, match=text):
        View.of_arrays(layers)


def test_a_view_whose_parts_share_bytes_is_refused(context: Context) -> None:
    shared = np.broadcast_to(np.zeros((BLOCKS, 1, TOKENS, CONTENT), np.uint8), (BLOCKS, HEADS, TOKENS, CONTENT))
    with pytest.raises(NativeRefusal, match="share bytes"):
        context.gather(View.of_arrays([shared]), [0], [Span(1 << 20, 1 << 20, 1, 0, 1)])


def view_with(**changed: Any) -> View:
    cache = cache_of()
    start = cache.ctypes.data
    given: dict[str, Any] = {
        "layers": [start],
        "begin": start,
        "end": start + cache.nbytes,
        "block_stride": 512,
        "block_count": 8,
        "head_stride": 128,
        "token_stride": 16,
        "heads": 4,
        "tokens": 8,
        "content_bytes": 16,
    } | changed
    return View(given.pop("layers"), **given)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"block_count": 17}, "outside the allocation"),
        ({"block_stride": 2**62}, "share bytes, or overflow"),
        ({"block_stride": -512}, "share bytes"),
        ({"layers": [2**64 - 64]}, "outside the allocation"),
        ({"layers": []}, "at least one layer"),
        ({"tokens": 0}, "at least one"),
        ({"dtype": 9}, "element type 9"),
        ({"dtype": ElementType.F32, "content_bytes": 18}, "multiples of the element"),
        ({"k": (0, 20)}, "K and V"),
        ({"k": (0, 10), "v": (8, 8)}, "apart from each other"),
        ({"k": (-4, 8)}, "K and V"),
    ],
)
def test_views_that_do_not_fit_their_memory_are_refused(context: Context, changed: dict[str, Any], text: str) -> None:
    out = room(1)[:1]
    with pytest.raises(NativeRefusal, match=text):
        context.gather(view_with(**changed), [0], [context.span(out, 1)])
    assert (out == 0xA5).all()


@pytest.mark.parametrize(
    "changed", [{"tokens": 2**31}, {"layers": [-1]}, {"begin": -1}, {"layers": [1.5]}, {"heads": "4"}]
)
def test_numbers_that_fit_no_field_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(NativeRefusal, match="fit the native core"):
        view_with(**changed)


def test_a_view_of_another_device_is_refused(context: Context) -> None:
    view = view_with(device="cuda:0")
    with pytest.raises(NativeRefusal, match="cuda:0 is used on cpu"):
        context.gather(view, [0], [Span(1 << 20, 1 << 20, 1, 0, 1)])


# Calls


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([BLOCKS, 0], f"block {BLOCKS} of a cache of {BLOCKS} blocks"),
        ([0, -1], "block -1"),
        ([0, 2**31], "fit the native core"),
        ([0, 1.0], "fit the native core"),
        (np.array([0, 1]), "32-bit"),
        (np.array([[0, 1]], np.int32), "32-bit"),
        (np.arange(4, dtype=np.int32)[::2], "32-bit"),
        ([0], "the spans have 2 blocks, but 1 are named"),
    ],
)
def test_wrong_blocks_are_refused_and_nothing_is_written(context: Context, blocks: Any, text: str) -> None:
    cache, out = cache_of(), room()
    before = cache.copy()
    for call in (context.gather, context.scatter):
        with pytest.raises(NativeRefusal, match=text):
            call(View.of_arrays(list(cache)), blocks, [context.span(out, 2)])
    assert (out == 0xA5).all()
    assert (cache == before).all()


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ((-1, 4096, 2, 0, 2, 0), "no span"),
        ((4096, 4096, 2, 0, 2), "no span"),
        ((4096, 4096, 2**31, 0, 2, 0), "no span"),
        ((0, 1 << 20, 2, 0, 2, 0), "has no memory"),
        ((4096, 1, 2, 0, 2, 0), "does not fit"),
        ((2**64 - 4096, 1 << 20, 2, 0, 2, 0), "does not fit"),
        ((4096, 1 << 20, 2, 1, 2, 0), r"packed blocks \[1, 1 \+ 2\) of 2"),
        ((4096, 2**64 - 1, 2, 0, 2**31 - 1, 0), "does not fit"),
    ],
)
def test_wrong_spans_are_refused(context: Context, span: tuple[int, ...], text: str) -> None:
    with pytest.raises(NativeRefusal, match=text):
        context.scatter(View.of_arrays(list(cache_of())), [0, 1], [span])


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (Range(HEADS + 1), "heads"),
        (Range(1, first_head=-1), "heads"),
        (Range(2, 2, first_head=3), "heads"),
        (Range(2, 2, packed_first_head=1), "packed heads"),
        (Range(HEADS, first_token=-1), "tokens"),
        (Range(HEADS, token_count=-5), "tokens"),
    ],
)
def test_wrong_ranges_are_refused(context: Context, part: Range, text: str) -> None:
    with pytest.raises(NativeRefusal, match=text):
        context.gather(View.of_arrays(list(cache_of())), [0, 1], [context.span(room(), 2)], range=part)


def test_a_range_moves_its_heads_and_tokens_only(context: Context) -> None:
    cache, out = cache_of(), room()
    part = Range(2, HEADS, first_head=1, packed_first_head=2, first_token=5, token_count=6)
    context.gather(View.of_arrays(list(cache)), [4, 1], [context.span(out, 2)], range=part)
    wanted = room()
    wanted[:, 0, 2:4, 5:] = cache[:, 4, 1:3, 5:]
    wanted[:, 1, 2:4, :3] = cache[:, 1, 1:3, :3]
    assert (out == wanted).all()


def test_memory_of_the_wrong_kind_is_refused(context: Context) -> None:
    fixed = room()
    fixed.flags.writeable = False
    for memory, text in (
        (fixed, "read-only"),
        (room()[:, :1], "not contiguous"),
        (FakeTensor(), "cuda:0"),
        (3, "no tensor"),
    ):
        with pytest.raises(NativeRefusal, match=text):
            context.span(memory, 1)


def test_checksums_need_room_and_whole_spans(context: Context) -> None:
    view, spans = View.of_arrays(list(cache_of())), [context.span(out := room(), 2)]
    for sums in (np.zeros(3, np.int64), np.zeros(4, np.int32), np.zeros(8, np.int64)[::2], bytes(64)):
        with pytest.raises(NativeRefusal):
            context.gather(view, [0, 1], spans, checksums=sums)
    with pytest.raises(NativeRefusal, match="take all tokens"):
        context.gather(view, [0, 1], spans, checksums=np.zeros(4, np.int64), range=Range(HEADS, token_count=9))
    assert (out == 0xA5).all()


def test_checksums_are_those_of_the_packed_pages(context: Context) -> None:
    view, out, saved, loaded = View.of_arrays(list(cache_of())), room(), np.zeros(4, np.uint64), np.zeros(4, np.int64)
    context.gather(view, [6, 3], [context.span(out, 2)], checksums=saved)
    assert [int(each) for each in saved] == [context.checksum(page) for page in out.reshape(4, -1)]
    context.scatter(view, [1, 2], [context.span(out, 2)], checksums=loaded)
    assert (loaded.view(np.uint64) == saved).all()


def test_encodings_that_cannot_hold_the_elements_are_refused(context: Context) -> None:
    view = View.of_arrays(list(cache_of()))
    with pytest.raises(NativeError, match="EXP12 cannot hold"):
        context.unit_bytes(view, Encoding.EXP12)
    with pytest.raises(NativeRefusal, match="encoding 3"):
        context.gather(view, [0, 1], [context.span(room(), 2)], encoding=Encoding.EXP12)
    assert context.unit_bytes(view, Encoding.RAW) == TOKENS * CONTENT


def test_rotations_must_fit_keys(context: Context) -> None:
    floats = np.zeros((LAYERS, BLOCKS, HEADS, TOKENS, CONTENT), np.float32)
    view = View.of_arrays(list(floats))
    with pytest.raises(NativeRefusal, match="1 cosines and 2 sines"):
        Rotation([1.0], [0.0, 0.0])
    for rotation in (Rotation([1.0] * 5, [0.0] * 5), Rotation([1.0] * 4, [0.0] * 4, offset=4), Rotation([], [])):
        with pytest.raises(NativeRefusal, match="native core"):
            context.rotate(view, [0], rotation)
    with pytest.raises(NativeRefusal, match="cannot be rotated"):
        context.rotate(View.of_arrays(list(cache_of())), [0], Rotation([1.0], [0.0]))


def test_rotation_in_the_cache_is_that_of_a_load(context: Context) -> None:
    original = np.random.default_rng(3).normal(size=(LAYERS, BLOCKS, HEADS, TOKENS, CONTENT)).astype(np.float32)
    rotation = Rotation(np.cos([0.1, 0.2, 0.3, 0.4]), np.sin([0.1, 0.2, 0.3, 0.4]))
    turned, loaded = original.copy(), np.zeros_like(original)
    context.rotate(View.of_arrays(list(turned)), list(range(BLOCKS)), rotation)
    context.scatter(
        View.of_arrays(list(loaded)), list(range(BLOCKS)), [context.span(original, BLOCKS)], rotation=rotation
    )
    assert (turned == loaded).all()
    assert (turned[..., 8:] == original[..., 8:]).all()
    assert not (turned[..., :8] == original[..., :8]).any()


def test_a_batch_of_copies(context: Context) -> None:
    source = np.random.default_rng(0).integers(0, 256, 1 << 21, np.uint8)
    target = np.zeros_like(source)
    cuts = np.sort(np.random.default_rng(1).integers(0, source.size, 50))
    starts, ends = [0, *cuts.tolist()], [*cuts.tolist(), source.size]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    places = [[array.ctypes.data + start for start in starts] for array in (target, source)]
    context.copy_batch(*places, sizes, loads=True)
    assert (target == source).all()
    with pytest.raises(NativeRefusal, match="1 targets, 1 sources and 2 sizes"):
        context.copy_batch([1], [1], [1, 2], loads=True)
    with pytest.raises(NativeRefusal, match="no memory"):
        context.copy_batch([0], [source.ctypes.data], [1], loads=True)
    with pytest.raises(NativeRefusal, match="leaves the address space"):
        context.copy_batch([2**64 - 1], [source.ctypes.data], [2], loads=True)


@pytest.mark.parametrize("instruction_set", [InstructionSet.BEST, InstructionSet.PORTABLE, InstructionSet.AVX2])
@pytest.mark.parametrize("order", ORDERS[:4], ids=["LBHNC", "LBNHC", "BLHNC", "LHBNC"])
@pytest.mark.parametrize("tokens", [8, 512])
def test_jobs_larger_than_caches(instruction_set: InstructionSet, order: tuple[int, ...], tokens: int) -> None:
    if instruction_set is InstructionSet.AVX2 and os.uname().machine != "x86_64":
        pytest.skip("AVX2 is for x86-64")
    random = np.random.default_rng(tokens)
    logical = random.integers(0, 256, (2, 4096 // tokens, 4, tokens, 128), np.uint8)
    blocks = random.permutation(logical.shape[1])[: 3072 // tokens]
    stored = np.ascontiguousarray(logical.transpose(order))
    view = View.of_arrays(list(stored.transpose(np.argsort(order))))
    out, sums = np.zeros((2, len(blocks), 4, tokens, 128), np.uint8), np.zeros(2 * len(blocks), np.int64)
    with Context("cpu", threads=2, instruction_set=instruction_set) as context:
        spans, ids = [context.span(out, len(blocks))], blocks.astype(np.int32)
        context.gather(view, ids, spans)
        assert (out == logical[:, blocks]).all()
        stored[:] = 0
        context.scatter(view, ids, spans, checksums=sums)
        loaded = stored.transpose(np.argsort(order))
        assert (loaded[:, blocks] == out).all()
        assert not np.delete(loaded, blocks, axis=1).any()
        pages = out.reshape(2 * len(blocks), -1)
        assert sums.view(np.uint64).tolist() == [context.checksum(page) for page in pages]


# Contexts


def test_one_thread_at_a_time() -> None:
    context = Context("cpu")
    assert context._busy.acquire(blocking=False)
    with pytest.raises(NativeError, match="another thread"):
        context.finish()
    context._busy.release()
    context.close()


def test_a_closed_context_is_refused(context: Context) -> None:
    context.close()
    context.close()
    with pytest.raises(NativeError, match="closed"):
        context.gather(View.of_arrays(list(cache_of())), [0], [Span(1, 1, 1, 0, 1)])


def test_a_refusal_leaves_the_context_usable(context: Context) -> None:
    view, out = View.of_arrays(list(cache := cache_of())), room()
    with pytest.raises(NativeRefusal):
        context.gather(view, [99, 0], [context.span(out, 2)])
    context.gather(view, [1, 0], [context.span(out, 2)])
    assert (out == cache[:, [1, 0]]).all()


def test_views_and_spans_keep_their_memory(context: Context) -> None:
    view, span = View.of_arrays(list(cache_of())), context.span(room(), 2)
    gc.collect()
    context.gather(view, [6, 3], [span])
    assert (span.owner == cache_of()[:, [6, 3]]).all()


def test_many_spans_in_one_call(context: Context) -> None:
    cache = cache_of()
    outs = [room(1) for _ in range(300)]
    blocks = [index % BLOCKS for index in range(300)]
    context.gather(View.of_arrays(list(cache)), blocks, [context.span(out, 1) for out in outs])
    assert all((out[:, 0] == cache[:, block]).all() for out, block in zip(outs, blocks, strict=True))


def test_nothing_to_move(context: Context) -> None:
    out = room()
    before = out.copy()
    context.gather(View.of_arrays(list(cache_of())), [], [])
    context.gather(View.of_arrays(list(cache_of())), [], [context.span(out, 0)])
    assert (out == before).all()


def in_child(work: Any) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_context_works_on_in_a_child_of_fork(context: Context) -> None:
    source = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)
    target = np.zeros_like(source)
    copy = ([target.ctypes.data], [source.ctypes.data], [source.size])
    context.copy_batch(*copy, loads=True)
    slab = context.allocate(1 << 20)

    def work() -> None:
        target[:] = 0
        context.copy_batch(*copy, loads=True)
        assert (target == source).all()
        slab._freeing()
        context.close()

    assert context._busy.acquire(blocking=False)  # as if another thread were in a call just now
    status = in_child(work)
    context._busy.release()
    assert status == 0
    slab.view()[0] = 1


# Memory


def mapped(address: int) -> bool:
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_a_slab_is_zeroed_memory_that_stays_as_long_as_its_views() -> None:
    context = Context("cpu")
    slab = context.allocate(5 << 20)
    context.close()
    array, address = np.frombuffer(slab.view(), np.uint8), slab.address
    assert array.size == 5 << 20
    assert not array.any()
    del slab
    gc.collect()
    array[-1] = 7
    assert mapped(address)
    del array
    gc.collect()
    assert not mapped(address)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_childs_own_slab_outlives_its_copy_of_the_parents(context: Context) -> None:
    slabs = [context.allocate(64 << 20)]

    def work() -> None:
        own = context.allocate(64 << 20)  # mostly where the parent's is in the parent
        slabs.clear()
        gc.collect()
        assert mapped(own.address)
        own.view()[0] = 1

    assert in_child(work) == 0
    slabs[0].view()[-1] = 1


def test_a_slab_says_what_it_is(context: Context) -> None:
    slab = context.allocate(1, huge=True)
    assert not slab.granted & native.Granted.LOCKED
    assert slab.granted & (native.Granted.HUGE | native.Granted.TRANSPARENT)
    assert slab.address % (2 << 20) == 0


@pytest.mark.parametrize(("size", "node"), [(0, -1), (-1, -1), (2**63, -1), (4096, -2)])
def test_slabs_that_cannot_be_are_refused(context: Context, size: int, node: int) -> None:
    with pytest.raises(NativeRefusal, match="a slab of"):
        context.allocate(size, node=node)


def test_a_numa_node_that_does_not_exist_is_refused(context: Context) -> None:
    with pytest.raises(NativeRefusal, match="NUMA node 1000 does not exist"):
        context.allocate(4096, node=1000)


def test_memory_that_the_machine_lacks_is_refused(context: Context) -> None:
    with pytest.raises(NativeError, match="MiB cannot be"):
        context.allocate(1 << 60)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda raw: np.frombuffer(raw, np.uint8)])
def test_crc32c_of_any_buffer(kind: Any) -> None:
    assert native.crc32c(kind(b"123456789")) == 0xE3069283
    assert native.crc32c(kind(b"56789"), native.crc32c(kind(b"1234"))) == 0xE3069283
    assert native.crc32c(kind(bytes(32))) == 0x8A9136AA


def test_calls_let_other_threads_run(context: Context) -> None:
    source, target = np.ones(256 << 20, np.uint8), np.zeros(256 << 20, np.uint8)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    context.copy_batch([target.ctypes.data], [source.ctypes.data], [source.size], loads=True)
    done.set()
    thread.join()
    assert ticks


# Builds


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="CMake or a compiler is missing"
)
@pytest.mark.parametrize(
    ("sanitizers", "arguments"), [("address,undefined", ["60", "7"]), ("thread", ["15", "7", "nofork"])]
)
def test_the_core_under_sanitizers(tmp_path: Path, sanitizers: str, arguments: list[str]) -> None:
    options = ["-DWARMROUTE_CUDA=OFF", "-DWARMROUTE_TESTS=ON", f"-DWARMROUTE_SANITIZE={sanitizers}"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options],
        ["cmake", "--build", str(tmp_path), "-j2"],
    ):
        built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert built.returncode == 0, built.stdout + built.stderr
    run = subprocess.run(
        [str(tmp_path / "csrc" / "warmroute_stress"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is missing")
def test_a_missing_compiler_is_explained(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cmake").symlink_to(shutil.which("cmake") or "")
    bare = {name: value for name, value in os.environ.items() if name not in {"CXX", "CUDACXX"}}
    asked = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DCMAKE_MAKE_PROGRAM=/bin/true"]
    run = subprocess.run(asked, capture_output=True, text=True, check=False, env=bare | {"PATH": str(tools)})
    if "needs a C++ compiler" not in run.stderr and Path("/usr/bin/c++").exists():
        pytest.skip("CMake looks into system folders whatever PATH says")
    assert "needs a C++ compiler" in run.stderr
    assert "apt-get install g++" in " ".join(run.stderr.split())


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="CMake or a compiler is missing"
)
def test_a_compiler_without_a_static_runtime_is_enough(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        'case " $* " in *-static-libstdc++*) echo "cannot find -lstdc++" >&2; exit 1;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.write_text("#!/bin/sh\n" + compiler.read_text())
    compiler.chmod(0o755)
    source = tmp_path / "tests" / "checkout"  # folders above the sources do not matter to the build's name
    source.mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    digests = set()
    for folder, found in ((source, tmp_path / "one"), (ROOT, tmp_path / "other")):
        options = ["-DWARMROUTE_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"]
        asked = ["cmake", "-G", "Unix Makefiles", "-S", str(folder), "-B", str(found), *options]
        run = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr
        made = found / "csrc" / "CMakeFiles" / "warmroute_cpu.dir"
        assert "-static-libstdc++" not in (made / "link.txt").read_text()
        digests |= set(
            re.findall(r"cpu [\d.]+ (\w{8}) ", (made / "build.make").read_text() + (made / "flags.make").read_text())
        )
    assert len(digests) == 1
    assert hashlib.sha256(b"").hexdigest()[:8] not in digests


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="CMake or a compiler is missing"
)
def test_a_cuda_compiler_that_does_not_work_is_passed_over_unless_it_is_asked_for(tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    asked = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    environment = os.environ | {"CUDACXX": str(broken)}
    said = []
    for choice in ("AUTO", "ON"):
        command = [*asked, f"-DWARMROUTE_CUDA={choice}"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
        said.append((run.returncode, " ".join((run.stdout + run.stderr).split())))
    (automatic, note), (required, error) = said
    assert automatic == 0
    assert "The library for GPUs is not built: there is no CUDA compiler that works" in note
    assert required != 0
    assert "WARMROUTE_CUDA=ON, but there is no CUDA compiler that works" in error


def test_importing_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, worker_connector.native as n; n.Context('cpu'); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
