"""The disk tier against plain direct I/O of the same medium, in the same run; and its listing of 100,000 objects.

    python benchmarks/disk.py DIRECTORY [--objects 100000] [--json benchmarks/results/disk.json]

Plain I/O: as many threads, each with one aligned buffer of a whole object, write and read files one after the other with
direct I/O and do nothing else. The tier stores and loads real objects of the same size, loads into memory that is not
aligned to anything, and verifies header and checksum of each. Rounds alternate; the medians are compared.
"""

import argparse
import json
import mmap
import os
import secrets
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from worker_connector.chunk_object import HEADER_BYTES, Codec, Expected, ObjectKey, Section, open_object, seal
from worker_connector.native import Encoding
from worker_connector.tiers.base import Sink, Source
from worker_connector.tiers.disk import DiskSettings, DiskStore

THREADS = 4
OBJECTS = 16
OBJECT_BYTES = 8 << 20
ROUNDS = 9


def at_once(work: Callable[[int], None], count: int, threads: int) -> None:
    """``work`` for each number below ``count``, by so many threads."""
    todo, lock = list(range(count)), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                if not todo:
                    return
                number = todo.pop()
            work(number)

    crew = [threading.Thread(target=run) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()


def in_threads(work: Callable[[int], None], count: int = OBJECTS) -> float:
    """GB/s of ``work`` for each number of an object."""
    began = time.perf_counter()
    at_once(work, count, THREADS)
    return count * OBJECT_BYTES / (time.perf_counter() - began) / 1e9


class Plain:
    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._local = threading.local()

    def _buffer(self) -> mmap.mmap:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, OBJECT_BYTES)
        return self._local.buffer  # type: ignore[no-any-return]

    def write(self, number: int) -> None:
        fd = os.open(self._directory / str(number), os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT, 0o600)
        os.pwrite(fd, self._buffer(), 0)
        os.close(fd)

    def read(self, number: int) -> None:
        fd = os.open(self._directory / str(number), os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(fd, [self._buffer()], 0) == OBJECT_BYTES
        os.close(fd)


class Tier:
    def __init__(self, directory: Path) -> None:
        settings = DiskSettings(directory=directory, max_bytes=4 * OBJECTS * OBJECT_BYTES, threads=THREADS)
        self.store = DiskStore(settings)
        self.store.wait_scanned(60)
        self._data = [secrets.token_bytes(OBJECT_BYTES) for _ in range(OBJECTS)]
        self._rooms = [(bytearray(HEADER_BYTES), memoryview(bytearray(OBJECT_BYTES))) for _ in range(OBJECTS)]
        self._expected = [self._expect(number) for number in range(OBJECTS)]

    @staticmethod
    def _expect(number: int) -> Expected:
        key = ObjectKey(bytes(16), bytes([number]) * 16)
        section = Section(0, 16, 16, 0, OBJECT_BYTES)
        return Expected(key, "LBHNC", "bfloat16", 256, (section,), {Encoding.RAW: OBJECT_BYTES})

    def put(self, number: int) -> None:
        wanted = self._expected[number]
        sealed = seal(wanted, self._data[number], Codec())
        (outcome,) = self.store.put([str(wanted.key)], [Source(*sealed)], time.monotonic() + 60)
        assert outcome.ok, outcome

    def get(self, number: int) -> None:
        wanted, (header, room) = self._expected[number], self._rooms[number]
        (outcome,) = self.store.get([str(wanted.key)], [Sink(header, room)], time.monotonic() + 60)
        open_object(header, room, wanted, outcome.size)

    def check(self) -> None:
        assert all(room == data for (_, room), data in zip(self._rooms, self._data, strict=True))


def bandwidth(root: Path) -> dict[str, object]:
    plain, tier = Plain(root / "plain"), Tier(root / "tier")
    rounds: dict[str, list[float]] = {"plain_write": [], "tier_put": [], "plain_read": [], "tier_get": []}
    for number in range(ROUNDS + 1):
        found = {
            "plain_write": in_threads(plain.write),
            "tier_put": in_threads(tier.put),
            "plain_read": in_threads(plain.read),
            "tier_get": in_threads(tier.get),
        }
        for name, value in found.items() if number else ():
            rounds[name].append(value)
    tier.check()
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    tier.store.close()
    return {
        "object_bytes": OBJECT_BYTES,
        "threads": THREADS,
        "direct": tier.store.figures().direct,
        "gb_per_second": {name: round(value, 3) for name, value in medians.items()},
        "put_share_of_plain": round(statistics.median(map(_share, rounds["tier_put"], rounds["plain_write"])), 3),
        "get_share_of_plain": round(statistics.median(map(_share, rounds["tier_get"], rounds["plain_read"])), 3),
    }


def _share(tier: float, plain: float) -> float:
    return tier / plain


def listing(root: Path, count: int) -> dict[str, object]:
    """How long the first listing takes, when objects are served meanwhile, and what another thread feels of it."""
    directory = root / "many"
    names = make_objects(directory, count)
    quiet = pauses(lambda: time.sleep(5.0))
    began = time.perf_counter()
    store = DiskStore(DiskSettings(directory=directory, max_bytes=count * 8192 + (64 << 20)))
    opened = time.perf_counter() - began
    room = bytearray(8192)
    (outcome,) = store.get([names[-1]], [Sink(room)], time.monotonic() + 10)
    assert outcome.ok
    served = time.perf_counter() - began
    busy = pauses(lambda: store.wait_scanned(300))
    figures = store.figures()
    assert figures.objects == count, figures
    store.close()
    return {
        "objects": count,
        "seconds_until_opened": round(opened, 4),
        "seconds_until_first_object": round(served, 4),
        "seconds_until_listed": round(figures.scan_seconds, 2),
        "pauses_of_another_thread_ms": {"quiet": quiet, "listing": busy},
    }


def make_objects(directory: Path, count: int) -> list[str]:
    directory.mkdir()
    names = []
    for number in range(count):
        key = ObjectKey(bytes(16), secrets.token_bytes(16))
        names.append(str(key))
        shard = directory / f"{key.chunk[0]:02x}"
        if number < 4096:
            shard.mkdir(exist_ok=True)
        with (shard / f"{key}.object").open("wb") as file:
            file.truncate(5000)
    return names


def pauses(work: Callable[[], object]) -> dict[str, float]:
    """How late another thread, which wants to run every half millisecond, gets to run while ``work`` goes on."""
    late: list[float] = []
    done = threading.Event()
    worker = threading.Thread(target=lambda: (work(), done.set()))
    worker.start()
    while not done.is_set():
        began = time.perf_counter()
        time.sleep(0.0005)
        late.append((time.perf_counter() - began - 0.0005) * 1000)
    worker.join()
    late.sort()
    return {
        "p50": round(late[len(late) // 2], 3),
        "p99": round(late[len(late) * 99 // 100], 3),
        "max": round(late[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = arguments.directory / f"warmroute-disk-{secrets.token_hex(4)}"
    root.mkdir(parents=True)
    try:
        results = {"bandwidth": bandwidth(root), "listing": listing(root, arguments.objects)}
    finally:
        shutil.rmtree(root)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
