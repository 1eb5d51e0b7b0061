"""The shared directory: real files, and a file system that is full (tmpfs)."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers.servers import payload, soon
from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import LoanEnded, Outcome, Sink, Source, Status, pages
from worker_connector.tiers.filesystem import DirectorySettings, DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(DirectorySettings(path=tmp_path))


def status(outcomes: list[Outcome]) -> list[str]:
    return [each.status.value for each in outcomes]


def files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


@pytest.mark.parametrize("size", [1, 4096, (1 << 20) + 1, 5 << 20])
@pytest.mark.parametrize("sync", [False, True])
def test_objects_come_back_whole(tmp_path: Path, size: int, sync: bool) -> None:
    store = DirectoryStore(DirectorySettings(path=tmp_path, sync=sync))
    data = payload(size)
    assert store.put(["k"], [Source(data[:99], data[99:])], soon()) == [Outcome(Status.STORED, size)]
    header, body = bytearray(min(size, 4096)), bytearray(size)
    assert store.get(["k"], [Sink(header, body)], soon()) == [Outcome(Status.FOUND, size)]
    assert (bytes(header) + bytes(body))[:size] == data
    assert len(files(tmp_path)) == 1


def test_a_batch_has_an_outcome_for_each_key(store: DirectoryStore) -> None:
    keys = [f"w1-{at}" for at in range(300)]
    assert set(status(store.put(keys[::2], [Source(key.encode()) for key in keys[::2]], soon()))) == {"stored"}
    rooms = [bytearray(len(key)) for key in keys]
    assert status(store.get(keys, [Sink(room) for room in rooms], soon())) == ["found", "missing"] * 150
    assert [room.decode() for room in rooms[::2]] == keys[::2]
    assert [each.size for each in store.exists(keys[:2], soon())] == [4, -1]
    met = [entry for page in pages(store, threading.Event(), 5.0) for entry in page.entries]
    assert sorted(entry.key for entry in met) == sorted(keys[::2])
    assert status(store.delete(keys[:4], soon())) == ["deleted", "missing"] * 2
    assert status(store.get(["w1-4"], [Sink(bytearray(3))], soon())) == ["failed"]


def test_age_hides_objects_and_a_scan_removes_them(tmp_path: Path) -> None:
    store = DirectoryStore(DirectorySettings(path=tmp_path, ttl=60))
    store.put(["old", "fresh"], [Source(b"x"), Source(b"y")], soon())
    os.utime(next(tmp_path.rglob("old.object")), (0, time.time() - 61))
    assert status(store.exists(["old", "fresh"], soon())) == ["missing", "found"]
    assert status(store.get(["old"], [Sink(bytearray(1))], soon())) == ["missing"]
    assert [entry.key for page in pages(store, threading.Event(), 5.0) for entry in page.entries] == ["fresh"]
    assert not list(tmp_path.rglob("old.object"))


def test_a_scan_passes_over_what_is_not_its_own_and_clears_up_after_dead_writers(
    tmp_path: Path, store: DirectoryStore
) -> None:
    store.put(["k"], [Source(b"x")], soon())
    shard = next(tmp_path.iterdir())
    (shard / "notes.txt").write_text("keep me")
    (shard / "folder.object").mkdir()
    (shard / "link.object").symlink_to("/etc/passwd")
    (shard / ".a.0.tmp").write_bytes(b"half")
    (shard / ".b.0.tmp").write_bytes(b"half")
    os.utime(shard / ".a.0.tmp", (0, time.time() - 7200))
    (tmp_path / "elsewhere").mkdir()
    assert [entry.key for page in pages(store, threading.Event(), 5.0) for entry in page.entries] == ["k"]
    assert {each.name for each in shard.iterdir()} == {
        "k.object",
        "notes.txt",
        "folder.object",
        "link.object",
        ".b.0.tmp",
    }


def test_links_and_folders_in_the_place_of_objects_fail_alone(store: DirectoryStore) -> None:
    keys = ["link", "folder", "fine"]
    store.put(keys, [Source(b"x")] * 3, soon())
    link, folder = store._path("link"), store._path("folder")
    link.unlink()
    link.symlink_to("/etc/passwd")
    folder.unlink()
    folder.mkdir()
    outcomes = store.get(keys, [Sink(bytearray(10_000)) for _ in keys], soon())
    assert status(outcomes) == ["failed", "failed", "found"]


def test_keys_never_leave_the_directory(store: DirectoryStore) -> None:
    for key in ("../x", "/etc/x", "a/b", "", ".hidden", "x" * 300, "a\0b"):
        with pytest.raises(ValueError, match="no key that a file can be named by"):
            store.put([key], [Source(b"x")], soon())


def test_a_directory_that_is_not_there_is_never_made(tmp_path: Path) -> None:
    store = DirectoryStore(DirectorySettings(path=tmp_path / "mount"))
    calls: list[Callable[[], object]] = [
        lambda: store.ping(soon()),
        lambda: store.put(["k"], [Source(b"x")], soon()),
        lambda: store.scan("", soon()),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert caught.value.cause == "missing"
    assert status(store.get(["k"], [Sink(bytearray(1))], soon())) == ["missing"]
    assert not (tmp_path / "mount").exists()
    (tmp_path / "mount").mkdir()
    store.ping(soon())
    assert status(store.put(["k"], [Source(b"x")], soon())) == ["stored"]


def test_what_was_given_up_gets_no_name(tmp_path: Path, store: DirectoryStore) -> None:
    source = Source(payload(3 << 20))

    class Late(Source):
        def copy(self, at: int, room: memoryview) -> int:
            if at:
                self.end()
            return source.copy(at, room)

    with pytest.raises(LoanEnded):
        store.put(["k"], [Late(source.join())], soon())
    with pytest.raises(StoreUnavailable, match="deadline"):
        store.put(["k"], [Source(b"x")], soon(-1))
    assert files(tmp_path) == []


def test_many_writers_of_one_key_leave_one_whole_object(tmp_path: Path) -> None:
    values = [payload(700_000, seed) for seed in range(4)]
    stop = threading.Event()
    problems: list[object] = []

    def write(value: bytes) -> None:
        store = DirectoryStore(DirectorySettings(path=tmp_path))
        while not stop.is_set():
            if not store.put(["k"], [Source(value)], soon())[0].ok:
                problems.append("a put failed")

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    for writer in writers:
        writer.start()
    reader = DirectoryStore(DirectorySettings(path=tmp_path))
    until = time.monotonic() + 1.0
    seen = 0
    while time.monotonic() < until:
        room = bytearray(700_000)
        outcome = reader.get(["k"], [Sink(room)], soon())[0]
        assert outcome.status in (Status.FOUND, Status.MISSING)
        assert not outcome.ok or bytes(room) in values
        seen += outcome.ok
    stop.set()
    for writer in writers:
        writer.join(10)
    assert seen
    assert not problems
    assert len(files(tmp_path)) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system of 2 MiB needs rights that this process lacks")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_file_system_refuses_and_keeps_nothing_half(small_disk: Path) -> None:
    store = DirectoryStore(DirectorySettings(path=small_disk))
    outcomes = store.put([f"k{at}" for at in range(6)], [Source(payload(600_000, at)) for at in range(6)], soon())
    assert status(outcomes) == ["stored"] * 3 + ["refused"] * 3
    assert outcomes[-1].cause == "full"
    store.ping(soon())
    assert len(files(small_disk)) == 3
    room = bytearray(600_000)
    assert store.get(["k2"], [Sink(room)], soon())[0].ok
    assert bytes(room) == payload(600_000, 2)
    store.delete(["k0"], soon())
    assert status(store.put(["k5"], [Source(payload(600_000, 5))], soon())) == ["stored"]


@pytest.mark.parametrize(
    ("number", "cause"),
    [(errno.EIO, "io"), (errno.EACCES, "auth"), (errno.ESTALE, "stale"), (errno.EROFS, "readonly")],
)
def test_errors_of_the_file_system_are_told_apart(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, number: int, cause: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        found = _cause(store)
    assert found == cause
    assert not files(store._root)


def _cause(store: DirectoryStore) -> str:
    try:
        outcome = store.put(["k"], [Source(b"x")], soon())[0]
    except StoreUnavailable as error:
        return error.cause
    assert outcome.status is Status.FAILED
    return outcome.cause
