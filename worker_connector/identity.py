"""The identity of an engine's KV cache, from vLLM's configuration: what decides whether two engines may share chunks.

Weights are told apart by what they are, not by the name they go by: a digest of the configuration and of samples of
every weight file that the name leads to on this machine. Two names of the same weights give the same digest; one name
whose weights changed gives another. Where the files are not found (other load formats), name and revision stand for them.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from kv_protocol.identity import GroupGeometry, Identity
from worker_connector.chunk_object import Section
from worker_connector.config import ConnectorConfig
from worker_connector.geometry import Group
from worker_connector.regions import SlotLayout
from worker_connector.tier_movers import Shape

SAMPLES = 64
SAMPLE_BYTES = 64 << 10
"""Each weight file is sampled at so many places, its two ends among them: some MB a file, whatever its size."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TEXT_BYTES = 16

_log = logging.getLogger("vllm.warmroute.scheduler")


def identity_of(vllm_config: Any, cache: Any, groups: Sequence[Group], layout: SlotLayout | None) -> Identity:
    """Everything that two engines must have in common to exchange chunks. ``layout`` is None for a cache that is not
    stored."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Identity(
        weights=weights_of(vllm_config),
        kv_dtype=dtype_of(cache),
        layout=layout_of(cache),
        groups=tuple(_geometry(group, cache, layout) for group in groups),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        compute=_compute_of(model, vllm_config, layout),
    )


def weights_of(vllm_config: Any) -> str:
    """A digest of the weights, or their name and revision, and whatever else decides their values."""
    model, load = vllm_config.model_config, vllm_config.load_config
    form = str(getattr(load.load_format, "value", load.load_format))
    if form == "dummy":
        return f"dummy:{model.model}:{model.seed}"
    folder = _folder_of(str(model.model), getattr(model, "revision", None))
    if folder is not None and (digest := digest_of(folder)):
        return f"sampled:{digest}"
    return f"{form}:{model.model}@{getattr(model, 'revision', None) or ''}"


def digest_of(folder: Path) -> str:
    """A digest of samples of every weight file in a folder; empty where it has none."""
    files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)) if files else ""


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = sha256()
    for path, size, _ in files:
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for at in _places(size):
                file.seek(at)
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()


def _places(size: int) -> Iterable[int]:
    if size <= SAMPLES * SAMPLE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    last = size - SAMPLE_BYTES
    return [last * number // (SAMPLES - 1) for number in range(SAMPLES)]


def _folder_of(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - comes with vLLM, and is slow to import

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001 - whatever keeps the hub's cache from answering, the name has to do
        _log.debug("The weights of %s are not found on this machine: %s", model, error)
        return None


def dtype_of(cache: Any) -> str:
    """The element type of the first group's cache, such as "bfloat16"; never "auto"."""
    for group in cache.kv_cache_groups:
        return _dtype(_members(group)[0])
    return ""


def layout_of(cache: Any) -> str:
    """The order of the cache's dimensions, such as "LBHNC", in at most 16 characters of ASCII."""
    given = getattr(cache, "kv_cache_layout", None)
    text = str(getattr(given, "name", given) or "")
    return text if text.isascii() and len(text) <= _TEXT_BYTES else sha256(text.encode()).hexdigest()[:_TEXT_BYTES]


def shape_of(
    config: ConnectorConfig, vllm_config: Any, cache: Any, groups: Sequence[Group], layout: SlotLayout, *, rank: int
) -> Shape:
    """What one rank's chunk objects are like."""
    return Shape(
        identity=identity_of(vllm_config, cache, groups, layout).digest(),
        rank=rank,
        ranks=vllm_config.parallel_config.world_size,
        layout=layout_of(cache),
        dtype=dtype_of(cache),
        tokens=config.chunk_size,
        sections=sections_of(groups, layout),
        partial=tuple(not group.reads_everything for group in groups),
        payload_bytes=layout.payload_bytes,
    )


def sections_of(groups: Sequence[Group], layout: SlotLayout) -> tuple[Section, ...]:
    """What a chunk object has of each KV-cache group."""
    return tuple(
        Section(
            group.index,
            group.block_size,
            group.blocks_per_chunk,
            0,
            group.blocks_per_chunk * layout.block_bytes(group.index),
        )
        for group in groups
    )


def _geometry(group: Group, cache: Any, layout: SlotLayout | None) -> GroupGeometry:
    described = cache.kv_cache_groups[group.index]
    spec = _members(described)[0]
    return GroupGeometry(
        kind=group.kind,
        block_size=group.block_size,
        block_bytes=layout.block_bytes(group.index) if layout else 0,
        layers=len(described.layer_names),
        heads=int(getattr(spec, "num_kv_heads", 0) or 0),
        head_size=int(getattr(spec, "head_size", 0) or 0),
        dtype=_dtype(spec),
        reach=group.window or group.local,
        members=sha256("\0".join(described.layer_names).encode()).hexdigest()[:16],
    )


def _members(group: Any) -> list[Any]:
    spec = group.kv_cache_spec
    return list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]


def _dtype(spec: Any) -> str:
    name = str(getattr(spec, "dtype", "") or "").removeprefix("torch.")
    mode = getattr(spec, "kv_quant_mode", None)
    kind = str(getattr(mode, "name", mode) or "").lower()
    text = name if kind in ("", "none") else f"{name}/{kind}"
    return text if len(text) <= _TEXT_BYTES else sha256(text.encode()).hexdigest()[:_TEXT_BYTES]


def _compute_of(model: Any, vllm_config: Any, layout: SlotLayout | None) -> str:
    """How the weights are run: element type, quantisation, the model's configuration with all overrides; and how the
    blocks lie in a chunk."""
    facts = {
        "dtype": str(model.dtype),
        "quantization": str(getattr(model, "quantization", None)),
        "kv_dtype": str(vllm_config.cache_config.cache_dtype),
        "config": _plain(getattr(model, "hf_config", None)),
        "overrides": str(getattr(model, "hf_overrides", None)),
        "regions": [[region.nbytes for region in group] for group in layout.regions] if layout else [],
    }
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


_OF_NO_ACCOUNT = frozenset({"_name_or_path", "transformers_version", "architectures"})


def _plain(config: Any) -> Any:
    """A configuration without what says nothing about its computing."""
    told = config.to_dict() if hasattr(config, "to_dict") else config
    return (
        {key: value for key, value in told.items() if key not in _OF_NO_ACCOUNT}
        if isinstance(told, dict)
        else str(told)
    )
