"""The gpu tier against vLLM's own KVCacheManager, driven directly: no engine, no model."""

import importlib
import random
import timeit
import warnings
from types import ModuleType

import pytest

from kv_protocol.hashing import Media, chunk_hashes, root_hash
from worker_connector.gpu_tier import GpuTier


@pytest.fixture(scope="module")
def cache() -> ModuleType:
    """``tests.worker_connector.vllm_cache``, imported late: importing vLLM takes seconds."""
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("tests.worker_connector.vllm_cache")


def test_a_prompt_is_in_the_tier_chunk_by_chunk(cache: ModuleType) -> None:
    bench = cache.Bench()
    bench.admit(range(50), step=10)
    assert bench.drain() == bench.held()
    assert len(bench.held()) == 3


@pytest.mark.parametrize(
    "names", [{}, {"salt": "tenant"}, {"lora": "sql"}, {"lora": "sql", "salt": "tenant"}, {"lora": "x", "salt": "x"}]
)
def test_salt_and_adapter(cache: ModuleType, names: dict[str, str]) -> None:
    bench = cache.Bench()
    bench.admit(range(40), step=7, **names)  # type: ignore[arg-type]
    assert len(bench.drain()) == 2
    assert bench.drain() == bench.held()


@pytest.mark.parametrize("step", [3, 4, 9, 100])
@pytest.mark.parametrize(
    "media",
    [
        [Media("a", 5, 3)],
        [Media("a", 13, 30)],
        [Media("a", 0, 16), Media("b", 16, 16)],
        [Media("a", 2, 3), Media("b", 5, 2), Media("a", 8, 1), Media("c", 31, 2)],
    ],
)
def test_media(cache: ModuleType, media: list[Media], step: int) -> None:
    bench = cache.Bench()
    bench.admit(range(60), media=media, step=step)
    assert len(bench.drain()) == 3
    assert bench.drain() == bench.held()
    assert not bench.drain() & set(
        chunk_hashes(root_hash(chunk_size=cache.CHUNK, model=cache.MODEL), range(60), cache.CHUNK)[-1:]
    )


def test_overflow_evicts_from_the_tier(cache: ModuleType) -> None:
    bench = cache.Bench(blocks=40)
    for number in range(20):
        request = bench.admit([number] * 60)
        assert request is not None
        bench.finish(request)
        assert bench.drain() == bench.held()
    assert 0 < len(bench.held()) < 10


def test_a_reset_is_reported_at_once_and_only_when_it_succeeded(cache: ModuleType) -> None:
    bench = cache.Bench()
    request = bench.admit(range(40))
    assert request is not None
    bench.drain()
    assert not bench.manager.reset_prefix_cache()
    assert bench.resets == 0
    assert len(bench.drain()) == 2
    bench.finish(request)
    bench.ledger.take_changes()
    assert bench.manager.reset_prefix_cache()
    assert bench.resets == 1
    assert [type(change).__name__ for change in bench.ledger.take_changes()] == ["Cleared"]
    assert bench.ledger.content()["gpu"] == []
    assert bench.drain() == bench.held() == set()


@pytest.mark.parametrize("seed", range(6))
def test_the_tier_equals_the_engines_cache_under_random_load(cache: ModuleType, seed: int) -> None:
    chance = random.Random(seed)
    bench = cache.Bench(blocks=chance.choice([30, 60, 200]))
    bases = [[chance.randrange(5) for _ in range(chance.randrange(10, 90))] for _ in range(6)]
    for _ in range(150):
        action = chance.random()
        if action < 0.6 or not bench.running:
            base = chance.choice(bases)
            tokens = base[: chance.randrange(1, len(base))] + [
                chance.randrange(3) for _ in range(chance.randrange(1, 40))
            ]
            bench.admit(tokens, salt=chance.choice([None, None, "s"]), step=chance.choice([5, 17, 200]))
        elif action < 0.97:
            bench.finish(chance.choice(bench.running))
        else:
            for request in list(bench.running):
                bench.finish(request)
            assert bench.manager.reset_prefix_cache()
        if chance.random() < 0.3:
            bench.manager.take_events()
        if chance.random() < 0.7:
            assert bench.drain() == bench.held()
    assert bench.drain() == bench.held()
    assert bench.tier.chunks == bench.held()


def test_blocks_evicted_for_failed_loads_leave_the_tier(cache: ModuleType) -> None:
    chance, bench = random.Random(1), cache.Bench()
    for number in range(30):
        bench.admit([number % 3] * 30 + [number] * 20)
        bench.manager.evict_blocks({chance.randrange(1, 200) for _ in range(10)})
        assert bench.drain() <= bench.held()


