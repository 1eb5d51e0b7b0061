"""What was sent to workers that do not say what they hold."""

import asyncio
from typing import Any

import pytest

from router.config import WorkerSpec
from router.demo_fleet import free_port
from router.index import Index
from router.sent_memory import EngineCache, SentMemory, read_cache
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until

TEXT = "a prompt of some hundred words that is sent again and again to whoever had it, as conversations are. " * 9
CHUNK = 256
WHOLE = len(TEXT) // CHUNK * CHUNK


def info(blocks: int, size: int = 16, **labels: str) -> bytes:
    named = {"block_size": str(size), "engine": "0", "num_gpu_blocks": str(blocks), **labels}
    return b"vllm:cache_config_info{%s} 1.0\n" % ",".join(f'{k}="{v}"' for k, v in named.items()).encode()


class Named:
    """As much of a worker as the memory asks for."""

    def __init__(self, chunks: int) -> None:
        self.name = "a"
        self.assumed_chunks = chunks
        self.gone = False


def chunks(first: int, count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(first, first + count)]


def held(index: Index) -> set[bytes]:
    index.check()
    return index.contents("a")["gpu"]


def test_the_beginning_of_a_prompt_outlasts_its_end() -> None:
    index, worker = Index(), Named(4)
    memory = SentMemory(index)
    memory.sent(worker, [chunks(0, 3)])  # type: ignore[arg-type]
    memory.sent(worker, [chunks(10, 2)])  # type: ignore[arg-type]
    assert held(index) == {*chunks(0, 2), *chunks(10, 2)}
    memory.sent(worker, [chunks(0, 1)])  # type: ignore[arg-type]
    memory.sent(worker, [chunks(20, 2)])  # type: ignore[arg-type]
    assert held(index) == {*chunks(0, 1), *chunks(10, 1), *chunks(20, 2)}


def test_a_prompt_beyond_all_room_leaves_its_beginning() -> None:
    index = Index()
    SentMemory(index).sent(Named(4), [chunks(0, 9)])  # type: ignore[arg-type]
    assert held(index) == set(chunks(0, 4))


def test_what_failed_is_taken_back_and_what_was_there_before_stays() -> None:
    index, worker = Index(), Named(100)
    memory = SentMemory(index)
    memory.sent(worker, [chunks(0, 2)])  # type: ignore[arg-type]
    fresh = memory.sent(worker, [chunks(0, 5), chunks(10, 1)])  # type: ignore[arg-type]
    assert sorted(fresh) == [*chunks(2, 3), *chunks(10, 1)]
    memory.unsent(worker, fresh)  # type: ignore[arg-type]
    assert held(index) == set(chunks(0, 2))
    memory.forget(worker)  # type: ignore[arg-type]
    memory.unsent(worker, chunks(0, 2))  # type: ignore[arg-type]
    assert held(index) == set(chunks(0, 2)), "the index is another source's now"


@pytest.mark.parametrize(
    ("metrics", "cache"),
    [
        (info(1000), EngineCache(16, 16_000)),
        (b'# HELP x\nvllm:other{a="b"} 1.0\n' + info(10, 528), EngineCache(528, 5280)),
        (info(10, enable_prefix_caching="False"), EngineCache(16, 0)),
        (info(10, num_gpu_blocks="None"), None),
        (info(10).replace(b"block_size", b"blocksize"), None),
        (info(10, 1 << 40), None),
        (b"", None),
        (b"vllm:cache_config_info{ 1.0\n", None),
        (b"vllm:cache_config_info{a=b} 1.0\n", None),
        (info(5) + info(7).replace(b'engine="0"', b'engine="1"'), EngineCache(16, 80)),
    ],
)
def test_an_engines_metrics_tell_its_room(metrics: bytes, cache: EngineCache | None) -> None:
    assert read_cache(metrics.decode()) == cache


def test_ranks_have_their_own_room_and_blocks_make_up_chunks() -> None:
    both = info(5) + info(7).replace(b'engine="0"', b'engine="1"')
    assert read_cache(both.decode(), 1) == EngineCache(16, 7 * 16)
    assert [EngineCache(size, 1).chunk_size for size in (1, 16, 48, 256, 528)] == [256, 256, 240, 256, 528]


