"""Threads that wait for stores, so that nobody else has to.

A job that its caller gave up on goes on until the library under it returns; its thread then does not count as busy any
more, so that a few hung calls do not stop all others. How many hung ones there may be is bounded too.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

_IDLE_SECONDS = 30.0


class CrewFull(Exception):
    """Too much is waiting already."""


class Job(Generic[T]):
    """One call on another thread. Its result is taken once; after ``give_up`` nobody takes it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None
        self.ended = threading.Event()
        self.started = False
        self.given_up = False

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Crew:
    """Up to ``size`` jobs at once on daemon threads that come and go with the work; ``waiting`` more may queue."""

    def __init__(self, name: str, size: int, waiting: int) -> None:
        self._name = name
        self._size = size
        self._waiting = waiting
        self._queue: deque[Job[object]] = deque()
        self._wake = threading.Condition()
        self._threads = 0
        self._idle = 0
        self._hung = 0
        self._closed = False
        self.late = 0

    @property
    def hung(self) -> int:
        """Jobs that were given up and have not ended."""
        return self._hung

    @property
    def stuck(self) -> bool:
        """Every thread there may be has a hung job."""
        return self._hung >= 2 * self._size

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """Start ``work``, or queue it.

        Raises:
            CrewFull: the queue is full, or the crew was closed.
        """
        job = Job(work)
        with self._wake:
            if self._closed or len(self._queue) >= self._waiting:
                raise CrewFull
            self._queue.append(job)  # type: ignore[arg-type]
            self._man()
        return job

    def wait(self, job: Job[T], deadline: float) -> bool:
        """True when the job ended in time; otherwise it is given up, and never starts if it had not."""
        if job.ended.wait(max(0.0, deadline - time.monotonic())):
            return True
        with self._wake:
            if job.ended.is_set():
                return True
            job.given_up = True
            if job.started:
                self._hung += 1
                self._man()
            else:
                self._queue.remove(job)  # type: ignore[arg-type]
        return False

    def close(self) -> None:
        """No more jobs are taken; idle threads end."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _man(self) -> None:
        if self._idle:
            self._wake.notify()
        if len(self._queue) > self._idle and self._threads - self._hung < self._size and self._threads < 2 * self._size:
            # Where the system has no thread to spare, those that are there do the work, or the next job tries again.
            with suppress(RuntimeError):
                threading.Thread(target=self._serve, name=f"warmroute-{self._name}", daemon=True).start()
                self._threads += 1

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        job = self._next()
        if job is None:
            return False
        job.run()
        with self._wake:
            job.ended.set()
            if job.given_up:
                self._hung -= 1
                self.late += 1
        return True

    def _next(self) -> "Job[object] | None":
        with self._wake:
            while not self._queue:
                self._idle += 1
                woken = not self._closed and self._wake.wait(_IDLE_SECONDS)
                self._idle -= 1
                if not woken and not self._queue:
                    self._threads -= 1
                    return None
            job = self._queue.popleft()
            job.started = True
            return job
