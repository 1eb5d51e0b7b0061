"""Round trips through every layout against the oracle, for machines without pytest: ``python -m benchmarks.gpu.plain_tests``."""

import os
import sys

import numpy as np


def main() -> int:
    os.environ["WARMROUTE_TEST_BACKENDS"] = "cuda"
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
