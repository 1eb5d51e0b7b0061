"""What importing a package may pull in: checked in fresh interpreters."""

import subprocess
import sys

import pytest

_PROBE = """
import sys
import {package}
forbidden = {forbidden!r}
found = sorted(name for name in sys.modules if name.split(".")[0] in forbidden)
sys.exit("imports " + ", ".join(found) if found else 0)
"""


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        (
            "kv_protocol.hashing, kv_protocol.blocks, kv_protocol.messages, kv_protocol.digests, kv_protocol.identity",
            {"router", "worker_connector", "torch", "vllm"},
        ),
        ("router", {"worker_connector", "torch", "vllm"}),
        ("worker_connector", {"router", "torch", "vllm"}),
        (
            "worker_connector.report_server, worker_connector.client, worker_connector.config, worker_connector.gpu_tier",
            {"router", "torch", "vllm"},
        ),
    ],
)
def test_import_stays_light(package: str, forbidden: set[str]) -> None:
    probe = _PROBE.format(package=package, forbidden=forbidden)
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_the_stats_function_needs_no_engine_packages() -> None:
    probe = (
        "from worker_connector import get_cache_stats; import sys; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", probe], timeout=60, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    import worker_connector

    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = worker_connector.NoSuchThing
