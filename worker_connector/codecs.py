"""Which encoding a cache can be kept in: names, sizes, and why one does not suit. docs/kv-codecs.md specifies them.

An encoding works on a unit, the K and V of one (layer, block, head). ``raw`` suits everything. ``exp12`` gives back every
bit of a bf16 cache; ``fp8``, ``k16v8`` and ``int8`` do not, and are only for those who ask for them. A cache that the
engine keeps quantised stays as it is: encoding it again would cost quality and save nothing.
"""

from dataclasses import dataclass

from worker_connector.errors import ConfigurationError
from worker_connector.native_types import ElementType, Encoding

ENCODINGS = {
    "raw": Encoding.RAW,
    "exp12": Encoding.EXP12,
    "fp8": Encoding.FP8,
    "k16v8": Encoding.K16_V8,
    "int8": Encoding.INT8,
}
LOSSLESS = frozenset({Encoding.RAW, Encoding.EXP12})

_NAMES = {encoding: name for name, encoding in ENCODINGS.items()}
_FLOATS = {ElementType.F32: "float32", ElementType.F16: "float16", ElementType.BF16: "bfloat16"}
ELEMENT_BYTES = {
    ElementType.BYTES: 1,
    ElementType.F16: 2,
    ElementType.BF16: 2,
    ElementType.F32: 4,
    ElementType.F64: 8,
}
_PLAIN_CACHE_DTYPES = frozenset({"auto", "half", "float", "float16", "bfloat16", "float32", "float64", "double"})
_TILE_ELEMENTS = 8192


@dataclass(frozen=True, slots=True)
class Unit:
    """One (layer, block, head). ``v_elements`` is 0 for MLA, whose latent is all K. ``content_bytes`` is what a token
    takes in the cache; 0 stands for no more than its K and V. ``rows``: what counts as a token's K is a row of elements that
    the attention backend arranged in its own way, K and V alike."""

    element: ElementType
    tokens: int
    k_elements: int
    v_elements: int
    content_bytes: int = 0
    rows: bool = False

    @property
    def raw_bytes(self) -> int:
        return self.tokens * (self.content_bytes or self.kv_bytes)

    @property
    def kv_bytes(self) -> int:
        """K and V of one token."""
        return (self.k_elements + self.v_elements) * ELEMENT_BYTES[self.element]


def encoding_named(name: str) -> Encoding:
    """The encoding of a name.

    Raises:
        ConfigurationError: there is none of that name.
    """
    if name not in ENCODINGS:
        raise ConfigurationError(f"there is no encoding {name!r}: it is one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def name_of(encoding: Encoding) -> str:
    return _NAMES[encoding]


def element_named(dtype: str) -> ElementType:
    """The element type of a torch dtype's name, with or without ``torch.``; plain bytes for all that is not a float of
    16, 32 or 64 bits."""
    names = {"float16": ElementType.F16, "bfloat16": ElementType.BF16, "float32": ElementType.F32}
    return (names | {"float64": ElementType.F64}).get(dtype.removeprefix("torch."), ElementType.BYTES)


def why_not(encoding: Encoding, unit: Unit, cache_dtype: str = "auto") -> str | None:
    """Why units cannot be kept in this encoding, or None if they can. ``cache_dtype`` is the engine's setting."""
    if encoding is Encoding.RAW:
        return None
    if cache_dtype not in _PLAIN_CACHE_DTYPES:
        return f"the engine keeps its KV cache quantised already (kv_cache_dtype {cache_dtype})"
    if unit.element not in _FLOATS:
        return f"the KV cache holds {unit.element.name.lower()}, and the encoding is for {_takes(encoding)}"
    if encoding is Encoding.EXP12 and unit.element is not ElementType.BF16:
        return f"the KV cache holds {_FLOATS[unit.element]}, and the encoding is for bfloat16"
    return _geometry_reason(encoding, unit)


def check(encoding: Encoding, unit: Unit, cache_dtype: str = "auto") -> None:
    """Pass only what the cache can be kept in.

    Raises:
        ConfigurationError: it cannot; the text says why and which encodings suit.
    """
    reason = why_not(encoding, unit, cache_dtype)
    if reason is not None:
        others = " or ".join(name for name, other in ENCODINGS.items() if why_not(other, unit, cache_dtype) is None)
        raise ConfigurationError(f"the encoding {name_of(encoding)} does not suit this cache: {reason}. Use {others}")


def unit_bytes(encoding: Encoding, unit: Unit) -> int:
    """Bytes of an encoded unit, as ``wr_unit_bytes`` has them, for an encoding that suits."""
    halves = [width for width in (unit.k_elements, unit.v_elements) if width]
    token_scales = _pad16(4 * unit.tokens)
    codes = sum(_pad16(unit.tokens * width) for width in halves)
    v_scales = token_scales if unit.v_elements else 0
    match encoding:
        case Encoding.RAW:
            return unit.raw_bytes
        case Encoding.FP8:
            return token_scales * len(halves) + codes
        case Encoding.K16_V8:
            keys = _pad16(unit.tokens * unit.k_elements * ELEMENT_BYTES[unit.element])
            return keys + v_scales + _pad16(unit.tokens * unit.v_elements)
        case Encoding.INT8:
            return _pad16(4 * unit.k_elements) + v_scales + codes
        case Encoding.EXP12:
            return sum(_tiled_bytes(unit.tokens, width) for width in halves)


def ratio(encoding: Encoding, unit: Unit) -> float:
    """How many times smaller an encoded unit is."""
    return unit.raw_bytes / unit_bytes(encoding, unit)


def _takes(encoding: Encoding) -> str:
    return "bfloat16" if encoding is Encoding.EXP12 else "float32, float16 and bfloat16"


def _geometry_reason(encoding: Encoding, unit: Unit) -> str | None:
    if unit.rows and encoding in {Encoding.INT8, Encoding.K16_V8}:
        return "its attention backend keeps K and V in an arrangement of its own, in which they cannot be told apart"
    if unit.content_bytes not in (0, unit.kv_bytes):
        return f"a token has {unit.content_bytes} bytes, of which only {unit.kv_bytes} are known to be K and V"
    if not unit.k_elements and not unit.v_elements:
        return "the cache has neither K nor V"
    if encoding is Encoding.K16_V8 and not unit.v_elements:
        return "the cache has no V of its own (MLA keeps a latent), and K would stay as it is"
    if encoding is Encoding.K16_V8 and not unit.k_elements:
        return "the cache has no K"
    widest = max(unit.k_elements, unit.v_elements)
    if encoding is Encoding.EXP12 and widest > _TILE_ELEMENTS:
        return f"a token has {widest} elements, and the encoding is for at most {_TILE_ELEMENTS}"
    return None


def _pad16(size: int) -> int:
    return -(-size // 16) * 16


def _tiled_bytes(tokens: int, width: int) -> int:
    each = max(1, _TILE_ELEMENTS // width)
    whole, rest = divmod(tokens, each)
    return whole * _tile_bytes(each * width) + (_tile_bytes(rest * width) if rest else 0)


def _tile_bytes(count: int) -> int:
    return 16 + 16 * -(-count // 256) + _pad16(-(-count // 2)) + _pad16(count)
