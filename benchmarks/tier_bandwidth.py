"""Each tier's bandwidth against the plain limit of its medium, in the same run.

    python -m benchmarks.tier_bandwidth DIRECTORY [--rounds 15] [--only cpu,disk,redis] [--json benchmarks/results/tier_bandwidth.json]

The CPU tier: whole chunks between KV cache and slab, against a memory copy of as many bytes by one thread each. The lower
tiers: jobs of the movers that an engine uses, with the store, its guard, checksums and headers: 64 MiB of objects between slots
and the tier. The plain limit does nothing but move as many bytes: four threads that read or write whole files with direct I/O,
each through one aligned buffer, as ``dd`` does; and sockets that send GET or SET and receive or send the values, as
``redis-benchmark`` does, as many at once as the store uses. Both sides take turns, and the one that begins changes. Reported is
the median of the rounds' ratios, with quartiles: the machine's other work and the disk's own moods come and go within seconds.
Where processors are the limit there is a second ratio, of their time: other work disturbs it less. It has the server's share.
"""

import argparse
import hashlib
import json
import mmap
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.disk import at_once
from worker_connector import native
from worker_connector.chunk_object import HEADER_BYTES, Section
from worker_connector.plan import Piece, TierJob
from worker_connector.tier_movers import Shape, Tier, TierMovers
from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.redis import RedisSettings, RedisStore

JOB_BYTES = 64 << 20
SIZES = (1 << 20, 8 << 20)
DISK_THREADS = 4
BARS = {"cpu": 0.8, "disk": 0.8, "redis": 0.6}


class Taken(NamedTuple):
    """Seconds by the clock and, of this process and its server, of processors."""

    wall: float
    cpu: float


def timed(work: Callable[[], object], cpu_clock: Callable[[], float]) -> Taken:
    wall, cpu = time.perf_counter(), cpu_clock()
    work()
    return Taken(time.perf_counter() - wall, cpu_clock() - cpu)


