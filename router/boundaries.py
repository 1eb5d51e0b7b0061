r"""Where a text may be cut so that the tokens of the pieces, one after the other, are the tokens of the whole.

Two kinds of places are known to be safe.

*Before a special token.* Tokenizers look for added tokens in the raw text first, leftmost and longest, and hand what
lies between them to normalizer, pre-tokenizer and model piece by piece. A cut right before such a token changes no piece
if the token really is found there in every context: it is matched on the raw text (not ``normalized``), takes no
whitespace from its left (``lstrip``), asks nothing of its neighbours (``single_word``), begins with punctuation, and no
other added token contains, begins with or overlaps its beginning.

*Before an ASCII letter that opens a line*, where exactly one line feed stands between it and text that is not
whitespace. No added token may reach across. Beyond that it depends on the family:

- byte-level BPE over one of the split patterns below: each of them ends a word after that line feed, whether or not
  the text goes on, and the normalizer (none or NFC) does not compose across it;
- BPE over the whole piece (no pre-tokenizer that sees a line feed, normalizer none or one that replaces spaces): merges
  only ever make tokens of the vocabulary, so where no token contains a line feed followed by a letter, no merge crosses
  the cut, and merges left and right of it do not depend on each other;
- WordPiece behind BERT's pre-tokenizer, which drops whitespace and treats words one by one.

For every other tokenizer (Unigram: its best path is a sum of rounded numbers; Metaspace with a prepended mark) only
special tokens are used. ``Boundaries.of`` reads all this from the tokenizer's own serialization.
"""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_LETTERS = frozenset(string.ascii_letters)
_OPENING = frozenset(string.punctuation) - {"_"}
_SHORTEST_MARK = 2
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every one of them: line feeds only ever end a match before a letter, and only `\s+(?!\S)` looks ahead.
SAFE_PATTERNS = frozenset(
    {
        _GPT2,
        _O200K,
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACE}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_PUNCTUATION_AND_SPACE}",
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        _DEEPSEEK,
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001 - DeepSeek's ranges
    }
)


class Boundaries:
    """Safe cuts of one tokenizer's texts. ``marks`` are the special tokens; ``lines`` tells whether lines are safe."""

    def __init__(self, marks: Sequence[str], *, lines: bool) -> None:
        self.marks = tuple(marks)
        self.lines = lines

    @classmethod
    def of(cls, serialized: Mapping[str, Any], marks: Iterable[str], *, lines: bool | None = None) -> "Boundaries":
        """From a tokenizer's JSON form, as ``tokenizers`` writes it: those of ``marks`` that are safe, in their order.

        ``lines``, where given, says what the form told before, and the model may be left out of it.
        O(added tokens) for each mark.
        """
        added = serialized.get("added_tokens") or []
        if lines is None:
            lines = _lines_are_free(added) and _lines_are_words(serialized)
        return cls([mark for mark in dict.fromkeys(marks) if _is_safe(mark, added)], lines=lines)

    def last_mark(self, text: str, end: int, start: int = 0) -> int:
        """The last cut before ``end`` at a special token; ``start`` where there is none after it. O(distance)."""
        best = start
        for mark in self.marks:
            best = max(best, text.rfind(mark, best, end))
        return best

    def last_line(self, text: str, start: int, end: int) -> int:
        """The last cut after ``start`` and before ``end`` at a line; ``start`` where there is none."""
        at = text.rfind("\n", start, end - 1)
        while at >= 0:
            if _opens_line(text, at + 1):
                return at + 1
            at = text.rfind("\n", start, at)
        return start

    def first(self, text: str, start: int, limit: int) -> int:
        """The first cut at ``start`` or after it, of either kind; ``limit`` where there is none before it."""
        best = self._first_line(text, start, limit) if self.lines else limit
        for mark in self.marks:
            found = text.find(mark, start, min(limit, best + len(mark)))
            best = found if 0 <= found < best else best
        return best

    def _first_line(self, text: str, start: int, limit: int) -> int:
        at = text.find("\n", max(start, 1) - 1, limit - 1)
        while at >= 0:
            if _opens_line(text, at + 1):
                return at + 1
            at = text.find("\n", at + 1, limit - 1)
        return limit

    def every(self, text: str) -> Iterator[int]:
        """All cuts of ``text``, in order."""
        at = 1
        while (at := self.first(text, at, len(text))) < len(text):
            yield at
            at += 1


