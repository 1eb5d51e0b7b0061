"""Changing a running gateway: settings, workers, leases."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from router import control
from router.admin_state import AdminState
from router.config import load
from router.control import Control
from router.discovery.dns import NameWatch
from router.discovery.names import DnsSpec
from router.reload import RELOADABLE, Reloader, Sources
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until


async def patch(gateway: RunningGateway, **settings: Any) -> Any:
    return await gateway.client.patch("/admin/config", json=settings)


def test_simulated_settings_change_at_run_time() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a, b) as gateway:
            answer = await patch(gateway, policy="round-robin", max_queue=7, connect_timeout=0.5)
            assert answer.status_code == 200
            shown = answer.json()["settings"]
            assert shown["policy"] == {"value": "round-robin", "source": "admin", "reloadable": True}
            assert shown["port"]["reloadable"] is False
            assert {(await gateway.chat("x")).headers["x-warmroute-worker"] for _ in range(2)} == {"a", "b"}
            inner = gateway.gateway
            assert inner.admission._max_queue == 7
            assert {w.upstream.timeouts.connect for w in inner.registry.workers} == {0.5}
            back = (await patch(gateway, policy=None)).json()["settings"]["policy"]
            assert back == {"value": "longest-hit", "source": "default", "reloadable": True}
            assert inner.policy.name == "longest-hit"

    run(scenario())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"port": 1}, "port: read at the start only"),
        ({"polcy": "x"}, "did you mean 'policy'"),
        ({"policy": "worst"}, "policy"),
        ({"retries": -1, "policy": "round-robin"}, "retries"),
        ({"max_queue": 5, "host": "0.0.0.0"}, "host"),
    ],
)
def test_simulated_a_wrong_change_changes_nothing(change: dict[str, Any], word: str) -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            before = gateway.gateway.settings
            answer = await patch(gateway, **change)
            assert answer.status_code == 400
            assert word in answer.json()["error"]["message"]
            assert gateway.gateway.settings is before
            assert gateway.gateway.policy.name == "longest-hit"
            assert await gateway.metric('warmroute_router_config_changes_total{result="refused"}') == 1

    run(scenario())


def test_secrets_are_not_shown() -> None:
    async def scenario() -> None:
        async with running_gateway(
            await SimulatedWorker().start(), admin_token="hunter2", report_token="hunter3"
        ) as gateway:
            gateway.client.headers["authorization"] = "Bearer hunter2"
            text = (await gateway.client.get("/admin/config")).text
            assert "hunter" not in text
            assert "admin_token" in text

    run(scenario())


def write(path: Path, text: str) -> None:
    """As careful editors and Kubernetes do: another file takes the name."""
    beside = path.with_suffix(".next")
    beside.write_text(text)
    beside.replace(path)


def test_simulated_the_file_is_watched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        file = tmp_path / "router.yaml"
        text = f"workers: ['{a.spec('a')}']\nmax_queue: 3\n"
        file.write_text(text)
        async with running_gateway(a, file=file, config_interval=0.02) as gateway:
            inner = gateway.gateway
            assert inner.settings.max_queue == 3
            write(file, text + "policy: least-loaded\n")
            await until(lambda: inner.policy.name == "least-loaded")

            write(file, "workers: [\n")
            await until(lambda: inner.control.reloader.refused == 1)
            write(file, "host: 0.0.0.0\nretries: 9\n")
            await until(lambda: inner.control.reloader.refused == 2)
            assert "host: read at the start only" in (await gateway.get("/admin/config"))["error"]
            assert [worker.name for worker in inner.registry.workers] == ["a"]
            assert inner.settings.retries == 2
            file.unlink()
            await until(lambda: inner.control.reloader.refused == 3)
            assert "is gone or empty" in caplog.text

            write(file, f"workers: ['{b.spec('b')}']\n")
            await until(lambda: [worker.name for worker in inner.registry.workers] == ["b"])
            assert (await gateway.get("/admin/config"))["error"] is None
            await until(lambda: inner.registry.workers[0].up)
            assert (await gateway.chat("x")).headers["x-warmroute-worker"] == "b"
            assert await gateway.metric('warmroute_router_config_changes_total{result="applied"}') == 2
        await b.kill()

    caplog.set_level(logging.ERROR)
    run(scenario())


def test_a_file_being_written_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("max_queue: 1\n")
    sources = Sources({}, {}, str(file))
    applied: list[int] = []
    reloader = Reloader(sources.load(), sources, lambda settings: applied.append(settings.max_queue))
    for size in range(2, 5):
        file.write_text("max_queue: " + "1" * size)
        os.utime(file, ns=(size, size))
        reloader.look()
    assert applied == []
    reloader.look()
    reloader.look()
    assert applied == [1111]


def test_flags_stay_above_the_file_and_overrides_above_both(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("max_queue: 1\nretries: 1\nmax_headers: 1\n")
    sources = Sources({"retries": 5}, {"WARMROUTE_MAX_HEADERS": "7"}, str(file))
    reloader = Reloader(sources.load(), sources, lambda _: None)
    reloader.set({"max_queue": 9})
    assert (reloader.settings.max_queue, reloader.settings.retries, reloader.settings.max_headers) == (9, 5, 7)
    named = {
        name: sources.origin(name, reloader.overrides, reloader.settings)
        for name in ("max_queue", "retries", "max_headers", "seed")
    }
    assert named == {"max_queue": "admin", "retries": "flag", "max_headers": "environment", "seed": "default"}


def test_what_can_be_changed_exists() -> None:
    assert set(type(load({}, {})).model_fields) >= RELOADABLE


def test_simulated_leases_end_and_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.05)

    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a) as gateway:
            inner = gateway.gateway
            body = {"url": b.url, "reports": f"127.0.0.1:{b.report_port}", "name": "b", "ttl": 0.4}
            first = await gateway.client.post("/admin/workers", json=body)
            assert (first.status_code, first.json()["lease"]["ttl"]) == (201, 0.4)
            assert first.json()["named_by"] == ["admin"]
            for _ in range(4):
                await asyncio.sleep(0.2)
                assert (await gateway.client.post("/admin/workers", json=body)).status_code == 200
            assert inner.registry.get("b") is not None
            await until(lambda: inner.registry.get("b") is None)
            assert inner.control.state.workers == {}
            refused = await gateway.client.post("/admin/workers", json={**body, "ttl": -1})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ttl")
        await b.kill()

    run(scenario())


def test_simulated_a_lease_that_ends_drains_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.05)

    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        b.hold_head.clear()
        async with running_gateway(drain_timeout=5) as gateway:
            inner = gateway.gateway
            body = {"url": b.url, "reports": f"127.0.0.1:{b.report_port}", "name": "b", "ttl": 0.3}
            await gateway.client.post("/admin/workers", json=body)
            await until(lambda: inner.registry.workers[0].up)
            asking = asyncio.create_task(gateway.chat("x"))
            await until(lambda: b.served("/v1/chat/completions"))
            await until(lambda: inner.registry.workers[0].draining)
            assert (await gateway.worker("b"))["leaving"]
            held = inner.registry.workers[0]
            assert (await gateway.client.post("/admin/workers", json={**body, "ttl": 60})).status_code == 201
            assert inner.registry.workers == (held,)
            assert not held.draining
            await gateway.client.post("/admin/workers", json={**body, "ttl": 0.05})
            await until(lambda: held.draining)
            b.hold_head.set()
            assert (await asking).status_code == 200
            await until(lambda: not inner.registry.workers)
        await a.kill()
        await b.kill()

    run(scenario())


def test_simulated_removed_and_drained_by_hand_outlast_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.05)

    async def scenario() -> None:
        a, b, c = [await SimulatedWorker().start() for _ in range(3)]
        both = f"workers: ['{a.spec('a')}', '{b.spec('b')}']\n"
        file = tmp_path / "router.yaml"
        file.write_text(both)
        async with running_gateway(a, b, file=file, config_interval=0.02) as gateway:
            inner, client = gateway.gateway, gateway.client

            def names() -> list[str]:
                return sorted(worker.name for worker in inner.registry.workers)

            await client.post("/admin/workers", json={"url": c.url, "reports": "none", "name": "c"})
            await client.post("/admin/workers/drain", json={"worker": "b"})
            await client.delete("/admin/workers", params={"worker": "a"})
            write(file, both + "max_queue: 4\n")
            await until(lambda: inner.settings.max_queue == 4)
            assert names() == ["b", "c"]
            assert (await gateway.worker("b"))["draining"]
            assert (await gateway.worker("c"))["named_by"] == ["admin"]

            write(file, "workers: []\n")
            await until(lambda: names() == ["c"])
            await until(lambda: not inner.control.state.removed and not inner.control.state.drained)
            write(file, both)
            await until(lambda: names() == ["a", "b", "c"])
            assert not (await gateway.worker("b"))["draining"], "nobody drained the one that is there now"
        await c.kill()

    run(scenario())


def test_simulated_a_worker_that_left_and_comes_again_is_drained_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was told to leave by ``warmroute drain`` is another when it registers after its restart."""
    monkeypatch.setattr(control, "TICK_S", 0.05)

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(drain_timeout=5) as gateway:
            inner, client = gateway.gateway, gateway.client
            body = {"url": worker.url, "reports": "none", "name": "b", "ttl": 60}
            await client.post("/admin/workers", json=body)
            await client.post("/admin/workers/drain", json={"worker": "b"})
            for _ in range(3):
                await inner.control._look_around()
            assert (await gateway.worker("b"))["draining"], "it is still there"
            await client.post("/admin/workers", json={**body, "ttl": 0.001})
            await until(lambda: not inner.registry.workers and not inner.control.state.drained)
            await client.post("/admin/workers", json=body)
            assert not (await gateway.worker("b"))["draining"]
        await worker.kill()

    run(scenario())


