"""The scripts of the shared Valkey, with real servers: three pods, each at an address of its own."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.manifests import KUBERNETES

SCRIPTS = KUBERNETES / "overlays" / "shared-valkey"
SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
CLIENT = shutil.which("valkey-cli") or shutil.which("redis-cli")
PASSWORD = "p4ssw0rd"
PEERS = ("127.0.77.1", "127.0.77.2", "127.0.77.3")

pytestmark = pytest.mark.skipif(
    SERVER is None or CLIENT is None,
    reason="no valkey-server or redis-server here (Debian: apt-get install redis-server)",
)


def eventually(holds: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.1)


class Pod:
    """One pod's two containers as processes; they end together."""

    def __init__(self, address: str, folder: Path, programs: Path) -> None:
        self.address = address
        self._folder = folder
        self.environ = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SELF": address,
            "LISTEN": address,
            "PEERS": " ".join(PEERS),
            "VALKEY_PASSWORD": PASSWORD,
            "MAX_MEMORY": "64mb",
            "DOWN_AFTER_MS": "1000",
            "FAILOVER_MS": "3000",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for script in ("valkey.sh", "sentinel.sh"):
            run_dir = self._folder / script
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir(parents=True)
            with (self._folder / f"{script}.log").open("ab") as log:
                command = ["sh", str(SCRIPTS / script)]
                environ = {**self.environ, "RUN_DIR": str(run_dir)}
                self._processes.append(
                    subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
                )

    def kill(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        self._processes.clear()

    def step_down(self) -> None:
        command = ["sh", str(SCRIPTS / "step-down.sh")]
        subprocess.run(command, env=self.environ, check=True, capture_output=True, timeout=60)

    def asked(self, *words: str, port: int = 6379) -> str:
        """The answer's lines; empty where there is none."""
        assert CLIENT is not None
        environ = {**os.environ, "REDISCLI_AUTH": PASSWORD}
        command = [CLIENT, "-h", self.address, "-p", str(port), "--raw", *words]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    @property
    def role(self) -> str:
        return self.asked("ROLE").partition("\n")[0]

    @property
    def primary(self) -> str:
        """By this pod's Sentinel."""
        return self.asked("SENTINEL", "get-master-addr-by-name", "warmroute", port=26379).partition("\n")[0]

    @property
    def is_informed(self) -> bool:
        """Whether its Sentinel knows both others, and two replicas that follow."""
        text = self.asked("SENTINEL", "master", "warmroute", port=26379).split("\n")
        members = dict(zip(text[::2], text[1::2], strict=False))
        return members.get("num-other-sentinels") == "2" and int(members.get("num-slaves", 0)) >= 2


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    """All three, started at once, as the StatefulSet does it."""
    folder = tmp_path_factory.mktemp("valkey")
    programs = folder / "bin"
    programs.mkdir()
    for name, real in (("valkey-server", SERVER), ("valkey-cli", CLIENT)):
        assert real is not None
        (programs / name).symlink_to(real)
    made = {address: Pod(address, folder / address, programs) for address in PEERS}
    try:
        for pod in made.values():
            pod.start()
        eventually(lambda: all(pod.is_informed for pod in made.values()), "the Sentinels did not find each other")
        yield made
    finally:
        for pod in made.values():
            pod.kill()


def replicas_follow(pods: dict[str, Pod], primary: str) -> bool:
    """Whether everybody else is a connected replica of the primary."""
    roles = {address: pod.asked("ROLE").split("\n") for address, pod in pods.items()}
    return roles.pop(primary)[0] == "master" and all(
        role[:2] == ["slave", primary] and "connected" in role for role in roles.values()
    )


@pytest.mark.slow
def test_a_fleet_of_three_elects_moves_and_recovers(pods: dict[str, Pod]) -> None:
    """From the start through a planned and an unplanned end of the primary, with a worker's store in use throughout."""
    pytest.importorskip("redis")
    from worker_connector.tiers.base import Source
    from worker_connector.tiers.urls import open_store

    assert {pod.primary for pod in pods.values()} == {PEERS[0]}, "the first pod begins"
    eventually(lambda: replicas_follow(pods, PEERS[0]), "the replicas do not follow")

    addresses = ",".join(f"{peer}:26379" for peer in PEERS)
    url = f"redis+sentinel://:{PASSWORD}@{addresses}/warmroute/0?sentinel_password={PASSWORD}&ttl=86400"
    store = open_store(url)

    def takes_chunks() -> bool:
        deadline = time.monotonic() + 5.0
        return all(outcome.ok for outcome in store.put(["k"], [Source(b"chunk")], deadline))

    try:
        eventually(takes_chunks, "the worker's store does not find the primary")
        pods[PEERS[0]].step_down()
        eventually(lambda: len({pod.primary for pod in pods.values()} - {PEERS[0]}) == 1, "nobody took over")
        (second,) = {pod.primary for pod in pods.values()}
        eventually(lambda: replicas_follow(pods, second), "the replicas do not follow who took over")
        eventually(takes_chunks, "the worker's store does not follow")

        pods[second].kill()
        others = [pod for address, pod in pods.items() if address != second]
        eventually(
            lambda: len(now := {pod.primary for pod in others}) == 1 and second not in now and "" not in now,
            "nobody took over from the one that died",
        )
        third = others[0].primary
        eventually(takes_chunks, "the worker's store does not follow who took over")
        pods[second].start()
        eventually(lambda: replicas_follow(pods, third), "who came back is no replica")
    finally:
        store.close()


def test_a_sentinel_that_refuses_is_not_the_last_one_asked(tmp_path: Path) -> None:
    """The client ends with 0 on an error that it was sent, unless it is told otherwise."""
    client = tmp_path / "valkey-cli"
    client.write_text(
        """#!/bin/sh
asked=$(dirname "$0")/asked
case "$*" in
  *ROLE*) if [ "$(grep -c failover "$asked")" = 2 ]; then echo slave; else echo master; fi ;;
  *failover*) echo "$*" >> "$asked"; echo "NOGOODSLAVE"; case " $* " in *" -e "*) exit 1 ;; esac ;;
esac
"""
    )
    client.chmod(0o755)
    (tmp_path / "asked").touch()
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SELF": "a", "PEERS": "a b c", "VALKEY_PASSWORD": PASSWORD}
    subprocess.run(["sh", str(SCRIPTS / "step-down.sh")], env=environ, check=True, capture_output=True, timeout=60)
    assert [line.split("-h ")[1][0] for line in (tmp_path / "asked").read_text().splitlines()] == ["b", "c"]
