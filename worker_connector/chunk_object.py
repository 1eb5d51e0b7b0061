"""The chunk object: how KV bytes of one chunk are kept on disk, on the wire and in remote stores.

A header of 4,096 bytes and the payload behind it; docs/chunk-object.md specifies every byte. Readers assume nothing:
each field is checked before it is used, memory is taken for sizes that the reading engine expects and never for sizes
that were read, and whatever fails is told by name (``Check``). An object that passes holds the bytes that were sealed,
by an engine of the same identity.
"""

import struct
import time
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple, Self, TypeAlias

import numpy as np

from worker_connector.codecs import ENCODINGS, LOSSLESS
from worker_connector.codecs import name_of as encoding_name
from worker_connector.compression import Compression, Undecodable, compress, decompress
from worker_connector.errors import BadObject, ConfigurationError
from worker_connector.native import Encoding, crc32c

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC: Final = b"\x89WRCO\r\n\x1a"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
"""The header's size, and the alignment at which the payload begins."""
MAX_PAYLOAD_BYTES: Final = 1 << 40
MAX_GROUPS: Final = 64
"""KV-cache groups have numbers below this."""

_FIELDS = struct.Struct("<8sHHBBH16s16sHHIQQQQQIIII16s16s")
_SECTION = struct.Struct("<HHIIIQQ")
_CHECKSUM = struct.Struct("<I")
_TEXT_BYTES = 16
_SECTIONS_AT = 256
_CHECKSUM_AT = HEADER_BYTES - _CHECKSUM.size
# What tells an uncompressed object's header from others of its kind, besides the header's own checksum.
_CHUNK_AT = struct.calcsize("<8sHHBBH16s")
_CREATED = struct.Struct("<Q")
_CREATED_AT = struct.calcsize("<8sHHBBH16s16sHHIQQQQ")
_CHECKSUMS = struct.Struct("<II")
_CHECKSUMS_AT = struct.calcsize("<8sHHBBH16s16sHHIQQQQQI")
_MOST_SECONDS = 1 << 43
_SKEW_SECONDS = 86_400
_MICRO = 1_000_000


class Check(StrEnum):
    """What an object failed, in the order in which the checks are made."""

    LENGTH = "length"
    MAGIC = "magic"
    VERSION = "version"
    HEADER_CHECKSUM = "header_checksum"
    FIELDS = "fields"
    IDENTITY = "identity"
    CHUNK = "chunk"
    RANK = "rank"
    GROUPS = "groups"
    LAYOUT = "layout"
    CODEC = "codec"
    SIZES = "sizes"
    EXPIRED = "expired"
    PAYLOAD_CHECKSUM = "payload_checksum"
    DECOMPRESSION = "decompression"
    CONTENT_CHECKSUM = "content_checksum"
    DECODING = "decoding"


