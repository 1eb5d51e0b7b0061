"""What an engine's configuration says about the vision cache."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from worker_connector.config import ConnectorConfig
from worker_connector.errors import ConfigurationError

CONNECTOR = "WarmrouteECConnector"
FLAG = f'--ec-transfer-config \'{{"ec_connector": "{CONNECTOR}", "ec_role": "ec_both"}}\''
"""What switches the vision cache on in vLLM."""

_SETTINGS = ("enable_vision_cache", "vision_cache_bytes")
_PREFIXES = ("", "warmroute.", "lmcache.")

_log = logging.getLogger("vllm.warmroute.vision")


def rank_bytes(vllm_config: Any, environ: Mapping[str, str]) -> int:
    """Bytes of host memory that each rank may take: an equal part of ``vision_cache_bytes``, since each holds every output
    whole. 0 where the cache is off: by ``enable_vision_cache: false``, or because vLLM would never use it.

    Raises:
        ConfigurationError: a setting is impossible, or the role is not ``ec_both``.
    """
    transfer = vllm_config.ec_transfer_config
    if not (transfer.is_ec_producer and transfer.is_ec_consumer):
        raise ConfigurationError(f"{CONNECTOR} keeps what its own engine encodes: its ec_role is ec_both")
    own = dict(transfer.ec_connector_extra_config or {})
    if unknown := sorted(str(name) for name in own if name not in _SETTINGS):
        raise ConfigurationError(
            f"ec_connector_extra_config: {unknown[0]!r} is no setting of the vision cache, which has {' and '.join(_SETTINGS)}"
        )
    config = ConnectorConfig.resolve({"enable_vision_cache": True, **_of_kv_connector(vllm_config), **own}, environ)
    if not config.enable_vision_cache:
        return 0
    if reason := _unusable(vllm_config):
        _log.warning("The vision cache is off: %s", reason)
        return 0
    return config.vision_cache_bytes // ranks_with_encoder(vllm_config)


def ranks_with_encoder(vllm_config: Any) -> int:
    """Of the engine's ranks those that run the vision encoder, which are those of the first pipeline stage."""
    parallel = vllm_config.parallel_config
    return max(1, int(parallel.world_size) // int(parallel.pipeline_parallel_size))


def require_connector(config: ConnectorConfig, vllm_config: Any) -> None:
    """Raise ConfigurationError if the KV connector's settings ask for a vision cache that the engine does not have."""
    if not config.enable_vision_cache:
        return
    transfer = getattr(vllm_config, "ec_transfer_config", None)
    if transfer is None or transfer.ec_connector != CONNECTOR:
        raise ConfigurationError(
            f"enable_vision_cache is on, but vLLM has no connector for it: add {FLAG} (warmroute worker adds it by itself)"
        )


def _unusable(vllm_config: Any) -> str:
    """Why vLLM would keep nothing here, or nothing."""
    if getattr(vllm_config.model_config, "is_encoder_decoder", False):
        return "vLLM's encoder-decoder models do not use encoder caches"
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and not getattr(
        vllm_config, "use_v2_model_runner", False
    ):
        return "with pipeline parallelism this model runner does not pass on what the first stage's ranks keep"
    return ""


def _of_kv_connector(vllm_config: Any) -> dict[str, Any]:
    """The vision cache's settings among those of the engine's KV connectors."""
    found: dict[str, Any] = {}
    for extra in _kv_extras(getattr(vllm_config, "kv_transfer_config", None)):
        for name in _SETTINGS:
            for prefix in _PREFIXES:
                if prefix + name in extra:
                    found[name] = extra[prefix + name]
    return found


def _kv_extras(transfer: Any) -> Iterator[Mapping[str, Any]]:
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config or {}
    yield extra
    entries = extra.get("connectors")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping):
            yield entry.get("kv_connector_extra_config") or {}
