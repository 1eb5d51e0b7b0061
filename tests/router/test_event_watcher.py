"""KV events of simulated publishers, through the gateway: never is a chunk believed that an engine dropped."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from router import event_watcher
from router.breaker import Breaker
from router.config import WorkerSpec
from router.event_watcher import EventWatcher
from router.history import History
from router.index import Index
from router.kv_events import AllBlocksCleared, BlockStored, Source
from router.sent_memory import SentMemory
from router.turns import Turns
from router.upstream import Timeouts, Upstream
from router.workers import Worker
from tests.router.test_event_chunks import removed
from tests.router.test_event_chunks import stored as stored_blocks
from tests.support.event_publisher import SimulatedPublisher
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until

TEXT = "a conversation that fills three chunks of two hundred and fifty six bytes each, or a little more. " * 9
OTHER = "another one, which nobody has heard of before it was told to somebody here today at this place. " * 9
CHUNK = 256
INFO = b'vllm:cache_config_info{block_size="4",engine="0",num_gpu_blocks="1000"} 1.0\n'


def stored(text: str, start: int = 0) -> Any:
    return stored_blocks(list(text.encode()), start)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watcher, "BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(event_watcher, "ASK_AGAIN_S", 0.3)


@asynccontextmanager
async def fleet(
    publisher: SimulatedPublisher, **settings: Any
) -> AsyncIterator[tuple[RunningGateway, SimulatedWorker]]:
    """A gateway before a worker that publishes KV events, which it follows by now."""
    worker = await SimulatedWorker(reports=False).start()
    worker.pages["/metrics"] = INFO
    publisher.introduce(worker)
    try:
        async with running_gateway(worker, **settings) as gateway:
            await until(lambda: followed(gateway) is not None)
            yield gateway, worker
    finally:
        publisher.stop()


def followed(gateway: RunningGateway) -> Any:
    worker = gateway.gateway.registry.get("a")
    return worker.following if worker is not None and not worker.events_error else None


async def believed(gateway: RunningGateway, text: str = TEXT) -> int:
    """The hit in tokens that a prompt would have."""
    answer = await gateway.client.post(
        "/admin/explain", json={"model": "simulated", "messages": [{"role": "user", "content": text}]}
    )
    return int(answer.raise_for_status().json()["candidates"][0]["hit_tokens"])


async def until_believed(gateway: RunningGateway, tokens: int, text: str = TEXT) -> None:
    async with asyncio.timeout(20):
        while await believed(gateway, text) != tokens:  # noqa: ASYNC110 - nobody signals it
            await asyncio.sleep(0.02)


WHOLE = len(TEXT) // CHUNK * CHUNK


def test_simulated_stores_removals_and_clearings_are_followed() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, _):
            assert gateway.gateway.registry.workers[0].source == "events"
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            assert (await gateway.worker("a"))["routed_by"] == "cache and load"
            await publisher.publish(removed(list(TEXT.encode()), 2 * CHUNK // 4 - 1))
            await until_believed(gateway, CHUNK)
            await publisher.publish(stored(OTHER))
            await until_believed(gateway, len(OTHER) // CHUNK * CHUNK, OTHER)
            await publisher.publish(AllBlocksCleared())
            await until_believed(gateway, 0, OTHER)
            assert gateway.gateway.history.last_clearing("a") is not None
            gateway.gateway.index.check()

    run(scenario())


def test_simulated_what_was_published_before_is_replayed() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        await publisher.publish(stored(TEXT))
        async with fleet(publisher) as (gateway, _):
            await until_believed(gateway, WHOLE)
            assert followed(gateway).complete
            answer = await gateway.chat(OTHER)
            assert answer.status_code == 200
            assert await believed(gateway, OTHER) == 0, "everything is known: what was sent is not guessed at"

    run(scenario())


def test_simulated_what_was_lost_on_its_way_is_replayed() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, _):
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            publisher.muted = True
            await publisher.publish(removed(list(TEXT.encode()), CHUNK // 4))
            publisher.muted = False
            await publisher.publish(stored(OTHER))
            await until_believed(gateway, len(OTHER) // CHUNK * CHUNK, OTHER)
            assert await believed(gateway) == CHUNK
            assert publisher.asked == [0, 1]

    run(scenario())


@pytest.mark.parametrize("replays", [True, False])
def test_simulated_what_was_lost_for_good_voids_everything(replays: bool) -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher(replays=replays, keeps=1).start()
        async with fleet(publisher) as (gateway, _):
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            publisher.muted = True
            await publisher.publish(removed(list(TEXT.encode()), CHUNK // 4))
            await publisher.publish(removed(list(TEXT.encode()), 0))
            publisher.muted = False
            await publisher.publish(stored(OTHER))
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.relists.get("gap"))
            await until(lambda: state.following is not None and not state.following.complete)
            assert await believed(gateway) == 0
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)

    run(scenario())


def test_simulated_another_process_starts_from_nothing() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, _):
            await publisher.publish(stored(OTHER), stored(TEXT))
            await until_believed(gateway, WHOLE)
            publisher.stop()
            await until(lambda: followed(gateway) is None)
            assert await believed(gateway) == 0
            assert gateway.gateway.registry.workers[0].source == "routed"
            await publisher.start()
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            assert await believed(gateway, OTHER) == 0

    run(scenario())


def test_simulated_a_worker_that_came_up_again_is_asked_again() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, worker):
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            state = gateway.gateway.registry.workers[0]
            await worker.kill()
            await until(lambda: not state.up)
            await worker.start()
            await until(lambda: state.up and state.relists.get("restart"))
            await until_believed(gateway, WHOLE)  # its engine was the same, and replays
            assert publisher.asked == [0, 0]

    run(scenario())


def test_simulated_late_without_replay_what_was_sent_fills_in() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher(replays=False).start()
        await publisher.publish(stored(TEXT))
        async with fleet(publisher) as (gateway, _):
            await publisher.publish(stored(OTHER, 5))  # follows on what was never heard of
            await until(lambda: followed(gateway).sequence == 1)
            assert not followed(gateway).complete
            assert await believed(gateway, OTHER) == 0
            assert (await gateway.chat(OTHER)).status_code == 200
            assert await believed(gateway, OTHER) == len(OTHER) // CHUNK * CHUNK
            await publisher.publish(AllBlocksCleared())
            await until_believed(gateway, 0, OTHER)
            await until(lambda: followed(gateway).complete)

    run(scenario())


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\xc1", "no KV events as vLLM writes them"),
        (b"\x93\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\x91\x93\xabBlockStored\x90\xc0\x00", "since 0.24"),  # as arrays
        (b"", "no KV events"),
    ],
    ids=["garbage", "arrays", "empty"],
)
def test_simulated_what_is_no_event_ends_the_stream_and_not_the_gateway(payload: bytes, said: str) -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher(keeps=1).start()
        async with fleet(publisher) as (gateway, _):
            await publisher.publish_bytes(payload)
            state = gateway.gateway.registry.workers[0]
            await until(lambda: said in state.events_error)
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)

    run(scenario())


def test_simulated_a_replay_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watcher, "REPLAY_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        publisher.answers = False
        worker = await SimulatedWorker(reports=False).start()
        publisher.introduce(worker)
        async with running_gateway(worker) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: "nothing was replayed" in state.events_error)
            publisher.answers = True
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
        publisher.stop()

    run(scenario())


def test_simulated_an_engine_without_events_is_asked_again_now_and_then() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        worker = await SimulatedWorker(reports=False).start()
        worker.pages["/kv_event_sources"] = {}
        async with running_gateway(worker) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: "--kv-events-config" in state.events_error)
            assert state.source == "routed"
            publisher.introduce(worker)
            await until(lambda: state.source == "events")
            del worker.pages["/kv_event_sources"]
            publisher.stop()
            await until(lambda: "answered 404" in state.events_error)
        publisher.stop()

    run(scenario())


def test_simulated_another_ranks_events_are_left_alone() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        worker = await SimulatedWorker(reports=False).start()
        publisher.introduce(worker, 0, 1)
        async with running_gateway(worker, workers=[f"{worker.url}#1,reports=none,name=a"]) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.following is not None)
            await publisher.publish(stored(OTHER), rank=0)
            await publisher.publish(stored(TEXT), rank=1)
            await until_believed(gateway, WHOLE)
            assert await believed(gateway, OTHER) == 0
        publisher.stop()

    run(scenario())


def test_simulated_events_said_where_they_are_need_no_asking() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher(topic="").start()
        worker = await SimulatedWorker(reports=False).start()
        where = f"events=127.0.0.1:{publisher.port},replay=127.0.0.1:{publisher.replay_port}"
        async with running_gateway(worker, workers=[f"{worker.url},{where},name=a"]) as gateway:
            await until(lambda: followed(gateway) is not None)
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
        publisher.stop()

    run(scenario())


def test_simulated_a_worker_taken_out_is_watched_no_longer() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, worker):
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            gateway.gateway.remove_worker(gateway.gateway.registry.workers[0])
            await publisher.publish(stored(OTHER))
            await asyncio.sleep(0.2)
            assert gateway.gateway.index.size("a") == 0
            gateway.gateway.index.check()
            gateway.gateway.index.sweep(1 << 20)
            assert len(gateway.gateway.index) == 0
            await worker.kill()

    run(scenario())


@pytest.mark.parametrize("drops", [{1}, {0, 2}, {1, -1}, {2, 3, -1}], ids=str)
def test_simulated_what_a_replay_lost_is_asked_for_again(drops: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's replay socket drops what a connection is too slow for."""
    monkeypatch.setattr(event_watcher, "REPLAY_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        await publisher.publish(stored(TEXT))
        await publisher.publish(removed(list(TEXT.encode()), CHUNK // 4))
        await publisher.publish(stored(OTHER))
        await publisher.publish(removed(list(OTHER.encode()), 2 * CHUNK // 4))
        publisher.drops = set(drops)
        async with fleet(publisher) as (gateway, _):
            await until(lambda: followed(gateway) is not None and followed(gateway).settled)
            assert followed(gateway).sequence == 3
            assert followed(gateway).complete is (0 not in drops)
            if 0 not in drops:
                assert await believed(gateway) == CHUNK
            assert await believed(gateway, OTHER) == 2 * CHUNK
            assert gateway.gateway.registry.workers[0].relists == {}

    run(scenario())


def test_simulated_a_replay_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watcher, "LONGEST_REPLAY_S", 0.3)

    async def endless(_: Any, start: int) -> AsyncIterator[tuple[int, bytes]]:
        while True:
            await asyncio.sleep(0.01)
            yield start, msgspec.msgpack.encode([1.0, [], 0])
            start += 1

    monkeypatch.setattr(event_watcher._Stream, "_replayed", endless)

    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        worker = await SimulatedWorker(reports=False).start()
        publisher.introduce(worker)
        async with running_gateway(worker) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: "replayed for more than" in state.events_error)
        publisher.stop()

    run(scenario())


def test_simulated_a_port_that_speaks_something_else_costs_no_knowledge() -> None:
    async def scenario() -> None:
        async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal refused
            refused += 1
            writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        refused = 0
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        worker = await SimulatedWorker(reports=False).start()
        async with running_gateway(worker, workers=[f"{worker.url},events=127.0.0.1:{port},name=a"]) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.assumes)
            assert (await gateway.chat(TEXT)).status_code == 200
            before = refused
            await until(lambda: refused > before + 5)
            assert (state.source, await believed(gateway)) == ("routed", WHOLE)
        server.close()

    run(scenario())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_simulated_ipv6_is_spoken() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher(topic="", host="[::1]").start()
        worker = await SimulatedWorker(reports=False).start()
        where = f"events=[::1]:{publisher.port},replay=[::1]:{publisher.replay_port}"
        async with running_gateway(worker, workers=[f"{worker.url},{where},name=a"]) as gateway:
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
        publisher.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("events", "said"), [("nobody.invalid:5", "tcp://nobody.invalid:5 cannot"), ("127.0.0.1:1", "nobody publishes")]
)
def test_simulated_where_nobody_is_that_is_said(events: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watcher, "CONNECT_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        worker = await SimulatedWorker(reports=False).start()
        async with running_gateway(worker, workers=[f"{worker.url},events={events},name=a"]) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.events_error)
            assert said in state.events_error

    run(scenario())


def test_simulated_what_failed_before_all_was_known_is_not_believed_after() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, _):
            await until(lambda: followed(gateway).settled)
            assert followed(gateway).complete, "nothing was published yet, so nothing is held"
            assert (await gateway.chat(TEXT)).status_code == 200  # its engine holds nothing of it
            assert await believed(gateway) == 0
            await publisher.publish(stored(OTHER))
            await until_believed(gateway, len(OTHER) // CHUNK * CHUNK, OTHER)
            assert (await believed(gateway), followed(gateway).complete) == (0, True)

    run(scenario())


def test_simulated_an_engine_of_several_has_its_own_number() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        worker = await SimulatedWorker(reports=False).start()
        publisher.introduce(worker, 3)
        async with running_gateway(worker) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.source == "events")
            await publisher.publish(stored(TEXT), rank=3)
            await until_believed(gateway, WHOLE)
        publisher.stop()

    run(scenario())


