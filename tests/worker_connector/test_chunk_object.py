import contextlib
import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker_connector.chunk_objects import (
    CODECS,
    CREATED,
    GOLDEN,
    PACKED_BYTES,
    RAW_BYTES,
    SECTIONS,
    expected,
    key,
    packed,
    whole,
)
from worker_connector.chunk_object import (
    HEADER_BYTES,
    Check,
    Codec,
    Expected,
    Header,
    ObjectKey,
    Section,
    open_object,
    read_header,
    seal,
    unpack,
    verify,
)
from worker_connector.compression import Compression
from worker_connector.errors import BadObject, ConfigurationError
from worker_connector.native import Encoding

pytest.importorskip("zstandard")
pytest.importorskip("lz4")


def castagnoli(data: bytes) -> int:
    """CRC-32C bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def opened(data: bytes, wanted: Expected | None = None, now: float = CREATED) -> tuple[Header, bytes]:
    room = bytearray(max(RAW_BYTES, len(data)))
    room[: max(0, len(data) - HEADER_BYTES)] = data[HEADER_BYTES:]
    header = open_object(data[:HEADER_BYTES], room, wanted or expected(), len(data), now)
    return header, bytes(room[: header.packed_bytes])


def failing(data: bytes, wanted: Expected | None = None, now: float = CREATED) -> str:
    with pytest.raises(BadObject) as raised:
        opened(data, wanted, now)
    return raised.value.check


def altered(data: bytes, at: int, form: str, value: object) -> bytes:
    """With one field changed and the header's checksum made right again."""
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    struct.pack_into("<I", changed, 4092, castagnoli(bytes(changed[:4092])))
    return bytes(changed)


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_sealed_comes_back(codec: str) -> None:
    header, found = opened(whole(codec))
    assert found == packed(Codec.parse(codec).encoding)
    assert str(header.codec) == codec
    assert header.sections == SECTIONS


@pytest.mark.parametrize("codec", CODECS)
def test_golden_files_are_read(codec: str) -> None:
    data = (GOLDEN / f"{codec}.object").read_bytes()
    header, found = opened(data)
    encoding = Codec.parse(codec).encoding
    assert found == packed(encoding)
    assert header == read_header(whole(codec, ttl=3600))._replace(
        payload_bytes=header.payload_bytes, payload_crc=header.payload_crc
    )
    assert header.key == key()
    assert header.packed_bytes == PACKED_BYTES[encoding]
    assert header.expires == pytest.approx(CREATED + 3600)


@pytest.mark.parametrize("codec", ["raw", "fp8", "int8", "exp12", "k16v8"])
def test_golden_files_are_written_to_the_byte(codec: str) -> None:
    """Compressors may write other bytes in their next release; nothing else may."""
    assert whole(codec, ttl=3600) == (GOLDEN / f"{codec}.object").read_bytes()


def test_the_specified_places() -> None:
    """The table of docs/chunk-object.md, read literally."""
    data = (GOLDEN / "zstd.object").read_bytes()
    assert data[:8] == bytes.fromhex("895752434f0d0a1a")
    version, encoding, compression, shuffle, sections = struct.unpack_from("<HHBBH", data, 8)
    assert (version, encoding, compression, shuffle, sections) == (1, 0, 1, 2, 2)
    assert data[16:32] == key().identity
    assert data[32:48] == key().chunk
    assert struct.unpack_from("<HHI", data, 48) == (1, 2, 64)
    groups, raw, size, payload, created = struct.unpack_from("<5Q", data, 56)
    assert (groups, raw, size, payload) == (0b1001, 4096, 4096, len(data) - 4096)
    assert created == 1_767_225_600_123_456
    ttl, payload_crc, packed_crc, reserved = struct.unpack_from("<4I", data, 96)
    assert (ttl, payload_crc, packed_crc, reserved) == (3600, castagnoli(data[4096:]), castagnoli(packed()), 0)
    assert data[112:128] == b"LBHNC".ljust(16, b"\0")
    assert data[128:144] == b"bfloat16".ljust(16, b"\0")
    assert not any(data[144:256])
    assert struct.unpack_from("<HHIIIQQ", data, 256) == (0, 0, 16, 4, 0, 2048, 0)
    assert struct.unpack_from("<HHIIIQQ", data, 288) == (3, 0, 16, 4, 2, 2048, 0)
    assert not any(data[320:4092])
    assert struct.unpack_from("<I", data, 4092) == (castagnoli(data[:4092]),)


