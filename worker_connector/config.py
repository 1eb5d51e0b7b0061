"""The connector's settings, from wherever the user keeps them.

Sources, strongest first: ``kv_connector_extra_config``, environment (``WARMROUTE_*``, then ``LMCACHE_*``), YAML file
(``WARMROUTE_CONFIG_FILE``, then ``LMCACHE_CONFIG_FILE``), defaults. Settings may be flat (``cpu_bytes``) or grouped
(``cpu: {bytes: 20GiB}``). Names written for LMCache and for vLLM's own offloading are read too, each with one log line
that names the spelling used here. A name that is not known, or that asks for something this build does not have, is an
error: nothing is ignored in silence.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from worker_connector.config_names import ABSENT, ALIASES, DEFAULT_CPU_RATIO, SECTIONS, UNNEEDED, asks
from worker_connector.config_values import (
    boolean,
    choice,
    codec,
    copy_threads,
    fraction,
    generation,
    non_negative,
    numa_node,
    optional_text,
    port,
    positive,
    seconds,
    share,
    short_seconds,
    size,
    text,
    urls,
    warmup,
)
from worker_connector.errors import ConfigurationError
from worker_connector.eviction import POLICIES

STAGING_BYTES = 256 << 20
"""What lower tiers pass through where there is no CPU tier of its own, over all ranks."""

STAGING_CHUNKS = 16
"""As many chunks as that have room in it, even if they take more."""

DEFAULT_DISK_PATH = "~/.cache/warmroute/chunks"
"""Where the disk tier is that is switched on without a place."""

_SECRET = frozenset({"remote_url", "report_token"})
_PREFIXES = ("warmroute.", "lmcache.")
_NEAR_MISS = 0.85
_LMCACHE_PROCESS_NAMES = frozenset({"config_file"})

# A child of vLLM's logger, so that its handlers and level apply inside an engine.
_log = logging.getLogger("vllm.warmroute.config")


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Every setting, checked. Sizes are bytes, durations are seconds.

    Exactly one of ``cpu_bytes`` and ``cpu_ratio`` is set: the CPU tier's size per engine, over all its ranks, in bytes
    or as a share of the bytes of its GPU KV cache. ``numa_node`` is None where the node is to be found out, -1 for any.
    """

    chunk_size: int = 256
    enable_prefix_cache: bool = True
    enable_cpu: bool = True
    cpu_bytes: int | None = 4 << 30
    cpu_ratio: float | None = None
    huge_pages: bool = False
    numa_node: int | None = None
    copy_threads: int = 1
    async_write: bool = True
    verify: bool = False
    shadow_check: float = 0.0
    eviction_policy: str = "lru"
    min_load_tokens: int = 0
    load_or_compute: bool = True
    enable_disk: bool = False
    disk_path: str = ""
    disk_bytes: int = 20 << 30
    disk_eviction_policy: str = "lru"
    disk_codec: str = "raw"
    disk_timeout: float = 2.0
    disk_fsync: bool = False
    enable_remote: bool = False
    remote_url: str = field(default="", repr=False)
    replicas: int = 1
    remote_codec: str = "raw"
    remote_timeout: float = 2.0
    accept_lossy: bool = False
    lookup_timeout: float = 0.2
    write_policy: str = "through"
    write_admission: str = "always"
    ttl: int = 0
    cache_warmup: bool = False
    enable_vision_cache: bool = False
    vision_cache_bytes: int = 1 << 30
    conversation_mode: bool = False
    conversation_seconds: float = 600.0
    lower_tier_patience: float = 5.0
    model_name: str = ""
    weights_id: str = ""
    weights_generation: str = ""
    report_host: str = "127.0.0.1"
    report_port: int = 5571
    report_port_is_default: bool = True
    report_token: str = field(default="", repr=False)
    report_heartbeat_seconds: float = 1.0
    report_digest_seconds: float = 5.0
    report_queue_bytes: int = 64 << 20
    report_max_readers: int = 64

    @classmethod
    def resolve(cls, extra: Mapping[str, Any], environ: Mapping[str, str], *, tell: bool = True) -> Self:
        """The settings that hold, from ``kv_connector_extra_config`` and the environment. ``tell``: log how names are read,
        which one process of an engine does for all.

        Raises:
            ConfigurationError: a name is unknown, a value is impossible, or a file cannot be read.
        """
        with _telling(tell):
            layers = [_read_layer(source, raw) for source, raw in _sources(extra, environ)]
        values: dict[str, Any] = {}
        for layer in layers:
            if layer.keys() & {"cpu_bytes", "cpu_ratio"}:
                values.pop("cpu_bytes", None)
                values.pop("cpu_ratio", None)
            values |= layer
        if values.pop("local_device", None) and not values.keys() & {"cpu_bytes", "cpu_ratio"}:
            values["cpu_ratio"] = DEFAULT_CPU_RATIO
        if values.get("cpu_ratio") is not None:
            values["cpu_bytes"] = None
        return cls(**_completed(values), report_port_is_default="report_port" not in values)

    @property
    def has_lower_tiers(self) -> bool:
        """Whether there is a tier below the CPU tier."""
        return self.enable_disk or self.enable_remote

    def cpu_budget(self, gpu_bytes: int) -> int:
        """Bytes of the CPU tier over all ranks, for an engine whose GPU KV cache has ``gpu_bytes``; 0 without one. What
        lower tiers have passes through it, so with one of them it is never without any."""
        if not self.enable_cpu:
            return STAGING_BYTES if self.has_lower_tiers else 0
        return self.cpu_bytes if self.cpu_bytes is not None else int(gpu_bytes * (self.cpu_ratio or 0.0))


