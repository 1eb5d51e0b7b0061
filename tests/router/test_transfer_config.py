import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from router.engine_flags import EngineFlags
from router.errors import ConfigError
from router.transfer_config import STAND_INS, TransferConfig, transfer_config
from worker_connector.config import ConnectorConfig

GIB = 1 << 30


def build(
    *tokens: str, settings: Sequence[str] = (), environ: Mapping[str, str] | None = None, whole: Any = None
) -> TransferConfig:
    given = [*tokens, *(["--kv-transfer-config", json.dumps(whole)] if whole is not None else [])]
    return transfer_config(EngineFlags.parse(["m", *given]), settings, environ or {})


def resolved(config: TransferConfig, environ: Mapping[str, str] | None = None) -> ConnectorConfig:
    return ConnectorConfig.resolve(config.extra, environ or {})


def test_nothing_asked_for_gives_the_connector_with_its_defaults() -> None:
    config = build()
    assert config.whole == {"kv_connector": "WarmrouteConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}
    assert resolved(config) == ConnectorConfig()
    assert not config.notes


def test_the_users_own_configuration_is_kept() -> None:
    config = build(
        whole={"kv_role": "kv_producer", "kv_connector_extra_config": {"cpu": {"bytes": "2GiB"}}},
        settings=["disk_path=/data/x"],
    )
    assert config.whole["kv_role"] == "kv_producer"
    assert resolved(config).cpu_bytes == 2 * GIB
    assert resolved(config).disk_path == "/data/x"


@pytest.mark.parametrize("name", STAND_INS)
def test_our_connector_takes_the_place_of_others_and_says_so(name: str) -> None:
    config = build(whole={"kv_connector": name, "kv_role": "kv_both"})
    assert config.whole["kv_connector"] == "WarmrouteConnector"
    assert config.notes == [f"--kv-transfer-config: {name} is read as WarmrouteConnector"]


def test_of_several_connectors_ours_gets_the_settings() -> None:
    connectors = [
        {"kv_connector": "WarmrouteConnector", "kv_role": "kv_both"},
        {"kv_connector": "NixlConnector", "kv_role": "kv_producer"},
    ]
    whole = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": connectors}}
    config = build("--kv-offloading-size", "3", whole=whole, settings=["report_port=6001"])
    other, ours = config.whole["kv_connector_extra_config"]["connectors"]
    assert ours["kv_connector_extra_config"] == {"report_port": "6001", "cpu_bytes": 3 * GIB}
    assert other == connectors[1]


def several(*names: str, **members: Any) -> dict[str, Any]:
    entries = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": entries}, **members}


def test_nixl_goes_first_because_vllm_passes_on_the_first_handshake() -> None:
    config = build(whole=several("WarmrouteConnector", "ExampleConnector", "NixlConnector"))
    entries = config.whole["kv_connector_extra_config"]["connectors"]
    assert [entry["kv_connector"] for entry in entries] == ["ExampleConnector", "NixlConnector", "WarmrouteConnector"]
    assert any("NixlConnector goes before WarmrouteConnector" in note for note in config.notes)
    kept = build(whole=several("NixlConnector", "WarmrouteConnector", "ExampleConnector"))
    entries = kept.whole["kv_connector_extra_config"]["connectors"]
    assert [entry["kv_connector"] for entry in entries] == ["NixlConnector", "WarmrouteConnector", "ExampleConnector"]
    assert not any("goes before" in note for note in kept.notes)


@pytest.mark.parametrize("given", [["UCX", "GDS"], "UCX,GDS"])
def test_backends_of_nixl_put_its_connector_before_ours(given: Any) -> None:
    extra = {"nixl_backends": given, "cpu_bytes": "2GiB"}
    whole = {"kv_role": "kv_producer", "engine_id": "e", "kv_buffer_device": "cpu", "kv_connector_extra_config": extra}
    config = build(whole=whole, settings=["ttl=5"])
    assert config.whole == {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",
        "engine_id": "e",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "NixlConnector",
                    "kv_role": "kv_producer",
                    "kv_buffer_device": "cpu",
                    "kv_connector_extra_config": {"backends": ["UCX", "GDS"]},
                },
                {
                    "kv_connector": "WarmrouteConnector",
                    "kv_role": "kv_producer",
                    "kv_buffer_device": "cpu",
                    "kv_connector_extra_config": {"cpu_bytes": "2GiB", "ttl": "5"},
                },
            ]
        },
    }
    assert resolved(config).cpu_bytes == 2 * GIB
    assert config.variables == {"VLLM_KV_CACHE_LAYOUT": "LBHNC"}
    assert any("nixl_backends is read as backends of NixlConnector" in note for note in config.notes)


