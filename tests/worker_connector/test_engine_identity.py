import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kv_protocol.identity import Identity
from worker_connector.engine_identity import adapter_digest, engine_identity, weights_identity
from worker_connector.errors import ConfigurationError
from worker_connector.geometry import Group

GROUP = Group(0, "FullAttentionSpec", 16, 16)


def identity(weights: str = "w", group: Group = GROUP, block_bytes: int = 8192, **changes: Any) -> Identity:
    given = {
        "cache_dtype": "auto", "dtype": "torch.bfloat16", "quantization": None, "config": {"rope_theta": 1e4, "_name_or_path": "x"},
        "heads": 8, "head_size": 128, "kv": "torch.bfloat16", "layout": "LBHNC", "tp": 1, "pp": 1, "layers": ["a", "b"],
    } | changes  # fmt: skip
    spec = SimpleNamespace(num_kv_heads=given["heads"], head_size=given["head_size"], dtype=given["kv"])
    cache = SimpleNamespace(
        kv_cache_layout=given["layout"],
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=given["layers"])],
    )
    model = SimpleNamespace(
        dtype=given["dtype"],
        quantization=given["quantization"],
        hf_text_config=SimpleNamespace(to_dict=lambda: given["config"]),
    )
    vllm_config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=given["cache_dtype"]),
        parallel_config=SimpleNamespace(tensor_parallel_size=given["tp"], pipeline_parallel_size=given["pp"]),
    )
    return engine_identity(vllm_config, cache, [group], [block_bytes], weights)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"block_bytes": 4096},
        {"group": Group(0, "SlidingWindowSpec", 16, 16, window=512)},
        {"group": Group(0, "SlidingWindowSpec", 16, 16, window=1024)},
        {"cache_dtype": "fp8"},
        {"dtype": "torch.float16", "kv": "torch.float16"},
        {"dtype": "torch.float16"},
        {"quantization": "awq"},
        {"config": {"rope_theta": 1e6}},
        {"heads": 4, "head_size": 256},
        {"layout": "BLHNC"},
        {"tp": 2},
        {"pp": 2},
        {"layers": ["a", "c"]},
    ],
    ids=str,
)
def test_engines_that_differ_share_nothing(change: dict[str, Any]) -> None:
    assert identity(**change).digest() != identity().digest()


def test_engines_that_differ_in_names_only_share() -> None:
    assert identity(config={"rope_theta": 1e4, "_name_or_path": "elsewhere"}).digest() == identity().digest()
    assert identity().kv_dtype == "bfloat16"


def test_weights_are_told_by_content(tmp_path: Path) -> None:
    for name, content in [("one", b"w"), ("same", b"w"), ("other", b"v")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "README.md").write_text(name)
    one, same, other = (weights_identity(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other
    blob = tmp_path / hashlib.sha256(b"w").hexdigest()
    blob.write_bytes(b"not read: a blob is named by its content")
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "model.safetensors").symlink_to(blob)
    assert weights_identity(str(tmp_path / "cached")) == one
    assert weights_identity(str(tmp_path / "other"), override="mine") == weights_identity("nowhere", override="mine")


def test_weights_that_cannot_be_told_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_connector.engine_identity._cached", lambda *_: None)
    with pytest.raises(ConfigurationError, match="set weights_id"):
        weights_identity("organisation/model", "main")
    with pytest.raises(ConfigurationError, match="has no files"):
        weights_identity(str(tmp_path))


def test_adapters_are_told_by_content_and_configuration(tmp_path: Path) -> None:
    digests = set()
    for number, (alpha, weights) in enumerate([(8, b"a"), (16, b"a"), (8, b"b"), (8, b"a")]):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        (directory / "adapter_model.safetensors").write_bytes(weights)
        digests.add(adapter_digest(directory))
    assert len(digests) == 3


def test_a_file_is_read_once_per_machine_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_connector.engine_identity._NOTES", tmp_path / "notes")
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"one")
    first = weights_identity(str(model))
    reads: list[object] = []
    monkeypatch.setattr("worker_connector.engine_identity.file_digest", lambda *given: reads.append(given) or 1 / 0)
    assert weights_identity(str(model)) == first
    weights.write_bytes(b"other")
    with pytest.raises(ZeroDivisionError):
        weights_identity(str(model))
    assert len(reads) == 1
