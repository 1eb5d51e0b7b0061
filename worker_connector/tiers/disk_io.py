"""Bytes between a disk tier's files and memory on loan.

The disk reads into and writes from buffers of this module, some two megabytes at a time, and each piece is copied from or to the
lent memory inside the loan: a disk that hangs holds a buffer of ours, never a slot that another chunk gets meanwhile.
Direct I/O bypasses the kernel's page cache, which the CPU tier makes pointless: writes reach the disk without a second
copy in memory, and nothing else is pushed out of it. Its buffers, offsets and lengths are whole pages.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Callable

import numpy as np

from worker_connector.tiers.base import Sink, Source

PIECE_BYTES = (2 << 20) + (64 << 10)
"""Bytes that are read or written at once, at most: a disk that is asked for little at a time waits in between."""
_PAGE = 4096

_local = threading.local()


def supports_direct(directory: int) -> bool:
    """Whether files in an open directory can be read and written past the page cache."""
    name = f".direct-test-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT
    try:
        fd = os.open(name, flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            _remove(name, directory)
            return False
        raise
    try:
        return os.pwrite(fd, _buffer()[:_PAGE], 0) == _PAGE and os.preadv(fd, [_buffer()[:_PAGE]], 0) == _PAGE
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)
        _remove(name, directory)


def read_object(fd: int, size: int, sink: Sink, in_time: Callable[[], bool]) -> int:
    """Copy a file of ``size`` bytes into the sink; returns the bytes that were there, fewer if the file is shorter now.

    Raises:
        TimeoutError: ``in_time`` said no between two pieces.
        LoanEnded: the operation was given up.
        OSError: the disk failed.
    """
    buffer, at = _buffer()[: _even(size)], 0
    while at < size:
        if not in_time():
            raise TimeoutError
        taken = min(os.preadv(fd, [buffer], at), size - at)
        if taken <= 0:
            break
        sink.write(buffer[:taken])
        at += taken
        if taken % _PAGE and at < size:
            break  # direct I/O goes on at whole pages only, and only the end of a file is none
    return at


def write_object(fd: int, source: Source, in_time: Callable[[], bool], *, direct: bool) -> None:
    """Copy the source into a file, from its start.

    Raises:
        TimeoutError: ``in_time`` said no between two pieces.
        LoanEnded: the operation was given up.
        OSError: the disk failed, or is full.
    """
    size, at = source.size, 0
    buffer = _buffer()[: _even(size)]
    while at < size:
        taken = _copy_out(source, at, buffer)
        whole = -(-taken // _PAGE) * _PAGE if direct else taken
        buffer[taken:whole] = bytes(whole - taken)
        _write(fd, buffer[:whole], at, in_time)
        at += taken
    if direct and size % _PAGE:
        os.ftruncate(fd, size)


def _copy_out(source: Source, start: int, buffer: memoryview) -> int:
    """Copy the object's bytes from ``start`` on into the buffer, as many as fit; their number."""
    filled = 0
    with source.borrow() as views:
        for view in views:
            part = view[start : start + buffer.nbytes - filled]
            start = max(0, start - view.nbytes)
            if part.nbytes:
                # numpy lets other threads run meanwhile.
                target = np.frombuffer(buffer[filled : filled + part.nbytes], np.uint8)
                np.copyto(target, np.frombuffer(part, np.uint8))
                filled += part.nbytes
    return filled


def _write(fd: int, data: memoryview, at: int, in_time: Callable[[], bool]) -> None:
    done = 0
    while done < data.nbytes:
        if not in_time():
            raise TimeoutError
        written = os.pwrite(fd, data[done:], at + done)
        done += written
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if written % _PAGE and done < data.nbytes:
            # A disk that is almost full takes a part; direct I/O cannot go on from there, and the rest tells why.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _even(size: int) -> int:
    """What is done at once of ``size`` bytes, so that no small piece is left for the end."""
    pieces = max(1, -(-size // PIECE_BYTES))
    return max(1, -(-size // (pieces * _PAGE))) * _PAGE


def _buffer() -> memoryview:
    """This thread's piece, aligned to a page."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
    return _local.buffer  # type: ignore[no-any-return]


def _remove(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