def test_an_incompressible_chunk_is_kept_raw() -> None:
    noise = random.Random(1).randbytes(RAW_BYTES)
    sealed = seal(expected(), noise, Codec.parse("zstd"), created=CREATED)
    assert sealed.payload.obj is noise
    assert read_header(sealed.header).codec == Codec()


def test_a_wrong_size_is_not_sealed() -> None:
    with pytest.raises(ValueError, match="are no packed form"):
        seal(expected(), b"short", Codec())
    with pytest.raises(ValueError, match="are no packed form"):
        seal(expected()._replace(packed_bytes={}), packed(), Codec())


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "x" * 17},
        {"dtype": "ü"},
        {"tokens": 0},
        {"sections": SECTIONS[::-1]},
        {"sections": SECTIONS[:1]},
        {"sections": (SECTIONS[0]._replace(missing=5), SECTIONS[1])},
        {"key": key()._replace(rank=2)},
        {"key": key()._replace(identity=b"short")},
        {"key": key()._replace(groups=0)},
    ],
    ids=str,
)
def test_impossible_headers_are_not_written(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no object can have such a header"):
        seal(expected()._replace(**change), packed(), Codec())  # type: ignore[arg-type]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda e: e._replace(key=e.key._replace(identity=bytes(16))), Check.IDENTITY),
        (lambda e: e._replace(key=e.key._replace(chunk=bytes(16))), Check.CHUNK),
        (lambda e: e._replace(key=e.key._replace(rank=0)), Check.RANK),
        (lambda e: e._replace(key=e.key._replace(ranks=4)), Check.RANK),
        (lambda e: e._replace(key=e.key._replace(groups=1)), Check.GROUPS),
        (lambda e: e._replace(layout="BLHNC"), Check.LAYOUT),
        (lambda e: e._replace(dtype="float16"), Check.LAYOUT),
        (lambda e: e._replace(tokens=32), Check.LAYOUT),
        (lambda e: e._replace(sections=SECTIONS[:1]), Check.GROUPS),
        (lambda e: e._replace(sections=(SECTIONS[0], SECTIONS[1]._replace(missing=1))), Check.GROUPS),
        (lambda e: e._replace(sections=(SECTIONS[0]._replace(block_tokens=32), SECTIONS[1])), Check.GROUPS),
        (lambda e: e._replace(packed_bytes={Encoding.FP8: 5}), Check.CODEC),
        (lambda e: e._replace(packed_bytes={Encoding.RAW: RAW_BYTES + 16}), Check.SIZES),
    ],
)
def test_another_engines_object_is_refused(change: Callable[[Expected], Expected], check: Check) -> None:
    assert failing(whole(), change(expected())) == check


def test_blocks_may_be_missing_where_they_are_not_needed() -> None:
    lenient = expected()._replace(sections=(SECTIONS[0]._replace(missing=3), SECTIONS[1]._replace(missing=4)))
    header, _ = opened(whole(), lenient)
    assert [section.missing for section in header.sections] == [0, 2]


