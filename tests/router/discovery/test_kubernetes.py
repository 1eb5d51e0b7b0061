"""Workers found by watching the Kubernetes API."""

import asyncio
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lightkube.config.kubeconfig import KubeConfig

from router.config import load
from router.discovery import kubernetes
from router.discovery.kubernetes import PodWatch, check_kubernetes
from router.discovery.names import NOT_READY, TERMINATING, PodSpec
from router.discovery.pods import Found
from router.errors import ConfigError
from tests.router.test_tls import certificates
from tests.support.fake_kubernetes import USER, FakeKubernetes, fake_kubernetes
from tests.support.simulated_worker import run, until

PODS = PodSpec(selector="app=vllm")
PATIENT = 20.0


class Seen:
    """What a watch found, as of now."""

    def __init__(self) -> None:
        self.calls: list[Found] = []

    def __call__(self, origin: str, found: Found) -> None:
        assert origin == PODS.title or "app=" in origin
        self.calls.append(found)

    @property
    def names(self) -> list[str]:
        return [worker.name for worker in self.calls[-1].workers] if self.calls else []

    @property
    def held(self) -> dict[str, str]:
        return self.calls[-1].held if self.calls else {}


@asynccontextmanager
async def watched(spec: PodSpec = PODS, **arguments: Any) -> AsyncIterator[tuple[PodWatch, Seen]]:
    """A watch that runs, once the API has been asked."""
    seen = Seen()
    watch = PodWatch(spec, seen, rng=random.Random(1), **arguments)
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(PATIENT):
            await watch.looked_up.wait()
        yield watch, seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