def with_server(process: int) -> float:
    """Seconds that this process and another one have had of processors."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Movers:
    """What an engine's rank has for one lower tier, with slots for two jobs: one that writes, one that is fetched into.
    ``generations`` of chunks are written before one is written again."""

    def __init__(self, store: Store, object_bytes: int, generations: int) -> None:
        self._generations = generations
        self.count = JOB_BYTES // object_bytes
        with native.Context() as context:
            self._slots = context.allocate(2 * JOB_BYTES).view()  # as a slab is
        self._slots[:JOB_BYTES] = secrets.token_bytes(JOB_BYTES)
        section = Section(0, 16, 16, 0, object_bytes)
        shape = Shape(bytes(16), 0, 1, "LBHNC", "bfloat16", 256, (section,), (False,), object_bytes)
        self._movers = TierMovers({"tier": Tier(store=store)}, self._slots, object_bytes, shape)
        self._jobs = self._written = 0

    def write(self) -> None:
        self._written = (self._written + 1) % self._generations
        self._run("write", 0)

    def fetch(self) -> None:
        self._run("fetch", self.count)

    def check(self) -> None:
        assert self._slots[:JOB_BYTES] == self._slots[JOB_BYTES:], "the tier gave back something else"

    def close(self) -> None:
        self._movers.close()

    def _run(self, kind: str, first: int) -> None:
        self._jobs += 1
        pieces = [
            Piece(hashlib.md5(b"%d %d" % (self._written, number)).digest(), first + number)
            for number in range(self.count)
        ]
        self._movers.submit([TierJob(self._jobs, "tier", kind, pieces, 30.0)])  # type: ignore[arg-type]
        changed = self._movers._changed  # noqa: SLF001 - an engine looks once a step; here nobody is to wait longer
        with changed:
            assert changed.wait_for(lambda: self._movers.has_results, 60), "a job did not end"
        (result,) = self._movers.take().values()
        assert not result.failed, result.failed


class PlainFiles:
    def __init__(self, directory: Path, object_bytes: int) -> None:
        directory.mkdir()
        self._directory = directory
        self._size = object_bytes + HEADER_BYTES
        self._count = JOB_BYTES // object_bytes
        self._local = threading.local()

    def write(self) -> None:
        at_once(self._write, self._count, DISK_THREADS)

    def read(self) -> None:
        at_once(self._read, self._count, DISK_THREADS)

    def _buffer(self) -> mmap.mmap:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, self._size)
        return self._local.buffer  # type: ignore[no-any-return]

    def _write(self, number: int) -> None:
        fd = os.open(self._directory / str(number), os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT, 0o600)
        assert os.pwrite(fd, self._buffer(), 0) == self._size
        os.close(fd)

    def _read(self, number: int) -> None:
        fd = os.open(self._directory / str(number), os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(fd, [self._buffer()], 0) == self._size
        os.close(fd)


class PlainSockets:
    """Values of the tier's size, over sockets that stay open; each receives into one buffer."""

    def __init__(self, port: int, object_bytes: int, connections: int) -> None:
        self._size = object_bytes + HEADER_BYTES
        self._count = JOB_BYTES // object_bytes
        self._value = secrets.token_bytes(self._size)
        self._free = [(self._connect(port), memoryview(bytearray(self._size + 64))) for _ in range(connections)]
        self._connections = connections

    @staticmethod
    def _connect(port: int) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def write(self) -> None:
        at_once(self._write, self._count, self._connections)

    def read(self) -> None:
        at_once(self._read, self._count, self._connections)

    def _write(self, number: int) -> None:
        link, room = self._free.pop()
        head = b"*3\r\n$3\r\nSET\r\n$8\r\nplain%03d\r\n$%d\r\n" % (number, self._size)
        link.sendall(head)
        link.sendall(self._value)
        link.sendall(b"\r\n")
        assert link.recv(64) == b"+OK\r\n"
        self._free.append((link, room))

    def _read(self, number: int) -> None:
        link, room = self._free.pop()
        link.sendall(b"*2\r\n$3\r\nGET\r\n$8\r\nplain%03d\r\n" % number)
        left = self._size + len(b"$%d\r\n" % self._size) + 2
        while left:
            left -= link.recv_into(room[:left])
        self._free.append((link, room))


def paired(
    rounds: int,
    tier: Callable[[], object],
    plain: Callable[[], object],
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Any]:
    """Both by turns; the first round is not counted."""
    taken: list[tuple[Taken, Taken]] = []
    for number in range(rounds + 1):
        if number % 2:
            one, other = timed(tier, cpu_clock), timed(plain, cpu_clock)
        else:
            other, one = timed(plain, cpu_clock), timed(tier, cpu_clock)
        taken.append((one, other))
    ratios = [plain_.wall / tier_.wall for tier_, plain_ in taken[1:]]
    first, _, third = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(each[side].wall for each in taken[1:]) for side in (0, 1)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(first, 3), round(third, 3)],
        "ratio_by_cpu": round(sum(each[1].cpu for each in taken[1:]) / sum(each[0].cpu for each in taken[1:]), 3),
        "tier_cpu_per_second": round(statistics.median(each[0].cpu / each[0].wall for each in taken[1:]), 2),
        "tier_gb_per_second": round(JOB_BYTES / medians[0] / 1e9, 2),
        "plain_gb_per_second": round(JOB_BYTES / medians[1] / 1e9, 2),
    }


def measure_cpu(rounds: int) -> Iterator[dict[str, Any]]:
    from benchmarks.movers import CHUNKS, Bench  # noqa: PLC0415 - it loads torch

    for page in (16 << 10, 64 << 10):
        bench = Bench(page, 1)
        bench.fill()
        for load in (False, True):
            numbers = iter(range(1 << 20))
            tier = partial(_next, numbers, partial(bench.native, scattered=True, load=load))
            plain = partial(_next, numbers, partial(bench.memcpy, load=load))
            found = paired(rounds, tier, plain)
            scale = CHUNKS * bench.layout.payload_bytes / JOB_BYTES
            for name in ("tier_gb_per_second", "plain_gb_per_second"):
                found[name] = round(found[name] * scale, 2)
            yield {"tier": "cpu", "way": "load" if load else "save", "page_bytes": page, **found}


