"""What an engine's chunks are like, and which engines' are alike."""

from types import SimpleNamespace
from typing import Any

import pytest

from worker_connector import shape
from worker_connector.config import ConnectorConfig
from worker_connector.geometry import describe_groups
from worker_connector.regions import SlotLayout, group_regions

SPEC = {
    "block_size": 16,
    "num_kv_heads": 2,
    "num_heads": 2,
    "num_states": 16,
    "head_size": 64,
    "head_size_v": 64,
    "state_content_size_bytes": 256,
    "page_size_bytes": 8192,
    "dtype": "torch.bfloat16",
    "kv_quant_mode": 0,
}


def digest(device: str = "cuda", backend: Any = None, **fields: Any) -> bytes:
    spec = type("FullAttentionSpec", (SimpleNamespace,), {})(**{**SPEC, **fields})
    tensor = SimpleNamespace(size=8192 * 10, layers=["l"], layer_stride=81920, block_stride=8192, offset=0)
    cache = SimpleNamespace(
        num_blocks=10,
        kv_cache_layout="LBHNC",
        kv_cache_tensors=[tensor],
        kv_cache_groups=[SimpleNamespace(layer_names=["l"], kv_cache_spec=spec)],
    )
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, world_size=1)
    groups = describe_groups(cache, parallel, 64)
    settings = SimpleNamespace(
        model_config=SimpleNamespace(model="m", dtype="torch.bfloat16", revision=None, quantization=None),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=parallel,
        device_config=SimpleNamespace(device_type=device),
        attention_config=SimpleNamespace(backend=backend),
    )
    layout = SlotLayout(group_regions(cache), [group.blocks_per_chunk for group in groups])
    return shape.identity_of(ConnectorConfig(), settings, cache, groups, layout).digest()


def test_engines_share_chunks_only_where_pages_are_arranged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "_processor", lambda: "x86_64 ['avx512']")
    found = [
        digest(),
        digest(backend="FLASHINFER"),
        digest(num_heads=4, state_content_size_bytes=128),
        digest(head_size_v=32),
        digest("cpu"),
    ]
    monkeypatch.setattr(shape, "_processor", lambda: "x86_64 ['amx_tile', 'avx512']")
    found.append(digest("cpu"))
    assert len(set(found)) == len(found)
    assert digest() == found[0]


def test_the_processor_is_asked() -> None:
    pytest.importorskip("torch")
    assert shape._processor() == shape._processor()
