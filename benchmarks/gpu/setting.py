"""Where a check of a GPU works, how long it may take, and what is known so far."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("csrc", "worker_connector", "tests/native", "benchmarks/gpu", "benchmarks/gpu_check.py")


@dataclass
class Setting:
    """``folder`` keeps builds, logs and results from run to run, for as long as the sources stay what they are; ``seconds``
    is for this run."""

    folder: Path
    seconds: float
    again: bool = False
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = digest()
        self.results = _read(self.file)
        if self.results.get("sources", {}).get("digest") != state:
            self.results = {}
        self.keep("sources", "digest", state)
        _name_folders(self.names)

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    @property
    def names(self) -> Path:
        return self.folder / "names"

    def left(self) -> float:
        """Seconds of this run that remain."""
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, part: str, name: str, outcome: Any) -> None:
        """Note an outcome, on disk too: the machine may be taken away."""
        self.results.setdefault(part, {})[name] = outcome
        text = json.dumps(self.results, indent=1, sort_keys=True) + "\n"
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.file)

    def known(self, part: str, name: str) -> bool:
        """Whether an earlier run has it already. What failed, or had no time, is tried again."""
        outcome = self.results.get(part, {}).get(name)
        ended_well = not isinstance(outcome, dict) or outcome.get("ok", True)
        return not self.again and outcome is not None and bool(ended_well)

    def fail(self, step: str, error: Exception) -> None:
        """Note what kept a step from its outcome."""
        self.keep("errors", step, f"{type(error).__name__}: {error}")

    def environment(self, **more: str) -> dict[str, str]:
        """For processes that use the libraries that were built."""
        paths = os.pathsep.join([str(self.names), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"WARMROUTE_NATIVE_DIR": str(self.libraries), "PYTHONPATH": paths} | more

    def start(self, name: str, command: list[str], **more: str) -> "Running":
        """Begin a process whose output goes to a log, in a group of its own."""
        path = self.folder / f"{name}.log"
        with path.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(name, command, process, path, time.monotonic())


@dataclass
class Running:
    name: str
    command: list[str]
    process: "subprocess.Popen[bytes]"
    log: Path
    began: float

    def finish(self, seconds: float) -> dict[str, Any]:
        """How it ended; it is killed after ``seconds``, with all that it started."""
        try:
            code: int | str = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = f"not done after {seconds:.0f} s"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return {
            "ok": code == 0,
            "exit": code,
            "late": isinstance(code, str),
            "seconds": round(time.monotonic() - self.began, 1),
            "command": " ".join(self.command),
            "end": lines[-25:] if code != 0 else lines[-6:],
        }


def finish_all(running: Sequence[Running], seconds: float) -> dict[str, Any]:
    """How processes that run side by side ended, all within ``seconds`` from now."""
    deadline = time.monotonic() + seconds
    outcomes = {each.name: each.finish(deadline - time.monotonic()) for each in running}
    return {
        "ok": all(each["ok"] for each in outcomes.values()),
        "seconds": max(each["seconds"] for each in outcomes.values()),
        "processes": outcomes,
    }


def digest() -> str:
    """Of all that is built and run: an outcome for other sources says nothing about these."""
    state = hashlib.sha256()
    for name in CHECKED:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*.*"))
        for file in files:
            if file.suffix in {".h", ".hpp", ".cu", ".cpp", ".map", ".py", ".txt"}:
                state.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return state.hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _name_folders(names: Path) -> None:
    """Packages that stand for this checkout's folders, which are none: an installed package of their name would win."""
    for name in ("benchmarks", "tests"):
        (names / name).mkdir(parents=True, exist_ok=True)
        (names / name / "__init__.py").write_text(f"__path__ = [{str(ROOT / name)!r}]\n", encoding="utf-8")
