import time
from contextlib import suppress
from pathlib import Path

from worker_connector.errors import StoreUnavailable
from worker_connector.tier_figures import figures_of
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
