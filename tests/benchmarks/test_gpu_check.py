"""What ``make gpu-check`` does besides using a GPU: what it remembers, ends and reports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import checks
from benchmarks.gpu import setting as setting_module
from benchmarks.gpu.report import table, verdicts
from benchmarks.gpu.setting import ROOT, Setting, finish_all


def test_outcomes_are_kept_for_the_same_sources_and_what_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Setting(tmp_path, 60)
    for name, outcome in (("good", {"ok": True}), ("bad", {"ok": False}), ("slow", {"ok": None}), ("rows", [1])):
        first.keep("tests", name, outcome)
    again = Setting(tmp_path, 60)
    assert [name for name in ("good", "bad", "slow", "rows", "none") if again.known("tests", name)] == ["good", "rows"]
    assert not Setting(tmp_path, 60, again=True).known("tests", "good")
    monkeypatch.setattr(setting_module, "digest", lambda: "other")
    assert "tests" not in Setting(tmp_path, 60).results


def test_results_that_were_cut_off_are_none(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"tests": {"go')
    assert set(Setting(tmp_path, 60).results) == {"sources"}


def test_what_is_late_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 60)
    file = tmp_path / "child"
    running = setting.start("late", ["sh", "-c", f"sleep 60 & echo $! > {file}; wait"])
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
    fine = setting.start("fine", ["true"])
    outcome = finish_all([running, fine], 1)
    assert not outcome["ok"]
    assert outcome["processes"]["late"]["late"]
    assert outcome["processes"]["fine"]["ok"]
    deadline = time.monotonic() + 10
    while _runs(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_every_selection_of_tests_has_some(tmp_path: Path) -> None:
    pytest.importorskip("hypothesis")
    setting = Setting(tmp_path, 60)
    native = ROOT / "tests" / "native"
    chosen = [([native / file], f"cuda and {words}") for file, words in checks.REDUCED.values()]
    chosen += [([native / file for file in checks.SUITES], f"cuda-{path}") for path in checks.PATHS]
    chosen.append(([native / "test_cuda_movers.py"], checks.MOVERS))
    commands = [checks._pytest(setting, "--collect-only", *map(str, files), "-k", words)[3:] for files, words in chosen]
    # One interpreter for all of them: most of the time goes by while it loads.
    code = "import json, sys, pytest; print(*(int(pytest.main(each)) for each in json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", code, json.dumps(commands)]
    ran = setting.start("collect", command, WARMROUTE_TEST_BACKENDS="cuda").finish(240)
    assert ran["ok"], ran["end"]
    ended = ran["end"][-1].split()
    assert ended == ["0"] * len(chosen), list(zip(ended, [words for _, words in chosen], strict=True))


def test_an_error_is_a_failure_in_the_table(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 60)
    setting.fail("bench", RuntimeError("no link"))
    rows = verdicts(setting.results)
    assert ("bench", "RuntimeError: no link", "ends", "FAIL") in rows
    assert "RuntimeError: no link" in table(rows)


def test_without_a_gpu_it_says_so_also_beside_packages_of_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name in ("benchmarks", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "sees no GPU" in ran.stdout
    setting = Setting(tmp_path / "work", 60)
    code = "import tests.native.layouts, benchmarks.gpu.setting as s; print(s.ROOT)"
    outcome = setting.start("names", [sys.executable, "-c", code]).finish(60)
    assert outcome["end"] == [str(ROOT)]
