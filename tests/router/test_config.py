import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router import cli
from router.config import Settings, WorkerSpec, load, parse_address
from router.errors import ConfigError

WORKER = "http://127.0.0.1:8000"


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("port: 1\npolicy: round-robin\nmax-queue: 7\nretries: 4\n")
    settings = load({"port": 3}, {"WARMROUTE_PORT": "2", "WARMROUTE_RETRIES": "5"}, str(file))
    assert (settings.port, settings.retries, settings.max_queue, settings.policy) == (3, 5, 7, "round-robin")
    assert load({}, {"WARMROUTE_ROUTER_CONFIG": str(file)}).port == 1


def test_worker_lists_from_every_source(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("workers:\n  - http://a:1,reports=none\n  - {url: 'http://b:2', name: bee, reports: 'c:3'}\n")
    from_file = load({}, {}, str(file)).workers
    assert [(w.title, w.report_address) for w in from_file] == [("a:1", None), ("bee", ("c", 3))]
    from_environment = load({}, {"WARMROUTE_WORKERS": "http://a:1 http://b:2;http://c:3"}).workers
    assert [w.report_address for w in from_environment] == [("a", 5571), ("b", 5571), ("c", 5571)]


@pytest.mark.parametrize(
    ("text", "url", "reports"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000", ("127.0.0.1", 5571)),
        ("http://[::1]:8000", "http://[::1]:8000", ("::1", 5571)),
        ("https://gpu/prefix/", "https://gpu/prefix", ("gpu", 5571)),
        ("http://a:1,reports=b:2,name=w", "http://a:1", ("b", 2)),
        ("http://a:1,reports=none", "http://a:1", None),
    ],
)
def test_worker_texts(text: str, url: str, reports: tuple[str, int] | None) -> None:
    spec = WorkerSpec.parse(text)
    assert (spec.url, spec.report_address) == (url, reports)


@pytest.mark.parametrize(
    "text", ["ftp://a:1", "http://", "http://a:99999", "http://a:1,reports=b", "http://a:1,nmae=x", "http://a,name=a b"]
)
def test_wrong_worker_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="workers"):
        load({"workers": [text]}, {})


def test_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("polcy: round-robin\n")
    with pytest.raises(ConfigError, match="unknown setting 'polcy'; did you mean 'policy'"):
        load({}, {}, str(file))
    with pytest.raises(ConfigError, match=r"WARMROUTE_MAX_QUEU.*did you mean 'max_queue'"):
        load({}, {"WARMROUTE_MAX_QUEU": "1"})
    with pytest.raises(ConfigError, match="did you mean 'retries'"):
        load({"retrys": 1}, {})


def test_what_others_put_into_the_environment_is_left_alone() -> None:
    environ = {
        "WARMROUTE_PORT": "tcp://10.0.0.7:8080",
        "WARMROUTE_SERVICE_HOST": "10.0.0.7",
        "WARMROUTE_PORT_8080_TCP_ADDR": "10.0.0.7",
        "WARMROUTE_CHUNK_SIZE": "256",
        "WARMROUTE_CONFIG_FILE": "connector.yaml",
        "WARMROUTE_REPORT_PORT": "5571",
    }
    assert load({}, environ).port == 8080


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "many"}, "port"),
        ({"policy": "best"}, "policy"),
        ({"retries": -1}, "retries"),
        ({"workers": ["a:1", "http://a:1"]}, "share a name"),
    ],
)
def test_wrong_values_name_the_setting(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(flags, {})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('admin_token: "hush', "line 1, column 19: found unexpected end of stream"),
        ("a: 1\nadmin_token: *hush", "line 2, column 14: found undefined alias"),
        ("admin_token: !hush a", "line 1, column 14: could not determine a constructor for the tag"),
        ("admin_token: hush: x", "line 1, column 18: mapping values are not allowed here"),
    ],
)
def test_what_is_no_yaml_is_explained_without_what_it_says(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(why)) as raised:
        load({}, {}, str(tmp_path / "settings.yaml"))
    assert "hush" not in "".join(traceback.format_exception(raised.value)).partition("ConfigError")[2]


def test_unreadable_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load({}, {}, str(tmp_path / "missing.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        load({}, {}, str(tmp_path / "list.yaml"))


def test_secrets_do_not_show() -> None:
    settings = load({"admin_token": "hush", "report_token": "quiet"}, {})
    assert "hush" not in repr(settings)
    assert "quiet" not in repr(settings)
    with pytest.raises(ConfigError) as error:
        load({"admin_token": ["hush"]}, {})
    assert "hush" not in str(error.value)


def test_addresses() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("host", ":1", "host:0", "host:65536", "host:x"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(wrong)


def test_every_setting_is_a_flag_with_a_description() -> None:
    help_text = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for name, field in Settings.model_fields.items():
        flag = "--worker" if name == "workers" else "--" + name.replace("_", "-")
        assert flag in help_text
        assert field.description


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--workers", "4"], "--processes 4"),
        (["serve", "--worker", "nonsense://x"], "http://HOST:PORT"),
        (["serve", "--worker", WORKER, "--policy", "best"], "policy"),
        (["stats", "nowhere"], "HOST:PORT"),
        (["stats", "127.0.0.1:1"], "Is it the report port of a running worker?"),
    ],
)
def test_commands_explain_what_is_wrong(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.app, arguments, env={"WARMROUTE_WORKERS": None})
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["version"])
    assert result.exit_code == 0
    assert result.output.strip()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"workers": ["http://user:hidden@h:1"]}, "no user and password"),
        ({"workers": ["http://h:1,name=a", "http://h:1,name=b"]}, "named once, not again: http://h:1"),
        ({"queue_timeout": "inf"}, "finite number"),
        ({"drain_timeout": "nan"}, "finite number"),
    ],
)
def test_settings_that_would_only_hurt_later(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(flags, {})
    assert "Value error" not in str(caught.value)
    assert "hidden" not in str(caught.value)
