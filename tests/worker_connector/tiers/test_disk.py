import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker_connector.tiers.disk_objects import content, expected, key, load, name, put, size_of, source, used
from worker_connector.chunk_object import HEADER_BYTES, read_header
from worker_connector.errors import BadObject, ConfigurationError, StoreUnavailable
from worker_connector.eviction import POLICIES
from worker_connector.tiers import disk_io
from worker_connector.tiers.base import Outcome, Sink, Source, Status
from worker_connector.tiers.breaker import Pauses
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_account import Account, Held, LockBusy
from worker_connector.tiers.disk_files import AREAS, QUARANTINE, SUFFIX, Files, parse_name
from worker_connector.tiers.disk_gate import Gate
from worker_connector.tiers.disk_index import Index
from worker_connector.tiers.disk_keeper import Keeper
from worker_connector.tiers.guarded import Guarded, Limits

MIB = 1 << 20
Make = Callable[..., DiskStore]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made = []

    def make(directory: Path = tmp_path / "cache", max_bytes: int = 64 * MIB, **settings: Any) -> DiskStore:
        store = DiskStore(DiskSettings(directory=directory, max_bytes=max_bytes, **settings))
        made.append(store)
        assert store.wait_scanned(60)
        return store

    yield make
    for store in made:
        store.close()


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = soon(seconds)
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def path_of(store: DiskStore, number: int) -> Path:
    chunk = key(number).chunk
    return store.settings.directory / f"{chunk[0]:02x}" / (name(number) + SUFFIX)


