"""What a request says about its own cache: the object ``warmroute`` in its ``kv_transfer_params``.

These are hints: whatever is wrong with them is ignored, told in the log once for each name, and never fails a request.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from worker_connector.eviction import HIGH, LOW, NORMAL

MOST_KEEP_SECONDS = 86_400.0
"""A request can have its chunks kept for so long at most."""
MOST_TAGS = 8
LONGEST_TAG = 128
PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}
_MOST_SAID = 64

_log = logging.getLogger("vllm.warmroute.requests")
_said: set[str] = set()


class Controls(NamedTuple):
    """``skip_save``: nothing of the request is saved. ``skip_load``: nothing is loaded for it. ``keep``: for so many
    seconds after it ended, its chunks in the CPU tier are not evicted. ``tags``: names by which operators can name its
    chunks. ``priority``: which chunks the CPU tier gives up first."""

    skip_save: bool = False
    skip_load: bool = False
    keep: float = 0.0
    tags: tuple[str, ...] = ()
    priority: int = NORMAL


NONE = Controls()


def controls_of(request: Any) -> Controls:
    """What a request asks for, as far as it makes sense. Never raises."""
    params = getattr(request, "kv_transfer_params", None)
    given = params.get("warmroute") if isinstance(params, Mapping) else None
    if given is None:
        return NONE
    if not isinstance(given, Mapping):
        _say("", "kv_transfer_params.warmroute must be an object, and is ignored")
        return NONE
    found = {}
    for name, value in given.items():
        if (parse := _PARSERS.get(name)) is None:
            _say(repr(name)[:80], f"is unknown and ignored; known: {', '.join(_PARSERS)}")
        elif (parsed := parse(value)) is None:
            _say(name, f"is {_WANTED[name]}; another value is ignored")
        else:
            found[name] = parsed
    return Controls(**found)


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        return None
    seconds = float(min(value, MOST_KEEP_SECONDS + 1))  # integers may be larger than any float
    return None if value == math.inf else min(seconds, MOST_KEEP_SECONDS)


def _tags(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list | tuple) or len(value) > MOST_TAGS:
        return None
    tags = tuple(tag for tag in value if isinstance(tag, str) and 0 < len(tag) <= LONGEST_TAG)
    return tags if len(tags) == len(value) else None


def _priority(value: Any) -> int | None:
    return PRIORITIES.get(value) if isinstance(value, str) else None


_PARSERS: dict[Any, Callable[[Any], Any]] = {
    "skip_save": _flag,
    "skip_load": _flag,
    "keep": _seconds,
    "tags": _tags,
    "priority": _priority,
}
_WANTED = {"skip_save": "true or false", "skip_load": "true or false", "keep": "a number of seconds, 0 or more"}
_WANTED["priority"] = "low, normal or high"
_WANTED["tags"] = f"a list of up to {MOST_TAGS} names of up to {LONGEST_TAG} characters"


def _say(name: str, text: str) -> None:
    """Tell it the first time, of so many names."""
    if name not in _said and len(_said) < _MOST_SAID:
        _said.add(name)
        _log.warning("%s %s", f"kv_transfer_params.warmroute.{name}" if name else "A request's", text)
