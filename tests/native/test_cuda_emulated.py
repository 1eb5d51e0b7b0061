"""The CUDA backend, kernels included, on an emulated GPU: every thread of every block runs, one after the other, and
streams run in an order drawn by chance. The tests of the CPU backend then drive it through the same C ABI."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.native import abi, cuda_builds, layouts, oracle
from tests.native.layouts import BF16, F32, Shape, View
from tests.native.rig import Backend, Rig

HERE = Path(__file__).parent
SUITES = {
    "copies": ("test_copies.py", "emulated"),
    # Pages of 64 and 256 KiB are summed up in parts as larger ones are, in a twentieth of the time.
    "checksums": ("test_checksums.py", "(emulated-kernel or emulated-staged) and not (1000008 or 1048576)"),
    "encodings": ("test_codecs_oracle.py", "emulated-auto"),
    "rotation": ("test_rotation.py", "emulated-kernel or emulated-staged"),
}


@pytest.fixture(scope="module")
def built() -> Path:
    csrc = cuda_builds.sources()
    if csrc is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs the sources and a C++ compiler")
    return cuda_builds.emulated(csrc)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("copies", ["batched", "single"])
def test_backend_is_right_to_the_byte(built: Path, suite: str, copies: str) -> None:
    if copies == "single" and suite != "copies":
        pytest.skip("only the copy engines' path differs")
    file, chosen = SUITES[suite]
    environment = os.environ | {
        "WARMROUTE_TEST_BACKENDS": "emulated",
        "WARMROUTE_NATIVE_DIR": str(built),
    }
    if copies == "single":
        environment["EMULATED_SINGLE_COPIES"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", chosen]
    ran = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


PATHS = {"auto": 0, "copy-engine": 1, "kernel": 2, "staged": 3}


@pytest.fixture(params=PATHS)
def rig(built: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("WARMROUTE_NATIVE_DIR", str(built))
    made = Rig(Backend(f"emulated-{request.param}", "libwarmroute_emulated.so", path=PATHS[request.param]), 3)
    yield made
    made.close()


def round_trip(rig: Rig, view: View, chosen: list[oracle.Span], seed: int) -> None:
    """Out to packed forms and into other blocks, against the oracle."""
    noise = np.random.default_rng(seed)
    part = oracle.Range(0, view.heads, 0, view.heads, 0, 2**31 - 1)
    image = noise.integers(0, 256, view.size, np.uint8)
    images = [noise.integers(0, 256, oracle.packed_bytes(view, part, span), np.uint8) for span in chosen]
    cache = rig.memory(image, "cache")
    packed = [rig.memory(each, "packed") for each in images]
    assert rig.gather(view, cache, part, list(zip(chosen, packed, strict=True))).status == abi.OK, rig.explain()
    for span, held, wanted in zip(chosen, packed, images, strict=True):
        oracle.gather(image, view, part, span, wanted)
        assert np.array_equal(held.fetch(), wanted)
    cache.fill(image := noise.integers(0, 256, view.size, np.uint8))
    assert rig.scatter(view, cache, part, list(zip(chosen, packed, strict=True))).status == abi.OK, rig.explain()
    for span, wanted in zip(chosen, images, strict=True):
        oracle.scatter(image, view, part, span, wanted)
    assert np.array_equal(cache.fetch(), image)


@pytest.mark.slow
def test_more_layers_and_blocks_than_a_launch_has(rig: Rig) -> None:
    view = layouts.dense("LBHNC", Shape(layers=140, blocks=210, heads=1, tokens=1, k=4, v=4, dtype=BF16))
    order = np.random.default_rng(1).permutation(view.blocks).tolist()
    chosen = [oracle.Span(tuple(order[:100]), 0, 100), oracle.Span(tuple(order[100:101]), 2, 4)]
    round_trip(rig, view, [*chosen, oracle.Span(tuple(order[101:205]), 1, 110)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_packed_form_off_its_elements_is_rotated_or_refused(rig: Rig, dtype: int) -> None:
    """A kernel that read it where it is would trap, and take the process's whole CUDA context along."""
    view = layouts.dense("LBHNC", Shape(layers=2, blocks=6, heads=2, tokens=4, k=16, v=16, dtype=dtype))
    span, turn = oracle.Span((4, 1, 3), 0, 3), oracle.Rotation((0.6,) * 8, (0.8,) * 8)
    noise = np.random.default_rng(dtype)
    for part, accepted in ((oracle.whole(view, 3), True), (oracle.Range(0, 2, 0, 2, 1, 5), False)):
        image = noise.integers(0, 256, view.size, np.uint8)
        source = noise.integers(0, 256, oracle.packed_bytes(view, part, span), np.uint8)
        cache, packed = rig.memory(image, "cache"), rig.memory(source, "packed", shift=1)
        status = rig.scatter(view, cache, part, [(span, packed)], rotation=turn).status
        assert status == (abi.OK if accepted else abi.UNSUPPORTED), rig.explain()
        if accepted:
            oracle.scatter(image, view, part, span, source)
            oracle.rotate_blocks(image, view, part, span.blocks, turn)
        assert np.array_equal(cache.fetch(), image)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [3, 12, 20], ids=["several spans", "several layers", "parts of a layer"])
