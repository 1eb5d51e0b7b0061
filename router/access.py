"""Access: who may use the gateway, and what for.

Clients show an API key, as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``. Of a key only its SHA-256 is stored: keys
are 256 random bits, so there is nothing to guess that a slow hash would protect. The hash is looked up in a dictionary and
compared again in constant time. A key's holder is a *tenant*: its models, its limits, its place in the queue, and its part
of the workers' caches.

A key that was found good is remembered, in memory, until keys change: the next request that shows it is not hashed. Only
good keys are; what is shown is found by Python's keyed hash of it, and compared only where all 64 bits of that agree, so
how long a wrong guess takes tells nothing of how much of it was right.

The file of keys, in YAML or JSON:

    keys:
      - name: team-a
        hash: sha256:9f86d081…            # or a list of them, while a key is being replaced
        models: [llama-3, "team-a-*"]     # default: all
        requests_per_minute: 600          # limits; default: none
        tokens_per_minute: 1000000
        concurrency: 64
        priority: 0                       # the most urgent its requests may be; smaller is more urgent
        weight: 1                         # share of the queue against other keys
        cache_salt: 5f2c…                 # keys with different salts share no cache
        expires: 2030-01-01T00:00:00Z
        disabled: false
"""

import asyncio
import base64
import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_serializer, field_validator

from router.errors import ConfigError, Forbidden, InvalidRequest, ModelNotFound, Unauthorized
from router.limits import Meter, Usage
from router.parse import CREDENTIALS, PRIORITY_HEADER, Arrival, Request, shown_in
from router.queue import Claim
from router.salt import derive_salt, with_salt

