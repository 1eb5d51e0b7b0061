import copy
import random
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest

from kv_protocol.identity import Identity
from kv_protocol.messages import Heartbeat, Hello, TierInfo
from router.breaker import Breaker
from router.config import PolicyName, Settings, WorkerSpec
from router.errors import InvalidRequest
from router.policies import Candidate, Choice, Policy, Query, comparison_of, make_policy
from router.policies.hot import WINDOW, HotPrefixes
from router.policies.least_ttft import LeastTtft, loading_seconds, predict
from router.policies.load import LeastLoaded, PowerOfTwo, Random, RoundRobin
from router.policies.longest_hit import LongestHit
from router.policies.saturation import Saturation
from router.policies.session import Session
from router.policies.shadow import Shadowed
from router.policy_metrics import PolicyState
from router.upstream import Timeouts, Upstream
from router.workers import Worker

CHUNK = 256
TIERS = [
    TierInfo("gpu", 1000, CHUNK * 1000),
    TierInfo("cpu", 1000, CHUNK * 1000, load_bandwidth=1e6),
    TierInfo("disk", 1000, CHUNK * 1000, load_bandwidth=1e5),
]


def worker(name: str, tiers: Sequence[TierInfo] = TIERS) -> Worker:
    spec = WorkerSpec(url=f"http://{name}:8000", name=name)
    made = Worker(spec, Upstream(name, spec.url, Timeouts(1, 1, 1)), Breaker(5, 5))
    made.hello = Hello("e", "m", CHUNK, CHUNK, Identity("w", "bfloat16", "l", ()), list(tiers))
    return made


WORKERS = {name: worker(name) for name in "abc"}


def candidate(name: str, hit: int = 0, load: int = 0, in_flight: int = 0, speed: float = 1000.0) -> Candidate:
    return Candidate(WORKERS[name], hit, load, in_flight, speed)


def chosen(policy: Policy, *candidates: Candidate, tokens: int = 5000) -> tuple[str, str]:
    choice = policy.choose(Query("m", tokens), candidates)
    return choice.worker.name, choice.reason


def longest_hit(**arguments: float) -> LongestHit:
    return LongestHit(random.Random(1), **arguments)  # type: ignore[arg-type]


def test_longest_hit_wins_and_says_so() -> None:
    name, reason = chosen(longest_hit(), candidate("a", 1024), candidate("b", 4864, load=1500), candidate("c"))
    assert (name, reason) == ("b", "longest hit: 4,864 of 5,000 tokens")


def test_the_lead_that_saturates_is_seconds_of_the_workers_own_prefill() -> None:
    within = candidate("a", 4864, load=2000, speed=1000)
    beyond = candidate("a", 4864, load=2001, speed=1000)
    quick = candidate("a", 4864, load=2001, speed=1001)
    other = candidate("b", 512)
    assert chosen(longest_hit(), within, other)[0] == "a"
    assert chosen(longest_hit(), beyond, other)[0] == "b"
    assert chosen(longest_hit(), quick, other)[0] == "a"
    assert chosen(longest_hit(saturation_seconds=3.0), beyond, other)[0] == "a"
    assert chosen(longest_hit(saturation_tokens=100), candidate("a", 4864, load=101), other)[0] == "b"


def test_only_a_lead_saturates_not_load_itself() -> None:
    assert chosen(longest_hit(), candidate("a", 4864, load=90_000), candidate("b", 0, load=89_000))[0] == "a"


def test_saturated_goes_to_the_next_best_and_says_so() -> None:
    name, reason = chosen(
        longest_hit(), candidate("a", 4864, load=33_000), candidate("b", 2048), candidate("c", 0, load=10)
    )
    assert name == "b"
    assert reason == "saturated: a leads by 33k uncached tokens; next best holds 2,048 of 5,000 tokens"


def test_every_warm_worker_saturated_goes_to_the_least_loaded() -> None:
    candidates = candidate("a", 4864, load=50_000), candidate("b", 2048, load=40_000), candidate("c", 0, load=10)
    assert chosen(longest_hit(), *candidates)[0] == "c"


