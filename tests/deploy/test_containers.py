"""What Dockerfile and compose files say is held against the code: no image can be built here."""

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from router.cli import app
from router.config import Settings, load
from router.worker_command import DEFAULT_PORT, Wish, prepare
from tests.deploy.dockerfile import Stage, read_compose, read_dockerfile
from worker_connector.config import SETTINGS, ConnectorConfig

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS, STAGES = read_dockerfile(ROOT / "Dockerfile")
GIVEN = {"WARMROUTE_REPORT_TOKEN": "secret", "VLLM_CPU_IMAGE": "vllm-cpu:1"}
COMPOSE = read_compose(ROOT / "deploy" / "compose.yaml", GIVEN)
ROUTER, WORKER = STAGES["router"], STAGES["worker"]
# Variables that vLLM, torch, Python and Hugging Face's libraries read.
FOREIGN = re.compile(
    r"PATH|HOME|USER|PYTHON[A-Z]+|XDG_CACHE_HOME|HF_(HOME|TOKEN|HUB_OFFLINE)|VLLM_(CACHE_ROOT|NO_USAGE_STATS|CPU_KVCACHE_SPACE)"
    r"|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR"
)


def parsed(arguments: list[str]) -> click.Context:
    """The context of the command that the real command line makes of these, which is not run."""
    command: Any = typer.main.get_command(app)
    with command.make_context("warmroute", list(arguments), resilient_parsing=False) as context:
        name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        return sub.make_context(name, rest, parent=context)


def test_base_images_are_named_by_version_and_can_be_replaced_by_digests() -> None:
    for stage in STAGES.values():
        assert stage.base == "scratch" or re.fullmatch(r"\$\{\w+\}", stage.base), stage.base
    for name in ("PYTHON_IMAGE", "CUDA_IMAGE", "VLLM_IMAGE"):
        _, colon, tag = ARGUMENTS[name].rpartition(":")
        assert colon
        assert re.search(r"\d+\.\d+\.\d+", tag), f"{name} floats: {tag}"
    assert ARGUMENTS["WORKER_WHEEL"] in STAGES


def test_the_worker_comes_from_a_vllm_that_the_connector_is_tested_with() -> None:
    from router.demo_fleet import ENGINE

    assert ARGUMENTS["VLLM_IMAGE"].endswith(":v" + ENGINE.rpartition("==")[2])


def test_everything_that_is_copied_is_there_and_passes_the_ignore_list() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [rest.split() for stage in STAGES.values() for rest in stage.all("COPY")]
    from_context = {source for words in copied if not words[0].startswith("--from") for source in words[:-1]}
    assert from_context == set(allowed)
    # The sources themselves are absent where the installed package is what is tested.
    in_checkout = (ROOT / "router").is_dir()
    for source in from_context - (set() if in_checkout else {"kv_protocol", "router", "worker_connector", "LICENSE"}):
        assert (ROOT / source).exists(), source
    stages = {words[0].partition("=")[2] for words in copied if words[0].startswith("--from")}
    assert stages <= set(STAGES)


