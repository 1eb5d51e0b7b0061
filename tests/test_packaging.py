"""The wheel as a user installs it: in an environment of its own, with nothing but what it asks for.

The wheel is the one that the suite's own environment was made from (``make``), or that WARMROUTE_WHEEL names.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MOST_BYTES = 120_000_000
IMPORT_SECONDS = 0.5

pytestmark = pytest.mark.slow


def made_by_make() -> Path | None:
    found = sorted(Path(sys.prefix, ".stamps", "wheel").glob("warmroute-*.whl"))
    return found[-1] if found else None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("WARMROUTE_WHEEL"):
        return Path(given)
    if not (ROOT / "router").is_dir():
        if (made := made_by_make()) is None:
            pytest.skip("neither the sources nor a wheel are here: run it by make, or name a wheel in WARMROUTE_WHEEL")
        return made
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*command, "--config-settings=cmake.define.WARMROUTE_CUDA=OFF"], check=True, timeout=500)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a fresh environment that has the wheel, and what the wheel asks for."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder)
    interpreter = folder / "bin" / "python"
    done = pip(interpreter, "install", "--quiet", "--prefer-binary", str(wheel), timeout=500)
    if done.returncode and re.search(
        r"connection|resolve|No matching distribution|timed out", done.stderr, re.IGNORECASE
    ):
        shutil.rmtree(folder)
        pytest.skip(f"packages cannot be installed here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    yield interpreter
    shutil.rmtree(folder)


def pip(interpreter: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """From outside, so that nothing is in the environment but what the wheel brought."""
    return run(Path(sys.executable), "-m", "pip", "--python", str(interpreter), *arguments, timeout=timeout)


def run(program: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """As a user runs it: not in the checkout, and without its variables."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, cwd="/", env=environment
    )


def test_the_wheel_is_for_any_python_and_one_platform_and_says_which(wheel: Path) -> None:
    name, version, interpreter, abi, platform = wheel.stem.split("-")
    assert (name, version, interpreter, abi) == ("warmroute", PROJECT["version"], "py3", "none")
    assert re.fullmatch(r"(many)?linux(_\d+_\d+)?_(x86_64|aarch64)(\..+)*", platform)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {name.partition("/")[0] for name in names}
    assert packages == {"kv_protocol", "router", "worker_connector", f"warmroute-{version}.dist-info"}
    assert "worker_connector/lib/libwarmroute_cpu.so" in names
    assert {f"{package}/py.typed" for package in ("kv_protocol", "router", "worker_connector")} <= names


def test_every_part_that_the_documentation_promises_is_an_extra() -> None:
    assert {"worker", "k8s", "redis", "objects", "otel", "demo"} <= set(PROJECT["optional-dependencies"])


def test_the_install_is_consistent_light_and_without_torch(python: Path) -> None:
    assert pip(python, "check").returncode == 0
    (site,) = (python.parent.parent / "lib").glob("python*/site-packages")
    size = {path.name: weight(path) for path in site.iterdir()}
    heaviest = sorted(size.items(), key=lambda item: -item[1])[:8]
    assert sum(size.values()) <= MOST_BYTES, f"{sum(size.values()):,} bytes; the heaviest: {heaviest}"
    assert not {"torch", "vllm", "numpy", "transformers"} & set(size)


def weight(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())


def test_importing_the_router_is_quick(python: Path) -> None:
    code = "import time; began = time.process_time(); import router; print(time.process_time() - began)"
    assert min(float(run(python, "-c", code).stdout) for _ in range(3)) <= IMPORT_SECONDS


def test_the_command_answers_without_importing_what_serving_needs(python: Path) -> None:
    done = run(python.parent / "warmroute", "serve", "--help")
    assert done.returncode == 0, done.stderr
    assert "--worker" in done.stdout
    code = (
        "import sys, contextlib; sys.argv = ['warmroute', 'serve', '--help']; from router.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    loaded = run(python, "-c", code).stderr.split()
    assert "router.config" in loaded
    assert not {"fastapi", "uvicorn", "tokenizers", "fastokens", "httpx"} & set(loaded)


def test_without_an_engine_a_worker_says_what_is_missing(python: Path) -> None:
    done = run(python.parent / "warmroute", "worker", "some/model")
    assert done.returncode == 2
    assert "vLLM is not installed" in done.stderr
    printed = run(python.parent / "warmroute", "worker", "some/model", "--print")
    assert printed.stdout.startswith(f"{python} -P -m vllm.entrypoints.cli.main serve some/model")


def test_the_native_library_loads(python: Path) -> None:
    code = (
        "import ctypes, pathlib, worker_connector as package\n"
        "ctypes.CDLL(str(pathlib.Path(package.__file__).parent / 'lib' / 'libwarmroute_cpu.so'))"
    )
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr
