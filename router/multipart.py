"""The fields of a multipart form, as far as routing needs them: read in place, files skipped, nothing copied."""

import re

from router.errors import InvalidRequest

LONGEST_FIELD = 1024
"""A model's name is not longer than this many bytes."""
MOST_PARTS = 1000
_BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'content-disposition:[^\r\n]*?;\s*name="?([^";\r\n]*)"?', re.IGNORECASE)
_FILE = re.compile(rb"content-disposition:[^\r\n]*?;\s*filename\*?=", re.IGNORECASE)


def form_field(body: bytes, content_type: bytes, name: str) -> str | None:
    """The value of the last field of this name that is no file; None where there is none. One pass over the body.

    Raises:
        InvalidRequest: the body is no such form, or the field is no short text.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("the content type of a form names no boundary")
    mark = b"--" + (found[1] or found[2])
    value: str | None = None
    start = _after_mark(body, mark, 0)
    for _ in range(MOST_PARTS):
        if start < 0:
            return value
        end = body.find(b"\r\n" + mark, start)
        if end < 0:
            raise InvalidRequest("the form is not complete: its closing boundary is missing")
        value = _value(body, start, end, name) or value
        start = _after_mark(body, mark, end + 2)
    raise InvalidRequest(f"the form has more than {MOST_PARTS} parts")


def _after_mark(body: bytes, mark: bytes, at: int) -> int:
    """Where the part after a boundary begins; -1 after the last one."""
    at = body.find(mark, at)
    if at < 0:
        raise InvalidRequest("the form does not hold the boundary that its content type names")
    at += len(mark)
    if body.startswith(b"--", at):
        return -1
    line = body.find(b"\r\n", at, at + 128)
    if line < 0:
        raise InvalidRequest("the form's boundary is not a line of its own")
    return line


def _value(body: bytes, start: int, end: int, name: str) -> str | None:
    """A part runs from the line end after its boundary to the one before the next."""
    head_end = body.find(b"\r\n\r\n", start, min(end + 2, start + 8192))
    if head_end < 0:
        return None
    head = body[start:head_end]
    named = _NAME.search(head)
    if named is None or named[1] != name.encode() or _FILE.search(head):
        return None
    if end - head_end - 4 > LONGEST_FIELD:
        raise InvalidRequest(f"{name} is longer than {LONGEST_FIELD} bytes", param=name)
    try:
        return body[head_end + 4 : end].decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not valid UTF-8", param=name) from None