class ObjectKey(NamedTuple):
    """Names one object. ``identity`` and ``chunk`` are 16 bytes each; ``groups`` has a bit for each KV-cache group."""

    identity: bytes
    chunk: bytes
    rank: int = 0
    ranks: int = 1
    groups: int = 1

    def __str__(self) -> str:
        """Lower-case letters, digits and dashes, at most 98 of them: fit for file names and the keys of any store."""
        return f"w1-{self.identity.hex()}-{self.chunk.hex()}-{self.rank}of{self.ranks}-{self.groups:x}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The key that is written as ``text``.

        Raises:
            ValueError: no key is written like that.
        """
        try:
            _, identity, chunk, rank, groups = text.split("-")
            own, _, ranks = rank.partition("of")
            key = cls(bytes.fromhex(identity), bytes.fromhex(chunk), int(own), int(ranks), int(groups, 16))
        except ValueError:
            raise ValueError(f"{text[:120]!r} is no object's key") from None
        if str(key) != text or not key.is_possible:
            raise ValueError(f"{text[:120]!r} is no object's key")
        return key

    @property
    def is_possible(self) -> bool:
        """Whether every field is in its range."""
        lengths = len(self.identity) == len(self.chunk) == 16
        return lengths and 0 <= self.rank < self.ranks < 1 << 16 and 0 < self.groups < 1 << MAX_GROUPS


class Codec(NamedTuple):
    """How bytes are kept: a native encoding of KV elements, and lossless compression on top."""

    encoding: Encoding = Encoding.RAW
    compression: Compression = Compression.NONE

    def __str__(self) -> str:
        if self.encoding is Encoding.RAW and self.compression is not Compression.NONE:
            return self.compression.name.lower()
        encoding = encoding_name(self.encoding)
        return encoding if self.compression is Compression.NONE else f"{encoding}+{self.compression.name.lower()}"

    @property
    def is_lossless(self) -> bool:
        """Whether it gives back every bit."""
        return self.encoding in LOSSLESS

    @classmethod
    def parse(cls, name: str) -> Self:
        """The codec of a name: an encoding (raw, fp8, int8, exp12, k16v8), a compression (zstd, lz4), or both joined
        by ``+``, as in ``exp12+zstd``.

        Raises:
            ConfigurationError: there is no such codec.
        """
        parts = name.lower().split("+")
        encodings = [ENCODINGS[part] for part in parts if part in ENCODINGS]
        compressions = [_COMPRESSIONS[part] for part in parts if part in _COMPRESSIONS]
        if len(encodings) + len(compressions) < len(parts) or len(encodings) > 1 or len(compressions) > 1:
            known = ", ".join([*ENCODINGS, *_COMPRESSIONS])
            raise ConfigurationError(f"there is no codec {name!r}: it is one of {known}, or two joined by +")
        return cls([*encodings, Encoding.RAW][0], [*compressions, Compression.NONE][0])


_COMPRESSIONS = {"zstd": Compression.ZSTD, "lz4": Compression.LZ4}


class Section(NamedTuple):
    """One KV-cache group's share: ``blocks`` of ``block_tokens`` tokens, together ``raw_bytes`` before any encoding.

    The bytes of the first ``missing`` blocks are undefined: a sliding window had passed them when the chunk was saved.
    """

    group: int
    block_tokens: int
    blocks: int
    missing: int
    raw_bytes: int


class Header(NamedTuple):
    """What a header says. Sizes are bytes: of the KV cache's elements (raw), of the packed form, which differs from it
    by the encoding, and of the payload, which differs from that by compression. ``created`` is in seconds since the
    epoch; ``ttl`` is in seconds, 0 for ever."""

    key: ObjectKey
    codec: Codec
    shuffle: int
    layout: str
    dtype: str
    tokens: int
    sections: tuple[Section, ...]
    packed_bytes: int
    payload_bytes: int
    created: float
    ttl: int
    payload_crc: int
    packed_crc: int

    @property
    def raw_bytes(self) -> int:
        return sum(section.raw_bytes for section in self.sections)

    @property
    def object_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes

    @property
    def expires(self) -> float:
        """Seconds since the epoch; infinite for an object that is kept for ever."""
        return self.created + self.ttl if self.ttl else float("inf")

    def pack(self) -> bytes:
        """The 4,096 bytes of the header.

        Raises:
            ValueError: a field is out of its range.
        """
        if problem := _problem_of_its_own(self) if self.codec.compression is Compression.NONE else _problem(self):
            raise ValueError(f"no object can have such a header: {problem}")
        form = bytearray(_form_of(_common(self)) if self.codec.compression is Compression.NONE else _body(self))
        form[_CHUNK_AT : _CHUNK_AT + 16] = self.key.chunk
        _CREATED.pack_into(form, _CREATED_AT, round(self.created * _MICRO))
        _CHECKSUMS.pack_into(form, _CHECKSUMS_AT, self.payload_crc, self.packed_crc)
        return bytes(form + _CHECKSUM.pack(crc32c(form)))


def _common(header: Header) -> Header:
    """What the headers of all uncompressed objects of one kind have in common: an engine has a few kinds."""
    return header._replace(key=header.key._replace(chunk=bytes(16)), created=0.0, payload_crc=0, packed_crc=0)


@lru_cache(maxsize=64)
def _form_of(header: Header) -> bytes:
    if problem := _problem(header):
        raise ValueError(f"no object can have such a header: {problem}")
    return _body(header)


def _body(header: Header) -> bytes:
    """A header but for its checksum."""
    key = header.key
    fields = _Fields(
        MAGIC,
        VERSION,
        header.codec.encoding,
        header.codec.compression,
        header.shuffle,
        len(header.sections),
        key.identity,
        key.chunk,
        key.rank,
        key.ranks,
        header.tokens,
        key.groups,
        header.raw_bytes,
        header.packed_bytes,
        header.payload_bytes,
        round(header.created * _MICRO),
        header.ttl,
        header.payload_crc,
        header.packed_crc,
        0,
        header.layout.encode("ascii"),
        header.dtype.encode("ascii"),
    )
    rows = (_SECTION.pack(s.group, 0, s.block_tokens, s.blocks, s.missing, s.raw_bytes, 0) for s in header.sections)
    fixed = _FIELDS.pack(*fields).ljust(_SECTIONS_AT, b"\0")
    return (fixed + b"".join(rows)).ljust(_CHECKSUM_AT, b"\0")


class Expected(NamedTuple):
    """What the reading engine needs an object to be. ``packed_bytes`` are by the encodings that it can scatter. A
    section's ``missing`` is the most that may be missing of it."""

    key: ObjectKey
    layout: str
    dtype: str
    tokens: int
    sections: tuple[Section, ...]
    packed_bytes: Mapping[Encoding, int]


