"""A simulated publisher of KV events, as a vLLM engine has one: PUB, and ROUTER to replay from."""

import asyncio
from collections import deque
from contextlib import suppress

import msgspec
import zmq
import zmq.asyncio

from router.kv_events import Event
from tests.support.simulated_worker import SimulatedWorker


class SimulatedPublisher:
    """``port`` and ``replay_port`` stay the same when it starts again; each start is another process, numbered from 0."""

    def __init__(
        self, *, replays: bool = True, keeps: int = 10_000, topic: str = "kv", host: str = "127.0.0.1"
    ) -> None:
        self.host = host
        self.replays = replays
        self.topic = topic
        self.port = self.replay_port = 0
        self.sequence = 0
        self.asked: list[int] = []
        self.answers = True
        self.muted = False
        self.drops: set[int] = set()
        """Numbers that the next replay loses, each once; -1 is its end."""
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keeps)
        self._context: zmq.asyncio.Context | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> "SimulatedPublisher":
        self._context = zmq.asyncio.Context()
        self._context.setsockopt(zmq.IPV6, self.host == "[::1]")
        self._publisher = self._context.socket(zmq.PUB)
        self.port = self._bound(self._publisher, self.port)
        if self.replays:
            router = self._context.socket(zmq.ROUTER)
            self.replay_port = self._bound(router, self.replay_port)
            self._task = asyncio.create_task(self._replay(router))
        self.sequence = 0
        self._kept.clear()
        return self

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._context is not None:
            self._context.destroy(linger=0)

    def _bound(self, socket: zmq.asyncio.Socket, port: int) -> int:
        if port:
            socket.bind(f"tcp://{self.host}:{port}")
            return port
        return socket.bind_to_random_port(f"tcp://{self.host}")

    async def publish(self, *events: Event, rank: int = 0) -> None:
        await self.publish_bytes(msgspec.msgpack.encode([1.0, list(events), rank]))

    async def publish_bytes(self, payload: bytes) -> None:
        """With ``muted``, as if it were lost on its way."""
        number, self.sequence = self.sequence, self.sequence + 1
        self._kept.append((number, payload))
        if not self.muted:
            await self._publisher.send_multipart((self.topic.encode(), number.to_bytes(8, "big"), payload))

    async def _replay(self, router: zmq.asyncio.Socket) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                client, _, start = await router.recv_multipart()
                self.asked.append(int.from_bytes(start, "big"))
                if not self.answers:
                    continue
                for number, payload in list(self._kept):
                    if number >= self.asked[-1] and not self._dropped(number):
                        frames = (client, b"", self.topic.encode(), number.to_bytes(8, "big"), payload)
                        await router.send_multipart(frames)
                if not self._dropped(-1):
                    await router.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))

    def _dropped(self, number: int) -> bool:
        drops, self.drops = number in self.drops, self.drops - {number}
        return drops

    def introduce(self, worker: SimulatedWorker, *ranks: int) -> None:
        """Have a worker name this publisher in ``/kv_event_sources``."""
        config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}" if self.replays else None,
            "buffer_steps": 10_000,
            "topic": self.topic,
        }
        worker.pages["/kv_event_sources"] = {str(rank): config for rank in ranks or (0,)}
