"""Chunks on a real disk in every codec: what comes back, what is refused, and what damage does."""

import random
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM (CPU build)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.worker_connector.test_regions import MODELS, full, group
from tests.worker_connector.test_slot_codec import Bench
from worker_connector.chunk_object import HEADER_BYTES, Codec, Section, read_header
from worker_connector.config import ConnectorConfig
from worker_connector.errors import ConfigurationError
from worker_connector.native import Encoding, crc32c
from worker_connector.plan import Piece, TierJob, TierResult
from worker_connector.slot_codec import SlotCodec
from worker_connector.tier_movers import Shape, Tier, TierMovers
from worker_connector.tier_stores import announce, divided, rules_of, slot_codec_of, tiers_of
from worker_connector.tiers.disk import DiskSettings, DiskStore

CHUNK, OTHER = b"c" * 16, b"d" * 16
CODECS = ["raw", "zstd", "lz4", "exp12", "fp8", "int8", "k16v8", "exp12+zstd", "exp12+lz4", "fp8+zstd", "int8+lz4"]
LOSSLESS = [name for name in CODECS if Codec.parse(name).is_lossless]
MODELS_HERE = {
    "gqa": MODELS["gqa"],
    "hybrid": MODELS["hybrid"],
    "mla": MODELS["mla"],
    "padded": MODELS["padded"],
    "float16": [group(full(dtype=torch.float16), "l0", "l1")],
    "float32": [group(full(dtype=torch.float32), "l0", "l1")],
}


class Engine:
    """One rank with two slots, of which the first holds a chunk, and a tier on disk."""

    def __init__(self, bench: Bench, directory: Path, codec: str = "raw", **options: Any) -> None:
        sections = tuple(
            Section(each.index, each.block_size, each.blocks_per_chunk, 0, each.blocks_per_chunk * nbytes)
            for each in bench.groups
            for nbytes in [bench.layout.block_bytes(each.index)]
        )
        partial = tuple(not each.reads_everything for each in bench.groups)
        shape = Shape(bytes(16), 0, 1, "x", "bfloat16", 64, sections, partial, bench.layout.payload_bytes)
        self.bench, self.directory, self.codec = bench, directory, SlotCodec(bench.geometry())
        self.store = DiskStore(DiskSettings(directory=directory, max_bytes=256 << 20))
        assert self.store.wait_scanned(10)
        options.setdefault("takes_lossy", not Codec.parse(codec).is_lossless)
        tier = Tier(store=self.store, codec=Codec.parse(codec), **options)
        memory = memoryview(bench.slab.numpy())
        self.movers = TierMovers({"disk": tier}, memory, bench.layout.slot_bytes, shape, self.codec)

    def run(self, kind: str, piece: Piece) -> TierResult:
        self.movers.submit([TierJob(1, "disk", kind, [piece], 10.0)])  # type: ignore[arg-type]
        deadline = time.monotonic() + 20
        while not self.movers.has_results:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return self.movers.take()[1]

    def slot(self, index: int) -> bytes:
        return bytes(self.bench.slot(index)[: self.bench.layout.payload_bytes])

    def stored(self) -> Path:
        (path,) = [path for path in self.directory.rglob("w1-*") if path.is_file() and path.stat().st_size]
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.movers.close()


@pytest.fixture(scope="module")
def gqa() -> Bench:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    bench.save()
    return bench


def as_decoded(engine: Engine, encoding: Encoding, missing: tuple[int, ...]) -> bytes:
    """The first slot, encoded and decoded without a tier."""
    size = engine.bench.layout.slot_bytes
    form, room = memoryview(bytearray(engine.codec.packed_bytes[encoding])), memoryview(bytearray(size))
    engine.codec.encode(engine.bench.slot(0), missing, encoding, form)
    engine.codec.decode(form, room, missing, encoding)
    return bytes(room[: engine.bench.layout.payload_bytes])


def suiting(bench: Bench) -> Iterator[str]:
    suits = SlotCodec(bench.geometry()).packed_bytes
    yield from (name for name in CODECS if Codec.parse(name).encoding in {*suits, Encoding.RAW})


