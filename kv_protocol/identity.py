"""Identity: everything that must be equal for two caches to be interchangeable.

``H(x)`` is the first 16 bytes of SHA-256 of ``x``. The digest of an identity is ``H`` of its MessagePack map, fields in
the order in which they are declared. With a LoRA adapter it is ``H(identity digest, "lora" NUL, content digest)``:
adapters are told apart by what they hold, not by what they are called.

Weights that were changed in a running engine are another *generation* of those it started with. Its digest is
``H(identity digest, "generation" NUL, name of the generation)``; the weights of the start have no name, and the digest
of the identity itself.

Model *names* are no part of it. Engines that serve the same weights under two names exchange chunks when they are
configured to hash under one name (``model_name``), because the name is bound into chunk hashes.
"""

from hashlib import sha256

import msgspec

from kv_protocol.hashing import HASH_BYTES

_ADAPTER_TAG = b"lora\0"
_GENERATION_TAG = b"generation\0"
MOST_GENERATION = 128
"""Characters in the name of a generation of weights."""


class GroupGeometry(msgspec.Struct, frozen=True):
    """One KV-cache group: what its blocks are and how many bytes they take on one rank.

    ``dtype`` is the element type of its cache, ``reach`` the tokens a layer looks back (0: all), ``members`` the layer
    indices it has, such as ``"0-31"``.
    """

    kind: str
    block_size: int
    block_bytes: int
    layers: int
    heads: int = 0
    head_size: int = 0
    dtype: str = ""
    reach: int = 0
    members: str = ""


class Identity(msgspec.Struct, frozen=True):
    """What the bytes of a chunk depend on, besides its hash.

    ``weights`` is a revision or a content digest. ``kv_dtype`` is the resolved element type of the KV cache, never
    "auto". ``compute`` tells how the weights are run: element type, quantisation, and a digest of the model's
    configuration with all overrides, since rotary scaling or a window changes K and V as weights do.
    """

    weights: str
    kv_dtype: str
    layout: str
    groups: tuple[GroupGeometry, ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    compute: str = ""

    def digest(self, adapter: bytes = b"") -> bytes:
        """16 bytes that differ whenever any field does, or the content digest of the LoRA ``adapter``."""
        own = sha256(msgspec.msgpack.encode(self)).digest()[:HASH_BYTES]
        return sha256(own + _ADAPTER_TAG + adapter).digest()[:HASH_BYTES] if adapter else own


def in_generation(identity: bytes, generation: str) -> bytes:
    """The digest of an identity once its weights are of this generation: its own for the weights of the start, whose
    name is empty."""
    if not generation:
        return identity
    return sha256(identity + _GENERATION_TAG + generation.encode()).digest()[:HASH_BYTES]


def generation_name(text: str) -> str:
    """A name for a generation of weights, which may not be empty.

    Raises:
        ValueError: it is no such name; the text says what is.
    """
    if not 0 < len(text) <= MOST_GENERATION or not text.isprintable() or text != text.strip():
        raise ValueError(f"it must be 1 to {MOST_GENERATION} printable characters without space around them")
    return text
