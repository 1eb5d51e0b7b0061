"""Where a check of a GPU works, how long it may take, and what is known so far."""

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Setting:
    """``folder`` keeps builds, logs and results from run to run; ``seconds`` is for this run."""

    folder: Path
    seconds: float
    again: bool = False
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.results = json.loads(self.file.read_text(encoding="utf-8"))

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    def left(self) -> float:
        """Seconds of this run that remain."""
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, part: str, name: str, outcome: Any) -> None:
        """Note an outcome, on disk too: the machine may be taken away."""
        self.results.setdefault(part, {})[name] = outcome
        self.file.write_text(json.dumps(self.results, indent=1, sort_keys=True), encoding="utf-8")

    def known(self, part: str, name: str) -> bool:
        """Whether an earlier run has it already."""
        return not self.again and name in self.results.get(part, {})

    def environment(self, **more: str) -> dict[str, str]:
        """For processes that use the libraries that were built."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"WARMROUTE_NATIVE_DIR": str(self.libraries), "PYTHONPATH": paths} | more

    def start(self, name: str, command: list[str], **more: str) -> "Running":
        """Begin a process whose output goes to a log."""
        log = (self.folder / f"{name}.log").open("w", encoding="utf-8")
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment(**more), stdout=log, stderr=subprocess.STDOUT, text=True
        )
        return Running(name, command, process, self.folder / f"{name}.log", time.monotonic())


@dataclass
class Running:
    name: str
    command: list[str]
    process: "subprocess.Popen[str]"
    log: Path
    began: float

    def finish(self, seconds: float) -> dict[str, Any]:
        """How it ended; it is killed after ``seconds``."""
        try:
            code: int | str = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = f"not done after {seconds:.0f} s"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return {
            "ok": code == 0,
            "exit": code,
            "seconds": round(time.monotonic() - self.began, 1),
            "command": " ".join(self.command),
            "end": lines[-25:] if code != 0 else lines[-3:],
        }
