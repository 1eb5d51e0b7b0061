"""``warmroute demo``, run as a user runs it, and ended as users end it."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from router.demo_fleet import socket_folder

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.parametrize("length", [20, 70, 71, 200])
def test_engines_find_a_place_for_their_sockets(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "a" * (length - 1))
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    assert socket_folder() == ({} if length <= 70 else {"VLLM_RPC_BASE_PATH": "/tmp"})


def start_demo(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "router.cli", "demo", "--port", "0", *flags]
    with (folder / "demo.log").open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "140"},
            start_new_session=True,
        )


def processes_of(folder: Path) -> set[int]:
    """Processes that inherited the folder as their place for temporary files."""
    marker = f"TMPDIR={folder}\0".encode()
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in environ.read_bytes() + b"\0":
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: object, timeout: float) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_the_demo_shows_the_main_job(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    figures_path = tmp_path / "out.json"
    demo = start_demo(tmp_path / "run", "--exit", "--json", str(figures_path))
    log = tmp_path / "run" / "demo.log"
    assert demo.wait(timeout=280) == 0, log.read_text()[-4000:]
    figures = json.loads(figures_path.read_text())
    turns = figures["turns"]
    assert {turn["phase"] for turn in turns} == {"cold", "warm", "after GPU reset"}
    served: dict[str, str] = {}
    for turn in turns:
        assert turn["reason"]
        assert turn["ttft_s"] > 0
        hit = sum(turn["hit_tokens"].values())
        if turn["turn"] == 1:
            assert hit == 0
        else:
            assert turn["worker"] == served[turn["conversation"]]
            assert hit >= 0.9 * turn["prompt_tokens"]
        served[turn["conversation"]] = turn["worker"]
    back = [turn for turn in turns if turn["turn"] == 4]
    assert all(turn["hit_tokens"]["cpu"] > 0 for turn in back), "the first turn after the reset comes from the CPU tier"
    assert figures["cold_ttft_s"] == statistics.median(turn["ttft_s"] for turn in turns if turn["turn"] == 1)
    assert figures["warm_ttft_s"] < figures["cold_ttft_s"] / 2
    assert wait_until(lambda: not processes_of(tmp_path / "run"), 30)


@pytest.mark.parametrize("ending", ["impatient Ctrl-C", "kill -9"])
def test_no_process_is_left_behind(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    demo = start_demo(tmp_path)
    # The demo, its watchdog and two engines.
    assert wait_until(lambda: len(processes_of(tmp_path)) >= 4, 60), (tmp_path / "demo.log").read_text()
    if ending == "kill -9":
        demo.kill()
    else:
        for _ in range(3):
            demo.send_signal(signal.SIGINT)
            time.sleep(0.3)
    demo.wait(timeout=30)
    assert wait_until(lambda: not processes_of(tmp_path), 15), processes_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.log"]
