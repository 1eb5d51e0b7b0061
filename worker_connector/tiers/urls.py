"""Stores from the URLs that users write.

    redis://user:password@host:6379/0?prefix=&ttl=      valkey:// is the same; rediss:// and valkeys:// are TLS
    redis+sentinel://[:password@]host:26379,host2/service/0   redis-sentinel:// too
    redis+cluster://host:6379,host2:6379                redis-cluster:// too
    unix:///run/redis.sock?db=0                         redis+unix:// too
    s3://bucket/prefix?endpoint=&region=                gs:// and az:// likewise; azure:// is az://
    file:///shared/directory
    mooncake://host:50051?segment=4GiB                  mooncakestore:// too

Several URLs, separated by blanks or commas before a scheme, are one group of stores (``replicas``). What follows ``?``
is checked: a name that a scheme does not know is an error that says which are known.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from worker_connector.config_values import boolean, positive, size
from worker_connector.errors import ConfigurationError
from worker_connector.tiers.base import Store
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.replicas import Replicas

if TYPE_CHECKING:
    from worker_connector.tiers.redis import RedisSettings

_PASSWORD = re.compile(r"(://[^/?#@\s]*?:)[^/?#\s]*@")
_SECRET_OPTIONS = re.compile(r"([?&](?:secret|token|password|sentinel_password)=)[^&\s]*")
_SEPARATOR = re.compile(r"[\s,]+(?=[a-z][a-z0-9+-]*://)")


def open_stores(
    urls: str | Sequence[str],
    *,
    replicas: int = 1,
    ttl: float = 0.0,
    limits: Limits | None = None,
    verify: Callable[[str, memoryview], bool] | None = None,
) -> Store:
    """The store, or the group of stores, that the URLs name, each of them guarded.

    ``ttl`` in seconds holds where a URL does not give its own. Nothing is connected yet: a store that cannot be reached
    is found out, and left alone, at its first use.

    Raises:
        ConfigurationError: a URL is wrong, or a package that it needs is not installed; the text names part and cure.
    """
    given = split_urls(urls)
    if not given:
        raise ConfigurationError("no store's URL is given")
    stores = [open_store(url, ttl=ttl, limits=limits) for url in given]
    if len(stores) == 1 and replicas == 1:
        return stores[0]
    weights = [float(_Url(url).options.get("weight", "1")) for url in given]
    return Replicas(stores, replicas, weights=weights, verify=verify or _unverified)


def open_store(url: str, *, ttl: float = 0.0, limits: Limits | None = None) -> Guarded:
    """The store that one URL names, guarded.

    Raises:
        ConfigurationError: as for ``open_stores``.
    """
    parsed = _Url(url)
    opener = _OPENERS[parsed.scheme]
    unknown = [name for name in parsed.options if name not in opener.options and name not in _COMMON]
    if unknown:
        raise parsed.wrong(f"{unknown[0]}= is no option of {parsed.scheme}://{_nearest(unknown[0], opener.options)}")
    wanted = limits or Limits()
    for name, reader in _LIMITS.items():
        if (value := parsed.option(name, reader, None)) is not None:
            wanted = replace(wanted, **{name: value})
    parsed.option("weight", _weight, 1.0)
    try:
        return Guarded(opener.open(parsed, parsed.option("ttl", _ttl, ttl)), wanted)
    except ImportError as error:
        raise ConfigurationError(
            f"{parsed.shown}: {error.name} is not installed: pip install 'warmroute[{opener.extra}]'"
        ) from None


def split_urls(urls: str | Sequence[str]) -> list[str]:
    """The URLs of a setting: a list, or a text with several of them."""
    texts = [urls] if isinstance(urls, str) else list(urls)
    return [part.strip(" ,\t\n") for text in texts for part in _SEPARATOR.split(text.strip()) if part.strip(" ,\t\n")]


def redacted(url: str) -> str:
    """The URL without its password and keys, for logs."""
    return _SECRET_OPTIONS.sub(r"\1***", _PASSWORD.sub(r"\1***@", url))


class _Url:
    """A URL in its parts; errors show it without its secrets."""

    def __init__(self, url: str) -> None:
        self.shown = redacted(url)
        if "://" not in url:
            raise self.wrong(f"it has no scheme. A store's URL begins with one of {_schemes()}")
        try:
            self._parts: SplitResult = urlsplit(url)
        except ValueError as error:
            raise self.wrong(str(error)) from None
        self.scheme = _ALIASES.get(self._parts.scheme, self._parts.scheme)
        if self.scheme in _ABSENT:
            raise self.wrong(_ABSENT[self.scheme])
        if self.scheme not in _OPENERS:
            raise self.wrong(f"{self._parts.scheme}:// is no scheme of a store. There are {_schemes()}")
        pairs = parse_qsl(self._parts.query, keep_blank_values=True)
        self.options = dict(pairs)
        if len(self.options) != len(pairs):
            raise self.wrong("an option is given twice")
        if self._parts.fragment:
            raise self.wrong("what follows # has no meaning; write # in a password as %23")

    @property
    def path(self) -> str:
        return unquote(self._parts.path)

    @property
    def user(self) -> str:
        return unquote(self._parts.netloc.rpartition("@")[0].partition(":")[0])

    @property
    def password(self) -> str:
        return unquote(self._parts.netloc.rpartition("@")[0].partition(":")[2])

    @property
    def authority(self) -> str:
        """Hosts and ports, without who logs in."""
        return self._parts.netloc.rpartition("@")[2]

    def addresses(self, port: int) -> tuple[tuple[str, int], ...]:
        """The hosts, at least one, with their ports or the usual one."""
        if not self.authority:
            raise self.wrong("the host is missing")
        return tuple(self._address(part, port) for part in self.authority.split(","))

    def _address(self, text: str, usual: int) -> tuple[str, int]:
        match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\[\]:]+)(?::(\d+))?", text)
        if match is None:
            raise self.wrong(f"{text!r} is no host, or host:port")
        port = int(match[2]) if match[2] else usual
        if not 0 < port < 65_536:
            raise self.wrong(f"the port {match[2]} is not between 1 and 65535")
        return match[1].strip("[]"), port

    def option(self, name: str, read: Callable[[str], Any], default: Any) -> Any:
        if name not in self.options:
            return default
        try:
            return read(self.options[name])
        except ValueError as error:
            raise self.wrong(f"{name}= is {self.options[name]!r}, but {error}") from None

    def text(self, name: str, default: str = "") -> str:
        return self.options.get(name, default)

    def wrong(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self.shown}: {problem}")


class _Opener(NamedTuple):
    open: Callable[[_Url, float], Store]
    options: frozenset[str]
    extra: str = ""


def _redis(url: _Url, ttl: float, **more: Any) -> Store:
    module: Any = import_module("worker_connector.tiers.redis")
    settings: RedisSettings = module.RedisSettings(
        addresses=more.pop("addresses", None) or url.addresses(6379),
        username=url.user,
        password=url.password or url.text("password"),
        prefix=url.text("prefix", "warmroute:"),
        ttl=ttl,
        connections=url.option("connections", positive, 4),
        ca_certs=_file(url, "ca_certs"),
        certificate=_file(url, "certificate"),
        private_key=_file(url, "private_key"),
        verify=url.option("verify", boolean, True),
    )
    store: Store = module.RedisStore(replace(settings, **more))
    return store


def _standalone(url: _Url, ttl: float, *, tls: bool = False) -> Store:
    if len(url.addresses(6379)) > 1:
        raise url.wrong("several hosts need redis+cluster:// or redis+sentinel://")
    return _redis(url, ttl, tls=tls, database=_database(url, url.path.strip("/")))


def _unix(url: _Url, ttl: float) -> Store:
    path = "" if url.authority else url.path
    if not path.startswith("/"):
        raise url.wrong("the socket's path must be absolute, as in unix:///run/redis/redis.sock")
    return _redis(url, ttl, addresses=((path, 0),), database=_database(url, ""))


def _sentinel(url: _Url, ttl: float) -> Store:
    service, _, database = url.path.strip("/").partition("/")
    service = service or url.text("service")
    if not service:
        raise url.wrong("the service's name is missing, as in redis+sentinel://host:26379/mymaster")
    login = {"sentinel_username": url.text("sentinel_user"), "sentinel_password": url.text("sentinel_password")}
    addresses = url.addresses(26379)
    tls = url.option("tls", boolean, False)
    database_number = _database(url, database)
    return _redis(
        url, ttl, kind="sentinel", service=service, addresses=addresses, database=database_number, tls=tls, **login
    )


def _cluster(url: _Url, ttl: float) -> Store:
    if url.path.strip("/") not in ("", "0") or url.text("db", "0") != "0":
        raise url.wrong("a cluster has database 0 only")
    return _redis(url, ttl, kind="cluster", tls=url.option("tls", boolean, False))


def _database(url: _Url, path: str) -> int:
    text = path or url.text("db", "0")
    if path and "db" in url.options and url.text("db") != path:
        raise url.wrong(f"the database is {path} by its path and {url.text('db')} by db=: keep one of them")
    if not text.isdecimal():
        raise url.wrong(f"the database {text!r} is no number")
    return int(text)


def _objects(url: _Url, ttl: float) -> Store:
    bucket = url.authority
    if not bucket:
        raise url.wrong(f"the bucket is missing, as in {url.scheme}://bucket/prefix")
    endpoint = url.text("endpoint")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise url.wrong("endpoint= must begin with http:// or https://")
    module: Any = import_module("worker_connector.tiers.objects")
    settings = module.ObjectSettings(
        kind=url.scheme,
        bucket=bucket,
        prefix=url.path.strip("/"),
        endpoint=endpoint,
        region=url.text("region"),
        path_style=url.option("path_style", boolean, None),
        key_id=url.user or url.text("key_id") or url.text("account"),
        secret=url.password or url.text("secret") or _file(url, "credentials"),
        token=url.text("token"),
        anonymous=url.option("anonymous", boolean, False),
        ca_certs=_file(url, "ca_certs"),
        verify=url.option("verify", boolean, True),
        connections=url.option("connections", positive, 16),
        ttl=ttl,
    )
    store: Store = module.ObjectStore(settings)
    return store


def _directory(url: _Url, ttl: float) -> Store:
    if url.authority not in ("", "localhost") or not url.path.startswith("/"):
        raise url.wrong("the path must be absolute, with three slashes: file:///shared/directory")
    from worker_connector.tiers.filesystem import DirectorySettings, DirectoryStore  # noqa: PLC0415 - as its siblings

    sync = url.option("sync", boolean, False)
    return DirectoryStore(DirectorySettings(path=Path(url.path), ttl=ttl, sync=sync))


def _mooncake(url: _Url, _ttl: float) -> Store:
    if "ttl" in url.options:
        raise url.wrong("Mooncake keeps no ttl= of its own: set the setting ttl, which every object carries")
    addresses = url.addresses(50051)
    if len(addresses) > 1:
        raise url.wrong("one master is expected")
    module: Any = import_module("worker_connector.tiers.mooncake")
    protocol = url.text("protocol", "tcp")
    if protocol not in ("tcp", "rdma"):
        raise url.wrong(f"protocol= is {protocol!r}, but it must be tcp or rdma")
    settings = module.MooncakeSettings(
        master=f"{addresses[0][0]}:{addresses[0][1]}",
        metadata=url.text("metadata", "P2PHANDSHAKE"),
        host=url.text("host"),
        protocol=protocol,
        devices=url.text("device"),
        segment_bytes=url.option("segment", _size_or_none, 0),
        buffer_bytes=url.option("buffer", size, 256 << 20),
        copies=url.option("copies", positive, 1),
        prefix=url.text("prefix", "warmroute:"),
    )
    store: Store = module.MooncakeStore(settings)
    return store


def _schemes() -> str:
    return ", ".join(f"{scheme}://" for scheme in _OPENERS)


def _nearest(name: str, options: frozenset[str]) -> str:
    known = sorted(options | _COMMON)
    if near := difflib.get_close_matches(name, known, 1):
        return f": did you mean {near[0]}=?"
    return f", which knows {', '.join(known)}"


def _file(url: _Url, name: str) -> str:
    path = url.text(name)
    if path and not Path(path).is_file():
        raise url.wrong(f"{name}= names {path}, which is no file")
    return path


def _seconds(text: str) -> float:
    amount = _number(text)
    if not 0.01 <= amount <= 3600:
        raise ValueError("it must be between 0.01 and 3600 seconds")
    return amount


def _unverified(_key: str, _data: memoryview) -> bool:
    return True


def _ttl(text: str) -> float:
    amount = _number(text)
    if not 0 <= amount < 1 << 31:
        raise ValueError("it must be a number of seconds, or 0 for none")
    return amount


def _weight(text: str) -> float:
    amount = _number(text)
    if not 0 < amount < 1e9:
        raise ValueError("it must be a number above zero")
    return amount


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("it must be a number") from None


def _size_or_none(text: str) -> int:
    return 0 if text == "0" else size(text)


_LIMITS: dict[str, Callable[[str], Any]] = {"timeout": _seconds, "threads": positive}
_COMMON = frozenset({"ttl", "weight", *_LIMITS})
_REDIS = frozenset({"prefix", "connections", "password"})
_TLS = frozenset({"ca_certs", "certificate", "private_key", "verify"})
_SENTINEL = frozenset({"service", "db", "tls", "sentinel_user", "sentinel_password"})
_BUCKET = frozenset({"endpoint", "anonymous", "ca_certs", "verify", "connections"})
_S3 = frozenset({"region", "path_style", "key_id", "secret", "token"})
_MOONCAKE = frozenset({"metadata", "host", "protocol", "device", "segment", "buffer", "copies", "prefix"})

_OPENERS: Mapping[str, _Opener] = {
    "redis": _Opener(_standalone, _REDIS | {"db"}, "redis"),
    "rediss": _Opener(lambda url, ttl: _standalone(url, ttl, tls=True), _REDIS | _TLS | {"db"}, "redis"),
    "unix": _Opener(_unix, _REDIS | {"db"}, "redis"),
    "redis+sentinel": _Opener(_sentinel, _REDIS | _TLS | _SENTINEL, "redis"),
    "redis+cluster": _Opener(_cluster, _REDIS | _TLS | {"db", "tls"}, "redis"),
    "s3": _Opener(_objects, _BUCKET | _S3, "objects"),
    "gs": _Opener(_objects, _BUCKET | {"credentials"}, "objects"),
    "az": _Opener(_objects, _BUCKET | {"account", "secret", "token"}, "objects"),
    "file": _Opener(_directory, frozenset({"sync"})),
    "mooncake": _Opener(_mooncake, _MOONCAKE, "mooncake"),
}

_ALIASES = {
    "valkey": "redis",
    "valkeys": "rediss",
    "resp": "redis",
    "redis+unix": "unix",
    "redis-sentinel": "redis+sentinel",
    "valkey+sentinel": "redis+sentinel",
    "valkey-sentinel": "redis+sentinel",
    "redis-cluster": "redis+cluster",
    "valkey+cluster": "redis+cluster",
    "valkey-cluster": "redis+cluster",
    "gcs": "gs",
    "azure": "az",
    "abfs": "az",
    "fs": "file",
    "mooncakestore": "mooncake",
}

_ABSENT = {
    "lm": "LMCache's own server is not spoken here: give the fleet a Valkey (redis://host:6379) in its place",
    "lms": "LMCache's own server is not spoken here: give the fleet a Valkey (redis://host:6379) in its place",
    "infinistore": "InfiniStore is not supported: use mooncake:// for memory over RDMA, or redis://",
    "eic": "EIC is not supported: use redis:// or mooncake://",
    "hf3fs": "3FS is used through its mount: file:///path/of/the/mount",
    "http": "a store is not reached by HTTP: for an S3 server, write s3://bucket?endpoint=http://host",
    "https": "a store is not reached by HTTP: for an S3 server, write s3://bucket?endpoint=https://host",
}