def test_what_the_build_needs_is_copied() -> None:
    copied = " ".join(STAGES["sources"].all("COPY"))
    needed = re.findall(r'(?:readme|license-files) = \[?"([^"]+)', (ROOT / "pyproject.toml").read_text())
    packages = re.findall(
        r'"(\w+)"', re.search(r"wheel\.packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    )  # type: ignore[index]
    for each in (*needed, *packages, "csrc", "CMakeLists.txt"):
        assert each in copied


@pytest.mark.parametrize("stage", [ROUTER, WORKER], ids=["router", "worker"])
def test_images_run_as_ordinary_users_with_a_health_check(stage: Stage) -> None:
    user, _, group = stage.all("USER")[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert stage.only("STOPSIGNAL") == "SIGTERM"
    check = stage.only("HEALTHCHECK")
    code = re.search(r'"-c", "(.*)"\]$', check)
    assert code is not None
    compile(code[1], "HEALTHCHECK", "exec")
    assert "/health" in code[1]


def test_a_health_check_tells_well_from_unwell() -> None:
    """The very command of the image, against a port where nothing is."""
    from router.demo_fleet import free_port

    code = re.search(r'"-c", "(.*)"\]$', ROUTER.only("HEALTHCHECK"))
    assert code is not None
    environment = {**os.environ, "WARMROUTE_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", code[1]], env=environment, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert b"refused" in done.stderr


def test_images_start_commands_that_exist_on_the_ports_they_expose() -> None:
    assert parsed(ROUTER.exec_form("ENTRYPOINT")[1:] + ROUTER.exec_form("CMD")).info_name == "serve"
    assert ROUTER.exec_form("ENTRYPOINT")[0] == WORKER.exec_form("ENTRYPOINT")[0] == "warmroute"
    assert parsed([*WORKER.exec_form("ENTRYPOINT")[1:], "m"]).info_name == "worker"
    assert ROUTER.only("EXPOSE") == str(Settings.model_fields["port"].default)
    assert WORKER.only("EXPOSE").split() == [str(DEFAULT_PORT), str(ConnectorConfig().report_port)]
    assert load({}, ROUTER.environment).host == "0.0.0.0"
    assert ConnectorConfig.resolve({}, WORKER.environment).report_host == "0.0.0.0"


def test_every_variable_is_read_by_something() -> None:
    ours = {f"WARMROUTE_{name.upper()}" for name in (*SETTINGS, *Settings.model_fields)}
    services = [service.get("environment", {}) for service in COMPOSE["services"].values()]
    for names in (ROUTER.environment, WORKER.environment, *services):
        for name in names:
            assert name in ours or FOREIGN.fullmatch(name), name


def test_the_routers_requirements_are_locked_by_hash() -> None:
    text = (ROOT / "deploy" / "requirements.txt").read_text()
    entries = re.findall(r"^([a-z0-9][\w.-]*)==\S+.*\\$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[a-zA-Z0-9]", text, re.MULTILINE))
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert declared is not None
    for name in re.findall(r'"([a-z0-9-]+)', declared[1]):
        assert name in entries, f"{name} is not locked: make lock"


def test_the_compose_file_demands_its_secret() -> None:
    with pytest.raises(KeyError, match="WARMROUTE_REPORT_TOKEN: set it"):
        read_compose(ROOT / "deploy" / "compose.yaml", {})


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_services_are_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"]
    target = service.get("build", {}).get("target")
    assert target in STAGES if target else re.search(r":\d+\.\d+\.\d+", service["image"])


def test_the_router_of_the_compose_file_knows_its_workers() -> None:
    router = COMPOSE["services"]["router"]
    context = parsed(router["command"])
    settings = load({"workers": context.params["workers"]}, router["environment"])
    workers = {spec.host: spec for spec in settings.workers}
    assert (
        set(workers)
        == {name for name in COMPOSE["services"] if name.startswith("worker-")}
        == set(router["depends_on"])
    )
    for spec in settings.workers:
        assert (spec.port, spec.report_address) == (DEFAULT_PORT, (spec.host, ConnectorConfig().report_port))
    (published,) = router["ports"]
    assert published.split(":") == ["127.0.0.1", "8080", str(settings.port)]


@pytest.mark.parametrize("name", ["worker-1", "worker-2"])
def test_workers_of_the_compose_file_start_vllm(name: str) -> None:
    service = COMPOSE["services"][name]
    launch = prepare(service["command"], Wish(), service["environment"])
    assert launch.command[launch.command.index("serve") + 1] == "Qwen/Qwen3-0.6B"
    config = ConnectorConfig.resolve({}, {**WORKER.environment, **service["environment"]})
    assert (config.cpu_bytes, config.report_host, config.report_token) == (8 << 30, "0.0.0.0", "secret")
    assert not config.enable_remote
    volumes = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert set(volumes) <= set(COMPOSE["volumes"])
    assert set(volumes.values()) == set(WORKER.exec_form("VOLUME"))


def test_the_shared_store_is_one_that_the_connector_speaks_to() -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    url = re.search(r"WARMROUTE_REMOTE_URL=(\S+) ", text)
    assert url is not None
    assert ConnectorConfig.resolve({}, {"WARMROUTE_REMOTE_URL": url[1]}).enable_remote
    assert url[1].partition("://")[2].partition(":")[0] in COMPOSE["services"]


def test_without_gpus_the_workers_differ_in_image_wheel_and_size_only() -> None:
    override = read_compose(ROOT / "deploy" / "compose.cpu.yaml", GIVEN)
    assert set(override["services"]) == {name for name in COMPOSE["services"] if name.startswith("worker-")}
    for service in override["services"].values():
        assert service["deploy"] is None
        assert set(service["build"]["args"]) <= set(ARGUMENTS)
        assert service["build"]["args"]["WORKER_WHEEL"] in STAGES


def test_the_ignore_list_keeps_what_is_built_here_out() -> None:
    refused = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!"]
    for path in ("worker_connector/lib", ".venv", ".git", "router/__pycache__"):
        assert any(
            fnmatch.fnmatch(path, pattern.removeprefix("**/")) or path.endswith(pattern.removeprefix("**/"))
            for pattern in refused
        )


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("compose-spec", "deploy/compose.yaml"),
        ("github-workflows", ".github/workflows/ci.yml"),
        ("dependabot", ".github/dependabot.yml"),
    ],
)
def test_files_of_others_formats_keep_to_their_schemas(schema: str, path: str) -> None:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(ROOT / path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflow_names_actions_by_commit_and_targets_that_exist() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", each) for each in uses), uses
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    matrix = set(re.findall(r"target: (\w+)}", text))
    assert matrix == {"router", "worker"} <= set(STAGES)
