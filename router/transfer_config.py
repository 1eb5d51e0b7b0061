"""What ``warmroute worker`` gives vLLM as ``--kv-transfer-config``: the user's own, the connector in it, and what
variables and flags that were written for other caches ask for.

The connector itself reads its settings (``WARMROUTE_*``, ``LMCACHE_*``, files); here is only what it cannot see.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from router.engine_flags import EngineFlags
from router.errors import ConfigError

CONNECTOR = "WarmrouteConnector"
NIXL = "NixlConnector"
MODULE = "worker_connector"
FLAG = "--kv-transfer-config"
STAND_INS = (
    *("LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector"),
    *("OffloadingConnector", "SimpleCPUOffloadConnector"),
)
"""Connectors of other caches, whose place ours takes."""

_OF_THE_WHOLE = (
    *("kv_connector", "kv_connector_module_path", "kv_connector_extra_config"),
    *("engine_id", "kv_load_failure_policy"),
)
SWITCHES = ("ENABLE_LMCACHE", "VLLM_ENABLE_LMCACHE")
BACKENDS = ("native", "lmcache", "warmroute")
_URL_WITH_PASSWORD = re.compile(r"[a-z0-9+.-]+://[^/?#]*:[^/?#]*@")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_SIZES = (
    *("cpu_bytes", "cpu_ratio", "cpu_bytes_to_use", "max_local_cpu_size", "local_cpu_ratio"),
    *("cpu.bytes", "cpu.ratio", "local_cpu.buffer_size_gb", "local_cpu.max_size_gb", "local_cpu.ratio"),
)


@dataclass
class TransferConfig:
    """``whole`` goes to vLLM; ``extra`` is the part of it that holds the connector's settings. ``notes`` say what was
    read as what, ``variables`` is what vLLM needs in its environment where that says nothing."""

    whole: dict[str, Any]
    extra: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    _environ: Mapping[str, str] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """A setting ``section_key`` as the connector will find it in ``extra``, environment or its file; None if it is
        nowhere."""
        section, _, key = name.partition("_")
        grouped = self.extra.get(section)
        inner = grouped.get(key) if isinstance(grouped, Mapping) else None
        for value in (self.extra.get(name), inner, self._environ.get(f"WARMROUTE_{name.upper()}")):
            if value not in (None, ""):
                return value
        return _of_file(self._environ, section, key)


def transfer_config(flags: EngineFlags, settings: Sequence[str], environ: Mapping[str, str]) -> TransferConfig:
    """Takes what it understands out of ``flags``; ``settings`` are ``NAME=VALUE`` of the connector.

    Raises:
        ConfigError: what is asked for contradicts itself, or is not this connector's.
    """
    whole = flags.take_object(FLAG)
    whole.setdefault("kv_connector", CONNECTOR)
    whole.setdefault("kv_role", "kv_both")
    notes: list[str] = []
    config = TransferConfig(whole, _extra(_own_entry(whole, notes)), notes, _environ=environ)
    _set(config.extra, settings, notes)
    _switch(config, environ)
    _offload(config, flags, environ)
    _transfer(config)
    return config


def _own_entry(whole: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The part of the configuration that names our connector."""
    if whole["kv_connector"] != "MultiConnector":
        return _adopted(whole, notes)
    given = _extra(whole).get("connectors")
    entries = given if isinstance(given, list) else []
    for entry in entries:
        if isinstance(entry, dict) and (entry.get("kv_connector") == CONNECTOR or _path(entry) == MODULE):
            # vLLM reads this of the whole alone, and would fail a request whose cache cannot be delivered.
            whole.setdefault("kv_load_failure_policy", "recompute")
            _behind_nixl(entries, entry, notes)
            return entry
    raise ConfigError(
        f"the MultiConnector of {FLAG} does not hold {CONNECTOR}: add "
        f'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both"}} to its connectors, or run vllm serve itself'
    )