async def hit(gateway: RunningGateway, text: str = TEXT) -> tuple[str, int]:
    answer = await gateway.chat(text)
    assert answer.status_code == 200
    return answer.headers["x-warmroute-worker"], int(answer.headers["x-warmroute-hit-tokens"])


def test_simulated_a_prompt_returns_to_where_it_was_sent() -> None:
    async def scenario() -> None:
        a, b = [await SimulatedWorker(reports=False).start() for _ in range(2)]
        for worker in (a, b):
            worker.pages["/metrics"] = info(1000)
        async with running_gateway(a, b) as gateway:
            await until(lambda: all(worker.assumes for worker in gateway.gateway.registry.workers))
            first, nothing = await hit(gateway)
            assert nothing == 0
            for _ in range(4):
                assert await hit(gateway) == (first, WHOLE)
            seen = await gateway.worker(first)
            assert (seen["cache_source"], seen["routed_by"]) == ("routed", "cache and load")
            assert seen["assumed"] == {"chunk_size": CHUNK, "chunks": 16_000 // CHUNK}
            line = f'warmroute_router_worker_cache_source{{source="routed",worker="{first}"}}'
            assert await gateway.metric(line) == 1

    run(scenario())


def test_simulated_another_process_holds_nothing_of_it() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a) as gateway:
            await hit(gateway)
            assert (await hit(gateway))[1] == WHOLE
            await a.kill()
            await until(lambda: not gateway.gateway.registry.workers[0].up)
            await a.start()
            await until(lambda: gateway.gateway.registry.workers[0].up)
            assert (await hit(gateway))[1] == 0

    run(scenario())


def test_simulated_a_request_that_failed_is_not_held() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a, retries=0) as gateway:
            a.fail_next = 1
            assert (await gateway.chat(TEXT)).status_code >= 500
            a.raw_answer = [b"HTTP/1.1 200 OK\r\n"]
            assert (await gateway.chat(TEXT)).status_code >= 500
            a.raw_answer = []
            assert gateway.gateway.index.size("a") in (0, WHOLE // CHUNK)
            gateway.gateway.index.check()

    run(scenario())


def test_simulated_a_request_that_was_refused_is_not_held() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a) as gateway:
            a.status = 400
            assert (await gateway.chat(TEXT)).status_code == 400
            a.status = 200
            assert (await hit(gateway))[1] == 0
            assert (await hit(gateway))[1] == WHOLE

    run(scenario())


def test_simulated_a_request_given_up_before_its_first_token_is_not_held() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a) as gateway:
            a.hold_head.clear()
            asked = asyncio.create_task(gateway.chat(TEXT))
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.load.in_flight)
            assert gateway.gateway.index.size("a") == WHOLE // CHUNK
            asked.cancel()
            await until(lambda: not state.load.in_flight)
            assert gateway.gateway.index.size("a") == 0
            a.hold_head.set()

    run(scenario())


def test_simulated_another_process_holds_nothing_before_its_metrics_answer_either() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a, health_interval=0.05) as gateway:
            await hit(gateway)
            state = gateway.gateway.registry.workers[0]
            await a.kill()
            await until(lambda: not state.up)
            asked = asyncio.Event()

            async def silence(*_: object, **__: object) -> EngineCache:
                asked.set()
                await asyncio.sleep(3600)
                raise AssertionError

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("router.app.ask_cache", silence)
                await a.start()
                async with asyncio.timeout(20):
                    await asked.wait()
                assert state.up
                assert gateway.gateway.index.size("a") == 0

    run(scenario())


def test_simulated_room_is_bounded_by_the_setting() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        a.pages["/metrics"] = info(10**12)
        async with running_gateway(a, max_worker_chunks=1) as gateway:
            await hit(gateway)
            assert gateway.gateway.registry.workers[0].assumed_chunks == 1
            assert gateway.gateway.index.size("a") == 1

    run(scenario())


