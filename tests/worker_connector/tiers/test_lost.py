"""What a disk tier gives up by itself is told, so that nobody goes on believing that it is there."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers import disk_objects as objects
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_index import _MOST_GONE
from worker_connector.tiers.guarded import Guarded


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=1 << 20))
    assert made.wait_scanned(10)
    yield made
    made.close()


def unit(number: int) -> bytes:
    return objects.IDENTITY + objects.key(number).chunk


def test_evictions_are_told_once(store: DiskStore) -> None:
    for number in range(40):
        assert objects.put(store, number).ok
    lost = store.take_lost()
    assert len(lost) == store.figures().evictions > 5
    there = {number for number in range(40) if objects.load(store, number) is not None}
    assert {unit(number) for number in range(40)} - set(lost) == {unit(number) for number in there}
    assert store.take_lost() == []


def test_what_came_again_is_not_lost(store: DiskStore) -> None:
    objects.put(store, 1)
    store.delete([objects.name(1)], time.monotonic() + 10)
    objects.put(store, 1)
    assert store.take_lost() == []


def test_what_others_removed_is_lost_once_that_is_noticed(store: DiskStore) -> None:
    objects.put(store, 1)
    for path in store.settings.directory.rglob("*.object"):
        path.unlink()
    assert objects.load(store, 1) is None
    assert store.take_lost() == [unit(1)]


def test_nobody_who_listens_costs_a_bounded_amount(store: DiskStore) -> None:
    for number in range(_MOST_GONE + 10):
        one = number.to_bytes(32, "little")
        store._index.add(one, "0of1-1", 4096)
        store._index.forget(one)
    assert len(store.take_lost()) == _MOST_GONE


def test_a_guard_passes_it_on(store: DiskStore) -> None:
    guarded = Guarded(store)
    objects.put(store, 1)
    store.delete([objects.name(1)], time.monotonic() + 10)
    assert guarded.take_lost() == [unit(1)]
    guarded.close()
