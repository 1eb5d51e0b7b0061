"""Every name that users of other systems bring along, in one place, with what it does here.

What the settings themselves then do is proved where it is built; here is that each name reaches its setting, that what
is not there is refused with what stands in its place, and that nothing is passed over without a word.
"""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from router.api import make_rest
from router.app import Gateway
from router.cache_control import Operation
from router.config import Settings, load
from router.engine_flags import EngineFlags
from router.errors import ConfigError
from router.foreign_flags import translate
from router.transfer_config import transfer_config
from worker_connector import get_cache_stats
from worker_connector.config import SETTINGS, ConnectorConfig
from worker_connector.errors import ConfigurationError
from worker_connector.stats import summary
from worker_connector.tier_stores import open_remote, open_stores, tiers_of
from worker_connector.tiers.urls import open_store

GIB = 1 << 30
DISK = "~/.cache/warmroute/chunks"


def resolve(extra: Mapping[str, Any] | None = None, **environ: str) -> ConnectorConfig:
    return ConnectorConfig.resolve(extra or {}, environ)


def changes(config: ConnectorConfig) -> dict[str, Any]:
    """What differs from the defaults."""
    usual = ConnectorConfig()
    return {name: value for name in SETTINGS if (value := getattr(config, name)) != getattr(usual, name)}


# ---- the connector's settings -----------------------------------------------------------------------------------------

READ: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"chunk_size": 128}, {"chunk_size": 128}),
    ({"local_cpu": False}, {"enable_cpu": False}),
    ({"max_local_cpu_size": 5}, {"cpu_bytes": 5 * GIB}),
    ({"local_cpu": True, "max_local_cpu_size": 2.5}, {"cpu_bytes": 5 * GIB // 2}),
    ({"local_cpu": False, "max_local_cpu_size": 0}, {"enable_cpu": False}),
    ({"local_cpu": {"enabled": True, "buffer_size_gb": 20}}, {"cpu_bytes": 20 * GIB}),
    ({"local_device": "cpu"}, {"cpu_ratio": 0.3, "cpu_bytes": None}),
    ({"local_cpu_ratio": 0.5}, {"cpu_ratio": 0.5, "cpu_bytes": None}),
    ({"cpu_bytes_to_use": 7 * GIB}, {"cpu_bytes": 7 * GIB}),  # what --kv-offloading-size 7 hands to a connector
    ({"local_cpu_use_hugepages": True}, {"huge_pages": True}),
    ({"enable_disk_cache": True}, {"enable_disk": True, "disk_path": DISK}),
    ({"disk_cache_path": "/c"}, {"enable_disk": True, "disk_path": "/c"}),
    ({"local_disk": True}, {"enable_disk": True, "disk_path": DISK}),
    ({"local_disk": "/c", "max_local_disk_size": 9}, {"enable_disk": True, "disk_path": "/c", "disk_bytes": 9 * GIB}),
    ({"local_disk": None, "max_local_disk_size": 0}, {}),
    ({"local_disk": {"enabled": True, "path": "/c", "max_size_gb": 1}}, {"enable_disk": True, "disk_path": "/c", "disk_bytes": GIB}),
    ({"enable_remote_cache": True, "remote_url": "redis://s"}, {"enable_remote": True, "remote_url": "redis://s"}),
    ({"remote": {"enabled": True, "url": "redis://s", "serde": "naive"}}, {"enable_remote": True, "remote_url": "redis://s"}),
    ({"remote_serde": "msgpack"}, {}),
    ({"remote_serde": "fp8"}, {"remote_codec": "fp8"}),
    ({"compression": "zstd"}, {"disk_codec": "zstd", "remote_codec": "zstd"}),
    ({"compression": "lz4"}, {"disk_codec": "lz4", "remote_codec": "lz4"}),
    ({"compression": "none"}, {}),
    ({"enable_prefix_cache": False}, {"enable_prefix_cache": False}),
    ({"retrieval_mode": "exact"}, {}),
    ({"eviction_policy": "lfu"}, {"eviction_policy": "lfu"}),
    ({"eviction_policy": "arc"}, {"eviction_policy": "arc"}),
    ({"cache_policy": "LRU"}, {}),
    ({"disk_eviction_policy": "s3fifo"}, {"disk_eviction_policy": "s3fifo"}),
    ({"cache_warmup": True}, {"cache_warmup": True}),
    ({"async_write": False}, {"async_write": False}),
    ({"conversation_mode": True}, {"conversation_mode": True}),
    ({"ttl": 60}, {"ttl": 60}),
    ({"min_retrieve_tokens": 9}, {"min_load_tokens": 9}),
    ({"lookup_timeout_ms": 3000}, {"lookup_timeout": 3.0}),
    ({"blocking_timeout_secs": 10}, {"remote_timeout": 10.0}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "does"), READ, ids=str)
def test_what_a_name_does(given: dict[str, Any], does: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert changes(resolve(given)) == does
    said = caplog.messages
    assert len(said) == len(set(said))
    for name, value in given.items():
        if name not in (*SETTINGS, "remote", "retrieval_mode") and value is not None:
            assert any(" is read as " in line for line in said), f"{name} is not told"
    for native in re.findall(r"is read as (\w+)", "\n".join(said)):
        assert native in (*SETTINGS, "local_device")


VARIABLES: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"LMCACHE_CHUNK_SIZE": "512"}, {"chunk_size": 512}),
    ({"LMCACHE_LOCAL_CPU": "False"}, {"enable_cpu": False}),
    ({"LMCACHE_MAX_LOCAL_CPU_SIZE": "5.0"}, {"cpu_bytes": 5 * GIB}),
    ({"LMCACHE_LOCAL_DISK": "true"}, {"enable_disk": True, "disk_path": DISK}),
    ({"LMCACHE_LOCAL_DISK": "/mnt/c"}, {"enable_disk": True, "disk_path": "/mnt/c"}),
    ({"LMCACHE_LOCAL_DISK": "file:///mnt/c/"}, {"enable_disk": True, "disk_path": "file:///mnt/c/"}),
    ({"LMCACHE_MAX_LOCAL_DISK_SIZE": "10"}, {"disk_bytes": 10 * GIB}),
    ({"LMCACHE_REMOTE_URL": "redis://s:1"}, {"enable_remote": True, "remote_url": "redis://s:1"}),
    ({"LMCACHE_REMOTE_SERDE": "zstd"}, {"remote_codec": "zstd"}),
]