@pytest.mark.parametrize(
    ("at", "form", "value", "check"),
    [
        (0, "<8s", b"\x89PNG\r\n\x1a\n", Check.MAGIC),
        (8, "<H", 2, Check.VERSION),
        (10, "<H", 99, Check.FIELDS),
        (12, "<B", 9, Check.FIELDS),
        (13, "<B", 3, Check.FIELDS),
        (14, "<H", 65535, Check.FIELDS),
        (14, "<H", 3, Check.FIELDS),
        (14, "<H", 0, Check.FIELDS),
        (50, "<H", 0, Check.FIELDS),
        (52, "<I", 0, Check.FIELDS),
        (56, "<Q", 2**64 - 1, Check.FIELDS),
        (64, "<Q", 2**64 - 1, Check.FIELDS),
        (72, "<Q", 2**63, Check.FIELDS),
        (80, "<Q", 2**64 - 1, Check.FIELDS),
        (80, "<Q", 0, Check.FIELDS),
        (88, "<Q", 2**64 - 1, Check.FIELDS),
        (100, "<I", 7, Check.FIELDS),
        (108, "<I", 1, Check.FIELDS),
        (112, "<B", 200, Check.FIELDS),
        (112, "<B", 10, Check.FIELDS),
        (200, "<B", 1, Check.FIELDS),
        (258, "<H", 1, Check.FIELDS),
        (272, "<Q", 2**64 - 1, Check.FIELDS),
        (280, "<Q", 1, Check.FIELDS),
        (3000, "<B", 1, Check.FIELDS),
    ],
)
def test_fields_out_of_range_are_refused_though_the_checksum_holds(
    at: int, form: str, value: object, check: Check
) -> None:
    assert failing(altered(whole(), at, form, value)) == check


def test_truncated_objects_are_refused() -> None:
    data = whole("zstd")
    for size in (0, 1, 4095, 4096, 4097, len(data) - 1):
        assert failing(data[:size]) == Check.LENGTH


def test_memory_pages_behind_the_payload_are_ignored_and_nothing_else_is() -> None:
    data = whole("zstd")
    page = -len(data) % 4096
    assert opened(data + b"\xff" * page)[1] == packed()
    assert failing(data + b"\0") == Check.LENGTH
    assert failing(data + bytes(page + 4096)) == Check.LENGTH


def test_objects_expire() -> None:
    data = whole(ttl=60)
    assert opened(data, now=CREATED + 59)
    assert opened(data, now=CREATED - 3600), "clocks differ a little"
    assert failing(data, now=CREATED + 60) == Check.EXPIRED
    assert failing(data, now=CREATED - 90_000) == Check.EXPIRED, "it would never expire"
    assert opened(whole(), now=CREATED * 2)


def test_a_room_that_is_too_small_is_not_written_past() -> None:
    data = whole("zstd")
    room = bytearray(data[HEADER_BYTES:])
    before = bytes(room)
    with pytest.raises(BadObject, match="the room has"):
        open_object(data[:HEADER_BYTES], room, expected(), len(data), CREATED)
    assert room == before


def test_a_compressor_that_lies_is_found_out() -> None:
    data = whole("zstd")
    header = read_header(data)._replace(packed_crc=1)
    assert failing(header.pack() + data[HEADER_BYTES:]) == Check.CONTENT_CHECKSUM
    garbage = bytes(header.payload_bytes)
    header = header._replace(payload_crc=castagnoli(garbage))
    assert failing(header.pack() + garbage) == Check.DECOMPRESSION


@pytest.mark.parametrize("codec", CODECS)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_every_flipped_bit_is_seen(codec: str, place: int, bit: int) -> None:
    data = bytearray(whole(codec))
    place %= len(data)
    data[place] ^= 1 << bit
    found = failing(bytes(data))
    wanted = Check.MAGIC if place < 8 else Check.VERSION if place < 10 else Check.HEADER_CHECKSUM
    assert found == (wanted if place < HEADER_BYTES else Check.PAYLOAD_CHECKSUM)


@given(data=st.binary(max_size=9000))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_survived(data: bytes) -> None:
    assert failing(data) in {Check.LENGTH, Check.MAGIC}


