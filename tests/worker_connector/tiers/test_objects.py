"""Object stores: S3 by moto's server, and obstore's own memory."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import obstore
import pytest

from tests.worker_connector.tiers.servers import Proxy, S3Server, eventually, payload, soon
from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import Outcome, Sink, Source, Status, pages
from worker_connector.tiers.objects import ObjectSettings, ObjectStore

SECRET = "s3cret-of-the-bucket"


def settings(url: str, bucket: str = "bucket", **more: object) -> ObjectSettings:
    common: dict[str, object] = {"region": "us-east-1", "key_id": "id", "secret": SECRET, "prefix": "some/where"}
    return ObjectSettings(kind="s3", bucket=bucket, endpoint=url, **(common | more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        yield server.start("bucket", "other")
    finally:
        server.kill()


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    if request.param == "memory":
        store = ObjectStore(ObjectSettings(kind="memory", bucket="b"))
    else:
        server = request.getfixturevalue("server")
        store = ObjectStore(settings(server.url, prefix=request.node.name))
    yield store
    store.close()


def status(outcomes: list[Outcome]) -> list[str]:
    return [each.status.value for each in outcomes]


@pytest.mark.parametrize("size", [1, 4096, (8 << 20) - 1, 8 << 20, (20 << 20) + 5])
def test_objects_come_back_whole_also_in_ranges(store: ObjectStore, size: int) -> None:
    data = payload(size)
    assert store.put(["a/b.c"], [Source(data[:100], data[100:])], soon(20)) == [Outcome(Status.STORED, size)]
    header, body = bytearray(min(size, 4096)), bytearray(size)
    assert store.get(["a/b.c"], [Sink(header, body)], soon(20)) == [Outcome(Status.FOUND, size)]
    assert (bytes(header) + bytes(body))[:size] == data


def test_a_batch_has_an_outcome_for_each_key(store: ObjectStore) -> None:
    keys = [f"k{at:02}" for at in range(40)]
    values = [payload(3000, at) for at in range(40)]
    assert set(status(store.put(keys[::2], [Source(value) for value in values[::2]], soon()))) == {"stored"}
    rooms = [bytearray(3000) for _ in keys]
    assert status(store.get(keys, [Sink(room) for room in rooms], soon())) == ["found", "missing"] * 20
    assert [bytes(room) for room in rooms[::2]] == values[::2]
    assert [each.size for each in store.exists(keys, soon())] == [3000, -1] * 20
    met = [entry for page in pages(store, threading.Event(), 5.0, 7) for entry in page.entries]
    assert [entry.key for entry in met] == keys[::2]
    assert {entry.size for entry in met} == {3000}
    assert all(abs(entry.modified - time.time()) < 60 for entry in met)
    assert set(status(store.delete(keys[:10], soon()))) <= {"deleted", "missing"}
    assert status(store.exists(keys[:10], soon())) == ["missing"] * 10
    assert store.get(["k10"], [Sink(bytearray(10))], soon())[0].cause == "size"
    assert store.get([], [], soon()) == []


def test_prefixes_keep_objects_apart(server: S3Server) -> None:
    one, two = (ObjectStore(settings(server.url, prefix=prefix)) for prefix in ("x", "xy"))
    one.put(["k"], [Source(b"1")], soon())
    assert status(two.exists(["k"], soon())) == ["missing"]
    assert [page.entries for page in pages(two, threading.Event(), 5.0)] == [[]]
    assert [entry.key for page in pages(one, threading.Event(), 5.0) for entry in page.entries] == ["k"]
    one.close()
    two.close()


def test_what_is_older_than_ttl_is_missing(server: S3Server) -> None:
    store = ObjectStore(settings(server.url, ttl=1.0, prefix="ttl"))
    store.put(["k"], [Source(b"1")], soon())
    assert store.get(["k"], [Sink(bytearray(1))], soon())[0].ok
    eventually(lambda: status(store.exists(["k"], soon())) == ["missing"])
    assert status(store.get(["k"], [Sink(bytearray(1))], soon())) == ["missing"]
    assert store.scan("", soon()).entries == []
    store.close()


def test_what_is_read_does_not_wait_for_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(ObjectSettings(kind="memory", bucket="b", connections=2))
    assert store.put(["k"], [Source(b"abc")], soon())[0].ok
    go, put_async = threading.Event(), obstore.put_async

    async def slow(*given: Any, **options: Any) -> Any:
        assert await asyncio.to_thread(go.wait, 60)
        return await put_async(*given, **options)

    monkeypatch.setattr(obstore, "put_async", slow)
    outcomes: list[Outcome] = []
    keys = [f"k{at}" for at in range(8)]
    writer = threading.Thread(target=lambda: outcomes.extend(store.put(keys, [Source(b"x")] * 8, soon(60))))
    writer.start()
    time.sleep(0.1)
    room = bytearray(3)
    try:
        assert store.get(["k"], [Sink(room)], soon())[0].ok
        assert room == b"abc"
        assert not outcomes
    finally:
        go.set()
        writer.join(60)
        store.close()
    assert len(outcomes) == 8
    assert all(each.ok for each in outcomes)


def test_a_bucket_that_is_not_there_is_named(server: S3Server) -> None:
    store = ObjectStore(settings(server.url, bucket="nowhere"))
    for call in (
        lambda: store.ping(soon()),
        lambda: store.get(["k"], [Sink(bytearray(1))], soon()),
        lambda: store.put(["k"], [Source(b"1")], soon()),
    ):
        with pytest.raises(StoreUnavailable, match="no such bucket") as caught:
            call()
        assert caught.value.cause == "config"
    store.close()


def test_missing_credentials_are_named(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    store = ObjectStore(settings(server.url, key_id="", secret=""))
    with pytest.raises(StoreUnavailable) as caught:
        store.ping(soon(2))
    assert caught.value.cause in ("auth", "timeout", "unreachable")
    store.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = ObjectStore(settings(server.url, key_id="", secret=""))
    store.ping(soon())
    store.close()
    assert SECRET not in repr(settings(server.url))


def test_a_server_that_is_killed_serves_again_after_its_restart() -> None:
    server = S3Server()
    store = ObjectStore(settings(server.url))
    try:
        server.start("bucket")
        assert store.put(["k"], [Source(b"1")], soon())[0].ok
        server.kill()
        with pytest.raises(StoreUnavailable) as caught:
            store.exists(["k"], soon(2))
        assert caught.value.cause == "unreachable"
        server.start("bucket")
        assert status(store.exists(["k"], soon())) == ["missing"]
        assert store.put(["k"], [Source(b"1")], soon())[0].ok
        server.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            store.get(["k"], [Sink(bytearray(1))], soon(0.4))
        assert caught.value.cause == "timeout"
        assert time.monotonic() - began < 6
    finally:
        store.close()
        server.kill()


def test_connections_that_break_never_yield_wrong_bytes(server: S3Server) -> None:
    data = payload(12 << 20)
    direct = ObjectStore(settings(server.url))
    direct.put(["k"], [Source(data)], soon(20))
    proxy = Proxy(server.port)
    store = ObjectStore(settings(f"http://127.0.0.1:{proxy.port}"))
    try:
        for mode, at in (("reset", 900_000), ("truncate", 2_000_000), ("slow", 50_000), ("swallow", 0), ("refuse", 0)):
            proxy.mode, proxy.bytes = mode, at
            began = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                store.get(["k"], [Sink(bytearray(12 << 20))], soon(0.8))
            assert caught.value.cause in ("timeout", "unreachable")
            assert time.monotonic() - began < 6
        proxy.mode = "pass"
        room = bytearray(12 << 20)
        assert store.get(["k"], [Sink(room)], soon(20))[0].ok
        assert bytes(room) == data
    finally:
        store.close()
        direct.close()
        proxy.close()


def test_a_file_of_certificates_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match="ca_certs names /nowhere"):
        ObjectStore(settings("https://127.0.0.1:1", ca_certs="/nowhere"))


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_other_clouds_are_reached_through_their_endpoints(kind: str) -> None:
    common = {"kind": kind, "bucket": "bucket", "endpoint": "http://127.0.0.1:1", "anonymous": True}
    store = ObjectStore(ObjectSettings(**common, key_id="account" if kind == "az" else ""))  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable) as caught:
        store.ping(soon(2))
    assert caught.value.cause == "unreachable"
    store.close()
    with pytest.raises(StoreUnavailable) as caught:
        store.ping(soon(1))
    assert caught.value.cause == "closed"
