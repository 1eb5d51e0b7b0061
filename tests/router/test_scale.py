"""Many requests at once, and many clients that vanish: what is left of them is nothing. benchmarks/fleet.py does the same
at full size."""

import asyncio
import gc
import os
import random
import socket
import struct
from contextlib import suppress
from pathlib import Path

from benchmarks.fleet import RESET, StreamClient, request_bytes
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, kernel_buffers, run, running_gateway, until


def open_files() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))


async def nothing_is_left(gateway: RunningGateway) -> None:
    inner = gateway.gateway
    workers = inner.registry.workers
    await until(lambda: not any(worker.load.in_flight for worker in workers), 10)
    await until(lambda: not any(worker.upstream._busy for worker in workers), 10)
    for worker in workers:
        assert worker.load.uncached_tokens == 0
        assert not worker.load._flights
        worker.upstream.close_idle()
    assert inner.admission.in_flight == 0
    assert not [record for record in inner.accounting.recent(10_000) if record.outcome == "running"]


async def vanish(port: int, number: int, source: random.Random) -> bool:
    """Leave at some moment, and every fourth time when the answer has begun; whether it had."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = request_bytes(number, stream=bool(number % 2))
    began = number % 4 == 1
    if began:
        writer.write(request)
        async with asyncio.timeout(20):
            await reader.readuntil(b"data: ")
    else:
        writer.write(request[: int(len(request) * source.random())] if source.random() < 0.2 else request)
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(source.random() * 0.05):
                await reader.read()
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
    return began


def test_simulated_clients_that_vanish_leave_nothing_behind() -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(2)]
        for worker in workers:
            worker.pause, worker.words = 0.1, 300
        async with running_gateway(*workers) as gateway:
            source, numbers = random.Random(5), iter(range(600))
            began = 0

            async def keep_vanishing() -> None:
                nonlocal began
                for number in numbers:
                    if await vanish(gateway.port, number, source):
                        began += 1

            await gateway.get("/v1/models")
            tasks, files = len(asyncio.all_tasks()), open_files()
            await asyncio.gather(*(keep_vanishing() for _ in range(30)))
            await nothing_is_left(gateway)
            await until(lambda: len(asyncio.all_tasks()) <= tasks, 10)
            gc.collect()
            await until(lambda: open_files() <= files, 10)
            assert await gateway.metric("warmroute_router_in_flight_requests") == 0
            assert began == 150
            assert sum(worker.aborted for worker in workers) >= began, "the workers were told that nobody listens"
            for worker in workers:
                worker.words = 1
            assert (await gateway.chat("still here")).status_code == 200

    run(scenario())


def test_simulated_streams_side_by_side_are_sound() -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(2)]
        for worker in workers:
            worker.words = 6
            worker.hold_body.clear()
        async with running_gateway(*workers) as gateway:
            loop = asyncio.get_running_loop()
            tasks = len(asyncio.all_tasks())
            clients = [StreamClient(number) for number in range(200)]
            for client in clients:
                await loop.create_connection(lambda client=client: client, "127.0.0.1", gateway.port)  # type: ignore[misc]
            await asyncio.gather(*(client.began for client in clients))
            assert sum(worker.load.in_flight for worker in gateway.gateway.registry.workers) == 200
            for worker in workers:
                worker.hold_body.set()
            await asyncio.gather(*(client.ended for client in clients))
            assert all(client.is_sound(6) for client in clients)
            await nothing_is_left(gateway)
            await until(lambda: len(asyncio.all_tasks()) <= tasks, 10)

    run(scenario())


def test_simulated_a_client_that_does_not_read_holds_little_memory_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        most = kernel_buffers() + (4 << 20)
        worker.padding, worker.words = b"x" * (2 * most // 400), 400
        async with running_gateway(worker) as gateway:
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request_bytes(1, stream=True))
            await until(lambda: worker.sent_bytes)
            sent = -1
            while sent != worker.sent_bytes:
                sent = worker.sent_bytes
                await asyncio.sleep(0.3)
            assert sent < most, "no more was taken than buffers hold"
            busy = next(iter(gateway.gateway.registry.workers[0].upstream._busy))
            assert busy.buffered < 1 << 20
            worker.padding, worker.words = b"", 4
            assert (await gateway.chat("in between")).status_code == 200
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            await nothing_is_left(gateway)

    run(scenario())
