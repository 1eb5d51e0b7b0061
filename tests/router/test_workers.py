import random

from hypothesis import given
from hypothesis import strategies as st

from router.config import WorkerSpec
from router.upstream import Timeouts, Upstream
from router.workers import TRUST_FLOOR, Breaker, Flight, Load, ModelCard, Registry, Worker


def make_worker(name: str, *cards: ModelCard) -> Worker:
    spec = WorkerSpec(url=f"http://{name}:1", name=name)
    worker = Worker(spec, Upstream(name, spec.url, Timeouts(1, 1, 1)), Breaker(3, 10))
    worker.models = {card.id: card for card in cards}
    return worker


def test_the_workers_figure_stands_for_what_it_had_by_then() -> None:
    load = Load()
    early, late = Flight(0.0, 1000), Flight(9.96, 500)
    load.sent(early)
    load.sent(late)
    assert load.uncached_tokens == 1500
    load.heartbeat(3000, 10.0)
    assert load.uncached_tokens == 3500, "another router's requests are in the worker's figure, the late one is not"
    load.computed(early)
    assert load.uncached_tokens == 2500
    load.computed(early)
    load.heartbeat(0, 11.0)
    assert load.uncached_tokens == 0, "an answer that comes only as a whole: the worker knows that it is computed"
    load.heartbeat(700, 12.0)
    load.unreported()
    assert load.uncached_tokens == 0, "what others sent is the worker's to say"
    load.finished(late)
    load.finished(early)
    assert (load.uncached_tokens, load.in_flight) == (0, 0)


@given(st.lists(st.integers(0, 4), max_size=60), st.randoms(use_true_random=False))
def test_load_returns_to_nothing(actions: list[int], rng: random.Random) -> None:
    load, flights, now = Load(), [], 0.0
    for action in actions:
        now += rng.random()
        match action:
            case 0 | 1:
                flights.append(Flight(now, rng.randint(0, 5000)))
                load.sent(flights[-1])
            case 2 if flights:
                load.computed(rng.choice(flights))
            case 3 if flights:
                load.finished(flights.pop(rng.randrange(len(flights))))
            case 4:
                load.heartbeat(rng.randint(0, 5000), now)
        assert load.uncached_tokens >= 0
    load.unreported()
    assert load.uncached_tokens == sum(flight.uncached for flight in flights)
    for flight in flights:
        load.finished(flight)
    assert (load.uncached_tokens, load.in_flight) == (0, 0)


def test_the_breaker_opens_tries_once_and_waits_longer_each_time() -> None:
    breaker = Breaker(2, 10)
    breaker.failed(0)
    assert breaker.allows(0)
    breaker.failed(0)
    assert not breaker.allows(9.9)
    assert breaker.allows(10)
    breaker.begin()
    assert breaker.state == "half-open"
    assert not breaker.allows(10), "one request tries, not all of them"
    breaker.failed(10)
    assert not breaker.allows(29.9)
    assert breaker.allows(30)
    breaker.begin()
    breaker.abandoned()
    assert breaker.allows(30), "a client that left says nothing about the worker"
    breaker.begin()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_trust_falls_once_and_comes_back() -> None:
    worker = make_worker("a")
    fell = [worker.judge(right=False) for _ in range(6)]
    assert fell.count(True) == 1
    assert worker.trust < TRUST_FLOOR
    assert worker.believed(1000) < 500
    for _ in range(4):
        worker.judge(right=True)
    assert worker.believed(1000) == 1000


def test_pools_by_model_with_adapters_and_their_parents() -> None:
    registry = Registry()
    base, adapter = ModelCard("m", root="/models/m"), ModelCard("tuned", parent="m")
    registry.add(make_worker("a", base, adapter))
    registry.add(make_worker("b", base))
    pools = registry.pools
    assert [worker.name for worker in pools["m"].workers] == ["a", "b"]
    assert (pools["tuned"].base, pools["tuned"].lora, pools["tuned"].root) == ("m", "tuned", "/models/m")
    registry.remove("a")
    assert set(registry.pools) == {"m"}
