"""Sentinel's failover and a cluster's slots, with real Sentinels and cluster nodes."""

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_connector.tiers.servers import (
    RedisServer,
    command,
    eventually,
    free_port,
    needs_redis,
    payload,
    running,
    soon,
)
from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import Sink, Source, Status, pages
from worker_connector.tiers.redis import RedisSettings, RedisStore
from worker_connector.tiers.redis_places import Address

pytestmark = needs_redis


def info(port: int, section: str = "replication") -> dict[str, object]:
    found = command(port, "INFO", section)
    assert isinstance(found, dict)
    return found


def sentinel_options(primary: int) -> list[str]:
    return [
        f"sentinel monitor warm 127.0.0.1 {primary} 2",
        "sentinel down-after-milliseconds warm 500",
        "sentinel failover-timeout warm 2000",
        "sentinel parallel-syncs warm 1",
    ]


def test_sentinels_failover_is_followed(tmp_path: Path) -> None:
    primary = RedisServer(tmp_path / "a", "repl-diskless-sync-delay 0").start()
    replica = RedisServer(tmp_path / "b", f"replicaof 127.0.0.1 {primary.port}").start()
    options = sentinel_options(primary.port)
    watchers = [RedisServer(tmp_path / f"s{at}", *options, sentinel=True).start() for at in range(3)]
    addresses = (("127.0.0.1", 1), *(("127.0.0.1", each.port) for each in watchers))
    store = RedisStore(RedisSettings(addresses=addresses, kind="sentinel", service="warm"))
    with running(primary, replica, *watchers):
        eventually(lambda: info(replica.port)["master_link_status"] == "up")
        assert store.put(["k"], [Source(b"abc")], soon())[0].ok
        eventually(lambda: command(replica.port, "EXISTS", "warmroute:k"))
        eventually(lambda: all(_knows_others(each.port) for each in watchers))
        primary.kill()
        with pytest.raises(StoreUnavailable) as caught:
            store.exists(["k"], soon(0.3))
        assert caught.value.cause in ("unreachable", "timeout")
        eventually(lambda: _stored(store))
        room = bytearray(3)
        assert store.get(["k"], [Sink(room)], soon())[0].ok
        assert room == b"abc"
        assert command(replica.port, "EXISTS", "warmroute:again")
        unknown = RedisStore(RedisSettings(addresses=addresses[1:], kind="sentinel", service="cold"))
        with pytest.raises(StoreUnavailable, match="no service 'cold'"):
            unknown.ping(soon())
        unknown.close()
    with pytest.raises(StoreUnavailable):
        store.ping(soon(0.5))
    store.close()


def test_a_demoted_primary_is_left_for_its_successor(tmp_path: Path) -> None:
    primary = RedisServer(tmp_path / "a", "repl-diskless-sync-delay 0").start()
    replica = RedisServer(tmp_path / "b", f"replicaof 127.0.0.1 {primary.port}", "repl-diskless-sync-delay 0").start()
    options = sentinel_options(primary.port)
    watchers = [RedisServer(tmp_path / f"s{at}", *options, sentinel=True).start() for at in range(3)]
    addresses = tuple(("127.0.0.1", each.port) for each in watchers)
    store = RedisStore(RedisSettings(addresses=addresses, kind="sentinel", service="warm"))
    with running(primary, replica, *watchers):
        eventually(lambda: info(replica.port)["master_link_status"] == "up")
        eventually(lambda: all(_knows_others(each.port) for each in watchers))
        assert store.put(["k"], [Source(b"abc")], soon())[0].ok
        eventually(lambda: command(watchers[0].port, "SENTINEL", "FAILOVER", "warm"))
        eventually(lambda: info(replica.port)["role"] == "master")
        command(primary.port, "REPLICAOF", "127.0.0.1", str(replica.port))  # as its Sentinels do ten seconds later
        assert command(primary.port, "EXISTS", "warmroute:k")
        eventually(lambda: _stored(store))
        assert command(replica.port, "EXISTS", "warmroute:again")
    store.close()