@contextmanager
def _telling(tell: bool) -> Iterator[None]:
    level = _log.level
    try:
        if not tell:
            _log.setLevel(logging.ERROR)
        yield
    finally:
        _log.setLevel(level)


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """With the tiers on that a path or a URL asks for.

    Raises:
        ConfigurationError: the remote tier is on and names no store.
    """
    if values.setdefault("enable_disk", bool(values.get("disk_path"))) and not values.get("disk_path"):
        values["disk_path"] = DEFAULT_DISK_PATH
    if values.setdefault("enable_remote", bool(values.get("remote_url"))) and not values.get("remote_url"):
        raise ConfigurationError("the remote tier is on, but names no store: set remote_url")
    return values


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "chunk_size": positive,
    "enable_prefix_cache": boolean,
    "enable_cpu": boolean,
    "cpu_bytes": size,
    "cpu_ratio": fraction,
    "huge_pages": boolean,
    "numa_node": numa_node,
    "copy_threads": copy_threads,
    "async_write": boolean,
    "verify": boolean,
    "shadow_check": share,
    "eviction_policy": choice(*POLICIES),
    "min_load_tokens": non_negative,
    "load_or_compute": boolean,
    "enable_disk": boolean,
    "disk_path": optional_text,
    "disk_bytes": size,
    "disk_eviction_policy": choice(*POLICIES),
    "disk_codec": codec,
    "disk_timeout": seconds,
    "disk_fsync": boolean,
    "enable_remote": boolean,
    "remote_url": urls,
    "replicas": positive,
    "remote_codec": codec,
    "remote_timeout": seconds,
    "accept_lossy": boolean,
    "lookup_timeout": short_seconds,
    "write_policy": choice("through", "back"),
    "write_admission": choice("always", "second-touch"),
    "ttl": non_negative,
    "cache_warmup": warmup,
    "enable_vision_cache": boolean,
    "vision_cache_bytes": size,
    "conversation_mode": boolean,
    "conversation_seconds": seconds,
    "lower_tier_patience": seconds,
    "model_name": text,
    "weights_id": text,
    "weights_generation": generation,
    "report_host": text,
    "report_port": port,
    "report_token": optional_text,
    "report_heartbeat_seconds": seconds,
    "report_digest_seconds": seconds,
    "report_queue_bytes": size,
    "report_max_readers": positive,
}
SETTINGS = tuple(_PARSERS)
"""Every setting's native name."""

_PARSERS["local_device"] = choice("cpu")  # not a setting of its own: asks for a CPU tier of the usual share