@pytest.mark.parametrize("off", [{"assumed_cache_tokens": 0}, {}], ids=["by setting", "no prefix cache"])
def test_simulated_without_it_load_alone_counts(off: dict[str, Any]) -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        a.pages["/metrics"] = info(1000) if off else info(1000, enable_prefix_caching="False")
        async with running_gateway(a, **off) as gateway:
            for _ in range(2):
                answer = await gateway.chat(TEXT)
                assert answer.headers["x-warmroute-hit-tokens"] == "0"
                assert answer.headers["x-warmroute-reason"].startswith("no hit; least loaded")
            seen = await gateway.worker("a")
            assert (seen["cache_source"], seen["routed_by"]) == ("none", "load only")
            assert await gateway.metric('warmroute_router_worker_cache_source{source="none",worker="a"}') == 1

    run(scenario())


def test_simulated_promises_that_are_not_kept_cost_trust_and_are_forgotten() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        async with running_gateway(a) as gateway:
            await hit(gateway)
            a.cached_tokens = 0
            async with asyncio.timeout(20):
                while (await hit(gateway))[1]:
                    pass
            seen = await gateway.worker("a")
            assert seen["predictions"]["over"] >= 3
            assert seen["relists"] == {"trust": 1}

    run(scenario())


def test_simulated_a_connector_that_speaks_is_believed_instead() -> None:
    async def scenario() -> None:
        a = SimulatedWorker()
        a.with_reports, a.port, a.report_port = False, free_port(), free_port()
        async with running_gateway(a, workers=[f"{a.url},reports=127.0.0.1:{a.report_port},name=a"]) as gateway:
            await a.start()
            state = gateway.gateway.registry.workers[0]
            await until(lambda: state.up and state.assumes)
            await hit(gateway)
            said = len(state.reports_error)
            for _ in range(10):  # while it is tried again and again to reach the port
                assert (await hit(gateway))[1] == WHOLE
                await asyncio.sleep(0.05)
            assert said
            a._servers.append(await asyncio.start_server(a._report, "127.0.0.1", a.report_port))
            await until(lambda: state.synced)
            assert state.source == "connector"
            assert (await hit(gateway))[1] == 0, "it reports that it holds nothing"
            a._servers.pop().close()
            a.reset_readers()
            await until(lambda: state.source == "none")
            assert not state.assumes, "a worker that spoke once is not guessed at while it is silent"
            assert [(await hit(gateway))[1] for _ in range(2)] == [0, 0]

    run(scenario())


@pytest.mark.parametrize(
    ("text", "watched", "endpoints"),
    [
        ("http://a:1", False, ("", "")),
        ("http://a:1,reports=none", True, ("", "")),
        ("http://a:1,reports=none,events=none", False, None),
        ("http://a:1,events=none", False, None),
        ("http://a:1,events=b:2", True, ("tcp://b:2", "")),
        ("http://a:1#3,events=b:2,replay=[::1]:9", True, ("tcp://b:5", "tcp://[::1]:12")),
    ],
)
def test_where_events_are(text: str, watched: bool, endpoints: tuple[str, str] | None) -> None:
    spec = WorkerSpec.parse(text)
    assert spec.has_events is watched
    if endpoints is not None:
        assert spec.event_source[:2] == endpoints


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://a:1,reports=b:1,events=b:2", "give one of them"),
        ("http://a:1,replay=b:1", "name both"),
        ("http://a:1,events=b", "b"),
        ("http://a:1,event=b:1", "none of reports=HOST:PORT, events=HOST:PORT"),
    ],
)
def test_contradictions_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WorkerSpec.parse(text)


def test_simulated_the_dashboard_shows_what_is_assumed() -> None:
    async def scenario() -> None:
        a = await SimulatedWorker(reports=False).start()
        a.pages["/metrics"] = info(1000)
        async with running_gateway(a) as gateway:
            await hit(gateway)
            (row,) = (await gateway.get("/admin/fleet"))["workers"]
            assert row["cache_source"] == "routed"
            [tier] = row["tiers"]
            assert tier == {"tier": "gpu", "chunks": WHOLE // CHUNK, "capacity": 62, "chunk_bytes": 0}

    run(scenario())
