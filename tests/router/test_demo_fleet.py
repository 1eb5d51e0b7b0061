"""What the demo's processes are started with, and what is said of one that ends."""

import subprocess
import sys
from pathlib import Path

from router.demo_fleet import Child, free_port


def test_free_ports_are_none_that_outgoing_connections_take() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < free_port() < first for _ in range(20))


def test_the_cause_is_shown_though_much_was_logged_after_it(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    after = [f"line {number}" for number in range(40)]
    last = "RuntimeError: Engine core initialization failed. See root cause above."
    log.write_text("\n".join(["ValueError: an earlier one", "OSError: [Errno 98] in use", *after, last]))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    shown = Child("worker", "http://127.0.0.1:1", log, process).tail().splitlines()
    assert shown[0] == "OSError: [Errno 98] in use"
    assert shown[1:] == [*after[-14:], last]
