"""Slots in every encoding and layout, against encoding each head of each block where vLLM itself says that it is."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM (CPU build)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.worker_connector.test_regions import CHUNK, MODELS, SERIAL, Cache, allocate, full, group, mla
from worker_connector import codecs
from worker_connector.copier import Copier
from worker_connector.errors import ConfigurationError, Corrupt, Incompressible, NativeError, UnsupportedCache
from worker_connector.geometry import Group, describe_groups
from worker_connector.kv_geometry import SlotGeometry, describe_slot
from worker_connector.native import Context, ElementType, Encoding, View
from worker_connector.plan import Span
from worker_connector.regions import SlotLayout, group_regions
from worker_connector.slot_codec import SlotCodec

ELEMENTS = {torch.bfloat16: ElementType.BF16, torch.float16: ElementType.F16, torch.float32: ElementType.F32}
OTHERS = {
    "float16": [group(full(dtype=torch.float16), "l0", "l1")],
    "float32": [group(full(dtype=torch.float32), "l0", "l1")],
    "narrow values": [group(full(head_size_v=32), "l0", "l1")],
}
ALL_MODELS = {name: model for name, model in (MODELS | OTHERS).items() if name != "fp8"}
ENCODED = [encoding for encoding in Encoding if encoding is not Encoding.RAW]


class Bench:
    """A cache of vLLM's with KV in it, and two slots."""

    def __init__(self, groups: list[Any], layout: KVCacheLayout, kernel_blocks: list[int] | None = None) -> None:
        try:
            self.cache: Cache = allocate(groups, layout, kernel_blocks)
        except (ValueError, AssertionError) as reason:
            pytest.skip(f"vLLM cannot lay this out: {reason}")
        self.cache.config.kv_cache_layout = layout.name
        blocks = self.cache.config.num_blocks
        self.splits = {name: view.shape[0] // blocks for name, view in self.cache.views.items()}
        self.groups: tuple[Group, ...] = describe_groups(self.cache.config, SERIAL, CHUNK)
        self.layout = SlotLayout(group_regions(self.cache.config), [each.blocks_per_chunk for each in self.groups])
        self.fill()
        self.slab = torch.full((2 * self.layout.slot_bytes,), 0xA5, dtype=torch.uint8)
        self.copier = Copier(self.cache.buffer, self.slab, self.layout)

    def fill(self) -> None:
        generator = torch.Generator().manual_seed(2)
        for view in self.cache.views.values():
            view.copy_(torch.randn(view.shape, generator=generator))

    def geometry(self, **options: Any) -> SlotGeometry:
        return describe_slot(self.cache.config, self.layout, splits=self.splits, **options)

    def blocks(self, index: int) -> list[int]:
        """Which blocks a group's chunk has, of all groups different ones."""
        count = self.groups[index].blocks_per_chunk
        return [3 + 2 * (index * count + at) for at in range(count)]

    def save(self, missing: tuple[int, ...] = ()) -> None:
        for each, lacking in zip(self.groups, missing or [0] * len(self.groups), strict=True):
            self.copier.to_slab([Span(0, each.index, lacking, self.blocks(each.index)[lacking:])])

    def load(self, missing: tuple[int, ...] = ()) -> None:
        for each, lacking in zip(self.groups, missing or [0] * len(self.groups), strict=True):
            self.copier.to_cache([Span(1, each.index, lacking, self.blocks(each.index)[lacking:])])

    def slot(self, index: int) -> memoryview:
        size = self.layout.slot_bytes
        return memoryview(self.slab.numpy())[index * size : (index + 1) * size]

    def heads(self) -> Iterator[tuple[Any, int, Any]]:
        """Every head's tokens of every kernel block of the chunk, as vLLM addresses them; its spec and its block's place."""
        for each in self.groups:
            described = self.cache.config.kv_cache_groups[each.index]
            for name in described.layer_names:
                spec = getattr(described.kv_cache_spec, "kv_cache_specs", {}).get(name, described.kv_cache_spec)
                split = self.splits[name]
                for at, block in enumerate(self.blocks(each.index)):
                    for part in range(split):
                        for head in range(spec.num_heads):
                            yield spec, at, self.cache.views[name][block * split + part, head]


def by_itself(context: Context, content: Any, spec: Any, encoding: Encoding) -> Any:
    """What becomes of the tokens of one head, ``[token, content]``, encoded on their own."""
    before, after = content.clone()[None, None], torch.zeros_like(content)[None, None]
    options = {"dtype": ELEMENTS[content.dtype], "value_elements": spec.head_size_v}
    source, target = View.of_arrays([before], **options), View.of_arrays([after], **options)
    form = torch.empty(context.unit_bytes(source, encoding), dtype=torch.uint8)
    context.gather(source, [0], [context.span(form, 1)], encoding=encoding)
    context.scatter(target, [0], [context.span(form, 1)], encoding=encoding)
    return after[0, 0]


def bits(values: Any) -> Any:
    return values.contiguous().view(torch.uint8)


def cases() -> Iterator[Any]:
    for name, groups in ALL_MODELS.items():
        for layout in KVCacheLayout:
            yield pytest.param(groups, layout, None, id=f"{name}-{layout.name}")
    yield pytest.param(MODELS["gqa"], KVCacheLayout.LBHNC, [8], id="divided-LBHNC")
    yield pytest.param(MODELS["gqa"], KVCacheLayout.LBNHC, [8], id="divided-LBNHC")


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    with Context("cpu", threads=1) as made:
        yield made


@pytest.mark.parametrize(("groups", "layout", "kernel_blocks"), list(cases()))
def test_every_head_comes_back_as_when_it_is_encoded_by_itself(
    context: Context, groups: list[Any], layout: KVCacheLayout, kernel_blocks: list[int] | None
) -> None:
    bench = Bench(groups, layout, kernel_blocks)
    codec = SlotCodec(bench.geometry())
    bench.save()
    before = bytes(bench.slot(0))
    contents = [(content.clone(), spec) for spec, _, content in bench.heads()]
    for encoding, size in codec.packed_bytes.items():
        expected = [by_itself(context, content, spec, encoding) for content, spec in contents]
        form = memoryview(bytearray(b"\xee" * size))
        codec.encode(bench.slot(0), (), encoding, form)
        assert bytes(bench.slot(0)) == before
        bench.slot(1)[:] = b"\x77" * len(bench.slot(1))
        codec.decode(form, bench.slot(1), (), encoding)
        bench.cache.buffer.zero_()
        bench.load()
        for (_, _, content), wanted in zip(bench.heads(), expected, strict=True):
            assert torch.equal(bits(content), bits(wanted)), encoding.name
    names = {codecs.name_of(encoding) for encoding in codec.packed_bytes}
    element = next(iter(bench.cache.views.values())).dtype
    latent = any(not spec.head_size_v for spec, _, _ in bench.heads())
    wanted_names = (
        {"fp8", "int8"} | ({"exp12"} if element is torch.bfloat16 else set()) | (set() if latent else {"k16v8"})
    )
    assert names == wanted_names
    codec.close()


@pytest.mark.parametrize(
    ("encoding", "missing"), list(zip(ENCODED, [(0, 1, 3), (0, 4, 2), (0, 0, 4), (0, 2, 0)], strict=True))
)
@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_blocks_that_a_slot_lacks_are_zero_on_both_sides_whatever_was_there(
    encoding: Encoding, layout: KVCacheLayout, missing: tuple[int, ...]
) -> None:
    bench = Bench(MODELS["hybrid"], layout)
    # All exponents, which exp12 cannot hold: what is lacking must not be looked at.
    bench.slab[:] = torch.from_numpy(np.random.default_rng(1).integers(0, 256, bench.slab.numel(), np.uint8))
    bench.save(missing)
    codec = SlotCodec(bench.geometry())
    forms = []
    for junk in (0x11, 0xFF):
        form = memoryview(bytearray([junk]) * codec.packed_bytes[encoding])
        codec.encode(bench.slot(0), missing, encoding, form)
        forms.append(bytes(form))
    assert forms[0] == forms[1]
    codec.decode(memoryview(forms[0]), bench.slot(1), missing, encoding)
    for index, lacking in enumerate(missing):
        regions, starts = bench.layout.regions[index], bench.layout.starts[index]
        for region, start in zip(regions, starts, strict=True):
            assert not any(bench.slot(1)[start : start + lacking * region.nbytes])
    bench.load(missing)
    error = max(abs(after - before).max().item() for before, after in exact_and_now(bench, missing))
    assert error == 0 if encoding is Encoding.EXP12 else error < 0.3
    codec.close()


def exact_and_now(bench: Bench, missing: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    now = [content.clone() for _, _, content in bench.heads()]
    bench.fill()
    lacking = [missing[each.index] for each in bench.groups for _ in layer_heads(bench, each)]
    for (_, at, content), after, behind in zip(bench.heads(), now, lacking, strict=True):
        if at >= behind:
            yield content.float(), after.float()


def layer_heads(bench: Bench, each: Group) -> Iterator[None]:
    described = bench.cache.config.kv_cache_groups[each.index]
    for _ in range(len(described.layer_names) * each.blocks_per_chunk * described.kv_cache_spec.num_heads):
        yield None


@pytest.mark.parametrize("name", ["padded", "uneven hybrid"])
def test_bytes_that_no_layer_uses_are_zero_after_decoding(name: str) -> None:
    bench = Bench(MODELS[name], KVCacheLayout.BLHNC)
    codec = SlotCodec(bench.geometry())
    bench.save()
    form = memoryview(bytearray(codec.packed_bytes[Encoding.EXP12]))
    codec.encode(bench.slot(0), (), Encoding.EXP12, form)
    codec.decode(form, bench.slot(1), (), Encoding.EXP12)
    used = sum(part.units * part.unit.raw_bytes for part in codec.geometry.parts)
    assert sum(gap.size * gap.times for gap in codec.geometry.gaps) == bench.layout.payload_bytes - used > 0
    differing = np.frombuffer(bench.slot(0), np.uint8) != np.frombuffer(bench.slot(1), np.uint8)
    inside: Any = np.zeros(bench.layout.slot_bytes, bool)
    for gap in codec.geometry.gaps:
        for at in range(gap.times):
            inside[gap.start + at * gap.stride :][: gap.size] = True
            assert not any(bench.slot(1)[gap.start + at * gap.stride :][: gap.size])
    inside[bench.layout.payload_bytes :] = True
    assert not (differing & ~inside).any()
    codec.close()


def test_noise_is_incompressible_and_is_said_to_be() -> None:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    bench.slab[:] = torch.from_numpy(np.random.default_rng(1).integers(0, 256, bench.slab.numel(), np.uint8))
    codec = SlotCodec(bench.geometry())
    with pytest.raises(Incompressible):
        codec.encode(bench.slot(0), (), Encoding.EXP12, memoryview(bytearray(codec.packed_bytes[Encoding.EXP12])))
    codec.close()


def test_what_no_encoder_writes_is_corrupt() -> None:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    codec = SlotCodec(bench.geometry())
    for encoding, size in codec.packed_bytes.items():
        with pytest.raises(Corrupt):
            codec.decode(memoryview(b"\xff" * size), bench.slot(1), (), encoding)
    with pytest.raises(NativeError, match="do not belong"):
        codec.decode(memoryview(bytes(7)), bench.slot(1), (), Encoding.FP8)
    codec.close()


# ---- processors, and backends with arrangements of their own ---------------------------------------------------------


def test_on_processors_k_and_v_of_a_head_are_rows_one_after_the_other() -> None:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    (part,) = bench.geometry(on_processor=True).parts
    assert (part.heads, part.tokens, part.content_bytes, part.token_stride) == (4, 32, 128, 128)
    assert part.rows
    codec = SlotCodec(bench.geometry(on_processor=True))
    assert set(codec.packed_bytes) == {Encoding.EXP12, Encoding.FP8}
    with pytest.raises(ConfigurationError, match=r"disk_codec is int8.*told apart.*one of raw, fp8, exp12, zstd, lz4"):
        codec.check(Encoding.INT8, "disk_codec")
    bench.save()
    for encoding, size in codec.packed_bytes.items():
        form = memoryview(bytearray(size))
        codec.encode(bench.slot(0), (), encoding, form)
        codec.decode(form, bench.slot(1), (), encoding)
        before, after = (torch.frombuffer(bench.slot(at), dtype=torch.bfloat16).float() for at in (0, 1))
        payload = bench.layout.payload_bytes // 2
        errors = (before - after)[:payload].abs()
        # One scale a row of 64 elements, whose largest is at most some six.
        assert errors.max() == 0 if encoding is Encoding.EXP12 else (errors <= before[:payload].abs() / 15 + 0.01).all()
    codec.close()


def test_two_slots_of_heads_are_rows_and_other_contents_are_refused() -> None:
    bench = Bench([group(full(num_head_slots=2, state_content_bytes=4 * 128), "l0")], KVCacheLayout.LBHNC)
    (part,) = bench.geometry().parts
    assert part.rows
    assert part.content_bytes == 512
    odd = Bench([group(full(state_content_bytes=272), "l0")], KVCacheLayout.LBHNC)
    with pytest.raises(UnsupportedCache, match="are not 4 heads of 128 bytes of K"):
        odd.geometry()


def test_an_order_that_is_not_known_is_refused() -> None:
    bench = Bench(MODELS["gqa"], KVCacheLayout.LBHNC)
    for order in (None, "LBNCH"):
        bench.cache.config.kv_cache_layout = order
        with pytest.raises(UnsupportedCache, match="order"):
            bench.geometry()


def test_a_cache_that_is_quantised_already_is_refused_by_name() -> None:
    bench = Bench([group(mla(), "l0")], KVCacheLayout.LBHNC)
    codec = SlotCodec(bench.geometry(cache_dtype="fp8_e4m3"))
    assert not codec.packed_bytes
    with pytest.raises(
        ConfigurationError, match=r"remote_codec is fp8.*quantised already.*fp8_e4m3.*one of raw, zstd, lz4"
    ):
        codec.check(Encoding.FP8, "remote_codec")
    codec.check(Encoding.RAW, "remote_codec")