def _behind_nixl(entries: list[Any], ours: dict[str, Any], notes: list[str]) -> None:
    """Of several connectors vLLM passes on the first handshake, and NIXL cannot do without its own."""
    nixl = [at for at, entry in enumerate(entries) if isinstance(entry, dict) and _is_nixl(entry.get("kv_connector"))]
    at = next(at for at, entry in enumerate(entries) if entry is ours)
    if nixl and nixl[-1] > at:
        entries.insert(nixl[-1] + 1, ours)
        del entries[at]
        notes.append(f"{FLAG}: {NIXL} goes before {CONNECTOR}, because vLLM passes on the first handshake alone")


def _transfer(config: TransferConfig) -> None:
    """``nixl_backends`` asks for transfers between engines, which vLLM's own connector makes, beside ours."""
    given = config.extra.pop("nixl_backends", None)
    if backends := [name for name in given.split(",") if name] if isinstance(given, str) else list(given or ()):
        _nixl_entry(config).setdefault("backends", backends)
        config.notes.append(f"nixl_backends is read as backends of {NIXL}, beside {CONNECTOR} in a MultiConnector")
    entries = _extra(config.whole).get("connectors") if config.whole["kv_connector"] == "MultiConnector" else None
    if any(_is_nixl(entry.get("kv_connector")) for entry in entries or [] if isinstance(entry, dict)):
        # Each of the two would ask for another layout, and vLLM does not start then.
        config.variables["VLLM_KV_CACHE_LAYOUT"] = "LBHNC"
        config.notes.append(f"VLLM_KV_CACHE_LAYOUT is LBHNC, as {NIXL} asks for, unless you set it")