def _sources(extra: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Weakest first."""
    for variable in ("LMCACHE_CONFIG_FILE", "WARMROUTE_CONFIG_FILE"):
        if path := environ.get(variable):
            if variable.startswith("LMCACHE_"):
                _log.info("%s is read as WARMROUTE_CONFIG_FILE", variable)
            yield f"{variable} {path}", _read_file(variable, path)
    yield "environment", dict(_lmcache_environment(environ))
    yield "environment", dict(_own_environment(environ))
    yield "kv_connector_extra_config", extra


def _read_file(variable: str, path: str) -> Mapping[str, Any]:
    import yaml  # noqa: PLC0415 - present wherever vLLM is, and needed only with a file

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{variable} names {path}, which cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{variable} names {path}, which is no YAML: {_yaml_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{variable} names {path}, which must hold a mapping of settings to values")
    return content


def _yaml_fault(error: Exception) -> str:
    """What is wrong and where, without the line itself, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{place}"


def _lmcache_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for variable in sorted(environ):
        name = variable.removeprefix("LMCACHE_").lower()
        if not variable.startswith("LMCACHE_") or name in _LMCACHE_PROCESS_NAMES:
            continue
        if _is_known(name):
            if name in SETTINGS:
                _log.info("%s is read as WARMROUTE_%s", variable, name.upper())
            yield name, environ[variable]
        elif nearest := difflib.get_close_matches(name, (*SETTINGS, *ALIASES), 1, _NEAR_MISS):
            raise ConfigurationError(f"{variable} is no setting: did you mean LMCACHE_{nearest[0].upper()}?")
        else:
            _log.warning("%s has no meaning here and is not used", variable)


def _own_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for variable in sorted(environ):
        name = variable.removeprefix("WARMROUTE_").lower()
        if not variable.startswith("WARMROUTE_"):
            continue
        if _is_known(name):
            yield name, environ[variable]
        elif nearest := difflib.get_close_matches(name, SETTINGS, 1, _NEAR_MISS):
            # The router reads WARMROUTE_* too, so only a near miss can be told for a mistake.
            raise ConfigurationError(f"{variable} is no setting: did you mean WARMROUTE_{nearest[0].upper()}?")


def _is_known(name: str) -> bool:
    return name in _PARSERS or name in ALIASES or name in ABSENT or name in UNNEEDED


def _read_layer(source: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in _flatten(source, raw):
        if value is None:
            continue
        if name in UNNEEDED:
            _log.info("%s: %s is not needed: %s", source, name, UNNEEDED[name])
            continue
        if name in ABSENT:
            _refuse_absent(source, name, value)
            continue
        for native, parsed in _parse(source, name, value).items():
            if native in values and values[native] != parsed:
                raise ConfigurationError(f"{source}: {spelled[native]} and {name} both set {native}: keep one of them")
            values[native], spelled[native] = parsed, name
    if {"cpu_bytes", "cpu_ratio"} <= values.keys():
        raise ConfigurationError(
            f"{source}: {spelled['cpu_bytes']} and {spelled['cpu_ratio']} both size the CPU tier: keep one of them"
        )
    return values


def _flatten(source: str, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for given, value in raw.items():
        name = str(given)
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name in SETTINGS and str(given).startswith("lmcache."):
            _log.info("%s: %s is read as %s", source, given, name)
        if name in ("warmroute", "lmcache") and isinstance(value, Mapping):
            yield from _flatten(source, value)
        elif name in SECTIONS and isinstance(value, Mapping):
            yield from _flatten_section(source, name, value)
        elif _is_known(name):
            yield name, value
        elif name in SECTIONS:
            # What stands here may be a URL with a password.
            raise ConfigurationError(
                f"{source}: {name} is a section of {', '.join(SECTIONS[name])}, not a {type(value).__name__}"
            )
        else:
            raise ConfigurationError(f"{source}: {_unknown(name, (*SETTINGS, *ALIASES, *ABSENT, *SECTIONS))}")


def _flatten_section(source: str, section: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    names = SECTIONS[section]
    for key, value in content.items():
        if key not in names:
            raise ConfigurationError(f"{source}: in {section}, {_unknown(str(key), tuple(names))}")
        yield names[key], value


def _unknown(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(name, known, 1, 0.0)
    return f"{name!r} is no setting: did you mean {nearest[0]!r}?"


def _parse(source: str, name: str, value: Any) -> dict[str, Any]:
    try:
        if name not in ALIASES:
            return {name: _PARSERS[name](value)}
        given = ALIASES[name](value)
        parsed = {native: _PARSERS[native](part) for native, part in given.items()}
    except ValueError as error:
        shown = f"a {type(value).__name__}" if name in _SECRET else repr(value)
        raise ConfigurationError(f"{source}: {name} is {shown}, but {error}") from error
    # Values that came through an alias are sizes, switches and names: none is secret.
    for native, part in parsed.items():
        _log.info("%s: %s is read as %s: %s", source, name, native, part)
    return parsed


def _refuse_absent(source: str, name: str, value: Any) -> None:
    absent = ABSENT[name]
    if asks(absent, value):
        raise ConfigurationError(f"{source}: {name} is {value!r}, but {absent.reason}")