def test_backends_of_nixl_reach_its_connector_among_several() -> None:
    whole = several("NixlConnector", "WarmrouteConnector")
    config = build(whole=whole, settings=["nixl_backends=UCX"])
    first, ours = config.whole["kv_connector_extra_config"]["connectors"]
    assert first["kv_connector_extra_config"] == {"backends": ["UCX"]}
    assert ours["kv_connector_extra_config"] == {}
    alone = build(whole=several("WarmrouteConnector"), settings=["nixl_backends=UCX"])
    entries = alone.whole["kv_connector_extra_config"]["connectors"]
    assert [entry["kv_connector"] for entry in entries] == ["NixlConnector", "WarmrouteConnector"]
    assert not build(settings=["nixl_backends="]).variables
    assert not build(whole=several("WarmrouteConnector")).variables


def test_what_several_connectors_cannot_load_is_computed() -> None:
    """vLLM reads the policy of the whole alone, and its default fails the request."""
    assert build(whole=several("WarmrouteConnector")).whole["kv_load_failure_policy"] == "recompute"
    config = build(whole=several("WarmrouteConnector", kv_load_failure_policy="fail"))
    assert config.whole["kv_load_failure_policy"] == "fail"


def test_the_connectors_that_are_suggested_can_be_given() -> None:
    extra = {"kv_connector_extra_config": {"token": "secret"}}
    with pytest.raises(ConfigError) as raised:
        build(whole={"kv_connector": "NixlConnector", "kv_role": "kv_producer", **extra})
    text = str(raised.value)
    assert "secret" not in text
    suggested = json.loads(text[text.index('{"connectors"') : text.rindex("}") + 1])
    config = build(whole={"kv_connector": "MultiConnector", "kv_connector_extra_config": suggested})
    entries = config.whole["kv_connector_extra_config"]["connectors"]
    assert [entry["kv_connector"] for entry in entries] == ["NixlConnector", "WarmrouteConnector"]
    assert entries[0]["kv_role"] == "kv_producer"
    assert not any("goes before" in note for note in config.notes)


