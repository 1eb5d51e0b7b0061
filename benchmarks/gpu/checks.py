"""The tests on the device, the worker half's transfers, and compute-sanitizer."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import ROOT, Setting, finish_all

SUITES = ("test_copies.py", "test_checksums.py", "test_codecs_oracle.py", "test_rotation.py")
PATHS = ("auto", "copy-engine", "kernel", "staged")
TESTS_LIMIT, MOVERS_LIMIT, SANITIZER_LIMIT = 200.0, 200.0, 180.0
MOVERS = "not cpu and not wrong_byte"  # a build by nvcc alone has no library for processors
INI = """[pytest]
addopts = --import-mode=importlib -p no:cacheprovider
markers =
    slow: takes more than ten seconds
    timeout: given up after so many seconds
"""
# Every kind of kernel, on small memory: a sanitizer makes each access some tens of times slower.
REDUCED = {
    "copies": ("test_copies.py", "test_every_layout_and_dtype and (LBHNC or BLNHC) and bf16"),
    "encodings": ("test_codecs_oracle.py", "cuda-auto and bf16"),
    "rotation": ("test_rotation.py", "cuda-kernel and (oracle or every_number_of_pairs)"),
}

# Runtimes ask a driver for functions that it may lack, and torch for what a pointer is: calls that fail by design.
OPTIONS = {"memcheck": ["--report-api-errors=no"]}


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _pytest(setting: Setting, *arguments: str) -> list[str]:
    ini = setting.folder / "pytest.ini"
    ini.write_text(INI, encoding="utf-8")
    native = ROOT / "tests" / "native"
    return [
        sys.executable, "-m", "pytest", "-q", "-c", str(ini), f"--rootdir={ROOT}", f"--confcutdir={native}", *arguments,
    ]  # fmt: skip


def tests(setting: Setting) -> dict[str, Any]:
    """Everything that the CPU backend is tested with, on the device, for each path; side by side."""
    if missing := _missing("pytest", "hypothesis"):
        outcome = _plain(setting, "layouts", TESTS_LIMIT)
        return outcome | {"reduced": f"{', '.join(missing)} missing: round trips and comparisons only"}
    files = [str(ROOT / "tests" / "native" / name) for name in SUITES]
    running = [
        setting.start(f"tests-{path}", _pytest(setting, *files, "-k", f"cuda-{path}"), WARMROUTE_TEST_BACKENDS="cuda")
        for path in PATHS
    ]
    return _proved(finish_all(running, min(TESTS_LIMIT, setting.left())))


def _proved(outcome: dict[str, Any]) -> dict[str, Any]:
    """Tests that were all skipped end well too, and prove nothing."""
    for each in outcome["processes"].values():
        if each["ok"] and not any(" passed" in line for line in each["end"]):
            each["ok"] = outcome["ok"] = False
    return outcome


def _plain(setting: Setting, what: str, limit: float, **more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.plain_tests", what]
    return setting.start(f"plain-{what}", command, **more).finish(min(limit, setting.left()))


def movers(setting: Setting, rounds: int = 10_000) -> dict[str, Any]:
    """Store, evict and load under a concurrent forward."""
    more = {"WARMROUTE_MOVER_ROUNDS": str(rounds)}
    if _missing("pytest"):
        log, outcome = setting.folder / "plain-movers.log", _plain(setting, "movers", MOVERS_LIMIT, **more)
    else:
        file = str(ROOT / "tests" / "native" / "test_cuda_movers.py")
        running = setting.start("movers", _pytest(setting, "-s", file, "-k", MOVERS), **more)
        both = _proved(finish_all([running], min(MOVERS_LIMIT, setting.left())))
        log, outcome = running.log, both["processes"]["movers"]
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return outcome | {"rounds": rounds, "said": [line for line in lines if "rounds," in line]}


def sanitizer(setting: Setting, tool: str) -> dict[str, Any]:
    """compute-sanitizer's ``memcheck`` or ``racecheck`` on a reduced set of the tests."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"ok": None, "end": ["compute-sanitizer is not installed"]}
    if missing := _missing("pytest", "hypothesis"):
        return {"ok": None, "end": [f"{', '.join(missing)} missing"]}
    running = []
    for name, (file, chosen) in REDUCED.items():
        command = _pytest(setting, "-x", str(ROOT / "tests" / "native" / file), "-k", f"cuda and {chosen}")
        wrapped = [program, f"--tool={tool}", "--error-exitcode=77", *OPTIONS.get(tool, []), *command]
        more = {"WARMROUTE_TEST_BACKENDS": "cuda", "WARMROUTE_TEST_EXAMPLES": "2"}
        running.append(setting.start(f"{tool}-{name}", wrapped, **more))
    outcome = _proved(finish_all(running, min(SANITIZER_LIMIT, setting.left())))
    failed = [each for each in outcome["processes"].values() if not each["ok"]]
    # One that is slow has found nothing, and proved nothing.
    return outcome | ({"ok": None} if failed and all(each["late"] for each in failed) else {})
