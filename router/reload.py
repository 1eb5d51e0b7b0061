"""Settings that change while the gateway runs.

A change, from the watched file or through the admin API, is checked as a whole before anything happens: it must be
valid, and touch only settings that can be changed. Then everything is applied between two awaits. A refused change
leaves all as it was, and is said in the log, in a metric and at ``/admin/config``.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from router.config import CONFIG_VARIABLE, ENV_PREFIX, Settings, load
from router.errors import ConfigError

RELOADABLE = frozenset(
    {
        "access_log",
        "breaker_failures",
        "breaker_seconds",
        "compute_weight",
        "connect_timeout",
        "discover",
        "discovery_interval",
        "discovery_timeout",
        "drain_handover",
        "drain_timeout",
        "first_byte_timeout",
        "forward_token_ids",
        "health_interval",
        "health_timeout",
        "idle_timeout",
        "kubernetes_namespace",
        "kubernetes_port",
        "kubernetes_ranks",
        "kubernetes_report_port",
        "kubernetes_scheme",
        "kubernetes_selector",
        "kubernetes_watch_seconds",
        "log_level",
        "max_bodies_bytes",
        "max_body_bytes",
        "max_headers",
        "max_in_flight",
        "max_queue",
        "models_interval",
        "pass_through",
        "policy",
        "policy_header",
        "queue_timeout",
        "response_headers",
        "retries",
        "retry_backoff",
        "retry_ratio",
        "saturation_seconds",
        "saturation_tokens",
        "session_header",
        "shadow_policy",
        "workers",
    }
)
"""Every other setting is read at the start only."""

Signature = tuple[int, int, int] | None

_log = logging.getLogger(__name__)


class Sources:
    """Where settings come from, so that they can be read again: flags, environment, file; overrides win over all."""

    def __init__(
        self, flags: Mapping[str, Any], environ: Mapping[str, str] | None = None, file: str | None = None
    ) -> None:
        self.flags = dict(flags)
        self.environ = dict(os.environ if environ is None else environ)
        self.file = file or self.environ.get(CONFIG_VARIABLE) or ""
        self.signature = signature_of(self.file)

    @classmethod
    def of(cls, settings: Settings) -> "Sources":
        """Settings that were made in the program."""
        return cls({name: getattr(settings, name) for name in settings.model_fields_set}, {})

    def load(self, overrides: Mapping[str, Any] | None = None) -> Settings:
        """Raises:
        ConfigError: as ``config.load``.
        """
        return load({**self.flags, **(overrides or {})}, self.environ, self.file or None)

    def origin(self, name: str, overrides: Mapping[str, Any], settings: Settings) -> str:
        """Who has said a setting: ``admin``, ``flag``, ``environment``, ``file``; ``default`` for nobody."""
        if name in overrides:
            return "admin"
        if name in self.flags:
            return "flag"
        if any(key.upper() == (ENV_PREFIX + name).upper() for key in self.environ):
            return "environment"
        return "file" if self.file and name in settings.model_fields_set else "default"


def signature_of(path: str) -> Signature:
    """What changes when a file does: inode, modification time, size; None where there is none. Links are followed,
    so a directory swapped behind a link, as Kubernetes does with a ConfigMap, counts."""
    try:
        stat = Path(path).stat() if path else None
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else None


class Reloader:
    """The settings in force, and what became of the last changes."""

    def __init__(self, settings: Settings, sources: Sources, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        self.overrides: dict[str, Any] = {}
        self.applied = 0
        self.refused = 0
        self.error = ""
        self.changed_at = time.time()
        self.sources = sources
        self._apply = apply
        self._seen: Signature = sources.signature

    def check(self, overrides: Mapping[str, Any]) -> Settings:
        """The settings that ``overrides`` would make.

        Raises:
            ConfigError: they would be refused.
        """
        wanted = self.sources.load(overrides)
        fixed = [name for name in changed(self.settings, wanted) if name not in RELOADABLE]
        if fixed:
            raise ConfigError(f"{', '.join(fixed)}: read at the start only; restart the gateway to change it")
        return wanted

    def set(self, overrides: Mapping[str, Any]) -> None:
        """Take overrides instead of those before.

        Raises:
            ConfigError: they are refused; nothing has changed.
        """
        self._take(self.check(overrides))
        self.overrides = dict(overrides)

    def look(self) -> None:
        """Reload the file if it changed and then rested for one look: what is still being written is not read."""
        now = signature_of(self.sources.file)
        if now != self.sources.signature and now == self._seen:
            self.reload()
        self._seen = now

    def reload(self) -> bool:
        """Read the file again; whether it was applied. A refusal is said, and leaves all as it was."""
        self.sources.signature = signature_of(self.sources.file)
        try:
            self._check_file()
            self._take(self.check(self.overrides))
        except ConfigError as error:
            self.refused += 1
            self.error = str(error)
            _log.error("the configuration file is refused, the settings before stay: %s", error)
            return False
        return True

    def _check_file(self) -> None:
        if self.sources.file and not (self.sources.signature and self.sources.signature[2]):
            raise ConfigError(f"{self.sources.file} is gone or empty")

    def _take(self, wanted: Settings) -> None:
        names = changed(self.settings, wanted)
        self._apply(wanted)
        self.settings = wanted
        self.applied += 1
        self.error = ""
        self.changed_at = time.time()
        _log.info("settings changed: %s", ", ".join(names) or "none")


def changed(before: Settings, after: Settings) -> list[str]:
    """Names of the settings that differ, sorted."""
    return sorted(name for name in Settings.model_fields if getattr(before, name) != getattr(after, name))
