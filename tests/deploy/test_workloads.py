"""What containers run and with what settings, held against the programs that run in them."""

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
import yaml

from router import worker_command
from router.access import hash_key, make_key
from router.cli import app
from router.config import Settings, load
from router.discovery.kubernetes import PodWatch
from router.discovery.pods import Pod, Pods
from router.endpoints import OWN
from router.serve import check
from tests.deploy.manifests import OVERLAYS, Workload, command, of_kind, quantity, rendered, values, workloads
from tests.support.fake_kubernetes import fake_kubernetes
from worker_connector.config import SETTINGS, ConnectorConfig

KEY = "k" * 40
LITERALS = {
    "configMapKeyRef/warmroute-model/MODEL": "some/model",
    "secretKeyRef/warmroute-secrets/hf-token": "hf",
    "secretKeyRef/warmroute-secrets/report-token": KEY,
    "secretKeyRef/warmroute-secrets/worker-api-key": KEY,
    "secretKeyRef/warmroute-valkey/password": "p4ssw0rd",
    "fieldRef/metadata.name": "pod-0",
    "fieldRef/status.podIP": "10.0.0.7",
}
# Read by what the images bring along: the model hub's client, PyTorch, Triton, getpass, and any program.
OTHERS = {
    *("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "HOME", "USER"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
}
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def routers(overlay: str) -> list[Workload]:
    return [made for made in workloads(rendered(overlay)) if made.component.endswith("router")]


def engines(overlay: str) -> list[Workload]:
    return [made for made in workloads(rendered(overlay)) if made.component in ("worker", "prefill")]


def engine_of(made: Workload) -> dict[str, Any]:
    (container,) = made.spec["containers"]
    return dict(container)


def mounted(overlay: str, made: Workload, root: Path) -> None:
    """The files that a pod finds, under ``root`` in place of /."""
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind(rendered(overlay), "ConfigMap")}
    volumes = {volume["name"]: volume for volume in made.spec["volumes"]}
    for mount in made.container("router")["volumeMounts"]:
        folder = root / mount["mountPath"].lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        volume = volumes[mount["name"]]
        if "configMap" in volume:
            for name, text in maps[volume["configMap"]["name"]].items():
                (folder / name).write_text(text.replace("/etc/", f"{root}/etc/"))
        for item in volume.get("secret", {}).get("items", ()):
            (folder / item["path"]).write_text(KEY)
        if volume.get("secret", {}).get("secretName") == "warmroute-api-keys":
            keys = {"keys": [{"name": "team-a", "hash": hash_key(make_key())}]}
            (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
            (folder / "keys.yaml").chmod(0o440)


def settings_of(overlay: str, made: Workload, root: Path) -> Settings:
    """As ``warmroute serve`` would read them in the pod."""
    mounted(overlay, made, root)
    container = made.container("router")
    environ = values(container, LITERALS)
    flags = flags_of(command(container, environ))
    return load({}, environ, str(root) + flags["config"])


def flags_of(words: list[str]) -> dict[str, Any]:
    """As the program's own parser reads them."""
    program, name, *arguments = words
    assert program == "warmroute"
    group: Any = typer.main.get_command(app)
    context = group.commands[name].make_context(name, arguments)
    return {key: value for key, value in context.params.items() if value not in (None, [], ())}


@every_overlay
def test_routers_start_with_the_files_they_are_given(overlay: str, tmp_path: Path) -> None:
    assert routers(overlay)
    for made in routers(overlay):
        settings = settings_of(overlay, made, tmp_path / made.name)
        check(settings)
        assert settings.host == "0.0.0.0"
        assert settings.port == made.ports()["http"]
        assert settings.admin_token.get_secret_value() == KEY
        assert settings.worker_api_key.get_secret_value() == KEY
        assert settings.api_keys_file or KEY in settings.api_keys.get_secret_value()
        assert settings.open_probes, "the kubelet shows no key"


@every_overlay
def test_routers_may_drain_before_they_are_killed(overlay: str, tmp_path: Path) -> None:
    for made in routers(overlay):
        settings = settings_of(overlay, made, tmp_path / made.name)
        longest = settings.drain_delay + settings.drain_timeout + settings.drain_idle
        assert made.spec["terminationGracePeriodSeconds"] > longest
        probe = made.container("router")["readinessProbe"]
        noticed = probe["periodSeconds"] * probe["failureThreshold"]
        assert settings.drain_delay > noticed, "the Service would still send when the port closes"


@every_overlay
def test_routers_find_the_pods_of_the_workers(overlay: str, tmp_path: Path) -> None:
    """Each kind of worker by exactly one router, at the port of its API and that of its reports."""
    found: dict[str, str] = {}
    for router in routers(overlay):
        settings = settings_of(overlay, router, tmp_path / router.name)
        assert settings.pods is not None
        wanted = dict(part.split("=") for part in settings.kubernetes_selector.split(","))
        for made in workloads(rendered(overlay)):
            if wanted.items() <= dict(made.labels).items():
                pod = _ready_pod(made)
                pods = Pods(settings.pods)
                pods.put(pod)
                (worker,) = pods.found().workers
                assert not pods.problems
                assert worker.port == made.ports()["http"]
                connector = "warmroute" in engine_of(made)["command"]
                reports = ("10.0.0.7", made.ports()["reports"]) if connector else None
                assert worker.report_address == reports
                found[made.name] = router.name
    assert sorted(found) == sorted(made.name for made in engines(overlay))


def _ready_pod(made: Workload) -> Pod:
    status = {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]}
    metadata = {"name": f"{made.name}-0", "uid": made.name, "labels": dict(made.labels)}
    return msgspec.convert({"metadata": metadata, "spec": dict(made.spec), "status": status}, Pod)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """What discovery asks of the Kubernetes API."""
    folder = tmp_path_factory.mktemp("rights")

    async def watch() -> set[tuple[str, str]]:
        (router,) = routers("base")
        pods = settings_of("base", router, folder / "pod").pods
        assert pods is not None
        async with fake_kubernetes() as api:
            patch.setenv("KUBECONFIG", str(api.kubeconfig(folder / "config")))
            task = asyncio.create_task(PodWatch(pods, lambda *_: None, watch_seconds=5, timeout=5).run())
            async with asyncio.timeout(20):
                while not api.watching:  # noqa: ASYNC110 - the server tells nobody
                    await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task], timeout=5)
            return {("pods", verb) for verb, _ in api.asked}

    with pytest.MonkeyPatch.context() as patch:
        return asyncio.run(watch())


