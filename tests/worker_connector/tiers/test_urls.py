"""What users write, and what they are told when it is wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker_connector.tiers.servers import RedisServer, S3Server, needs_redis, running, soon
from worker_connector.errors import ConfigurationError
from worker_connector.tiers.base import Sink, Source
from worker_connector.tiers.guarded import Guarded, Limits
from worker_connector.tiers.redis_link import _CODES, _TEXTS
from worker_connector.tiers.replicas import Replicas
from worker_connector.tiers.urls import _COMMON, _OPENERS, open_store, open_stores, redacted, split_urls

SECRET = "s3cret"


def settings(url: str, **more: Any) -> Any:
    store = open_store(url, **more)
    found = store.store._settings  # type: ignore[attr-defined]
    store.close()
    return found


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://host", {"addresses": (("host", 6379),), "kind": "server", "database": 0, "tls": False, "ttl": 0.0}),
        ("redis://user:pa%40ss@host:7000/3?prefix=p:&ttl=60&connections=8",
         {"addresses": (("host", 7000),), "username": "user", "password": "pa@ss", "database": 3, "prefix": "p:",
          "ttl": 60.0, "connections": 8}),
        ("redis://:only@host", {"username": "", "password": "only"}),
        ("redis://host?db=5", {"database": 5}),
        ("redis://[::1]:7000", {"addresses": (("::1", 7000),)}),
        ("valkey://host:6380/1", {"addresses": (("host", 6380),), "database": 1}),
        ("rediss://host?verify=false", {"tls": True, "verify": False}),
        ("valkeys://host", {"tls": True, "verify": True}),
        ("unix:///run/redis.sock?db=2", {"addresses": (("/run/redis.sock", 0),), "database": 2}),
        ("redis+unix:///run/redis.sock", {"addresses": (("/run/redis.sock", 0),)}),
        ("redis+sentinel://u:p@a:1,b,c:3/warm/2?sentinel_password=s",
         {"kind": "sentinel", "addresses": (("a", 1), ("b", 26379), ("c", 3)), "service": "warm", "database": 2,
          "username": "u", "password": "p", "sentinel_password": "s"}),
        ("redis-sentinel://a?service=warm", {"kind": "sentinel", "service": "warm"}),
        ("redis+cluster://a,b:7001?tls=true", {"kind": "cluster", "addresses": (("a", 6379), ("b", 7001)), "tls": True}),
        ("redis-cluster://a", {"kind": "cluster"}),
        ("s3://bucket/some/prefix?endpoint=http://h:9000&region=eu-1&path_style=false",
         {"kind": "s3", "bucket": "bucket", "prefix": "some/prefix", "endpoint": "http://h:9000", "region": "eu-1",
          "path_style": False}),
        ("s3://id:s%2Fc@bucket", {"key_id": "id", "secret": "s/c", "prefix": ""}),
        ("gs://bucket?anonymous=true", {"kind": "gs", "anonymous": True}),
        ("az://container/p?account=me&anonymous=true", {"kind": "az", "bucket": "container", "key_id": "me"}),
        ("file:///shared/dir?sync=true&ttl=5", {"path": Path("/shared/dir"), "sync": True, "ttl": 5.0}),
        ("fs:///shared/a%20b", {"path": Path("/shared/a b")}),
    ],
)  # fmt: skip
def test_urls_are_understood(url: str, wanted: dict[str, object]) -> None:
    found = settings(url)
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("lmcache-server:8080", "it has no scheme. A store's URL begins with one of redis://, rediss://"),
        ("lm://host:8080", "give the fleet a Valkey"),
        ("ftp://host", "ftp:// is no scheme of a store. There are redis://"),
        ("redis://", "the host is missing"),
        ("redis://host:99999", "the port 99999 is not between"),
        ("redis://host:port", "'host:port' is no host, or host:port"),
        ("redis://host/x", "the database 'x' is no number"),
        ("redis://host/1?db=2", "the database is 1 by its path and 2 by db="),
        ("redis://a,b", "several hosts need redis+cluster:// or redis+sentinel://"),
        ("redis://host?prefx=a", "prefx= is no option of redis://: did you mean prefix=?"),
        ("redis://host?zzz=a", "zzz= is no option of redis://, which knows connections, db, "),
        ("redis://host?verify=false", "verify= is no option of redis://"),
        ("redis://host?ttl=long", "ttl= is 'long', but it must be a number"),
        ("redis://host?ttl=1&ttl=2", "an option is given twice"),
        ("redis://host?connections=0", "connections= is '0', but"),
        ("redis://host?timeout=0", "timeout= is '0', but it must be between"),
        ("redis://host#x", "what follows # has no meaning"),
        ("rediss://host?ca_certs=/nowhere", "ca_certs= names /nowhere, which is no file"),
        ("redis+sentinel://host", "the service's name is missing"),
        ("redis+cluster://host/3", "a cluster has database 0 only"),
        ("unix://run/redis.sock", "the socket's path must be absolute"),
        ("s3:///prefix", "the bucket is missing"),
        ("s3://bucket?endpoint=host:9000", "endpoint= must begin with http"),
        ("file://host/dir", "the path must be absolute, with three slashes"),
        ("mooncake://host?protocol=ip", "protocol= is 'ip', but it must be tcp or rdma"),
        ("https://host", "write s3://bucket?endpoint=https://host"),
    ],
)
def test_wrong_urls_are_explained(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@host:x",
        f"redis://:{SECRET}@host?nonsense=1",
        f"s3://id:{SECRET}@bucket?ttl=x",
        f"s3://bucket?secret={SECRET}&token={SECRET}&ttl=x",
        f"redis+sentinel://a/s?sentinel_password={SECRET}&ttl=x",
        f"ftp://u:{SECRET}@host",
        f"lm://u:{SECRET}@host",
    ],
)
def test_no_error_shows_a_secret(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert SECRET not in str(caught.value)
    assert SECRET not in redacted(url)


def test_a_store_carries_no_secret_in_its_name_or_repr() -> None:
    store = open_store(f"redis://user:{SECRET}@host:6379/0")
    assert SECRET not in store.name + repr(store) + repr(store.store) + repr(store.store._settings)  # type: ignore[attr-defined]
    store.close()


def test_limits_and_ttl_come_from_the_url_or_from_the_settings() -> None:
    store = open_store("redis://host?timeout=0.5&threads=2", limits=Limits(timeout=9, threads=9))
    assert (store._limits.timeout, store._limits.threads) == (0.5, 2)
    store.close()
    assert settings("redis://host", ttl=60.0).ttl == 60.0
    assert settings("redis://host?ttl=0", ttl=60.0).ttl == 0


def test_several_urls_are_a_group(tmp_path: Path) -> None:
    text = "redis://a:1/0, redis://b:1/0\n redis+sentinel://c,d/warm"
    assert split_urls(text) == ["redis://a:1/0", "redis://b:1/0", "redis+sentinel://c,d/warm"]
    assert split_urls(["file:///x", " file:///y "]) == ["file:///x", "file:///y"]
    assert split_urls("") == []
    for name in "abc":
        (tmp_path / name).mkdir()
    urls = [f"file://{tmp_path}/{name}?weight={at}" for at, name in enumerate("abc", 1)]
    group = open_stores(urls, replicas=2)
    assert isinstance(group, Replicas)
    assert group._placement._weights == [1.0, 2.0, 3.0]
    assert group.put(["k"], [Source(b"abc")], soon())[0].ok
    assert sum(len(list(path.rglob("*.object"))) for path in tmp_path.iterdir()) == 2
    room = bytearray(3)
    assert group.get(["k"], [Sink(room)], soon())[0].ok
    assert room == b"abc"
    group.close()
    single = open_stores(f"file://{tmp_path}")
    assert isinstance(single, Guarded)
    single.close()
    with pytest.raises(ConfigurationError, match="replicas is 2, but 1 stores are given"):
        open_stores(f"file://{tmp_path}", replicas=2)
    with pytest.raises(ConfigurationError, match="no store's URL is given"):
        open_stores("")


def test_every_scheme_option_and_cause_is_described() -> None:
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "remote-stores.md").read_text(encoding="utf-8")
    options = {option for opener in _OPENERS.values() for option in opener.options} | _COMMON
    assert not [option for option in sorted(options) if f"`{option}=" not in page]
    assert not [scheme for scheme in _OPENERS if f"`{scheme}://" not in page]
    causes = {cause for cause, _ in (*_CODES.values(), *(known for _, known in _TEXTS))}
    assert not [cause for cause in sorted(causes) if f"`{cause}`" not in page]


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("redis://host", "redis", "redis"), ("s3://bucket", "objects", "objects")],
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, f"worker_connector.tiers.{package}", raising=False)
    monkeypatch.delitem(sys.modules, "worker_connector.tiers.redis_link", raising=False)
    monkeypatch.delitem(sys.modules, "worker_connector.tiers.redis_places", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] in ("redis", "obstore")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=rf"pip install 'warmroute\[{extra}\]'"):
        open_store(url)


@needs_redis
def test_stores_of_urls_serve(tmp_path: Path) -> None:
    server, bucket = RedisServer(tmp_path / "redis").start(), S3Server()
    with running(server, bucket):
        bucket.start("bucket")
        (tmp_path / "dir").mkdir()
        for url in (
            f"valkey://127.0.0.1:{server.port}/2?prefix=x:",
            f"unix://{server.socket}",
            f"s3://id:key@bucket/some/where?endpoint={bucket.url}&region=us-east-1",
            f"file://{tmp_path}/dir",
        ):
            store = open_store(url)
            assert store.put(["k"], [Source(b"abc")], soon())[0].ok
            room = bytearray(3)
            assert store.get(["k"], [Sink(room)], soon())[0].ok
            assert room == b"abc"
            store.close()
