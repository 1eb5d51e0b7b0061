"""Builds both native libraries for the GPU of this machine: with CMake, or with nvcc alone where that is all there is."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import ROOT, Setting

LIMIT = 240.0


def build(setting: Setting, capability: tuple[int, int]) -> dict[str, Any]:
    """Make ``libwarmroute_cuda.so`` and, where CMake is there, ``libwarmroute_cpu.so``."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(compiler).exists():
        return {"ok": False, "end": ["there is no nvcc: install the CUDA toolkit, or name nvcc in CUDACXX"]}
    target = f"{capability[0]}{capability[1]}"
    shutil.rmtree(setting.libraries, ignore_errors=True)
    setting.libraries.mkdir(parents=True)
    made = _with_cmake(setting, compiler, target) if shutil.which("cmake") else None
    if made is None or not made["ok"]:
        made = _with_nvcc(setting, compiler, target) | {"instead_of": made}
    return made | {"target": f"sm_{target}", "python": sys.version.split()[0]}


def _with_cmake(setting: Setting, compiler: str, target: str) -> dict[str, Any]:
    folder = setting.folder / "cmake"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DWARMROUTE_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_COMPILER={compiler}", f"-DWARMROUTE_CUDA_ARCHITECTURES={target}-real"]
    outcome = setting.start("configure", configure).finish(min(LIMIT, setting.left()))
    if outcome["ok"]:
        make = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
        outcome = setting.start("build", make).finish(min(LIMIT, setting.left()))
    for library in folder.rglob("libwarmroute_*.so"):
        shutil.copy2(library, setting.libraries)
    return outcome | {"with": "cmake"}


def _with_nvcc(setting: Setting, compiler: str, target: str) -> dict[str, Any]:
    csrc = ROOT / "csrc"
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{target}", "-cudart=static", "-shared", "--threads=0"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off", '-DWR_BUILD="cuda 0 0 nvcc"']
    flags += [f"-Xlinker=--version-script={csrc / 'exports.map'}"]
    sources = [str(path) for path in sorted(csrc.glob("cuda*.cu"))]
    command = [compiler, *flags, "-o", str(setting.libraries / "libwarmroute_cuda.so"), *sources]
    outcome = setting.start("build-nvcc", command).finish(min(LIMIT, setting.left()))
    return outcome | {"with": "nvcc alone: there is no CPU library"}
