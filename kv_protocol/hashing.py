"""Chunk hashes: the identity of a run of prompt tokens together with everything before it.

The format, in full (see docs/chunk-hashes.md for the test vectors):

- ``H(x)`` is the first 16 bytes of SHA-256 of ``x``.
- ``root = H("warmroute chunk root" NUL, format, chunk_size, field(model), field(lora), field(cache_salt))`` where
  ``format`` and ``chunk_size`` are little-endian uint32 and ``field(s)`` is the UTF-8 length of ``s`` as
  little-endian uint32 followed by its UTF-8 bytes.
- ``hash_i = H(hash_{i-1}, tokens, media)`` with ``hash_{-1} = root``; ``tokens`` are the chunk's token ids as
  little-endian uint32; ``media`` is, for each media item that overlaps the chunk, in order of position:
  ``int64(offset of the item's first placeholder minus the chunk's first token), uint32(placeholders), field(hash)``.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

FORMAT = 1
HASH_BYTES = 16

_ROOT_TAG = b"warmroute chunk root\0"
_NATIVE_U32 = array("I").itemsize == 4 and sys.byteorder == "little"


class Media(NamedTuple):
    """An image, audio or video item: ``length`` placeholder tokens from token ``offset`` of the prompt on."""

    hash: str
    offset: int
    length: int


def root_hash(*, chunk_size: int, model: str, lora: str = "", cache_salt: str = "") -> bytes:
    """The 16 bytes every chunk hash of this namespace descends from.

    Raises:
        ValueError: ``chunk_size`` is not in 1..2^32-1.
    """
    if not 0 < chunk_size < 2**32:
        raise ValueError(f"chunk_size must be between 1 and 2^32-1, got {chunk_size}")
    fields = b"".join(_field(text) for text in (model, lora, cache_salt))
    return sha256(_ROOT_TAG + struct.pack("<II", FORMAT, chunk_size) + fields).digest()[:HASH_BYTES]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32.

    Raises:
        ValueError: an id is not in 0..2^32-1.
    """
    try:
        return array("I", tokens).tobytes() if _NATIVE_U32 else struct.pack(f"<{len(tokens)}I", *tokens)
    except (OverflowError, TypeError, struct.error) as error:
        raise ValueError(f"token ids must be integers between 0 and 2^32-1: {error}") from error


def chunk_hashes(
    parent: bytes, tokens: Sequence[int], chunk_size: int, *, media: Iterable[Media] = (), start: int = 0
) -> list[bytes]:
    """Hashes of the whole chunks of ``tokens``, 16 bytes each; a last, unfilled chunk has none.

    ``parent`` is the root, or the hash of the chunk that ends where ``tokens`` begins; ``start`` is the position of
    ``tokens[0]`` in the prompt, which media offsets count from. About 1 µs per chunk of 256 tokens.

    Raises:
        ValueError: a token id is not a uint32, or ``start`` is not a chunk boundary.
    """
    if start % chunk_size:
        raise ValueError(f"start ({start}) must be a multiple of chunk_size ({chunk_size})")
    data = token_bytes(tokens)
    items = sorted(media, key=lambda item: (item.offset, item.length))
    if not items:
        return run_hashes(parent, data, chunk_size)
    width = chunk_size * 4
    hashes: list[bytes] = []
    for at in range(0, len(data) - width + 1, width):
        preimage = parent + data[at : at + width] + _media_bytes(items, start + at // 4, chunk_size)
        parent = sha256(preimage).digest()[:HASH_BYTES]
        hashes.append(parent)
    return hashes


def run_hashes(parent: bytes, tokens: bytes, chunk_size: int) -> list[bytes]:
    """What ``chunk_hashes`` gives for tokens without media, given as their ``token_bytes``."""
    width = chunk_size * 4
    hashes: list[bytes] = []
    for at in range(0, len(tokens) - width + 1, width):
        parent = sha256(parent + tokens[at : at + width]).digest()[:HASH_BYTES]
        hashes.append(parent)
    return hashes


def chunk_hash(parent: bytes, tokens: bytes) -> bytes:
    """Hash of one whole chunk without media, given its ``token_bytes``."""
    return sha256(parent + tokens).digest()[:HASH_BYTES]


def _media_bytes(items: list[Media], first: int, chunk_size: int) -> bytes:
    return b"".join(
        struct.pack("<qI", item.offset - first, item.length) + _field(item.hash)
        for item in items
        if item.offset < first + chunk_size and item.offset + item.length > first
    )


def _field(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data