Scenario = Callable[[FakeKubernetes], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    """Runs a scenario with a fake API server that the environment names."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kubernetes, "BACKOFF_S", (0.02, 0.2))

    def play(scenario: Scenario) -> None:
        async def with_server() -> None:
            async with fake_kubernetes() as server:
                monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
                await scenario(server)

        run(with_server())

    return play


Play = Callable[[Scenario], None]


def test_ready_pods_are_workers_as_the_settings_describe_them(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a", "10.0.0.1", ports={"http": 8001, "kv": 6000})
        server.add("b", "fd00::1", ports={"http": 8002, "kv": 6001}, annotations={"warmroute/dp": "2"})
        server.add("other", "10.0.0.9", labels={"app": "web"})
        spec = PodSpec(selector="app=vllm", port="http", reports="kv", scheme="https")
        async with watched(spec) as (watch, seen):
            assert [(worker.url, worker.title) for worker in seen.calls[0].workers] == [
                ("https://10.0.0.1:8001", "a"),
                ("https://[fd00::1]:8002#0", "b#0"),
                ("https://[fd00::1]:8002#1", "b#1"),
            ]
            addresses = [worker.report_address for worker in seen.calls[0].workers]
            assert addresses == [("10.0.0.1", 6000), ("fd00::1", 6001), ("fd00::1", 6002)]
            assert watch.counts == (2, 0)
            await until(lambda: watch.describe()["error"] == "", PATIENT)

    play(scenario)


def test_a_pod_that_is_not_ready_is_no_worker_until_it_is(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a", ready=False)
        async with watched() as (_, seen):
            assert seen.names == []
            server.ready("a", ready=True)
            await until(lambda: seen.names == ["a"], PATIENT)

    play(scenario)


def test_a_pod_that_loses_readiness_is_held_and_stays(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched() as (watch, seen):
            server.ready("a", ready=False)
            await until(lambda: seen.held, PATIENT)
            assert seen.names == ["a"]
            assert set(seen.held.values()) == {NOT_READY}
            assert watch.counts == (0, 1)
            server.ready("a", ready=True)
            await until(lambda: not seen.held, PATIENT)

    play(scenario)


def test_a_terminating_pod_is_held_until_it_is_gone(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        server.add("b", "127.0.0.2")
        async with watched() as (_, seen):
            server.terminate("a")
            await until(lambda: set(seen.held.values()) == {TERMINATING}, PATIENT)
            assert seen.names == ["a", "b"]
            server.delete("a")
            await until(lambda: seen.names == ["b"], PATIENT)
            assert not seen.held

    play(scenario)


def test_a_pod_that_terminates_when_first_seen_is_no_worker(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        server.terminate("a")
        async with watched() as (_, seen):
            assert seen.names == []

    play(scenario)


def test_another_pod_at_an_address_is_another_worker(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("stateful-0", "10.0.0.1")
        async with watched() as (_, seen):
            server.delete("stateful-0")
            await until(lambda: seen.names == [], PATIENT)
            server.add("stateful-0", "10.0.0.1")
            await until(lambda: seen.names == ["stateful-0"], PATIENT)
            assert seen.calls[-1].replaced == {"http://10.0.0.1:8000"}
            assert [call.replaced for call in seen.calls[:-1]] == [set(), set()]

    play(scenario)


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_pod_that_has_ended_leaves_its_address_to_others(phase: str, play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("evicted", "10.0.0.1")
        async with watched() as (_, seen):
            server.set("evicted", phase=phase)
            await until(lambda: seen.names == [], PATIENT)
            server.add("next", "10.0.0.1")
            await until(lambda: seen.names == ["next"], PATIENT)
            assert not seen.held

    play(scenario)


@pytest.mark.parametrize("by_status", [False, True])
def test_when_versions_are_forgotten_everything_is_listed_again(by_status: bool, play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.gone_by_status = by_status
        server.bookmark_every = 60.0
        server.add("a")
        server.add("b", "127.0.0.2")
        async with watched() as (watch, seen):
            await until(lambda: server.watching, PATIENT)
            await server.stop()
            server.delete("a")
            server.add("c", "127.0.0.3")
            server.compact()
            await server.start()
            await until(lambda: seen.names == ["b", "c"], PATIENT)
            assert watch.relists == {"start": 1, "expired": 1, "failed": 0} or watch.relists["failed"]

    play(scenario)


def test_a_watch_goes_on_from_the_last_bookmark(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.bookmark_every = 0.02
        server.add("a")
        async with watched() as (watch, seen):
            await until(lambda: server.watching, PATIENT)
            for _ in range(3):  # others' pods: nothing but bookmarks comes of them
                server.add("web", labels={"app": "web"})
            at = server.version
            await until(lambda: watch._version == str(at), PATIENT)
            server.compact()
            server.cut()
            server.add("b", "127.0.0.2")
            await until(lambda: seen.names == ["a", "b"], PATIENT)
            assert watch.relists == {"start": 1, "expired": 0, "failed": 0}
            assert [verb for verb, _ in server.asked].count("list") == 1

    play(scenario)


def test_watches_end_by_the_servers_clock_and_go_on(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched(watch_seconds=1.0) as (watch, seen):
            await until(lambda: [verb for verb, _ in server.asked].count("watch") > 2, PATIENT)
            assert all(query["timeoutSeconds"] == "1" for verb, query in server.asked if verb == "watch")
            assert watch.relists["start"] == 1
            assert watch.error == ""
            assert len(seen.calls) == 1

    play(scenario)


def test_a_connection_that_went_dead_is_noticed(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes, "PATIENCE_S", 0.3)

    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched(watch_seconds=1.0) as (_, seen):
            await until(lambda: server.watching, PATIENT)
            server.half_open = True
            server.add("b", "127.0.0.2")
            await until(lambda: "fell silent" in caplog.text, PATIENT)
            assert seen.names == ["a"]
            server.half_open = False
            await until(lambda: seen.names == ["a", "b"], PATIENT)

    play(scenario)


def test_the_last_known_workers_stay_while_the_api_is_gone(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched() as (watch, seen):
            await until(lambda: server.watching, PATIENT)
            await server.stop()
            await until(lambda: watch._failures > 5, PATIENT)
            assert seen.names == ["a"]
            assert watch.describe()["workers"] == ["a"]
            assert "ConnectError" in watch.error
            said = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert len(said) <= 3, "an outage is said once, not for every attempt"
            assert "the last 1 workers are kept" in caplog.text
            await server.start()
            server.add("b", "127.0.0.2")
            await until(lambda: seen.names == ["a", "b"], PATIENT)
            await until(lambda: not watch.error, PATIENT)

    play(scenario)


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_missing_right_is_named_with_its_cure(verb: str, play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.forbidden = {verb}
        server.add("a")
        async with watched() as (watch, seen):
            await until(lambda: watch._failures > 2, PATIENT)
            said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
            assert len(said) == 1
            assert f"{USER} may not {verb} pods in namespace ml (403)" in said[0]
            assert '{apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]}' in said[0]
            server.forbidden = set()
            await until(lambda: seen.names == ["a"] and not watch.error, PATIENT)

    play(scenario)


def test_a_token_that_expired_is_read_again(play: Play, tmp_path: Path) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched() as (watch, seen):
            await until(lambda: server.watching, PATIENT)
            server.tokens = {"rotated"}
            server.cut()
            await until(lambda: "401" in watch.error, PATIENT)
            (tmp_path / "token").write_text("rotated\n")
            server.add("b", "127.0.0.2")
            await until(lambda: seen.names == ["a", "b"], PATIENT)

    play(scenario)


def test_long_lists_come_in_pages(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "PAGE", 10)

    async def scenario(server: FakeKubernetes) -> None:
        for number in range(25):
            server.add(f"pod-{number:02}", f"10.0.0.{number}")
        async with watched() as (_, seen):
            assert len(seen.names) == 25
            assert [query.get("continue") for verb, query in server.asked if verb == "list"] == [None, "10", "20"]
        server.gone_while_paging = 1
        async with watched() as (_, seen):
            assert len(seen.names) == 25

    play(scenario)


def test_no_pods_is_an_answer_too(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched() as (_, seen):
            server.delete("a")
            await until(lambda: seen.calls[-1].workers == [], PATIENT)

    play(scenario)


def test_a_pod_without_the_named_port_is_left_out_and_named(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a", ports={"metrics": 9000})
        server.add("b", "127.0.0.2", ports={"http": 8000})
        async with watched(PodSpec(selector="app=vllm", port="http")) as (watch, seen):
            assert seen.names == ["b"]
            why = "it has no container port named 'http'; it names: metrics"
            assert watch.describe()["problems"] == {"a": why}
            assert f"pod a is no worker: {why}" in caplog.text

    play(scenario)


def test_what_no_server_should_send_does_not_end_the_watch(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        async with watched() as (watch, seen):
            await until(lambda: server.watching, PATIENT)
            server.history.append((server.version + 1, "MODIFIED", {"metadata": {"labels": {"app": "vllm"}, "uid": 7}}))
            server.version += 1
            await until(lambda: watch.relists["failed"], PATIENT)
            server.add("b", "127.0.0.2")
            await until(lambda: seen.names == ["a", "b"], PATIENT)

    play(scenario)


def test_an_api_that_takes_connections_and_says_nothing_is_named(play: Play, tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def scenario(server: FakeKubernetes) -> None:
        async with await asyncio.start_server(silent, "127.0.0.1", 0) as listener:
            real, server.port = server.port, listener.sockets[0].getsockname()[1]
            server.kubeconfig(tmp_path / "config")
            async with watched(timeout=0.2) as (watch, _):
                assert watch.error == "the API did not answer within 0.2 s"
            server.port = real

    play(scenario)


def test_what_could_not_be_made_of_the_pods_is_made_of_the_next_list(play: Play) -> None:
    async def scenario(server: FakeKubernetes) -> None:
        server.add("a")
        calls = list[list[str]]()

        def found(_: str, found: Found) -> None:
            calls.append([worker.name for worker in found.workers])
            if len(calls) == 2:
                raise RuntimeError("not now")

        watch = PodWatch(PODS, found, rng=random.Random(1))
        task = asyncio.create_task(watch.run())
        await until(lambda: calls and server.watching, PATIENT)
        server.add("b", "127.0.0.2")
        await until(lambda: calls[-1] == ["a", "b"] and len(calls) == 3, PATIENT)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    play(scenario)


def test_inside_a_cluster_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token, read again once it was refused; its CA; and its namespace, where none is set."""
    made = certificates(tmp_path)
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_text(Path(made["ca.pem"]).read_text())
    (account / "namespace").write_text("ml")
    (account / "token").write_text("good")
    monkeypatch.setattr(KubeConfig, "from_env", lambda: KubeConfig.from_service_account(account))

    async def scenario() -> None:
        server = FakeKubernetes()
        server.tls = made["server.pem"], made["server.key"]
        await server.start()
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        server.add("a")
        try:
            async with watched() as (watch, seen):
                await until(lambda: server.watching, PATIENT)
                assert seen.names == ["a"]
                (account / "token").write_text("rotated")
                server.tokens = {"rotated"}
                server.cut()
                server.add("b", "127.0.0.2")
                await until(lambda: seen.names == ["a", "b"], PATIENT)
                assert "401" not in watch.error
        finally:
            await server.stop()

    run(scenario())


def test_without_credentials_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    async def scenario() -> None:
        async with watched():
            assert "no credentials for the Kubernetes API" in caplog.text

    run(scenario())


def test_without_the_client_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kubernetes("")
    check_kubernetes("app=vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_kubernetes("")
    with pytest.raises(ConfigError, match=r"warmroute\[k8s\]"):
        check_kubernetes("app=vllm")


def test_the_client_library_is_not_imported_unless_it_is_used() -> None:
    import subprocess

    code = "import sys, router.app, router.serve; sys.exit('lightkube' in sys.modules or 'httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_describe_the_pods() -> None:
    settings = load({"kubernetes_selector": "app=vllm,role!=draft", "kubernetes_port": "http"}, {})
    assert settings.pods == PodSpec(selector="app=vllm,role!=draft", port="http")
    assert load({}, {}).pods is None
    for wrong in ({"kubernetes_port": "0"}, {"kubernetes_port": "HTTP"}, {"kubernetes_namespace": "a/b"}):
        with pytest.raises(ConfigError, match=r"a-z|65535"):
            load({"kubernetes_selector": "app=vllm", **wrong}, {})
