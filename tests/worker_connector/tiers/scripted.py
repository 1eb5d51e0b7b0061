"""A store in this process's memory whose calls can be made to fail, hang, or answer late."""

import threading
from collections.abc import Sequence

from worker_connector.errors import StoreUnavailable
from worker_connector.tiers.base import DELETED, MISSING, Entry, Outcome, Page, Sink, Source, Status, Store, refused


class ScriptedStore(Store):
    def __init__(self, name: str = "scripted") -> None:
        self.name = name
        self.held: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.full = False
        self.hanging = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.calls: list[str] = []
        self.late_errors: list[BaseException] = []
        self.lock = threading.Lock()

    def hang(self) -> None:
        self.go.clear()

    def release(self) -> None:
        self.go.set()

    def _enter(self, call: str) -> None:
        with self.lock:
            self.calls.append(call)
        if not self.go.is_set():
            self.hanging.set()
            assert self.go.wait(20)
        if self.error is not None:
            raise self.error

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        del deadline
        self._enter("get")
        try:
            return [self._get(key, sink) for key, sink in zip(keys, into, strict=True)]
        except BaseException as error:
            self.late_errors.append(error)
            raise

    def _get(self, key: str, sink: Sink) -> Outcome:
        if key not in self.held:
            return MISSING
        sink.rewind()
        sink.write(self.held[key])
        return sink.finish()

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        del deadline, ttl
        self._enter("put")
        if self.full:
            return [refused("full", "it is full")] * len(keys)
        for key, value in zip(keys, values, strict=True):
            self.held[key] = value.join()
        return [Outcome(Status.STORED, value.size) for value in values]

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        del deadline
        self._enter("exists")
        return [Outcome(Status.FOUND, len(self.held[key])) if key in self.held else MISSING for key in keys]

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        del deadline
        self._enter("delete")
        return [DELETED if self.held.pop(key, None) is not None else MISSING for key in keys]

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        del deadline
        self._enter("scan")
        keys = sorted(key for key in self.held if key > cursor)[:limit]
        return Page([Entry(key, len(self.held[key])) for key in keys], keys[-1] if len(keys) == limit else "")

    def ping(self, deadline: float) -> None:
        del deadline
        self._enter("ping")

    def close(self) -> None:
        self.error = StoreUnavailable(self.name, "closed", "it was closed")
