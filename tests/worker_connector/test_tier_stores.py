import pytest

from worker_connector.config import ConnectorConfig
from worker_connector.tier_stores import DISK, REMOTE, capacity_of, names_of


def make(codec: str = "raw") -> ConnectorConfig:
    return ConnectorConfig(
        enable_disk=True, disk_bytes=10 << 20, disk_codec=codec, enable_remote=True, remote_url="redis://x"
    )


def test_a_disk_has_room_for_whole_chunks_with_their_headers_on_every_rank() -> None:
    assert names_of(make()) == [DISK, REMOTE]
    assert capacity_of(DISK, make(), (1 << 20) - 4096, 1) == 10
    assert capacity_of(DISK, make(), 1 << 20, 1) == 9
    assert capacity_of(DISK, make(), (1 << 20) - 4096, 2) == 5
    assert capacity_of(DISK, make("fp8"), (1 << 20) - 4096, 1) == 10


@pytest.mark.parametrize(
    ("tier", "codec", "nbytes"), [(REMOTE, "raw", 1 << 20), (DISK, "zstd", 1 << 20), (DISK, "raw", 0)]
)
def test_what_cannot_be_known_is_not_claimed(tier: str, codec: str, nbytes: int) -> None:
    assert capacity_of(tier, make(codec), nbytes, 1) == 0
