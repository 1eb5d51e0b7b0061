"""The workers: what each serves, whether it can take requests, how loaded it is, and what is known of its cache."""

import math
from collections.abc import Container, Iterable
from typing import Literal

import msgspec

from kv_protocol.messages import Heartbeat, Hello
from router.breaker import Breaker
from router.config import WorkerSpec
from router.errors import Conflict
from router.pace import Pace
from router.upstream import Upstream

IN_TRANSIT_S = 0.25
"""A request sent less than this before a heartbeat may be missing from the load the heartbeat names."""
DECODE_TOKENS = 64
"""What a running request weighs in the load beside its uncached tokens, so that decoding fills a worker up too."""
TRUST_FLOOR = 0.5
_TRUST_STEP = 0.2
_AVERAGE_STEP = 0.2
_SHARED_BEATS = 60
_SHARED_TOKENS = 4096

Parity = Literal["unchecked", "exact", "mismatch", "unavailable"]


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of a worker's ``/v1/models``; ``parent`` is set for a LoRA adapter."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    created: int = 0
    owned_by: str = "vllm"


class Flight(msgspec.Struct, eq=False):
    """A request on its way: the prompt tokens the worker still has to compute, as far as is known, and those that it
    had to when the request was sent. ``due`` is what it had to compute up to the first token, this prompt included, and
    ``first_at`` when that came, where that is to be learned from."""

    sent_at: float
    uncached: int
    tokens: int = 0
    due: int = 0
    first_at: float = 0.0


class Load:
    """Uncached tokens a worker still has to compute.

    The router counts what it sends, from the moment it sends it. A worker with the connector also says how many tokens
    wait, whoever sent them. That figure is shared out among the requests sent from here, the latest first, for a worker
    computes in order of arrival: the oldest may be computed in part or, where an answer comes only as a whole,
    altogether. What is left of the figure is other routers'.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.own = 0
        self.others = 0
        self._flights: dict[Flight, None] = {}
        self._shared_beats = 0

    @property
    def shared(self) -> bool:
        """Whether another router lately sent to the worker, too."""
        return self._shared_beats > 0

    @property
    def uncached_tokens(self) -> int:
        return self.own + self.others

    def sent(self, flight: Flight) -> None:
        self.in_flight += 1
        self.own += flight.uncached
        flight.tokens = flight.uncached
        self._flights[flight] = None

    def computed(self, flight: Flight) -> None:
        """The first byte came: the prompt is computed. Calling it again changes nothing."""
        self.own -= flight.uncached
        flight.uncached = flight.tokens = 0

    def finished(self, flight: Flight) -> None:
        self.computed(flight)
        self.in_flight -= 1
        self._flights.pop(flight, None)

    def heartbeat(self, uncached_tokens: int, now: float) -> None:
        """Take the worker's own figure. O(requests in flight)."""
        left = uncached_tokens
        for flight in reversed(self._flights):
            remaining = min(flight.tokens, left)
            left -= remaining
            if now - flight.sent_at >= IN_TRANSIT_S:
                self.own += remaining - flight.uncached
                flight.uncached = remaining
        self.others = left
        self._shared_beats = _SHARED_BEATS if left >= _SHARED_TOKENS else max(0, self._shared_beats - 1)

    def unreported(self) -> None:
        """The worker's figure is gone: what was sent from here is all that counts."""
        for flight in self._flights:
            flight.uncached = flight.tokens
        self.own = sum(flight.uncached for flight in self._flights)
        self.others = 0


class Following(msgspec.Struct, eq=False):
    """KV events being followed: where they come from, whether what was missed can be replayed, whether everything the
    engine holds was heard of, and whether that is known by now, the last batch's number, and the blocks on record."""

    endpoint: str
    replayed: bool
    complete: bool = False
    settled: bool = False
    sequence: int = -1
    blocks: int = 0


