"""What the caller's thread has set does not reach the arithmetic, and is as it was afterwards."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.native import abi, contents, layouts, oracle
from tests.native.cases import same, stage
from tests.native.layouts import BF16, F16, F32, F64, Shape
from tests.native.rig import Rig

UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())


@contextmanager
def rounding_up() -> Iterator[None]:
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    assert libm.fesetround(UPWARD) == 0
    try:
        yield
        assert libm.fegetround() == UPWARD, "the call changed its caller's rounding"
    finally:
        libm.fesetround(before)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    torch = pytest.importorskip("torch", reason="sets the processor's mode")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        yield
        assert np.float32(1e-39) * np.float32(0.5) == 0, "the call changed its caller's mode"
    finally:
        torch.set_flush_denormal(False)


MODES = {"rounding up": rounding_up, "flushing denormals": flushing_denormals}


@pytest.mark.skipif(UPWARD is None, reason="rounding modes of this processor are not known here")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("encoding", [abi.FP8, abi.INT8], ids=["fp8", "int8"])
def test_encodings_round_to_nearest_whatever_the_caller_has_set(rigs: list[Rig], encoding: int, mode: str) -> None:
    for dtype in (F32, F16, BF16):
        view = layouts.dense("LBHNC", Shape(layers=1, blocks=3, heads=2, tokens=5, k=40, v=24, dtype=dtype))
        span, part = oracle.Span((2, 0), 0, 2), oracle.whole(view, 2)
        for style in ("normal", "tiny"):
            for rig in rigs:
                made = stage(rig, view, [oracle.encoded_bytes(view, part, span, encoding)], seed=1)
                source = contents.image(view, 1, style)
                oracle.gather_encoded(source, view, part, span, made.packed_images[0], encoding=encoding)
                oracle.scatter_encoded(made.cache_image, view, part, span, made.packed_images[0], encoding=encoding)
                cache, both = rig.memory(source, "cache"), [(span, made.packed[0])]
                with MODES[mode]():
                    gathered = rig.gather(view, cache, part, both, encoding).status
                    scattered = rig.scatter(view, made.cache, part, both, encoding).status
                assert gathered == scattered == abi.OK
                made.check(of=f"{rig.backend.name}, {style}: ")


@pytest.mark.skipif(UPWARD is None, reason="rounding modes of this processor are not known here")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=["f32", "f16", "bf16", "f64"])
def test_rotation_rounds_to_nearest_whatever_the_caller_has_set(rigs: list[Rig], dtype: int, mode: str) -> None:
    view = layouts.dense("LBHNC", Shape(layers=1, blocks=3, heads=2, tokens=5, k=40, v=24, dtype=dtype))
    angles = np.concatenate([np.random.default_rng(1).uniform(-50, 50, 18), [1e-39, 3e-41]])
    for interleaved in (False, True):
        rotation = oracle.Rotation(tuple(np.cos(angles)), tuple(np.sin(angles)), 0, interleaved)
        for style in ("normal", "tiny"):
            for rig in rigs:
                image = contents.image(view, 1, style)
                memory = rig.memory(image, "cache")
                oracle.rotate_blocks(image, view, oracle.whole(view, 2), (2, 0), rotation)
                with MODES[mode]():
                    assert rig.rotate(view, memory, oracle.whole(view, 2), [2, 0], rotation) == abi.OK
                same(memory.fetch(), image, f"{rig.backend.name}, {style}: cache")
