import threading
import time
from collections.abc import Callable

import pytest

from tests.worker_connector.tiers.servers import eventually
from worker_connector.tiers.crew import Crew, CrewFull


def test_results_and_errors_come_back() -> None:
    crew = Crew("test", 2, 4)
    job, bad = crew.submit(lambda: 3), crew.submit(lambda: 1 // 0)
    assert crew.wait(job, time.monotonic() + 5)
    assert job.result() == 3
    assert crew.wait(bad, time.monotonic() + 5)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    crew.close()


def test_no_more_than_its_size_run_at_once_and_no_more_than_its_queue_wait() -> None:
    crew, go = Crew("test", 2, 3), threading.Event()
    running: list[int] = []
    jobs = [crew.submit(lambda: (running.append(1), go.wait(10))) for _ in range(2)]
    eventually(lambda: len(running) == 2)
    jobs += [crew.submit(lambda: (running.append(1), go.wait(10))) for _ in range(3)]
    time.sleep(0.05)
    assert len(running) == 2
    with pytest.raises(CrewFull):
        crew.submit(lambda: None)
    go.set()
    assert all(crew.wait(job, time.monotonic() + 5) for job in jobs)
    assert len(running) == 5
    crew.close()
    with pytest.raises(CrewFull):
        crew.submit(lambda: None)


def test_a_system_without_a_thread_to_spare_does_not_end_the_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew("test", 2, 8)

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        jobs = [crew.submit(lambda: 1) for _ in range(4)]
        assert not crew.wait(jobs[0], time.monotonic())
    last = crew.submit(lambda: 2)
    assert crew.wait(last, time.monotonic() + 10)
    assert all(crew.wait(job, time.monotonic() + 10) for job in jobs[1:])
    crew.close()


def test_hung_jobs_do_not_stop_others_and_are_bounded() -> None:
    crew, go = Crew("test", 2, 8), threading.Event()
    hang: Callable[[], object] = lambda: go.wait(20)  # noqa: E731 - the same call many times
    for count in range(1, 5):
        assert not crew.wait(crew.submit(hang), time.monotonic() + 0.05)
        assert crew.hung == count
        if count < 4:
            fine = crew.submit(lambda: 7)
            assert crew.wait(fine, time.monotonic() + 5)
    assert crew.stuck
    waiting = crew.submit(lambda: 7)
    assert not crew.wait(waiting, time.monotonic() + 0.05)
    assert not waiting.started
    go.set()
    eventually(lambda: crew.hung == 0)
    assert crew.late == 4
    fine = crew.submit(lambda: 8)
    assert crew.wait(fine, time.monotonic() + 5)
    crew.close()


def test_many_jobs_from_many_threads_all_end_or_are_given_up() -> None:
    crew = Crew("test", 4, 64)
    ended: list[bool] = []

    def use(seed: int) -> None:
        for at in range(50):
            pause = 0.003 if (seed + at) % 7 == 0 else 0.0
            try:
                job = crew.submit(lambda pause=pause: time.sleep(pause))  # type: ignore[misc]
            except CrewFull:
                continue
            ended.append(crew.wait(job, time.monotonic() + (0.001 if at % 5 == 0 else 5)))

    users = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join(30)
    eventually(lambda: crew.hung == 0)
    assert ended.count(True) > 300
    assert crew._threads <= 8
    crew.close()
    eventually(lambda: crew._threads == 0)
