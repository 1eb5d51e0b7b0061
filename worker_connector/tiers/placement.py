"""Which of several stores hold an object: rendezvous hashing, with weights.

Every store gets a score for a key, and the highest ones hold it. A store that is added takes its share of the keys and
moves no others; one that is removed gives its keys to their next stores. With ``u`` a hash mapped into (0, 1), the score
``-weight / ln(u)`` makes a store win keys in proportion to its weight (Schindelhauer and Schomaker, "Weighted Distributed
Hash Tables", SPAA 2005).
"""

import hashlib
import math
from collections.abc import Sequence

from worker_connector.errors import ConfigurationError


class Placement:
    """Names decide, not positions: the order in which stores are listed does not matter."""

    def __init__(self, names: Sequence[str], weights: Sequence[float] = ()) -> None:
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigurationError(f"{twice} is given twice: every store of a group must be another one")
        if weights and (len(weights) != len(names) or min(weights) <= 0):
            raise ConfigurationError("every store of a group needs a weight above zero, or none has one")
        self._seeds = [hashlib.blake2b(name.encode(), digest_size=32).digest() for name in names]
        self._weights = list(weights) or [1.0] * len(names)

    def order(self, key: str) -> list[int]:
        """All stores, by position in the list that was given, the best first. O(stores)."""
        text = key.encode()
        scores = [self._score(text, at) for at in range(len(self._seeds))]
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)

    def _score(self, key: bytes, at: int) -> float:
        digest = hashlib.blake2b(key, digest_size=8, key=self._seeds[at]).digest()
        share = ((int.from_bytes(digest, "little") >> 11) + 0.5) / (1 << 53)
        return -self._weights[at] / math.log(share)
