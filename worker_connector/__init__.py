"""The connector: keeps an engine's KV cache in tiers behind its GPU, and reports what is where.

Importing this package imports neither torch nor vLLM; they come with the connector class. The foreign names let a
configuration written for another connector load this one, by ``kv_connector_module_path`` alone.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "get_cache_stats": ("worker_connector.client", "get_cache_stats"),
    "WarmrouteConnector": ("worker_connector.connector", "WarmrouteConnector"),
    "WarmrouteECConnector": ("worker_connector.vision_cache", "WarmrouteECConnector"),
    "OffloadingConnector": ("worker_connector.connector", "WarmrouteConnector"),
    "SimpleCPUOffloadConnector": ("worker_connector.connector", "WarmrouteConnector"),
    "LMCacheConnectorV1": ("worker_connector.connector", "WarmrouteConnector"),
    "LMCacheConnectorV1Dynamic": ("worker_connector.connector", "WarmrouteConnector"),
    "LMCacheMPConnector": ("worker_connector.connector", "WarmrouteConnector"),
}

__all__ = ["LMCacheConnectorV1", "OffloadingConnector", "WarmrouteConnector", "WarmrouteECConnector", "get_cache_stats"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)
