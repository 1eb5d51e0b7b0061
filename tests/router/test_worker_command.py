import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from router import worker_command
from router.config import WorkerSpec
from router.demo_fleet import PYTHON
from router.errors import ConfigError
from router.worker_command import _SERVER, Launch, Wish, prepare

TOKEN = {"WARMROUTE_REPORT_TOKEN": "secret"}


def launch(*tokens: str, environ: Mapping[str, str] | None = None, **wish: object) -> Launch:
    return prepare(tokens, Wish(**wish), environ or {})  # type: ignore[arg-type]


def transfer(launched: Launch) -> dict[str, object]:
    flag, text = launched.command[-2:]
    assert flag == "--kv-transfer-config"
    return dict(json.loads(text))


def extra(launched: Launch) -> dict[str, object]:
    return dict(transfer(launched)["kv_connector_extra_config"])  # type: ignore[call-overload]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_flags_reach_vllm_as_they_were_given() -> None:
    tokens = ("org/model", "-tp", "2", "--chat-template", "a b.jinja", "-cc.mode=3")
    command = launch(*tokens).command
    assert command[:5] == [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert tuple(command[5:11]) == tokens
    assert command[11] == "--enable-prompt-tokens-details"
    assert "--enable-prompt-tokens-details" not in launch("m", "--no-enable-prompt-tokens-details").command


@pytest.mark.parametrize("tokens", [(), ("--port", "1")])
def test_a_model_is_asked_for(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="which model"):
        launch(*tokens)
    launch("--model", "m")


@pytest.mark.parametrize("flag", ["--routers", "--advertize=x", "--worker_name"])
def test_a_near_miss_of_a_flag_is_no_flag_of_vllm(flag: str) -> None:
    with pytest.raises(ConfigError, match="did you mean --"):
        launch("m", flag)


@pytest.mark.parametrize("url", ["http://r:99999", "http://r:x", "http://[::1", "ftp://r", "r:8080", "http://"])
def test_a_router_that_is_no_url_is_refused(url: str) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigError, match="--router is http://HOST:PORT"):
            launch("m", "--host", host, routers=[url], environ=TOKEN)


@pytest.mark.parametrize("port", ["70000", "0", "abc", "²", "-1"])
def test_a_report_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="takes a number from 1 to 65535"):
        launch("m", settings=[f"report_port={port}"])
    with pytest.raises(ConfigError, match="takes a number from 1 to 65535"):
        launch("m", settings=[f"report_port={port}"], routers=["http://127.0.0.1:1"])


def test_the_ranks_report_ports_have_to_exist() -> None:
    with pytest.raises(ConfigError, match="takes a number from 1 to 65534"):
        launch("m", "-dp", "2", settings=["report_port=65535"])


