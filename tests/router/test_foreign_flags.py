from pathlib import Path

import pytest
from typer.testing import CliRunner

from router import foreign_flags, serve
from router.cli import app
from router.config import Settings, load, policy_names
from router.errors import ConfigError
from router.foreign_flags import POLICIES, REFUSED, RENAMED, UNNEEDED, hint, translate

_PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_flags_of_ours_pass_as_they_are() -> None:
    ours = ["--worker", "http://a", "--policy=session", "--port", "0", "--no-dashboard", "--help"]
    assert translate(ours) == (ours, [])


def test_a_command_line_of_production_stack_is_understood() -> None:
    given = [
        *("--service-discovery", "static", "--static-backends", "http://a:1,http://b:2", "--static-models", "m,n"),
        *("--routing-logic", "session", "--session-key=x-user", "--engine-stats-interval", "10", "--log-stats"),
    ]
    arguments, notes = translate(given)
    assert arguments == [
        *("--worker", "http://a:1", "--worker", "http://b:2", "--policy", "session", "--session-header", "x-user")
    ]
    assert len(notes) == 7
    assert "--static-backends is read as --worker" in notes
    assert "--routing-logic session is read as --policy session" in notes


def test_a_command_line_of_vllm_router_is_understood() -> None:
    given = [
        "--worker-urls",
        "http://a",
        "http://b",
        "--policy",
        "kv_aware",
        "--service_discovery",
        "--selector",
        "a=b",
        "c=d",
    ]
    assert translate(given).arguments == [
        *("--worker", "http://a", "--worker", "http://b", "--policy", "longest-hit", "--kubernetes-selector", "a=b,c=d")
    ]


def test_a_negative_number_is_a_value() -> None:
    """Elsewhere -1 is no limit; our own check says what is one here."""
    given = ["--max-concurrent-requests", "-1", "--queue-size", "5"]
    assert translate(given).arguments == ["--max-in-flight", "-1", "--max-queue", "5"]


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (["--dp-aware"], "--worker URL,dp=N"),
        (["--routing-logic", "disaggregated_prefill"], "overlays/disaggregated"),
        (["--service-discovery", "external-only"], "only vLLM engines"),
        (["--static-backends"], "needs a value; here it is --worker"),
    ],
)
def test_what_is_had_otherwise_is_refused_with_the_way_to_have_it(given: list[str], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        translate(given)


@pytest.mark.parametrize("flag", sorted({*RENAMED.values()}))
def test_what_flags_are_read_as_is_there(flag: str) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    assert {"worker": "workers"}.get(name, name) in Settings.model_fields


def test_tables_agree_with_each_other_and_with_ours() -> None:
    tables = (RENAMED, UNNEEDED, REFUSED)
    assert len({flag for table in tables for flag in table}) == sum(map(len, tables))
    own = {"--" + name.replace("_", "-") for name in Settings.model_fields} | {"--worker", "--config"}
    assert not own & {flag for table in tables for flag in table}
    assert set(POLICIES.values()) <= set(policy_names())
    assert not set(POLICIES) & set(policy_names())
    named = [flag for flag in own if any(flag in text.split() for text in (*UNNEEDED.values(), *REFUSED.values()))]
    assert len(named) > 3


@pytest.mark.parametrize("flag", sorted(RENAMED))
def test_every_flag_that_is_read_is_described(flag: str) -> None:
    assert f"`{flag}" in _PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_name_of_a_policy_can_be_given(policy: str) -> None:
    _, value = translate(["--policy", policy]).arguments
    assert load({"policy": value}, {}).policy == POLICIES[policy]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("static_backends", "here it is 'workers'"),
        ("session_key", "here it is 'session_header'"),
        ("static_models", "asked of itself"),
        ("enable_batch_api", "vllm run-batch"),
        ("service_discovery", "kubernetes_selector"),
    ],
)
def test_settings_of_other_routers_in_a_file_are_refused_with_ours(setting: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{setting}: x\n")
    with pytest.raises(ConfigError, match=text):
        load({}, {}, str(file))
    assert hint("max_queue") == ""


def test_the_command_tells_how_it_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []

    def take(settings: Settings, _: object) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(serve, "serve", take)
    arguments = ["serve", "--static-backends", "http://a:1,http://b:2", "--routing-logic", "roundrobin"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [worker.url for worker in served[0].workers] == ["http://a:1", "http://b:2"]
    assert served[0].policy == "round-robin"
    assert "warmroute: --static-backends is read as --worker" in done.stderr
    refused = CliRunner().invoke(app, ["serve", "--prefill", "http://a"])
    assert refused.exit_code == 2
    assert "overlays/disaggregated" in refused.stderr
    assert foreign_flags.REFUSED["--prefill"] in refused.stderr