def test_simulated_what_was_counted_wrong_is_built_again() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        async with fleet(publisher) as (gateway, _):
            await publisher.publish(stored(TEXT))
            await until_believed(gateway, WHOLE)
            gateway.gateway._miscarried("a")
            assert gateway.gateway.index.size("a") == 0
            await until_believed(gateway, WHOLE)
            assert gateway.gateway.registry.workers[0].relists["audit"] == 1

    run(scenario())


def test_simulated_several_caches_are_not_taken_for_one() -> None:
    async def scenario() -> None:
        publisher = await SimulatedPublisher().start()
        worker = await SimulatedWorker(reports=False).start()
        publisher.introduce(worker, 0, 1)
        async with running_gateway(worker) as gateway:
            state = gateway.gateway.registry.workers[0]
            await until(lambda: "dp=2" in state.events_error)
            assert state.source == "routed"
        publisher.stop()

    run(scenario())


class Alone:
    """A watcher of a worker, by itself."""

    def __init__(self) -> None:
        self.index = Index()
        upstream = Upstream("a", "http://127.0.0.1:1", Timeouts(1, 1, 1))
        self.worker = Worker(WorkerSpec(url="http://127.0.0.1:1", reports="none", name="a"), upstream, Breaker(3, 1))
        self.worker.assume(("m", CHUNK), 100)
        self.watcher = EventWatcher(
            self.worker,
            self.index,
            Turns(),
            SentMemory(self.index),
            history=History(),
            most_blocks=1_000_000,
            rng=random.Random(1),
        )


