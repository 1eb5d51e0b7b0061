"""Names of settings that other systems' users bring along, and what each means here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from worker_connector.config_values import boolean, gibibytes, number

DEFAULT_CPU_RATIO = 0.3
"""What a CPU tier asked for by ``local_device: cpu`` alone takes, as a share of the GPU's KV cache."""


def _renamed(native: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {native: value}


def _cpu_gigabytes(value: Any) -> dict[str, Any]:
    return {"enable_cpu": False} if _is_zero(value) else {"cpu_bytes": gibibytes(value)}


def _local_device(value: Any) -> dict[str, Any]:
    return {"enable_cpu": True, "local_device": value}


def _local_disk(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and ("/" in value or value.startswith("~")):
        return {"disk_path": value}
    try:
        return {"enable_disk": boolean(value)}
    except ValueError:
        raise ValueError('it must be true, false or a path, such as "/mnt/cache" or "./cache"') from None


def _disk_gigabytes(value: Any) -> dict[str, Any]:
    return {"enable_disk": False} if _is_zero(value) else {"disk_bytes": gibibytes(value)}


def _milliseconds(value: Any) -> dict[str, Any]:
    return {"lookup_timeout": number(value, "a number of milliseconds") / 1000}


def _compression(value: Any) -> dict[str, Any]:
    word = str(value or "none").strip().lower()
    codec = "raw" if word in ("none", "false", "null") else word
    return {"disk_codec": codec, "remote_codec": codec}


def _serde(value: Any) -> dict[str, Any]:
    word = str(value or "naive").strip().lower()
    return {"remote_codec": "raw" if word in ("none", "naive", "msgpack") else word}


def _is_zero(value: Any) -> bool:
    """Whether a size asks for a tier that holds nothing, as LMCache's own default for its disk does."""
    return not isinstance(value, bool) and _is_harmless(value, (0,))


ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "local_cpu": _renamed("enable_cpu"),
    "max_local_cpu_size": _cpu_gigabytes,
    "local_cpu_ratio": _renamed("cpu_ratio"),
    "local_device": _local_device,
    "cpu_bytes_to_use": _renamed("cpu_bytes"),
    "cache_policy": _renamed("eviction_policy"),
    "min_retrieve_tokens": _renamed("min_load_tokens"),
    "enable_disk_cache": _renamed("enable_disk"),
    "disk_cache_path": _renamed("disk_path"),
    "local_disk": _local_disk,
    "max_local_disk_size": _disk_gigabytes,
    "enable_remote_cache": _renamed("enable_remote"),
    "remote_serde": _serde,
    "compression": _compression,
    "lookup_timeout_ms": _milliseconds,
    "blocking_timeout_secs": _renamed("remote_timeout"),
    "local_cpu_use_hugepages": _renamed("huge_pages"),
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
        "async_write": "async_write",
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
    "disk": {
        "enabled": "enable_disk",
        "path": "disk_path",
        "bytes": "disk_bytes",
        "eviction_policy": "disk_eviction_policy",
        "codec": "disk_codec",
        "timeout": "disk_timeout",
        "fsync": "disk_fsync",
    },
    "local_disk": {
        "enabled": "enable_disk_cache",
        "path": "disk_cache_path",
        "buffer_size_gb": "max_local_disk_size",
        "max_size_gb": "max_local_disk_size",
    },
    "remote": {
        "enabled": "enable_remote",
        "url": "remote_url",
        "replicas": "replicas",
        "codec": "remote_codec",
        "serde": "remote_serde",
        "timeout": "remote_timeout",
        "lookup_timeout": "lookup_timeout",
    },
}
"""Section of the grouped form -> its keys -> the flat names they stand for."""


class Absent(NamedTuple):
    """A known name for something this build does not have. ``harmless`` are the values that ask for nothing."""

    reason: str
    harmless: tuple[Any, ...] = (False, 0, "", "none", "null")


ABSENT: dict[str, Absent] = {
    "retrieval_mode": Absent("available here: exact", ("exact", "")),
    "save_decode_cache": Absent("generated tokens are always saved: leave it true", (True, 1, "")),
    "save_unfull_chunk": Absent(
        "whole chunks and the last whole blocks of prompts are kept: leave it false, and set conversation_mode for those of answers"
    ),
    "enable_blending": Absent("caches are exact, never blended: leave it false"),
    "enable_p2p": Absent("engines exchange chunks through a shared store: set remote_url"),
    "nixl_backends": Absent(
        "this connector does not speak NIXL: start with warmroute worker, which puts vLLM's NixlConnector beside it, or "
        'give MultiConnector with {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_connector_extra_config": '
        '{"backends": ["UCX"]}} before this one, and set VLLM_KV_CACHE_LAYOUT=LBHNC'
    ),
    "force_skip_save": Absent('an engine that saves nothing has "kv_role": "kv_consumer"'),
    "discard_partial_chunks": Absent(
        "less than a block is never kept: leave it true, and set conversation_mode for the ends of answers",
        (True, 1, ""),
    ),
    "numa_mode": Absent("the node is found out, or named by numa_node", ("auto", "null", "none", "")),
}


_NO_SERVER = "there is no cache server beside the engine"
UNNEEDED: dict[str, str] = {
    "use_layerwise": "chunks are loaded and saved beside the computation",
    "enable_async_loading": "loads never block a step",
    "enable_lazy_memory_allocator": "the CPU tier's memory is taken once",
    "enable_controller": "routers read the report port of each engine",
    "lmcache_instance_id": "engines are told apart by their report ports, and named at routers by --worker-name",
    "lmcache_rpc_port": "only the scheduler looks chunks up",
    "mp.host": _NO_SERVER,
    "mp.port": _NO_SERVER,
    "pre_caching_hash_algorithm": "chunks have hashes that are equal in every process",
    "track_usage": "nothing is sent to anybody",
    "use_experimental": "there is one connector",
}
"""Known name of what needs no setting here, whatever its value -> why not."""


def asks(absent: Absent, value: Any) -> bool:
    """Whether a value of an absent name asks for something."""
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
