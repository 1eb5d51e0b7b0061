"""For machines without pytest: round trips through every layout against the oracle, and the worker half's transfers.

python -m benchmarks.gpu.plain_tests layouts|movers
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np


def layouts() -> None:
    """On every way; an ``AssertionError`` says what differs."""
    os.environ.setdefault("WARMROUTE_TEST_BACKENDS", "cuda")
    from tests.native import abi, oracle  # noqa: PLC0415 - reads the environment
    from tests.native.layouts import BF16, F16, F32, Shape, catalogue  # noqa: PLC0415
    from tests.native.rig import Rig, backends  # noqa: PLC0415

    done = 0
    for backend in backends():
        rig = Rig(backend)
        for dtype in (BF16, F16, F32):
            for name, view in catalogue(Shape(dtype=dtype, k=16, v=16)).items():
                noise = np.random.default_rng(done)
                span = oracle.Span(tuple(noise.permutation(view.blocks)[:3].tolist()), 1, 5)
                part = oracle.whole(view, 3)
                image = noise.integers(0, 256, view.size, np.uint8)
                packed = noise.integers(0, 256, oracle.packed_bytes(view, part, span), np.uint8)
                cache, host = rig.memory(image, "cache"), rig.memory(packed, "packed")
                assert rig.gather(view, cache, part, [(span, host)]).status == abi.OK, rig.explain()
                oracle.gather(image, view, part, span, packed)
                assert np.array_equal(host.fetch(), packed), f"gather, {backend.name}, {name}, {dtype}"
                cache.fill(blank := noise.integers(0, 256, view.size, np.uint8))
                assert rig.scatter(view, cache, part, [(span, host)]).status == abi.OK, rig.explain()
                oracle.scatter(blank, view, part, span, packed)
                assert np.array_equal(cache.fetch(), blank), f"scatter, {backend.name}, {name}, {dtype}"
                done += 1
        rig.close()
    print(f"{done} layouts went out and came back")


class _Anything(ModuleType):
    """What a module of tests takes from pytest while it is imported: decorators that change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *values: Any, **_: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else self


def movers(device: str = "cuda") -> None:
    """Save, evict and load under a concurrent forward; the tests that pytest would run."""
    pytest = _Anything("pytest")
    pytest.importorskip = lambda name, **_: importlib.import_module(name)
    sys.modules.setdefault("pytest", pytest)
    from tests.native import test_cuda_movers as tests  # noqa: PLC0415

    for pages in tests.PAGES:
        tests.test_no_byte_is_ever_wrong(device, pages)
    tests.test_checksums_agree_along_the_way(device)
    if device == "cuda":
        tests.test_a_missing_wait_is_seen()


def main() -> int:
    {"layouts": layouts, "movers": movers}[sys.argv[1]]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