class Worker:
    """One engine: the unit requests are routed to."""

    def __init__(self, spec: WorkerSpec, upstream: Upstream, breaker: Breaker) -> None:
        self.name = spec.title
        self.header_name = self.name.encode("ascii", "replace")
        self.rank_header = (b"x-data-parallel-rank", b"%d" % spec.rank) if spec.rank is not None else None
        self.spec = spec
        self.upstream = upstream
        self.breaker = breaker
        self.load = Load()
        self.pace = Pace()
        self.average_load = 0.0
        self.up = False
        self.down_reason = "not checked yet"
        self.draining = False
        """Whether it gets no further request: it leaves, is drained by hand, or is held."""
        self.departing = False
        self.gone = False
        """Whether it was taken out, and what is counted under its name is another's."""
        self.hands_over = False
        """Whether it is writing its hottest chunks to the remote tier before it leaves."""
        self.held = ""
        """Why those who named it want no request sent there, though it may come back."""
        self.models: dict[str, ModelCard] = {}
        self.engine_version = ""
        self._hello: Hello | None = None
        self.namespace: tuple[str, int] | None = None
        """Model name and chunk size its chunk hashes descend from; None while nothing of its cache is known."""
        self._assumed: tuple[str, int] | None = None
        self.assumed_chunks = 0
        """Chunks of prompts sent there that count as held where the worker itself does not say."""
        self.following: Following | None = None
        self.events_error = ""
        self.heartbeat: Heartbeat | None = None
        self.heartbeat_at = 0.0
        self.prefill_speed = 0.0
        """Tokens per second as the worker measured it; 0 where unknown, or where its figure is none."""
        self.synced = False
        self.reports_error = ""
        self.parity: Parity = "unchecked"
        self.takes_token_ids = False
        self.recheck_after = 0.0
        self.sent_ids = 0
        self.has_tokenize = True
        self.trust = 1.0
        self.relists: dict[str, int] = {}
        self.digests_checked = 0
        self.digest_mismatches = 0
        self.epochs = 0
        self.predictions = {"exact": 0, "over": 0, "under": 0}

    @property
    def source(self) -> Literal["connector", "events", "routed", "none"]:
        """Where knowledge of its cache comes from: its connector's reports, its engine's KV events, or what was sent there."""
        if self._hello is not None:
            return "connector"
        if self.following is not None:
            return "events"
        return "routed" if self.assumes else "none"

    @property
    def assumes(self) -> bool:
        """Whether prompts sent there are taken to be held, nobody else telling everything that is. A worker whose connector
        spoke once is not guessed at while it is silent: it may be another process."""
        return (
            self._hello is None
            and self.assumed_chunks > 0
            and not self.epochs
            and not self.gone
            and (self.following is None or (self.following.settled and not self.following.complete))
        )

    @property
    def knows_all(self) -> bool:
        """Whether everything it holds is known."""
        return self.synced or (self.following is not None and self.following.complete)

    def assume(self, namespace: tuple[str, int], chunks: int) -> None:
        """What its chunk hashes descend from, and how many chunks fit, as long as it does not say so itself."""
        self._assumed, self.assumed_chunks = namespace, chunks
        self._name_chunks()

    def follow(self, following: Following | None) -> None:
        """Its KV events are being followed, or no longer."""
        self.following = following
        self._name_chunks()

    def _name_chunks(self) -> None:
        if self._hello is not None:
            self.namespace = (self._hello.model, self._hello.chunk_size)
        else:
            self.namespace = self._assumed if self.source != "none" else None

    @property
    def assumed(self) -> tuple[str, int] | None:
        """What its chunk hashes are taken to descend from."""
        return self._assumed

    def relisted(self, cause: str) -> None:
        """Count that what is known of its cache is built again."""
        self.relists[cause] = self.relists.get(cause, 0) + 1

    @property
    def hello(self) -> Hello | None:
        """How its report stream introduced itself; None while there is none."""
        return self._hello

    @hello.setter
    def hello(self, hello: Hello | None) -> None:
        self._hello = hello
        self._name_chunks()

    @property
    def weight(self) -> int:
        """Its load in tokens: what waits to be computed, and a share for each request it runs."""
        load, beat = self.load, self.heartbeat
        running = load.in_flight
        if beat is not None and beat.running + beat.waiting > running:
            running = beat.running + beat.waiting
        return load.own + load.others + DECODE_TOKENS * running

    def max_model_len(self, model: str) -> int:
        """Longest context in tokens; 0 where unknown."""
        card = self.models.get(model)
        return (card.max_model_len or 0) if card is not None else 0

    def context(self, model: str, base: str) -> int:
        """Longest context in tokens; 0 where unknown. An adapter's is its base model's unless it names its own."""
        return self.max_model_len(model) or self.max_model_len(base)

    def available(self, now: float) -> bool:
        """Whether a request may be sent to it."""
        return self.up and not self.draining and (not self.breaker.badness or self.breaker.allows(now))

    def judge(self, *, right: bool) -> bool:
        """Take a prediction's outcome into account; whether trust just fell below the floor."""
        before = self.trust
        self.trust += _TRUST_STEP * ((1.0 if right else 0.0) - self.trust)
        return before >= TRUST_FLOOR > self.trust

    def believed(self, tokens: int) -> int:
        """Hit tokens as far as they can be counted on."""
        return tokens if self.trust >= TRUST_FLOOR else int(tokens * self.trust)

    def mark_down(self, reason: str) -> None:
        self.up = False
        self.down_reason = reason
        self.upstream.close_idle()

    def beat(self, heartbeat: Heartbeat, now: float) -> None:
        """Take a heartbeat. The average of its load goes over the last few."""
        self.heartbeat = heartbeat
        self.heartbeat_at = now
        speed = heartbeat.prefill_speed
        self.prefill_speed = speed if 0 < speed < math.inf else 0.0
        self.load.heartbeat(heartbeat.uncached_tokens, now)
        self.average_load += _AVERAGE_STEP * (self.weight - self.average_load)

    def answered(self, flight: Flight) -> None:
        """A prompt of which nothing was loaded was answered: learn from how long the first token took."""
        self.pace.observe(flight.due, flight.first_at - flight.sent_at)

    def forget_reports(self) -> None:
        """The report stream is gone, and with it what was known from it."""
        self.hello = self.heartbeat = None
        self.prefill_speed = 0.0
        self.average_load = 0.0
        self.synced = False
        self.load.unreported()