def test_pieces_of_a_staging_slot(rig: Rig, blocks: int) -> None:
    view = layouts.dense("BLHNC", Shape(layers=3, blocks=2 * blocks, heads=2, tokens=16, k=4096, v=4096, dtype=BF16))
    order = np.random.default_rng(blocks).permutation(view.blocks).tolist()
    spans = [oracle.Span(tuple(order[:blocks]), 0, blocks), oracle.Span(tuple(order[blocks : blocks + 2]), 0, 2)]
    round_trip(rig, view, spans, blocks)


@pytest.mark.slow
def test_a_driver_that_refuses_batches_copies_singly(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_REFUSED_BATCHES", "1")
    view = layouts.dense("LBHNC", Shape(layers=2, blocks=8, heads=2, tokens=16, k=64, v=64, dtype=BF16))
    round_trip(rig, view, [oracle.Span((5, 1, 3), 0, 3)], 4)
    if rig.backend.name == "emulated-copy-engine":
        assert "batches refused" in rig.describe()


@pytest.mark.slow
def test_streams_of_one_context_follow_each_other(rig: Rig) -> None:
    view = layouts.dense("LBHNC", Shape(layers=2, blocks=30, heads=2, tokens=16, k=1024, v=1024, dtype=BF16))
    part = oracle.whole(view, 15)
    noise = np.random.default_rng(3)
    cache = rig.memory(noise.integers(0, 256, view.size, np.uint8), "cache")
    before = cache.fetch()
    size = oracle.packed_bytes(view, part, oracle.Span(tuple(range(15)), 0, 15))
    packed = rig.memory(np.zeros(size, np.uint8), "packed")
    finished = rig._finished
    rig._finished = lambda status: status  # type: ignore[method-assign]
    for turn in range(8):
        rig._stream = SimpleNamespace(cuda_stream=0x5000 + 16 * (turn % 2))
        out, into = (range(15), range(15, 30)) if turn % 2 == 0 else (range(15, 30), range(15))
        assert rig.gather(view, cache, part, [(oracle.Span(tuple(out), 0, 15), packed)]).status == abi.OK
        assert rig.scatter(view, cache, part, [(oracle.Span(tuple(into), 0, 15), packed)]).status == abi.OK
    rig._finished = finished  # type: ignore[method-assign]
    for handle in (0x5000, 0x5010):
        assert rig.library.wr_finish(rig._context, handle) == abi.OK
    wanted, images = before.copy(), np.zeros(size, np.uint8)
    oracle.gather(wanted, view, part, oracle.Span(tuple(range(15)), 0, 15), images)
    oracle.scatter(wanted, view, part, oracle.Span(tuple(range(15, 30)), 0, 15), images)
    assert np.array_equal(cache.fetch(), wanted)


@pytest.mark.slow
def test_default_stream_is_refused(rig: Rig) -> None:
    for handle in (None, 1):
        rig._stream = SimpleNamespace(cuda_stream=handle)
        assert rig.copy_batch([], [], [], loads=True) == abi.INVALID
        assert "default stream" in rig.explain()


@pytest.mark.slow
def test_calibration_and_slabs(rig: Rig) -> None:
    loads, saves = ctypes.c_uint64(), ctypes.c_uint64()
    assert "not measured" in rig.describe()
    status = rig.library.wr_calibrate(rig._context, ctypes.byref(loads), ctypes.byref(saves))
    assert status == abi.OK, rig.explain()
    assert all(4 << 10 <= cutoff.value <= 2 << 20 for cutoff in (loads, saves))
    assert "(measured)" in rig.describe()
    at, granted = ctypes.c_void_p(), ctypes.c_uint32()
    take = rig.library.wr_slab_alloc
    assert take(rig._context, 5 << 20, -1, 0, 1, ctypes.byref(at), ctypes.byref(granted)) == abi.OK, rig.explain()
    assert granted.value & 1
    assert not any(ctypes.string_at(at, 5 << 20))
    assert rig.library.wr_slab_free(None, at, 5 << 20) == abi.OK
    assert rig.library.wr_slab_free(None, at, 5 << 20) == abi.INVALID
