"""The directory of a disk tier, as several threads of one engine work on it."""

import os
import stat
import time
from pathlib import Path

import pytest

from tests.worker_connector.tiers.disk_objects import key, name, source
from worker_connector.tiers.base import Status
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_files import Files


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _soon() -> float:
    return time.monotonic() + 10


def test_two_listings_at_a_time_each_find_everything(tmp_path: Path) -> None:
    store = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=1 << 20))
    assert store.put([name(1)], [source(1)], _soon())[0].ok
    area, files = key(1).chunk[0], store._files
    first = files._entries(area)
    began = next(first)
    assert [each.unit[16:] for each in files.list_objects(area)] == [key(1).chunk], "the one under way took its names"
    assert files.list_shard(area).used > 0
    assert began[0].startswith(name(1))
    assert not list(first)
    store.close()


def test_a_listing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.directory(7)
    before = _descriptors()
    for _ in range(20):
        files.list_objects(7)
        next(files._entries(7), None)
    assert _descriptors() <= before


def test_a_directory_that_cannot_be_synced_after_an_object_came_costs_no_descriptor_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=1 << 20, fsync=True))
    assert store.wait_scanned(10)
    taken: list[int] = []
    sync = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            taken.append(os.open(os.devnull, os.O_RDONLY))  # gets the number of the object's descriptor
            raise OSError(5, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Exception, match="Input/output error"):
        store.put([name(1)], [source(1)], _soon())
    monkeypatch.undo()
    (other,) = taken
    os.fstat(other)
    os.close(other)
    assert store.put([name(1)], [source(1)], _soon())[0].status is Status.STORED
    store.close()
