"""Identity: everything that must be equal for two caches to be interchangeable."""

from hashlib import sha256

import msgspec

from kv_protocol.hashing import HASH_BYTES


class GroupGeometry(msgspec.Struct, frozen=True):
    """One KV-cache group: what its blocks are and how many bytes they take on one rank."""

    kind: str
    block_size: int
    block_bytes: int
    layers: int


class Identity(msgspec.Struct, frozen=True):
    """What the bytes of a chunk depend on, besides its hash. ``weights`` is a revision or a content digest."""

    weights: str
    kv_dtype: str
    layout: str
    groups: tuple[GroupGeometry, ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def digest(self) -> bytes:
        """16 bytes that differ whenever any field does."""
        return sha256(msgspec.msgpack.encode(self)).digest()[:HASH_BYTES]