def test_the_first_of_several_keys_in_a_file_is_shown_to_the_router(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("api-key: [key-1, key-2]\n")
    launched = launch("m", "--host", "127.0.0.1", "--config", str(file), routers=["http://127.0.0.1:1"])
    assert launched.secrets == {"VLLM_API_KEY": "key-1"}
    assert "key-1" not in worker_command.shown(launched)


def test_no_flag_of_the_command_is_one_of_vllm() -> None:
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    sources = [folder / "engine" / "arg_utils.py", *(folder / "entrypoints" / "launchers").glob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    assert any('"--kv-offloading-size"' in text for text in texts)
    theirs = {flag for text in texts for flag in re.findall(r'"(--[a-z0-9-]+)"', text)}
    assert len(theirs) > 100
    assert not theirs & set(worker_command._OWN_FLAGS)
    worker_command._check_own(sorted(theirs))
    worker_command._check_own(["--hf-token=hf_x"])


def test_a_worker_is_registered_as_routers_reach_it() -> None:
    launched = launch(
        "m", "--port", "9001", "-dp", "2", routers=["http://127.0.0.1:8080/"], name="w", token="t", ttl=9.0
    )
    command = launched.registration
    assert command[1:6] == ["-P", "-m", "router.cli", "register", "http://127.0.0.1:8080"]
    port = extra(launched)["report_port"]
    assert command[7] == f"http://127.0.0.1:9001,reports=127.0.0.1:{port},name=w,dp=2"
    assert [spec.rank for spec in WorkerSpec.all_of(command[7])] == [0, 1]
    assert launched.secrets == {"WARMROUTE_ADMIN_TOKEN": "t"}
    assert "t" not in command
    assert "report_host" not in extra(launched)
    assert command[8:] == ["--ttl", "9.0"]


def test_a_worker_is_where_vllm_listens() -> None:
    def worker(*tokens: str) -> str:
        return launch("m", *tokens, routers=["http://localhost:8080"]).registration[7].partition(",")[0]

    assert worker() == worker("--host", "0.0.0.0") == "http://127.0.0.1:8000"
    assert worker("--host", "127.0.0.1", "--ssl-keyfile", "k") == "https://127.0.0.1:8000"
    assert worker("--host", "::1") == "http://[::1]:8000"


def test_a_worker_for_other_machines_reports_beyond_its_own() -> None:
    routers = ["http://127.0.0.1:8080"]
    launched = launch("m", routers=routers, advertise="https://10.1.2.3:8443", environ=TOKEN)
    assert extra(launched)["report_host"] == "0.0.0.0"
    assert launched.registration[6] == "--worker"
    assert launched.registration[7].startswith("https://10.1.2.3:8443,reports=10.1.2.3:")
    assert extra(launch("m", routers=routers, advertise="http://[fd00::1]:8000", environ=TOKEN))["report_host"] == "::"
    kept = launch("m", routers=routers, advertise="http://10.1.2.3:8000", environ=TOKEN, settings=["report_port=6001"])
    assert kept.registration[7].endswith("reports=10.1.2.3:6001")


@pytest.mark.parametrize(
    ("tokens", "wish", "environ", "cure"),
    [
        ((), {"advertise": "http://10.1.2.3:80"}, {}, "WARMROUTE_REPORT_TOKEN"),
        (
            (),
            {"advertise": "http://10.1.2.3:80"},
            {**TOKEN, "WARMROUTE_REPORT_HOST": "127.0.0.1"},
            "cannot reach reports",
        ),
        ((), {"advertise": "ftp://10.1.2.3"}, TOKEN, "a worker is http://HOST:PORT"),
        ((), {"routers": ["router:8080"]}, {}, "--router is http://HOST:PORT"),
        ((), {"routers": ["http://no-such-host.invalid:1"]}, {}, "cannot be found or reached"),
        (("--headless",), {}, {}, "at the first node"),
        (("--uds", "/tmp/x"), {}, {}, "--advertise"),
        (("--port", "http"), {}, {}, "takes a number"),
        ((), {"settings": ["report_port=x"]}, {}, "report_port is 'x'"),
    ],
)
def test_what_routers_could_not_reach_is_refused(
    tokens: Sequence[str], wish: Mapping[str, object], environ: Mapping[str, str], cure: str
) -> None:
    with pytest.raises(ConfigError, match=cure):
        launch("m", *tokens, environ=environ, **{"routers": ["http://127.0.0.1:8080"], **wish})


def test_keys_of_the_engine_reach_the_router_without_standing_in_a_command() -> None:
    for launched in (
        launch("m", "--api-key", "sesame", routers=["http://127.0.0.1:1"]),
        launch("m", routers=["http://127.0.0.1:1"], environ={"VLLM_API_KEY": "sesame"}),
    ):
        assert launched.registration[7].endswith(",key=env:VLLM_API_KEY")
        assert launched.secrets == {"VLLM_API_KEY": "sesame"}
        assert "sesame" not in repr(launched.registration)


def test_a_missing_or_old_engine_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        worker_command.check_engine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(worker_command, "_engine_version", lambda: "0.28.1")
    with pytest.raises(ConfigError, match=r"0\.28\.1 is too old: the connector needs 0\.29"):
        worker_command.check_engine()
    for fine in ("0.29.0", "1.0", "0.32.0+cpu", "0.0.0.dev", ""):
        monkeypatch.setattr(worker_command, "_engine_version", lambda fine=fine: fine)
        worker_command.check_engine()


def test_a_port_that_is_taken_is_found_before_the_engine_starts(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_command, "check_engine", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started"))
    for launched in (
        launch("m", "--host", "127.0.0.1", "--port", str(taken)),
        launch("m", "--uds", "/tmp/x", settings=[f"report_port={taken}"]),
    ):
        with pytest.raises(ConfigError, match=f"port {taken} is taken"):
            worker_command.run(launched, {})
    with pytest.raises(ConfigError, match="cannot listen on 192"):
        worker_command.run(launch("m", "--host", "192.0.2.1"), {})


def test_reports_take_the_next_free_port(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_command, "DEFAULT_REPORT_PORT", taken)
    assert worker_command._free_report_port("127.0.0.1", 1) > taken


def command(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "router.cli", "worker", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environ or {})},
    )  # type: ignore[call-overload]


def test_the_command_prints_what_it_would_run() -> None:
    environ = {
        "ENABLE_LMCACHE": "1",
        "VLLM_KV_OFFLOADING_SIZE": "2",
        "WARMROUTE_ROUTERS": "http://127.0.0.1:1 http://[::1]:2",
    }
    done = command("m", "--max-model-len", "4096", "--set", "chunk_size=128", "--print", environ=environ)
    assert done.returncode == 0, done.stderr
    engine, registration = done.stdout.splitlines()
    assert "serve m --max-model-len 4096" in engine
    assert '"chunk_size":"128"' in engine
    assert f'"cpu_bytes":{2 << 30}' in engine
    assert "register http://127.0.0.1:1 'http://[::1]:2'" in registration
    assert "ENABLE_LMCACHE is read as" in done.stderr


def test_errors_come_as_one_line_and_a_status() -> None:
    done = command("--print")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "warmroute: which model? warmroute worker MODEL [flags of vllm serve]\n"


def test_what_vllm_needs_in_its_environment_yields_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launch("m", settings=["nixl_backends=UCX"])
    assert worker_command.shown(launched).startswith("env VLLM_KV_CACHE_LAYOUT=LBHNC ")
    environments: list[Mapping[str, str]] = []
    monkeypatch.setattr(worker_command, "check_engine", lambda: None)
    monkeypatch.setattr(worker_command, "_check_free", lambda *_: None)
    monkeypatch.setattr(worker_command, "_python_path", lambda _: "")
    monkeypatch.setattr(os, "execve", lambda _path, _command, environment: environments.append(environment))
    worker_command.run(launched, {})
    worker_command.run(launched, {"VLLM_KV_CACHE_LAYOUT": "BLHNC"})
    assert [each["VLLM_KV_CACHE_LAYOUT"] for each in environments] == ["LBHNC", "BLHNC"]


def test_what_is_installed_runs_and_not_what_lies_in_the_folder(tmp_path: Path) -> None:
    for name in ("router", "worker_connector", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('this is the folder')", encoding="utf-8")
    for python in (PYTHON, (sys.executable, *_SERVER[:2])):
        answer = subprocess.run(
            [*python, "router.cli", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