@pytest.mark.parametrize(
    "layout", [KVCacheLayout.LBHNC, KVCacheLayout.LHBNC, KVCacheLayout.BLNHC], ids=lambda x: x.name
)
@pytest.mark.parametrize("model", MODELS_HERE)
def test_a_chunk_comes_back_in_every_codec_that_suits(model: str, layout: KVCacheLayout, tmp_path: Path) -> None:
    bench = Bench(MODELS_HERE[model], layout)
    missing = (0, 2, 4) if model == "hybrid" else ()
    bench.save(missing)
    for name in suiting(bench):
        encoding = Codec.parse(name).encoding
        with Engine(bench, tmp_path / name, name) as engine:
            before = engine.slot(0)
            assert not engine.run("write", Piece(CHUNK, 0, missing)).failed
            bench.slot(1)[:] = b"\x99" * len(bench.slot(1))
            fetched = engine.run("fetch", Piece(CHUNK, 1))
            assert not fetched.failed
            assert fetched.missing == ({CHUNK: missing} if missing else {})
            assert fetched.lossy == (set() if Codec.parse(name).is_lossless else {CHUNK})
            assert engine.slot(0) == before
            wanted = before if encoding is Encoding.RAW else as_decoded(engine, encoding, missing)
            assert engine.slot(1) == wanted
            header = read_header(engine.stored().read_bytes()[:HEADER_BYTES])
            assert header.codec.encoding is encoding
            assert encoding is Encoding.RAW or header.packed_bytes < bench.layout.payload_bytes


@pytest.mark.parametrize("name", ["exp12", "fp8", "int8", "k16v8"])
def test_what_comes_back_is_within_the_bounds_of_its_encoding(gqa: Bench, tmp_path: Path, name: str) -> None:
    with Engine(gqa, tmp_path, name) as engine:
        engine.run("write", Piece(CHUNK, 0))
        engine.run("fetch", Piece(CHUNK, 1))
        before, after = (torch.frombuffer(bytearray(engine.slot(at)), dtype=torch.bfloat16).double() for at in (0, 1))
    # Layer, block, head, token, K or V, and element.
    exact, kept = (each.reshape(3, 4, 4, 16, 2, 64) for each in (before, after))
    rounding = kept.abs() / 2**8
    of_tokens = exact.abs().amax(-1, keepdim=True)
    fp8 = (1 + 2**-20) * torch.maximum(exact.abs() / 16, of_tokens / 448 / 1024) + rounding
    per_channel = exact[..., :1, :].abs().amax(3, keepdim=True).expand(-1, -1, -1, 16, -1, -1)
    steps = torch.cat([per_channel, of_tokens[..., 1:, :].expand(-1, -1, -1, -1, -1, 64)], 4) / 127
    none = torch.zeros_like(exact)
    bound = {
        "exp12": none,
        "fp8": fp8,
        "k16v8": torch.cat([none[..., :1, :], fp8[..., 1:, :]], 4),
        "int8": (0.5 + 2**-14) * steps * (1 + 2**-20) + rounding,
    }[name]
    error = (exact - kept).abs()
    assert (error <= bound).all()
    assert name == "exp12" or error.max() > 0


# ---- engines with different settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", LOSSLESS)
def test_exact_copies_are_read_whatever_the_readers_own_codec_is(gqa: Bench, tmp_path: Path, reader: str) -> None:
    for number, name in enumerate(LOSSLESS):
        chunk = bytes([number]) * 16
        with Engine(gqa, tmp_path, name) as writer:
            assert not writer.run("write", Piece(chunk, 0)).failed
        with Engine(gqa, tmp_path, reader) as engine:
            gqa.slot(1)[:] = bytes(len(gqa.slot(1)))
            result = engine.run("fetch", Piece(chunk, 1))
            assert not result.failed
            assert not result.lossy
            assert engine.slot(1) == engine.slot(0)


