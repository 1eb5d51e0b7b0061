import random

from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.messages import Heartbeat
from router.config import WorkerSpec
from router.upstream import Timeouts, Upstream
from router.workers import DECODE_TOKENS, TRUST_FLOOR, Breaker, Flight, Load, ModelCard, Registry, Worker


def make_worker(name: str, *cards: ModelCard) -> Worker:
    spec = WorkerSpec(url=f"http://{name}:1", name=name)
    worker = Worker(spec, Upstream(name, spec.url, Timeouts(1, 1, 1)), Breaker(3, 10))
    worker.models = {card.id: card for card in cards}
    return worker


def test_the_workers_figure_stands_for_what_it_has() -> None:
    load = Load()
    early, late = Flight(0.0, 1000), Flight(9.96, 500)
    load.sent(early)
    load.sent(late)
    assert load.uncached_tokens == 1500
    load.heartbeat(3000, 10.0)
    assert load.uncached_tokens == 3000, "another router's requests are in the worker's figure"
    load.computed(early)
    assert load.uncached_tokens == 2000
    load.computed(early)
    load.heartbeat(0, 11.0)
    assert load.uncached_tokens == 0, "an answer that comes only as a whole: the worker knows that it is computed"
    load.heartbeat(700, 12.0)
    assert load.uncached_tokens == 700, "it was only on its way into the worker's queue"
    load.unreported()
    assert load.uncached_tokens == 500
    load.finished(late)
    load.finished(early)
    assert (load.uncached_tokens, load.in_flight) == (0, 0)


def test_a_request_on_its_way_counts_though_the_worker_has_not_seen_it() -> None:
    load = Load()
    load.sent(Flight(9.96, 500))
    load.heartbeat(0, 10.0)
    assert load.uncached_tokens == 500
    load.heartbeat(0, 11.0)
    assert load.uncached_tokens == 0


def test_the_oldest_request_is_the_one_that_is_partly_computed() -> None:
    load = Load()
    first, second = Flight(0.0, 8000), Flight(1.0, 3000)
    load.sent(first)
    load.sent(second)
    load.heartbeat(5000, 2.0)
    assert (first.uncached, second.uncached) == (2000, 3000)
    load.computed(first)
    assert load.uncached_tokens == 3000


def test_others_are_noticed_and_forgotten_after_a_minute() -> None:
    load = Load()
    load.heartbeat(500, 0.0)
    assert not load.shared, "a hit that was shorter than predicted is no second router"
    load.heartbeat(9000, 1.0)
    assert load.shared
    for second in range(60):
        load.heartbeat(0, 2.0 + second)
    assert not load.shared


def test_the_average_load_follows_within_seconds() -> None:
    worker = make_worker("a")
    for second in range(20):
        worker.beat(Heartbeat(2, 0, 5000, 0.1, 9000.0, {}, {}), float(second))
    assert worker.weight == 5000 + 2 * DECODE_TOKENS
    assert abs(worker.average_load / worker.weight - 1) < 0.02
    worker.forget_reports()
    assert (worker.average_load, worker.load.uncached_tokens) == (0.0, 0)


def test_an_answer_teaches_the_workers_pace() -> None:
    worker = make_worker("a")
    for number in range(20):
        worker.answered(Flight(float(number), 0, due=9000, first_at=number + 0.5))
    assert worker.pace.learned_speed == 18_000.0


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
    assert load.in_flight == len(flights)
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
