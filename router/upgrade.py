"""Requests that offer to go on in another protocol (``Upgrade: h2c``, ``websocket``): served as HTTP/1.1, as RFC 9110
allows.

The parser ends such a request with its head and leaves the rest to whoever speaks the other protocol. To read the body
as HTTP/1.1 after all, a fresh parser is given the head again, without the offer, unheard; from there on it is the
connection's parser.
"""

from typing import Any

import httptools

_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class Unheard:
    """Passes a parser's callbacks on to a protocol, from the end of the first head on."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._in_head = True

    def on_message_begin(self) -> None:
        if not self._in_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_head:
            self._in_head = False
        else:
            self._protocol.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        self._protocol.on_message_complete()


def parse_past_head(protocol: Any, method: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Give ``protocol`` a parser that expects the body of a request with these headers, and further requests after it.
    A request without a body ends here: the protocol hears it, and must not ask the parser before then.

    Raises:
        httptools.HttpParserError: the headers frame no body.
    """
    parser = protocol.parser = httptools.HttpRequestParser(Unheard(protocol))
    lines = [b"%s: %s\r\n" % header for header in headers if header[0] in _FRAMING]
    parser.feed_data(b"".join((method, b" / HTTP/1.1\r\nhost: h\r\n", *lines, b"\r\n")))
