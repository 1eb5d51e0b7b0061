# ruff: noqa: RUF001 - look-alike characters are what the corpus is for
"""Text to token ids, equal to the worker's.

Two libraries can do it: fastokens, which also remembers the text between special tokens so that a growing
conversation costs only what was added, and tokenizers, the reference, one to two orders of magnitude slower. fastokens
is used where it gives the reference's ids, cold and from its memory, for every text of a fixed corpus; otherwise the
reference is.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import fastokens
import msgspec

from kv_protocol.hashing import token_bytes
from router.boundaries import Boundaries
from router.errors import ConfigError, Unrenderable
from router.prompt_ids import to_ids
from router.token_memory import Affixes, TokenMemory
from router.tokenizer_files import BuiltTokenizer, TokenizerFiles, build

SEGMENT_CACHE_BYTES = 64 << 20
MEMORY_BYTES = 256 << 20
# Least text worth remembering: shorter text is encoded again in less time than it takes to find.
_FAST_STEP = 4096
_REFERENCE_STEP = 256
# An encoding expected to take longer than this leaves the event loop.
LOOP_BUDGET_S = 0.002
# First-seen text is up to five times slower than the calibration text, which has been seen once.
_COLD_FACTOR = 3.0

_CORPUS = (
    "",
    " ",
    "  \t\n\r\n  leading and trailing   ",
    "Hello, world! It's 2024-01-02T03:04:05Z; they'LL pay $1,234.56 (100%).",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}  # tab\there\n\n\n",
    '{"name":"get_weather","arguments":{"city":"Zürich","days":[1,2,3],"unit":null}}',
    "naïve café résumé – “quotes” … ½ ² ﬁ Å Å é é",
    "中文分词测试。日本語のテキスト、한국어 문장입니다. ไทยไม่มีช่องว่าง",
    "مرحبا بالعالم שלום עולם हिन्दी में पाठ Привет, мир! Γειά",
    "👋🏽👩‍👩‍👧‍👦🇨🇭 emoji❤️‍🔥 \u200b\u200d\u2060\ufeff zero width \u202eoverride",
    "\x00\x01\x7f\x80\x9f control \u0085\u2028\u2029 lines \u3000wide\u00a0space",
    "a" * 300 + " " * 70 + "\n" * 40 + "=" * 129,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ea \U000e0041 \U0010ffff ￿ \ue000 private",
    "CamelCaseWordsAndACRONYMs snake_case_words kebab-case 0x1F 1_000_000 ١٢٣",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] x [/INST]</s><unk><bos><eot_id><tool_call>",
    "Zalgo: h̷e̴l̵l̶o̷ e\u0301\u0300\u0327 ｆｕｌｌｗｉｄｔｈ ①②③ ﷽",
)


class Tokenizer:
    """Encodes text as one model's worker does. ``backend`` is "fastokens" or "tokenizers"; safe to share by threads."""

    def __init__(self, built: BuiltTokenizer) -> None:
        self.special_tokens = built.special_tokens
        self._reference = built.engine
        self._truncating: Any = None
        self._truncation_lock = Lock()
        self._fast = None if built.split_special_tokens else _fast_twin(built)
        self.backend = "tokenizers" if self._fast is None else "fastokens"
        self.max_chars_per_token = max(map(len, built.engine.get_vocab(with_added_tokens=True)))
        serialized = msgspec.json.decode(built.engine.to_str(), type=dict[str, Any])
        self._serialized = {key: value for key, value in serialized.items() if key != "model"}
        self._lines = Boundaries.of(serialized, ()).lines
        self._affixes = _affixes(serialized.get("post_processor"))
        self._may_cut = not built.split_special_tokens and not (serialized.get("model") or {}).get("dropout")
        self._seconds_per_char = self._calibrate()

    @classmethod
    def load(cls, where: str | Path) -> "Tokenizer":
        """Load from a directory, or by repository name from the local Hugging Face cache.

        Raises:
            ConfigError: it is in neither place, or its files are broken.
            Unrenderable: its construction is not known to be reproduced exactly.
        """
        return cls(build_tokenizer(TokenizerFiles.read(where)))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are recognised, as the worker does.

        Raises:
            Unrenderable: the text has no UTF-8 form (an unpaired surrogate).
        """
        return to_ids(self.encode_bytes(text, add_special_tokens=add_special_tokens))

    def encode_bytes(self, text: str, *, add_special_tokens: bool = False) -> bytes:
        """``encode``'s ids as little-endian uint32. The whole text is encoded, whatever was seen before."""
        try:
            if self._fast is not None:
                return self._fast.encode_batch_flat([text], add_special_tokens)[0]
            return token_bytes(self._reference.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeError, TypeError, ValueError) as error:
            raise Unrenderable(f"the text cannot be encoded here: {type(error).__name__}") from error

    def memory(self, marks: Iterable[str], limit: int = MEMORY_BYTES) -> TokenMemory | None:
        """A memory for this tokenizer's texts, cut before ``marks`` where that is safe; None where nothing is known to
        be safe, or where pieces turn out to give other tokens than the whole.
        """
        boundaries = Boundaries.of(self._serialized, marks, lines=self._lines)
        if limit <= 0 or not self._may_cut or self._affixes is None or not (boundaries.marks or boundaries.lines):
            return None
        if not self._pieces_are_the_whole(boundaries, self._affixes):
            return None
        step = _REFERENCE_STEP if self._fast is None else _FAST_STEP
        return TokenMemory(self.encode_bytes, boundaries, self._affixes, limit=limit, step=step)

    def added_tokens(self) -> list[str]:
        """The texts of all added tokens."""
        return [token["content"] for token in self._serialized.get("added_tokens") or []]

    def _pieces_are_the_whole(self, boundaries: Boundaries, affixes: Affixes) -> bool:
        """Tried on the corpus, beyond what ``router.boundaries`` proves from the tokenizer's construction."""
        encode = self.encode_bytes
        for text in _cut_corpus(boundaries.marks):
            whole = encode(text)
            if affixes.before + whole + affixes.after != encode(text, add_special_tokens=True):
                return False
            cuts = [0, *boundaries.every(text), len(text)]
            if b"".join(encode(text[start:end]) for start, end in pairwise(cuts)) != whole:
                return False
        return True

    def seconds_for(self, characters: int) -> float:
        """A cautious estimate of the time one encoding takes, in seconds."""
        return characters * self._seconds_per_char

    def encode_truncated(self, text: str, length: int, *, add_special_tokens: bool) -> list[int]:
        """The last ``length`` tokens, room for special tokens included: truncation as the tokenizer itself does it,
        on the left side, which is how vLLM loads tokenizers for generation.
        """
        with self._truncation_lock:
            if self._truncating is None:
                self._truncating = type(self._reference).from_str(self._reference.to_str())
                self._truncating.encode_special_tokens = self._reference.encode_special_tokens
            try:
                self._truncating.enable_truncation(length, stride=0, strategy="longest_first", direction="left")
                ids: list[int] = self._truncating.encode(text, add_special_tokens=add_special_tokens).ids
            except Exception as error:  # the library raises bare Exceptions
                raise Unrenderable(f"the prompt cannot be truncated to {length} tokens here") from error
        return ids

    def _calibrate(self) -> float:
        text = _CORPUS[3] * 30
        self.encode(text)
        start = time.perf_counter()
        # Other characters than before: what is measured must not come from the segment cache.
        self.encode(text + "?")
        return (time.perf_counter() - start) / len(text) * _COLD_FACTOR


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Engine(Protocol):
    def encode(self, text: str, /, *, add_special_tokens: bool) -> _Encoding: ...
    def encode_batch_flat(self, texts: list[str], add_special_tokens: bool, /) -> tuple[bytes, bytes]: ...