def _next(numbers: Iterator[int], work: Callable[[int], None]) -> None:
    work(next(numbers))


def measure_disk(rounds: int, root: Path) -> Iterator[dict[str, Any]]:
    for size in SIZES:
        disk = DiskStore(DiskSettings(directory=root / f"tier-{size}", max_bytes=512 << 20, threads=DISK_THREADS))
        assert disk.wait_scanned(60)
        movers = Movers(Guarded(disk, Limits(timeout=30)), size, 1 << 20)  # chunks that it does not have, as they come
        plain = PlainFiles(root / f"plain-{size}", size)
        yield {"tier": "disk", "way": "put", "object_bytes": size, **paired(rounds, movers.write, plain.write)}
        yield {"tier": "disk", "way": "get", "object_bytes": size, **paired(rounds, movers.fetch, plain.read)}
        movers.check()
        movers.close()


def measure_redis(rounds: int, root: Path) -> Iterator[dict[str, Any]]:
    with redis_server(root) as (port, process):
        cpu_clock = partial(with_server, process)
        for size in SIZES:
            settings = RedisSettings(addresses=(("127.0.0.1", port),))
            movers = Movers(Guarded(RedisStore(settings), Limits(timeout=30)), size, 1)
            plain = PlainSockets(port, size, settings.connections)
            row = {"tier": "redis", "object_bytes": size}
            yield {"way": "put", **row, **paired(rounds, movers.write, plain.write, cpu_clock)}
            yield {"way": "get", **row, **paired(rounds, movers.fetch, plain.read, cpu_clock)}
            movers.check()
            movers.close()


@contextmanager
def redis_server(root: Path) -> Iterator[tuple[int, int]]:
    """Port and process of a server of our own, which runs until the end of the block."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("There is no redis-server here: install it (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(root), "--appendonly", "no"]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port, time.monotonic() + 20)
        yield port, server.pid
    finally:
        server.kill()
        server.wait(10)


def _wait_for(port: int, deadline: float) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def row_text(row: dict[str, Any]) -> str:
    size = f"{row['object_bytes'] >> 20} MiB" if "object_bytes" in row else f"{row['page_bytes'] >> 10} KiB"
    cpu = f", {row['ratio_by_cpu']:.2f} by processor time" if row["tier"] != "disk" else ""
    return (
        f"{row['tier']:5} {row['way']:4} {size:>6}: {row['ratio']:.2f} of plain ({row['quartiles'][0]:.2f} to "
        f"{row['quartiles'][1]:.2f}){cpu}; {row['tier_gb_per_second']:.2f} of {row['plain_gb_per_second']:.2f} GB/s, with "
        f"{row['tier_cpu_per_second']:.2f} processors; bar {BARS[row['tier']]:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the disk's files are made, and removed at the end")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="cpu,disk,redis")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = arguments.directory / f"warmroute-bandwidth-{secrets.token_hex(4)}"
    root.mkdir(parents=True)
    measures: Sequence[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = (
        ("cpu", partial(measure_cpu, arguments.rounds)),
        ("disk", partial(measure_disk, arguments.rounds, root)),
        ("redis", partial(measure_redis, arguments.rounds, root)),
    )
    rows = []
    load = os.getloadavg()[0]
    try:
        for name, measure in measures:
            for row in measure() if name in arguments.only.split(",") else ():
                rows.append(row)
                print(row_text(row), flush=True)
    finally:
        shutil.rmtree(root)
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}"
        found = {"machine": machine, "rounds": arguments.rounds, "bars": BARS, "tiers": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