def test_equal_hits_go_to_the_less_loaded() -> None:
    assert chosen(longest_hit(), candidate("a", 512, load=500), candidate("b", 512, load=400))[0] == "b"


def test_no_hit_goes_to_the_least_loaded() -> None:
    name, reason = chosen(longest_hit(), candidate("a", load=900, in_flight=3), candidate("b", load=100, in_flight=1))
    assert (name, reason) == ("b", "no hit; least loaded: 100 tokens, 1 in flight")


@pytest.mark.parametrize("policy", [longest_hit(), LeastLoaded(random.Random(2))])
def test_ties_are_broken_at_random_and_evenly(policy: Policy) -> None:
    names = Counter(chosen(policy, *(candidate(name) for name in "abc"))[0] for _ in range(600))
    assert set(names) == set("abc")
    assert min(names.values()) > 150


def test_seeded_choices_repeat() -> None:
    def sequence() -> list[str]:
        policy = LeastLoaded(random.Random(7))
        return [chosen(policy, *(candidate(name) for name in "abc"))[0] for _ in range(20)]

    assert sequence() == sequence()


def test_least_loaded_ignores_hits() -> None:
    assert chosen(LeastLoaded(random.Random(1)), candidate("a", 4864, load=2), candidate("b", load=1))[0] == "b"