def _nixl_entry(config: TransferConfig) -> dict[str, Any]:
    """The settings of NIXL's connector, which is put before ours where it is missing."""
    whole = config.whole
    if whole["kv_connector"] != "MultiConnector":
        shared = {name: value for name, value in whole.items() if name not in _OF_THE_WHOLE}
        connectors = [
            {**shared, "kv_connector": NIXL, "kv_connector_extra_config": {}},
            {**shared, "kv_connector": CONNECTOR, "kv_connector_extra_config": config.extra},
        ]
        whole |= {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": connectors}}
        whole.setdefault("kv_load_failure_policy", "recompute")
        whole.pop("kv_connector_module_path", None)
    entries = _extra(whole)["connectors"]
    found = next((each for each in entries if isinstance(each, dict) and _is_nixl(each.get("kv_connector"))), None)
    if found is None:
        entries.insert(0, found := {"kv_connector": NIXL, "kv_role": whole["kv_role"]})
    return _extra(found)


def _is_nixl(name: object) -> bool:
    return isinstance(name, str) and name.startswith("Nixl")


def _adopted(entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    name, path = str(entry["kv_connector"]), _path(entry)
    if path not in ("", MODULE):
        raise ConfigError(
            f"{FLAG} takes its connector from {path}: leave kv_connector_module_path out, or run vllm serve itself"
        )
    if name != CONNECTOR and name not in STAND_INS:
        raise ConfigError(
            f"{FLAG} names {name}: to have both, give MultiConnector with {_both(entry)} as its "
            "kv_connector_extra_config; to have that one alone, run vllm serve itself"
        )
    if name != CONNECTOR:
        entry["kv_connector"] = CONNECTOR
        entry.pop("kv_connector_module_path", None)
        notes.append(f"{FLAG}: {name} is read as {CONNECTOR}")
    return entry


def _both(other: Mapping[str, Any]) -> str:
    """Ours last: it stores what another loads, and leaves the first handshake to it."""
    theirs = {name: other[name] for name in ("kv_connector", "kv_role")}  # without its settings, which may be secret
    return json.dumps({"connectors": [theirs, {"kv_connector": CONNECTOR, "kv_role": "kv_both"}]})


def _path(entry: Mapping[str, Any]) -> str:
    return str(entry.get("kv_connector_module_path") or "")


def _extra(entry: dict[str, Any]) -> dict[str, Any]:
    extra = entry.setdefault("kv_connector_extra_config", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"kv_connector_extra_config is a JSON object, not a {type(extra).__name__}")
    return extra


def _set(extra: dict[str, Any], settings: Sequence[str], notes: list[str]) -> None:
    for each in settings:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE (--set cpu_bytes=64GiB), got {name!r}")
        name = name.strip().replace("-", "_")
        if extra.get(name, value) != value:
            raise ConfigError(f"--set {name} and {FLAG} give different values: keep one of them")
        extra[name] = value
        if name == "report_token" or _URL_WITH_PASSWORD.match(value):
            variable = f"WARMROUTE_{name.upper()}"
            notes.append(
                f"--set {name} can be read in the list of processes: set {variable} in the environment instead"
            )


def _switch(config: TransferConfig, environ: Mapping[str, str]) -> None:
    asked = {name: _boolean(name, environ[name]) for name in SWITCHES if environ.get(name)}
    if len(set(asked.values())) > 1:
        raise ConfigError(f"{' and '.join(SWITCHES)} contradict each other: keep one of them")
    for name, wanted in asked.items():
        if wanted:
            config.notes.append(f"{name} is read as: use {CONNECTOR}")
        elif config.setting("enable_prefix_cache") is None:
            config.extra["enable_prefix_cache"] = False
            config.notes.append(f"{name} is off: read as enable_prefix_cache: false (the GPU tier is still reported)")


def _boolean(name: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ConfigError(f"{name} is {text!r}, but takes one of {', '.join(_TRUE + _FALSE)}")
    return word in _TRUE


def _offload(config: TransferConfig, flags: EngineFlags, environ: Mapping[str, str]) -> None:
    _backend("--kv-offloading-backend", flags.take("--kv-offloading-backend"), config)
    _backend("VLLM_KV_OFFLOADING_BACKEND", environ.get("VLLM_KV_OFFLOADING_BACKEND"), config)
    given = _gibibytes("--kv-offloading-size", flags.take("--kv-offloading-size"))
    if given is not None:
        if named := _sized(config.extra):
            raise ConfigError(f"--kv-offloading-size and {named} both size the CPU tier: keep one of them")
        _size(config, "--kv-offloading-size", given)
    variable = "VLLM_KV_OFFLOADING_SIZE"
    wanted = _gibibytes(variable, environ.get(variable))
    if wanted is None:
        return
    if stronger := _sized(config.extra) or _sized_by(environ):
        config.notes.append(f"{stronger} wins over {variable}")
    else:
        _size(config, variable, wanted)


def _backend(source: str, value: str | None, config: TransferConfig) -> None:
    if not value:
        return
    if value.strip().lower() not in BACKENDS:
        raise ConfigError(
            f"{source} is {value!r}, but takes one of {', '.join(BACKENDS)}; all of them mean {CONNECTOR}"
        )
    config.notes.append(f"{source}: {value} is read as {CONNECTOR}")


def _gibibytes(source: str, text: str | None) -> int | None:
    """In bytes; None where nothing is asked for."""
    if not text:
        return None
    try:
        gibibytes = float(text)
    except ValueError:
        gibibytes = -1.0
    if not 0 <= gibibytes < 1 << 30:
        raise ConfigError(f"{source} is {text!r}, but takes a number of GiB")
    return int(gibibytes * (1 << 30)) or None


def _size(config: TransferConfig, source: str, size: int) -> None:
    config.extra["cpu_bytes"] = size
    config.notes.append(f"{source} is read as cpu_bytes: {size}")


def _sized(extra: Mapping[str, Any]) -> str | None:
    """The setting by which the CPU tier has a size already."""
    for name in _SIZES:
        section, dot, key = name.partition(".")
        inner = extra.get(section)
        for prefix in ("", "warmroute.", "lmcache."):
            if prefix + name in extra or (dot and isinstance(inner, Mapping) and key in inner):
                return prefix + name
    return None


def _sized_by(environ: Mapping[str, str]) -> str | None:
    variables = (f"{prefix}_{name.upper()}" for prefix in ("WARMROUTE", "LMCACHE") for name in _SIZES)
    return next((variable for variable in variables if environ.get(variable)), None)


def _of_file(environ: Mapping[str, str], section: str, key: str) -> Any:
    """From the connector's file. One that cannot be read is explained by the connector."""
    try:
        content = yaml.safe_load(Path(environ["WARMROUTE_CONFIG_FILE"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(content, Mapping):
        return None
    inner = content.get(section)
    return content.get(f"{section}_{key}", inner.get(key) if isinstance(inner, Mapping) else None)