def test_a_name_with_other_options_keeps_its_workers_until_it_is_looked_up() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        discover = f"dns://127.0.0.1:{worker.port},reports={worker.report_port}"
        async with running_gateway(discover=discover, discovery_interval=60) as gateway:
            await until(lambda: any(held.up for held in gateway.gateway.registry.workers))
            (held,) = gateway.gateway.registry.workers
            names = gateway.gateway.control._names
            gateway.gateway.control._claim_settings(load({"discover": f"dns://127.0.0.1:{worker.port},reports=none"}))
            gateway.gateway.control.membership.settle()
            assert len(names) == 1
            assert not held.draining
            await until(lambda: gateway.gateway.registry.workers[0].spec.reports == "none")
            gateway.gateway.control._claim_settings(load({}))
            gateway.gateway.control.membership.settle()
            await until(lambda: not gateway.gateway.registry.workers)
        await worker.kill()

    run(scenario())


def test_what_operators_said_waits_for_whoever_looks_for_workers() -> None:
    """A process that has just started knows no worker yet, and does not speak for the others."""

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            inner = gateway.gateway.control
            unheard = NameWatch(DnsSpec.parse("dns://nowhere:1"), lambda _: None, interval=60, timeout=1)
            state = AdminState(removed=frozenset({"http://a"}), drained=frozenset({"http://b"}))
            assert inner._gone(state) == {"http://a", "http://b"}
            inner._names[unheard.spec] = unheard, asyncio.create_task(asyncio.sleep(0))
            assert inner._gone(state) == set()
            unheard.answered_at = 1.0
            assert inner._gone(state) == {"http://a", "http://b"}

    run(scenario())


