"""Who wants which worker, without the network."""

import asyncio

from router.breaker import Breaker
from router.config import WorkerSpec
from router.discovery.membership import Membership
from router.discovery.names import TERMINATING
from router.errors import ConfigError
from router.upstream import Timeouts, Upstream
from router.workers import Registry, Worker
from tests.support.simulated_worker import run, until


class House:
    """A registry kept by a membership. ``broken`` are URLs whose workers cannot be made."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.broken: set[str] = set()
        self.members = Membership(
            self.registry,
            add=self.add,
            remove=lambda worker: self.registry.remove(worker.name),
            patience=lambda: 60.0,
        )

    def add(self, spec: WorkerSpec) -> Worker:
        if spec.url in self.broken:
            raise ConfigError("its certificate cannot be read")
        worker = Worker(spec, Upstream(spec.title, spec.url, Timeouts(1, 1, 1)), Breaker(3, 1.0))
        self.registry.add(worker)
        return worker

    def urls(self) -> list[str]:
        return sorted(worker.spec.url for worker in self.registry.workers)


OLD = WorkerSpec(url="http://10.0.0.1:8000", name="worker-0")
NEW = WorkerSpec(url="http://10.0.0.2:8000", name="worker-0")
OTHER = WorkerSpec(url="http://10.0.0.3:8000", name="worker-1")


def test_a_pod_that_takes_the_name_of_one_that_still_answers_comes_in_when_that_has_left() -> None:
    async def scenario() -> None:
        house = House()
        house.members.claim("pods", [OLD])
        house.members.settle()
        leaving = house.registry.workers[0]
        leaving.load.in_flight = 1
        house.members.claim("pods", [NEW])
        house.members.settle()
        assert house.urls() == [OLD.url]
        assert NEW.url in house.members.problems
        leaving.load.in_flight = 0
        await until(lambda: house.urls() == [NEW.url])
        assert not house.members.problems

    run(scenario())


def test_a_worker_that_cannot_be_made_keeps_no_other_from_being_held() -> None:
    async def scenario() -> None:
        house = House()
        house.members.claim("pods", [OLD])
        house.members.settle()
        house.broken = {OTHER.url}
        house.members.claim("pods", [OLD, OTHER])
        house.members.hold("pods", {OLD.url: TERMINATING})
        house.members.settle()
        assert house.registry.workers[0].draining
        assert house.members.problems == {OTHER.url: "its certificate cannot be read"}
        house.broken = set()
        house.members.settle()
        assert house.urls() == [OLD.url, OTHER.url]
        await asyncio.sleep(0)

    run(scenario())
