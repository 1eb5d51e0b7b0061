"""How a vision cache learns that what it holds is of no use: the engine's weights may be others from now on.

vLLM tells its encoder cache manager and its KV connector, and nobody else. Both live in the scheduler's process, so the
manager is watched, and the KV connector passes on what it hears.
"""

import copy
import weakref
from typing import Any

from worker_connector.stats import Counts

_caches: "weakref.WeakSet[Any]" = weakref.WeakSet()


class Watched:
    """vLLM's configuration of the encoder cache manager, with a manager that says when it is reset."""

    def __init__(self, given: Any, usual: type, scheduler: Any) -> None:
        self._given = given
        self._usual = usual
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, which belong to nobody's scheduler, are what was given."""
        return copy.copy, (self._given,)

    def get_encoder_cache_manager_obj(self) -> type:
        """The class of managers to be made."""
        base: Any = self._given.get_encoder_cache_manager_obj() or self._usual
        scheduler = self._scheduler

        def reset(manager: Any) -> None:
            base.reset(manager)
            scheduler.reset(also_loads=True)

        return type(base.__name__, (base,), {"reset": reset, "__doc__": base.__doc__, "__module__": base.__module__})


def watch(vllm_config: Any, scheduler: Any) -> bool:
    """Empty this cache whenever the engine's encoder cache, or its KV connector, is reset. To be called before vLLM makes
    the manager. False where this vLLM does not let its manager be chosen: then only the KV connector's resets count."""
    scheduler.engine = engine_of(vllm_config)
    _caches.add(scheduler)
    given = getattr(vllm_config, "ec_manager_config", None)
    if given is None:
        return False
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager  # noqa: PLC0415 - only with vLLM

    vllm_config.ec_manager_config = Watched(given, EncoderCacheManager, scheduler)
    return True


def announce(vllm_config: Any) -> None:
    """The engine's KV connector was reset. vLLM's own encoder cache was not, so what it was promised is still loaded."""
    for cache in _caches_of(vllm_config):
        cache.reset(also_loads=False)


def totals(vllm_config: Any) -> Counts:
    """Figures of the engine's vision cache since the start; nothing without one."""
    for cache in _caches_of(vllm_config):
        return dict(cache.totals())
    return {}


def engine_of(vllm_config: Any) -> str:
    """What copies of one engine's configuration have in common."""
    return str(getattr(vllm_config, "instance_id", "") or id(vllm_config))


def _caches_of(vllm_config: Any) -> list[Any]:
    engine = engine_of(vllm_config)
    return [cache for cache in list(_caches) if cache.engine == engine]
