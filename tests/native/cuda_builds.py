"""Builds of the CUDA backend for tests: for a GPU with nvcc, and for an emulated one with g++. Each is made once per state
of the sources."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

EMULATOR = Path(__file__).parent / "emulated_cuda"
TARGETS = ("80", "90", "100")


def sources() -> Path | None:
    """The folder ``csrc``, which only a checkout has."""
    named = os.environ.get("WARMROUTE_SOURCES")
    for root in [Path(named)] if named else [*Path(__file__).parents, *Path.cwd().parents]:
        if (root / "csrc" / "cuda.cu").exists():
            return root / "csrc"
    return None


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    usual = "/usr/local/cuda/bin/nvcc"
    return named or (usual if Path(usual).exists() else None)


@cache
def digest(csrc: Path) -> str:
    """Of everything that a build depends on."""
    state = hashlib.sha256()
    for path in sorted([*csrc.rglob("*.*"), *EMULATOR.iterdir(), Path(__file__)]):
        if path.suffix in {".h", ".hpp", ".cu", ".cpp", ".map", ".py"}:
            state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def _folder(kind: str, csrc: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"warmroute-{os.getuid()}-{kind}-{digest(csrc)}"


def _run(commands: list[list[str]], log: Path) -> None:
    """Run compilers side by side; an ``AssertionError`` has what they said."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    said = [process.communicate(timeout=600)[0] for process in running]
    with log.open("a", encoding="utf-8") as file:
        file.writelines(said)
    failed = [text for process, text in zip(running, said, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)


def _in_twos(commands: list[list[str]], log: Path) -> None:
    for at in range(0, len(commands), 2):
        _run(commands[at : at + 2], log)


def emulated(csrc: Path) -> Path:
    """The folder of ``libwarmroute_emulated.so``. With an older build's, nothing is compiled."""
    folder = _folder("emulated", csrc)
    library = folder / "libwarmroute_emulated.so"
    if library.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    flags += ["-ffp-contract=off", "-fvisibility=hidden", f"-I{EMULATOR}", '-DWR_EMULATED="lanes.hpp"']
    flags += ['-DWR_BUILD="emulated 0 0 host"', "-Werror"]
    parts = [*sorted(csrc.glob("cuda*.cu")), EMULATOR / "emulator.cpp"]
    objects = [str(folder / f"{part.name}.o") for part in parts]
    compiles = [
        [compiler, *flags, "-x", "c++", "-c", str(part), "-o", made] for part, made in zip(parts, objects, strict=True)
    ]
    _in_twos(compiles, folder / "log")
    _run([[compiler, "-shared", "-o", f"{library}.part", *objects, "-pthread"]], folder / "log")
    Path(f"{library}.part").rename(library)
    return folder


def native(csrc: Path, compiler: str) -> Path:
    """The folder of ``libwarmroute_cuda.so`` for all targets, of its ``log`` with the assembler's report, and of objects."""
    folder = _folder("cuda", csrc)
    library = folder / "libwarmroute_cuda.so"
    if library.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in TARGETS]
    targets.append(f"-gencode=arch=compute_{TARGETS[-1]},code=compute_{TARGETS[-1]}")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xptxas=-v", *targets]
    flags += ["-Xcompiler=-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden,-ffp-contract=off"]
    flags += ['-DWR_BUILD="cuda 0 0 test"']
    parts = sorted(csrc.glob("cuda*.cu"))
    objects = [str(folder / f"{part.name}.o") for part in parts]
    _in_twos(
        [[compiler, *flags, "-c", str(part), "-o", made] for part, made in zip(parts, objects, strict=True)],
        folder / "log",
    )
    link = ["-shared", "-cudart=static", f"-Xlinker=--version-script={csrc / 'exports.map'}", "-Xlinker=-z,defs"]
    link.append("-Xlinker=--gc-sections")
    link += ["-Xcompiler=-static-libstdc++,-static-libgcc"]
    _run([[compiler, *targets, *link, "-o", f"{library}.part", *objects]], folder / "log")
    Path(f"{library}.part").rename(library)
    return folder
