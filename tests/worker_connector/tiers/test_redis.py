"""The Redis store against real servers: what it keeps, what it answers when a server refuses, dies or hangs."""

import datetime as dt
import ipaddress
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.worker_connector.tiers.servers import Proxy, RedisServer, command, eventually, needs_redis, payload, soon
from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import LoanEnded, Outcome, Sink, Source, Status, pages
from worker_connector.tiers.guarded import Guarded
from worker_connector.tiers.redis import RedisSettings, RedisStore

pytestmark = needs_redis
SECRET = "s3cret-of-the-store"


def settings(port: int, **more: object) -> RedisSettings:
    return RedisSettings(addresses=(("127.0.0.1", port),), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), "repl-diskless-sync-delay 0").start()
    yield server
    server.kill()


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    command(server.port, "FLUSHALL")
    store = RedisStore(settings(server.port))
    yield store
    store.close()


def fetch(store: RedisStore, key: str, size: int, seconds: float = 30.0) -> tuple[Outcome, bytes]:
    room = bytearray(size)
    return store.get([key], [Sink(room)], soon(seconds))[0], bytes(room)


def status(outcomes: list[Outcome]) -> list[str]:
    return [each.status.value for each in outcomes]


def cause(call: object, *words: object) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        call(*words)  # type: ignore[operator]
    assert SECRET not in str(caught.value)
    return caught.value.cause


@pytest.mark.parametrize("size", [1, 4096, 16 << 10, (1 << 20) + 7, 24 << 20])
def test_what_is_put_in_parts_comes_back_in_other_parts(store: RedisStore, size: int) -> None:
    data = payload(size)
    third = size // 3
    stored = store.put(["key"], [Source(data[:third], data[third:])], soon())
    assert stored == [Outcome(Status.STORED, size)]
    header, body = bytearray(min(size, 4096)), bytearray(size)
    assert store.get(["key"], [Sink(header, body)], soon()) == [Outcome(Status.FOUND, size)]
    assert (bytes(header) + bytes(body))[:size] == data


def test_a_batch_has_an_outcome_for_each_key(store: RedisStore) -> None:
    data = [payload(300_000, seed) for seed in range(100)]
    keys = [f"k{at}" for at in range(100)]
    assert set(status(store.put(keys[::2], [Source(each) for each in data[::2]], soon()))) == {"stored"}
    rooms = [bytearray(300_000) for _ in keys]
    outcomes = store.get(keys, [Sink(room) for room in rooms], soon())
    assert status(outcomes) == ["found", "missing"] * 50
    assert all(bytes(room) == each for room, each in list(zip(rooms, data, strict=True))[::2])
    assert [each.size for each in store.exists(keys, soon())] == [300_000, -1] * 50
    assert status(store.delete(keys[:4], soon())) == ["deleted", "missing"] * 2
    assert status(store.exists(keys[:4], soon())) == ["missing"] * 4


def test_an_object_larger_than_its_room_fails_alone(store: RedisStore) -> None:
    store.put(["large", "small"], [Source(payload(900_000)), Source(b"abc")], soon())
    rooms = [bytearray(1000), bytearray(3)]
    outcomes = store.get(["large", "small"], [Sink(room) for room in rooms], soon())
    assert status(outcomes) == ["failed", "found"]
    assert outcomes[0].cause == "size"
    assert rooms == [bytearray(1000), bytearray(b"abc")]


def test_a_scan_meets_every_key_of_its_prefix_and_no_other(server: RedisServer, store: RedisStore) -> None:
    assert set(status(store.put([f"k{at}" for at in range(2500)], [Source(b"x")] * 2500, soon(60)))) == {"stored"}
    command(server.port, "SET", "foreign", "x")
    other = RedisStore(settings(server.port, prefix="warm*oute:"))
    other.put(["starred"], [Source(b"x")], soon())
    met = [entry.key for page in pages(store, threading.Event(), 30.0, 100) for entry in page.entries]
    assert sorted(set(met)) == sorted(f"k{at}" for at in range(2500))
    assert [entry.key for page in pages(other, threading.Event(), 30.0) for entry in page.entries] == ["starred"]
    stop = threading.Event()
    seen = 0
    for page in pages(store, stop, 30.0, 100):
        seen += len(page.entries)
        stop.set()
    assert 0 < seen < 2500
    assert cause(store.scan, "elsewhere:1 0", soon()) == "cursor"
    other.close()


def test_objects_expire(server: RedisServer, store: RedisStore) -> None:
    short = RedisStore(settings(server.port, ttl=0.3))
    short.put(["a"], [Source(b"x")], soon())
    short.put(["b"], [Source(b"x")], soon(), ttl=100)
    store.put(["c"], [Source(b"x")], soon())
    assert 99_000 < command(server.port, "PTTL", "warmroute:b") <= 100_000
    assert command(server.port, "PTTL", "warmroute:c") == -1
    eventually(lambda: status(store.exists(["a", "b", "c"], soon())) == ["missing", "found", "found"])
    short.close()


