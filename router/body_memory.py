"""Bodies of long chats, of which all but the end was seen before, decoded at the cost of their end.

What is remembered of a body is its beginning up to the end of a message, ``known``, and the messages decoded from it. A
body that begins with the same bytes, all of them compared, has the same messages there. The rest of it is decoded behind a
stand-in: the beginning up to the opening of the messages' list, and one string in place of the known messages. JSON's
grammar is in the same state behind either: after an element of that list. So the one is well-formed if the other is, and
they have the same members but for that element. The string is random, so nothing a client sends looks like it: where it
is not the first message of what was decoded, another member ``messages`` came later, and the body is decoded as a whole.
"""

import os
import re
from collections.abc import Iterator
from sys import getsizeof
from typing import Any

import msgspec

SHORTEST = 16 << 10
"""Bytes of messages that are worth remembering, and by which a body has to outgrow what is known of it."""
_GROWTH = 4
_MAX_PROBES = 64
_SAMPLE = 48
_SAMPLES = 32
_HEAD = 64
_MESSAGE_COST = 400  # a message's dictionary and its places in lists
_OPENING = re.compile(rb'"messages"[ \t\r\n]*:[ \t\r\n]*\[')
_BETWEEN = re.compile(rb"[ \t\r\n]*,?[ \t\r\n]*")
_STAND_IN = os.urandom(16).hex()
_ELEMENT = b'"' + _STAND_IN.encode() + b'"'

_decode = msgspec.json.Decoder().decode
_Key = tuple[int, bytes, bytes]


class _Spans(msgspec.Struct):
    messages: list[msgspec.Raw]


_decode_spans = msgspec.json.Decoder(_Spans).decode


class Beginning(msgspec.Struct, frozen=True, eq=False):
    """``known`` bytes of bodies, and ``messages``, which are shared by the bodies decoded from it: nobody changes them.
    ``opening`` stands in for it."""

    known: bytes
    opening: bytes
    messages: list[Any]
    cost: int


class BodyMemory:
    """Of one process. ``limit`` bounds what is kept, in bytes; 0 keeps nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._beginnings: dict[_Key, Beginning] = {}
        self.used = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._beginnings)

    def decode(self, raw: bytes) -> tuple[dict[str, Any], int] | None:
        """What JSON decoding makes of ``raw``, an object, and how many bytes of it were known; None where its beginning
        is not, or it is no JSON object.

        Costs about 10 µs per 100 KB known, beside decoding the rest.
        """
        found = self._find(raw)
        if found is None:
            return None
        try:
            body = _decode(found.opening + raw[len(found.known) :])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # told in terms of the whole body
        if not _begins(body):
            return None
        body["messages"][:1] = found.messages
        self.hits += 1
        return body, len(found.known)

    def learn(self, raw: bytes, body: dict[str, Any], known: int) -> None:
        """Remember a body of plain texts of which ``known`` bytes were known, if it outgrew them; without its last
        message: the next body is likely to differ there."""
        if len(raw) - known < max(SHORTEST, known // _GROWTH):
            return
        messages = body["messages"][:-1]
        opening = _OPENING.search(raw)
        if opening is None or len(raw) - opening.end() < SHORTEST:
            return
        end = _end_of(raw, opening.end(), len(messages))
        if end - opening.end() < SHORTEST:
            return
        stand_in = raw[: opening.end()] + _ELEMENT
        try:
            rest = _decode(stand_in + raw[end:])
        except msgspec.DecodeError:  # what looked like the list's opening was a part of some text
            return
        if rest == {**body, "messages": [_STAND_IN, *body["messages"][-1:]]}:
            texts = sum(getsizeof(message["content"]) for message in messages)
            cost = end + texts + len(stand_in) + _MESSAGE_COST * (len(messages) + 2)
            self._keep(_key(raw, end), Beginning(raw[:end], stand_in, messages, cost))

    def check(self) -> None:
        """Verify every invariant. O(beginnings)."""
        assert self.used == sum(beginning.cost for beginning in self._beginnings.values()) <= max(self._limit, 0)
        for key, beginning in self._beginnings.items():
            assert key == _key(beginning.known, len(beginning.known))
            assert _decode(beginning.known + b"]}")["messages"] == beginning.messages

    def _find(self, raw: bytes) -> Beginning | None:
        for end in _ends_backwards(raw):
            key = _key(raw, end)
            found = self._beginnings.get(key)
            if found is not None and raw.startswith(found.known):
                self._beginnings[key] = self._beginnings.pop(key)
                return found
        return None

    def _keep(self, key: _Key, beginning: Beginning) -> None:
        before = self._beginnings.pop(key, None)
        self.used += beginning.cost - (before.cost if before is not None else 0)
        self._beginnings[key] = beginning
        while self.used > self._limit:
            self.used -= self._beginnings.pop(next(iter(self._beginnings))).cost


def _begins(body: Any) -> bool:
    messages = body.get("messages") if type(body) is dict else None
    return type(messages) is list and bool(messages) and messages[0] == _STAND_IN


def _key(raw: bytes, end: int) -> _Key:
    return end, raw[max(0, end - _SAMPLE) : end], raw[: end : end // _SAMPLES + 1]


def _ends_backwards(raw: bytes) -> Iterator[int]:
    """Where messages may end with others behind them, the last first; most of these places do, and none has to. Bodies
    are written with spaces everywhere or nowhere: one way of looking is enough, and looking in vain takes long.
    """
    joint = b"}, {" if b'": ' in raw[:_HEAD] else b"},{"
    end = len(raw)
    for _ in range(_MAX_PROBES):
        end = raw.rfind(joint, SHORTEST, end)
        if end < 0:
            return
        yield end + 1


def _end_of(raw: bytes, at: int, count: int) -> int:
    """Where the first ``count`` messages of the list that opens before ``at`` end; 0 where they are not found there."""
    try:
        spans = _decode_spans(raw).messages
    except msgspec.DecodeError:  # a member given twice, first with something else
        return 0
    for number in range(count):
        span = bytes(spans[number])
        between = _BETWEEN.match(raw, at)
        at = between.end() if between is not None else at
        if not raw.startswith(span, at):
            return 0
        at += len(span)
    return at