class Sealed(NamedTuple):
    """An object ready to be stored: ``header`` and, behind it, ``payload``, which may be a view of what was sealed."""

    header: bytes
    payload: memoryview

    @property
    def size(self) -> int:
        return len(self.header) + self.payload.nbytes


def element_bytes(dtype: str) -> int:
    """Bytes per KV element by the name of its type; 1 where there is nothing to tell bytes apart by."""
    return {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4, "float64": 8}.get(
        dtype.rsplit(".", maxsplit=1)[-1], 1
    )


def seal(
    expected: Expected, packed: Buffer, codec: Codec, *, ttl: int = 0, created: float = 0.0, level: int = 1
) -> Sealed:
    """An object of a chunk's packed form, which is already in the codec's encoding.

    ``expected`` describes the chunk as a reader would; its sections say what is missing. The packed bytes must not
    change until the object is stored: if they do, readers refuse it. ``created`` is now unless it is given. Costs one
    pass for the checksum and, with compression, what ``compress`` costs.

    Raises:
        ValueError: the packed form has not the size that its encoding has.
        ConfigurationError: the compression's library is not installed.
    """
    view = memoryview(packed).cast("B")
    if view.nbytes != expected.packed_bytes.get(codec.encoding):
        raise ValueError(
            f"{view.nbytes} bytes are no packed form of {codec.encoding.name} with {expected.packed_bytes}"
        )
    unit = element_bytes(expected.dtype) if codec.encoding is Encoding.RAW else 1
    made = compress(view, codec.compression, unit, level)
    packed_crc = crc32c(view)
    header = Header(
        expected.key,
        Codec(codec.encoding, made.compression),
        made.shuffle,
        expected.layout,
        expected.dtype,
        expected.tokens,
        expected.sections,
        view.nbytes,
        made.data.nbytes,
        created or time.time(),
        ttl,
        packed_crc if made.compression is Compression.NONE else crc32c(made.data),
        packed_crc,
    )
    return Sealed(header.pack(), made.data)


def read_header(block: Buffer) -> Header:
    """The header in the first 4,096 bytes of ``block``, sound in itself. Whose it is, ``verify`` tells.

    Raises:
        BadObject: it is no header, or a damaged one.
    """
    view = memoryview(block).cast("B")
    if view.nbytes < HEADER_BYTES:
        raise BadObject(Check.LENGTH, f"{view.nbytes} bytes are no header")
    view = view[:HEADER_BYTES]
    fields = _Fields._make(_FIELDS.unpack_from(view))
    if fields.magic != MAGIC:
        raise BadObject(Check.MAGIC, "it does not begin as chunk objects do")
    if fields.version != VERSION:
        raise BadObject(Check.VERSION, f"its format is {fields.version}, this release reads {VERSION}")
    (checksum,) = _CHECKSUM.unpack_from(view, _CHECKSUM_AT)
    if checksum != crc32c(view[:_CHECKSUM_AT]):
        raise BadObject(Check.HEADER_CHECKSUM, "the header is damaged")
    rest = view[_FIELDS.size : _CHECKSUM_AT].tobytes()
    if fields.compression != Compression.NONE:
        return _parsed(fields, rest)
    form = _parsed_form(fields._replace(chunk=bytes(16), created=0, payload_crc=0, packed_crc=0), rest)
    header = form._replace(
        key=form.key._replace(chunk=fields.chunk),
        created=fields.created / _MICRO,
        payload_crc=fields.payload_crc,
        packed_crc=fields.packed_crc,
    )
    if problem := _problem_of_its_own(header):
        raise BadObject(Check.FIELDS, problem)
    return header


def verify(header: Header, expected: Expected, size: int, now: float = 0.0) -> None:
    """Check that an object of ``size`` bytes with this header is the one that is expected, and has not expired.

    Stores that keep whole memory pages may return up to 4,095 bytes behind the payload, to a multiple of 4,096; they
    are ignored. ``now`` is the time unless it is given.

    Raises:
        BadObject: it is another one, or its time is over.
    """
    spare = size - header.object_bytes
    if spare and (spare < 0 or spare >= HEADER_BYTES or size % HEADER_BYTES):
        raise BadObject(Check.LENGTH, f"{size} bytes where its header says {header.object_bytes}")
    _verify_key(header.key, expected.key)
    _verify_content(header, expected)
    age = (now or time.time()) - header.created
    if header.ttl and not -_SKEW_SECONDS <= age < header.ttl:
        raise BadObject(Check.EXPIRED, f"it was kept for {header.ttl} s and is {age:.0f} s old")


