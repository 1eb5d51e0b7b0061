"""Names of settings that other systems' users bring along, and what each means here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from worker_connector.config_values import boolean, gibibytes

DEFAULT_CPU_RATIO = 0.3
"""What a CPU tier asked for by ``local_device: cpu`` alone takes, as a share of the GPU's KV cache."""


def _renamed(native: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {native: value}


def _cpu_gigabytes(value: Any) -> dict[str, Any]:
    return {"cpu_bytes": gibibytes(value)}


def _local_device(value: Any) -> dict[str, Any]:
    return {"enable_cpu": True, "local_device": value}


ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "local_cpu": _renamed("enable_cpu"),
    "max_local_cpu_size": _cpu_gigabytes,
    "local_cpu_ratio": _renamed("cpu_ratio"),
    "local_device": _local_device,
    "cpu_bytes_to_use": _renamed("cpu_bytes"),
    "cache_policy": _renamed("eviction_policy"),
    "min_retrieve_tokens": _renamed("min_load_tokens"),
}
"""Foreign name -> reader that gives native settings."""

SECTIONS: dict[str, dict[str, str]] = {
    "cpu": {
        "enabled": "enable_cpu",
        "bytes": "cpu_bytes",
        "ratio": "cpu_ratio",
        "huge_pages": "huge_pages",
        "numa_node": "numa_node",
        "copy_threads": "copy_threads",
        "verify": "verify",
        "eviction_policy": "eviction_policy",
    },
    "local_cpu": {
        "enabled": "local_cpu",
        "buffer_size_gb": "max_local_cpu_size",
        "max_size_gb": "max_local_cpu_size",
        "ratio": "local_cpu_ratio",
    },
    "report": {
        "host": "report_host",
        "port": "report_port",
        "token": "report_token",
        "heartbeat_seconds": "report_heartbeat_seconds",
        "digest_seconds": "report_digest_seconds",
        "queue_bytes": "report_queue_bytes",
        "max_readers": "report_max_readers",
    },
    "disk": {"enabled": "enable_disk_cache", "path": "disk_cache_path"},
    "local_disk": {
        "enabled": "enable_disk_cache",
        "path": "disk_cache_path",
        "buffer_size_gb": "max_local_disk_size",
        "max_size_gb": "max_local_disk_size",
    },
    "remote": {"enabled": "enable_remote_cache", "url": "remote_url", "serde": "remote_serde"},
}
"""Section of the grouped form -> its keys -> the flat names they stand for."""


class Absent(NamedTuple):
    """A known name for something this build does not have. ``harmless`` are the values that ask for nothing;
    with the switch named by ``unless`` set to false the name asks for nothing either."""

    reason: str
    harmless: tuple[Any, ...] = (False, 0, "", "none", "null")
    unless: str = ""


_TIERS = "tiers available here: gpu, cpu"
_NO_DISK = f"there is no disk tier: {_TIERS}"
_NO_REMOTE = f"there is no remote tier: {_TIERS}"

ABSENT: dict[str, Absent] = {
    "enable_disk_cache": Absent(_NO_DISK),
    "disk_cache_path": Absent(_NO_DISK, unless="enable_disk_cache"),
    "local_disk": Absent(_NO_DISK),
    # LMCache files carry a size without a disk; it is the disk itself that asks.
    "max_local_disk_size": Absent(_NO_DISK, unless="local_disk"),
    "enable_remote_cache": Absent(_NO_REMOTE),
    "remote_url": Absent(_NO_REMOTE, unless="enable_remote_cache"),
    "remote_serde": Absent("available here: naive, msgpack (both raw)", ("none", "", "naive", "msgpack", "raw")),
    "compression": Absent("available here: none"),
    "retrieval_mode": Absent("available here: exact", ("exact", "")),
    "cache_warmup": Absent("caches are not warmed up at start: leave it false"),
    "async_write": Absent("saves are always asynchronous: leave it true", (True, 1, "")),
    "enable_vision_cache": Absent("outputs of vision encoders are not cached: leave it false"),
    "conversation_mode": Absent(
        "a conversation's tail is not kept from eviction (generated tokens are saved anyway): leave it false"
    ),
    "save_decode_cache": Absent("generated tokens are always saved: leave it true", (True, 1, "")),
    "save_unfull_chunk": Absent("only whole chunks are kept: leave it false"),
    "enable_blending": Absent("caches are exact, never blended: leave it false"),
    "enable_p2p": Absent(_NO_REMOTE),
    "ttl": Absent("entries live until they are evicted: leave it 0"),
    "nixl_backends": Absent("transfers between engines are not part of this connector: use vLLM's NixlConnector"),
}


def asks(absent: Absent, value: Any, layer: Mapping[str, Any]) -> bool:
    """Whether a value of an absent name asks for something, given the other names of its source."""
    if absent.unless and not _is_on(layer.get(absent.unless), default=absent.unless != "local_disk"):
        return False
    return not _is_harmless(value, absent.harmless)


def _is_harmless(value: Any, harmless: tuple[Any, ...]) -> bool:
    if isinstance(value, list | dict):
        return not value
    words = {str(each).lower() for each in harmless}
    return str(_plain(value)).lower() in words


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if str(value).lower() in ("no", "off", "yes", "on"):
        return boolean(value)
    return value


def _is_on(value: Any, *, default: bool) -> bool:
    if value is None:
        return default
    return not _is_harmless(value, (False, 0, "", "none", "null"))