KEY_PREFIX = "wr-"
PROBES = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Paths that need no key, unless that is switched off."""
TENANT = "warmroute.tenant"
"""Scope key of the tenant, where a request is not routed."""
BYTES_PER_TOKEN = 4
"""What a token is taken to be where a prompt is not tokenized."""
_LONGEST_KEY = 512
_REMEMBERED = 4096
_SHORTEST_KEY = 32
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")

_log = logging.getLogger(__name__)


class KeySpec(BaseModel):
    """One entry of the file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str
    hash: str | list[str]
    models: list[str] = []
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-1000, le=1000)
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    cache_salt: SecretStr = SecretStr("")
    expires: datetime | None = None
    disabled: bool = False

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("a key's name is letters, digits, '.', '_', ':', '@' and '-'")
        return name

    @field_validator("hash")
    @classmethod
    def _hash_is_one(cls, value: str | list[str]) -> str | list[str]:
        for item in [value] if isinstance(value, str) else value:
            if not _HASH.fullmatch(item):
                raise ValueError("a hash is sha256: and 64 hexadecimal digits; 'warmroute keys add' makes keys")
        return value

    @field_validator("expires")
    @classmethod
    def _expires_somewhere(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value

    @field_serializer("cache_salt")
    def _write_salt(self, salt: SecretStr) -> str:
        return salt.get_secret_value()

    @property
    def hashes(self) -> tuple[str, ...]:
        return (self.hash,) if isinstance(self.hash, str) else tuple(self.hash)


class Tenant:
    """The holder of a key, as far as one request needs it."""

    __slots__ = ("_exact", "_globs", "_own_salt", "_salt", "expires", "name", "priority", "spec", "usage", "weight")

    def __init__(self, spec: KeySpec, usage: Usage) -> None:
        self.spec = spec
        self.name = spec.name
        self.usage = usage
        self.priority = spec.priority
        self.weight = spec.weight
        self.expires = spec.expires.timestamp() if spec.expires is not None else float("inf")
        self._exact = frozenset(spec.models)
        self._globs = tuple(model for model in spec.models if any(mark in model for mark in "*?["))
        self._salt = spec.cache_salt.get_secret_value()
        self._own_salt = derive_salt(self._salt, "") if self._salt else ""

    def __repr__(self) -> str:
        return f"Tenant({self.name!r})"

    def may_use(self, model: str) -> bool:
        return not self._exact or model in self._exact or any(fnmatchcase(model, glob) for glob in self._globs)

    def bind(self, request: Request) -> None:
        """Hold a request to what its key allows, and put its salt into it.

        Raises:
            ApiError: the model or the priority is not for this key.
        """
        body = request.body
        if self._exact and request.kind != "stored":  # a stored response is its tenant's alone
            self._check_model(request.model)
        if "priority" in body:
            self._check_priority(body["priority"])
        given = body.get("cache_salt")
        if given is not None and not isinstance(given, str):
            raise InvalidRequest("cache_salt must be a non-empty string", param="cache_salt")
        salt = derive_salt(self._salt, given) if given else self._own_salt
        if salt and body:
            request.raw = with_salt(request.raw, body, salt)
            body["cache_salt"] = request.cache_salt = salt

    def urgency(self, given: bytes | None) -> int:
        """The request's priority in the queue: its header's, as far as the key allows, else the key's.

        Raises:
            ApiError: the header is no number, or more urgent than the key allows.
        """
        if given is None:
            return self.priority
        try:
            priority = int(given)
        except ValueError:
            raise InvalidRequest(f"{PRIORITY_HEADER.decode()} must be a whole number") from None
        if priority < self.priority:
            raise self._too_urgent(self.priority)
        return min(priority, 1000)

    def _check_model(self, model: str) -> None:
        if not model:
            raise InvalidRequest("model is required: this key is for some models only", param="model")
        if not self.may_use(model):
            raise ModelNotFound(f"the model {model!r} is not served here to this key", param="model")

    def _check_priority(self, priority: Any) -> None:
        """The engine's own scheduler heeds this member; 0 is what a request has that does not say."""
        allowed = min(self.priority, 0)
        try:
            urgent = priority is not None and float(priority) < allowed
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest("priority must be a whole number", param="priority") from None
        if urgent:
            raise self._too_urgent(allowed)

    def _too_urgent(self, allowed: int) -> Forbidden:
        return Forbidden(
            f"the most urgent priority of key {self.name!r} is {allowed}", param="priority", code="priority_not_allowed"
        )


class Visit:
    """One request of a tenant."""

    __slots__ = ("_size", "_urgency", "meter", "tenant")

    def __init__(self, tenant: Tenant, urgency: int, size: int) -> None:
        self.tenant = tenant
        self.meter = Meter()
        self._urgency = urgency
        self._size = size

    @property
    def claim(self) -> Claim:
        """What it says in the queue, where it has to stand there."""
        return Claim(self.tenant.name, self._urgency, self.tenant.weight, self._size)

    def prompt(self, tokens: int, request: Request) -> None:
        """Take the prompt's tokens; where nobody counted them, about as many as its bytes make.

        Raises:
            Limited: the key has not so many left.
        """
        self.tenant.usage.prompt(tokens or len(request.raw) // BYTES_PER_TOKEN, time.monotonic())

    def leave(self) -> None:
        usage = self.tenant.usage
        usage.leave()
        if tokens := self.meter.tokens:
            usage.completion(tokens, time.monotonic())


class Access:
    """The keys in force. ``authenticate`` costs about 2 µs whatever their number, and less for keys seen before."""

    def __init__(self, keys: Iterable[KeySpec] = (), path: str = "") -> None:
        """With ``path``, the keys are those of that file, read here and again whenever it changes.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = Path(path).expanduser() if path else None
        self._seen: object = None
        self._by_digest: dict[bytes, tuple[bytes, Tenant]] = {}
        self._remembered: dict[bytes, Tenant] = {}
        self.tenants: dict[str, Tenant] = {}
        self._asked = asyncio.Event()
        self.error = ""
        self.refused = 0
        if self._path is not None:
            self._seen = _signature(self._path)
            keys = read_keys(self._path)
        self.use(keys)

    def use(self, keys: Iterable[KeySpec]) -> None:
        """Put these keys in force, all at once. A name that stays keeps what it used so far."""
        now = time.monotonic()
        tenants: dict[str, Tenant] = {}
        by_digest: dict[bytes, tuple[bytes, Tenant]] = {}
        for spec in keys:
            known = self.tenants.get(spec.name)
            usage = known.usage if known is not None else Usage(spec.name)
            tenant = tenants[spec.name] = Tenant(spec, usage)
            usage.limit(
                requests=spec.requests_per_minute, tokens=spec.tokens_per_minute, concurrency=spec.concurrency, now=now
            )
            if not spec.disabled:
                for text in spec.hashes:
                    digest = bytes.fromhex(text.removeprefix("sha256:"))
                    by_digest[digest] = (digest, tenant)
        self.tenants, self._by_digest = tenants, by_digest
        self._remembered = {}
        if not by_digest:
            _log.warning("there is no API key in force: every request will be refused")

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Tenant:
        """Whose key the request shows.

        Raises:
            Unauthorized: it shows none, or one that is not in force.
        """
        return self._whose(shown_key(headers))

    def _whose(self, given: bytes | None) -> Tenant:
        if given is None:
            self.refused += 1
            raise Unauthorized("an API key is required: 'Authorization: Bearer KEY'", code="missing_api_key")
        tenant = self._remembered.get(given) or self._find(given)
        if tenant.expires != math.inf and tenant.expires <= time.time():
            self.refused += 1
            raise Unauthorized("the API key has expired", code="expired_api_key")
        return tenant

    def _find(self, given: bytes) -> Tenant:
        digest = sha256(given).digest() if len(given) <= _LONGEST_KEY else b""
        known, tenant = self._by_digest.get(digest, _NOBODY)
        if not hmac.compare_digest(known, digest) or tenant is None:
            self.refused += 1
            raise Unauthorized("the API key is not valid", code="invalid_api_key")
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[given] = tenant
        return tenant

    def enter(self, arrival: Arrival) -> Visit:
        """Let a request in; ``leave`` ends its visit.

        Raises:
            ApiError: its key is not in force, or has reached a limit.
        """
        tenant = self._whose(arrival.shown)
        urgency = tenant.urgency(arrival.priority)
        tenant.usage.enter(time.monotonic())
        return Visit(tenant, urgency, arrival.length)

    def reload(self) -> bool:
        """Read the file again if it changed; whether it did and is in force. A file that cannot be used changes nothing,
        and is reported: in the log, and as ``error``."""
        if self._path is None or (seen := _signature(self._path)) == self._seen:
            return False
        self._seen = seen
        try:
            self.use(read_keys(self._path))
        except ConfigError as error:
            self.error = str(error)
            _log.error("the API keys stay as they were: %s", error)
            return False
        self.error = ""
        _log.info("%d API keys are in force, of %s", len(self.tenants), self._path)
        return True

    async def watch(self, interval: float) -> None:
        """Reload whenever the file changed, until cancelled. Looks at it every ``interval`` seconds, and when asked."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._asked.wait()
            self._asked.clear()
            self.reload()

    def ask_reload(self) -> None:
        """Have the file looked at now."""
        self._asked.set()

    def describe(self) -> dict[str, Any]:
        """The keys and their use, for people; no key, hash or salt among it."""
        return {
            "error": self.error or None,
            "refused": self.refused,
            "keys": [_describe(tenant) for tenant in self.tenants.values()],
        }


_NOBODY: tuple[bytes, Tenant | None] = (bytes(32), None)


def make_access(path: str, inline: str) -> Access | None:
    """The keys that the settings name; None where they name none, and everybody may use the gateway.

    Raises:
        ConfigError: they cannot be used.
    """
    if path:
        return Access(path=path)
    if not inline.strip():
        return None
    return Access(_inline(inline))


def make_key() -> str:
    """A key: 256 random bits."""
    return KEY_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def hash_key(key: str) -> str:
    """What is kept of a key."""
    return "sha256:" + sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[KeySpec]:
    """The entries of a file of keys.

    Raises:
        ConfigError: it cannot be read, or an entry is wrong; names the entry, never its hash or salt.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the API keys in {path} are not YAML{_place(error)}") from None
    if content is None:
        return []
    if not isinstance(content, dict) or set(content) - {"keys"} or not isinstance(content.get("keys") or [], list):
        raise ConfigError(f"{path} must hold one mapping with the list 'keys'")
    _warn_if_readable(path)
    return check_keys([_entry(path, number, item) for number, item in enumerate(content.get("keys") or [])], str(path))


def check_keys(keys: list[KeySpec], where: str) -> list[KeySpec]:
    """Raises:
    ConfigError: two keys share a name or a hash.
    """
    names, hashes = [key.name for key in keys], [text for key in keys for text in key.hashes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{where}: keys share a name: {', '.join(twice)}")
    if len(set(hashes)) < len(hashes):
        raise ConfigError(f"{where}: one key stands there twice, under different names or the same")
    return keys


def _entry(path: Path, number: int, item: Any) -> KeySpec:
    try:
        return KeySpec.model_validate(item)
    except ValidationError as error:
        name = item.get("name") if isinstance(item, dict) else None
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        which = f"key {name!r}" if isinstance(name, str) else f"entry {number + 1}"
        text = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {which}: {where}: {text}") from None


def _inline(text: str) -> list[KeySpec]:
    keys = []
    for item in re.split(r"[\s,]+", text.strip()):
        name, colon, key = item.partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise ConfigError("api_keys is NAME:KEY or NAME:sha256:HEX, separated by spaces")
        if not _HASH.fullmatch(key):
            if len(key) < _SHORTEST_KEY:
                raise ConfigError(
                    f"the API key of {name} is shorter than {_SHORTEST_KEY} characters: it can be guessed"
                )
            key = hash_key(key)
        keys.append(KeySpec(name=name, hash=key))
    return check_keys(keys, "api_keys")


def shown_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key or token a request shows, None where there is none."""
    for name, value in headers:
        if name in CREDENTIALS and (shown := shown_in(name, value)) is not None:
            return shown
    return None


def _signature(path: Path) -> object:
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _warn_if_readable(path: Path) -> None:
    if path.stat().st_mode & 0o007:
        _log.warning("%s is open to every user of this machine, and holds cache salts: chmod 600 it", path)


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f": line {mark.line + 1}" if mark is not None else ""


def _describe(tenant: Tenant) -> dict[str, Any]:
    spec, usage = tenant.spec, tenant.usage
    shown = spec.model_dump(mode="json", exclude={"hash", "cache_salt"})
    return shown | {
        "own_cache": bool(spec.cache_salt.get_secret_value()),
        "in_flight": usage.in_flight,
        "requests": usage.requests,
        "tokens": dict(usage.tokens),
        "limited": dict(usage.limited),
    }
