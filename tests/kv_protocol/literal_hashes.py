"""Chunk hashes by the letter of docs/chunk-hashes.md, sharing no code with the package: slow and plain on purpose."""

import hashlib
from typing import Any


def literal_hashes(
    *,
    chunk_size: int,
    model: str,
    tokens: list[int],
    lora: str = "",
    cache_salt: str = "",
    media: list[dict[str, Any]] | None = None,
) -> tuple[bytes, list[bytes]]:
    """Root and the hashes of every whole chunk of a prompt."""
    root = _h(b"warmroute chunk root" + bytes([0]) + _u32(1) + _u32(chunk_size) + _f(model) + _f(lora) + _f(cache_salt))
    parent, hashes = root, []
    for number in range(len(tokens) // chunk_size):
        first = number * chunk_size
        text = parent
        for token in tokens[first : first + chunk_size]:
            text += _u32(token)
        for item in sorted(media or [], key=lambda each: (each["offset"], each["length"])):
            begin, end = item["offset"], item["offset"] + item["length"]
            if any(first <= position < first + chunk_size for position in range(begin, end)):
                text += (begin - first).to_bytes(8, "little", signed=True) + _u32(item["length"]) + _f(item["hash"])
        parent = _h(text)
        hashes.append(parent)
    return root, hashes


def _h(data: bytes) -> bytes:
    return hashlib.new("sha256", data).digest()[0:16]


def _u32(number: int) -> bytes:
    return bytes([number & 255, number >> 8 & 255, number >> 16 & 255, number >> 24 & 255])


def _f(text: str) -> bytes:
    return _u32(len(text.encode("utf-8"))) + text.encode("utf-8")
