from pathlib import Path

import pytest

from router.engine_flags import EngineFlags
from router.errors import ConfigError


def flags(*tokens: str) -> EngineFlags:
    return EngineFlags.parse(tokens)


@pytest.mark.parametrize(
    "tokens", [("m", "--port", "9"), ("m", "--port=9"), ("--port", "8", "m", "--port=9"), ("-p", "1", "--port", "9")]
)
def test_a_value_is_found_in_every_spelling_and_the_last_one_holds(tokens: tuple[str, ...]) -> None:
    assert flags(*tokens).value("--port") == "9"


def test_underscores_are_dashes_and_short_flags_are_their_long_ones() -> None:
    given = flags("m", "--data_parallel_size", "4", "--no_enable_log_requests")
    assert given.value("--data-parallel-size", "-dp") == "4"
    assert flags("m", "-dp", "2").value("--data-parallel-size", "-dp") == "2"
    assert given.has("--no-enable-log-requests")
    assert not given.has("--headless")


def test_what_is_taken_is_gone_and_everything_else_keeps_its_place() -> None:
    given = flags("m", "-cc.mode=3", "--kv-offloading-size", "5", "--kv_offloading_size=6", "-tp", "2", "--x", "a b")
    assert given.take("--kv-offloading-size") == "6"
    assert given.tokens == ["m", "-cc.mode=3", "-tp", "2", "--x", "a b"]


def test_an_object_is_put_together_from_its_pieces() -> None:
    name = "--kv-transfer-config"
    given = flags(
        *("m", name, '{"kv_role": "kv_both", "kv_connector_extra_config": {"a": 1}}', f"{name}.kv_role", "kv_producer"),
        *(f"{name}.kv_connector_extra_config.cpu_bytes", "5GiB", "--kv_transfer_config.kv_connector_extra_config.b=2"),
    )
    assert given.take_object(name) == {
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"a": 1, "cpu_bytes": "5GiB", "b": 2},
    }
    assert given.tokens == ["m"]


@pytest.mark.parametrize(
    ("tokens", "cure"),
    [
        (("--kv-transfer-config", "{kv_role: x}"), "Quote it for the shell"),
        (("--kv-transfer-config", "[]"), "takes a JSON object, not a list"),
        (("--kv-transfer-config.connectors+", "x"), "give the list connectors as JSON"),
        (("--kv-transfer-config.a", "1", "--kv-transfer-config.a.b", "1"), "a value and as an object"),
    ],
)
def test_what_is_no_object_is_refused(tokens: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure.replace("+", r"\+")):
        flags("m", *tokens).take_object("--kv-transfer-config")


@pytest.mark.parametrize("short", ["--kv-transfer", "--kv_tr={}", "--kv-offloading-si"])
def test_an_abbreviation_of_what_is_merged_is_refused(short: str) -> None:
    with pytest.raises(ConfigError, match="in full"):
        flags("m", short, "1")


def test_flags_of_the_file_count_and_yield_to_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 9001\nhost: 10.0.0.1\nkv_transfer_config:\n  kv_role: kv_producer\nkv-offloading-size: 4\n")
    given = flags("--config", str(file), "--host", "10.0.0.2")
    assert (given.value("--port"), given.value("--host")) == ("9001", "10.0.0.2")
    assert given.take_object("--kv-transfer-config") == {"kv_role": "kv_producer"}
    with pytest.raises(ConfigError, match="on the command line instead"):
        given.take("--kv-offloading-size")


@pytest.mark.parametrize("content", [None, "a: [", "\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "vllm.yaml"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"vllm\.yaml"):
        flags("--config", str(file))