def _knows_others(port: int) -> bool:
    described = command(port, "SENTINEL", "MASTER", "warm")
    pairs = described.items() if isinstance(described, dict) else zip(described[::2], described[1::2], strict=True)
    found = {_text(name): _text(value) for name, value in pairs}
    return int(found["num-slaves"]) >= 1 and int(found["num-other-sentinels"]) >= 2


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _stored(store: RedisStore) -> bool:
    try:
        return store.put(["again"], [Source(b"x")], soon(1.0))[0].ok
    except StoreUnavailable:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    folder = tmp_path_factory.mktemp("cluster")
    options = ("cluster-enabled yes", "cluster-node-timeout 1000", "cluster-require-full-coverage no")
    nodes = [RedisServer(folder / str(at), *options, port=free_port()).start() for at in range(3)]
    with running(*nodes):
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        made = subprocess.run(
            ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        eventually(lambda: all("cluster_state:ok" in str(_cluster_info(node.port)) for node in nodes))
        yield nodes


def _cluster_info(port: int) -> str:
    found = command(port, "CLUSTER", "INFO")
    return "\n".join(f"{key}:{value}" for key, value in found.items()) if isinstance(found, dict) else str(found)


@pytest.fixture
def store(cluster: list[RedisServer]) -> Iterator[RedisStore]:
    addresses = (("127.0.0.1", 1), ("127.0.0.1", cluster[0].port))
    store = RedisStore(RedisSettings(addresses=addresses, kind="cluster"))
    yield store
    store.close()


def test_a_batch_is_spread_over_the_nodes_and_comes_back_in_order(
    cluster: list[RedisServer], store: RedisStore
) -> None:
    keys = [f"k{at}" for at in range(60)]
    values = [payload(50_000, at) for at in range(60)]
    assert all(each.ok for each in store.put(keys, [Source(value) for value in values], soon()))
    assert all(command(node.port, "DBSIZE") > 5 for node in cluster)
    rooms = [bytearray(50_000) for _ in keys]
    assert all(each.ok for each in store.get(keys, [Sink(room) for room in rooms], soon()))
    assert [bytes(room) for room in rooms] == values
    met = [entry.key for page in pages(store, threading.Event(), 5.0, 10) for entry in page.entries]
    assert sorted(met) == sorted(keys)
    assert all(each.status is Status.DELETED for each in store.delete(keys, soon()))


def test_keys_whose_slots_nobody_serves_fail_without_an_error_of_the_store(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.put(["k"], [Source(b"abc")], soon())[0].ok
    monkeypatch.setattr(store._places, "of", lambda _key, _deadline: None)
    assert [each.cause for each in store.exists(["k", "l"], soon())] == ["clusterdown"] * 2


def test_connections_to_nodes_that_left_the_cluster_are_closed(
    cluster: list[RedisServer], store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.exists(["k"], soon())
    gone = Address("localhost", cluster[0].port)
    store._servers.links(gone).give(store._servers.links(gone).take(soon()))
    monkeypatch.setattr(store._places, "_looked_at", 0.0)  # the slots are asked for once a second at most
    store._places.doubt()
    store.exists(["k"], soon())
    assert gone not in store._servers._known


def test_slots_that_move_are_followed(cluster: list[RedisServer], store: RedisStore) -> None:
    keys = [f"m{at}" for at in range(40)]
    assert all(each.ok for each in store.put(keys, [Source(b"abc")] * 40, soon()))
    source, target = cluster[0], cluster[1]
    names = [command(node.port, "CLUSTER", "MYID").decode() for node in (source, target)]
    slot = next(
        command(source.port, "CLUSTER", "KEYSLOT", f"warmroute:{key}")
        for key in keys
        if _holds(source.port, f"warmroute:{key}")
    )
    moved = [key for key in keys if command(source.port, "CLUSTER", "KEYSLOT", f"warmroute:{key}") == slot]
    command(target.port, "CLUSTER", "SETSLOT", str(slot), "IMPORTING", names[0])
    command(source.port, "CLUSTER", "SETSLOT", str(slot), "MIGRATING", names[1])
    for key in moved:
        command(source.port, "MIGRATE", "127.0.0.1", str(target.port), f"warmroute:{key}", "0", "2000")
    room = bytearray(3)
    assert store.get(moved[:1], [Sink(room)], soon())[0].ok, "in the middle of the move, ASK leads to the target"
    assert room == b"abc"
    for node in cluster:
        command(node.port, "CLUSTER", "SETSLOT", str(slot), "NODE", names[1])
    rooms = [bytearray(3) for _ in keys]
    assert all(each.ok for each in store.get(keys, [Sink(room) for room in rooms], soon()))
    assert all(room == b"abc" for room in rooms)


def _holds(port: int, key: str) -> bool:
    import redis

    try:
        return bool(command(port, "EXISTS", key))
    except redis.ResponseError:
        return False


def test_a_node_that_hangs_or_dies_costs_its_own_keys_only(cluster: list[RedisServer], store: RedisStore) -> None:
    keys = [f"n{at}" for at in range(30)]
    assert all(each.ok for each in store.put(keys, [Source(b"abc")] * 30, soon()))
    cluster[2].signal(signal.SIGSTOP)
    began = time.monotonic()
    outcomes = store.get(keys, [Sink(bytearray(3)) for _ in keys], soon(0.6))
    assert time.monotonic() - began < 6
    assert {(each.status.value, each.cause) for each in outcomes} == {("found", ""), ("failed", "timeout")}
    cluster[2].signal(signal.SIGCONT)
    eventually(lambda: all(each.ok for each in store.get(keys, [Sink(bytearray(3)) for _ in keys], soon())))
    cluster[2].kill()
    outcomes = store.get(keys, [Sink(bytearray(3)) for _ in keys], soon(2))
    assert {each.status.value for each in outcomes} == {"found", "failed"}
    cluster[2].start()
    eventually(lambda: all(each.ok for each in store.put(keys, [Source(b"abc")] * 30, soon())))
