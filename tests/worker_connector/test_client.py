import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_protocol.errors import ProtocolError
from kv_protocol.messages import Hello, encode
from tests.worker_connector.reports import HELLO, Source, serving
from worker_connector import get_cache_stats, runtime_files
from worker_connector.client import ControlClient
from worker_connector.errors import StatsUnavailable
from worker_connector.stats import Stats


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "warmroute"


def _operations(prompt_tokens: int = 1000) -> dict[str, Any]:
    stats = Stats()
    stats.request(prompt_tokens, {"cpu": 250}, prefill_speed=1000.0, load_seconds=0.05)
    stats.set("held_chunks", 7, "cpu")
    return {"stats": lambda _: {"counts": stats.total()}, "echo": lambda arguments: arguments}


def test_figures_from_an_address() -> None:
    with serving(Source(), operations=_operations()) as server:
        host, port = server.address
        for url in (f"{host}:{port}", f"tcp://{host}:{port}"):
            figures = get_cache_stats(url)
            assert figures["hit_rate"] == 0.25
            assert figures["avg_ttft_reduction"] == pytest.approx(0.2)
            assert figures["tiers"]["cpu"]["held_chunks"] == 7
            assert figures["engines"] == 1
            json.dumps(figures)


def test_figures_of_this_programs_own_engines_are_added_up() -> None:
    with serving(Source(), operations=_operations(1000)), serving(Source(), operations=_operations(4000)):
        figures = get_cache_stats()
    assert figures["engines"] == 2
    assert figures["hit_rate"] == 0.1
    assert figures["tiers"]["cpu"]["held_chunks"] == 14
    with pytest.raises(StatsUnavailable, match="no engine with the warmroute connector was started by this program"):
        get_cache_stats()


_CHILD = """
import sys
from tests.worker_connector.reports import Source, serving
from tests.worker_connector.test_client import _operations
with serving(Source(), operations=_operations(), token=sys.argv[1]) as server:
    print(server.address[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, "s3cret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.usefixtures("child")
def test_an_engine_in_a_child_process_is_found_with_its_token() -> None:
    assert get_cache_stats()["hit_rate"] == 0.25


@pytest.mark.usefixtures("child")
def test_an_engine_of_another_program_is_not_ours() -> None:
    code = "from worker_connector import get_cache_stats; get_cache_stats()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "StatsUnavailable: no engine with the warmroute connector was started" in result.stderr


def test_a_killed_engines_file_is_passed_over_and_cleaned_up(child: subprocess.Popen[str], runtime: Path) -> None:
    assert len(list(runtime.glob("*.json"))) == 1
    child.kill()
    child.wait()
    with pytest.raises(StatsUnavailable, match="no engine"):
        get_cache_stats()
    assert list(runtime.glob("*.json")) == []


def test_a_process_id_used_again_is_not_mistaken_for_the_engine(runtime: Path) -> None:
    with serving(Source(), operations=_operations()):
        (path,) = runtime.glob("*.json")
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "started": "1"}))
        with pytest.raises(StatsUnavailable, match="no engine"):
            get_cache_stats()


def test_files_are_private_and_go_with_their_server(runtime: Path) -> None:
    with serving(Source(), token="s3cret"):
        (path,) = runtime.glob("*.json")
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(runtime.glob("*")) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1}', "\x00", '{"pid": "x", "started": 1, "a": 2}'])
def test_files_of_another_making_are_passed_over(runtime: Path, content: str) -> None:
    with serving(Source(), operations=_operations()):
        (runtime / "1-1.json").write_text(content)
        assert get_cache_stats()["engines"] == 1


def test_a_directory_that_others_can_enter_is_not_used(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime.mkdir()
    runtime.chmod(0o755)
    with serving(Source(), operations=_operations()) as server:
        assert "must be a directory that belongs to this user with mode 0700" in caplog.text
        with pytest.raises(StatsUnavailable):
            get_cache_stats()
        host, port = server.address
        assert get_cache_stats(f"{host}:{port}")["engines"] == 1


def test_ancestors_of_this_process() -> None:
    assert runtime_files.ancestors(os.getpid())[0] == os.getppid()


def test_nothing_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StatsUnavailable, match=f"the report port 127.0.0.1:{port} gave no figures: .*refused"):
        get_cache_stats(f"127.0.0.1:{port}")


@pytest.mark.parametrize("url", ["", "http://worker:8000", "worker:port", "tcp://", "worker:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(StatsUnavailable, match="is no report address"):
        get_cache_stats(url)


def test_a_wrong_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Source(), token="right", operations=_operations()) as server:
        host, port = server.address
        with pytest.raises(StatsUnavailable, match="wrong token: set the worker's report_token"):
            get_cache_stats(f"{host}:{port}", token="wrong")
        assert get_cache_stats(f"{host}:{port}", token="right")["engines"] == 1
        monkeypatch.setenv("WARMROUTE_REPORT_TOKEN", "right")
        assert get_cache_stats(f"{host}:{port}")["engines"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        encode(Hello(**{**{f: getattr(HELLO, f) for f in HELLO.__struct_fields__}, "major": 9})),
    ],
)
def test_what_is_no_report_server_is_named(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(StatsUnavailable, match=r"is this a report port|run the same major version"):
            get_cache_stats(f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_silence_ends_at_the_deadline() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(StatsUnavailable, match="gave no figures"),
    ):
        get_cache_stats(f"127.0.0.1:{listening.getsockname()[1]}", timeout=0.2)


def test_calls() -> None:
    with (
        serving(Source(), operations=_operations()) as server,
        ControlClient(*server.address) as client,
    ):
        assert client.hello == HELLO
        assert client.call("echo", a=1, b=[b"x"]) == {"a": 1, "b": [b"x"]}
        with pytest.raises(ProtocolError, match="unknown operation 'nothing'; available: echo, stats"):
            client.call("nothing")
        assert client.call("echo") == {}
