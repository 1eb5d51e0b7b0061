"""A gateway in front of simulated workers, under load over HTTP: many streams at once, and clients that vanish.

    python -m benchmarks.fleet [streams] [disconnects] [--workers 2] [--streams 2000] [--disconnects 10000] [--json FILE]

``streams`` opens that many streams and holds them all open at the same time; it checks every byte of every answer and reads
the gateway's memory, processor time and open files. ``disconnects`` begins that many requests, streamed and not, and resets
each connection after a random while; then nothing may be left: no request, no connection, no file, no memory.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
SETTLE_S = 15.0
RESET = struct.pack("ii", 1, 0)


class Process:
    """The gateway's process as the kernel sees it."""

    def __init__(self, pid: int, url: str) -> None:
        self._proc = Path(f"/proc/{pid}")
        self.url = url
        self.port = int(url.rpartition(":")[2])

    def resident_mib(self) -> float:
        text = (self._proc / "status").read_text(encoding="ascii")
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024

    def files(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    def cpu_s(self) -> float:
        fields = (self._proc / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=10).raise_for_status().json()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def fleet(workers: int, words: int, decode: float, settings: dict[str, str] | None = None) -> Iterator[Process]:
    """A gateway and its workers, ready."""
    with ExitStack() as stack:
        specs = []
        for _ in range(workers):
            port, reports = free_port(), free_port()
            command = ["-m", "benchmarks.simulated_worker", f"--port={port}", f"--reports={reports}"]
            command += [f"--words={words}", f"--decode={decode}", "--prefill=1000000"]
            stack.enter_context(running(command))
            specs.append(f"http://127.0.0.1:{port},reports=127.0.0.1:{reports}")
        port = free_port()
        environment = {
            "WARMROUTE_WORKERS": ";".join(specs),
            "WARMROUTE_PORT": str(port),
            "WARMROUTE_MAX_IN_FLIGHT": "4096",
            "WARMROUTE_LOG_LEVEL": "error",
            "WARMROUTE_DRAIN_TIMEOUT": "1",
            **(settings or {}),
        }
        gateway = stack.enter_context(running(["-m", "router.cli", "serve"], environment))
        process = Process(gateway.pid, f"http://127.0.0.1:{port}")
        wait_ready(process, workers)
        yield process


def wait_ready(gateway: Process, workers: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            described = gateway.get("/admin/workers")["workers"]
        except (httpx.TransportError, httpx.HTTPStatusError):
            described = []
        if sum(item["healthy"] and item["reports"]["synced"] for item in described) == workers:
            return
        time.sleep(0.2)
    raise TimeoutError("the gateway did not become ready within 60 s")


def request_bytes(number: int, *, stream: bool) -> bytes:
    text = f"conversation {number % 64}: " + "what was said before " * 40
    body = {"model": "simulated", "messages": [{"role": "user", "content": text}], "stream": stream}
    raw = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
    return f"{head}x-request-id: load-{number}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


class StreamClient(asyncio.Protocol):
    """One streamed request on one connection; keeps what arrives."""

    def __init__(self, number: int) -> None:
        self._request = request_bytes(number, stream=True)
        self._received: list[bytes] = []
        self.began = asyncio.get_running_loop().create_future()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        if not self.began.done():
            self.began.set_result(None)
        if data.endswith(b"0\r\n\r\n"):
            self.ended.set_result(None)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.began, self.ended):
            if not future.done():
                future.set_exception(exc or ConnectionResetError("the stream was cut off"))

    def is_sound(self, words: int) -> bool:
        """Whether every word is there, once and in order, and then the end."""
        content = b"".join(self._received)
        at = -1
        for number in range(words):
            at = content.find(b'"word%d ' % number, at + 1)
            if at < 0 or content.count(b'"word%d ' % number) != 1:
                return False
        return content.startswith(b"HTTP/1.1 200") and b"data: [DONE]\n\n" in content[at:]


async def hold_streams(gateway: Process, streams: int, words: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    idle = {"rss_mib": gateway.resident_mib(), "files": gateway.files()}
    cpu, started = gateway.cpu_s(), time.monotonic()
    clients: list[StreamClient] = []
    for number in range(streams):
        _, client = await loop.create_connection(
            lambda number=number: StreamClient(number),
            "127.0.0.1",
            gateway.port,  # type: ignore[misc]
        )
        clients.append(client)
    await asyncio.gather(*(client.began for client in clients))
    opened_s = time.monotonic() - started
    at_once = sum(not client.ended.done() for client in clients)
    peak = {"rss_mib": gateway.resident_mib(), "files": gateway.files()}
    in_flight = await asyncio.to_thread(in_flight_of, gateway)
    await asyncio.gather(*(client.ended for client in clients))
    took = time.monotonic() - started
    sound = sum(client.is_sound(words) for client in clients)
    return {
        "streams": streams,
        "open_at_once": at_once,
        "in_flight_at_once": in_flight,
        "sound": sound,
        "opened_in_s": round(opened_s, 1),
        "took_s": round(took, 1),
        "gateway_cpu_s": round(gateway.cpu_s() - cpu, 1),
        "events": streams * (words + 1),
        "rss_mib_idle": round(idle["rss_mib"]),
        "rss_mib_with_streams": round(peak["rss_mib"]),
        "files_with_streams": peak["files"],
        "left": await asyncio.to_thread(settle, gateway, int(idle["files"])),
    }


def in_flight_of(gateway: Process) -> int:
    return sum(worker["in_flight"] for worker in gateway.get("/admin/workers")["workers"])


def settle(gateway: Process, files: int) -> dict[str, Any]:
    """What is left when all is over; kept connections to workers are closed after some seconds."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and (in_flight_of(gateway) or gateway.files() > files):
        time.sleep(0.25)
    return {
        "in_flight": in_flight_of(gateway),
        "files_more_than_before": gateway.files() - files,
        "rss_mib": round(gateway.resident_mib()),
    }


async def vanish(gateway: Process, number: int, source: random.Random) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    wanted = source.random()
    request = request_bytes(number, stream=number % 2 == 0)
    writer.write(request[: int(len(request) * source.random())] if wanted < 0.1 else request)
    try:
        async with asyncio.timeout(source.random() * 0.2):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        pass
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def disconnect(gateway: Process, times: int) -> dict[str, Any]:
    source = random.Random(11)
    before = {"rss_mib": round(gateway.resident_mib()), "files": gateway.files()}
    cpu, started = gateway.cpu_s(), time.monotonic()
    numbers = iter(range(times))

    async def keep_vanishing() -> None:
        for number in numbers:
            await vanish(gateway, number, source)

    await asyncio.gather(*(keep_vanishing() for _ in range(100)))
    took = time.monotonic() - started
    return {
        "disconnects": times,
        "took_s": round(took, 1),
        "gateway_cpu_s": round(gateway.cpu_s() - cpu, 1),
        "rss_mib_before": before["rss_mib"],
        "left": await asyncio.to_thread(settle, gateway, int(before["files"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="streams, disconnects; default: both")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--words", type=int, default=30)
    parser.add_argument("--disconnects", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine}
    parts = arguments.parts or ["streams", "disconnects"]
    if "streams" in parts:
        with fleet(arguments.workers, arguments.words, 0.7) as gateway:
            figures["streams"] = asyncio.run(hold_streams(gateway, arguments.streams, arguments.words))
            print(json.dumps(figures["streams"], indent=1), flush=True)
    if "disconnects" in parts:
        with fleet(arguments.workers, 20, 0.01) as gateway:
            asyncio.run(disconnect(gateway, 500))
            figures["disconnects"] = asyncio.run(disconnect(gateway, arguments.disconnects))
            print(json.dumps(figures["disconnects"], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
