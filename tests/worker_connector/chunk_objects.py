"""Chunk objects for tests. Run as a program, it writes the golden files anew (only when the format changes)."""

from hashlib import sha256
from pathlib import Path

import numpy as np

from worker_connector.chunk_object import Codec, Expected, ObjectKey, Section, seal
from worker_connector.native import Encoding

GOLDEN = Path(__file__).parent / "golden"
CODECS = ("raw", "zstd", "lz4", "fp8", "int8", "exp12", "k16v8", "fp8+zstd", "exp12+zstd")
CREATED = 1_767_225_600.123456
BLOCK_BYTES = 512
SECTIONS = (Section(0, 16, 4, 0, 4 * BLOCK_BYTES), Section(3, 16, 4, 2, 4 * BLOCK_BYTES))
RAW_BYTES = sum(section.raw_bytes for section in SECTIONS)
PACKED_BYTES = {
    Encoding.RAW: RAW_BYTES,
    Encoding.FP8: RAW_BYTES // 2 + 64,
    Encoding.INT8: RAW_BYTES // 2 + 256,
    Encoding.EXP12: RAW_BYTES * 3 // 4 + 32,
    Encoding.K16_V8: RAW_BYTES * 3 // 4 + 64,
}


def key(number: int = 0, *, rank: int = 1, ranks: int = 2, groups: int = 0b1001) -> ObjectKey:
    return ObjectKey(bytes(range(16)), sha256(number.to_bytes(8, "little")).digest()[:16], rank, ranks, groups)


def expected(number: int = 0) -> Expected:
    return Expected(key(number), "LBHNC", "bfloat16", 64, SECTIONS, PACKED_BYTES)


def packed(encoding: Encoding = Encoding.RAW) -> bytes:
    """Bytes like bfloat16 elements of one magnitude, the same everywhere."""
    size = PACKED_BYTES[encoding]
    noise = np.frombuffer(b"".join(sha256(bytes([index])).digest() for index in range(size // 32)), np.uint8)
    made = np.resize(noise, size).copy()
    made[1::2] = 0x3F - (made[1::2] & 3)
    return made.tobytes()


def whole(codec: str = "raw", number: int = 0, *, ttl: int = 0, created: float = CREATED) -> bytes:
    """A whole object: header and payload."""
    made = Codec.parse(codec)
    sealed = seal(expected(number), packed(made.encoding), made, ttl=ttl, created=created)
    return sealed.header + bytes(sealed.payload)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CODECS:
        (GOLDEN / f"{name}.object").write_bytes(whole(name, ttl=3600))