@pytest.mark.parametrize(("environ", "does"), VARIABLES, ids=str)
def test_what_a_variable_does(environ: dict[str, str], does: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert changes(resolve(None, **environ)) == does
    (line,) = caplog.messages
    assert " is read as " in line


@pytest.mark.parametrize("variable", ["LMCACHE_CONFIG_FILE", "WARMROUTE_CONFIG_FILE"])
@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("local_cpu: true\nmax_local_cpu_size: 5\n", {"cpu_bytes": 5 * GIB}),
        ("local_cpu: {enabled: true, buffer_size_gb: 20}\nremote: {enabled: true, url: 'redis://s', serde: naive}\n",
         {"cpu_bytes": 20 * GIB, "enable_remote": True, "remote_url": "redis://s"}),
    ],
)  # fmt: skip
def test_what_a_file_does(variable: str, text: str, does: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert changes(resolve(None, **{variable: str(file)})) == does


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chunk_sise": 1}, "did you mean 'chunk_size'?"),
    ({"remote": {"urll": "x"}}, "did you mean 'url'?"),
    ({"retrieval_mode": "semantic"}, "available here: exact"),
    ({"eviction_policy": "mru"}, "available here: lru, lfu, arc"),
    ({"remote_serde": "cachegen"}, "it is one of raw, exp12, fp8"),
    ({"compression": "gzip"}, "it is one of raw, exp12, fp8"),
    ({"cache_warmup": ["a prompt"]}, "warmroute serve --warmup-prompts FILE"),
    ({"cache_warmup": "prompts.txt"}, "the gateway's warmup_prompts"),
    ({"local_disk": "cache"}, "it must be true, false or a path"),
    ({"local_device": "cuda"}, "available here: cpu"),
    ({"enable_remote_cache": True}, "names no store: set remote_url"),
    ({"nixl_backends": ["UCX"]}, '"kv_connector": "NixlConnector"'),
    ({"local_disk": True, "max_local_disk_size": 0}, "both set enable_disk"),
    ({"force_skip_save": True}, '"kv_role": "kv_consumer"'),
]


@pytest.mark.parametrize(("given", "cure"), REFUSED, ids=str)
def test_what_is_refused_and_with_what_in_its_place(given: dict[str, Any], cure: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(cure)):
        resolve(given)


def test_a_variable_that_is_nearly_one_is_refused_and_a_strange_one_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ConfigurationError, match="did you mean LMCACHE_MAX_LOCAL_CPU_SIZE"):
        resolve(None, LMCACHE_MAX_LOCALCPU_SIZE="5")
    assert changes(resolve(None, LMCACHE_RESERVE_LOCAL_CPU_SIZE="1")) == {}
    assert "LMCACHE_RESERVE_LOCAL_CPU_SIZE has no meaning here" in caplog.text