@given(
    fields=st.lists(st.tuples(st.integers(8, 4091), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    codec=st.sampled_from(CODECS),
)
@settings(deadline=None, max_examples=300)
def test_any_header_with_a_right_checksum_is_survived(fields: list[tuple[int, bytes]], codec: str) -> None:
    """An object that passes is the object that was expected: its payload never changed."""
    data = bytearray(whole(codec))
    for at, content in fields:
        data[at : min(at + len(content), 4092)] = content[: 4092 - at]
    struct.pack_into("<I", data, 4092, castagnoli(bytes(data[:4092])))
    wanted = packed(Codec.parse(codec).encoding)
    with contextlib.suppress(BadObject):
        assert opened(bytes(data), now=CREATED)[1] == wanted


@given(data=st.binary(min_size=256 - 8, max_size=340))
@settings(deadline=None, max_examples=200)
def test_any_fields_with_a_right_checksum_are_survived(data: bytes) -> None:
    block = altered(whole(), 0, "<8s", whole()[:8])
    block = block[:10] + data + block[10 + len(data) :]
    with pytest.raises(BadObject):
        opened(altered(block, 8, "<H", 1))


def test_no_memory_is_taken_for_a_length_that_was_read() -> None:
    huge = altered(altered(whole("zstd"), 72, "<Q", 1 << 40), 64, "<Q", 1 << 40)
    tracemalloc.start()
    try:
        assert failing(huge) in {Check.FIELDS, Check.SIZES}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_payload_shorter_than_its_header_says_is_not_read_past() -> None:
    header = read_header(whole())
    with pytest.raises(BadObject, match="bytes of payload"):
        unpack(header, b"short")


def test_a_header_can_be_verified_before_the_payload_is_read() -> None:
    header = read_header(whole("lz4"))
    verify(header, expected(), header.object_bytes, CREATED)
    with pytest.raises(BadObject, match="length"):
        verify(header, expected(), header.object_bytes - 1, CREATED)


# ---- names ----------------------------------------------------------------------------------------------------------


keys = st.builds(
    lambda identity, chunk, rank, more, groups: ObjectKey(identity, chunk, rank, rank + 1 + more, groups),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 60_000),
    st.integers(0, 5_000),
    st.integers(1, 2**64 - 1),
)


@given(keys)
def test_keys_are_written_and_read(made: ObjectKey) -> None:
    text = str(made)
    assert ObjectKey.parse(text) == made
    assert len(text) <= 98
    assert set(text) <= set("0123456789abcdefghijklmnopqrstuvwxyz-")


@given(
    st.one_of(st.text(max_size=120), keys.map(lambda made: str(made).upper()), keys.map(lambda made: str(made) + "x"))
)
def test_other_texts_are_no_keys(text: str) -> None:
    with pytest.raises(ValueError, match="is no object's key"):
        ObjectKey.parse(text)


def test_a_key_has_one_spelling() -> None:
    text = str(key())
    assert text == f"w1-{bytes(range(16)).hex()}-{key().chunk.hex()}-1of2-9"
    for other in (
        text.replace("1of2", "01of2"),
        text.replace("-9", "-09"),
        text.replace("1of2", "2of2"),
        "w2" + text[2:],
    ):
        with pytest.raises(ValueError, match="is no object's key"):
            ObjectKey.parse(other)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("raw", Codec()),
        ("ZSTD", Codec(Encoding.RAW, Compression.ZSTD)),
        ("k16v8", Codec(Encoding.K16_V8)),
        ("zstd+fp8", Codec(Encoding.FP8, Compression.ZSTD)),
        ("raw+lz4", Codec(Encoding.RAW, Compression.LZ4)),
    ],
)
def test_codecs_by_name(name: str, codec: Codec) -> None:
    assert Codec.parse(name) == codec
    assert Codec.parse(str(codec)) == codec


@pytest.mark.parametrize("name", ["", "gzip", "fp8+int8", "zstd+lz4", "raw+raw", "fp8+"])
def test_other_codecs_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="it is one of raw, exp12, fp8, k16v8, int8, zstd, lz4"):
        Codec.parse(name)


def test_any_section_table_fits() -> None:
    sections = tuple(Section(group, 16, 2**32 - 1, 0, 1 << 30) for group in range(64))
    header = read_header(whole())._replace(
        sections=sections, key=key(groups=2**64 - 1), packed_bytes=64 << 30, payload_bytes=64 << 30
    )
    assert read_header(header.pack()) == header
