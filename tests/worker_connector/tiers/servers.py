"""Real servers for the tests of stores, on free ports and sockets of this machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")

needs_redis = pytest.mark.skipif(
    REDIS is None, reason="no redis-server here: install it (Debian: apt-get install redis-server)"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        # A cluster node also listens on its port plus 10,000.
        return port if port < 55_000 else free_port()


def eventually(holds: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


class RedisServer:
    """One redis-server process; ``options`` are lines of its configuration."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, sentinel: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port() if port is None else port
        self.socket = folder / "s"
        self.options = options
        self.sentinel = sentinel
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> "RedisServer":
        assert REDIS is not None
        lines = [f"port {self.port}", f"dir {self.folder}", 'save ""', "bind 127.0.0.1", f"unixsocket {self.socket}"]
        path = self.folder / "redis.conf"
        path.write_text("\n".join([*(lines if not self.sentinel else lines[:2]), *self.options]) + "\n")
        mode = ["--sentinel"] if self.sentinel else []
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([REDIS, str(path), *mode], stdout=log, stderr=log)
        log.close()
        if wait:
            eventually(self.answers)
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            with socket.create_connection(("127.0.0.1", self.port or self._tls_port()), 0.5):
                return True
        except OSError:
            return False

    def _tls_port(self) -> int:
        return int(next(line for line in self.options if line.startswith("tls-port")).split()[1])

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            eventually(lambda: " T " in Path(f"/proc/{self.process.pid}/stat").read_text())  # type: ignore[union-attr]

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


def command(port: int, *words: str) -> Any:
    """One command on a connection of its own, read by redis-py's usual parser."""
    import redis

    with redis.Redis(port=port, socket_timeout=30, protocol=2) as client:
        return client.execute_command(*words)


class Proxy:
    """Passes TCP through to ``target`` until told otherwise.

    ``mode``: ``pass``; ``reset`` (connections are reset after ``bytes`` of answer); ``truncate`` (closed after that many);
    ``swallow`` (nothing comes back, the connection stays); ``slow`` (``bytes`` per tenth of a second); ``refuse``.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode = "pass"
        self.bytes = 0
        self.accepted = 0
        self.spared_from = 1 << 30  # connections from this number on are passed through
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.mode == "refuse":
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                _reset(client)
                continue
            self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client, self.accepted), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        _close(server)

    def _answer(self, server: socket.socket, client: socket.socket, number: int) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                if number >= self.spared_from:
                    client.sendall(data)
                elif self.mode in ("reset", "truncate") and passed + len(data) > self.bytes:
                    client.sendall(data[: max(0, self.bytes - passed)])
                    _reset(client) if self.mode == "reset" else _close(client)
                    break
                elif self.mode == "slow":
                    for start in range(0, len(data), self.bytes):
                        client.sendall(data[start : start + self.bytes])
                        time.sleep(0.1)
                elif self.mode != "swallow":
                    client.sendall(data)
                passed += len(data)
        _close(server)

    def close(self) -> None:
        _close(self._listener)
        for each in self._sockets:
            _close(each)


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.shutdown(socket.SHUT_RD)  # whoever is reading it would keep it open
    sock.close()


class S3Server:
    """``moto``'s server in a process of its own; what it holds goes with it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *buckets: str) -> "S3Server":
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MOTO_ALLOW_NONEXISTENT_REGION": "1"},
        )
        eventually(self._answers)
        for bucket in buckets:
            self.make_bucket(bucket)
        return self

    def make_bucket(self, bucket: str) -> None:
        import httpx

        httpx.put(f"{self.url}/{bucket}", timeout=10).raise_for_status()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 0.5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def running(*servers: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            server.kill()


def payload(size: int, seed: int = 0) -> bytes:
    """Bytes that no shift or swap of pieces leaves as they are."""
    import random

    return random.Random(seed).randbytes(size)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds
