"""HTTP/1.1 responses as nearly all workers frame them, read without a callback for every header and every chunk.

Strict, and not complete: where a head is anything but plain, ``read_head`` leaves it to httptools, which then reads the
whole response. Lines of heads recur from answer to answer, so what was made of them is kept.
"""

import re
from typing import NamedTuple

Header = tuple[bytes, bytes]

_STATUS = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)"
)
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;%b(?:=%b)?)*" % (_TOKEN, _TOKEN))
_LENGTH = re.compile(rb"[0-9]{1,15}")
_BODILESS = frozenset({204, 304})
# Headers that say how the response is framed; each with the values that are understood here.
_FRAMING = {
    b"connection": re.compile(rb"(?i:keep-alive|close)"),
    b"content-length": _LENGTH,
    b"proxy-connection": None,
    b"transfer-encoding": re.compile(rb"(?i:chunked)"),
    b"upgrade": None,
}
_KEPT = 1024
_KEPT_BYTES = 256
_LONGEST_LINE = 16 << 10

_statuses: dict[bytes, int] = {}
_lines: dict[bytes, Header] = {}
_sizes: dict[bytes, int] = {}


class Head(NamedTuple):
    """A response's head, names in lower case. ``length`` is None where the body is ``chunked``; ``end`` is where the body
    begins."""

    status: int
    headers: list[Header]
    length: int | None
    keep_alive: bool
    end: int


def read_head(data: bytes, most: int) -> Head | None:
    """The head that ``data`` begins with; None where it is not all there within ``most`` bytes, or not plain: a status
    that has no body, a line or a value that is not usual, a body that neither has a length nor is chunked.
    """
    end = data.find(b"\r\n\r\n", 0, most)
    if end < 0:
        return None
    first, *lines = data[:end].split(b"\r\n")
    status = _statuses.get(first) or _status(first)
    if not status:
        return None
    headers: list[Header] = []
    framing: dict[bytes, bytes] = {}
    for line in lines:
        header = _lines.get(line) or _header(line)
        if header is None:
            return None
        headers.append(header)
        if header[0] in _FRAMING:
            if header[0] in framing:
                return None
            framing[header[0]] = header[1]
    length, chunked = framing.get(b"content-length"), b"transfer-encoding" in framing
    if chunked is (length is not None):
        return None
    keep_alive = framing.get(b"connection", b"").lower() != b"close"
    return Head(status, headers, None if length is None else int(length), keep_alive, end + 4)


def _status(line: bytes) -> int:
    found = _STATUS.fullmatch(line)
    status = int(found[1]) if found is not None else 0
    if not status or status in _BODILESS:
        return 0
    if len(line) <= _KEPT_BYTES:
        _make_room(_statuses)
        _statuses[line] = status
    return status


def _header(line: bytes) -> Header | None:
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    name, value = found[1].lower(), found[2]
    if name in _FRAMING and ((usual := _FRAMING[name]) is None or not usual.fullmatch(value)):
        return None
    if len(line) <= _KEPT_BYTES:
        _make_room(_lines)
        _lines[line] = (name, value)
    return name, value


def _make_room(kept: dict[bytes, int] | dict[bytes, Header]) -> None:
    if len(kept) >= _KEPT:
        kept.clear()


class Chunked:
    """The chunked coding of one body, decoded as it arrives. ``done`` is whether its end was seen, ``surplus`` whether
    something came after that."""

    __slots__ = ("_due", "_held", "_in_trailer", "_left", "_trailer_bytes", "done", "surplus")

    def __init__(self) -> None:
        self._held = b""
        self._left = 0
        self._due = False  # the line end behind a chunk's data
        self._in_trailer = False
        self._trailer_bytes = 0
        self.done = False
        self.surplus = False

    def is_one_chunk(self, data: bytes) -> bool:
        """Whether ``data`` is exactly one chunk that is not the last, with nothing owed before it."""
        if self._left or self._due or self._held or self._in_trailer:
            return False
        end = data.find(b"\r\n", 0, 16)
        size = _sizes.get(data[:end]) if end > 0 else None
        return size is not None and size > 0 and end + size + 4 == len(data) and data.endswith(b"\r\n")

    def feed(self, data: bytes) -> list[bytes]:
        """The body's bytes in ``data``, in pieces.

        Raises:
            ValueError: this is no chunked coding.
        """
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._left:
                pieces.append(data[at : at + self._left])
                at += len(pieces[-1])
                self._left -= len(pieces[-1])
                self._due = not self._left
            elif (line_end := self._line_end(data, at)) < 0:
                self._held = data[at:]
                break
            else:
                self._line(data[at:line_end])
                at = line_end + 2
        self.surplus = self.done and at < end
        return pieces

    def _line_end(self, data: bytes, at: int) -> int:
        """Where the line at ``at`` ends; -1 where its end has not come."""
        longest = 2 if self._due else _LONGEST_LINE
        end = data.find(b"\r\n", at, at + longest)
        if end < 0 and (len(data) - at >= longest or (self._due and data[at : at + 1] != b"\r")):
            raise ValueError("a line of its framing does not end where it should")
        return end

    def _line(self, line: bytes) -> None:
        if self._due:
            self._due = False
        elif self._in_trailer:
            self._trailer_bytes += len(line)
            if line and (_LINE.fullmatch(line) is None or self._trailer_bytes > _LONGEST_LINE):
                raise ValueError("its trailer is malformed or too long")
            self.done = not line
        else:
            size = _sizes.get(line)
            self._left = _size(line) if size is None else size
            self._in_trailer = not self._left


def _size(line: bytes) -> int:
    found = _SIZE.fullmatch(line)
    if found is None:
        raise ValueError("a chunk's size is malformed")
    size = int(found[1], 16)
    if len(line) <= _KEPT_BYTES:
        _make_room(_sizes)
        _sizes[line] = size
    return size
