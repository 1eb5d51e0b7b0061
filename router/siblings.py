"""The processes of one gateway among themselves: each listens on a UNIX socket in a directory only they can enter.

A call is one length-prefixed msgpack frame each way. With one process there is nobody to call.
"""

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from router.totals import CountFiles

CALL_TIMEOUT_S = 2.0
MAX_FRAME_BYTES = 256 << 20

Handler = Callable[[str, Any], Awaitable[Any]]

_LENGTH = struct.Struct("<I")
_log = logging.getLogger(__name__)


class Siblings:
    """``number`` of ``count`` processes; by default the only one."""

    def __init__(self, directory: Path | None = None, number: int = 0, count: int = 1) -> None:
        self.directory = directory
        self.number = number
        self.count = count
        self.files = CountFiles(directory) if directory is not None else None
        self._server: asyncio.Server | None = None
        self._handler: Handler | None = None

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.directory is not None

    async def start(self, handler: Handler) -> None:
        """Take calls from now on."""
        self._handler = handler
        if self.directory is not None:
            path = self._socket(self.number)
            path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, path)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def tell(self, operation: str, arguments: Any = None) -> int:
        """Call every other process; how many answered in time."""
        return len(await self.ask(operation, arguments))

    async def ask(self, operation: str, arguments: Any = None) -> dict[int, Any]:
        """The answers of the other processes by number; one that does not answer in time is left out."""
        others = [number for number in range(self.count) if number != self.number] if self.directory else []
        answers = await asyncio.gather(*(self._call(number, operation, arguments) for number in others))
        return {number: answer for number, answer in zip(others, answers, strict=True) if answer is not None}

    async def _call(self, number: int, operation: str, arguments: Any) -> Any:
        writer = None
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(number))
                writer.write(_frame([operation, arguments]))
                return await _read(reader)
        except (OSError, EOFError, TimeoutError, msgspec.DecodeError) as error:
            _log.debug("process %d did not answer %s: %s", number, operation, error)
            return None
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._handler is not None, "calls are taken after start"
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S * 2):
                operation, arguments = await _read(reader)
                writer.write(_frame(await self._handler(operation, arguments)))
                await writer.drain()
        except (OSError, EOFError, TimeoutError, msgspec.DecodeError):
            pass  # whoever called has gone
        except Exception:  # noqa: BLE001 - what one process asks must not end another
            _log.exception("a call of another process could not be answered")
        finally:
            with suppress(OSError):
                writer.close()

    def _socket(self, number: int) -> Path:
        assert self.directory is not None
        return self.directory / f"process-{number}.sock"


def _frame(content: Any) -> bytes:
    payload = msgspec.msgpack.encode(content)
    return _LENGTH.pack(len(payload)) + payload


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise EOFError(f"a frame of {length} bytes")
    return msgspec.msgpack.decode(await reader.readexactly(length))
