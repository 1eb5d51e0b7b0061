import random
from collections import Counter

import pytest

from router.config import WorkerSpec
from router.policies import Candidate, Policy, Query
from router.policies.load import LeastLoaded, RoundRobin
from router.policies.longest_hit import LongestHit
from router.upstream import Timeouts, Upstream
from router.workers import Breaker, Worker


def worker(name: str) -> Worker:
    spec = WorkerSpec(url=f"http://{name}:8000", name=name)
    return Worker(spec, Upstream(name, spec.url, Timeouts(1, 1, 1)), Breaker(5, 5))


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
