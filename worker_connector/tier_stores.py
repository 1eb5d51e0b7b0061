"""The lower tiers that the settings ask for: their stores, for either half, and how each is used."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker_connector.chunk_object import HEADER_BYTES, Codec, read_header, unpack
from worker_connector.compression import Compression, require
from worker_connector.config import ConnectorConfig
from worker_connector.errors import BadObject, ConfigurationError, UnsupportedCache
from worker_connector.kv_geometry import describe_slot
from worker_connector.lower import WRITE_SECONDS, TierRules
from worker_connector.native_types import Encoding
from worker_connector.regions import SlotLayout
from worker_connector.slot_codec import SlotCodec
from worker_connector.tier_movers import Shape, Tier
from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskSettings, DiskStore
from worker_connector.tiers.disk_files import charge
from worker_connector.tiers.guarded import Guarded, Limits

DISK = "disk"
REMOTE = "remote"

_log = logging.getLogger("vllm.warmroute.tiers")


def rules_of(config: ConnectorConfig) -> list[TierRules]:
    """How the lower tiers are used, the fastest first."""
    timeouts, codecs = {DISK: config.disk_timeout, REMOTE: config.remote_timeout}, codecs_of(config)
    return [
        TierRules(
            name=name,
            deadline=timeouts[name],
            writes="back" if config.write_policy == "back" else "through",
            second_touch=config.write_admission == "second-touch",
            most=2_000_000 if name == DISK else 200_000,
            listed=name == DISK or config.cache_warmup,
            lossy=not codecs[name].is_lossless,
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
    """What a rank writes to each of its stores, and how, and what it reads from them."""
    codecs = codecs_of(config)
    return {
        name: Tier(
            store=store,
            codec=codecs[name],
            takes_lossy=config.accept_lossy or not codecs[name].is_lossless,
            ttl=config.ttl,
        )
        for name, store in stores.items()
    }


def codecs_of(config: ConnectorConfig) -> dict[str, Codec]:
    """How chunks are kept in each lower tier."""
    return {DISK: Codec.parse(config.disk_codec), REMOTE: Codec.parse(config.remote_codec)}


def slot_codec_of(
    config: ConnectorConfig, cache: Any, layout: SlotLayout, *, cache_dtype: str, kv_caches: Mapping[str, Any]
) -> SlotCodec | None:
    """The encodings that suit an engine, None where the inside of its pages cannot be described. ``cache_dtype`` is its
    setting, ``kv_caches`` are its tensors, whose first axis tells into how many blocks each block is divided.

    Raises:
        ConfigurationError: a tier is to be kept in an encoding that does not suit, or needs a package that is missing.
    """
    for name in names_of(config):
        require(codecs_of(config)[name].compression)
    splits = _splits(cache, kv_caches)
    on_processor = all(tensor.device.type == "cpu" for tensor in kv_caches.values())
    try:
        geometry = describe_slot(cache, layout, cache_dtype=cache_dtype, on_processor=on_processor, splits=splits)
    except UnsupportedCache as reason:
        for name in names_of(config):
            if (codec := codecs_of(config)[name]).encoding is not Encoding.RAW:
                raise ConfigurationError(
                    f"{name}_codec is {codec}, but this engine's KV cache cannot be encoded: {reason}. Set {name}_codec "
                    "to raw, zstd or lz4, which always suit"
                ) from reason
        return None
    made = SlotCodec(geometry)
    for name in names_of(config):
        made.check(codecs_of(config)[name].encoding, f"{name}_codec")
    return made


def divided(shape: Shape, cache: Any, kv_caches: Mapping[str, Any]) -> Shape:
    """With the division of blocks in the layout's name. Which backend an engine has, and so into how many blocks it divides
    one, only its workers learn; what another division wrote is not read."""
    most = max(_splits(cache, kv_caches).values(), default=1)
    return shape._replace(layout=f"{shape.layout[:12]}/{most}") if most > 1 else shape


def _splits(cache: Any, kv_caches: Mapping[str, Any]) -> dict[str, int]:
    """Into how many blocks the attention backend divides one, by layer."""
    return {name: tensor.shape[0] // cache.num_blocks for name, tensor in kv_caches.items() if tensor.dim() == 4}


def announce(config: ConnectorConfig) -> None:
    """Say which tiers keep chunks that are no exact copies."""
    for name in names_of(config):
        codec = codecs_of(config)[name]
        if not codec.is_lossless:
            _log.warning(
                "Tier %s keeps chunks as %s, which is lossy: answers that use them are approximate, and so is what is "
                "computed on top of them, which no tier with a lossless codec gets",
                name,
                codec,
            )
        elif config.accept_lossy:
            _log.warning("Lossy chunks that others left in tier %s are accepted: answers may be approximate", name)


def is_sound(key: str, content: memoryview) -> bool:
    """Whether an object is undamaged and the one of its name, before a copy of it is made elsewhere."""
    try:
        header = read_header(content)
        unpack(header, content[HEADER_BYTES:])
    except BadObject:
        return False
    return str(header.key) == key