@pytest.mark.parametrize(
    "name", ["use_layerwise", "lmcache.mp.host", "enable_async_loading", "enable_controller", "track_usage"]
)
@pytest.mark.parametrize("value", [True, False])
def test_what_is_not_needed_is_told(name: str, value: object, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert changes(resolve({name: value})) == {}
    (line,) = caplog.messages
    assert f"{name.removeprefix('lmcache.')} is not needed: " in line


# ---- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "rediss://h", "unix:///s", "redis-sentinel://h/m", "redis-cluster://h", "valkey://h"),
        *("s3://b", "gs://b?anonymous=true", "az://b?account=a&anonymous=true", "file:///shared"),
    ],
)
def test_a_store_opens_by_its_url(url: str) -> None:
    store = open_remote(resolve({"remote_url": url, "ttl": 60}))
    assert store.store._settings.ttl == 60  # type: ignore[attr-defined]
    store.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("lmcache-server:8080", "it has no scheme. A store's URL begins with one of redis://, rediss://, unix://"),
        ("lm://lmcache-server:8080", "give the fleet a Valkey (redis://host:6379) in its place"),
        ("mooncake://h?ttl=60", "set the setting ttl, which every object carries"),
        ("mooncake://h?protocol=udp", "tcp or rdma"),
    ],
)
def test_a_url_that_is_none_is_explained(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        open_store(url)


def test_ttl_and_eviction_hold_in_every_tier(tmp_path: Path) -> None:
    """Mooncake and one-off writes keep it in the object's header, which is looked at in every tier."""
    config = resolve({"ttl": 60, "disk_path": str(tmp_path), "remote_url": "redis://h", "disk_eviction_policy": "arc"})
    stores = open_stores(config)
    disk, remote = stores["disk"].store, stores["remote"].store  # type: ignore[attr-defined]
    assert (disk.settings.ttl, disk.settings.policy, remote._settings.ttl) == (60, "arc", 60)
    assert {tier.ttl for tier in tiers_of(config, stores).values()} == {60}
    for store in stores.values():
        store.close()


# ---- how the connector is named ---------------------------------------------------------------------------------------

_CLASSES = """
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from worker_connector.plugin import register
register(); register()
for name, path in (("WarmrouteConnector", None), *((name, "worker_connector") for name in (
    "LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector", "OffloadingConnector",
    "SimpleCPUOffloadConnector",
))):
    config = KVTransferConfig(kv_connector=name, kv_connector_module_path=path, kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(config).__name__ == "WarmrouteConnector", name
    assert KVConnectorFactory.supports_hma_config(config), name

import json, logging
from types import SimpleNamespace
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from worker_connector import connector
seen = {}
class Half:
    def __init__(self, config, vllm_config, cache, *, may_load, may_save):
        seen[vllm_config.kv_transfer_config.kv_role] = [may_load, may_save]
        seen["cpu_bytes"] = config.cpu_bytes
connector.SchedulerHalf, connector._can_report_failures = Half, lambda cache: True
lines = []
connector._log = SimpleNamespace(info=lambda text, *given: lines.append(text % given))
def make(name, role, size=None):
    transfer = KVTransferConfig(kv_connector=name, kv_connector_module_path="worker_connector", kv_role=role)
    vllm = SimpleNamespace(
        kv_transfer_config=transfer, cache_config=SimpleNamespace(kv_offloading_size=size), ec_transfer_config=None
    )
    connector.WarmrouteConnector(vllm, KVConnectorRole.SCHEDULER, None)
for role in ("kv_both", "kv_producer", "kv_consumer"):
    make("WarmrouteConnector", role)
make("LMCacheMPConnector", "kv_both", 3.0)
print(json.dumps([seen, lines]))
"""


def test_connectors_of_other_names_are_ours_and_roles_are_obeyed() -> None:
    """``--kv-offloading-backend lmcache`` keeps its size to itself; what may not load or save does not, in any tier, is
    in the tests of planner and lower tiers."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    done = subprocess.run([sys.executable, "-c", _CLASSES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, lines = json.loads(done.stdout.strip().splitlines()[-1])
    assert (seen["kv_both"], seen["kv_producer"], seen["kv_consumer"]) == ([True, True], [False, True], [True, False])
    assert seen["cpu_bytes"] == 3 * GIB
    assert lines == ["kv_connector: LMCacheMPConnector is read as WarmrouteConnector"]


# ---- warmroute worker -------------------------------------------------------------------------------------------------

WORKER: list[tuple[list[str], dict[str, str], dict[str, Any]]] = [
    ([], {"ENABLE_LMCACHE": "1"}, {}),
    ([], {"VLLM_ENABLE_LMCACHE": "true"}, {}),
    ([], {"VLLM_ENABLE_LMCACHE": "false"}, {"enable_prefix_cache": False}),
    ([], {"VLLM_KV_OFFLOADING_BACKEND": "native", "VLLM_KV_OFFLOADING_SIZE": "7"}, {"cpu_bytes": 7 * GIB}),
    (["--kv-offloading-backend", "lmcache", "--kv-offloading-size", "2.5"], {}, {"cpu_bytes": 5 * GIB // 2}),
    (["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'], {}, {}),
]


@pytest.mark.parametrize(("flags", "environ", "does"), WORKER, ids=str)
def test_what_a_worker_is_told(flags: list[str], environ: dict[str, str], does: dict[str, Any]) -> None:
    config = transfer_config(EngineFlags.parse(["model", *flags]), (), environ)
    assert config.whole["kv_connector"] == "WarmrouteConnector"
    assert changes(ConnectorConfig.resolve(config.extra, environ)) == does
    assert config.notes


def test_nixl_backends_reach_nixl() -> None:
    config = transfer_config(EngineFlags.parse(["model"]), ["nixl_backends=UCX"], {})
    nixl, ours = config.whole["kv_connector_extra_config"]["connectors"]
    assert (nixl["kv_connector"], nixl["kv_connector_extra_config"]) == ("NixlConnector", {"backends": ["UCX"]})
    assert changes(ConnectorConfig.resolve(ours["kv_connector_extra_config"], {})) == {}


# ---- figures ----------------------------------------------------------------------------------------------------------


def test_figures_have_the_names_that_are_looked_for() -> None:
    """From a URL, and from a program that started the engine: in the tests of the client, and of engines."""
    assert callable(get_cache_stats)
    figures = summary({"prompt_tokens": {"": 8}, "hit_tokens": {"cpu": 2}, "held_chunks": {"cpu": 1, "disk": 3}})
    assert figures["hit_rate"] == 0.25
    assert figures["avg_ttft_reduction"] == 0.0
    assert [figures["tiers"][tier]["held_chunks"] for tier in ("cpu", "disk")] == [1, 3]


# ---- the router -------------------------------------------------------------------------------------------------------

ROUTER: list[tuple[list[str], dict[str, Any]]] = [
    (["--service-discovery", "static", "--static-backends", "http://a:1,http://b:2"], {"workers": ["a:1", "b:2"]}),
    (["--service-discovery", "k8s", "--k8s-label-selector", "app=v", "--k8s-namespace", "n", "--k8s-port", "81"],
     {"kubernetes_selector": "app=v", "kubernetes_namespace": "n", "kubernetes_port": "81"}),
    (["--routing-logic", "session", "--session-key", "x-user-id"], {"policy": "session", "session_header": "x-user-id"}),
    (["--routing-logic", "kvaware", "--lmcache-controller-port", "9000"], {"policy": "longest-hit"}),
    (["--routing-logic", "prefixaware"], {"policy": "longest-hit"}),
    (["--routing-logic", "roundrobin"], {"policy": "round-robin"}),
    (["--worker-urls", "http://a:1", "http://b:2", "--policy", "cache_aware"], {"workers": ["a:1", "b:2"]}),
    (["--router-mode", "kv", "--http-port", "9"], {"policy": "longest-hit", "port": 9}),
    (["--static-models", "m", "--engine-stats-interval", "30"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "does"), ROUTER, ids=str)
def test_what_a_router_is_told(given: list[str], does: dict[str, Any]) -> None:
    arguments, notes = translate(given)
    flags: dict[str, Any] = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        if name == "worker":
            flags.setdefault("workers", []).append(value)
        else:
            flags[name] = value
    settings = load(flags, {})
    found = {name: getattr(settings, name) for name in does}
    assert {**found, **({"workers": [each.title for each in settings.workers]} if "workers" in does else {})} == does
    assert len(notes) == sum(each.startswith("--") for each in given)


def test_what_a_router_is_not_is_said_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="vllm run-batch"):
        translate(["--enable-batch-api"])


@pytest.mark.parametrize(
    "endpoint",
    [
        *("GET /health", "GET /ready", "GET /metrics", "GET /version", "GET /admin/workers", "POST /admin/workers"),
        *("DELETE /admin/workers", "POST /admin/workers/drain", "GET /admin/index", "POST /admin/route"),
        "POST /admin/cache/{operation}",
    ],
)
def test_an_endpoint_is_served(endpoint: str) -> None:
    method, path = endpoint.split(" ")

    async def routes() -> list[Any]:
        return list(make_rest(Gateway(Settings())).routes)

    assert any(route.path == path and method in route.methods for route in asyncio.run(routes()))


def test_operations_on_caches_are_served() -> None:
    assert {"lookup", "clear", "pin", "unpin", "warm", "move"} <= set(get_args(Operation))