@pytest.mark.parametrize("drained", [True, False])
def test_the_users_own_events_stay_exactly_as_they_were(cache: ModuleType, drained: bool) -> None:
    plain, watched = cache.Bench(events=True, blocks=50, watch=False), cache.Bench(events=True, blocks=50)
    chance = random.Random(3)
    for number in range(40):
        tokens = [number % 4] * chance.randrange(20, 60)
        step = chance.choice([6, 100])
        seen = []
        for bench in (plain, watched):
            request = bench.admit(tokens, step=step, full_report=number % 2 == 0)
            assert request is not None
            bench.finish(request)
            if number % 10 == 9:
                bench.manager.reset_prefix_cache()
            if bench is watched and drained:
                assert bench.drain() == bench.held()
            seen.append(bench.manager.take_events() if number % 3 == 0 else [])
        assert seen[0] == seen[1]
        assert seen[0] or number % 3
    assert watched.drain() == watched.held()


def test_reused_blocks_that_are_reported_again_are_not_counted_twice(cache: ModuleType) -> None:
    bench = cache.Bench(events=True)
    first = bench.admit([1] * 40)
    again = bench.admit([1] * 41, full_report=True)
    assert first is not None
    assert again is not None
    bench.finish(first)
    bench.finish(again)
    bench.drain()
    bench.manager.evict_blocks(set(range(1, 200)))
    assert bench.drain() == bench.held() == set()
    assert bench.tier._groups[0].blocks == 0


def test_without_the_users_wish_the_engine_sees_no_events_and_queues_none(cache: ModuleType) -> None:
    bench = cache.Bench()
    for number in range(5):
        bench.admit([number] * 40)
        assert bench.manager.take_events() == []
        bench.drain()
        assert bench.manager.block_pool.kv_event_queue == []
    assert bench.drain() == bench.held()


def test_only_full_attention_groups_count(cache: ModuleType) -> None:
    bench = cache.Bench(cache.window(), cache.full(), cache.full(), blocks=400)
    bench.admit(range(60), step=8)
    bench.admit([*range(40), *range(20)], step=8)
    assert len(bench.drain()) == 4
    assert bench.drain() == bench.held(groups=(1, 2))


def test_a_chunk_is_in_the_tier_while_whole_in_every_full_group(cache: ModuleType) -> None:
    bench = cache.Bench(cache.full(), cache.full(), blocks=400)
    request = bench.admit(range(40))
    assert request is not None
    assert len(bench.drain()) == 2
    (victim,) = bench.manager.get_blocks(request.request_id).blocks[1][1:2]
    bench.manager.evict_blocks({victim.block_id})
    assert bench.drain() == bench.held(groups=(0, 1))
    assert len(bench.drain()) == 1


def test_no_full_attention_group_means_no_tier(cache: ModuleType) -> None:
    bench = cache.Bench(watch=False)
    before = bench.manager.block_pool.take_events
    tier = GpuTier(bench.manager, [cache.group(cache.window())], chunk_size=cache.CHUNK, model=cache.MODEL)
    assert not tier.is_reported
    assert not tier.drain(bench.ledger)
    assert tier.chunks == set()
    assert bench.manager.block_pool.take_events == before


def test_a_reset_is_foretold_and_told_also_where_there_is_no_tier(cache: ModuleType) -> None:
    bench, told = cache.Bench(watch=False), list[str]()
    GpuTier(
        bench.manager,
        [cache.group(cache.window())],
        chunk_size=cache.CHUNK,
        model=cache.MODEL,
        on_cleared=lambda: told.append("cleared"),
        before_reset=lambda: told.append("before"),
    )
    assert bench.manager.reset_prefix_cache()
    assert told == ["before", "cleared"]


def test_no_prefix_caching_means_no_tier(cache: ModuleType) -> None:
    assert not cache.Bench(caching=False).tier.is_reported


def test_a_block_pool_alone_is_enough(cache: ModuleType) -> None:
    bench = cache.Bench(watch=False)
    bench.tier = GpuTier(
        bench.manager.block_pool, bench.config.kv_cache_groups, chunk_size=cache.CHUNK, model=cache.MODEL
    )
    bench.admit(range(40))
    assert bench.drain() == bench.held() != set()


def test_draining_nothing_costs_next_to_nothing(cache: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bench = cache.Bench()
    bench.admit(range(40))
    bench.drain()
    idle = min(timeit.repeat(lambda: bench.tier.drain(bench.ledger), number=1000, repeat=5)) / 1000
    with capsys.disabled():
        print(f"\nan idle drain takes {idle * 1e9:.0f} ns")
    assert idle < 20e-6