@pytest.mark.parametrize(
    ("whole", "cure"),
    [
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, "give MultiConnector"),
        ({"kv_connector": "MultiConnector"}, "does not hold WarmrouteConnector"),
        (
            {"kv_connector": "LMCacheConnectorV1", "kv_connector_module_path": "lmcache.x"},
            "takes its connector from lmcache",
        ),
        ({"kv_connector_extra_config": []}, "is a JSON object, not a list"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_cure(whole: Any, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        build(whole=whole)


@pytest.mark.parametrize(
    ("setting", "variable"),
    [
        ("report_token=secret", "WARMROUTE_REPORT_TOKEN"),
        ("remote-url=redis://:secret@h:1", "WARMROUTE_REMOTE_URL"),
        ("cpu_bytes=1GiB", ""),
        ("remote_url=redis://h:1", ""),
    ],
)
def test_a_secret_on_the_command_line_is_pointed_out(setting: str, variable: str) -> None:
    notes = build(settings=[setting]).notes
    assert [variable in note for note in notes] == [True] * bool(variable)
    assert "secret" not in " ".join(notes)


@pytest.mark.parametrize("variable", ["ENABLE_LMCACHE", "VLLM_ENABLE_LMCACHE"])
@pytest.mark.parametrize(("value", "used"), [("1", True), ("true", True), ("YES", True), ("0", False), ("off", False)])
def test_switches_of_other_caches_are_heeded(variable: str, value: str, used: bool) -> None:
    config = build(environ={variable: value})
    assert resolved(config).enable_prefix_cache is used
    assert len(config.notes) == 1
    assert variable in config.notes[0]


def test_switches_that_mean_nothing_or_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes one of 1, true"):
        build(environ={"ENABLE_LMCACHE": "perhaps"})
    with pytest.raises(ConfigError, match="contradict"):
        build(environ={"ENABLE_LMCACHE": "1", "VLLM_ENABLE_LMCACHE": "false"})


def test_a_switch_yields_to_the_setting_itself() -> None:
    environ = {"ENABLE_LMCACHE": "0", "WARMROUTE_ENABLE_PREFIX_CACHE": "true"}
    assert resolved(build(environ=environ), environ).enable_prefix_cache


def test_offloading_sizes_become_the_size_of_the_cpu_tier() -> None:
    flag = build("--kv-offloading-size", "2.5", "--kv_offloading_backend=lmcache")
    assert resolved(flag).cpu_bytes == int(2.5 * GIB)
    variable = build(environ={"VLLM_KV_OFFLOADING_SIZE": "7", "VLLM_KV_OFFLOADING_BACKEND": "native"})
    assert resolved(variable).cpu_bytes == 7 * GIB
    assert any("VLLM_KV_OFFLOADING_BACKEND" in note for note in variable.notes)
    assert not build(environ={"VLLM_KV_OFFLOADING_SIZE": "0"}).extra


@pytest.mark.parametrize(
    ("tokens", "settings", "environ", "size"),
    [
        (("--kv-offloading-size", "2"), (), {"VLLM_KV_OFFLOADING_SIZE": "7"}, 2 * GIB),
        ((), ("cpu_bytes=3GiB",), {"VLLM_KV_OFFLOADING_SIZE": "7"}, 3 * GIB),
        ((), (), {"VLLM_KV_OFFLOADING_SIZE": "7", "WARMROUTE_CPU_BYTES": "4GiB"}, 4 * GIB),
        ((), (), {"VLLM_KV_OFFLOADING_SIZE": "7", "LMCACHE_MAX_LOCAL_CPU_SIZE": "5"}, 5 * GIB),
        (("--kv-offloading-size", "2"), (), {"LMCACHE_MAX_LOCAL_CPU_SIZE": "5"}, 2 * GIB),
    ],
)
def test_the_strongest_size_wins(
    tokens: tuple[str, ...], settings: Sequence[str], environ: Mapping[str, str], size: int
) -> None:
    assert resolved(build(*tokens, settings=settings, environ=environ), environ).cpu_bytes == size


@pytest.mark.parametrize(
    ("tokens", "settings", "environ", "cure"),
    [
        (("--kv-offloading-size", "2"), ("cpu_bytes=3GiB",), {}, "both size the CPU tier"),
        (("--kv-offloading-size", "lots"), (), {}, "a number of GiB"),
        ((), (), {"VLLM_KV_OFFLOADING_SIZE": "nan"}, "a number of GiB"),
        (("--kv-offloading-backend", "tape"), (), {}, "native, lmcache, warmroute"),
        ((), ("cpu_bytes",), {}, "NAME=VALUE"),
    ],
)
def test_what_is_no_size_is_refused(
    tokens: tuple[str, ...], settings: Sequence[str], environ: Mapping[str, str], cure: str
) -> None:
    with pytest.raises(ConfigError, match=cure):
        build(*tokens, settings=settings, environ=environ)


def test_a_setting_given_twice_differently_is_refused() -> None:
    with pytest.raises(ConfigError, match="different values"):
        build(whole={"kv_connector_extra_config": {"chunk_size": 128}}, settings=["chunk-size=256"])


def test_settings_are_seen_wherever_the_connector_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("report:\n  port: 6007\nreport_host: 10.0.0.1\n")
    environ = {"WARMROUTE_CONFIG_FILE": str(file), "WARMROUTE_REPORT_TOKEN": "t"}
    config = build(environ=environ)
    found = [config.setting(f"report_{name}") for name in ("port", "host", "token")]
    assert found == [6007, "10.0.0.1", "t"]
    assert build(environ={"WARMROUTE_CONFIG_FILE": "/nowhere"}).setting("report_port") is None