def unpack(header: Header, payload: Buffer) -> memoryview:
    """The packed form, from a payload whose header was verified: a view of the payload unless it was compressed.

    Raises:
        BadObject: the payload is damaged.
    """
    view = memoryview(payload).cast("B")
    if view.nbytes < header.payload_bytes:
        raise BadObject(Check.LENGTH, f"{view.nbytes} bytes of payload where its header says {header.payload_bytes}")
    view = view[: header.payload_bytes]
    if crc32c(view) != header.payload_crc:
        raise BadObject(Check.PAYLOAD_CHECKSUM, "the payload is damaged")
    if header.codec.compression is Compression.NONE:
        return view
    try:
        packed = decompress(view, header.codec.compression, header.shuffle, header.packed_bytes)
    except Undecodable as error:
        raise BadObject(Check.DECOMPRESSION, str(error)) from error
    except ConfigurationError as error:
        raise BadObject(Check.CODEC, str(error)) from error
    if crc32c(packed) != header.packed_crc:
        raise BadObject(Check.CONTENT_CHECKSUM, "decompression did not give back what was compressed")
    return packed


def open_object(block: Buffer, room: Buffer, expected: Expected, size: int, now: float = 0.0) -> Header:
    """Turn an object that was read into ``block`` (its header) and ``room`` (its payload) into its packed form, in the
    first ``packed_bytes`` bytes of ``room``, which must be writable. ``size`` is what the store says it has read.

    Costs one pass over the payload; compressed ones are unpacked beside the room and copied. After a failure the
    room's bytes are undefined.

    Raises:
        BadObject: a check failed; nothing of it may be used.
    """
    header = read_header(block)
    verify(header, expected, size, now)
    unpack_in_place(header, room)
    return header


def unpack_in_place(header: Header, room: Buffer) -> None:
    """Turn the payload in ``room``, whose header was verified, into its packed form, as ``open_object`` does.

    Raises:
        BadObject: the payload is damaged.
    """
    view = memoryview(room).cast("B")
    if view.nbytes < header.packed_bytes:
        raise BadObject(Check.SIZES, f"the room has {view.nbytes} bytes, the packed form {header.packed_bytes}")
    packed = unpack(header, view)
    if header.codec.compression is not Compression.NONE:
        np.copyto(np.frombuffer(view[: header.packed_bytes], np.uint8), np.frombuffer(packed, np.uint8))


def _verify_key(found: ObjectKey, wanted: ObjectKey) -> None:
    if found.identity != wanted.identity:
        raise BadObject(Check.IDENTITY, f"it is of an engine with identity {found.identity.hex()}")
    if found.chunk != wanted.chunk:
        raise BadObject(Check.CHUNK, f"it is of chunk {found.chunk.hex()}")
    if (found.rank, found.ranks) != (wanted.rank, wanted.ranks):
        raise BadObject(Check.RANK, f"it is of rank {found.rank} of {found.ranks}")
    if found.groups != wanted.groups:
        raise BadObject(Check.GROUPS, f"it has the KV-cache groups {found.groups:#x}")


def _verify_content(header: Header, expected: Expected) -> None:
    if (header.layout, header.dtype, header.tokens) != (expected.layout, expected.dtype, expected.tokens):
        text = f"it has {header.tokens} tokens of {header.dtype} in the layout {header.layout}"
        raise BadObject(Check.LAYOUT, text)
    if len(header.sections) != len(expected.sections):
        raise BadObject(Check.GROUPS, f"it has {len(header.sections)} sections")
    for found, wanted in zip(header.sections, expected.sections, strict=True):
        if found._replace(missing=0) != wanted._replace(missing=0) or found.missing > wanted.missing:
            raise BadObject(Check.GROUPS, f"it has {found}")
    if header.codec.encoding not in expected.packed_bytes:
        raise BadObject(Check.CODEC, f"it is encoded as {header.codec}, which this engine does not read")
    if header.packed_bytes != expected.packed_bytes[header.codec.encoding]:
        raise BadObject(Check.SIZES, f"its packed form has {header.packed_bytes} bytes")


