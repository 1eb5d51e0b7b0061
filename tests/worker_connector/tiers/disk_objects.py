"""Real chunk objects of any size for a disk tier, and a program that writes them until it is killed.

``python -m tests.worker_connector.tiers.disk_objects`` reads lines of JSON, and for each forks a writer that is killed
``seconds`` after it began to write; it answers with the numbers of the objects that were stored before.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from worker_connector.chunk_object import HEADER_BYTES, Codec, Expected, ObjectKey, Section, open_object, seal
from worker_connector.errors import StoreUnavailable
from worker_connector.native import Encoding
from worker_connector.tiers.base import Outcome, Sink, Source
from worker_connector.tiers.disk import DiskSettings, DiskStore

IDENTITY = bytes(range(16))


def key(number: int, rank: int = 0, ranks: int = 1) -> ObjectKey:
    return ObjectKey(IDENTITY, sha256(number.to_bytes(8, "little")).digest()[:16], rank, ranks)


def name(number: int, rank: int = 0, ranks: int = 1) -> str:
    return str(key(number, rank, ranks))


def size_of(number: int) -> int:
    """Payload bytes: of all sizes, whole pages and not."""
    return random.Random(number).choice([1, 4095, 4096, 60_000, 131_072, 200_001])


def expected(number: int, rank: int = 0, ranks: int = 1) -> Expected:
    size = size_of(number)
    section = Section(0, 16, 4, 0, size)
    return Expected(key(number, rank, ranks), "LBHNC", "uint8", 64, (section,), {Encoding.RAW: size})


def content(number: int) -> bytes:
    return random.Random(number).randbytes(size_of(number))


def source(number: int, rank: int = 0, ranks: int = 1, *, ttl: int = 0, created: float = 0.0) -> Source:
    sealed = seal(expected(number, rank, ranks), content(number), Codec(), ttl=ttl, created=created)
    return Source(sealed.header, sealed.payload)


def put(store: DiskStore, number: int, seconds: float = 30.0) -> Outcome:
    return store.put([name(number)], [source(number)], time.monotonic() + seconds)[0]


def load(store: DiskStore, number: int, seconds: float = 30.0) -> bytes | None:
    """An object's content, verified; None if it is not there.

    Raises:
        BadObject: something else is there.
    """
    header, room = bytearray(HEADER_BYTES), bytearray(size_of(number) + HEADER_BYTES)
    (outcome,) = store.get([name(number)], [Sink(header, room)], time.monotonic() + seconds)
    if not outcome.ok:
        return None
    found = open_object(header, room, expected(number), outcome.size)
    return bytes(room[: found.packed_bytes])


def used(root: Path) -> int:
    """Bytes of all files, as somebody who has never heard of the tier counts them. A file that goes meanwhile takes none."""
    total = 0
    for directory, _, names in os.walk(root):
        for each in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, each)).st_size  # noqa: PTH118
    return total


def write_for_ever(root: str, max_bytes: int, first: int, answers: int) -> None:
    store = DiskStore(DiskSettings(directory=Path(root), max_bytes=max_bytes, rescan_seconds=2.0, threads=2))
    store.wait_scanned(60)
    os.write(answers, bytes(8))
    number = first
    while True:
        numbers = [number, number + 1, number + 2]
        try:
            outcomes = store.put([name(n) for n in numbers], [source(n) for n in numbers], time.monotonic() + 10)
        except StoreUnavailable:
            continue
        for n, outcome in zip(numbers, outcomes, strict=True):
            if outcome.ok:
                os.write(answers, n.to_bytes(8, "little"))
        number += 3


def kill_writer(order: dict[str, object]) -> list[int]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            write_for_ever(str(order["root"]), int(str(order["max_bytes"])), int(str(order["first"])), writer)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 8) == bytes(8)
    time.sleep(float(str(order["seconds"])))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    told = b""
    while part := os.read(reader, 1 << 16):
        told += part
    os.close(reader)
    return [int.from_bytes(told[at : at + 8], "little") for at in range(0, len(told), 8)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(kill_writer(json.loads(line))), flush=True)