def test_a_key_of_another_kind_fails_alone(server: RedisServer, store: RedisStore) -> None:
    command(server.port, "LPUSH", "warmroute:list", "x")
    store.put(["k"], [Source(b"x")], soon())
    outcomes = store.get(["list", "k"], [Sink(bytearray(9)), Sink(bytearray(9))], soon())
    assert status(outcomes) == ["failed", "found"]
    assert outcomes[0].cause == "type"


def test_database_numbers_keep_objects_apart(server: RedisServer, store: RedisStore) -> None:
    third = RedisStore(settings(server.port, database=3))
    third.put(["k"], [Source(b"x")], soon())
    assert status(store.exists(["k"], soon())) == ["missing"]
    assert status(third.exists(["k"], soon())) == ["found"]
    beyond = RedisStore(settings(server.port, database=99))
    assert cause(beyond.ping, soon()) == "config"
    third.close()
    beyond.close()


def test_a_unix_socket_serves_too(server: RedisServer) -> None:
    store = RedisStore(RedisSettings(addresses=((str(server.socket), 0),)))
    data = payload(3 << 20)
    store.put(["unix"], [Source(data)], soon())
    assert fetch(store, "unix", 3 << 20) == (Outcome(Status.FOUND, 3 << 20), data)
    store.close()


def test_an_operation_that_was_given_up_stores_nothing(store: RedisStore) -> None:
    source = Source(payload(8 << 20), payload(8 << 20)).lend()
    sent = threading.Event()

    class Watched(Source):
        def pour(self, at: int, most: int, send: Callable[[list[memoryview]], int]) -> int:
            taken = super().pour(at, most, send)
            sent.set()
            time.sleep(0.02)
            return taken

    watched = Watched(*source._views)
    failures: list[BaseException] = []

    def put() -> None:
        try:
            store.put(["half"], [watched], soon())
        except LoanEnded as error:
            failures.append(error)

    putter = threading.Thread(target=put)
    putter.start()
    assert sent.wait(30)
    watched.end()
    putter.join(30)
    assert failures
    assert status(store.exists(["half"], soon())) == ["missing"]
    store.put(["half"], [Source(b"whole")], soon())
    assert fetch(store, "half", 5)[1] == b"whole"


def test_logins_and_their_failures_have_distinct_causes(tmp_path: Path) -> None:
    rules = tmp_path / "users.acl"
    rules.write_text(
        f"user default off\nuser cache on >{SECRET} ~warmroute:* +@all\n"
        f"user reader on >{SECRET} ~warmroute:* +get +strlen +ping +select\n"
    )
    server = RedisServer(tmp_path / "redis", f"aclfile {rules}").start()
    try:
        good = RedisStore(settings(server.port, username="cache", password=SECRET))
        assert status(good.put(["k"], [Source(b"x")], soon())) == ["stored"]
        for wrong in ({"username": "cache", "password": "guess"}, {"username": "nobody", "password": SECRET}, {}):
            refused = RedisStore(settings(server.port, **wrong))
            with pytest.raises(
                StoreUnavailable, match="wants a password" if not wrong else "user and password"
            ) as caught:
                refused.ping(soon())
            assert caught.value.cause == "auth"
            assert "guess" not in str(caught.value)
            refused.close()
        reader = RedisStore(settings(server.port, username="reader", password=SECRET))
        outcomes = reader.put(["k"], [Source(b"y")], soon())
        assert (outcomes[0].status, outcomes[0].cause) == (Status.REFUSED, "noperm")
        assert fetch(reader, "k", 1) == (Outcome(Status.FOUND, 1), b"x")
        assert cause(reader.scan, "", soon()) == "noperm"
        assert SECRET not in repr(settings(1, password=SECRET)) + repr(good) + good.name
        good.close()
        reader.close()
    finally:
        server.kill()


def test_a_password_for_a_server_without_one_is_named(server: RedisServer) -> None:
    store = RedisStore(settings(server.port, password=SECRET))
    with pytest.raises(StoreUnavailable, match="take the password out"):
        store.ping(soon())
    store.close()


