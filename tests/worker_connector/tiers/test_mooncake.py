"""Mooncake Store with its own master, over TCP."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers.servers import eventually, free_port, payload, soon
from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import Outcome, Sink, Source, Status
from worker_connector.tiers.breaker import Pauses
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.mooncake import MooncakeSettings, MooncakeStore


def why_not() -> str:
    if importlib.util.find_spec("mooncake") is None:
        return "Mooncake's client is not installed (pip install mooncake-transfer-engine-non-cuda)"
    tried = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True, check=False)
    return tried.stderr.strip().rsplit("\n", 1)[-1] if tried.returncode else ""


needs_mooncake = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Master:
    def __init__(self, folder: Path) -> None:
        found = importlib.util.find_spec("mooncake")
        assert found is not None
        assert found.submodule_search_locations
        self.program = Path(found.submodule_search_locations[0]) / "mooncake_master"
        self.log = folder / "master.log"
        self.port, self.metrics = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Master":
        self.program.chmod(0o755)
        options = [f"--rpc_port={self.port}", "--rpc_address=127.0.0.1", f"--metrics_port={self.metrics}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([self.program, *options], stdout=log, stderr=log, cwd=self.log.parent)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    master = Master(tmp_path_factory.mktemp("mooncake"))
    try:
        yield master.start()
    finally:
        master.kill()


def settings(master: Master, **more: object) -> MooncakeSettings:
    common = {"segment_bytes": 128 << 20, "buffer_bytes": 64 << 20}
    return MooncakeSettings(master=f"127.0.0.1:{master.port}", **(common | more))  # type: ignore[arg-type]


def answers(store: MooncakeStore | Guarded) -> bool:
    try:
        store.ping(soon())
    except StoreUnavailable:
        return False
    return True


@needs_mooncake
def test_objects_come_back_whole(master: Master) -> None:
    store = MooncakeStore(settings(master))
    eventually(lambda: answers(store))
    for size in (1, 4096, (3 << 20) + 7):
        data = payload(size)
        key = f"k{size}"
        assert store.put([key], [Source(data[:99], data[99:])], soon()) == [Outcome(Status.STORED, size)]
        header, body = bytearray(min(size, 4096)), bytearray(size)
        assert store.get([key], [Sink(header, body)], soon()) == [Outcome(Status.FOUND, size)]
        assert (bytes(header) + bytes(body))[:size] == data
    outcomes = store.get(["k1", "no", "k4096"], [Sink(bytearray(9)) for _ in range(3)], soon())
    assert [each.status.value for each in outcomes] == ["found", "missing", "failed"]
    assert [each.status.value for each in store.exists(["k1", "no"], soon())] == ["found", "missing"]
    store.put(["k1"], [Source(b"other")], soon())
    room = bytearray(5)
    assert store.get(["k1"], [Sink(room)], soon())[0].ok
    assert room == b"other"
    assert [each.status.value for each in store.delete(["k1", "no"], soon())] == ["deleted", "missing"]
    assert [each.status.value for each in store.exists(["k1"], soon())] == ["missing"]
    assert store.put(["k"], [Source(bytes(40 << 20))], soon())[0].cause == "size"
    assert store.scan("", soon()).cursor == ""
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.ping(soon())


@needs_mooncake
def test_a_master_that_stops_dies_and_comes_back(tmp_path: Path) -> None:
    master = Master(tmp_path).start()
    limits = Limits(timeout=1.0, pauses=Pauses(first=0.1, longest=0.3))
    store = Guarded(MooncakeStore(settings(master)), limits)
    try:
        eventually(lambda: answers(store))
        assert store.put(["k"], [Source(b"abc")], soon())[0].ok
        master.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        began = time.monotonic()
        slot = bytearray(3)
        with pytest.raises(StoreUnavailable) as caught:
            store.get(["k"], [Sink(slot)], soon())
        assert caught.value.cause in ("timeout", "unreachable")
        assert time.monotonic() - began < 6
        assert not answers(store)
        slot[:] = b"---"
        master.kill()
        time.sleep(0.2)
        assert slot == b"---"
        master.start()
        eventually(lambda: _stores(store))
    finally:
        store.close()
        master.kill()


def _stores(store: Guarded) -> bool:
    try:
        return store.put(["again"], [Source(b"abc")], soon())[0].ok
    except StoreUnavailable:
        return False


def test_a_client_that_cannot_be_loaded_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(ConfigurationError, match="pip install mooncake-transfer-engine"):
        MooncakeStore(MooncakeSettings(master="127.0.0.1:1"))


os.environ.setdefault("GLOG_minloglevel", "2")