def large(number: int) -> Source:
    """An opaque value of a quarter megabyte."""
    return Source(random.Random(number).randbytes(MIB // 4))


def put_large(store: DiskStore, *numbers: int) -> list[Status]:
    return [each.status for each in store.put([name(n) for n in numbers], [large(n) for n in numbers], soon())]


def there(store: DiskStore, *numbers: int) -> list[int]:
    """Those that can be read."""
    rooms = [bytearray(MIB) for _ in numbers]
    outcomes = store.get([name(n) for n in numbers], [Sink(room) for room in rooms], soon())
    for number, room, outcome in zip(numbers, rooms, outcomes, strict=True):
        assert not outcome.ok or room[: outcome.size] == large(number).join()
    return [n for n, outcome in zip(numbers, outcomes, strict=True) if outcome.ok]


def account_of(store: DiskStore) -> int:
    with store._space.account.hold(soon()) as held:
        return held.total


# ---- objects --------------------------------------------------------------------------------------------------------


def test_what_another_process_deleted_is_not_said_to_be_there(make: Make) -> None:
    here, other = make(), make()
    assert put_large(here, 1, 2) == [Status.STORED] * 2
    other.delete([name(1)], soon())
    assert [each.status for each in here.exists([name(1), name(2)], soon())] == [Status.MISSING, Status.FOUND]


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("fsync", [False, True])
def test_objects_come_back(make: Make, direct: bool | None, fsync: bool) -> None:
    store = make(direct=direct, fsync=fsync)
    numbers = list(range(12))
    assert {size_of(number) % 4096 != 0 for number in numbers} == {True, False}
    outcomes = store.put([name(n) for n in numbers], [source(n) for n in numbers], soon())
    assert [each.status for each in outcomes] == [Status.STORED] * 12
    assert [each.size for each in outcomes] == [size_of(n) + HEADER_BYTES for n in numbers]
    for number in numbers:
        assert load(store, number) == content(number)
        assert path_of(store, number).stat().st_size == size_of(number) + HEADER_BYTES
    assert load(store, 99) is None
    assert store.figures().objects == 12
    store.check()


def test_an_object_may_come_in_any_parts(make: Make) -> None:
    store, data = make(), random.Random(1).randbytes(3 * MIB + 77)
    cuts = [0, 5, 4096, 4097, MIB, MIB + 1, 2 * MIB + 4096, len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(cuts)]
    assert store.put([name(1)], [Source(*parts)], soon())[0].ok
    rooms = [bytearray(size) for size in (1, 4096, MIB - 3, 4 * MIB)]
    (outcome,) = store.get([name(1)], [Sink(*rooms)], soon())
    assert outcome == (Status.FOUND, len(data), "", "")
    assert b"".join(rooms)[: len(data)] == data


def test_a_later_object_replaces_an_earlier_one(make: Make) -> None:
    store = make()
    for data in (b"a" * 10_000, b"b" * 50_000, b"c"):
        assert store.put([name(1)], [Source(data)], soon())[0].ok
        room = bytearray(60_000)
        (outcome,) = store.get([name(1)], [Sink(room)], soon())
        assert room[: outcome.size] == data
    assert store.figures().objects == 1
    assert account_of(store) == 2 * 4096, "one page of the object, one of the account"


def test_deleted_and_unknown_objects_are_missing(make: Make) -> None:
    store = make()
    assert put_large(store, 1, 2) == [Status.STORED] * 2
    names = [name(1), name(2), name(3), "w1-no-key"]
    assert [each.status.value for each in store.exists(names, soon())] == ["found", "found", "missing", "failed"]
    assert [each.status.value for each in store.delete(names, soon())] == ["deleted", "deleted", "missing", "failed"]
    assert [each.status.value for each in store.exists(names, soon())] == ["missing", "missing", "missing", "failed"]
    assert store.get([], [], soon()) == store.put([], [], soon()) == store.exists([], soon()) == []
    assert account_of(store) == 4096


def test_an_object_that_does_not_fit_its_room_has_failed(make: Make) -> None:
    store, room = make(), bytearray(1000)
    put_large(store, 1)
    (outcome,) = store.get([name(1)], [Sink(room)], soon())
    assert (outcome.status, outcome.cause) == (Status.FAILED, "size")
    assert room == bytes(1000)


def test_a_scan_meets_everything_whoever_wrote_it(make: Make) -> None:
    store, other = make(), make()
    for number in range(40):
        put(store if number % 2 else other, number)
    (store.settings.directory / "00").mkdir(exist_ok=True)
    (store.settings.directory / "00" / "notes.txt").write_text("foreign")
    entries, cursor = [], ""
    while True:
        page = store.scan(cursor, soon(), limit=7)
        entries += page.entries
        cursor = page.cursor
        if not cursor:
            break
    assert sorted(each.key for each in entries) == sorted(name(number) for number in range(40))
    assert {each.key: each.size for each in entries}[name(3)] == size_of(3) + HEADER_BYTES
    assert all(abs(each.modified - time.time()) < 60 for each in entries)
    with pytest.raises(StoreUnavailable, match="no cursor"):
        store.scan("elsewhere", soon())


def test_a_closed_store_says_so(make: Make) -> None:
    store = make()
    store.close()
    for call in (store.exists, store.delete):
        with pytest.raises(StoreUnavailable, match="closed"):
            call([name(1)], soon())


# ---- the bound and eviction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bound_holds_whatever_the_policy(make: Make, policy: str) -> None:
    store = make(max_bytes=2 * MIB, policy=policy)
    rng = random.Random(policy)
    for number in range(60):
        assert put_large(store, number) == [Status.STORED]
        there(store, rng.randrange(number + 1))
        assert used(store.settings.directory) <= 2 * MIB
    figures = store.figures()
    assert figures.objects == 7
    assert figures.evictions == 53
    store.check()
    assert account_of(store) == used(store.settings.directory) - 2080 + 4096, "the account is a page for the bound"


def test_the_longest_unused_goes_first(make: Make) -> None:
    store = make(max_bytes=2 * MIB)
    put_large(store, 6, 5, 4, 3, 2, 1, 0)
    assert there(store, 0, 2) == [0, 2]
    put_large(store, 7, 8)
    assert there(store, *range(9)) == [0, 2, 4, 5, 6, 7, 8]
    put_large(store, *range(10, 17))
    put_large(store, 20)
    assert there(store, *range(10, 17)) == list(range(10, 16)), "a prompt goes from its end"


def test_recency_outlives_the_process(make: Make) -> None:
    store = make(max_bytes=2 * MIB)
    put_large(store, *range(7))
    for number in range(7):
        os.utime(path_of(store, number), (1000 + number, 1000 + number))
    assert there(store, 1) == [1], "an old file that is used becomes young again"
    store.close()
    again = make(max_bytes=2 * MIB)
    assert again.figures().objects == 7
    put_large(again, 7, 8, 9)
    assert there(again, *range(10)) == [1, 4, 5, 6, 7, 8, 9]


def test_ranks_of_a_chunk_come_and_go_together(make: Make) -> None:
    store = make(max_bytes=2 * MIB)
    for number in range(3):
        for rank in (0, 1):
            assert store.put([name(number, rank, 2)], [large(number)], soon())[0].ok
    assert store.put([name(9)], [large(9)], soon())[0].ok
    assert store.get([name(0, 1, 2)], [Sink(bytearray(MIB))], soon())[0].ok, "a use by one rank is one of the chunk"
    assert store.put([name(10)], [large(10)], soon())[0].ok
    left = {(n, rank) for n in range(3) for rank in (0, 1) if store.exists([name(n, rank, 2)], soon())[0].ok}
    assert left == {(0, 0), (0, 1), (2, 0), (2, 1)}
    store.check()


def test_pinned_objects_stay(make: Make) -> None:
    store = make(max_bytes=2 * MIB)
    put_large(store, *range(7))
    store.pin([name(0), name(1)])
    store.pin([name(1)])
    put_large(store, *range(10, 20))
    assert there(store, 0, 1) == [0, 1]
    store.pin([name(0), name(1)], pin=False)
    put_large(store, *range(20, 30))
    assert there(store, 0, 1) == [1]
    with pytest.raises(ValueError, match="no object's key"):
        store.pin(["nonsense"])


def test_nothing_is_stored_when_nothing_may_go(make: Make) -> None:
    store = make(max_bytes=2 * MIB)
    put_large(store, *range(7))
    store.pin([name(number) for number in range(7)])
    (outcome,) = store.put([name(9)], [large(9)], soon())
    assert (outcome.status, outcome.cause) == (Status.REFUSED, "room")
    (outcome,) = store.put([name(9)], [Source(bytes(3 * MIB))], soon())
    assert (outcome.status, outcome.cause) == (Status.REFUSED, "size")
    assert there(store, *range(10)) == list(range(7))


def test_a_lower_bound_takes_hold_at_the_next_start(make: Make) -> None:
    put_large(make(max_bytes=4 * MIB), *range(15))
    store = make(max_bytes=2 * MIB)
    assert used(store.settings.directory) <= 2 * MIB
    assert store.figures().objects == 7


# ---- what else lies in the directory --------------------------------------------------------------------------------


def test_foreign_files_are_left_alone_and_counted(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shard, deep = root / "0a", root / "models" / "deep"
    shard.mkdir(parents=True)
    deep.mkdir(parents=True)
    foreign = [
        root / "README",
        shard / "x.object",
        shard / ".stray.tmp",
        deep / "weights.bin",
        root / f"{name(1)}.object",
    ]
    for path in foreign:
        path.write_bytes(b"x" * 300_000)
    (shard / "link").symlink_to(root / "README")
    store = make(max_bytes=4 * MIB)
    assert store.figures().foreign_files == 6
    put_large(store, *range(20))
    assert used(root) <= 4 * MIB
    assert all(path.read_bytes() == b"x" * 300_000 for path in foreign)
    assert store.figures().objects < 11
    assert account_of(store) >= 5 * 300_000


def test_foreign_files_that_cannot_be_looked_at_are_in_nobodys_way(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "listable").mkdir(parents=True)
    (tmp_path / "cache" / "listable" / "hidden").write_bytes(b"x")
    real = os.stat

    def refused(path: Any, *given: Any, **options: Any) -> os.stat_result:
        if path == "hidden":
            raise PermissionError(errno.EACCES, "denied")
        return real(path, *given, **options)

    monkeypatch.setattr("worker_connector.tiers.disk_files.os.stat", refused)
    assert put(make(), 1).ok


def test_it_is_said_why_a_directory_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_files: Files, _area: int) -> None:
        raise OSError(errno.EIO, "it is broken")

    monkeypatch.setattr(Files, "list_shard", broken)
    store = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=64 * MIB))
    until(lambda: "cannot be listed, and nothing is stored until it is: OSError(5, 'it is broken')" in caplog.text)
    store.close()


