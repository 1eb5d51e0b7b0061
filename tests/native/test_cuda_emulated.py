"""The CUDA backend, kernels included, on an emulated GPU: every thread of every block runs, one after the other, and
streams run in an order drawn by chance. The tests of the CPU backend then drive it through the same C ABI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import cuda_builds

HERE = Path(__file__).parent
SUITES = {
    "copies": ("test_copies.py", "emulated"),
    "checksums": ("test_checksums.py", "emulated-kernel or emulated-staged"),
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
