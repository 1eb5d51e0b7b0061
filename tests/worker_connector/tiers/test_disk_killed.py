"""Writers killed at random moments: what they stored is found, nothing else is loaded, and the bound holds."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.worker_connector.tiers.disk_objects import content, load, name, used
from worker_connector.chunk_object import HEADER_BYTES, ObjectKey, read_header, unpack
from worker_connector.tiers.base import Sink
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_files import SUFFIX

KILLS = 200
ROOMY, TIGHT = 256 << 20, 3 << 20


@pytest.mark.slow
def test_kill_9_two_hundred_times(tmp_path: Path) -> None:
    rng = random.Random(20)
    stored = torn = 0
    with subprocess.Popen(
        [sys.executable, "-m", "tests.worker_connector.tiers.disk_objects"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as server:
        assert server.stdin
        assert server.stdout
        for kill in range(KILLS):
            tight = kill % 2 == 1
            root, bound = (tmp_path / "tight", TIGHT) if tight else (tmp_path / "roomy", ROOMY)
            order = {"root": str(root), "max_bytes": bound, "first": kill * 10_000, "seconds": rng.uniform(0.001, 0.05)}
            print(json.dumps(order), file=server.stdin, flush=True)
            told = json.loads(server.stdout.readline())
            stored += len(told)
            torn += len(list(root.glob("*/.*.tmp")))
            assert used(root) <= bound, "a killed writer left more than the bound allows"
            check(root, bound, told[-3:] if tight else told)
            assert used(root) <= bound
        server.stdin.close()
    assert stored > 2 * KILLS, "the writers were killed before they wrote anything"
    assert torn > KILLS // 20, "no writer was killed while it wrote"


def check(root: Path, bound: int, told: list[int]) -> None:
    store = DiskStore(DiskSettings(directory=root, max_bytes=bound))
    try:
        assert store.wait_scanned(30)
        numbers = {name(number): number for number in told}
        for number in told:
            assert load(store, number) == content(number), "what was stored is gone"
        assert not list(root.glob("*/.*.tmp")), "what the dead left is still there"
        there = [path.name.removesuffix(SUFFIX) for path in root.glob(f"*/*{SUFFIX}")]
        assert set(numbers) <= set(there)
        assert store.figures().objects == len(there)
        for key in random.Random(len(there)).sample(there, min(5, len(there))):
            check_any(store, key)
        store.check()
    finally:
        store.close()


def check_any(store: DiskStore, key: str) -> None:
    """An object that was not told of: its writer died between storing it and saying so, or wrote it rounds ago."""
    room = bytearray(1 << 20)
    (outcome,) = store.get([key], [Sink(room)], time.monotonic() + 10)
    assert outcome.ok
    header = read_header(room)
    assert header.key == ObjectKey.parse(key)
    assert outcome.size == header.object_bytes
    unpack(header, memoryview(room)[HEADER_BYTES : outcome.size])
