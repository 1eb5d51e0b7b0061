"""The lower tiers that the settings ask for: their stores, for either half, and how each is used."""

from pathlib import Path

from worker_connector.chunk_object import HEADER_BYTES, Codec, read_header, unpack
from worker_connector.compression import Compression
from worker_connector.config import ConnectorConfig
from worker_connector.errors import BadObject
from worker_connector.lower import WRITE_SECONDS, TierRules
from worker_connector.tier_movers import Tier
from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_files import charge
from worker_connector.tiers.guarded import Guarded, Limits

DISK = "disk"
REMOTE = "remote"


def rules_of(config: ConnectorConfig) -> list[TierRules]:
    """How the lower tiers are used, the fastest first."""
    timeouts = {DISK: config.disk_timeout, REMOTE: config.remote_timeout}
    return [
        TierRules(
            name=name,
            deadline=timeouts[name],
            writes="back" if config.write_policy == "back" else "through",
            second_touch=config.write_admission == "second-touch",
            most=2_000_000 if name == DISK else 200_000,
            listed=name == DISK or config.cache_warmup,
        )
        for name in names_of(config)
    ]


def names_of(config: ConnectorConfig) -> list[str]:
    """The lower tiers that are on, the fastest first."""
    return [name for name, on in ((DISK, config.enable_disk), (REMOTE, config.enable_remote)) if on]


def open_stores(config: ConnectorConfig) -> dict[str, Store]:
    """A store for each lower tier. Every process has its own, and closes it.

    Raises:
        ConfigurationError: a directory or a URL cannot be used.
    """
    stores: dict[str, Store] = {}
    if config.enable_disk:
        stores[DISK] = Guarded(open_disk(config), Limits(timeout=config.disk_timeout, put_timeout=WRITE_SECONDS))
    if config.enable_remote:
        stores[REMOTE] = open_remote(config)
    return stores


def capacity_of(tier: str, config: ConnectorConfig, payload_bytes: int, ranks: int) -> int:
    """How many chunks a lower tier has room for at least, with an object of ``payload_bytes``, uncompressed, on each rank; 0
    where that is not known: of a remote store, and where objects shrink by what cannot be foreseen."""
    if tier != DISK or not payload_bytes or Codec.parse(config.disk_codec).compression is not Compression.NONE:
        return 0
    return config.disk_bytes // (ranks * charge(HEADER_BYTES + payload_bytes))


def open_disk(config: ConnectorConfig) -> DiskStore:
    return DiskStore(
        DiskSettings(
            directory=Path(config.disk_path.removeprefix("file://")).expanduser(),
            max_bytes=config.disk_bytes,
            policy=config.disk_eviction_policy,
            ttl=config.ttl,
            fsync=config.disk_fsync,
        )
    )


def open_remote(config: ConnectorConfig) -> Store:
    from worker_connector.tiers.urls import open_stores as open_urls  # noqa: PLC0415 - its clients load slowly

    limits = Limits(timeout=config.remote_timeout, put_timeout=WRITE_SECONDS)
    return open_urls(config.remote_url, replicas=config.replicas, ttl=config.ttl, limits=limits, verify=is_sound)


def tiers_of(config: ConnectorConfig, stores: dict[str, Store]) -> dict[str, Tier]:
    """What a rank writes to each of its stores, and how."""
    codecs = {DISK: config.disk_codec, REMOTE: config.remote_codec}
    return {name: Tier(store=store, codec=Codec.parse(codecs[name]), ttl=config.ttl) for name, store in stores.items()}


def is_sound(key: str, content: memoryview) -> bool:
    """Whether an object is undamaged and the one of its name, before a copy of it is made elsewhere."""
    try:
        header = read_header(content)
        unpack(header, content[HEADER_BYTES:])
    except BadObject:
        return False
    return str(header.key) == key
