"""A plain reader of a worker's report port, independent of the router's own."""

import socket
import time

from kv_protocol.messages import (
    Cleared,
    FrameDecoder,
    Heartbeat,
    Hello,
    Message,
    Open,
    Removed,
    Snapshot,
    SnapshotEnd,
    Stored,
    encode,
    unpack,
)


def apply_change(content: dict[str, set[bytes]], message: Message) -> None:
    """What a message does to a view of a worker's tiers."""
    if isinstance(message, Snapshot | Stored):
        content.setdefault(message.tier, set()).update(unpack(message.chunks))
    elif isinstance(message, Removed):
        content.setdefault(message.tier, set()).difference_update(unpack(message.chunks))
    elif isinstance(message, Cleared):
        content.setdefault(message.tier, set()).clear()


def read_content(address: str | None, token: str = "") -> dict[str, set[bytes]]:
    """Every tier's chunk hashes, by listing anew up to the first heartbeat after the snapshot."""
    assert address is not None
    host, port = address.rsplit(":", 1)
    content: dict[str, set[bytes]] = {}
    decoder, complete = FrameDecoder(), False
    deadline = time.monotonic() + 10
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(encode(Open(token=token, reader="test")))
        while time.monotonic() < deadline:
            data = connection.recv(1 << 16)
            assert data, "the worker closed the report connection"
            for message in decoder.feed(data):
                if isinstance(message, Hello):
                    content = {tier.name: set() for tier in message.tiers}
                apply_change(content, message)
                complete = complete or isinstance(message, SnapshotEnd)
                if complete and isinstance(message, Heartbeat | SnapshotEnd):
                    return content
    raise AssertionError("no whole snapshot within 10 s")
