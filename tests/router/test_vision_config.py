import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from router.errors import ConfigError
from router.worker_command import Wish, prepare

OWN = {"ec_connector": "WarmrouteECConnector", "ec_role": "ec_both"}


def vision(*tokens: str, environ: Mapping[str, str] | None = None, settings: tuple[str, ...] = ()) -> object:
    """What vLLM is given as --ec-transfer-config; None if nothing."""
    command = prepare(("m", *tokens), Wish(settings=settings), environ or {}).command
    assert command.count("--ec-transfer-config") <= 1
    if "--ec-transfer-config" not in command:
        return None
    return json.loads(command[command.index("--ec-transfer-config") + 1])


def test_without_the_setting_nothing_is_added() -> None:
    assert vision() is None
    assert vision("--ec-transfer-config", '{"ec_connector": "Other"}') == {"ec_connector": "Other"}


def test_set_switches_it_on() -> None:
    assert vision(settings=("enable_vision_cache=true",)) == OWN
    assert vision(settings=("enable-vision-cache=off",), environ={"WARMROUTE_ENABLE_VISION_CACHE": "1"}) is None


@pytest.mark.parametrize("name", ["enable_vision_cache", "warmroute.enable_vision_cache"])
def test_the_transfer_config_switches_it_on(name: str) -> None:
    kv = {"kv_connector": "WarmrouteConnector", "kv_role": "kv_both", "kv_connector_extra_config": {name: True}}
    assert vision("--kv-transfer-config", json.dumps(kv)) == OWN


@pytest.mark.parametrize("prefix", ["WARMROUTE", "LMCACHE"])
@pytest.mark.parametrize(("word", "is_on"), [("true", True), ("0", False), ("perhaps", False)])
def test_the_environment_switches_it_on(prefix: str, word: str, is_on: bool) -> None:
    assert (vision(environ={f"{prefix}_ENABLE_VISION_CACHE": word}) == OWN) is is_on


@pytest.mark.parametrize("prefix", ["WARMROUTE", "LMCACHE"])
@pytest.mark.parametrize(
    "text",
    ["enable_vision_cache: true\n", "warmroute: {enable_vision_cache: yes}\n", "lmcache.enable_vision_cache: 1\n"],
)
def test_a_file_switches_it_on(prefix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    variable = f"{prefix}_CONFIG_FILE"
    assert vision(environ={variable: str(path)}) == OWN
    assert vision(environ={variable: str(path), "WARMROUTE_ENABLE_VISION_CACHE": "false"}) is None


@pytest.mark.parametrize("text", ["- a list", "a: [", None])
def test_a_file_that_cannot_be_read_is_the_connectors_to_explain(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    assert vision(environ={"WARMROUTE_CONFIG_FILE": str(path)}) is None


def test_what_the_user_gave_is_kept() -> None:
    given = {"ec_connector_extra_config": {"vision_cache_bytes": "2GiB"}}
    found = vision("--ec-transfer-config", json.dumps(given), settings=("enable_vision_cache=true",))
    assert found == {**given, **OWN}
    assert vision("--ec-transfer-config.ec_role", "ec_both", settings=("enable_vision_cache=1",)) == OWN


def test_another_connector_in_its_place_is_named() -> None:
    with pytest.raises(ConfigError, match=r"names ECMooncakeConnector.* leave --ec-transfer-config out"):
        vision(
            "--ec-transfer-config", '{"ec_connector": "ECMooncakeConnector"}', settings=("enable_vision_cache=true",)
        )


def test_an_abbreviation_is_refused() -> None:
    with pytest.raises(ConfigError, match="write --ec-transfer-config in full"):
        vision("--ec-transfer", "{}")
