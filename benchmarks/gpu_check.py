"""Checks and measures the CUDA backend on a machine with a GPU and PyTorch; vLLM and a network are not needed.

    python benchmarks/gpu_check.py [--seconds 520] [--only build,tests,bench,sanitizer] [--again] [--out DIR]

Builds both native libraries, runs the tests of the native core on the device, compute-sanitizer on a part of them, the
worker half's transfers under a concurrent forward, and the benchmark. What is done is kept in a folder, so that the next
run goes on where this one stopped, as long as the sources are the same. docs/gpu.md says what is checked and what the
bars are. It exits with 0 if nothing that was tried failed, with 1 if something did, and with 2 if nothing can be tried.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_CHECKOUT))
# The folder is no package, and an installed one of its name would win.
sys.modules["benchmarks"] = _benchmarks = ModuleType("benchmarks")
_benchmarks.__path__ = [str(_CHECKOUT / "benchmarks")]

from benchmarks.gpu.report import table, verdicts  # noqa: E402
from benchmarks.gpu.setting import ROOT, Setting  # noqa: E402

PARTS = ("build", "tests", "bench", "sanitizer")


def main() -> int:
    arguments = _arguments()
    reason = _no_gpu()
    if reason:
        print(f"gpu-check: {reason}. Nothing was checked.")
        return 2
    setting = Setting(arguments.folder, arguments.seconds, arguments.again)
    machine = _machine()
    setting.keep("machine", "machine", machine)
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"gpu-{_slug(machine['gpu'])}.json"
    for part in arguments.only:
        _run_part(setting, part)
        # After each: the machine may be taken away.
        shutil.copyfile(setting.file, target)
    rows = verdicts(setting.results)
    print(f"\n{machine}\n\n{table(rows)}\n\nwritten to {target}")
    return 1 if any(row[3] == "FAIL" for row in rows) else 0


def _parts(text: str) -> list[str]:
    chosen = text.split(",") if text else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520.0, help="begin nothing after so long")
    parser.add_argument("--only", type=_parts, default="", help=f"parts, with commas: {','.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="also what an earlier run has done")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "warmroute-gpu-check")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _no_gpu() -> str:
    if sys.version_info < (3, 11):  # noqa: UP036 - nothing has looked at it before
        return f"Python {platform.python_version()} is too old; 3.11 is the least"
    try:
        import torch  # noqa: PLC0415 - its absence is an answer
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return (
        "" if major >= 8 else f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; 8.0 is the least"
    )


def _machine() -> dict[str, Any]:
    import torch  # noqa: PLC0415

    asked = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"nvidia-smi: {error}"
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver, PCIe generation and lanes": said,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _step(setting: Setting, part: str, name: str, work: Callable[[], Any], least: float = 10.0) -> Any:
    """Run one step unless it is known or there is no time for it. What goes wrong is told and kept."""
    if setting.known(part, name):
        return setting.results[part][name]
    if setting.left() < least:
        print(f"{part}/{name}: no time left; run again", flush=True)
        return None
    began = time.monotonic()
    print(f"{part}/{name} …", end=" ", flush=True)
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001 - the other steps still can run
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        setting.fail(f"{part}/{name}", error)
        return None
    print(f"{time.monotonic() - began:.1f} s", flush=True)
    setting.results.get("errors", {}).pop(f"{part}/{name}", None)
    setting.keep(part, name, outcome)
    if isinstance(outcome, dict) and outcome.get("ok") is False:
        print(json.dumps(outcome, indent=1)[-4000:], flush=True)
    return outcome


def _run_part(setting: Setting, part: str) -> None:
    work = {"build": _build, "tests": _tests, "sanitizer": _sanitizer, "bench": _bench}[part]
    setting.results.get("errors", {}).pop(part, None)
    try:
        work(setting)
    except Exception as error:  # noqa: BLE001 - the other parts still can run, and what is known is reported
        print(f"{part} failed: {type(error).__name__}: {error}", flush=True)
        setting.fail(part, error)


def _build(setting: Setting) -> None:
    from benchmarks.gpu.build import build  # noqa: PLC0415

    capability = tuple(setting.results["machine"]["machine"]["capability"])
    if not (setting.libraries / "libwarmroute_cuda.so").exists():
        setting.results.get("build", {}).pop("build", None)
    _step(setting, "build", "build", lambda: build(setting, capability))


def _tests(setting: Setting) -> None:
    from benchmarks.gpu import checks  # noqa: PLC0415

    _step(setting, "tests", "tests", lambda: checks.tests(setting), 30)
    _step(setting, "tests", "movers", lambda: checks.movers(setting), 30)


def _sanitizer(setting: Setting) -> None:
    from benchmarks.gpu import checks  # noqa: PLC0415

    for tool in ("memcheck", "racecheck"):
        _step(setting, "sanitizer", tool, lambda tool=tool: checks.sanitizer(setting, tool), 30)


def _bench(setting: Setting) -> None:
    import os  # noqa: PLC0415

    import torch  # noqa: PLC0415

    if setting.left() < 40:
        print("bench: no time left; run again", flush=True)
        return
    os.environ["WARMROUTE_NATIVE_DIR"] = str(setting.libraries)
    from benchmarks.gpu.baselines import baselines  # noqa: PLC0415
    from benchmarks.gpu.transfers import WAYS, Bench  # noqa: PLC0415

    bench = Bench("cuda:0", _room(torch))
    # Ratios are to the large copies of the same run, so these are made in each.
    setting.keep("bench", "large copies", bench.large_copies())
    _step(setting, "bench", "calibrated", lambda: _calibrated(bench))
    _step(setting, "bench", "encodings", bench.encodings)
    _step(setting, "bench", "many pages", bench.many_pages)
    _step(setting, "bench", "both ways", bench.both_ways)
    _step(setting, "bench", "slowdown", bench.slowdown)
    for way in WAYS:
        _step(setting, "bench", f"sweep, {way}", lambda way=way: bench.sweep(*WAYS[way]), 15)
    _step(setting, "bench", "baselines", lambda: baselines(bench), 20)


def _room(torch: Any) -> int:
    """Bytes on each side: enough for 50,000 pages of 64 KiB where there is so much."""
    free, _ = torch.cuda.mem_get_info()
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = re.search(r"MemAvailable:\s+(\d+)", meminfo)
    host = int(available[1]) << 10 if available else 4 << 30
    whole = 50_000 * (64 << 10)
    return max(512 << 20, min(whole, int(free * 0.6), int(host * 0.4)) >> 20 << 20)


def _calibrated(bench: Any) -> dict[str, Any]:
    from worker_connector import native  # noqa: PLC0415

    with native.Context(bench.device) as context:
        began = time.monotonic()
        loads, saves = context.calibrate()
        taken = time.monotonic() - began
        return {"load_cutoff": loads, "save_cutoff": saves, "seconds": taken, "said": context.description}


if __name__ == "__main__":
    sys.exit(main())
