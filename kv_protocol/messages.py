"""What travels on a report connection, and its framing.

A reader connects to a worker's report port and sends ``Open``; the worker answers ``Hello``. If the reader asked to
watch, a snapshot follows (``Snapshot`` frames, then ``SnapshotEnd``) and then, in order and without gaps, every change:
``Stored``, ``Removed``, ``Cleared``, with ``Admitted``, ``Heartbeat`` and ``Digest`` between them. Either way the reader
may send ``Call``; each is answered by one ``Reply`` with its ``id``. ``Bye`` names the reason before a side closes.

A frame is its payload's length as little-endian uint32, then the payload: one message as a msgpack map whose ``type``
names the message. Unknown fields and unknown types are ignored, so minor versions may add both; another major version
is refused. Chunk hashes travel as one byte string, 16 bytes each.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from kv_protocol.digests import SetDigest
from kv_protocol.errors import FrameTooLarge, IncompatibleVersion, MalformedFrame
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.identity import Identity

MAJOR = 1
MINOR = 0
MAX_FRAME_BYTES = 16 << 20
SNAPSHOT_CHUNKS = 65_536
"""Most hashes in one Snapshot frame: 1 MiB."""

TIERS = ("gpu", "cpu", "disk", "remote")
"""Every tier, fastest first."""


class Open(msgspec.Struct, tag="open"):
    """Reader to worker, first: which protocol, whether to watch, and the shared token when the worker wants one."""

    major: int = MAJOR
    minor: int = MINOR
    watch: bool = True
    token: str = ""
    reader: str = ""


class TierInfo(msgspec.Struct):
    """A tier as the worker has it: at least ``capacity_chunks``, 0 where that is not known, of ``chunk_bytes`` each, on all
    ranks together; bandwidth in bytes per second, of all ranks, as measured, 0 where nothing was moved yet."""

    name: str
    capacity_chunks: int
    chunk_bytes: int
    load_bandwidth: float = 0.0
    store_bandwidth: float = 0.0


class Hello(msgspec.Struct, tag="hello"):
    """Worker to reader, first. ``epoch`` is fresh in every process: whatever a reader knew from another epoch is
    void. ``model`` is the name that the chunk hashes' root binds."""

    epoch: str
    model: str
    chunk_size: int
    block_size: int
    identity: Identity
    tiers: list[TierInfo]
    data_parallel_rank: int = 0
    max_model_len: int = 0
    version: str = ""
    major: int = MAJOR
    minor: int = MINOR


class Snapshot(msgspec.Struct, tag="snapshot"):
    """A part of a tier's content when the watch began."""

    tier: str
    chunks: bytes


class SnapshotEnd(msgspec.Struct, tag="snapshot_end"):
    """The snapshot is complete; changes follow."""


class Stored(msgspec.Struct, tag="stored"):
    tier: str
    chunks: bytes


class Removed(msgspec.Struct, tag="removed"):
    tier: str
    chunks: bytes


class Cleared(msgspec.Struct, tag="cleared"):
    """A tier was emptied."""

    tier: str


class Admitted(msgspec.Struct, tag="admitted"):
    """A request began to run: what it really reused. ``request_id`` is the engine's external id; tokens by tier."""

    request_id: str
    prompt_tokens: int
    hit_tokens: dict[str, int]


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Load as of now, every second: requests running and waiting, prompt tokens not yet computed, share of the GPU's
    KV cache in use, measured prefill speed (tokens per second, 0 where unknown), chunks held and the bandwidths of
    each tier."""

    running: int
    waiting: int
    uncached_tokens: int
    gpu_usage: float
    prefill_speed: float
    held_chunks: dict[str, int]
    load_bandwidth: dict[str, float]


class Digest(msgspec.Struct, tag="digest"):
    """Digest of every tier's content at this point of the stream."""

    tiers: dict[str, SetDigest]


class Call(msgspec.Struct, tag="call"):
    """A control request: ``stats``, ``lookup``, ``clear``, ``pin``, ``unpin`` and whatever ``operations`` lists."""

    id: int
    operation: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, tag="reply"):
    """The answer to a Call: ``error`` is empty on success."""

    id: int
    result: Any = None
    error: str = ""


class Bye(msgspec.Struct, tag="bye"):
    """The sender is about to close, and why."""

    reason: str


Message = (
    Open
    | Hello
    | Snapshot
    | SnapshotEnd
    | Stored
    | Removed
    | Cleared
    | Admitted
    | Heartbeat
    | Digest
    | Call
    | Reply
    | Bye
)

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_type_decoder = msgspec.msgpack.Decoder(dict[str, Any])
_KNOWN_TYPES = frozenset(
    msgspec.inspect.type_info(kind).tag  # type: ignore[attr-defined]
    for kind in Message.__args__
)


def encode(message: Message) -> bytes:
    """One frame.

    Raises:
        FrameTooLarge: the message does not fit a frame.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"{type(message).__name__} of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a byte stream into messages. Holds at most one unfinished frame of ``limit`` bytes."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Every message completed by ``data``, in order; messages of unknown type are passed over.

        Raises:
            FrameTooLarge: a length prefix exceeds the limit.
            MalformedFrame: a payload is not a message.
        """
        self._buffer += data
        at = 0
        try:
            while (payload := self._payload(at)) is not None:
                at += _LENGTH.size + len(payload)
                message = _decode(payload)
                if message is not None:
                    yield message
        finally:
            del self._buffer[:at]

    def _payload(self, at: int) -> bytes | None:
        start = at + _LENGTH.size
        if len(self._buffer) < start:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, at)
        if length > self._limit:
            raise FrameTooLarge(f"frame of {length} bytes exceeds the limit of {self._limit}: is this a report port?")
        return bytes(self._buffer[start : start + length]) if len(self._buffer) >= start + length else None


def check_version(message: Open | Hello) -> None:
    """Accept any minor version of this major one.

    Raises:
        IncompatibleVersion: the other side speaks another major version.
    """
    if message.major != MAJOR:
        raise IncompatibleVersion(
            f"the other side speaks report protocol {message.major}.{message.minor}, this side {MAJOR}.{MINOR}: "
            "run the same major version of warmroute in router and workers"
        )


def pack(chunks: Iterable[bytes]) -> bytes:
    """Hashes as one byte string."""
    return b"".join(chunks)


def unpack(chunks: bytes) -> list[bytes]:
    """The hashes in a byte string.

    Raises:
        MalformedFrame: the length is not a multiple of 16.
    """
    if len(chunks) % HASH_BYTES:
        raise MalformedFrame(f"{len(chunks)} bytes are no whole number of {HASH_BYTES}-byte chunk hashes")
    return [chunks[at : at + HASH_BYTES] for at in range(0, len(chunks), HASH_BYTES)]


def _decode(payload: bytes) -> Message | None:
    try:
        return _decoder.decode(payload)
    except _UNDECODABLE as error:
        if _has_unknown_type(payload):
            return None
        raise MalformedFrame(f"not a report message: {error}") from error


def _has_unknown_type(payload: bytes) -> bool:
    try:
        kind = _type_decoder.decode(payload).get("type")
    except _UNDECODABLE:
        return False
    return isinstance(kind, str) and kind not in _KNOWN_TYPES