def test_a_directory_full_of_foreign_files_refuses(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    (root / "backup.tar").write_bytes(bytes(3 * MIB))
    store = make(max_bytes=2 * MIB)
    assert put_large(store, 1) == [Status.REFUSED]
    (root / "backup.tar").unlink()
    store._space._learned = float("-inf")
    assert put_large(store, 1) == [Status.STORED], "and is looked at again"


def test_temporary_files_of_the_dead_are_removed_and_of_the_living_are_not(make: Make) -> None:
    store = make()
    files = store._files
    dead, living = key(1), key(2)
    made = {}
    for each in (dead, living):
        unit, part = parse_name(f"{each}{SUFFIX}")  # type: ignore[misc]
        made[each] = (*files.create(unit, part, 10_000), files.area_of(unit))
    os.close(made[dead][0])
    other = make()
    left = [path.name for path in store.settings.directory.glob("*/.*.tmp")]
    assert left == [made[living][1]]
    assert other.figures().abandoned_files == 1
    assert account_of(other) == 4096 + 12_288, "a living one counts with its full size"
    os.close(made[living][0])


def test_permissions(make: Make) -> None:
    old = os.umask(0)
    try:
        store = make()
        put(store, 1)
        store.discard([name(1)], "test", soon())
        put(store, 1)
    finally:
        os.umask(old)
    for path in (store.settings.directory, *store.settings.directory.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_links_are_not_followed(make: Make, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(large(1).join())
    store = make()
    put_large(store, 1, 2)
    path_of(store, 1).unlink()
    path_of(store, 1).symlink_to(outside / "secret")
    assert there(store, 1) == []
    assert put_large(store, 1) == [Status.STORED]
    assert there(store, 1) == [1]
    assert (outside / "secret").exists()
    number = next(n for n in range(3, 500) if not path_of(store, n).parent.exists())
    path_of(store, number).parent.symlink_to(outside, target_is_directory=True)
    assert put_large(store, number) == [Status.REFUSED]
    assert there(store, number) == []
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_what_is_no_file_is_not_read(make: Make) -> None:
    store = make()
    put_large(store, 1, 2)
    for number, replace in ((1, os.mkfifo), (2, os.mkdir)):
        path_of(store, number).unlink()
        replace(path_of(store, number))
    assert there(store, 1, 2) == []
    assert put_large(store, 1, 2) == [Status.STORED, Status.REFUSED]
    assert there(store, 1, 2) == [1]


def test_a_removed_directory_is_made_again(make: Make) -> None:
    store = make()
    put_large(store, 1)
    subprocess.run(f"rm -r {store.settings.directory}/*", shell=True, check=True)
    assert there(store, 1) == []
    assert put_large(store, 1, 2) == [Status.STORED] * 2
    assert there(store, 1, 2) == [1, 2]
    assert account_of(store) == 4096 + MIB // 2


# ---- bad objects ----------------------------------------------------------------------------------------------------


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del data[rng.randrange(len(data)) :]
    elif kind == "emptied":
        data.clear()
    elif kind == "longer":
        data += b"more"
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "emptied", "longer"])
def test_damaged_objects_are_never_loaded(make: Make, kind: str) -> None:
    store, rng = make(), random.Random(kind)
    for number in range(30):
        assert put(store, number).ok
        damage(path_of(store, number), kind, rng)
        with pytest.raises(BadObject):
            load(store, number)
        (outcome,) = store.discard([name(number)], "damaged", soon())
        assert outcome.status is Status.DELETED
        assert load(store, number) is None
        assert put(store, number).ok
        assert load(store, number) == content(number)
    store.check()


def test_an_object_under_another_name_is_refused(make: Make) -> None:
    store = make()
    put(store, 1)
    path_of(store, 2).parent.mkdir(exist_ok=True)
    path_of(store, 1).rename(path_of(store, 2))
    header, room = bytearray(HEADER_BYTES), bytearray(MIB)
    (outcome,) = store.get([name(2)], [Sink(header, room)], soon())
    assert outcome.ok
    assert read_header(header).key == key(1) != expected(2).key
    with pytest.raises(BadObject, match="it is of chunk"):
        load(store, 2)


def test_the_quarantine_is_bounded_and_counts(make: Make) -> None:
    store = make(max_bytes=20 * MIB, quarantine_bytes=10 * MIB)
    quarantine = store.settings.directory / "quarantine"
    for number in range(8):
        put_large(store, number)
        assert store.discard([name(number), name(99)], "bad", soon())[0].status is Status.DELETED
        assert used(quarantine) <= MIB, "a twentieth of the tier"
    assert [path.name[21:] for path in sorted(quarantine.iterdir())] == [name(number) for number in (4, 5, 6, 7)]
    assert account_of(store) == 4096 + MIB
    assert store.figures().quarantined == 8
    assert there(store, *range(8)) == []
    tight = make(max_bytes=MIB)
    assert put_large(tight, 50, 51, 52) == [Status.STORED] * 3
    assert used(store.settings.directory) <= MIB, "objects are worth more than bad ones"


def test_damaged_objects_are_found_before_anybody_asks(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    store = make()
    for number in range(6):
        put(store, number)
    damage(path_of(store, 0), "emptied", random.Random(1))
    path_of(store, 1).write_bytes(path_of(store, 2).read_bytes())
    store.close()
    again = make(rescan_seconds=1.0)
    until(lambda: again.figures().quarantined == 2)
    assert again.figures().objects == 4
    assert sum("is damaged and was put aside" in record.message for record in caplog.records) == 1


# ---- time to live ---------------------------------------------------------------------------------------------------


def test_expired_objects_are_missing_and_removed(make: Make) -> None:
    store = make(rescan_seconds=2.0)
    assert store.put([name(1)], [large(1)], soon(), ttl=0.2)[0].ok
    assert store.put([name(2)], [source(2, ttl=1)], soon())[0].ok
    assert put_large(store, 3) == [Status.STORED]
    until(lambda: store.figures().objects == 1)
    assert store.figures().expirations == 2
    assert [each.ok for each in store.exists([name(n) for n in (1, 2, 3)], soon())] == [False, False, True]
    assert not path_of(store, 1).exists()
    assert there(store, 3) == [3]


def test_the_time_to_live_is_read_from_headers_after_a_restart(make: Make) -> None:
    store = make()
    assert store.put([name(1)], [source(1, ttl=3600)], soon())[0].ok
    assert store.put([name(2)], [source(2)], soon())[0].ok
    path = path_of(store, 1)
    store.close()
    data = source(1, ttl=60, created=time.time() - 120).join()
    path.write_bytes(data)
    again = make(rescan_seconds=1.0)
    until(lambda: again.figures().expirations == 1)
    assert not path.exists()
    assert load(again, 2) == content(2)


def test_the_stores_own_time_to_live(make: Make) -> None:
    store = make(ttl=0.1, rescan_seconds=1.0)
    put_large(store, 1)
    until(lambda: there(store, 1) == [])


# ---- several engines ------------------------------------------------------------------------------------------------


def test_what_another_engine_stores_is_found_at_once_and_learned(make: Make) -> None:
    one, other = make(rescan_seconds=1.0), make(rescan_seconds=1.0)
    for number in (1, 2):
        assert put(one, number).ok
    assert [each.size for each in other.exists([name(1)], soon())] == [size_of(1) + HEADER_BYTES]
    assert load(other, 1) == content(1)
    until(lambda: other.figures().objects == 2)
    one.delete([name(1)], soon())
    assert load(other, 1) is None
    assert put(one, 3).ok
    one.delete([name(2)], soon())
    until(lambda: not other.exists([name(2)], soon())[0].ok)
    until(lambda: other.figures().objects == 1)
    one.check()
    other.check()


def test_engines_evict_each_others_objects(make: Make) -> None:
    one, other = make(max_bytes=2 * MIB), make(max_bytes=2 * MIB)
    put_large(one, *range(7))
    assert put_large(other, *range(10, 17)) == [Status.STORED] * 7
    assert used(one.settings.directory) <= 2 * MIB
    assert there(other, *range(10, 17)) == list(range(10, 17))
    assert there(one, *range(7)) == []


def test_an_object_stays_readable_while_another_engine_evicts_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make(), make()
    put_large(one, 1)
    reading, evicted = threading.Event(), threading.Event()
    real = disk_io.read_object

    def slow(*given: Any) -> int:
        reading.set()
        assert evicted.wait(10)
        return real(*given)

    monkeypatch.setattr("worker_connector.tiers.disk.read_object", slow)
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(there(one, 1)))
    reader.start()
    assert reading.wait(10)
    assert other.delete([name(1)], soon())[0].ok
    evicted.set()
    reader.join(10)
    assert found == [[1]]


@pytest.mark.slow
def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    root, bound = tmp_path / "shared", 3 * MIB
    command = [sys.executable, "-m", "tests.worker_connector.tiers.disk_objects"]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ended(command)) for _ in range(2)]
        store = DiskStore(DiskSettings(directory=root, max_bytes=bound, rescan_seconds=1.0))
        stack.callback(store.close)
        for number, writer in enumerate(writers):
            order = {"root": str(root), "max_bytes": bound, "first": 0, "seconds": 3 + number / 2}
            print(json.dumps(order), file=writer.stdin, flush=True)
        until(lambda: store.figures().objects > 5, 60)
        end, loaded, most = soon(3), 0, 0
        while time.monotonic() < end:
            with store._space.account.hold(soon()) as held:
                found = used(root)
                assert held.total <= bound
                assert found <= bound, "the bound was exceeded"
                most = max(most, found)
            there_now = [parse_name(path.name) for path in root.glob(f"*/*{SUFFIX}")]
            numbers = [n for n in range(3000) if n % 100 == 0 or (there_now and n < 600)]
            for number in random.sample(numbers, 20):
                got = load(store, number)
                assert got is None or got == content(number)
                loaded += got is not None
        for writer in writers:
            assert writer.stdout
            assert len(json.loads(writer.stdout.readline())) > 20
        assert most > bound * 2 // 3
        assert loaded > 5
        assert used(root) <= bound
        store.check()


