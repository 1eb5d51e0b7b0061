import asyncio
import random
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import Admission
from router.errors import Busy
from router.queue import BYTES_PER_UNIT, Claim
from tests.support.simulated_worker import run


class Crowd:
    """Requests that note when their turn came."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.served: list[str] = []
        self.refused: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def send(self, name: str, claim: Claim) -> asyncio.Task[None]:
        task = asyncio.create_task(self._enter(name, claim))
        self.tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def _enter(self, name: str, claim: Claim) -> None:
        try:
            await self.admission.enter(claim)
            self.served.append(name)
        except Busy:
            self.refused.append(name)

    async def serve(self, count: int) -> list[str]:
        before = len(self.served)
        for _ in range(count):
            self.admission.leave()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return self.served[before:]

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def test_tenants_take_turns_whatever_one_of_them_sends() -> None:
    async def scenario() -> None:
        crowd = Crowd(Admission(1, 1000, 30, 1))
        await crowd.send("first", Claim("x"))
        for _ in range(50):
            await crowd.send("greedy", Claim("greedy"))
        for _ in range(5):
            await crowd.send("modest", Claim("modest"))
        await crowd.send("late", Claim("late"))
        served = Counter(await crowd.serve(12))
        assert served == {"greedy": 6, "modest": 5, "late": 1}
        assert set(await crowd.serve(10)) == {"greedy"}
        await crowd.end()

    run(scenario())


def test_weights_and_sizes_decide_the_shares() -> None:
    async def scenario() -> None:
        crowd = Crowd(Admission(1, 1000, 30, 1))
        await crowd.send("first", Claim("x"))
        for _ in range(60):
            await crowd.send("heavy", Claim("heavy", weight=3.0))
            await crowd.send("light", Claim("light"))
            await crowd.send("large", Claim("large", bytes=3 * BYTES_PER_UNIT))
        served = Counter(await crowd.serve(68))
        assert served["heavy"] == pytest.approx(48, abs=2)
        assert served["light"] == pytest.approx(16, abs=2)
        assert served["large"] == pytest.approx(4, abs=1)
        await crowd.end()

    run(scenario())


def test_urgent_requests_go_first_and_one_tenant_keeps_its_order() -> None:
    async def scenario() -> None:
        crowd = Crowd(Admission(1, 100, 30, 1))
        await crowd.send("first", Claim())
        for number in range(3):
            await crowd.send(f"batch{number}", Claim("a", priority=10))
            await crowd.send(f"plain{number}", Claim("a"))
            await crowd.send(f"urgent{number}", Claim("b", priority=-1))
        order = [f"{kind}{number}" for kind in ("urgent", "plain", "batch") for number in range(3)]
        assert await crowd.serve(9) == order
        await crowd.end()

    run(scenario())


def test_a_full_queue_makes_room_for_a_better_claim() -> None:
    async def scenario() -> None:
        crowd = Crowd(Admission(1, 4, 30, 1))
        await crowd.send("first", Claim("x"))
        for number in range(4):
            await crowd.send(f"greedy{number}", Claim("greedy"))
        await crowd.send("greedy4", Claim("greedy"))
        assert crowd.refused == ["greedy4"], "no better claim than its own"
        await crowd.send("modest", Claim("modest"))
        await crowd.send("urgent", Claim("greedy", priority=-1))
        await asyncio.sleep(0)
        assert crowd.refused == ["greedy4", "greedy3", "greedy2"]
        await crowd.send("batch", Claim("z", priority=5))
        assert crowd.refused[-1] == "batch", "a less urgent one displaces nobody"
        assert await crowd.serve(4) == ["urgent", "greedy0", "modest", "greedy1"]
        assert crowd.admission.displaced == 2
        await crowd.end()

    run(scenario())


def test_a_wait_ends_in_time_and_says_when_to_come_back() -> None:
    async def scenario() -> None:
        admission = Admission(1, 1, 0.02, 1)
        await admission.enter()
        with pytest.raises(Busy, match=r"waited 0\.02 s") as caught:
            await admission.enter(Claim("a"))
        assert admission.queued == 0
        assert b"retry-after" in dict(caught.value.headers())
        admission.leave()
        assert admission.enter_now()

    run(scenario())


def test_who_leaves_while_waiting_leaves_nothing_behind() -> None:
    """Also where turns come to requests that were cancelled in the same instant."""

    async def scenario() -> None:
        admission = Admission(1, 100_000, 30, 1)
        await admission.enter()
        for _ in range(300):
            tasks = [asyncio.create_task(admission.enter(Claim(f"t{number % 7}"))) for number in range(10)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            admission.leave()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            assert admission.queued == 0
            assert admission.in_flight == 0
            assert admission.enter_now()
        assert not admission._queue._levels

    run(scenario())


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(0, 6))
def test_places_and_waiters_are_never_lost(rng: random.Random, places: int, room: int) -> None:
    async def scenario() -> None:
        admission = Admission(places, room, 30, 1)
        waiting: list[asyncio.Task[None]] = []
        inside = 0
        for _ in range(60):
            match rng.randrange(5):
                case 0 | 1:
                    claim = Claim(
                        rng.choice("abc"), rng.choice((-1, 0, 0, 5)), rng.choice((1.0, 4.0)), rng.randrange(9999)
                    )
                    waiting.append(asyncio.create_task(admission.enter(claim)))
                case 2 if inside:
                    inside -= 1
                    admission.leave()
                case 3 if waiting:
                    waiting[rng.randrange(len(waiting))].cancel()
                case 4:
                    admission.resize(rng.randint(1, 4), room, 30, 1)
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            inside += sum(task.done() and not task.cancelled() and not task.exception() for task in waiting)
            waiting = [task for task in waiting if not task.done()]
        for _ in range(4):
            await asyncio.sleep(0)
        inside += sum(task.done() and not task.cancelled() and not task.exception() for task in waiting)
        waiting = [task for task in waiting if not task.done()]
        assert admission.in_flight == inside
        assert admission.queued == len(waiting)
        assert sum(admission.queued_by_tenant.values()) == len(waiting)
        assert not waiting or inside >= admission._max_in_flight
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not admission._queue._levels

    run(scenario())
