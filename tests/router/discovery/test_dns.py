"""Workers found by name."""

import asyncio
import logging
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import WorkerSpec, load
from router.discovery import dns
from router.discovery.dns import MISSING, AddressResolver, LookupFailed, NameWatch
from router.discovery.names import DnsSpec
from router.errors import ConfigError
from tests.support.simulated_worker import SimulatedWorker, run, running_gateway, until

NAME = DnsSpec.parse("dns://fleet.test:8000")


class Zone:
    """Answers as the test says; an exception is raised."""

    def __init__(self) -> None:
        self.answer: Any = []

    async def __call__(self, spec: DnsSpec) -> list[tuple[str, int]]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return [(host, spec.port) for host in self.answer]


def watch_of(zone: Zone, seen: list[list[WorkerSpec]], spec: DnsSpec = NAME) -> NameWatch:
    return NameWatch(spec, seen.append, interval=0.01, timeout=0.2, resolve=zone)


def hosts(seen: list[list[WorkerSpec]]) -> list[str]:
    return [worker.host for worker in seen[-1]]


def test_every_address_is_a_worker() -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        zone.answer = ["10.0.0.2", "10.0.0.1", "fd00::1"]
        await watch_of(zone, seen, DnsSpec.parse("dns://fleet.test:8000,reports=6000")).look_up()
        assert [worker.url for worker in seen[0]] == [
            "http://10.0.0.1:8000",
            "http://10.0.0.2:8000",
            "http://[fd00::1]:8000",
        ]
        assert [worker.report_address for worker in seen[0]][::2] == [("10.0.0.1", 6000), ("fd00::1", 6000)]

    run(scenario())


