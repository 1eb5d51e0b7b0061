"""What can be known of the CUDA library without a GPU: it compiles for all targets without a warning, its hot kernels do
not spill and move 16 bytes at a time, it needs nothing that a machine without CUDA lacks, and it says so there."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import abi, cuda_builds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HEADER_FUNCTION = re.compile(r"^WR_API [\w ]+?\*?(wr_\w+)\(", re.MULTILINE)
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
COMPILED = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
# What LLM caches move through: vectors of 16 bytes, bf16 and f16.
HOT = ("copy_pagesINS0_7Word128", "turn_pagesILi2ENS0_7Word128", "turn_pagesILi3ENS0_7Word128", "code_tilesILb1")
ENCODERS = tuple(f"code_{kind}ILi{dtype}ELb1" for kind in ("tokens", "channels") for dtype in (2, 3))


@pytest.fixture(scope="module")
def csrc() -> Path:
    found = cuda_builds.sources()
    if found is None:
        pytest.skip("needs the sources")
    return found


@pytest.fixture(scope="module")
def build(csrc: Path) -> Path:
    compiler = cuda_builds.nvcc()
    if compiler is None:
        pytest.skip("needs nvcc")
    return cuda_builds.native(csrc, compiler)


@pytest.fixture(scope="module")
def library(build: Path) -> Path:
    return build / "libwarmroute_cuda.so"


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    compiler = cuda_builds.nvcc()
    beside = Path(compiler).parent / "cuobjdump" if compiler else None
    triton = [Path(each) / "triton/backends/nvidia/bin/cuobjdump" for each in sys.path]
    found = [path for path in [beside, *triton] if path is not None and path.exists()]
    return str(found[0]) if found else shutil.which("cuobjdump")


def said(*command: str | Path) -> str:
    return subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_hot_kernels_do_not_spill(build: Path) -> None:
    report = (build / "log").read_text()
    spilled, kernels, name = [], set(), ""
    for line in report.splitlines():
        if found := COMPILED.search(line):
            name = found[1]
            kernels.add((name, found[2]))
        elif (found := SPILL.search(line)) and any(int(size) for size in found.groups()):
            spilled.append((name, found[0]))
    for target in cuda_builds.TARGETS:
        for hot in HOT + ENCODERS:
            assert any(hot in kernel for kernel, sm in kernels if sm == target), f"{hot} is not built for sm_{target}"
    hot_ones = [each for each in spilled if any(hot in each[0] for hot in HOT + ENCODERS)]
    assert not hot_ones, hot_ones


def functions(library: Path, target: str) -> dict[str, str]:
    """The machine code of each kernel for a target."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, which is also in Triton's package")
    text = said(tool, "-sass", "-arch", f"sm_{target}", library)
    parts = re.split(r"\n\s*Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("target", cuda_builds.TARGETS)
def test_hot_kernels_move_16_bytes_at_a_time(library: Path, target: str) -> None:
    kernels = functions(library, target)
    for hot in HOT:
        chosen = {name: code for name, code in kernels.items() if hot in name}
        assert chosen, hot
        for name, code in chosen.items():
            encodes = re.search(r"code_tilesILb1ELb(\d)", name)
            if encodes is None or encodes[1] == "1":
                assert re.search(r"\bLDG\.E\S*\.128\b", code), f"{name} loads less than 16 bytes"
            if encodes is None or encodes[1] == "0":
                assert re.search(r"\bSTG\.E\S*\.128\b", code), f"{name} stores less than 16 bytes"
            assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"


@pytest.mark.parametrize("target", cuda_builds.TARGETS)
def test_all_loads_of_a_copy_are_under_way_before_the_first_store(library: Path, target: str) -> None:
    for name, code in functions(library, target).items():
        if "copy_pagesINS0_7Word128" in name:
            moves = re.findall(r"\b(LDG|STG)\.E\S*\.128\b", code)
            assert moves[:8] == ["LDG"] * 4 + ["STG"] * 4, f"{name}: {moves}"


def test_library_needs_only_the_system(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said("readelf", "-d", library))
    allowed = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert set(needed) <= allowed | {"ld-linux-aarch64.so.1"}, needed
    undefined = said("nm", "-D", "--undefined-only", library)
    assert not re.search(r"\b(cu[A-Z]|cuda[A-Z]|_ZN2at|_ZN3c10)", undefined)


def test_library_wants_no_later_libc_than_ubuntu_22_04_has(library: Path) -> None:
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36):
        pytest.skip("what is built here wants this machine's libc")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", said("objdump", "-T", library))
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 35)


def test_library_exports_the_interface_and_nothing_else(csrc: Path, library: Path) -> None:
    exported = {line.split()[-1] for line in said("nm", "-D", "--defined-only", library).splitlines()}
    declared = set(HEADER_FUNCTION.findall((csrc / "warmroute.h").read_text()))
    assert len(declared) > 15
    assert exported == declared


def test_library_says_what_is_missing_where_there_is_no_gpu(library: Path) -> None:
    code = (
        "import ctypes, sys; from tests.native import abi; from pathlib import Path;"
        "lib = abi.load(Path(sys.argv[1])); print(lib.wr_devices()); handle = ctypes.c_void_p();"
        "print(lib.wr_open(None, ctypes.byref(handle)), handle.value, lib.wr_explain(None).decode());"
        "print(hex(lib.wr_crc32c(0, b'123456789', 9)), lib.wr_slab_free(None, None, 0))"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    devices, opened, crc = ran.stdout.splitlines()
    assert devices == "0"
    assert opened.startswith(f"{abi.DEVICE} None there is no usable GPU: ")
    assert "nvidia-smi" in opened
    assert crc == "0xe3069283 0"


def test_build_is_named(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    loaded.wr_build.restype = ctypes.c_char_p
    assert loaded.wr_build().decode().split()[0] == "cuda"
    assert loaded.wr_abi() == 1
