"""The encodings through the library, against torch's own conversions, and which of them suit a cache."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import cos, sin
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the library is held against torch's conversions")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from worker_connector import codecs  # noqa: E402
from worker_connector.codecs import Unit  # noqa: E402
from worker_connector.errors import ConfigurationError, NativeError, NativeUnavailable  # noqa: E402
from worker_connector.native import Context, ElementType, Encoding, InstructionSet, Rotation, View  # noqa: E402

SETS = {
    "x86_64": [InstructionSet.PORTABLE, InstructionSet.AVX2, InstructionSet.AVX512],
    "aarch64": [InstructionSet.PORTABLE, InstructionSet.NEON],
}
ELEMENTS = {
    torch.float32: ElementType.F32,
    torch.float16: ElementType.F16,
    torch.bfloat16: ElementType.BF16,
    torch.float64: ElementType.F64,
}
FUZZ = Path(__file__).parents[2] / "csrc" / "tests" / "codec_fuzz.cpp"


@pytest.fixture(scope="module", params=SETS.get(platform.machine(), [InstructionSet.PORTABLE]), ids=lambda s: s.name)
def context(request: pytest.FixtureRequest) -> Iterator[Context]:
    try:
        made = Context("cpu", threads=1, instruction_set=request.param)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    yield made
    made.close()


def one_unit(content: Any, values: int = 0) -> tuple[View, Any]:
    """A cache of one unit with this content ``[token, element]``, of which the last ``values`` are V."""
    cache = content.clone()[None, None]
    return View.of_arrays([cache], dtype=ELEMENTS[content.dtype], value_elements=values), cache


def encode(context: Context, content: Any, encoding: Encoding, values: int = 0) -> Any:
    view, cache = one_unit(content, values)
    packed = torch.full((context.unit_bytes(view, encoding),), 0xA5, dtype=torch.uint8)
    context.gather(view, [0], [context.span(packed, 1)], encoding=encoding)
    assert torch.equal(bits(cache[0, 0]), bits(content))
    return packed


def decode(context: Context, packed: Any, like: Any, encoding: Encoding, values: int = 0) -> Any:
    view, cache = one_unit(torch.zeros_like(like), values)
    context.scatter(view, [0], [context.span(packed, 1)], encoding=encoding)
    return cache[0, 0]


def bits(values: Any) -> Any:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def every(dtype: Any) -> Any:
    """All 65536 patterns of a 16-bit type, ``[256, 256]``; of float32 and float64 those with zeros behind."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if dtype is torch.float64:
        return (patterns.to(torch.int64) << 48).view(dtype).reshape(256, 256)
    if dtype is torch.float32:
        return (patterns << 16).view(dtype).reshape(256, 256)
    return patterns.to(torch.int16).view(dtype).reshape(256, 256)


def canonical(values: Any) -> Any:
    return torch.where(values.isnan(), torch.full_like(values, float("nan")), values)


def with_peak(values: Any, peak: float) -> Any:
    """Rows led by ``peak`` and without anything larger, so that their scale is 1."""
    within = torch.where(values.float().abs() <= peak, values, torch.zeros_like(values))
    return torch.cat([torch.full_like(values[:, :1], peak), within], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-100])
