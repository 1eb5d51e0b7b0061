"""A plain TCP balancer, as a Kubernetes Service is one: connections go in turn to the backends whose probe passes.

It knows no HTTP on the way through. A backend is asked ``GET /ready`` again and again; where it fails, connections that are
open go on, and no other goes there.
"""

import asyncio
from contextlib import suppress

import httpx


class TcpBalancer:
    """Backends are ports of this machine."""

    def __init__(self, probe_seconds: float = 0.1) -> None:
        self.ready: set[int] = set()
        self.port = 0
        self._backends: list[int] = []
        self._probe_seconds = probe_seconds
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._probing = asyncio.create_task(self._probe())

    async def close(self) -> None:
        self._server.close()
        self._probing.cancel()
        tasks = [self._probing, *self._tasks]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set(self, *backends: int) -> None:
        self._backends = list(backends)

    async def _probe(self) -> None:
        async with httpx.AsyncClient(timeout=2) as client:
            while True:
                for port in self._backends:
                    try:
                        up = (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200
                    except httpx.HTTPError:
                        up = False
                    (self.ready.add if up else self.ready.discard)(port)
                self.ready &= set(self._backends)
                await asyncio.sleep(self._probe_seconds)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with suppress(asyncio.CancelledError):
                await self._balance(reader, writer)
        finally:
            writer.transport.abort()

    async def _balance(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = sorted(self.ready)
        for at in range(len(ready)):
            port = ready[(self._turn + at) % len(ready)]
            try:
                other, onward = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            self._turn += 1
            try:
                with suppress(OSError):
                    await asyncio.gather(_pass(reader, onward), _pass(other, writer))
            finally:
                onward.transport.abort()
            return


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes in one direction; its end is passed on as an end."""
    while data := await reader.read(64 << 10):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
