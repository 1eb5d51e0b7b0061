"""What ``warmroute worker`` gives vLLM as ``--ec-transfer-config``: the connector of the vision cache, where that is on."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from router.engine_flags import EngineFlags
from router.errors import ConfigError

CONNECTOR = "WarmrouteECConnector"
FLAG = "--ec-transfer-config"
SETTING = "enable_vision_cache"
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def add_vision_cache(flags: EngineFlags, extra: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """vLLM's flags for the vision cache, taken out of ``flags`` where they stand; none where it is off, and what stands
    there then is left as it is. ``extra`` is the ``kv_connector_extra_config``.

    Raises:
        ConfigError: another connector has its place.
    """
    if not _is_on(extra, environ):
        return []
    given = flags.take_object(FLAG)
    if given.setdefault("ec_connector", CONNECTOR) != CONNECTOR:
        raise ConfigError(
            f"{FLAG} names {given['ec_connector']}, but {SETTING} needs {CONNECTOR} there, and vLLM takes one alone: "
            f"leave {FLAG} out, or set {SETTING} to false"
        )
    given.setdefault("ec_role", "ec_both")
    return [FLAG, msgspec.json.encode(given).decode()]


def _is_on(extra: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """As the connector will read it: what is no truth value is the connector's to explain."""
    for value in _given(extra, environ):
        if value not in (None, ""):
            return _WORDS.get(str(value).strip().lower(), False)
    return False


def _given(extra: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Any]:
    """Strongest first."""
    yield _of(extra)
    yield environ.get(f"WARMROUTE_{SETTING.upper()}")
    yield environ.get(f"LMCACHE_{SETTING.upper()}")
    yield _of(_file(environ.get("WARMROUTE_CONFIG_FILE")))
    yield _of(_file(environ.get("LMCACHE_CONFIG_FILE")))


def _of(settings: Mapping[str, Any]) -> Any:
    for name in (SETTING, f"warmroute.{SETTING}", f"lmcache.{SETTING}"):
        if name in settings:
            return settings[name]
    for section in ("warmroute", "lmcache"):
        inner = settings.get(section)
        if isinstance(inner, Mapping) and SETTING in inner:
            return inner[SETTING]
    return None


def _file(path: str | None) -> Mapping[str, Any]:
    """The settings of a file. One that cannot be read is explained by the connector."""
    if not path:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}