class _Fields(NamedTuple):
    """The header's fixed fields, in their order."""

    magic: bytes
    version: int
    encoding: int
    compression: int
    shuffle: int
    sections: int
    identity: bytes
    chunk: bytes
    rank: int
    ranks: int
    tokens: int
    groups: int
    raw_bytes: int
    packed_bytes: int
    payload_bytes: int
    created: int
    ttl: int
    payload_crc: int
    packed_crc: int
    reserved: int
    layout: bytes
    dtype: bytes


@lru_cache(maxsize=64)
def _parsed_form(fields: _Fields, rest: bytes) -> Header:
    return _parsed(fields, rest)


def _parsed(fields: _Fields, rest: bytes) -> Header:
    """The fields of a header whose checksum holds, and what lies behind them. They are checked all the same: a checksum is no
    proof of sense."""
    if fields.sections > MAX_GROUPS:
        raise BadObject(Check.FIELDS, f"it has {fields.sections} sections")
    start = _SECTIONS_AT - _FIELDS.size
    end = start + fields.sections * _SECTION.size
    rows = list(_SECTION.iter_unpack(rest[start:end]))
    unused = rest[:start] + rest[end:]
    if unused.strip(b"\0") or fields.reserved or any(row[1] or row[6] for row in rows):
        raise BadObject(Check.FIELDS, "a reserved field is not zero")
    try:
        header = _header(fields, tuple(Section(row[0], *row[2:6]) for row in rows))
    except ValueError as error:
        raise BadObject(Check.FIELDS, str(error)) from error
    if problem := _problem(header):
        raise BadObject(Check.FIELDS, problem)
    if header.raw_bytes != fields.raw_bytes:
        raise BadObject(Check.FIELDS, "its sections do not add up to its size")
    return header


def _header(fields: _Fields, sections: tuple[Section, ...]) -> Header:
    return Header(
        ObjectKey(fields.identity, fields.chunk, fields.rank, fields.ranks, fields.groups),
        Codec(Encoding(fields.encoding), Compression(fields.compression)),
        fields.shuffle,
        fields.layout.rstrip(b"\0").decode("ascii"),
        fields.dtype.rstrip(b"\0").decode("ascii"),
        fields.tokens,
        sections,
        fields.packed_bytes,
        fields.payload_bytes,
        fields.created / _MICRO,
        fields.ttl,
        fields.payload_crc,
        fields.packed_crc,
    )


def _problem_of_its_own(header: Header) -> str:
    """What no writer writes, of what tells an uncompressed object from others of its kind."""
    if header.payload_crc != header.packed_crc:
        return "its content checksum is not its payload's"
    if not 0 <= header.created < _MOST_SECONDS:
        return "its time is beyond all bounds"
    return "" if len(header.key.chunk) == 16 else "its key is impossible"


def _problem(header: Header) -> str:
    """What makes a header one that no writer writes; empty when it is sound."""
    compressed = header.codec.compression is not Compression.NONE
    groups = [section.group for section in header.sections]
    checks = {
        "its key is impossible": header.key.is_possible,
        "a text field is no short printable text": _is_field(header.layout) and _is_field(header.dtype),
        "its sections are not its groups in order": groups == _bits(header.key.groups),
        "a section is impossible": all(map(_is_possible, header.sections)),
        "it has no tokens": 0 < header.tokens < 1 << 32,
        "its bytes have no order that is known": header.shuffle in ((1, 2, 4, 8) if compressed else (1,)),
        "its payload is larger than its packed form": header.payload_bytes <= header.packed_bytes,
        "its payload is not its packed form": compressed or header.payload_bytes == header.packed_bytes,
        "its content checksum is not its payload's": compressed or header.payload_crc == header.packed_crc,
        "a size is beyond all bounds": header.payload_bytes > 0 and header.packed_bytes <= MAX_PAYLOAD_BYTES,
        "its packed form is not its raw form": header.codec.encoding is not Encoding.RAW
        or header.packed_bytes == header.raw_bytes,
        "its time is beyond all bounds": 0 <= header.created < _MOST_SECONDS and 0 <= header.ttl < 1 << 32,
    }
    return next((text for text, holds in checks.items() if not holds), "")


def _bits(groups: int) -> list[int]:
    return [bit for bit in range(MAX_GROUPS) if groups >> bit & 1]


def _is_field(text: str) -> bool:
    return len(text) <= _TEXT_BYTES and text.isascii() and text.isprintable()


def _is_possible(section: Section) -> bool:
    counts = 0 < section.block_tokens < 1 << 32 and 0 < section.blocks < 1 << 32
    return counts and 0 <= section.missing <= section.blocks and 0 < section.raw_bytes <= MAX_PAYLOAD_BYTES
