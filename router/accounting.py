"""What was decided, what came of it, and whether the index was right.

Every routed request leaves a ``Decision``. The worker's ``Admitted`` message, or else the ``cached_tokens`` of its
response, says what was really reused; that is compared with the prediction, once per request. A worker that reuses less
than predicted again and again loses trust and is listed again.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from kv_protocol.messages import TIERS, Admitted
from router.metrics import Metrics
from router.workers import Worker

# The engine's own dress around an external request id: its kind before it, prompt number and a random tail after it.
_KIND = re.compile(r"^(?:chatcmpl|cmpl|generate-tokens)-")
_TAILS = (re.compile(r"-[0-9a-f]{8}$"), re.compile(r"-\d+$"), re.compile(r"-\d+-[0-9a-f]{8}$"))


class Decision(msgspec.Struct, eq=False):
    """One routed request. Tokens throughout; times in seconds; ``at`` is Unix time. ``actual_hit_tokens`` is what the worker
    reported by tier, None until it did; ``missing`` the first chunk, in hexadecimal, that its worker lacked; ``parts`` the pieces a stream came in."""

    request_id: str
    at: float
    endpoint: str
    model: str
    worker: str = ""
    reason: str = ""
    tokenized_by: str = "nobody"
    prompt_tokens: int = 0
    predicted_hit_tokens: int = 0
    missing: str = ""
    actual_hit_tokens: dict[str, int] | None = None
    cached_tokens: int | None = None
    attempts: int = 0
    parts: int = 0
    status: int = 0
    outcome: str = "running"
    ttft_s: float | None = None
    duration_s: float | None = None


class _Open(msgspec.Struct, eq=False):
    """A decision whose outcome is not known yet."""

    decision: Decision
    worker: Worker
    prompts: int
    tolerance: int
    countable: bool
    judged: bool = False
    totalled: bool = False


class Accounting:
    """The last decisions, and the comparison of prediction and outcome. Memory is bounded by ``keep``."""

    def __init__(
        self,
        keep: int,
        metrics: Metrics,
        distrusted: Callable[[Worker], None],
        miscounted: Callable[[Worker, Decision, int], None],
    ) -> None:
        self._recent: deque[Decision] = deque(maxlen=keep)
        self.routed = 0
        """Decisions made since the start."""
        self._keep = max(keep, 1024)
        self._open: dict[str, _Open] = {}
        self._metrics = metrics
        self._distrusted = distrusted
        self._miscounted = miscounted

    def sent(self, decision: Decision, worker: Worker, prompts: int, tolerance: int) -> None:
        """A request goes to a worker, maybe after another failed it. ``tolerance`` is the shortfall in tokens that
        whole chunks and whole blocks explain; 0 where nothing was predicted. ``prompts`` is how many Admitted messages
        tell its outcome; 0 where they cannot be told from another's."""
        if decision.attempts == 1:
            self._recent.append(decision)
            self.routed += 1
        request_id = decision.request_id
        previous = self._open.pop(request_id, None) if request_id in self._open else None
        if previous is not None and previous.decision is not decision and previous.decision.outcome == "running":
            prompts = 0  # two at once by one id: whose an Admitted is, nobody can tell
        self._open[request_id] = _Open(decision, worker, prompts, tolerance, prompts == 1)
        if len(self._open) > self._keep:
            del self._open[next(iter(self._open))]

    def admitted(self, worker: Worker, message: Admitted) -> None:
        """The worker says what a request reused. One that is not known is another router's."""
        entry = self._find(message.request_id)
        if entry is None or entry.worker is not worker or entry.prompts <= 0:
            return
        decision = entry.decision
        if entry.countable:
            self.counted(worker, decision, message.prompt_tokens)
        entry.prompts -= 1
        totals = decision.actual_hit_tokens or {}
        hits = {tier: tokens for tier, tokens in message.hit_tokens.items() if tier in TIERS}
        decision.actual_hit_tokens = totals | {tier: totals.get(tier, 0) + tokens for tier, tokens in hits.items()}
        if not entry.totalled:
            for tier, tokens in hits.items():
                self._metrics.actual.labels(worker.name, tier).inc(tokens)
        if not entry.prompts:
            self._judge(entry, sum(decision.actual_hit_tokens.values()))

    def finished(self, decision: Decision) -> None:
        """The response is over."""
        entry = self._open.get(decision.request_id)
        if entry is None or entry.decision is not decision:
            return
        if decision.cached_tokens is not None and not entry.judged:
            if decision.actual_hit_tokens is None:
                entry.totalled = True  # a report that comes later than the answer must not count them again
                self._metrics.actual.labels(decision.worker, "unknown").inc(decision.cached_tokens)
            self._judge(entry, decision.cached_tokens)

    def recent(self, limit: int) -> Iterator[Decision]:
        """The latest decisions, latest first."""
        for decision, _ in zip(reversed(self._recent), range(limit), strict=False):
            yield decision

    def counted(self, worker: Worker, decision: Decision, tokens: int) -> None:
        """The worker says how many tokens a prompt had."""
        if decision.tokenized_by != "router":
            return
        equal = tokens == decision.prompt_tokens
        self._metrics.of_worker(worker.name).counted(equal=equal)
        if not equal:
            self._miscounted(worker, decision, tokens)

    def _find(self, request_id: str) -> _Open | None:
        bare = _KIND.sub("", request_id)
        names = (request_id, bare, *(tail.sub("", bare) for tail in _TAILS))
        return next((self._open[name] for name in names if name in self._open), None)

    def _judge(self, entry: _Open, actual: int) -> None:
        if entry.judged or not entry.tolerance:
            return
        entry.judged = True
        short = entry.decision.predicted_hit_tokens - actual
        result = "over" if short > entry.tolerance else "under" if -short > entry.tolerance else "exact"
        entry.worker.predictions[result] += 1
        self._metrics.predictions.labels(entry.worker.name, result).inc()
        # A hit longer than predicted is another request's work since; only a missing one says the index is wrong.
        if entry.worker.judge(right=result != "over"):
            self._distrusted(entry.worker)