def test_round_robin_takes_turns_by_model_and_skips_who_is_missing() -> None:
    policy = RoundRobin()
    everyone = [candidate(name) for name in "cab"]
    assert [chosen(policy, *everyone)[0] for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.choose(Query("other", 0), everyone).worker.name == "a"
    assert chosen(policy, candidate("a"), candidate("c"))[0] == "c"


def test_a_hot_prefix_does_not_stay_on_one_worker() -> None:
    """Load is counted as it is sent, so a burst on one warm worker spills over instead of piling up."""
    policy, load = longest_hit(), Counter[str]()
    for _ in range(60):
        candidates = [candidate("a", 4096, load=load["a"]), candidate("b", load=load["b"])]
        name, _ = chosen(policy, *candidates)
        load[name] += 904 if name == "a" else 5000
    assert load["a"] - load["b"] <= 2000 + 904
    assert load["b"] > 0


def test_power_of_two_looks_at_two_and_takes_the_less_loaded() -> None:
    policy = PowerOfTwo(random.Random(1))
    everyone = [candidate("a", load=3), candidate("b", load=2), candidate("c", load=1)]
    names = Counter(chosen(policy, *everyone)[0] for _ in range(300))
    assert names["a"] == 0, "the most loaded is always the worse of two"
    assert 60 < names["b"] < 140
    assert chosen(policy, candidate("a", load=7)) == ("a", "less loaded of two: 7 tokens")
    assert chosen(policy, candidate("a", load=7), candidate("b", load=9))[1].endswith("against 9 at b")


def test_random_takes_each_as_often() -> None:
    names = Counter(
        chosen(Random(random.Random(1)), *(candidate(name, load=9) for name in "abc"))[0] for _ in range(600)
    )
    assert min(names.values()) > 150


def test_routers_that_share_workers_do_not_follow_each_other() -> None:
    """Loads that differ by one request send every router to the same worker, unless that difference is none."""
    everyone = [candidate(name, load=64 * number) for number, name in enumerate("abc")]
    assert {chosen(LeastLoaded(random.Random(seed)), *everyone)[0] for seed in range(40)} == {"a"}
    WORKERS["a"].load.heartbeat(10_000, 0.0)
    try:
        assert {chosen(LeastLoaded(random.Random(seed)), *everyone)[0] for seed in range(40)} == {"a", "b", "c"}
    finally:
        WORKERS["a"].load = type(WORKERS["a"].load)()


# Sessions


def session(tokens: int | None = None) -> Session:
    return Session(random.Random(1), "X-Session-Id", Saturation(2.0, tokens))


def of_session(policy: Session, name: str, candidates: Sequence[Candidate]) -> Choice:
    return policy.choose(Query("m", 100, [(b"x-other", b"1"), (b"x-session-id", name.encode())]), candidates)


MANY = [Candidate(worker(f"w{number}"), 0, 0, 0, 1000.0) for number in range(8)]


def test_a_session_stays_whatever_order_and_load() -> None:
    for number in range(50):
        homes = {
            of_session(session(), f"s{number}", random.Random(seed).sample(MANY, 8)).worker.name for seed in range(5)
        }
        assert len(homes) == 1


def test_sessions_spread_evenly() -> None:
    homes = Counter(of_session(session(), f"s{number}", MANY).worker.name for number in range(4000))
    assert len(homes) == 8
    assert max(homes.values()) < 1.25 * min(homes.values())


@given(
    st.sets(st.text(st.characters(codec="ascii", exclude_characters="\r\n"), min_size=1), max_size=30),
    st.integers(0, 7),
)
def test_only_the_sessions_of_a_worker_that_leaves_move(sessions: set[str], gone: int) -> None:
    left = [item for number, item in enumerate(MANY) if number != gone]
    for name in sessions:
        before = of_session(session(), name, MANY).worker
        after = of_session(session(), name, left).worker
        assert before is MANY[gone].worker or after is before


def test_a_saturated_worker_gives_its_sessions_to_their_second() -> None:
    home = of_session(session(), "s", MANY).worker
    loaded = [replace(item, load=2001) if item.worker is home else item for item in MANY]
    choice = of_session(session(), "s", loaded)
    second, reason = choice.worker, choice.reason
    assert second is not home
    assert reason == f"saturated: the session's worker {home.name} leads by 2,001 tokens"
    assert of_session(session(), "s", [item for item in MANY if item.worker is not home]).worker is second
    within = [replace(item, load=2000) if item.worker is home else item for item in MANY]
    assert of_session(session(), "s", within).worker is home


def test_no_session_goes_by_load() -> None:
    choice = session().choose(Query("m", 100), [candidate("a", load=5), candidate("b", load=4)])
    assert (choice.worker.name, choice.reason) == ("b", "no session; least loaded: 4 tokens, 0 in flight")


# Least time to first token


def least_ttft(weight: float = 4.0) -> LeastTtft:
    return LeastTtft(random.Random(1), weight)


def test_least_ttft_weighs_waiting_against_computing() -> None:
    quick = candidate("b", speed=100_000)
    warm = replace(candidate("a", 4000, load=15_800, speed=100_000), gpu_tokens=4000)
    assert chosen(least_ttft(), warm, quick)[0] == "a"
    assert chosen(least_ttft(), replace(warm, load=16_200), quick)[0] == "b"
    assert chosen(least_ttft(1.0), replace(warm, load=3_800), quick)[0] == "a"
    assert chosen(least_ttft(1.0), replace(warm, load=4_200), quick)[0] == "b"


def test_nobody_waits_more_than_a_second_for_the_others_sake() -> None:
    idle, warm = candidate("b"), replace(candidate("a", 4000, load=4_990), gpu_tokens=4000)
    assert chosen(least_ttft(), warm, idle)[0] == "a"
    assert chosen(least_ttft(), replace(warm, load=5_010), idle)[0] == "b"


def test_least_ttft_says_what_it_expects() -> None:
    _, reason = chosen(least_ttft(), replace(candidate("a", 4000, load=500), gpu_tokens=4000))
    assert reason == "first token in 1,500 ms: 500 waiting, 1,000 computing; holds 4,000 of 5,000 tokens"


def test_least_ttft_prefers_a_hit_in_the_gpu_to_one_that_has_to_be_loaded() -> None:
    near, far = replace(candidate("a", 4096), gpu_tokens=4096), candidate("b", 4096)
    assert {chosen(least_ttft(), far, near)[0] for _ in range(10)} == {"a"}


def test_loading_counts_each_tier_at_its_own_bandwidth() -> None:
    # 1,000 bytes a token: 1 ms from cpu, 10 ms from disk.
    holder = worker("t")
    split = Query("m", 5000, tiers=lambda _: {"gpu": 1024, "cpu": 2048, "disk": 1024})
    assert loading_seconds(split, holder, 3072) == pytest.approx(2.048 + 10.24)
    assert loading_seconds(split, holder, 1536) == pytest.approx((2.048 + 10.24) / 2), "half of it is believed"
    only_cpu = worker("u", TIERS[:2])
    assert loading_seconds(Query("m", 5000), only_cpu, 1000) == pytest.approx(1.0)
    only_cpu.beat(beat(load_bandwidth={"cpu": 2e6}), 0.0)
    assert loading_seconds(Query("m", 5000), only_cpu, 1000) == pytest.approx(0.5), "the latest report counts"
    unmeasured = worker("v", [TIERS[0], TierInfo("cpu", 10, CHUNK * 20_000)])
    assert loading_seconds(Query("m", 5000), unmeasured, 1000) == pytest.approx(0.001)
    unmeasured.hello = None
    assert loading_seconds(Query("m", 5000), unmeasured, 1000) == 0.0


def beat(uncached: int = 0, load_bandwidth: dict[str, float] | None = None) -> Heartbeat:
    return Heartbeat(0, 0, uncached, 0.0, 1000.0, {}, load_bandwidth or {})


def test_equal_speeds_measured_differently_draw_nobody() -> None:
    workers = [worker(name) for name in "abc"]
    for item, speed in zip(workers, (9_700.0, 10_000.0, 10_300.0), strict=True):
        item.pace.learned_speed = speed
    candidates = [Candidate(item, 0, 0, 0, 1.0) for item in workers]
    assert len({part.computing for part in predict(Query("m", 9000), candidates)}) == 1
    workers[2].pace.learned_speed = 40_000.0
    policy = least_ttft()
    names = Counter(policy.choose(Query("m", 9000), candidates).worker.name for _ in range(50))
    assert names == {"c": 50}, "a worker that really is quicker takes the request"


def test_without_tokens_least_ttft_goes_by_load_and_speed() -> None:
    slow, quick = candidate("a", load=100, speed=100), candidate("b", load=1000, speed=10_000)
    assert chosen(least_ttft(), slow, quick, tokens=0)[0] == "b"


# Hot prefixes


def of_chunks(tokens: int, *chunks: bytes) -> Query:
    return Query("m", tokens, hashes={("m", CHUNK): [list(chunks)]})


def prefix(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


@pytest.mark.parametrize("make", [longest_hit, least_ttft])
def test_a_prefix_that_everybody_shares_is_copied_to_idle_workers(make: object) -> None:
    policy: Policy = make()  # type: ignore[operator]
    warm, idle = worker("warm", TIERS[:1]), worker("idle", TIERS[:1])
    warm.average_load = 300.0
    query = of_chunks(2600, *prefix(10))
    candidates = [Candidate(warm, 2560, 300, 2, 10_000.0, 2560), Candidate(idle, 0, 0, 0, 10_000.0)]
    choices = [policy.choose(query, candidates) for _ in range(60)]
    first = next(number for number, choice in enumerate(choices) if choice.worker is idle)
    assert first == (5 * 2560 - 300) // 300 + 1, "as soon as what is gained outweighs the copy"
    assert choices[first].reason.startswith(f"hot prefix: {first} recent requests share 2,560 tokens of warm")


@pytest.mark.parametrize("make", [longest_hit, least_ttft])
def test_a_conversation_is_not_copied_and_neither_is_a_ripple(make: object) -> None:
    policy: Policy = make()  # type: ignore[operator]
    warm, idle = worker("warm", TIERS[:1]), worker("idle", TIERS[:1])
    warm.average_load = 5000.0
    for turn in range(1, 60):
        query = of_chunks(CHUNK * turn + 100, *[bytes([turn]) * 16] * turn)
        candidates = [Candidate(warm, CHUNK * turn, 300, 2, 10_000.0, CHUNK * turn), Candidate(idle, 0, 0, 0, 10_000.0)]
        assert policy.choose(query, candidates).worker is warm
    warm.average_load = idle.average_load
    query = of_chunks(2600, *prefix(10))
    candidates = [Candidate(warm, 2560, 300, 2, 10_000.0, 2560), Candidate(idle, 0, 0, 0, 10_000.0)]
    assert {policy.choose(query, candidates).worker.name for _ in range(200)} == {"warm"}


def test_recent_prefixes_are_bounded() -> None:
    hot = HotPrefixes()
    for number in range(3 * WINDOW):
        assert hot.met(number.to_bytes(16, "big")) == 0
    assert len(hot._counts) == len(hot._last) == WINDOW
    assert hot.met((3 * WINDOW - 1).to_bytes(16, "big")) == 1
    assert hot.met(b"gone".ljust(16)) == 0


# By name, by header, and beside


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_policy_can_be_made_and_chooses_among_who_is_there(name: PolicyName) -> None:
    policy = make_policy(Settings(policy=name, seed=1))
    assert policy.name == name
    for number in range(1, 4):
        candidates = [candidate(item, hit=256, load=5) for item in "abc"[:number]]
        assert chosen(policy, *candidates)[0] in "abc"[:number]
        assert chosen(copy.deepcopy(policy), *candidates, tokens=0)[0] in "abc"[:number]


def test_a_header_chooses_only_where_that_is_allowed() -> None:
    asks = Query("m", 5000, [(b"x-warmroute-policy", b" Least-Loaded ")])
    warm, idle = candidate("a", 4864, load=100), candidate("b", load=5)
    for allowed, expected in ((False, "a"), (True, "b")):
        policy = make_policy(Settings(policy="longest-hit", policy_header=allowed, seed=1))
        assert policy.choose(asks, [warm, idle]).worker.name == expected
        assert policy.choose(Query("m", 5000), [warm, idle]).worker.name == "a"


def test_a_header_that_names_no_policy_is_refused_with_the_nearest() -> None:
    policy = make_policy(Settings(policy_header=True))
    with pytest.raises(InvalidRequest, match="did you mean least-ttft") as refused:
        policy.choose(Query("m", 1, [(b"x-warmroute-policy", b"least_ttft")]), [candidate("a")])
    assert refused.value.param == "x-warmroute-policy"


def test_a_shadow_changes_nothing_and_is_counted() -> None:
    settings = Settings(policy="round-robin", shadow_policy="longest-hit", seed=1)
    alone, shadowed = make_policy(Settings(policy="round-robin", seed=1)), make_policy(settings)
    warm, idle = replace(candidate("a", 4864), gpu_tokens=4864), candidate("b")
    both = [[policy.choose(Query("m", 5000), [warm, idle]) for _ in range(10)] for policy in (alone, shadowed)]
    assert both[0] == both[1]
    comparison = comparison_of(shadowed)
    assert comparison is not None
    assert (comparison.policy, comparison.same, comparison.other) == ("longest-hit", 5, 5)
    assert (comparison.saved_tokens, comparison.lost_tokens) == (5 * 4864, 0)
    assert comparison.saved_seconds == pytest.approx(5 * 4.864)
    assert shadowed.uses_hits, "prompts have to be tokenized for the shadow"
    assert comparison_of(alone) is None


def test_a_shadow_that_fails_fails_nobody() -> None:
    class Broken(RoundRobin):
        def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
            raise RuntimeError(query, candidates)

    policy = Shadowed(RoundRobin(), Broken())
    assert chosen(policy, candidate("a"))[0] == "a"
    assert policy.comparison.failed == 1


def test_shadow_and_pace_are_metrics_only_where_there_are_some() -> None:
    registry, policy = CollectorRegistry(), make_policy(Settings(shadow_policy="least-ttft", policy_header=True))
    quiet = make_policy(Settings())
    shown = [quiet]
    holder = worker("m1")
    registry.register(PolicyState(lambda: shown[0], lambda: [holder]))
    assert generate_latest(registry) == b""
    shown[0] = policy
    chosen(policy, candidate("a"))
    for _ in range(20):
        holder.pace.observe(10_000, 1.0)
    text = generate_latest(registry).decode()
    assert 'warmroute_router_shadow_decisions_total{policy="least-ttft",result="same"} 1.0' in text
    assert 'warmroute_router_worker_learned_tokens_per_second{worker="m1"} 10000.0' in text
