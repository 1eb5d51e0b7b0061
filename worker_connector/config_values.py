"""Readers of single settings: each returns the checked value or raises ValueError saying what is allowed."""

import re
from collections.abc import Callable
from typing import Any

from kv_protocol.identity import generation_name

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("it must be true or false")
    return word in _TRUE


def warmup(value: Any) -> bool:
    """Whether to fetch at start what was used last; prompts to compute are another's business."""
    try:
        return boolean(value)
    except ValueError:
        raise ValueError(
            "it must be true or false: prompts to compute at start stand in the file that the gateway's warmup_prompts "
            "names (warmroute serve --warmup-prompts FILE)"
        ) from None


def positive(value: Any) -> int:
    return _integer(value, 1, 2**31 - 1)


def non_negative(value: Any) -> int:
    return _integer(value, 0, 2**31 - 1)


def copy_threads(value: Any) -> int:
    """How many threads share one copy."""
    return _integer(value, 1, 8)


def numa_node(value: Any) -> int | None:
    """The number of a NUMA node; -1 for ``any``, None for ``auto``."""
    word = str(value).strip().lower()
    if word in ("auto", "any"):
        return None if word == "auto" else -1
    if not word.isdecimal() or len(word) > 4:
        raise ValueError("it must be auto, any or the number of a node")
    return int(word)


def generation(value: Any) -> str:
    """What a generation of weights is called; empty for that of the files."""
    word = str(value).strip()
    return generation_name(word) if word else ""


def port(value: Any) -> int:
    """A TCP port; 0 lets the system choose."""
    return _integer(value, 0, 65_535)


def size(value: Any) -> int:
    """Bytes, from a number or a text with a unit: GiB and G are 2^30, GB is 10^9."""
    match = None if isinstance(value, bool) else _SIZE.fullmatch(_plain(value))
    if match is None or (amount := int(float(match[1]) * _unit(match[2]))) <= 0:
        raise ValueError('it must be a size above zero, in bytes or with a unit such as "20GiB"')
    return amount


def gibibytes(value: Any) -> int:
    """Bytes, from the GB (of 2^30 bytes) that LMCache counts in."""
    amount = number(value, "a number of GB above zero")
    if not 0 < amount < 1 << 30:
        raise ValueError("it must be a number of GB above zero")
    return int(amount * (1 << 30))


def fraction(value: Any) -> float:
    amount = number(value, "a share above 0, such as 0.3")
    if not 0 < amount <= 1000:
        raise ValueError("it must be a share above 0 (0.3 is 30 % of the GPU's KV cache), and at most 1000")
    return amount


def seconds(value: Any) -> float:
    amount = number(value, "a number of seconds")
    if not 0.05 <= amount <= 3600:
        raise ValueError("it must be between 0.05 and 3600 seconds")
    return amount


def share(value: Any) -> float:
    amount = number(value, "a share")
    if not 0 <= amount <= 1:
        raise ValueError("it must be between 0 and 1")
    return amount


def short_seconds(value: Any) -> float:
    amount = number(value, "a number of seconds")
    if not 0.001 <= amount <= 60:
        raise ValueError("it must be between 0.001 and 60 seconds")
    return amount


def urls(value: Any) -> str:
    """Several of them, given as a list or separated by blanks, as one text; empty for none."""
    given = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, str) for each in given):
        raise ValueError("it must be a URL, or a list of them")
    return " ".join(each.strip() for each in given if each.strip())


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it must be a text that is not empty")
    return value.strip()


def optional_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it must be a text")  # noqa: TRY004 - every reader raises ValueError
    return value


def choice(*allowed: str) -> Callable[[Any], str]:
    """A reader of one of a few words, in any case."""

    def read(value: Any) -> str:
        word = str(value).strip().lower()
        if word not in allowed:
            raise ValueError(f"available here: {', '.join(allowed)}")
        return word

    return read


def codec(value: Any) -> str:
    """The name of how chunks are kept in a lower tier: an encoding, a compression, or both joined by ``+``."""
    from worker_connector.chunk_object import Codec  # noqa: PLC0415 - this module is read where there is no NumPy too

    return str(Codec.parse(str(value).strip()))


def _integer(value: Any, least: int, most: int) -> int:
    amount = number(value, "a whole number")
    if amount != int(amount) or not least <= amount <= most:
        raise ValueError(f"it must be a whole number between {least} and {most}")
    return int(amount)


def number(value: Any, wanted: str) -> float:
    """A finite number; ``wanted`` says what is, if it is none."""
    try:
        amount = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        amount = None
    if amount is None or amount != amount or amount in (float("inf"), float("-inf")):  # noqa: PLR0124 - not a number
        raise ValueError(f"it must be {wanted}")
    return amount


def _plain(value: Any) -> str:
    # A float's text may have an exponent, which no size is written with.
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _unit(unit: str | None) -> int:
    word = (unit or "").lower()
    power = _POWERS[word.rstrip("b").rstrip("i")]
    return int(1000**power if word.endswith("b") and "i" not in word else 1024**power)