def _opens_line(text: str, at: int) -> bool:
    return 2 <= at < len(text) and text[at] in _LETTERS and text[at - 1] == "\n" and not text[at - 2].isspace()


def _is_safe(mark: str, added: Sequence[Mapping[str, Any]]) -> bool:
    token = next((token for token in added if token["content"] == mark), None)
    if token is None or token["normalized"] or token["lstrip"] or token["single_word"]:
        return False
    if len(mark) < _SHORTEST_MARK or mark[0] not in _OPENING or _overlaps(mark, mark):
        return False
    others = (other["content"] for other in added if other is not token)
    return not any(other.startswith(mark) or _overlaps(other, mark) for other in others)


def _overlaps(other: str, mark: str) -> bool:
    """Whether an occurrence of ``other`` can begin before one of ``mark`` and reach into it."""
    return any(mark.startswith(other[at:]) or other.startswith(mark, at) for at in range(1, len(other)))


def _lines_are_free(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no added token can take part of a line's end or beginning across the cut."""
    return not any(
        "\n" in token["content"] or (token["content"][:1] in _LETTERS and token["lstrip"]) for token in added
    )


def _lines_are_words(serialized: Mapping[str, Any]) -> bool:
    model = serialized.get("model") or {}
    steps = _steps(serialized.get("pre_tokenizer"), "pretokenizers")
    normalizers = _steps(serialized.get("normalizer"), "normalizers")
    if model.get("type") == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        return all(step["type"] == "NFC" for step in normalizers) and _is_byte_level(steps)
    if model.get("type") == "BPE":
        return _is_whole_piece(model, normalizers, steps)
    if model.get("type") == "WordPiece":
        return all(step["type"] in ("BertNormalizer", "Lowercase") for step in normalizers) and [
            step["type"] for step in steps
        ] == ["BertPreTokenizer"]
    return False


def _is_byte_level(steps: Sequence[Mapping[str, Any]]) -> bool:
    *splits, level = steps
    if level["type"] != "ByteLevel" or level.get("add_prefix_space"):
        return False
    safe = all(
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and not step.get("invert")
        and step["pattern"].get("Regex") in SAFE_PATTERNS
        for step in splits
    )
    return safe and (bool(level.get("use_regex", True)) or any(_ends_words(step) for step in splits))


def _ends_words(step: Mapping[str, Any]) -> bool:
    """Whether the pattern is a whole one, not one that only sets digits or a script apart."""
    return str(step["pattern"]["Regex"]).endswith(r"\s+")


def _is_whole_piece(
    model: Mapping[str, Any], normalizers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> bool:
    if model.get("ignore_merges") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    spaces_only = {"String": " "}
    normal = all(step["type"] == "Replace" and step["pattern"] == spaces_only for step in normalizers)
    split = all(
        step["type"] == "Split" and step["pattern"] == spaces_only and step["behavior"] == "MergedWithPrevious"
        for step in steps
    )
    vocabulary = model.get("vocab") or {}
    if not normal or not split or not all(letter in vocabulary for letter in ("\n", *_LETTERS)):
        return False
    return not any(_crosses(token) for token in vocabulary)


def _crosses(token: str) -> bool:
    at = token.find("\n")
    while 0 <= at < len(token) - 1:
        if token[at + 1] in _LETTERS:
            return True
        at = token.find("\n", at + 1)
    return False


def _steps(value: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if value is None:
        return []
    return [step for item in value[members] for step in _steps(item, members)] if members in value else [value]
