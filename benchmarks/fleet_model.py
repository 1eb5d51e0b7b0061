"""A modelled worker: a vLLM engine as far as routing can tell, on a virtual clock.

One queue. A step computes up to ``batch_tokens`` tokens: one for every request that decodes, the rest for prompts, in
order of arrival, a long prompt over several steps. It takes ``step`` seconds, plus prompt tokens over ``prefill``, plus
``decode`` for every request that decodes. A prompt's first token comes at the end of the step that computes its last.

The cache holds ``blocks`` blocks of 512 tokens. Those of running requests, with room for their output, are pinned; the
others go least recently used first, and within a prompt from its end. A request is admitted when its blocks fit. Its hit is
its longest run of full blocks in the cache at that moment, less the last token, which is always computed. What was
computed, and what was evicted for it, is reported at the end of the step.

Steps that only decode are taken many at a time, up to the next one that ends a request or meets an arrival: the same
clock, without the work.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import msgspec

from benchmarks.traces import BLOCK_TOKENS, Request


class Rates(msgspec.Struct, frozen=True):
    """How fast a worker is; times in seconds.

    The defaults stand for a model of 8 billion parameters in 16 bits on one H100: 40,000 prompt tokens a second are 640
    of its 989 dense TFLOPS; a step reads 16 GB of weights at 3.35 TB/s; a request that decodes adds its share of
    attention over some thousand tokens of context.
    """

    prefill: float = 40_000.0
    step: float = 0.006
    decode: float = 0.000_1
    batch_tokens: int = 8192
    slots: int = 256


class Job(msgspec.Struct, eq=False):
    """A request at a worker. ``cached_blocks`` once admitted; times in seconds, NaN until they are."""

    request: Request
    arrived: float
    key: int = 0
    cached_blocks: int = 0
    computed: int = 0
    first_token: float = math.nan
    pinned: list[bytes] = []
    private: int = 0


class Outcome(msgspec.Struct):
    """What happened in the steps that just ended, in this order."""

    removed: list[bytes] = []
    stored: list[bytes] = []
    first: list[Job] = []
    finished: list[Job] = []


class BlockCache:
    """Least recently used blocks, of which those in use are pinned. Every operation is O(blocks named)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._used: dict[bytes, int] = {}
        self._private = 0

    def __len__(self) -> int:
        """Blocks that a later request can hit."""
        return len(self._idle) + len(self._used)

    @property
    def room(self) -> int:
        """Blocks that can be reserved."""
        return self.capacity - len(self._used) - self._private

    def run(self, blocks: Sequence[bytes]) -> int:
        """How many blocks, from the first on, are here."""
        for number, block in enumerate(blocks):
            if block not in self._used and block not in self._idle:
                return number
        return len(blocks)

    def pin(self, block: bytes) -> None:
        """One that is here, or that was reserved and is computed now."""
        self._idle.pop(block, None)
        self._used[block] = self._used.get(block, 0) + 1

    def reserve(self, blocks: int) -> list[bytes]:
        """Room for blocks that have no content yet; what was evicted for it. They must fit ``room``."""
        self._private += blocks
        evicted = []
        while self.room < len(self._idle):
            evicted.append(self._idle.popitem(last=False)[0])
        return evicted

    def fill(self, block: bytes) -> bool:
        """A reserved block was computed; whether it was not here before. If it was, it stays a private copy."""
        if block in self._used or block in self._idle:
            return False
        self._private -= 1
        self.pin(block)
        return True

    def release(self, pinned: Iterable[bytes], private: int) -> None:
        """A request ends: its blocks stay, its last block the first to go."""
        self._private -= private
        for block in reversed(list(pinned)):
            self._used[block] -= 1
            if not self._used[block]:
                del self._used[block]
                self._idle[block] = None

    def check(self) -> None:
        """Verify every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        assert not self._used.keys() & self._idle.keys(), "a block is idle and in use"
        assert all(count > 0 for count in self._used.values()), "an unused block is counted as used"
        assert self._private >= 0, "more was released than reserved"
        assert len(self) + self._private <= self.capacity, "more blocks than there is room for"


class ModelledWorker:
    """``submit`` requests; whenever ``next_event`` is due, ``advance``."""

    def __init__(self, blocks: int, rates: Rates) -> None:
        self.rates = rates
        self.cache = BlockCache(blocks)
        self.computed_tokens = 0
        self.next_event = math.inf
        self._waiting: deque[Job] = deque()
        self._prefilling: list[Job] = []
        self._batch: list[tuple[Job, int]] = []
        self._decoding: list[tuple[int, int, Job]] = []
        self._decoded = 0
        self._count = 0
        self._outcome = Outcome()
        self._began = 0.0
        self._steps = 0
        self._step_s = 0.0

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens not computed yet, of requests waiting and running."""
        left = sum(job.request.input_tokens - job.computed for job in self._prefilling)
        return left + sum(self._left(job) for job in self._waiting)

    @property
    def usage(self) -> float:
        """Share of the cache that running requests use."""
        return 1 - self.cache.room / self.cache.capacity

    def submit(self, request: Request, now: float) -> Job:
        """Queue a request.

        Raises:
            ValueError: it would not fit an empty cache.
        """
        if _blocks_of(request) > self.cache.capacity:
            raise ValueError(
                f"a request of {request.input_tokens} tokens needs {_blocks_of(request)} blocks, a worker has "
                f"{self.cache.capacity}: replay with more --blocks"
            )
        job = Job(request, now, self._count)
        self._count += 1
        self._waiting.append(job)
        if self.next_event == math.inf:
            self._begin(now)
        elif not self._batch:
            self._cut_short(now)
        return job

    def advance(self) -> Outcome:
        """End the steps that end at ``next_event`` and begin the next."""
        now, outcome = self.next_event, self._outcome
        self._outcome = Outcome()
        self._decoded += self._steps
        while self._decoding and self._decoding[0][0] <= self._decoded:
            self._finish(heapq.heappop(self._decoding)[2], outcome)
        for job, tokens in self._batch:
            self._prefilled(job, tokens, now, outcome)
        self._begin(now)
        return outcome

    def _left(self, job: Job) -> int:
        hit = self.cache.run(_cacheable(job.request))
        return job.request.input_tokens - hit * BLOCK_TOKENS

    def _begin(self, now: float) -> None:
        rates = self.rates
        budget = rates.batch_tokens - len(self._decoding)
        self._batch = []
        for job in self._prefilling:
            budget -= self._schedule(job, budget)
        while budget > 0 and self._waiting and self.running < rates.slots and self._admit(self._waiting[0]):
            job = self._waiting.popleft()
            self._prefilling.append(job)
            budget -= self._schedule(job, budget)
        if not self._batch and not self._decoding:
            self.next_event = math.inf
            return
        prompt_tokens = sum(tokens for _, tokens in self._batch)
        self.computed_tokens += prompt_tokens
        self._began = now
        self._step_s = rates.step + prompt_tokens / rates.prefill + len(self._decoding) * rates.decode
        self._steps = 1 if self._batch else self._decoding[0][0] - self._decoded
        self.next_event = now + self._steps * self._step_s

    def _cut_short(self, now: float) -> None:
        """Somebody came while only decoding: the step under way is the last one before the batch is formed anew."""
        self._steps = min(self._steps, max(1, math.ceil((now - self._began) / self._step_s)))
        self.next_event = self._began + self._steps * self._step_s

    def _schedule(self, job: Job, budget: int) -> int:
        tokens = min(budget, job.request.input_tokens - job.computed)
        if tokens > 0:
            self._batch.append((job, tokens))
        return max(tokens, 0)

    def _admit(self, job: Job) -> bool:
        cacheable = _cacheable(job.request)
        hit = self.cache.run(cacheable)
        for block in cacheable[:hit]:
            self.cache.pin(block)
        need = _blocks_of(job.request) - hit
        if need > self.cache.room:
            self.cache.release(cacheable[:hit], 0)
            return False
        self._outcome.removed += self.cache.reserve(need)
        job.pinned, job.private = list(cacheable[:hit]), need
        job.cached_blocks, job.computed = hit, hit * BLOCK_TOKENS
        return True

    def _prefilled(self, job: Job, tokens: int, now: float, outcome: Outcome) -> None:
        first = job.computed // BLOCK_TOKENS
        job.computed += tokens
        for block in job.request.whole[first : job.computed // BLOCK_TOKENS]:
            if self.cache.fill(block):
                job.pinned.append(block)
                job.private -= 1
                outcome.stored.append(block)
        if job.computed < job.request.input_tokens:
            return
        self._prefilling.remove(job)
        job.first_token = now
        outcome.first.append(job)
        if job.request.output_tokens <= 1:
            self._finish(job, outcome)
        else:
            heapq.heappush(self._decoding, (self._decoded + job.request.output_tokens - 1, job.key, job))

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self.cache.release(job.pinned, job.private)
        outcome.finished.append(job)


def _blocks_of(request: Request) -> int:
    return -(-(request.input_tokens + request.output_tokens) // BLOCK_TOKENS)


def _cacheable(request: Request) -> tuple[bytes, ...]:
    """The blocks that can be hit: the last token is computed in any case."""
    return request.blocks[: (request.input_tokens - 1) // BLOCK_TOKENS]
