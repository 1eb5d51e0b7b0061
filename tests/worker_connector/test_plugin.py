import subprocess
import sys
from importlib.metadata import entry_points


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_vllm_finds_the_plugin() -> None:
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "warmroute"]
    assert entry.value == "worker_connector.plugin:register"


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    modules = ", ".join(
        f"worker_connector.{name}"
        for name in ("plugin", "planner", "ledger", "plan", "regions", "geometry", "estimate", "scheduler_half")
    )
    code = f"import sys, worker_connector, {modules}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    assert run(code) == "[]"
