import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_connector.config import SETTINGS, ConnectorConfig
from worker_connector.config_names import ABSENT, ALIASES, SECTIONS, UNNEEDED
from worker_connector.config_values import size
from worker_connector.errors import ConfigurationError

GIB = 1 << 30


def resolve(extra: Mapping[str, Any] | None = None, **environ: str) -> ConnectorConfig:
    return ConnectorConfig.resolve(extra or {}, environ)


def from_file(tmp_path: Path, text: str, variable: str = "WARMROUTE_CONFIG_FILE", **environ: str) -> ConnectorConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return resolve(None, **{variable: str(path)}, **environ)


def test_defaults() -> None:
    config = resolve()
    assert config == ConnectorConfig()
    assert (config.chunk_size, config.cpu_bytes, config.cpu_ratio) == (256, 4 * GIB, None)
    assert (config.report_host, config.report_port, config.report_port_is_default) == ("127.0.0.1", 5571, True)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"chunk_size": 128}, {"chunk_size": 128}),
        ({"chunk_size": "512"}, {"chunk_size": 512}),
        ({"cpu_bytes": "20GiB"}, {"cpu_bytes": 20 * GIB}),
        ({"cpu_bytes": 1 << 20}, {"cpu_bytes": 1 << 20}),
        ({"cpu_ratio": 0.5}, {"cpu_ratio": 0.5, "cpu_bytes": None}),
        ({"enable_cpu": False}, {"enable_cpu": False}),
        ({"enable_prefix_cache": "off"}, {"enable_prefix_cache": False}),
        ({"eviction_policy": "LRU"}, {"eviction_policy": "lru"}),
        ({"cpu": {"huge_pages": True, "copy_threads": "4", "verify": "on", "async_write": "no"}},
         {"huge_pages": True, "copy_threads": 4, "verify": True, "async_write": False}),
        ({"numa_node": "auto"}, {"numa_node": None}),
        ({"numa_node": "Any"}, {"numa_node": -1}),
        ({"numa_node": "1"}, {"numa_node": 1}),
        ({"report_port": 0}, {"report_port": 0, "report_port_is_default": False}),
        ({"report_token": "s3cret"}, {"report_token": "s3cret"}),
        ({"cpu": {"enabled": True, "bytes": "2G"}, "report": {"port": 7000, "token": "t"}},
         {"cpu_bytes": 2 * GIB, "report_port": 7000, "report_token": "t"}),
        ({"warmroute": {"chunk_size": 64}}, {"chunk_size": 64}),
        ({"warmroute.chunk_size": 64}, {"chunk_size": 64}),
        ({"chunk_size": None, "cpu": {"bytes": None}}, {}),
        # LMCache's names, flat and nested
        ({"lmcache.chunk_size": 64}, {"chunk_size": 64}),
        ({"local_cpu": True, "max_local_cpu_size": 5}, {"cpu_bytes": 5 * GIB}),
        ({"local_cpu": False, "max_local_cpu_size": 0.5}, {"enable_cpu": False, "cpu_bytes": GIB // 2}),
        ({"local_cpu": {"enabled": True, "buffer_size_gb": 20}}, {"cpu_bytes": 20 * GIB}),
        ({"local_device": "cpu"}, {"cpu_ratio": 0.3, "cpu_bytes": None}),
        ({"local_device": "cpu", "local_cpu_ratio": 0.1}, {"cpu_ratio": 0.1, "cpu_bytes": None}),
        ({"local_device": "cpu", "max_local_cpu_size": 1}, {"cpu_bytes": GIB}),
        ({"min_retrieve_tokens": 512}, {"min_load_tokens": 512}),
        ({"cache_policy": "LRU"}, {"eviction_policy": "lru"}),
        ({"enable_disk_cache": True, "disk_cache_path": "/c"}, {"enable_disk": True, "disk_path": "/c"}),
        ({"disk_path": "/c"}, {"enable_disk": True, "disk_path": "/c"}),
        ({"enable_disk": True}, {"enable_disk": True, "disk_path": "~/.cache/warmroute/chunks"}),
        ({"enable_disk_cache": False, "disk_cache_path": "/c"}, {"disk_path": "/c"}),
        ({"local_disk": "file:///c", "max_local_disk_size": 5}, {"enable_disk": True, "disk_path": "file:///c", "disk_bytes": 5 * GIB}),
        ({"local_disk": False, "max_local_disk_size": 5}, {"disk_bytes": 5 * GIB}),
        ({"local_disk": {"enabled": True, "path": "/x"}}, {"enable_disk": True, "disk_path": "/x"}),
        ({"disk": {"path": "/c", "bytes": "1GiB"}}, {"enable_disk": True, "disk_path": "/c", "disk_bytes": GIB}),
        ({"remote_url": "redis://c:1"}, {"enable_remote": True, "remote_url": "redis://c:1"}),
        ({"remote_url": ["redis://c", "redis://d"], "replicas": 2}, {"enable_remote": True, "remote_url": "redis://c redis://d", "replicas": 2}),
        ({"remote": {"enabled": True, "url": "redis://c", "serde": "naive"}}, {"enable_remote": True, "remote_url": "redis://c"}),
        ({"enable_remote_cache": "no", "remote_url": "redis://c"}, {"remote_url": "redis://c"}),
        ({"compression": "zstd"}, {"disk_codec": "zstd", "remote_codec": "zstd"}),
        ({"ttl": 3600}, {"ttl": 3600}),
        # vLLM's --kv-offloading-size 2.5
        ({"cpu_bytes_to_use": 2.5 * GIB}, {"cpu_bytes": 5 * GIB // 2}),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_setting_does(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    config = resolve(extra)
    changed = {name: getattr(config, name) for name in expected}
    assert changed == expected
    rest = set(SETTINGS) - set(expected) - {"cpu_bytes"}
    assert all(getattr(config, name) == getattr(ConnectorConfig(), name) for name in rest)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WARMROUTE_CHUNK_SIZE": "128"}, {"chunk_size": 128}),
        ({"WARMROUTE_CPU_BYTES": "3GiB"}, {"cpu_bytes": 3 * GIB}),
        ({"WARMROUTE_REPORT_TOKEN": "t"}, {"report_token": "t"}),
        ({"LMCACHE_CHUNK_SIZE": "128"}, {"chunk_size": 128}),
        ({"LMCACHE_LOCAL_CPU": "False"}, {"enable_cpu": False}),
        ({"LMCACHE_MAX_LOCAL_CPU_SIZE": "1.5"}, {"cpu_bytes": 3 * GIB // 2}),
        ({"LMCACHE_CHUNK_SIZE": "128", "WARMROUTE_CHUNK_SIZE": "64"}, {"chunk_size": 64}),
        ({"LMCACHE_REMOTE_SERDE": "naive", "LMCACHE_REMOTE_URL": "", "LMCACHE_LOCAL_DISK": "false"}, {}),
        ({"LMCACHE_USE_EXPERIMENTAL": "True", "WARMROUTE_PORT": "8000", "PATH": "/bin"}, {}),
    ],
    ids=str,
)
def test_environment(environ: dict[str, str], expected: dict[str, Any]) -> None:
    config = resolve(None, **environ)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chunk_size: 128\nlocal_cpu: true\nmax_local_cpu_size: 5\n", {"chunk_size": 128, "cpu_bytes": 5 * GIB}),
        ("local_cpu: {enabled: true, buffer_size_gb: 20}\nremote: {enabled: false}\n", {"cpu_bytes": 20 * GIB}),
        ("cpu: {ratio: 0.25}\nreport:\n  host: 127.0.0.2\n", {"cpu_ratio": 0.25, "report_host": "127.0.0.2"}),
        ("local_disk: null\nremote_url: null\nremote_serde: naive\nmax_local_disk_size: 10.0\n", {}),
        ("", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("variable", ["WARMROUTE_CONFIG_FILE", "LMCACHE_CONFIG_FILE"])
def test_file(tmp_path: Path, text: str, expected: dict[str, Any], variable: str) -> None:
    config = from_file(tmp_path, text, variable)
    assert {name: getattr(config, name) for name in expected} == expected


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text("chunk_size: 1\nmin_load_tokens: 1\nmodel_name: lmcache-file\nreport_port: 1\nreport_token: lm\n")
    own = tmp_path / "own.yaml"
    own.write_text("chunk_size: 2\nmin_load_tokens: 2\nmodel_name: own-file\nreport_port: 2\n")
    config = resolve(
        {"chunk_size": 5},
        LMCACHE_CONFIG_FILE=str(path),
        WARMROUTE_CONFIG_FILE=str(own),
        LMCACHE_CHUNK_SIZE="3",
        LMCACHE_MIN_RETRIEVE_TOKENS="3",
        LMCACHE_MODEL_NAME="lmcache-environment",
        WARMROUTE_CHUNK_SIZE="4",
        WARMROUTE_MIN_LOAD_TOKENS="4",
    )
    assert (config.chunk_size, config.min_load_tokens) == (5, 4)
    assert (config.model_name, config.report_port, config.report_token) == ("lmcache-environment", 2, "lm")


def test_a_stronger_size_replaces_a_weaker_share_and_the_other_way_round(tmp_path: Path) -> None:
    assert from_file(tmp_path, "cpu_ratio: 0.5", WARMROUTE_CPU_BYTES="1G").cpu_ratio is None
    config = from_file(tmp_path, "cpu_bytes: 1G", WARMROUTE_CPU_RATIO="0.5")
    assert (config.cpu_bytes, config.cpu_ratio) == (None, 0.5)
    config = from_file(tmp_path, "max_local_cpu_size: 7", LMCACHE_LOCAL_DEVICE="cpu")
    assert (config.cpu_bytes, config.cpu_ratio) == (7 * GIB, None)


@pytest.mark.parametrize(
    ("extra", "budget"),
    [({}, 4 * GIB), ({"cpu_ratio": 0.5}, 500), ({"enable_cpu": False}, 0), ({"enable_cpu": False, "cpu_ratio": 2}, 0)],
)
def test_budget(extra: dict[str, Any], budget: int) -> None:
    assert resolve(extra).cpu_budget(1000) == budget


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"chunk_sise": 1}, "kv_connector_extra_config: 'chunk_sise' is no setting: did you mean 'chunk_size'?"),
        ({"cpu_byte": 1}, "did you mean 'cpu_bytes'?"),
        ({"max_cpu_size": 1}, "did you mean 'max_local_cpu_size'?"),
        ({"cpu": {"byte": 1}}, "in cpu, 'byte' is no setting: did you mean 'bytes'?"),
        (
            {"cpu": "20GiB"},
            "cpu is a section of enabled, bytes, ratio, huge_pages, numa_node, copy_threads, async_write, verify, eviction_policy, not a str",
        ),
        ({"report": {"prot": 1}}, "in report, 'prot' is no setting: did you mean 'port'?"),
        ({"": 1}, "is no setting: did you mean"),
        ({7: 1}, "'7' is no setting"),
        ({"chunk_size": "big"}, "chunk_size is 'big', but it must be a whole number"),
        ({"chunk_size": 0}, "chunk_size is 0, but it must be a whole number between 1 and"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5, but it must be a whole number"),
        ({"chunk_size": True}, "chunk_size is True, but it must be a whole number"),
        ({"chunk_size": [1]}, "it must be a whole number"),
        ({"cpu_bytes": "20 gigs"}, 'it must be a size above zero, in bytes or with a unit such as "20GiB"'),
        ({"cpu_bytes": -1}, "it must be a size above zero"),
        ({"cpu_bytes": 0}, "it must be a size above zero"),
        ({"cpu_bytes": float("nan")}, "it must be a size above zero"),
        ({"max_local_cpu_size": "5GiB"}, "it must be a number of GB above zero"),
        ({"max_local_cpu_size": float("inf")}, "it must be a number of GB above zero"),
        ({"max_local_cpu_size": 1e300}, "it must be a number of GB above zero"),
        ({"cpu_ratio": 0}, "it must be a share above 0"),
        ({"copy_threads": 9}, "it must be a whole number between 1 and 8"),
        ({"numa_node": "near"}, "numa_node is 'near', but it must be auto, any or the number of a node"),
        ({"numa_node": -1}, "it must be auto, any or the number of a node"),
        ({"enable_cpu": "perhaps"}, "enable_cpu is 'perhaps', but it must be true or false"),
        ({"report_port": 65536}, "it must be a whole number between 0 and 65535"),
        ({"report_host": ""}, "it must be a text that is not empty"),
        ({"report_heartbeat_seconds": 0}, "it must be between 0.05 and 3600 seconds"),
        (
            {"eviction_policy": "mru"},
            "eviction_policy is 'mru', but available here: lru, lfu, arc, sieve, s3fifo, fifo",
        ),
        ({"local_device": "cuda"}, "local_device is 'cuda', but available here: cpu"),
        ({"cpu_bytes": "1G", "cpu_ratio": 0.3}, "cpu_bytes and cpu_ratio both size the CPU tier: keep one of them"),
        (
            {"chunk_size": 64, "lmcache.chunk_size": 128},
            "chunk_size and chunk_size both set chunk_size: keep one of them",
        ),
        ({"max_local_cpu_size": 1, "local_cpu": {"buffer_size_gb": 2}}, "both set cpu_bytes: keep one of them"),
        ({"cpu_bytes": "1G", "max_local_cpu_size": 2}, "cpu_bytes and max_local_cpu_size both set cpu_bytes"),
    ],
    ids=str,
)
def test_mistakes_are_named(extra: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        resolve(extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"remote_serde": "cachegen"}, "it is one of raw, exp12, fp8, k16v8, int8, zstd, lz4"),
        ({"retrieval_mode": "semantic"}, "available here: exact"),
        ({"save_decode_cache": False}, "generated tokens are always saved"),
        ({"nixl_backends": ["UCX"]}, "puts vLLM's NixlConnector beside it"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        resolve(extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"enable_disk_cache": False, "remote_serde": "msgpack"},
        {"local_disk": None, "remote_url": None},
        {"compression": "none", "retrieval_mode": "exact", "async_write": True, "ttl": 0, "nixl_backends": []},
        {"cache_warmup": False, "enable_vision_cache": False, "conversation_mode": False, "save_decode_cache": True},
        {"async_write": "true", "ttl": "0", "compression": "None", "conversation_mode": 0},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(extra: dict[str, Any]) -> None:
    assert resolve(extra) == ConnectorConfig()


def test_a_near_miss_in_the_environment_is_a_mistake() -> None:
    with pytest.raises(
        ConfigurationError, match="WARMROUTE_CHUNKSIZE is no setting: did you mean WARMROUTE_CHUNK_SIZE"
    ):
        resolve(None, WARMROUTE_CHUNKSIZE="1")


def test_what_lmcache_alone_knows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(None, LMCACHE_BLEND_SPECIAL_STR="# #")
    assert caplog.messages == ["LMCACHE_BLEND_SPECIAL_STR has no meaning here and is not used"]


def test_each_alias_is_logged_once_with_the_native_spelling(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        resolve({"local_cpu": True, "max_local_cpu_size": 5, "chunk_size": 64}, LMCACHE_MIN_RETRIEVE_TOKENS="9")
    assert caplog.messages == [
        "environment: min_retrieve_tokens is read as min_load_tokens: 9",
        "kv_connector_extra_config: local_cpu is read as enable_cpu: True",
        f"kv_connector_extra_config: max_local_cpu_size is read as cpu_bytes: {5 * GIB}",
    ]


def test_processes_that_are_not_to_tell_say_nothing_and_others_still_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quiet = ConnectorConfig.resolve({"max_local_cpu_size": 5}, {"LMCACHE_STRANGE": "1"}, tell=False)
        with pytest.raises(ConfigurationError):
            ConnectorConfig.resolve({"strange": 5}, {}, tell=False)
        assert not caplog.messages
        assert resolve({"max_local_cpu_size": 5}, LMCACHE_STRANGE="1") == quiet
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a list", "must hold a mapping"), ("a: [", "which is no YAML"), ("chunk_sise: 1", "did you mean 'chunk_size'")],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_file(tmp_path, content)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match="WARMROUTE_CONFIG_FILE names /none, which cannot be read: No such"):
        resolve(None, WARMROUTE_CONFIG_FILE="/none")


def test_the_token_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert "s3cret" not in repr(resolve({"report_token": "s3cret"}))
    assert "s3cret" not in caplog.text


@given(st.integers(1, 2**50))
def test_sizes_are_exact(number: int) -> None:
    assert size(number) == size(str(number)) == size(f" {number} B ") == size(f"{number}b")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("1.5GiB", 3 * GIB // 2),
        ("2 T", 2 << 40),
        ("1e3", None),
        ("", None),
    ],
)
def test_units(text: str, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(ValueError, match="a size above zero"):
            size(text)
    else:
        assert size(text) == nbytes


def test_every_name_leads_somewhere() -> None:
    known = {*SETTINGS, *ALIASES, *ABSENT, *UNNEEDED}
    assert len(known) == len(SETTINGS) + len(ALIASES) + len(ABSENT) + len(UNNEEDED)
    assert {name for section in SECTIONS.values() for name in section.values()} <= known
    assert not set(SETTINGS) & set(ABSENT)
    fields = set(ConnectorConfig.__dataclass_fields__) - {"report_port_is_default"}
    assert fields == set(SETTINGS)


@pytest.mark.parametrize(
    "extra",
    [
        {"remote": "redis://:swordfish@store:6379"},
        {"remote_url": ["redis://:swordfish@store:6379", 5]},
        {"remote": {"url": {"url": "redis://:swordfish@store:6379"}}},
        {"report_token": ["swordfish"]},
        {"report": {"token": ["swordfish"]}},
    ],
)
def test_no_error_tells_a_secret(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        resolve(extra)
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize("text", ["report_token: 'swordfish\ncpu_bytes: 1", "remote_url: redis://:swordfish@h: 5"])
def test_a_file_that_is_no_yaml_is_not_quoted(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no YAML: .* in line \d, column \d") as refused:
        from_file(tmp_path, text)
    assert "swordfish" not in str(refused.value)