def test_a_worker_taken_out_changes_nothing_of_another_by_its_name() -> None:
    async def scenario() -> None:
        alone = Alone()
        chunks = alone.watcher.begin(Source("tcp://127.0.0.1:1"))
        alone.worker.gone = True
        alone.index.drop("a")
        alone.index.open("a")
        alone.index.stored("a", "gpu", [b"0123456789abcdef"])
        await alone.watcher.take(chunks, msgspec.msgpack.encode([1.0, [stored(TEXT), AllBlocksCleared()], 0]))
        assert alone.index.size("a") == 1
        assert not alone.worker.assumes

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["stored", "removed"])
def test_events_that_change_no_chunk_let_others_have_their_turns(kind: str) -> None:
    async def scenario() -> None:
        alone = Alone()
        chunks = alone.watcher.begin(Source("tcp://127.0.0.1:1"))
        turns, blocks = 0, 64 * 100

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        beside = asyncio.create_task(others())
        event: Any = BlockStored(list(range(blocks)), 999_999, [7] * blocks * 4, 4, "GPU")
        if kind == "removed":
            event = {"type": "BlockRemoved", "block_hashes": list(range(blocks)), "medium": "GPU"}
        await alone.watcher.take(chunks, msgspec.msgpack.encode([1.0, [event], 0]))
        beside.cancel()
        assert turns >= 50

    asyncio.run(scenario())


def test_many_small_batches_let_others_have_their_turns() -> None:
    async def scenario() -> None:
        alone = Alone()
        chunks = alone.watcher.begin(Source("tcp://127.0.0.1:1"))
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        beside = asyncio.create_task(others())
        for _ in range(1000):
            await alone.watcher.take(chunks, msgspec.msgpack.encode([1.0, [], 0]))
        beside.cancel()
        assert turns >= 20

    asyncio.run(scenario())
