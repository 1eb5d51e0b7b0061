"""What an engine's chunks are like, for those who keep them below the CPU tier: whose they are, and what they consist of."""

from collections.abc import Sequence
from hashlib import sha256
from platform import machine
from typing import Any
from uuid import uuid4

import msgspec

from kv_protocol.identity import Identity
from worker_connector.chunk_object import Section
from worker_connector.config import ConnectorConfig
from worker_connector.engine_identity import engine_identity, weights_identity
from worker_connector.geometry import Group
from worker_connector.regions import SlotLayout
from worker_connector.tier_movers import Shape

_TEXT_BYTES = 16
_PAGE_FIELDS = ("num_heads", "num_states", "state_content_size_bytes", "head_size_v", "kv_quant_mode")


def identity_of(
    config: ConnectorConfig, vllm_config: Any, cache: Any, groups: Sequence[Group], layout: SlotLayout | None
) -> Identity:
    """The identity of an engine. ``layout`` is None for a cache that is not stored. Without lower tiers nobody else reads
    its chunks, and weights are told by their name; with them by their content, which may have to be read.

    Raises:
        ConfigurationError: there are lower tiers, and what the weights are cannot be told.
    """
    sizes = [layout.block_bytes(group.index) if layout else 0 for group in groups]
    found = engine_identity(vllm_config, cache, groups, sizes, _weights_of(config, vllm_config))
    if layout is None:
        return found
    # Blocks lie in a slot region by region.
    regions = repr([[region.nbytes for region in group] for group in layout.regions])
    inside = f"{regions} {_arrangement(vllm_config, cache)}"
    return msgspec.structs.replace(found, layout=f"{found.layout}:{sha256(inside.encode()).hexdigest()[:16]}")


def _arrangement(vllm_config: Any, cache: Any) -> str:
    """How K and V lie inside a page, as far as it shows: attention backends have arrangements of their own, and on
    processors each instruction set has."""
    device = str(getattr(getattr(vllm_config, "device_config", None), "device_type", ""))
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    specs = [
        spec
        for group in cache.kv_cache_groups
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
    ]
    pages = [tuple(str(getattr(spec, name, "")) for name in _PAGE_FIELDS) for spec in specs]
    return repr((device, str(backend), pages, _processor() if device == "cpu" else ""))


def _processor() -> str:
    """What decides how attention on processors arranges its cache."""
    import torch  # noqa: PLC0415 - there wherever vLLM is

    checks = {name: getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512")}
    return f"{machine()} {[name for name, check in checks.items() if check is not None and check()]}"


def _weights_of(config: ConnectorConfig, vllm_config: Any) -> str:
    model = vllm_config.model_config
    revision = getattr(model, "revision", None)
    form = getattr(vllm_config.load_config, "load_format", "")
    if str(getattr(form, "value", form)) == "dummy":
        return f"dummy:{model.model}:{model.seed}"
    if config.has_lower_tiers:
        return weights_identity(str(model.model), revision, config.weights_id)
    return config.weights_id or f"{model.model}@{revision or ''}"


def fresh_generation() -> str:
    """A name for weights that no other engine has, and this one had not before."""
    return f"reset-{uuid4().hex}"


def shape_of(
    config: ConnectorConfig, vllm_config: Any, cache: Any, groups: Sequence[Group], layout: SlotLayout, *, rank: int
) -> Shape:
    """What one rank's chunk objects are like. Raises as ``identity_of``."""
    identity = identity_of(config, vllm_config, cache, groups, layout)
    return Shape(
        identity=identity.digest(),
        rank=rank,
        ranks=vllm_config.parallel_config.world_size,
        layout=_short(str(getattr(cache, "kv_cache_layout", None) or "")),
        dtype=_short(identity.groups[0].dtype),
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


def _short(text: str) -> str:
    """A text as a header has room for it: 16 characters of ASCII."""
    fits = text.isascii() and len(text) <= _TEXT_BYTES
    return text if fits else sha256(text.encode()).hexdigest()[:_TEXT_BYTES]
