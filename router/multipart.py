"""The fields of a multipart form, as far as routing needs them: read in place, files skipped, nothing copied.

What two parsers could read differently is refused: the model that is looked up here, and held against a key, has to be
the one that the worker reads.
"""

import re

from router.errors import InvalidRequest

LONGEST_FIELD = 1024
"""A model's name is not longer than this many bytes."""
LONGEST_HEAD = 8192
MOST_PARTS = 1000
_PARAMETER = rb'[ \t]*;[ \t]*([^\s;="]+)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;"]*))'
_PARAMETERS = re.compile(_PARAMETER)
_VALUE = re.compile(rb"[ \t]*([^\s;]+)((?:" + _PARAMETER + rb")*)[ \t]*;?[ \t]*")
_DISPOSITION = b"content-disposition:"


def form_field(body: bytes, content_type: bytes, name: str) -> str | None:
    """The value of the last field of this name that is no file; None where there is none. One pass over the body.

    Raises:
        InvalidRequest: the body is no such form, could be read in more than one way, or the field is no short text.
    """
    mark = b"--" + _boundary(content_type)
    value: str | None = None
    if not body.startswith(mark):
        raise InvalidRequest("the form does not begin with the boundary that its content type names")
    start = _after_mark(body, mark, 0)
    for _ in range(MOST_PARTS):
        if start < 0:
            return value
        end = body.find(b"\r\n" + mark, start)
        if end < 0:
            raise InvalidRequest("the form is not complete: its closing boundary is missing")
        found = _field(body, start, end, name)
        value = value if found is None else found
        start = _after_mark(body, mark, end + 2)
    raise InvalidRequest(f"the form has more than {MOST_PARTS} parts")


def _boundary(content_type: bytes) -> bytes:
    parameters = _parameters(content_type, "the content type of the form")
    boundary = parameters.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise InvalidRequest("the content type of a form names no boundary")
    if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise InvalidRequest("forms are taken in UTF-8 only")
    return boundary


def _parameters(value: bytes, what: str) -> dict[bytes, bytes]:
    """Of a header's value. No parameter may stand there twice."""
    whole = _VALUE.fullmatch(value)
    if whole is None:
        raise InvalidRequest(f"{what} is malformed")
    found = [(key.lower(), quoted or plain) for key, quoted, plain in _PARAMETERS.findall(whole[2])]
    parameters = dict(found)
    if len(parameters) < len(found):
        raise InvalidRequest(f"{what} has a parameter twice")
    return parameters


def _after_mark(body: bytes, mark: bytes, at: int) -> int:
    """Where the part after a boundary begins, with its line end; -1 after the last one."""
    at = body.find(mark, at)
    if at < 0:
        raise InvalidRequest("the form does not hold the boundary that its content type names")
    at += len(mark)
    if body.startswith(b"--", at):
        return -1
    if not body.startswith(b"\r\n", at):
        raise InvalidRequest("the form's boundary is not a line of its own")
    return at


def _field(body: bytes, start: int, end: int, name: str) -> str | None:
    """A part runs from the line end after its boundary to the one before the next."""
    head_end = body.find(b"\r\n\r\n", start, min(end + 2, start + LONGEST_HEAD))
    if head_end < 0:
        raise InvalidRequest(f"a part of the form has no head, or one above {LONGEST_HEAD} bytes")
    if not _is_field(body[start:head_end], name.encode()):
        return None
    if end - head_end - 4 > LONGEST_FIELD:
        raise InvalidRequest(f"{name} is longer than {LONGEST_FIELD} bytes", param=name)
    try:
        return body[head_end + 4 : end].decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not valid UTF-8", param=name) from None


def _is_field(head: bytes, name: bytes) -> bool:
    lines = [line for line in head.split(b"\r\n") if line]
    if any(line[0] in b" \t" or b"\n" in line or b"\r" in line for line in lines):
        raise InvalidRequest("a part of the form has a header that goes on in another line")
    dispositions = [line for line in lines if line.lower().startswith(_DISPOSITION)]
    if len(dispositions) != 1:
        raise InvalidRequest("each part of a form needs one Content-Disposition")
    parameters = _parameters(dispositions[0][len(_DISPOSITION) :], "a Content-Disposition of the form")
    if parameters.get(b"name") != name or b"filename" in parameters:
        return False
    if b"filename*" in parameters:
        raise InvalidRequest(f"{name.decode()} is no file: leave filename* out", param=name.decode())
    return True