def test_every_e4m3_code_decodes_as_torch_has_it(context: Context, dtype: Any, scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    factor = torch.tensor([scale, 0, 0, 0])
    wanted = canonical(codes.view(torch.float8_e4m3fn).float() * factor[0]).to(dtype)
    got = decode(context, torch.cat([factor.view(torch.uint8), codes]), wanted[None], Encoding.FP8)
    assert torch.equal(bits(got[0]), bits(canonical(wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_value_becomes_the_e4m3_code_that_torch_gives(context: Context, dtype: Any) -> None:
    content = with_peak(every(dtype), 448)
    packed = encode(context, content, Encoding.FP8)
    assert torch.equal(packed[:1024].view(torch.float32), torch.ones(256))
    codes = packed[1024 : 1024 + 256 * 257].reshape(256, 257)
    assert torch.equal(codes, content.float().to(torch.float8_e4m3fn).view(torch.uint8))


def test_e4m3_rounds_to_even_on_and_beside_every_tie(context: Context) -> None:
    codes = torch.arange(0x7E, dtype=torch.uint8)
    lower, upper = (each.view(torch.float8_e4m3fn).float() for each in (codes, codes + 1))
    tie = bits((lower + upper) / 2)
    content = with_peak(torch.stack([tie - 1, tie, tie + 1]).view(torch.float32), 448)
    content = torch.cat([content, -content.roll(1, 0)], dim=1)
    packed = encode(context, content, Encoding.FP8)
    got = packed[16 : 16 + content.numel()].reshape(content.shape)
    assert torch.equal(got, content.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_value_becomes_the_nearest_integer(context: Context, dtype: Any) -> None:
    content = with_peak(every(dtype), 127)[:, None, :].reshape(256, 257)
    held = torch.cat([torch.ones_like(content[:, :1]), content], dim=1)  # one channel of K before the V
    packed = encode(context, held, Encoding.INT8, values=257)
    at = 16 + 1024 + 256
    codes = packed[at : at + 256 * 257].view(torch.int8).reshape(256, 257)
    assert torch.equal(codes, content.float().round().to(torch.int8))


@pytest.mark.parametrize("encoding", [Encoding.FP8, Encoding.INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite(context: Context, dtype: Any, encoding: Encoding) -> None:
    largest = 448.0 if encoding is Encoding.FP8 else 127.0
    row = [float("nan"), -float("nan"), float("inf"), float("-inf"), largest, 0.0, -0.0, *[1.0] * 60]
    content = torch.tensor([row], dtype=dtype)
    got = decode(context, encode(context, content, encoding, 67 - 1), content, encoding, 67 - 1)[0]
    assert torch.equal(bits(got[:2]), bits(torch.full((2,), float("nan"), dtype=dtype)))
    assert got[2:6].tolist() == [largest, -largest, largest, 0.0]


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
def test_turning_by_nothing_keeps_every_pattern(context: Context, dtype: Any, interleaved: bool) -> None:
    first = every(dtype)
    second = torch.ones_like(first)
    pairs = torch.stack([first, second], dim=2 if interleaved else 1).reshape(256, 512)
    view, cache = one_unit(pairs)
    context.rotate(view, [0], Rotation([1.0] * 256, [0.0] * 256, interleaved=interleaved))
    turned = cache[0, 0].reshape(256, 256, 2) if interleaved else cache[0, 0].reshape(256, 2, 256).transpose(1, 2)
    assert torch.equal(bits(turned[..., 0].contiguous()), bits(canonical(first)))
    unharmed = first.isfinite()
    assert torch.equal(turned[..., 1][unharmed], second[unharmed])
    assert bool(turned[..., 1][~unharmed].isnan().all())


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("count", [1, 4, 7, 20, 32, 40, 300])
def test_turns_add_up_and_leave_the_rest_alone(context: Context, count: int, interleaved: bool) -> None:
    content = torch.randn(5, 2 * count + 11, dtype=torch.float64)
    turned = {}
    for name, steps in (("once", [5]), ("twice", [2, 3])):
        view, cache = one_unit(content)
        for step in steps:
            angles = [step / (1 + pair) for pair in range(count)]
            turn = Rotation(map(cos, angles), map(sin, angles), offset=8 * 8, interleaved=interleaved)
            context.rotate(view, [0], turn)
        turned[name] = cache[0, 0]
    assert torch.allclose(turned["once"], turned["twice"], rtol=0, atol=1e-13)
    assert not torch.equal(turned["once"], content)
    outside = [*range(8), *range(8 + 2 * count, 2 * count + 11)]
    assert torch.equal(turned["once"][:, outside], content[:, outside])


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushed_denormals")
def test_a_caller_that_flushes_denormals_gets_the_same_bits_and_keeps_flushing(context: Context) -> None:
    denormals = torch.arange(1, 65, dtype=torch.int32).repeat(2)[None].view(torch.float32)
    view, cache = one_unit(denormals)
    context.rotate(view, [0], Rotation([0.5] * 64, [0.0] * 64))
    halved = torch.arange(1, 65, dtype=torch.float64).div(2).round().to(torch.int32).repeat(2)
    assert torch.equal(bits(cache[0, 0, 0]), halved)
    assert (denormals * 1.0).count_nonzero() == 0


def test_outlier_channels_of_keys_cost_the_others_nothing_in_int8(context: Context) -> None:
    generator = torch.Generator().manual_seed(1)
    content = torch.randn(64, 128, generator=generator)
    content[:, ::32] *= 1000
    others = [channel for channel in range(128) if channel % 32]

    def error(values: int, encoding: Encoding) -> float:
        got = decode(context, encode(context, content, encoding, values), content, encoding, values)
        return float((got - content)[:, others].norm() / content[:, others].norm())

    assert error(0, Encoding.INT8) < 0.01  # as K, per channel
    assert error(127, Encoding.INT8) > 0.9  # as V, per token
    assert error(0, Encoding.FP8) < 0.035


# Which encodings suit.

units = st.builds(
    Unit,
    element=st.sampled_from(ElementType),
    tokens=st.sampled_from([1, 3, 8, 16, 64, 272, 1056]),
    k_elements=st.sampled_from([0, 1, 64, 80, 96, 112, 128, 192, 256, 576, 8192, 8193]),
    v_elements=st.sampled_from([0, 1, 64, 80, 128, 256]),
)


def view_of(unit: Unit) -> View:
    size = {ElementType.F64: 8, ElementType.F32: 4, ElementType.BYTES: 1}.get(unit.element, 2)
    k, v = unit.k_elements * size, unit.v_elements * size
    content = unit.content_bytes or k + v
    return View(
        [4096],
        begin=4096,
        end=4096 + unit.tokens * content,
        block_stride=unit.tokens * content,
        block_count=1,
        content_bytes=content,
        token_stride=content,
        tokens=unit.tokens,
        dtype=unit.element,
        k=(0, k),
        v=(k, v),
    )


@settings(max_examples=300, deadline=None)
@given(unit=units, encoding=st.sampled_from(Encoding))
def test_sizes_and_refusals_are_the_library_s(unit: Unit, encoding: Encoding) -> None:
    if not unit.kv_bytes:
        return
    context = Context("cpu", threads=1)
    if codecs.why_not(encoding, unit) is None:
        assert codecs.unit_bytes(encoding, unit) == context.unit_bytes(view_of(unit), encoding)
    else:
        with pytest.raises(NativeError):
            context.unit_bytes(view_of(unit), encoding)
        with pytest.raises(ConfigurationError, match=rf"{codecs.name_of(encoding)} does not suit .* Use raw"):
            codecs.check(encoding, unit)


def test_ratios_of_a_llama_and_of_a_latent() -> None:
    llama = Unit(ElementType.BF16, 16, 128, 128)
    assert {name: round(codecs.ratio(each, llama), 3) for name, each in codecs.ENCODINGS.items()} == {
        "raw": 1.0,
        "exp12": 1.274,
        "fp8": 1.939,
        "k16v8": 1.32,
        "int8": 1.753,
    }
    assert codecs.ratio(Encoding.FP8, Unit(ElementType.BF16, 64, 576, 0)) == pytest.approx(1.986, abs=1e-3)
    assert codecs.ratio(Encoding.EXP12, Unit(ElementType.BF16, 64, 576, 0)) == pytest.approx(1.278, abs=1e-3)


@pytest.mark.parametrize(
    "cache_dtype", ["fp8", "fp8_e4m3", "fp8_ds_mla", "int8_per_token_head", "turboquant_k8v4", "nvfp4", "whatever_next"]
)
def test_a_quantised_cache_stays_as_it_is(cache_dtype: str) -> None:
    unit = Unit(ElementType.BF16, 16, 128, 128)
    for encoding in set(Encoding) - {Encoding.RAW}:
        with pytest.raises(ConfigurationError, match=rf"quantised already \(kv_cache_dtype {cache_dtype}\)\. Use raw$"):
            codecs.check(encoding, unit, cache_dtype)
    codecs.check(Encoding.RAW, unit, cache_dtype)


@pytest.mark.parametrize(
    ("encoding", "unit", "reason"),
    [
        ("fp8", Unit(ElementType.BYTES, 16, 128, 128), "holds bytes, and the encoding is for float32"),
        ("int8", Unit(ElementType.F64, 16, 128, 128), "holds f64"),
        ("exp12", Unit(ElementType.F16, 16, 128, 128), "holds float16, and the encoding is for bfloat16"),
        ("k16v8", Unit(ElementType.BF16, 64, 576, 0), "no V of its own"),
        ("k16v8", Unit(ElementType.BF16, 64, 0, 128), "no K"),
        ("fp8", Unit(ElementType.BF16, 16, 0, 0), "neither K nor V"),
        ("fp8", Unit(ElementType.BF16, 16, 128, 128, content_bytes=520), "only 512 are known to be K and V"),
        ("exp12", Unit(ElementType.BF16, 16, 8193, 0), "8193 elements"),
    ],
)
def test_why_an_encoding_does_not_suit(encoding: str, unit: Unit, reason: str) -> None:
    assert reason in str(codecs.why_not(codecs.encoding_named(encoding), unit))
    assert codecs.why_not(Encoding.RAW, unit) is None


def test_names() -> None:
    assert [codecs.encoding_named(codecs.name_of(each)) for each in Encoding] == list(Encoding)
    with pytest.raises(ConfigurationError, match=r"no encoding 'fp4': it is one of raw, exp12, fp8, k16v8, int8"):
        codecs.encoding_named("fp4")
    assert codecs.element_named("torch.bfloat16") is ElementType.BF16
    assert codecs.element_named("float8_e4m3fn") is ElementType.BYTES


# Decoders of untrusted bytes.


def compile_fuzz(folder: Path, flags: str) -> str:
    program = folder / f"fuzz{abs(hash(flags))}"
    common = [
        "-std=c++17",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-w",
    ]
    subprocess.run(["g++", *common, *flags.split(), str(FUZZ), "-o", str(program)], check=True, timeout=180)
    done = subprocess.run([str(program), "6000", "5"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ.exists() or shutil.which("g++") is None, reason="needs the C++ sources and g++")
def test_no_decoder_leaves_its_memory_and_all_instruction_sets_agree(tmp_path: Path) -> None:
    avx2 = "-mavx2 -mfma -mbmi2 -mf16c -msse4.2"
    found = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    flags = [""]
    flags += [avx2] if "avx2" in found else []
    flags += [f"{avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"] if "avx512bw" in found else []
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda each: compile_fuzz(tmp_path, each), flags))
    assert len(set(results)) == 1, results
    assert "digest" in results[0]
