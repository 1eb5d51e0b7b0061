import time
from contextlib import suppress
from pathlib import Path

from worker_connector.errors import StoreUnavailable
from worker_connector.tier_figures import RankStores, figures_of, state_of
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.filesystem import DirectorySettings, DirectoryStore
from worker_connector.tiers.guarded import Guarded
from worker_connector.tiers.replicas import Replicas


def test_a_disk_tells_what_it_holds(tmp_path: Path) -> None:
    store = DiskStore(DiskSettings(directory=tmp_path, max_bytes=1 << 20))
    try:
        assert store.wait_scanned(5)
        figures = figures_of(store)
        assert (figures["objects"], figures["scanned"], figures["serving"]) == (0, True, True)
    finally:
        store.close()


class Away(DirectoryStore):
    def ping(self, deadline: float) -> None:
        del deadline
        raise StoreUnavailable(self.name, "unreachable", "nobody is there")


def test_a_group_serves_while_one_of_its_stores_does(tmp_path: Path) -> None:
    away = Guarded(Away(DirectorySettings(path=tmp_path / "a")))
    here = Guarded(DirectoryStore(DirectorySettings(path=tmp_path / "b")))
    group = Replicas([away, here])
    try:
        assert [member["breaker"] for member in figures_of(group)["members"]] == ["closed", "closed"]
        deadline = time.monotonic() + 5
        while away.state == "closed" and time.monotonic() < deadline:
            with suppress(StoreUnavailable):
                away.ping(time.monotonic() + 1)
        figures = figures_of(group)
        assert figures["serving"]
        assert [member["serving"] for member in figures["members"]] == [False, True]
        assert figures["members"][0]["operations"]["ping"]["failed"] >= 1
    finally:
        group.close()


def test_ranks_tell_of_their_stores(tmp_path: Path) -> None:
    now = [0.0]
    ranks = RankStores(lambda: now[0])
    assert (ranks.of("disk"), list(ranks.gauges())) == ([], [])
    disk = DiskStore(DiskSettings(directory=tmp_path / "disk", max_bytes=1 << 20))
    store = Guarded(disk)
    try:
        assert disk.wait_scanned(5)
        first = state_of(store)
        assert first == {
            "serving": True,
            "breaker": "closed",
            "writing": "",
            "objects": 0,
            "bytes": 0,
            "quarantined": 0,
        }
    finally:
        store.close()
    ranks.told({0: {"disk": first}})
    now[0] = 5.0
    ranks.told({1: {"disk": {**first, "serving": False, "breaker": "open", "bytes": 7, "quarantined": 2}}})
    told = ranks.of("disk")
    assert [(each["rank"], each["told_s"], each["serving"]) for each in told] == [(0, 5.0, True), (1, 0.0, False)]
    assert set(ranks.gauges()) == {
        ("failing_ranks", "disk", 1),
        ("store_bytes", "disk", 7),
        ("quarantined_objects", "disk", 2),
    }


def test_a_full_disk_counts_as_failing_and_a_group_tells_of_its_members(tmp_path: Path) -> None:
    ranks = RankStores()
    group = Replicas([Guarded(DirectoryStore(DirectorySettings(path=tmp_path / name))) for name in "ab"])
    try:
        ranks.told({0: {"remote": state_of(group), "disk": {"serving": True, "writing": "it is full"}}})
    finally:
        group.close()
    assert [member["breaker"] for member in ranks.of("remote")[0]["members"]] == ["closed", "closed"]
    assert {(name, tier): value for name, tier, value in ranks.gauges()}["failing_ranks", "disk"] == 1