def least_bad(workers: Iterable[Worker], exclude: Container[str] = ()) -> list[Worker]:
    """Where every breaker is open, no worker is kept out by its breaker alone: those that opened the fewest times in a
    row. Empty where none is up. O(workers)."""
    left = [worker for worker in workers if worker.up and not worker.draining and worker.name not in exclude]
    least = min((worker.breaker.badness for worker in left), default=0)
    return [worker for worker in left if worker.breaker.badness == least]


class Pool(msgspec.Struct, frozen=True):
    """The workers that serve one model name. ``lora`` is the adapter's name, empty for a base model; ``base`` the model
    it belongs to. Contexts are in tokens: ``longest`` is the longest of all, 0 unless every worker's is known,
    ``shortest`` the shortest of those known, 0 where none is."""

    model: str
    base: str
    lora: str
    root: str
    workers: tuple[Worker, ...]
    longest: int = 0
    shortest: int = 0


class Registry:
    """All workers, and the pools they form."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._pools: dict[str, Pool] = {}

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    @property
    def pools(self) -> dict[str, Pool]:
        """By model name."""
        return self._pools

    def add(self, worker: Worker) -> None:
        """Raises:
        Conflict: another worker has the name or the URL.
        """
        for other in self._workers.values():
            if other.name == worker.name or other.spec.url == worker.spec.url:
                raise Conflict(f"worker {other.name} at {other.spec.url} is there already", param="url")
        self._workers[worker.name] = worker
        self.regroup()

    def remove(self, name: str) -> Worker | None:
        worker = self._workers.pop(name, None)
        self.regroup()
        return worker

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def find(self, name: str) -> Worker | None:
        """By name or by URL."""
        return self._workers.get(name) or next((w for w in self._workers.values() if w.spec.url == name), None)

    def regroup(self) -> None:
        """Form the pools anew from the workers' model lists. Models of workers that are down stay known."""
        members: dict[str, list[Worker]] = {}
        for worker in self._workers.values():
            for model in worker.models:
                members.setdefault(model, []).append(worker)
        self._pools = {model: _pool(model, workers) for model, workers in members.items()}

    @property
    def undescribed(self) -> int:
        """Workers whose models are not known yet."""
        return sum(not worker.models for worker in self._workers.values())


def _pool(model: str, workers: list[Worker]) -> Pool:
    card = workers[0].models[model]
    parent = card.parent or ""
    base = parent or model
    root = next((w.models[base].root for w in workers if base in w.models and w.models[base].root), None)
    contexts = [worker.context(model, base) for worker in workers]
    known = [context for context in contexts if context]
    longest = max(contexts) if len(known) == len(contexts) else 0
    lora = model if parent else ""
    return Pool(model, base, lora, root or "", tuple(workers), longest, min(known, default=0))
