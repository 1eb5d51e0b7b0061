"""What a key may use: requests and tokens per minute, and requests at once.

A limit per minute is a bucket that holds one minute's worth and fills evenly. The tokens of a prompt are taken when the
request is admitted; those of its answer when they are known, which may leave the bucket in debt: the next request waits
until it is paid. All of it is arithmetic on the event loop, O(1), without timers.
"""

import math
import re

from router.errors import Limited

_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,15})(?!\d)')
_NAMES = (b'"completion_tokens":', b'"output_tokens":')


class Bucket:
    """``per_minute`` tokens at most, filling at that rate."""

    __slots__ = ("_at", "_level", "_rate", "capacity")

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = float(per_minute)
        self._rate = per_minute / 60.0
        self._level = self.capacity
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; negative while in debt."""
        level = self._level + (now - self._at) * self._rate
        self._level = level = min(level, self.capacity)
        self._at = now
        return level

    def take(self, amount: float) -> None:
        """Take it whether or not it is there. Call ``level`` first."""
        self._level -= amount

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is there, as of the last ``level``."""
        return max(0.0, (amount - self._level) / self._rate)

    def resize(self, per_minute: int, now: float) -> None:
        """Another limit; what was used under the last one stays used."""
        used = self.capacity - self.level(now)
        self.capacity = float(per_minute)
        self._rate = per_minute / 60.0
        self._level = self.capacity - used


class Usage:
    """One key's use of its limits, and its totals since the start."""

    __slots__ = ("_concurrency", "_name", "_requests", "_tokens", "in_flight", "limited", "requests", "tokens")

    def __init__(self, name: str) -> None:
        self._name = name
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._concurrency = 0
        self.in_flight = 0
        self.requests = 0
        self.tokens = {"prompt": 0, "completion": 0}
        self.limited = {"requests": 0, "tokens": 0, "concurrency": 0}

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens of answers have to be looked for."""
        return self._tokens is not None

    def limit(self, *, requests: int | None, tokens: int | None, concurrency: int | None, now: float) -> None:
        """Set the limits, None for none. Use so far still counts."""
        self._requests = _resized(self._requests, requests, now)
        self._tokens = _resized(self._tokens, tokens, now)
        self._concurrency = concurrency or 0

    def enter(self, now: float) -> None:
        """Count a request; ``leave`` ends it.

        Raises:
            Limited: a limit is reached. Nothing was counted.
        """
        if self._concurrency and self.in_flight >= self._concurrency:
            raise self._refusal("concurrency", f"{self._concurrency} requests at once", 1.0)
        tokens, requests = self._tokens, self._requests
        if tokens is not None and tokens.level(now) <= 0:
            raise self._refusal("tokens", f"{tokens.capacity:.0f} tokens per minute", tokens.wait(1))
        if requests is not None:
            if requests.level(now) < 1:
                raise self._refusal("requests", f"{requests.capacity:.0f} requests per minute", requests.wait(1))
            requests.take(1)
        self.in_flight += 1
        self.requests += 1

    def leave(self) -> None:
        self.in_flight -= 1

    def prompt(self, tokens: int, now: float) -> None:
        """Take a prompt's tokens.

        Raises:
            Limited: they are not there. Nothing was taken.
        """
        bucket = self._tokens
        if bucket is not None:
            if tokens > bucket.level(now):
                raise self._too_long(tokens, bucket)
            bucket.take(tokens)
        self.tokens["prompt"] += tokens

    def completion(self, tokens: int, now: float) -> None:
        """Take an answer's tokens, if need be as a debt."""
        if self._tokens is not None:
            self._tokens.level(now)
            self._tokens.take(tokens)
        self.tokens["completion"] += tokens

    def _too_long(self, tokens: int, bucket: Bucket) -> Limited:
        what = f"{bucket.capacity:.0f} tokens per minute"
        if tokens > bucket.capacity:
            return self._refusal("tokens", f"{what}, and this prompt alone has {tokens}", None)
        return self._refusal("tokens", f"{what}, and this prompt has {tokens}", bucket.wait(tokens))

    def _refusal(self, kind: str, what: str, wait: float | None) -> Limited:
        self.limited[kind] += 1
        text = f"key {self._name!r} may use {what}"
        if wait is None:
            return Limited(f"{text}: shorten it, or ask for a higher limit", kind=kind)
        return Limited(f"{text}: try again in {math.ceil(wait)} s", kind=kind, retry_after=wait)


class Meter:
    """Counts the tokens of one answer while it passes: as the worker says, else one for each event of a stream."""

    __slots__ = ("_events", "_said", "_tail")

    def __init__(self) -> None:
        self._events = 0
        self._said: int | None = None
        self._tail = b""

    @property
    def tokens(self) -> int:
        return self._events if self._said is None else self._said

    def scan(self, data: bytes) -> None:
        """Look at more of the body."""
        if b'_tokens":' in data:
            self.read(data)
        self.count(data)

    def count(self, data: bytes) -> None:
        """Count its events."""
        self._events += data.count(b"\ndata: {") + data.startswith(b"data: {")

    def read(self, data: bytes) -> None:
        """See what the worker says of them. Inside a JSON string the pattern cannot occur unescaped."""
        last = max(map(data.rfind, _NAMES))
        if last < 0:
            return
        if (found := _COMPLETION.match(data, last)) is not None:
            self._said = int(found[1])
        elif earlier := _COMPLETION.findall(data, 0, last):
            self._said = int(earlier[-1])


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket
