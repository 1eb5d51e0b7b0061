"""Both halves together: what is loaded is there, and is what the encoder made."""

import copy
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs vLLM (CPU build)")

from tests.worker_connector.simulated_vision import CPU, WIDTH, Engine, PlainSlab, digest, request_of
from worker_connector import vision_cache_resets
from worker_connector.config import ConnectorConfig
from worker_connector.errors import ConfigurationError, MissingOutput
from worker_connector.vision_cache_ledger import VisionLedger
from worker_connector.vision_cache_plan import Grant, VisionPlan, VisionReport
from worker_connector.vision_cache_scheduler import VisionScheduler
from worker_connector.vision_cache_settings import rank_bytes, require_connector
from worker_connector.vision_cache_worker import VisionRank

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, as it is imported

ROW = WIDTH * 4


def engine_with(rows: int, *, ranks: int = 1, slots: int = 12, widths: dict[str, int] | None = None) -> Engine:
    """An engine whose vision cache has room for ``rows`` embeddings; those are 256 bytes, rounded up by item."""
    size = rows * ROW
    known = {"image": ROW} if widths is None else widths
    return Engine(VisionScheduler(VisionLedger(size, ranks), known), size=size, ranks=ranks, slots=slots)


def figure(engine: Engine, name: str) -> float:
    return engine.scheduler.totals().get(f"vision_{name}", {}).get("", 0)


def step(engine: Engine, *requests: Any, **more: Any) -> None:
    engine.step(*requests, **more)
    engine.absorb()


def test_what_the_encoder_made_once_is_loaded() -> None:
    engine = engine_with(100, slots=5)
    for item in (4, 3, 2, 4):
        step(engine, request_of(f"r{item}", item))
    assert engine.encoded == 3
    assert figure(engine, "hits") == 1
    assert figure(engine, "hit_embeddings") == 5
    assert figure(engine, "encoded") == 3
    assert figure(engine, "saves") == 3
    assert figure(engine, "entries") == 3


def test_an_unknown_size_is_learnt_from_the_first_output() -> None:
    engine = engine_with(100, slots=5, widths={})
    for item in (4, 3, 2, 4, 3):
        step(engine, request_of("r", item))
    # The first was not kept and came again; all since then were.
    assert engine.encoded == 4
    assert figure(engine, "hits") == 1
    assert figure(engine, "failed_saves") == 0


def test_a_step_without_tokens_delays_a_load() -> None:
    engine = engine_with(100, slots=5)
    for item in (4, 3):
        step(engine, request_of("r", item))
    wanted = request_of("again", 4)
    engine.step(wanted, tokens=False, preempted=frozenset({"again"}))
    engine.step(request_of("again", 4))
    assert engine.encoded == 2


def test_a_load_whose_place_was_given_away_is_not_made() -> None:
    engine = engine_with(100, slots=5)
    for item in (4, 3):
        step(engine, request_of("r", item))
    engine.step(request_of("again", 4), tokens=False, preempted=frozenset({"again"}))
    step(engine, request_of("other", 9))
    assert digest(4) not in engine.ranks[0].cache


def test_the_encoder_of_a_preempted_request_promises_nothing() -> None:
    engine = engine_with(100, slots=5)
    step(engine, request_of("gone", 4), preempted=frozenset({"gone"}))
    assert engine.scheduler.ledger.used == 0


def test_another_number_of_embeddings_is_another_item() -> None:
    engine = engine_with(100, slots=5)
    for item in (4, 3):
        step(engine, request_of("r", item))
    other = request_of("other", 4, embeds=2)
    engine.scheduler.expect(other, 2)
    assert engine.scheduler.has(digest(4)), "a request past its media looks at nothing"
    engine.scheduler.expect(other, 0)
    assert not engine.scheduler.has(digest(4))


@pytest.mark.parametrize("name", ["cat.png", "cmpl-1-image-0", f"adapter:{'0' * 64}"])
def test_only_what_is_named_by_its_content_is_kept(name: str) -> None:
    engine = engine_with(100)
    request = request_of("r", 1)
    request.mm_features[0].identifier = name
    step(engine, request)
    assert engine.scheduler.ledger.used == 0


def test_a_reset_empties_it_whatever_is_on_its_way() -> None:
    engine = engine_with(100, slots=5)
    step(engine, request_of("r", 4))
    engine.step(request_of("r", 3))
    engine.reset()
    engine.absorb()
    for item in (3, 4):
        assert not engine.scheduler.has(digest(item))
    for item in (4, 3, 2, 4, 3):
        step(engine, request_of("r", item))
    assert engine.encoded == 5
    assert figure(engine, "hits") == 2


def test_after_the_kv_connectors_reset_vllm_still_gets_what_it_was_promised() -> None:
    engine = engine_with(100, slots=5)
    for item in (4, 3):
        step(engine, request_of("r", item))
    engine.step(request_of("again", 4), tokens=False, preempted=frozenset({"again"}))
    engine.scheduler.reset(also_loads=False)
    engine.step(request_of("again", 4))
    assert engine.encoded == 2
    assert not engine.scheduler.has(digest(4))


def test_a_rank_without_memory_turns_it_off(caplog: pytest.LogCaptureFixture) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise ConfigurationError("there is no memory")

    engine = engine_with(100, ranks=2, slots=5)
    engine.ranks[1].half = VisionRank(100 * ROW, CPU, none)
    with caplog.at_level(logging.ERROR):
        for item in (4, 3, 4):
            step(engine, request_of("r", item))
    assert engine.encoded == 2 * 3
    assert figure(engine, "capacity_bytes") == 0
    assert len([line for line in caplog.messages if line.startswith("The vision cache is off")]) == 2


def test_a_load_of_what_is_not_there_is_never_answered_with_something_else() -> None:
    with pytest.raises(MissingOutput):
        VisionRank(1024, CPU, PlainSlab).begin(VisionPlan(loads={"a": 1}), {})


@pytest.mark.parametrize(
    "output",
    [
        torch.arange(24, dtype=torch.bfloat16).view(2, 12),
        torch.arange(24, dtype=torch.float32).view(12, 2).t(),
        torch.arange(24, dtype=torch.int8).view(2, 3, 4)[:, 1:],
    ],
    ids=["bfloat16", "transposed", "strided"],
)
def test_shape_and_type_are_kept(output: torch.Tensor) -> None:
    rank = VisionRank(4096, CPU, PlainSlab)
    rank.begin(VisionPlan(saves={"a": Grant(1, 512, 512)}), {})
    rank.save({"a": output}, "a")
    report = rank.take_report()
    assert report is not None
    assert report.kept == {1: 1}
    cache: dict[str, torch.Tensor] = {}
    rank.begin(VisionPlan(loads={"a": 1}), cache)
    assert cache["a"].dtype == output.dtype
    assert torch.equal(cache["a"], output)
    cache["a"].zero_()
    again: dict[str, torch.Tensor] = {}
    rank.begin(VisionPlan(loads={"a": 1}), again)
    assert torch.equal(again["a"], output), "what a model does to its copy stays there"


def test_what_is_no_tensor_is_refused() -> None:
    rank = VisionRank(4096, CPU, PlainSlab)
    rank.begin(VisionPlan(saves={"a": Grant(1, 0, 512), "b": Grant(2, 512, 512)}), {})
    rank.save({"a": [torch.zeros(2)]}, "a")  # type: ignore[dict-item]
    report = rank.take_report()
    assert report is not None
    assert report.refused == {1, 2}, "and so is what the encoder did not make"


ITEMS = st.lists(st.integers(0, 7), min_size=1, max_size=3)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step"] * 8 + ["preempt", "idle", "reset", "kv reset", "fail", "mend"]),
        ITEMS,
        st.sampled_from([True, True, True, False]),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=300)
@given(EVENTS, st.integers(2, 14), st.integers(1, 3), st.integers(5, 9))
def test_nothing_is_loaded_that_is_not_there_or_not_right(
    events: list[tuple[str, list[int], bool]], units: int, ranks: int, slots: int
) -> None:
    """A load of a missing output raises, a wrong one fails the comparison of each step, overlaps fail ``check``."""
    engine = engine_with(2 * units, ranks=ranks, slots=slots)
    for number, (event, items, is_absorbed) in enumerate(events):
        requests = [request_of(f"{number}-{at}", item) for at, item in enumerate(items)]
        names = frozenset(request.request_id for request in requests)
        known = [each for each in requests if engine.scheduler.has(each.mm_features[0].identifier)]
        if event == "step":
            engine.step(*requests)
        elif event == "preempt":
            engine.step(*known, preempted=names)
        elif event == "idle":
            engine.step(*known, tokens=False, preempted=names)
        elif event == "reset":
            engine.reset()
        elif event == "kv reset":
            engine.scheduler.reset(also_loads=False)
        else:
            engine.ranks[-1].fails = event == "fail"
        if is_absorbed:
            engine.absorb()
        engine.scheduler.ledger.check()
        assert engine.scheduler.ledger.used <= 2 * units * ROW
    absorbed = VisionReport()
    absorbed.merge(VisionReport(kept={10**9: 1}, refused={10**9 + 1}))
    engine.scheduler.absorb(absorbed)
    engine.scheduler.ledger.check()


def configuration(**more: Any) -> Any:
    extra = more.pop("extra", {})
    kv = more.pop("kv", None)
    transfer = SimpleNamespace(
        ec_connector="WarmrouteECConnector",
        is_ec_producer=True,
        is_ec_consumer=more.pop("is_ec_consumer", True),
        ec_connector_extra_config=extra,
    )
    parallel = SimpleNamespace(world_size=more.pop("world_size", 1), pipeline_parallel_size=more.pop("stages", 1))
    return SimpleNamespace(
        ec_transfer_config=transfer,
        kv_transfer_config=kv,
        parallel_config=parallel,
        model_config=SimpleNamespace(is_encoder_decoder=more.pop("is_encoder_decoder", False)),
        **more,
    )


def kv_transfer(name: str, **extra: Any) -> Any:
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)


def test_the_flag_alone_switches_it_on() -> None:
    assert rank_bytes(configuration(), {}) == 1 << 30
    assert rank_bytes(configuration(world_size=4), {}) == 1 << 28
    assert rank_bytes(configuration(world_size=4, stages=2, use_v2_model_runner=True), {}) == 1 << 29


def test_settings_come_from_wherever_they_are() -> None:
    assert rank_bytes(configuration(), {"WARMROUTE_VISION_CACHE_BYTES": "2MiB"}) == 2 << 20
    kv = kv_transfer("WarmrouteConnector", vision_cache_bytes="3MiB", cpu_bytes="1GiB")
    assert rank_bytes(configuration(kv=kv), {"WARMROUTE_VISION_CACHE_BYTES": "2MiB"}) == 3 << 20
    entry = {"kv_connector": "WarmrouteConnector", "kv_connector_extra_config": {"vision_cache_bytes": "5MiB"}}
    assert rank_bytes(configuration(kv=kv_transfer("MultiConnector", connectors=[entry])), {}) == 5 << 20
    assert rank_bytes(configuration(kv=kv, extra={"vision_cache_bytes": 4096}), {}) == 4096
    assert rank_bytes(configuration(extra={"enable_vision_cache": False}), {}) == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigurationError, match="ec_role is ec_both"):
        rank_bytes(configuration(is_ec_consumer=False), {})
    with pytest.raises(ConfigurationError, match="'cpu_bytes' is no setting of the vision cache"):
        rank_bytes(configuration(extra={"cpu_bytes": 5}), {})


@pytest.mark.parametrize("more", [{"is_encoder_decoder": True}, {"world_size": 2, "stages": 2}], ids=str)
def test_where_vllm_would_keep_nothing_no_memory_is_taken(more: dict[str, Any]) -> None:
    assert rank_bytes(configuration(**more), {}) == 0


def test_the_setting_without_its_connector_names_the_flag() -> None:
    wanted = ConnectorConfig(enable_vision_cache=True)
    with pytest.raises(ConfigurationError, match=r"add --ec-transfer-config '.*WarmrouteECConnector.*ec_both"):
        require_connector(wanted, SimpleNamespace(ec_transfer_config=None))
    require_connector(wanted, configuration())
    require_connector(ConnectorConfig(), SimpleNamespace(ec_transfer_config=None))


def test_resets_of_the_engine_reach_its_cache_and_no_other() -> None:
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig

    caches = [VisionScheduler(VisionLedger(4096, 1), {"image": 4}) for _ in range(2)]
    configs: list[Any] = [
        SimpleNamespace(instance_id=name, ec_manager_config=EncoderCacheManagerConfig()) for name in "ab"
    ]
    for config, cache in zip(configs, caches, strict=True):
        assert vision_cache_resets.watch(config, cache)
    manager = (
        configs[0].ec_manager_config.get_encoder_cache_manager_obj().create_manager(cache_size=8, vllm_config=None)
    )
    seen: list[tuple[int, bool]] = []
    for at, cache in enumerate(caches):
        cache.reset = lambda at=at, *, also_loads: seen.append((at, also_loads))  # type: ignore[method-assign,misc]
    manager.reset()
    assert seen == [(0, True)]
    vision_cache_resets.announce(SimpleNamespace(instance_id="b"))
    assert seen == [(0, True), (1, False)]
    assert vision_cache_resets.totals(configs[1])["vision_capacity_bytes"] == {"": 4096}
    assert configs[0].ec_manager_config.encoder_cache_manager_cls is None
    for copied in (copy.deepcopy(configs[0]), pickle.loads(pickle.dumps(configs[0]))):
        assert type(copied.ec_manager_config) is EncoderCacheManagerConfig


def test_an_older_vllm_that_has_no_choice_of_manager_is_told() -> None:
    assert not vision_cache_resets.watch(SimpleNamespace(), VisionScheduler(VisionLedger(0, 1), {}))
