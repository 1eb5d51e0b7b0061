"""vLLM's KV events: what an engine without the connector says of its prefix cache (``--kv-events-config``).

A publisher sends three ZeroMQ frames: topic, sequence number (8 bytes, big-endian, from 0 in each process), and a msgpack
array of time, events and data-parallel rank; an event is a map with its ``type``, as vLLM writes it from 0.24 on
(``vllm.distributed.kv_events``). A replay endpoint, where there is one, sends again what it still has from a number on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from kv_protocol.errors import MalformedFrame
from router.errors import UNDECODABLE

WILDCARDS = frozenset({"*", "0.0.0.0", "::", ""})  # noqa: S104 - recognised, not bound


class BlockStored(msgspec.Struct, tag=True):
    """Blocks came to be held, each the child of the one before it; the first one's parent is None at a prompt's start."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks are held no longer."""

    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is held."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True):
    """What one step of the engine changed."""

    at: float
    events: list[Event]
    rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True):
    at: float
    events: list[msgspec.Raw]
    rank: int | None = None


class _Typed(msgspec.Struct):
    type: str


_KNOWN = frozenset(kind.__name__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared))
_batch = msgspec.msgpack.Decoder(Batch)
_raw_batch = msgspec.msgpack.Decoder(_RawBatch)
_typed = msgspec.msgpack.Decoder(_Typed)
_event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def read_batch(payload: bytes) -> Batch:
    """Events of kinds that are not known here are left out.

    Raises:
        MalformedFrame: these are no KV events, or those of a vLLM before 0.24.
    """
    try:
        return _batch.decode(payload)
    except UNDECODABLE:
        pass
    try:
        raw = _raw_batch.decode(payload)
        known = [event for event in raw.events if _typed.decode(event).type in _KNOWN]
        return Batch(raw.at, [_event.decode(event) for event in known], raw.rank)
    except UNDECODABLE as error:
        raise MalformedFrame(f"what came are no KV events as vLLM writes them since 0.24: {error}") from error


class Source(NamedTuple):
    """Where an engine's events come from: ZeroMQ endpoints to connect to; ``replay`` is empty where nothing is replayed."""

    endpoint: str
    replay: str = ""
    topic: str = ""


class _Config(msgspec.Struct):
    """What ``GET /kv_event_sources`` says of one data-parallel rank."""

    endpoint: str
    publisher: str | None = "zmq"
    replay_endpoint: str | None = None
    topic: str = ""
    enable_kv_cache_events: bool = True


def sources_of(body: bytes, host: str) -> dict[int, Source]:
    """The publishers that an engine at ``host`` names in ``GET /kv_event_sources``, by data-parallel rank.

    Raises:
        MalformedFrame: the body is something else.
    """
    try:
        configs = msgspec.json.decode(body, type=dict[int, _Config])
    except UNDECODABLE as error:
        raise MalformedFrame(f"GET /kv_event_sources answered something else: {error}") from error
    return {
        rank: Source(reachable(config.endpoint, host), reachable(config.replay_endpoint or "", host), config.topic)
        for rank, config in configs.items()
        if config.enable_kv_cache_events and config.publisher == "zmq" and config.endpoint
    }


def source_of(sources: Mapping[int, Source], rank: int | None) -> Source | None:
    """The publisher of a worker's cache, None where none is; ``why_none`` says why. A worker that is no rank has one cache,
    whatever its number among the engines of a deployment."""
    if rank is None and len(sources) == 1:
        return next(iter(sources.values()))
    return sources.get(rank) if rank is not None else None


def why_none(sources: Mapping[int, Source], rank: int | None) -> str:
    """Why ``source_of`` found none, and what to do."""
    if rank is None and len(sources) > 1:
        return (
            f"{len(sources)} data-parallel ranks have a cache each: have them as workers each, with dp={len(sources)}"
        )
    return "the engine publishes no KV events: start it with --kv-events-config"


def reachable(endpoint: str, host: str) -> str:
    """An endpoint as bound by an engine (``tcp://*:5557``), to be connected to at its ``host``."""
    scheme, separator, address = endpoint.partition("://")
    bound, colon, port = address.rpartition(":")
    if scheme != "tcp" or not colon or bound.strip("[]") not in WILDCARDS:
        return endpoint
    return f"{scheme}{separator}{f'[{host}]' if ':' in host else host}:{port}"