@every_overlay
def test_rights_cover_what_discovery_asks_and_nothing_else(overlay: str, asked: set[tuple[str, str]]) -> None:
    roles = of_kind(rendered(overlay), "Role")
    assert not of_kind(rendered(overlay), "ClusterRole", "ClusterRoleBinding")
    (role,) = roles
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed == asked == {("pods", "list"), ("pods", "watch")}
    assert all(rule["apiGroups"] == [""] for rule in role["rules"])
    (binding,) = of_kind(rendered(overlay), "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    bound = {subject["name"] for subject in binding["subjects"]}
    assert {made.spec["serviceAccountName"] for made in routers(overlay)} == bound
    assert {account["metadata"]["name"] for account in of_kind(rendered(overlay), "ServiceAccount")} == bound


@every_overlay
def test_every_variable_is_read_by_somebody(overlay: str) -> None:
    engine = _vllm_variables()
    for made in workloads(rendered(overlay)):
        for container in made.containers():
            names = [item["name"] for item in container.get("env", ())]
            assert len(set(names)) == len(names)
            for name in names:
                assert _is_read(name, container, made, engine), (made.name, container["name"], name)


def _is_read(name: str, container: Mapping[str, Any], made: Workload, engine: set[str]) -> bool:
    if made.component == "valkey":
        return any(
            f"${name}" in text or f"${{{name}" in text for text in _valkey_texts(container)
        ) or f"$({name})" in str(container)
    if f"$({name})" in str(container) or f"${name}" in str(container):
        return True
    setting = name.removeprefix("WARMROUTE_").lower()
    if name.startswith("WARMROUTE_"):
        return setting in (Settings.model_fields if made.component.endswith("router") else SETTINGS)
    if name.startswith("VLLM_"):
        return name in engine or not engine
    return name in OTHERS


def _valkey_texts(container: Mapping[str, Any]) -> list[str]:
    folder = Path(__file__).resolve().parents[2] / "deploy/kubernetes/overlays/shared-valkey"
    return [path.read_text() for path in folder.glob("*.sh")] + [str(container)]


def _vllm_variables() -> set[str]:
    """Names that vLLM reads, by its own source; empty without vLLM. Importing it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return set()
    text = (Path(spec.origin).parent / "envs.py").read_text()
    return set(re.findall(r'"(VLLM_[A-Z0-9_]+)"', text)) | {"VLLM_API_KEY"}


@every_overlay
def test_workers_start_with_what_they_are_given(overlay: str) -> None:
    for made in engines(overlay):
        container = engine_of(made)
        environ = values(container, LITERALS)
        program, name, *arguments = command(container, environ)
        if program != "warmroute":
            assert [program, name] == ["vllm", "serve"]
            continue
        assert name == "worker"
        launch = worker_command.prepare(arguments, worker_command.Wish(), environ)
        listens = {port for _, port, _ in launch.listens}
        assert listens == {made.ports()["http"], made.ports()["reports"]}
        transfer = json.loads(launch.command[-1])
        extra = transfer["kv_connector_extra_config"]
        config = ConnectorConfig.resolve({} if "connectors" in extra else extra, environ)
        assert config.report_host == "0.0.0.0"
        assert config.report_port == made.ports()["reports"]
        assert config.report_token == KEY
        assert config.cpu_bytes
        assert config.cpu_bytes <= 0.6 * quantity(container["resources"]["limits"]["memory"])


@every_overlay
def test_workers_may_finish_before_they_are_killed(overlay: str) -> None:
    for made in engines(overlay):
        container = engine_of(made)
        (patience,) = [
            int(word.partition("=")[2]) for word in container["args"] if word.startswith("--shutdown-timeout=")
        ]
        drain = flags_of(container["lifecycle"]["preStop"]["exec"]["command"])
        assert made.spec["terminationGracePeriodSeconds"] > drain["deadline"] + patience
        # Where no report port says what runs, the hook waits for nothing but routers to know.
        assert (patience if drain["reports"] == "none" else drain["deadline"]) >= 270, "what runs is cut off"
        own = [port["containerPort"] for port in container["ports"] if port["name"] in ("http", "engine")]
        assert drain["url"] == f"http://127.0.0.1:{own[0]}"
        reports = made.ports().get("reports")
        assert drain["reports"] == (f"127.0.0.1:{reports}" if reports else "none")
        assert "VLLM_API_KEY" in values(container, LITERALS), "an engine is asked with its key"


@every_overlay
def test_the_disk_tier_fits_its_volume(overlay: str) -> None:
    for made in engines(overlay):
        container = engine_of(made)
        environ = values(container, LITERALS)
        if "WARMROUTE_DISK_PATH" not in environ:
            continue
        config = ConnectorConfig.resolve({}, environ)
        (mount,) = [m for m in container["volumeMounts"] if environ["WARMROUTE_DISK_PATH"].startswith(m["mountPath"])]
        (claim,) = [claim for claim in made.claims if claim["metadata"]["name"] == mount["name"]]
        assert config.disk_bytes <= 0.7 * quantity(claim["spec"]["resources"]["requests"]["storage"])


@every_overlay
def test_everything_that_is_written_has_a_volume(overlay: str) -> None:
    """The root file system is read-only."""
    for made in workloads(rendered(overlay)):
        for container in made.containers():
            mounts = [m["mountPath"] for m in container.get("volumeMounts", ()) if not m.get("readOnly")]
            mounts += [m["mountPath"] for m in container.get("volumeMounts", ()) if container["name"] == "router"]
            for name, value in values(container, LITERALS).items():
                if name.endswith(("_HOME", "_DIR", "_PATH", "_ROOT")) or name == "HOME":
                    assert any(value == mount or value.startswith(f"{mount}/") for mount in mounts), (name, value)


@every_overlay
def test_probes_ask_what_is_answered(overlay: str) -> None:
    for made in workloads(rendered(overlay)):
        for container in made.containers():
            own = {port["name"] for port in container.get("ports", ())}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                get = container.get(kind, {}).get("httpGet")
                if get is None:
                    continue
                assert get["port"] in own
                assert get["path"] in (OWN if made.component.endswith("router") else {"/health"})


@every_overlay
def test_remote_stores_are_named_as_the_connector_reads_them(overlay: str) -> None:
    pytest.importorskip("redis")
    from worker_connector.tiers.urls import open_store, redacted

    urls = {}
    for made in engines(overlay):
        environ = values(engine_of(made), LITERALS)
        if "WARMROUTE_REMOTE_URL" in environ:
            urls[made.name] = environ["WARMROUTE_REMOTE_URL"]
    assert bool(urls) is (overlay == "shared-valkey")
    for url in urls.values():
        open_store(url).close()
        assert "p4ssw0rd" not in redacted(url)
        (valkey,) = [made for made in workloads(rendered(overlay)) if made.name == "warmroute-valkey"]
        peers = values(valkey.container("sentinel"), LITERALS)["PEERS"].split()
        assert all(f"{peer}:{valkey.ports()['sentinel']}" in url for peer in peers)
        assert len(peers) == 3
        limit = quantity(valkey.container("valkey")["resources"]["limits"]["memory"])
        most = values(valkey.container("valkey"), LITERALS)["MAX_MEMORY"]
        assert int(most.removesuffix("gb")) << 30 <= 0.75 * limit


def test_what_prefill_and_decode_exchange() -> None:
    """Both sides speak NIXL, in the layout it asks for; a sidecar has the prompt prefilled where the route says."""
    manifests = rendered("disaggregated")
    made = {each.component: each for each in workloads(manifests)}
    prefill, decode = engine_of(made["prefill"]), engine_of(made["worker"])
    roles = {}
    for side, container in (("prefill", prefill), ("decode", decode)):
        environ = values(container, LITERALS)
        assert environ["VLLM_KV_CACHE_LAYOUT"] == "LBHNC"
        assert environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == LITERALS["fieldRef/status.podIP"]
        assert int(environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]) in {port["containerPort"] for port in container["ports"]}
        (config,) = [json.loads(word.partition("=")[2]) for word in container["args"] if "kv-transfer-config" in word]
        assert config["kv_load_failure_policy"] == "recompute"
        children = config.get("kv_connector_extra_config", {}).get("connectors", [config])
        roles[side] = {child["kv_connector"]: child["kv_role"] for child in children}
    assert roles["prefill"] == {"NixlConnector": "kv_producer", "WarmrouteConnector": "kv_both"}
    assert next(iter(roles["prefill"])) == "NixlConnector"
    assert roles["decode"] == {"NixlConnector": "kv_consumer"}
    sidecar = made["worker"].container("routing-sidecar")
    assert f"--port={made['worker'].ports()['http']}" in sidecar["args"]
    assert f"--vllm-port={made['worker'].ports()['engine']}" in sidecar["args"]
    assert f"--port={made['worker'].ports()['engine']}" in decode["args"]
    (route,) = of_kind(manifests, "HTTPRoute")
    ((header,),) = [each["requestHeaderModifier"]["set"] for rule in route["spec"]["rules"] for each in rule["filters"]]
    host, _, port = header["value"].partition(":")
    (service,) = [m for m in of_kind(manifests, "Service") if m["metadata"]["name"] == host]
    assert header["name"] == "x-prefiller-host-port"
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "prefill-router"


def test_the_sidecar_is_never_sent_token_ids(tmp_path: Path) -> None:
    """It replaces ``kv_transfer_params``, in which they would travel, and with them the prompt."""
    (front,) = [made for made in routers("disaggregated") if made.component == "router"]
    assert settings_of("disaggregated", front, tmp_path).forward_token_ids is False


@pytest.mark.slow
def test_vllm_itself_understands_every_flag() -> None:
    """By vLLM's own parser, in a process of its own: importing it takes seconds."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    lines: list[list[str]] = []
    for overlay in OVERLAYS:
        for made in engines(overlay):
            environ = values(engine_of(made), LITERALS)
            program, _, *arguments = command(engine_of(made), environ)
            if program == "warmroute":
                launch = worker_command.prepare(arguments, worker_command.Wish(), environ)
                arguments = launch.command[launch.command.index("serve") + 1 :]
            if (line := ["serve", *arguments]) not in lines:
                lines.append(line)
    program = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
for line in json.load(sys.stdin):
    read = parser.parse_args(line)
    print(read.kv_transfer_config.kv_connector, read.port, read.shutdown_timeout)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    given = [flag.partition("=")[2] for line in lines for flag in line if flag.startswith("--shutdown-timeout=")]
    assert re.findall(r" (\d+)$", done.stdout, re.MULTILINE) == given