def test_an_answer_that_names_no_machine_is_left_out_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A target of "." says that there is no such service."""

    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        zone.answer = ["", "10.0.0.1"]
        watch = watch_of(zone, seen)
        task = asyncio.create_task(watch.run())
        await until(lambda: seen)
        assert hosts(seen) == ["10.0.0.1"]
        zone.answer = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: hosts(seen) == ["10.0.0.1", "10.0.0.2"])
        assert not task.done()
        task.cancel()

    run(scenario())
    assert any("is no worker" in record.message for record in caplog.records)


def test_whatever_becomes_of_what_was_found_the_name_is_looked_up_again() -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()

        def found(workers: list[WorkerSpec]) -> None:
            if not seen:
                seen.append([])
                raise RuntimeError("not now")
            seen.append(workers)

        zone.answer = ["10.0.0.1"]
        watch = NameWatch(NAME, found, interval=0.01, timeout=0.2, resolve=zone)
        task = asyncio.create_task(watch.run())
        await until(lambda: len(seen) > 1)
        assert hosts(seen) == ["10.0.0.1"]
        assert not watch.error
        task.cancel()

    run(scenario())


def test_every_rank_of_an_address_is_a_worker() -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        zone.answer = ["10.0.0.1"]
        await watch_of(zone, seen, DnsSpec.parse("dns://fleet.test:8000,dp=2")).look_up()
        assert [worker.url for worker in seen[0]] == ["http://10.0.0.1:8000#0", "http://10.0.0.1:8000#1"]
        assert [worker.report_address for worker in seen[0]] == [("10.0.0.1", 5571), ("10.0.0.1", 5572)]

    run(scenario())


@pytest.mark.parametrize("trouble", [[], LookupFailed("no such name"), OSError("no network"), "hang"])
def test_trouble_keeps_the_last_known_set(trouble: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        zone.answer = ["10.0.0.1"]
        watch = watch_of(zone, seen)
        await watch.look_up()
        if trouble == "hang":
            watch._resolve = lambda _: asyncio.sleep(60, [])
        zone.answer = trouble
        for _ in range(MISSING + 2):
            await watch.look_up()
        assert len(seen) == 1
        assert watch.endpoints == [("10.0.0.1", 8000)]
        assert watch.describe()["error"]
        assert caplog.text.count("looking up dns://fleet.test:8000 failed") == 1
        assert "its last 1 workers are kept" in caplog.text

    run(scenario())


def test_an_address_goes_after_it_was_missing_again_and_again() -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        zone.answer = ["10.0.0.1", "10.0.0.2"]
        watch = watch_of(zone, seen)
        await watch.look_up()
        for _ in range(MISSING - 1):
            zone.answer = ["10.0.0.1"]
            await watch.look_up()
            assert hosts(seen) == ["10.0.0.1", "10.0.0.2"]
        zone.answer = ["10.0.0.1", "10.0.0.2"]
        await watch.look_up()
        zone.answer = ["10.0.0.1"]
        for _ in range(MISSING):
            await watch.look_up()
        assert hosts(seen) == ["10.0.0.1"]

    run(scenario())


@given(st.lists(st.one_of(st.none(), st.frozensets(st.integers(1, 5))), max_size=25))
def test_what_is_claimed_is_what_was_lately_answered(answers: list[frozenset[int] | None]) -> None:
    async def scenario() -> None:
        zone, seen = Zone(), list[list[WorkerSpec]]()
        watch = watch_of(zone, seen)
        good: list[set[str]] = []
        for answer in answers:
            zone.answer = OSError("x") if answer is None else [f"10.0.0.{number}" for number in answer]
            await watch.look_up()
            if answer:
                good.append({f"10.0.0.{number}" for number in answer})
        lately = set().union(*good[-MISSING:])
        assert set(hosts(seen) if seen else ()) == lately

    logging.getLogger("router.discovery.dns").setLevel(logging.CRITICAL)
    asyncio.run(scenario())
    logging.getLogger("router.discovery.dns").setLevel(logging.NOTSET)


def test_a_resolver_that_hangs_is_not_asked_again_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    release = threading.Event()

    def stuck(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        release.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.9", port))]

    monkeypatch.setattr(dns.socket, "getaddrinfo", stuck)

    async def scenario() -> None:
        seen: list[list[WorkerSpec]] = []
        watch = NameWatch(NAME, seen.append, interval=0.01, timeout=0.05, resolve=AddressResolver())
        await watch.look_up()
        await until(lambda: asked)
        for _ in range(2):
            await watch.look_up()
        assert asked == ["fleet.test"]
        assert "no answer within" in watch.error
        release.set()
        async with asyncio.timeout(20):
            while not seen:
                await watch.look_up()
                await asyncio.sleep(0.01)
        assert hosts(seen) == ["10.0.0.9"]

    run(scenario())


def test_simulated_workers_of_a_name_serve_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        found = ["127.0.0.1"]

        async def resolve(self: AddressResolver, spec: DnsSpec) -> list[tuple[str, int]]:
            del self
            return [(host, spec.port) for host in found]

        monkeypatch.setattr(AddressResolver, "__call__", resolve)
        name = f"dns://fleet.test:{worker.port},reports={worker.report_port}"
        async with running_gateway(discover=[name], discovery_interval=0.02) as gateway:
            inner = gateway.gateway
            assert (await gateway.chat("x")).headers["x-warmroute-worker"] == f"127.0.0.1:{worker.port}"
            shown = await gateway.get("/admin/workers")
            assert shown["workers"][0]["named_by"] == [f"dns://fleet.test:{worker.port}"]
            assert shown["names"] == [
                {"name": f"dns://fleet.test:{worker.port}", "workers": [f"127.0.0.1:{worker.port}"], "error": ""}
            ]
            found[:] = ["127.0.0.9"]
            await until(lambda: [item.spec.host for item in inner.registry.workers] == ["127.0.0.9"])
        await worker.kill()

    run(scenario())


def test_the_system_resolves_this_machines_name() -> None:
    assert ("127.0.0.1", 80) in asyncio.run(AddressResolver()(DnsSpec.parse("dns://localhost:80")))
    with pytest.raises(LookupFailed):
        asyncio.run(AddressResolver()(DnsSpec.parse("dns://no-such-name.invalid:80")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dns://fleet", "names no port"),
        ("dns://:80", "dns://NAME:PORT"),
        ("dns+srv://fleet:80", "name the port themselves"),
        ("dns://fleet:80,name=x", "only reports=PORT"),
        ("dns://fleet:80,reports=host:1", "a port number or none"),
        ("http://fleet:80", "dns://NAME:PORT"),
    ],
)
def test_names_are_checked(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load({"discover": [text]}, {})


def test_names_may_be_given_as_workers() -> None:
    settings = load({"workers": "http://a:1 dns://fleet:80"}, {"WARMROUTE_DISCOVER": "dns://other:81"})
    assert [worker.url for worker in settings.workers] == ["http://a:1"]
    assert {spec.title for spec in settings.discover} == {"dns://fleet:80", "dns://other:81"}
