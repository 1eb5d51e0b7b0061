from hypothesis import given
from hypothesis import strategies as st

from worker_connector.tiers.breaker import CLOSED, OPEN, TRIAL, Breaker, Pauses


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, share: float = 1.0) -> Breaker:
    return Breaker(Pauses(first=1.0, longest=8.0), clock, lambda: share)


def opened(clock: Clock) -> Breaker:
    breaker = make(clock)
    ticket = breaker.admit()
    assert ticket is not None
    assert breaker.failed(ticket, "timeout", "late")
    return breaker


def test_the_first_failure_opens_it_and_one_success_after_a_ping_closes_it() -> None:
    breaker = opened(Clock())
    assert breaker.state == OPEN
    assert breaker.admit() is None
    breaker.answered()
    assert breaker.state == TRIAL
    ticket = breaker.admit()
    assert ticket is not None
    assert breaker.admit() is None, "one at a time tries"
    assert breaker.succeeded(ticket)
    assert breaker.state == CLOSED
    assert breaker.openings == 1


def test_pauses_double_up_to_a_bound_and_are_shortened_at_random() -> None:
    breaker = opened(Clock())
    assert [breaker.pause() for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert make(Clock(), 0.0).pause() == 0.5


def test_a_store_that_fails_again_soon_is_left_alone_for_longer() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.pause()
    breaker.answered()
    ticket = breaker.admit()
    assert ticket is not None
    breaker.succeeded(ticket)
    again = breaker.admit()
    assert again is not None
    clock.now += 1.0
    breaker.failed(again, "timeout", "late")
    assert breaker.pause() == 2.0
    breaker.answered()
    ticket = breaker.admit()
    assert ticket is not None
    breaker.succeeded(ticket)
    clock.now += 100.0
    last = breaker.admit()
    assert last is not None
    breaker.failed(last, "timeout", "late")
    assert breaker.pause() == 1.0


def test_results_of_an_earlier_state_change_nothing() -> None:
    breaker = make(Clock())
    old, failing = breaker.admit(), breaker.admit()
    assert old is not None
    assert failing is not None
    breaker.failed(failing, "timeout", "late")
    assert not breaker.succeeded(old)
    assert not breaker.failed(old, "reset", "late too")
    assert (breaker.state, breaker.cause) == (OPEN, "timeout")
    breaker.answered()
    assert not breaker.succeeded(old)
    assert breaker.state == TRIAL


@given(st.lists(st.sampled_from(["admit", "succeed", "fail", "forgo", "answer"]), max_size=60))
def test_it_always_comes_back(steps: list[str]) -> None:
    breaker = make(Clock())
    tickets: list[int] = []
    for step in steps:
        if step == "admit" and (ticket := breaker.admit()) is not None:
            tickets.append(ticket)
        elif step == "answer":
            breaker.answered()
        elif tickets:
            ticket = tickets.pop()
            {"succeed": breaker.succeeded, "forgo": breaker.forgone}.get(step, lambda t: breaker.failed(t, "x", "x"))(
                ticket
            )
    for ticket in tickets:
        breaker.forgone(ticket)
    breaker.answered()
    ticket = breaker.admit()
    assert ticket is not None
    breaker.succeeded(ticket)
    assert breaker.state == CLOSED