@contextlib.contextmanager
def ended(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A program of this checkout with pipes, which is gone with the block, and its pipes too."""
    where = Path(__file__).parents[3]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=where)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_the_lock_is_waited_for_until_the_deadline(make: Make) -> None:
    store = make()
    put_large(store, 1)
    fd = os.open(store.settings.directory / "account", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    began = time.monotonic()
    (outcome,) = store.put([name(2)], [large(2)], soon(0.3))
    assert time.monotonic() - began < 5
    assert (outcome.status, outcome.cause) in {(Status.FAILED, "busy"), (Status.FAILED, "timeout")}
    assert there(store, 1) == [1], "readers need no lock"
    os.close(fd)
    assert put_large(store, 2) == [Status.STORED]


# ---- the account ----------------------------------------------------------------------------------------------------


def test_the_account_survives_being_lost_and_damaged(make: Make) -> None:
    store = make()
    put_large(store, 1, 2, 3)
    path = store.settings.directory / "account"
    right = account_of(store)
    path.unlink()
    assert account_of(store) == right
    for data in (b"", b"\xff" * 5000, b"WRDISK1\n" + b"\xff" * 2072):
        path.write_bytes(data)
        with store._space.account.hold(soon()) as held:
            held.mark(0)
        assert account_of(store) == right


def test_what_was_left_unfinished_is_counted_again(make: Make) -> None:
    store = make()
    put_large(store, 1, 2, 3)
    right = account_of(store)
    area = key(2).chunk[0]
    with contextlib.suppress(ZeroDivisionError), store._space.account.hold(soon()) as held:
        held.mark(area)
        held.add(area, 12_345_678)
        _ = 1 / 0
    path_of(store, 2).unlink()
    assert account_of(store) == right - MIB // 4


def test_a_forked_child_leaves_the_lock_with_its_parent(tmp_path: Path) -> None:
    files = Files(tmp_path)
    account = Account(files, lambda _: 0)
    with account.hold(soon()):
        child = os.fork() if threading.active_count() == 1 else 0
        if child == 0 and threading.active_count() == 1:
            os._exit(0)
        if child:
            os.waitpid(child, 0)
        other = Account(files, lambda _: 0)
        with pytest.raises(LockBusy), other.hold(soon(0.05)):
            pass
    with other.hold(soon(1)) as held:
        assert held.total == 0
        assert [held[area] for area in range(AREAS)] == [0] * AREAS


# ---- failing disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 3 MiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mounted)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("making a small filesystem needs the right to mount")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_full_disk_is_read_and_written_again_when_there_is_room(
    make: Make, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(small_disk / "cache", max_bytes=64 * MIB, rescan_seconds=2.0)
    guarded = Guarded(store)
    assert put_large(store, 1, 2) == [Status.STORED] * 2
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
        file.write(bytes(4 * MIB))
    for number in range(10, 30):
        (outcome,) = guarded.put([name(number)], [large(number)], soon())
        assert (outcome.status, outcome.cause) == (Status.REFUSED, "full")
    assert there(store, 1, 2) == [1, 2]
    assert store.figures().writing == "full"
    assert not list(small_disk.glob("cache/*/.*.tmp"))
    filler.unlink()
    until(lambda: store.figures().writing == "")
    assert guarded.put([name(50)], [large(50)], soon())[0].ok
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in told if "No space left on device" in text] == told[:1]
    assert [text for text in told if "takes objects again" in text] == told[1:]
    store.check()
    guarded.close()


def test_a_read_only_disk_is_read(make: Make, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(small_disk / "cache", max_bytes=64 * MIB, rescan_seconds=2.0)
    put_large(store, 1, 2)
    real = os.open

    def read_only(path: Any, flags: int, *given: Any, **named: Any) -> int:
        return fail_with(errno.EROFS)() if flags & os.O_CREAT else real(path, flags, *given, **named)

    with monkeypatch.context() as patch:  # a filesystem in use cannot be made read-only from outside
        patch.setattr(os, "open", read_only)
        assert put_large(store, 3) == [Status.REFUSED]
        assert store.figures().writing == "read_only"
        assert there(store, 1, 2) == [1, 2]
        store.ping(soon())
    until(lambda: store.figures().writing == "")
    assert put_large(store, 3) == [Status.STORED]
    store.check()


def test_a_disk_that_is_read_only_at_start_is_explained(make: Make, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for directory in (small_disk, small_disk / "cache"):
        with pytest.raises(ConfigurationError, match="Read-only file system"):
            make(directory)


def fail_with(number: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_read_error_turns_the_tier_off_until_it_is_well(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    guarded = Guarded(store, Limits(pauses=Pauses(first=0.05)))
    put_large(store, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(disk_io.os, "preadv", fail_with(errno.EIO))
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                guarded.get([name(1)], [Sink(bytearray(MIB))], soon())
    until(lambda: guarded.state != "open")
    assert there(store, 2) == [2]
    assert guarded.get([name(2)], [Sink(bytearray(MIB))], soon())[0].ok
    assert there(store, 1) == [], "what could not be read is not tried again"
    told = [record.message for record in caplog.records if "Input/output error" in record.message]
    assert len(told) == 1
    guarded.close()


@pytest.mark.parametrize(
    ("number", "status", "cause"),
    [(errno.ENOSPC, "refused", "full"), (errno.EDQUOT, "refused", "quota"), (errno.EFBIG, "refused", "size")],
)
def test_failed_writes_leave_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, status: str, cause: str
) -> None:
    store = make()
    before = account_of(store)
    real = os.pwrite

    def fail(fd: int, data: Any, at: int) -> int:
        return real(fd, data, at) if len(data) < 4096 else fail_with(number)()

    monkeypatch.setattr(disk_io.os, "pwrite", fail)
    (outcome,) = store.put([name(1)], [large(1)], soon())
    assert (outcome.status.value, outcome.cause) == (status, cause)
    assert account_of(store) == before
    assert not list(store.settings.directory.glob("*/*"))


def test_an_account_that_cannot_be_written_costs_no_descriptor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(rescan_seconds=1e6)
    assert put(store, 1).ok
    before = len(list(Path("/proc/self/fd").iterdir()))

    def broken(_held: Held) -> None:
        raise OSError(errno.EIO, "it is broken")

    with monkeypatch.context() as patch:
        patch.setattr(Held, "finish", broken)
        for _ in range(6):
            with pytest.raises(StoreUnavailable):
                put(store, 1)
    assert put(store, 1).ok
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 6


def test_while_the_directory_is_listed_it_is_read_though_others_wait_to_write(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make()
    assert put(before, 1).ok
    go, listing = threading.Event(), Keeper._scan

    def slow(keeper: Keeper) -> None:
        assert go.wait(60)
        listing(keeper)

    monkeypatch.setattr(Keeper, "_scan", slow)
    store = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=64 * MIB))
    outcomes: list[Outcome] = []
    numbers = range(2, 10)
    writer = threading.Thread(
        target=lambda: outcomes.extend(store.put([name(n) for n in numbers], [source(n) for n in numbers], soon(60)))
    )
    writer.start()
    time.sleep(0.1)
    try:
        assert load(store, 1) == content(1)
        assert not outcomes
    finally:
        go.set()
        writer.join(60)
        store.close()
    assert len(outcomes) == 8
    assert all(each.ok for each in outcomes)


def test_what_is_read_does_not_wait_for_what_is_written(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, go, real = make(), threading.Event(), disk_io._write
    assert put(store, 1).ok

    def slow(*arguments: Any) -> None:
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(disk_io, "_write", slow)
    outcomes: list[Outcome] = []
    numbers = range(2, 2 + 4 * store.settings.threads)
    writer = threading.Thread(
        target=lambda: outcomes.extend(store.put([name(n) for n in numbers], [source(n) for n in numbers], soon(60)))
    )
    writer.start()
    time.sleep(0.1)
    try:
        assert load(store, 1) == content(1)
        assert store.exists([name(1)], soon())[0].ok
        assert not outcomes
    finally:
        go.set()
        writer.join(60)
    assert all(each.ok for each in outcomes)


def test_closing_ends_the_wait_for_a_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper, "_scan", lambda keeper: keeper._stop.wait(60))
    store = DiskStore(DiskSettings(directory=tmp_path / "cache", max_bytes=64 * MIB))
    causes: list[str] = []

    def write() -> None:
        try:
            put(store, 1, 60.0)
        except StoreUnavailable as error:
            causes.append(error.cause)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)
    store.close()
    writer.join(30)
    assert causes == ["closed"]


def test_a_write_error_is_the_stores(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    with monkeypatch.context() as patch:
        patch.setattr(disk_io.os, "pwrite", fail_with(errno.EIO))
        with pytest.raises(StoreUnavailable, match="Input/output error") as raised:
            store.put([name(1)], [large(1)], soon())
    assert raised.value.cause == "io"
    assert put_large(store, 1) == [Status.STORED]


def test_a_disk_that_hangs_holds_nobody_and_no_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, wake = make(), threading.Event()
    put_large(store, 1)
    reals = {name: getattr(os, name) for name in ("preadv", "pwrite")}

    def hang(call: str) -> Callable[..., int]:
        def hanging(*given: Any) -> int:
            if len(given) > 1 and threading.current_thread().name.endswith("-io"):
                wake.wait(20)
            return int(reals[call](*given))

        return hanging

    for call in reals:
        monkeypatch.setattr(disk_io.os, call, hang(call))
    room, data = bytearray(MIB), bytearray(b"x" * MIB)
    began = time.monotonic()
    assert store.get([name(1)], [Sink(room)], soon(0.2))[0].cause == "timeout"
    for _ in range(2):
        assert store.put([name(2)], [Source(data)], soon(0.2))[0].cause in {"timeout", "busy"}
    assert time.monotonic() - began < 12
    data[:] = b"y" * MIB  # the memory is ours again: what hangs must neither read nor write it
    wake.set()
    until(lambda: not store._crew.hung + store._writers.hung)
    assert room == bytes(MIB)
    assert store.get([name(2)], [Sink(bytearray(2 * MIB))], soon())[0].status is Status.MISSING
    assert there(store, 1) == [1]
    until(lambda: not list(store.settings.directory.glob("*/.*.tmp")))


def test_a_gate_opens_in_longer_and_longer_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("worker_connector.tiers.disk_gate.time.monotonic", lambda: now[0])
    gate = Gate()
    assert gate.is_open
    assert not gate.judge(OSError(errno.EIO, "bad"), 1)
    assert gate.judge(OSError(errno.ENOSPC, "full"), 1)
    pauses = []
    for _ in range(9):
        assert not gate.is_due
        began = now[0]
        while not gate.is_due:
            now[0] += 0.25
        pauses.append(now[0] - began)
        gate.still_shut()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    gate.open()
    assert gate.judge(OSError(errno.EROFS, "read only"), 1)
    now[0] += 59
    assert not gate.is_due, "one that soon shuts again goes on where it was"
    now[0] += 1
    assert gate.is_due
    gate.open()
    now[0] += 61
    gate.judge(OSError(errno.EDQUOT, "quota"), 1)
    now[0] += 1
    assert gate.is_due


# ---- settings -------------------------------------------------------------------------------------------------------


def test_directories_that_cannot_be_used_are_explained(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory, text in [
        (tmp_path / "missing" / "cache", "does not exist: mount or make it"),
        (tmp_path / "file", "is no directory"),
        (Path("/dev/null"), "is no directory"),
        (Path("/sys"), "cannot be written to"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            make(directory)


def test_impossible_settings_are_explained(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="is none of lru, lfu"):
        make(policy="random")
    with pytest.raises(ConfigurationError, match="too small"):
        make(max_bytes=1000)


# ---- the index ------------------------------------------------------------------------------------------------------


def unit_of(number: int) -> bytes:
    return key(number).identity + key(number).chunk


@pytest.mark.parametrize("policy", POLICIES)
def test_bookkeeping_per_object(policy: str) -> None:
    """Over turnovers, with uses: what is remembered of the past counts too."""
    capacity, rng = 1500, random.Random(1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = Index(POLICIES[policy]())
        for number in range(4 * capacity):
            while len(index) >= capacity:
                victim = index.victim()
                assert victim
                index.forget(victim)
            index.add(unit_of(number), "0of1-1", 300_000, 1e9 + number)
            index.touch([unit_of(rng.randrange(max(0, number - capacity), number + 1)) for _ in range(2)])
            index.take_gone()  # as an engine does in every step
        cost = (tracemalloc.get_traced_memory()[0] - before) / capacity
    finally:
        tracemalloc.stop()
    index.check()
    print(f"{policy}: {cost:.0f} bytes per object")
    assert len(index) == capacity
    assert cost <= 500


def test_the_index_against_a_plain_table() -> None:
    rng, index, table = random.Random(5), Index(POLICIES["lru"]()), {}  # type: ignore[var-annotated]
    for _ in range(5000):
        unit, part = unit_of(rng.randrange(40)), f"{rng.randrange(2)}of2-1"
        match rng.randrange(6):
            case 0 | 1:
                size = 4096 * rng.randrange(1, 9)
                expires = rng.choice([float("inf"), rng.uniform(0, 100)])
                index.add(unit, part, size, expires)
                table[unit, part] = size, expires
            case 2:
                index.remove(unit, part)
                table.pop((unit, part), None)
            case 3:
                index.forget(unit)
                table = {each: size for each, size in table.items() if each[0] != unit}
            case 4:
                index.pin(unit, pin=rng.random() < 0.5)
            case _:
                index.touch([unit])
        index.check()
        assert index.objects == len(table)
        assert index.used == sum(size for size, _ in table.values())
        assert index.holds(unit, part) == ((unit, part) in table)
        victim = index.victim()
        assert victim is None or index.parts(victim)
        assert set(index.due(unit[16], 50.0)) == {
            each for each, (_, expires) in table.items() if each[0][16] == unit[16] and -(-expires // 1) <= 50
        }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w1-",
        "a.object",
        name(1),
        name(1).upper() + SUFFIX,
        name(1).replace("0of1", "1of1") + SUFFIX,
        name(1) + ".tmp",
    ],
)
def test_other_names_are_foreign(text: str) -> None:
    assert parse_name(text) is None


def test_the_name_tells_the_key() -> None:
    assert parse_name(name(7, 3, 4) + SUFFIX) == (unit_of(7), "3of4-1")
    assert QUARANTINE == 256