@pytest.mark.parametrize("name", ["fp8", "int8+zstd", "k16v8"])
def test_an_exact_engine_takes_no_lossy_copy_leaves_it_and_puts_an_exact_one_in_its_place(
    gqa: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with Engine(gqa, tmp_path, name) as lossy, Engine(gqa, tmp_path, "exp12") as exact:
        lossy.run("write", Piece(CHUNK, 0))
        for _ in range(2):
            assert exact.run("fetch", Piece(CHUNK, 1)).failed == {CHUNK: "codec"}
        assert sum("does not read" in each.getMessage() for each in caplog.records) == 1
        assert lossy.run("fetch", Piece(CHUNK, 1)).lossy == {CHUNK}
        assert not exact.run("write", Piece(CHUNK, 0)).failed
        for engine in (exact, lossy):
            result = engine.run("fetch", Piece(CHUNK, 1))
            assert not result.failed
            assert not result.lossy
            assert engine.slot(1) == engine.slot(0)
    with Engine(gqa, tmp_path / "other", name) as lossy, Engine(gqa, tmp_path / "other", takes_lossy=True) as willing:
        lossy.run("write", Piece(CHUNK, 0))
        assert willing.run("fetch", Piece(CHUNK, 1)).lossy == {CHUNK}


def test_what_exp12_cannot_hold_is_raw_and_counted(tmp_path: Path) -> None:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    noise = np.random.default_rng(1).integers(0, 256, bench.layout.slot_bytes, np.uint8)
    for name, kind in (("exp12", "raw"), ("exp12+zstd", "raw")):
        with Engine(bench, tmp_path / name, name) as engine:
            bench.slot(0)[:] = memoryview(noise)
            written = engine.run("write", Piece(CHUNK, 0))
            assert not written.failed
            assert written.incompressible == 1
            assert str(read_header(engine.stored().read_bytes()[:HEADER_BYTES]).codec) == kind
            assert not engine.run("fetch", Piece(CHUNK, 1)).failed
            assert engine.slot(1) == engine.slot(0)
            bench.save()
            assert not engine.run("write", Piece(CHUNK, 0)).incompressible


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp12", "fp8", "int8+zstd", "k16v8+lz4"])
def test_damaged_objects_are_bad_whatever_is_damaged(gqa: Bench, tmp_path: Path, name: str) -> None:
    rng = random.Random(7)
    with Engine(gqa, tmp_path, name) as engine:
        engine.run("write", Piece(CHUNK, 0))
        whole = engine.stored().read_bytes()
        used = HEADER_BYTES + read_header(whole[:HEADER_BYTES]).payload_bytes
        for attempt in range(24):
            content = bytearray(whole)
            at = rng.randrange(used)
            content[at] ^= 1 << rng.randrange(8)
            if attempt % 4 == 0:
                content = content[:at]
            engine.run("write", Piece(CHUNK, 0))
            engine.stored().write_bytes(content)
            assert engine.run("fetch", Piece(CHUNK, 1)).failed[CHUNK] in {"bad", "missing"}, at


@pytest.mark.parametrize("name", ["exp12", "fp8", "int8", "k16v8"])
def test_an_object_with_right_checksums_and_wrong_codes_fills_no_other_slot(
    gqa: Bench, tmp_path: Path, name: str
) -> None:
    """Only who can write to the store can make one; it may decode to anything, or is refused."""
    rng = np.random.default_rng(8)
    with Engine(gqa, tmp_path, name) as engine:
        kept = engine.slot(0)
        for attempt in range(12):
            engine.run("write", Piece(CHUNK, 0))
            whole = bytearray(engine.stored().read_bytes())
            size = read_header(whole[:HEADER_BYTES]).payload_bytes
            at = int(rng.integers(0, size - 64))
            noise = bytes([0xFF]) * 64 if attempt % 2 else rng.integers(0, 256, 64, np.uint8).tobytes()
            whole[HEADER_BYTES + at : HEADER_BYTES + at + 64] = noise
            crc = crc32c(whole[HEADER_BYTES : HEADER_BYTES + size])
            struct.pack_into("<II", whole, 100, crc, crc)
            struct.pack_into("<I", whole, HEADER_BYTES - 4, crc32c(whole[: HEADER_BYTES - 4]))
            engine.stored().write_bytes(whole)
            assert engine.run("fetch", Piece(CHUNK, 1)).failed in ({}, {CHUNK: "bad"})
            assert engine.slot(0) == kept
        whole[HEADER_BYTES : HEADER_BYTES + size] = b"\xff" * size
        crc = crc32c(b"\xff" * size)
        struct.pack_into("<II", whole, 100, crc, crc)
        struct.pack_into("<I", whole, HEADER_BYTES - 4, crc32c(whole[: HEADER_BYTES - 4]))
        engine.run("write", Piece(CHUNK, 0))
        engine.stored().write_bytes(whole)
        assert engine.run("fetch", Piece(CHUNK, 1)).failed == {CHUNK: "bad"}
        assert engine.run("fetch", Piece(CHUNK, 1)).failed == {CHUNK: "missing"}


# ---- from the settings -----------------------------------------------------------------------------------------------


def config(**settings: Any) -> ConnectorConfig:
    return ConnectorConfig.resolve({"disk_path": "/nowhere", "remote_url": "redis://nowhere", **settings}, {})


def encodings(bench: Bench, settings: ConnectorConfig, cache_dtype: str = "auto") -> SlotCodec | None:
    return slot_codec_of(
        settings, bench.cache.config, bench.layout, cache_dtype=cache_dtype, kv_caches=bench.cache.views
    )


def test_settings_say_what_is_written_and_what_is_read(caplog: pytest.LogCaptureFixture) -> None:
    mixed = config(disk_codec="exp12+zstd", remote_codec="FP8")
    assert [(rules.name, rules.lossy) for rules in rules_of(mixed)] == [("disk", False), ("remote", True)]
    stores: Any = {"disk": None, "remote": None}
    tiers = tiers_of(mixed, stores)
    assert [(str(tier.codec), tier.takes_lossy) for tier in tiers.values()] == [("exp12+zstd", False), ("fp8", True)]
    assert all(tier.takes_lossy for tier in tiers_of(config(accept_lossy=True), stores).values())
    announce(mixed)
    assert [each.getMessage().split(",")[0] for each in caplog.records] == ["Tier remote keeps chunks as fp8"]
    with pytest.raises(ConfigurationError, match="there is no codec 'cachegen': it is one of raw, exp12"):
        config(remote_serde="cachegen")


def test_a_codec_that_does_not_suit_is_refused_at_start(gqa: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="disk_codec is k16v8, which does not suit"):
        Engine(Bench(MODELS["mla"], KVCacheLayout.LBHNC), tmp_path, "k16v8")
    assert encodings(gqa, config(disk_codec="fp8")) is not None
    with pytest.raises(ConfigurationError, match="remote_codec is int8, which does not suit"):
        encodings(gqa, config(remote_codec="int8"))
    with pytest.raises(ConfigurationError, match=r"disk_codec is fp8.*quantised already"):
        encodings(gqa, config(disk_codec="fp8"), cache_dtype="fp8_e5m2")
    odd = Bench([group(full(state_content_bytes=272), "l0")], KVCacheLayout.LBHNC)
    assert encodings(odd, config(disk_codec="zstd")) is None
    with pytest.raises(ConfigurationError, match=r"remote_codec is exp12\+lz4.*cannot be encoded.*raw, zstd or lz4"):
        encodings(odd, config(remote_codec="exp12+lz4"))


def test_tensors_tell_where_attention_runs_and_how_blocks_are_divided(gqa: Bench) -> None:
    made = encodings(gqa, config())
    assert made is not None
    assert all(part.rows for part in made.geometry.parts)
    divided = Bench(MODELS["gqa"], KVCacheLayout.LBNHC, [8])
    on_gpu = {
        name: SimpleNamespace(shape=view.shape, device=SimpleNamespace(type="cuda"), dim=view.dim)
        for name, view in divided.cache.views.items()
    }
    codec = slot_codec_of(config(), divided.cache.config, divided.layout, cache_dtype="auto", kv_caches=on_gpu)
    assert codec is not None
    assert [(part.split, part.tokens, part.rows) for part in codec.geometry.parts] == [(2, 8, False)]


def test_engines_that_divide_blocks_differently_do_not_read_each_others_objects(gqa: Bench, tmp_path: Path) -> None:
    divided_bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC, [8])
    with Engine(gqa, tmp_path) as one, Engine(gqa, tmp_path) as other:
        shape = one.movers._shape
        assert divided(shape, gqa.cache.config, gqa.cache.views) == shape
        other.movers._shape = divided(shape, divided_bench.cache.config, divided_bench.cache.views)
        assert other.movers._shape.layout == "x/2"
        one.run("write", Piece(CHUNK, 0))
        assert other.run("fetch", Piece(CHUNK, 1)).failed == {CHUNK: "layout"}
        assert not one.run("fetch", Piece(CHUNK, 1)).failed
