"""Plain responses are read as httptools reads them, however they are cut; what is not plain is left to it."""

import asyncio
import itertools
import re
from typing import Any

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router import framing
from router.errors import UpstreamError
from router.framing import Chunked, read_head
from router.upstream import Connection

MOST = 256 << 10


class Reference:
    """What httptools makes of a response."""

    def __init__(self, data: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.head = self.done = self.failed = False
        self.parser = httptools.HttpResponseParser(self)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.failed = not self.done
        self.status = self.parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.head = True
        self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self.done:
            self.body += body

    def on_message_complete(self) -> None:
        self.done = True


STATUS_LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 404 Not Found",
        b"HTTP/1.1 500 ",
        b"HTTP/1.1 503",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 204 No Content",
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 2000 x",
        b"HTTP/1.1 999 x",
    ]
)
LINES = st.one_of(
    st.sampled_from(
        [
            b"content-length: 5",
            b"Content-Length:5",
            b"content-length: 05",
            b"content-length: +5",
            b"content-length: 5, 5",
            b"transfer-encoding: chunked",
            b"Transfer-Encoding: CHUNKED",
            b"transfer-encoding: gzip, chunked",
            b"connection: close",
            b"Connection: Keep-Alive",
            b"connection: x, close",
            b"upgrade: h2c",
            b"a:",
            b"b: ",
            b"content-type: application/json",
            b"x y: z",
            b" folded",
            b"c : d",
            b"e: \x00",
            b"f: g\rh",
            b"i: j\nk: l",
            b"m: n ",
            b"o:\tp\t",
            b": q",
            b"date: Mon, 01 Jan 2026 00:00:00 GMT",
            b"proxy-connection: close",
            b"",
        ]
    ),
    st.binary(max_size=12),
)
BODIES = st.one_of(
    st.sampled_from(
        [b"", b"hello", b"hello!", b"hell", b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n"]
    ),
    st.binary(max_size=24),
)
RESPONSES = st.builds(
    lambda first, lines, body: b"\r\n".join([first, *lines, b"", b""]) + body,
    STATUS_LINES,
    st.lists(LINES, max_size=4),
    BODIES,
)


@settings(max_examples=400, deadline=None)
@given(RESPONSES)
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
@example(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
def test_a_head_that_is_read_is_read_as_httptools_reads_it(data: bytes) -> None:
    head = read_head(data, MOST)
    if head is None:
        return
    reference = Reference(data[: head.end])
    assert reference.head
    assert not reference.failed
    assert (head.status, head.headers, head.keep_alive) == (reference.status, reference.headers, reference.keep_alive)
    declared = dict(head.headers).get(b"content-length")
    assert head.length == (None if declared is None else int(declared))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"content-length: 5", b"content-length: 5"],
        [b"content-length: 5", b"transfer-encoding: chunked"],
        [b"transfer-encoding: gzip, chunked"],
        [b"content-length: 5", b"upgrade: h2c"],
        [b"content-length: 5", b"connection: x"],
        [b"content-length: 5", b"a: b", b" folded"],
        [b"content-length: 5", b"a : b"],
    ],
)
def test_what_is_not_plain_is_left_alone(lines: list[bytes]) -> None:
    assert read_head(b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""]) + b"hello", MOST) is None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start < end]


SIZES = st.one_of(
    st.sampled_from([b"5", b"0", b"00", b"A", b"a;b", b"5 ;b=c", b"-1", b"0x5", b"", b" 5", b"5_0"]),
    st.binary(max_size=4),
)
PIECES = st.one_of(
    st.binary(min_size=1, max_size=40).map(lambda data: b"%x\r\n%b\r\n" % (len(data), data)),
    st.builds(lambda size, data: size + b"\r\n" + data + b"\r\n", SIZES, st.binary(max_size=10)),
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(PIECES, max_size=5),
    st.sampled_from([b"0\r\n\r\n", b"0\r\na: b\r\n\r\n", b"", b"0\r\n\r\nmore"]),
    st.data(),
)
def test_chunks_are_decoded_as_httptools_decodes_them(pieces: list[bytes], end: bytes, data: Any) -> None:
    coded = b"".join(pieces) + end
    reference = Reference(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + coded)
    chunked, body, failed = Chunked(), b"", False
    try:
        for part in cut(coded, data.draw(st.lists(st.integers(0, 300), max_size=6))):
            single = chunked.is_one_chunk(part)
            before = chunked.done
            decoded = chunked.feed(part)
            assert not single or (len(decoded) == 1 and not before)
            assert not single or part == b"%b\r\n%b\r\n" % (part[: part.index(b"\r\n")], decoded[0])
            body += b"".join(decoded)
            if chunked.done:
                break
    except ValueError:
        failed = True
    if reference.failed:
        assert failed or not chunked.done, "it must not be complete for us where it is broken"
    else:
        assert not failed or not reference.done, "what is complete for httptools is complete"
    if chunked.done:
        assert (body, reference.done) == (reference.body, True)


class Transport:
    def __init__(self) -> None:
        self.aborted = False

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def writelines(self, _: object) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


Outcome = tuple[Any, ...]


async def outcome(parts: list[bytes]) -> Outcome:
    connection, transport = Connection("w", 60, asyncio.get_running_loop()), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.send(b"", (b"",), 60)
    for part in parts:
        if not transport.aborted:
            connection.data_received(part)
    body, error = b"", False
    try:
        while connection.complete and (more := await connection.read()):
            body += more
    except UpstreamError:
        error = True
    complete = connection.complete
    return (
        complete,
        complete and connection.status,
        complete and connection.headers,
        body,
        complete and connection.reusable,
        error,
    )


@settings(max_examples=300, deadline=None)
@given(RESPONSES, st.lists(st.integers(0, 200), max_size=4))
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello!", [])
@example(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nx", [])
def test_connections_make_the_same_of_it_either_way(data: bytes, places: list[int]) -> None:
    parts = cut(data, places)
    ours = asyncio.run(outcome(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.upstream.read_head", lambda *_: None)
        theirs = asyncio.run(outcome(parts))
    assert ours == theirs


def test_what_is_kept_is_bounded() -> None:
    for number in range(5000):
        read_head(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-number: %d\r\n\r\n" % number, MOST)
        Chunked().feed(b"%x;%d\r\n" % (number + 1, number))
    assert len(framing._lines) <= 1024
    assert len(framing._sizes) <= 1024
    read_head(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-long: %b\r\n\r\n" % (b"v" * 5000), MOST)
    assert max(map(len, framing._lines)) <= 256
    with pytest.raises(ValueError, match="does not end"):
        Chunked().feed(b"5;" + b"x" * (20 << 10))
    with pytest.raises(ValueError, match="trailer"):
        Chunked().feed(b"0\r\n" + b"a: b\r\n" * 5000)
    assert re.fullmatch(rb"[0-9a-f]+", b"5")