def test_a_full_server_refuses_and_one_that_evicts_does_not(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "maxmemory 12mb", "maxmemory-policy noeviction").start()
    store = RedisStore(settings(server.port))
    try:
        keys = [f"k{at}" for at in range(24)]
        values = [payload(1 << 20, at) for at in range(24)]
        outcomes = store.put(keys, [Source(each) for each in values], soon())
        assert {each.status for each in outcomes} == {Status.STORED, Status.REFUSED}
        assert {each.cause for each in outcomes} == {"", "full"}
        stored = next(at for at, each in enumerate(outcomes) if each.ok)
        assert fetch(store, keys[stored], 1 << 20)[1] == values[stored]
        command(server.port, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        outcomes = store.put(keys, [Source(each) for each in values], soon())
        assert set(status(outcomes)) == {"stored"}
        rooms = [bytearray(1 << 20) for _ in keys]
        outcomes = store.get(keys, [Sink(room) for room in rooms], soon())
        assert set(status(outcomes)) == {"found", "missing"}
        for outcome, room, value in zip(outcomes, rooms, values, strict=True):
            assert not outcome.ok or bytes(room) == value
    finally:
        store.close()
        server.kill()


def test_a_replica_takes_no_objects_but_gives_them(server: RedisServer, store: RedisStore, tmp_path: Path) -> None:
    store.put(["k"], [Source(b"x")], soon())
    replica = RedisServer(tmp_path, f"replicaof 127.0.0.1 {server.port}").start()
    copy = RedisStore(settings(replica.port))
    try:
        eventually(lambda: command(replica.port, "INFO", "replication")["master_link_status"] == "up")
        outcomes = copy.put(["k"], [Source(b"y")], soon())
        assert (outcomes[0].status, outcomes[0].cause) == (Status.REFUSED, "readonly")
        assert fetch(copy, "k", 1)[1] == b"x"
    finally:
        copy.close()
        replica.kill()


def test_a_server_that_was_killed_serves_again_after_its_restart(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    store = RedisStore(settings(server.port))
    try:
        store.put(["k"], [Source(b"x")], soon())
        server.kill()
        assert cause(store.exists, ["k"], soon()) == "unreachable"
        server.start()
        assert status(store.exists(["k"], soon())) == ["missing"]
        assert status(store.put(["k"], [Source(b"x")], soon())) == ["stored"]
        server.kill()
        server.start()
        assert status(store.put(["k"], [Source(b"y")], soon())) == ["stored"], "idle connections broke meanwhile"
    finally:
        store.close()
        server.kill()


def test_a_stopped_server_costs_its_deadline_and_no_more(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    store = RedisStore(settings(server.port))
    try:
        large = bytes(64 << 20)
        store.put(["k"], [Source(payload(8 << 20))], soon())
        server.signal(signal.SIGSTOP)
        for call in (
            lambda: fetch(store, "k", 8 << 20, 0.4),
            lambda: store.put(["k"], [Source(large)], soon(0.4)),
            lambda: store.ping(soon(0.4)),
        ):
            began = time.monotonic()
            assert cause(call) == "timeout"
            assert 0.3 < time.monotonic() - began < 5
        server.signal(signal.SIGCONT)
        assert fetch(store, "k", 8 << 20)[0].ok
    finally:
        store.close()
        server.kill()


def test_connections_that_break_never_yield_wrong_bytes(server: RedisServer, store: RedisStore) -> None:
    data = payload(2 << 20)
    store.put(["k"], [Source(data)], soon())
    proxy = Proxy(server.port)
    through = RedisStore(settings(proxy.port))
    try:
        assert fetch(through, "k", 2 << 20)[1] == data
        for mode, at in (("reset", 1_000_000), ("truncate", 1_500_000), ("reset", 0), ("truncate", 30)):
            proxy.mode, proxy.bytes = mode, at
            assert cause(lambda: fetch(through, "k", 2 << 20)) == "unreachable"
        proxy.mode = "pass"
        assert fetch(through, "k", 2 << 20) == (Outcome(Status.FOUND, 2 << 20), data)
        proxy.mode = "swallow"
        assert cause(lambda: fetch(through, "k", 2 << 20, 0.3)) == "timeout"
        proxy.mode, proxy.bytes = "slow", 20_000
        began = time.monotonic()
        assert cause(lambda: fetch(through, "k", 2 << 20, 0.5)) == "timeout", (
            "each receive succeeds, all of them take too long"
        )
        assert time.monotonic() - began < 5
        proxy.mode = "refuse"
        assert cause(lambda: fetch(through, "k", 2 << 20)) == "unreachable"
        proxy.mode = "pass"
        assert fetch(through, "k", 2 << 20)[1] == data
    finally:
        through.close()
        proxy.close()


def test_one_broken_idle_connection_costs_nothing(server: RedisServer, store: RedisStore) -> None:
    store.put(["k"], [Source(b"abc")], soon())
    proxy = Proxy(server.port)
    through = RedisStore(settings(proxy.port))
    try:
        assert fetch(through, "k", 3)[0].ok
        proxy.mode, proxy.spared_from = "reset", 2
        assert fetch(through, "k", 3)[0].ok
        assert proxy.accepted == 2
    finally:
        through.close()
        proxy.close()


def test_something_else_on_the_port_is_told_apart(server: RedisServer) -> None:
    tls = RedisStore(settings(server.port, tls=True))
    with pytest.raises(StoreUnavailable, match="whether the port speaks TLS"):
        tls.ping(soon(0.3))
    tls.close()
    cluster = RedisStore(settings(server.port, kind="cluster"))
    with pytest.raises(StoreUnavailable, match="use redis://"):
        cluster.ping(soon())
    cluster.close()
    nobody = RedisStore(replace(settings(1), addresses=(("warmroute.invalid", 6379),)))
    assert cause(nobody.ping, soon()) == "unreachable"
    nobody.close()


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority, certificate, key = make_certificates(tmp_path)
    port = RedisServer(tmp_path / "none").port
    server = RedisServer(
        tmp_path / "redis",
        f"tls-port {port}",
        f"tls-cert-file {certificate}",
        f"tls-key-file {key}",
        f"tls-ca-cert-file {authority}",
        port=0,
    ).start()
    data = payload(5 << 20)
    whole = settings(port, tls=True, ca_certs=str(authority), certificate=str(certificate), private_key=str(key))
    try:
        store = RedisStore(whole)
        store.put(["k"], [Source(data)], soon())
        assert fetch(store, "k", 5 << 20) == (Outcome(Status.FOUND, 5 << 20), data)
        store.close()
        for wrong in (replace(whole, ca_certs=""), replace(whole, certificate="", private_key="")):
            refused = RedisStore(wrong)
            assert cause(refused.ping, soon()) == "tls"
            refused.close()
        plain = RedisStore(replace(whole, tls=False))
        assert cause(plain.ping, soon()) in ("unreachable", "protocol")
        plain.close()
    finally:
        server.kill()


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = dt.datetime.now(dt.UTC)

    def certificate(
        name: str, public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(1))
        builder = builder.not_valid_after(now + dt.timedelta(1))
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = builder.add_extension(local, critical=False)
        basic = x509.BasicConstraints(ca=name == "authority", path_length=None)
        return builder.add_extension(basic, critical=True).sign(signer, hashes.SHA256())

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    authority, signed, key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    authority.write_bytes(certificate("authority", root.public_key(), root).public_bytes(pem))
    signed.write_bytes(certificate("server", leaf.public_key(), root).public_bytes(pem))
    plain = serialization.NoEncryption()
    key.write_bytes(leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return authority, signed, key


def test_large_objects_travel_nearly_as_fast_as_their_bytes_alone(server: RedisServer, store: RedisStore) -> None:
    """Against the same replies read from a plain socket into the same memory, in turns."""
    size, rounds = 16 << 20, 15
    guarded = Guarded(store)
    assert guarded.put(["large"], [Source(payload(size))], soon())[0].ok
    room = bytearray(size)
    shares = []
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        for _ in range(rounds):
            plain = timed(lambda: read_raw(raw, b"warmroute:large", room))
            shares.append(plain / timed(lambda: guarded.get(["large"], [Sink(room)], soon())))
    assert bytes(room) == payload(size)
    print(f"{statistics.median(shares):.0%} of a plain socket's speed")
    assert statistics.median(shares) > 0.6


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_raw(raw: socket.socket, key: bytes, room: bytearray) -> None:
    raw.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
    head = b"$%d\r\n" % len(room)
    assert raw.recv(len(head), socket.MSG_WAITALL) == head
    view, got = memoryview(room), 0
    while got < len(room):
        got += raw.recv_into(view[got:])
    assert raw.recv(2, socket.MSG_WAITALL) == b"\r\n"


def test_a_large_batch_is_read_over_several_connections_and_each_key_has_its_own(server: RedisServer) -> None:
    store = RedisStore(settings(server.port, connections=3))
    keys = [f"wide{at}" for at in range(9)]
    values = [payload((1 << 20) + at, at) for at in range(9)]
    assert set(status(store.put(keys, [Source(each) for each in values], soon()))) == {"stored"}
    assert _clients(server) == 1
    asked = [*keys[:5], "nothing", *keys[5:]]
    rooms = [bytearray(2 << 20) for _ in asked]
    outcomes = store.get(asked, [Sink(room) for room in rooms], soon())
    assert _clients(server) == 3
    assert [each.ok for each in outcomes] == [key != "nothing" for key in asked]
    found = [bytes(room[: each.size]) for room, each in zip(rooms, outcomes, strict=True) if each.ok]
    assert found == values
    store.close()


def _clients(server: RedisServer) -> int:
    """Connections besides the one that asks."""
    return len(command(server.port, "CLIENT", "LIST").splitlines()) - 1