def build_tokenizer(files: TokenizerFiles) -> BuiltTokenizer:
    """Build from files; what the library itself refuses is a fault of the files."""
    try:
        return build(files)
    except (ConfigError, Unrenderable):
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"the tokenizer in {files.directory} cannot be loaded: {error}") from error


def _fast_twin(built: BuiltTokenizer) -> _Engine | None:
    try:
        twin = fastokens.Tokenizer.from_json_str(built.engine.to_str())
        twin.enable_segment_cache(SEGMENT_CACHE_BYTES)
        return twin if _same_ids(built, twin) else None
    except Exception:  # noqa: BLE001 - any refusal of this tokenizer means that the reference is used
        return None


def _same_ids(built: BuiltTokenizer, twin: _Engine) -> bool:
    texts = corpus_for(list(built.engine.get_added_tokens_decoder().values()))
    # Twice: the second time from the segment cache.
    return all(
        to_ids(twin.encode_batch_flat([text], special)[0]) == built.engine.encode(text, add_special_tokens=special).ids
        for special in (False, True, False)
        for text in texts
    )


def _affixes(post_processor: Mapping[str, Any] | None) -> Affixes | None:
    """What the post-processor puts around every text; None where it is not known to do just that."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return Affixes(b"", b"")
        case {"type": "TemplateProcessing", "single": pieces, "special_tokens": tokens}:
            return _template_affixes(pieces, tokens)
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, first], "sep": [_, last]}:
            return Affixes(token_bytes([first]), token_bytes([last]))
        case {"type": "Sequence", "processors": steps}:
            return _sequence_affixes(steps)
    return None


def _template_affixes(pieces: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> Affixes | None:
    places = [index for index, piece in enumerate(pieces) if "Sequence" in piece]
    if len(places) != 1:
        return None
    at = places[0]
    ids = [token_bytes(tokens[piece["SpecialToken"]["id"]]["ids"]) for piece in (*pieces[:at], *pieces[at + 1 :])]
    return Affixes(b"".join(ids[:at]), b"".join(ids[at:]))


def _sequence_affixes(steps: Sequence[Mapping[str, Any]]) -> Affixes | None:
    whole = Affixes(b"", b"")
    for step in steps:
        own = _affixes(step)
        if own is None:
            return None
        whole = Affixes(own.before + whole.before, whole.after + own.after)
    return whole


def _cut_corpus(marks: Sequence[str]) -> list[str]:
    """Texts with every mark between text of every kind, and lines that open with letters."""
    lines = "\n".join(f"{text.strip()}\nLine {index}" for index, text in enumerate(_CORPUS))
    touching = [f"{one}{mark}{other}" for mark in marks for one, other in zip(_CORPUS, reversed(_CORPUS), strict=True)]
    return [lines, *touching, "".join(touching)]


def corpus_for(added_tokens: Sequence[Any], limit: int = 40) -> list[str]:
    """The fixed corpus, and around each of the first and last added tokens text of every kind that touches it."""
    half = limit // 2
    chosen = [*added_tokens[:half], *added_tokens[half:][-half:]]
    around = []
    for index, token in enumerate(chosen):
        word = token.content
        before, after = _CORPUS[index % len(_CORPUS)], _CORPUS[(index * 7 + 3) % len(_CORPUS)]
        around += [f"{before}{word}{after}", f"x {word} y", f"{word}{word}\n{word}  z", f"a{word}b {word.upper()}"]
    return [*_CORPUS, " ".join(_CORPUS), *around]