def test_simulated_two_of_one_name_are_refused() -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(a) as gateway:
            answer = await gateway.client.post("/admin/workers", json={"url": b.url, "name": "a", "ttl": 5})
            assert (answer.status_code, answer.json()["error"]["param"]) == (409, "url")
            assert gateway.gateway.control.state.version == 0
        await b.kill()

    run(scenario())


def test_simulated_a_changed_description_replaces_the_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker().start()
        file = tmp_path / "router.yaml"
        file.write_text(f"workers: ['{a.url},reports=none,name=a']\n")
        async with running_gateway(file=file, config_interval=0.02) as gateway:
            inner = gateway.gateway
            await gateway.chat("x")
            old = inner.registry.workers[0]
            write(file, f"workers: ['{a.spec('a')}']\n")
            await until(lambda: inner.registry.workers[0] is not old)
            await until(lambda: inner.registry.workers[0].synced)
            await asyncio.sleep(0.3)
            assert inner.registry.workers[0].synced, "the worker before, of the same name, took the index along"
            assert await gateway.metric('warmroute_router_worker_up{worker="a"}') == 1
        await a.kill()

    run(scenario())


def test_keys_by_reference_are_refused_over_http() -> None:
    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            body = {"url": "http://127.0.0.1:1", "reports": "none", "key": "file:/etc/hostname"}
            answer = await gateway.client.post("/admin/workers", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "key")

    run(scenario())


def test_control_is_made_without_sources() -> None:
    """Settings made in the program can be overridden too."""

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            assert isinstance(gateway.gateway.control, Control)
            gateway.gateway.control.reload()
            assert [worker.name for worker in gateway.gateway.registry.workers] == ["a"]

    run(scenario())
