"""Which chunk a full tier gives up.

A policy orders the chunks that may go; its owner (the ledger, the disk tier) tells it what comes, is used, is held
(pinned by a transfer or by an operator, so not to be evicted), is released again, and goes.
"""

from worker_connector.eviction.arc import AdaptiveReplacement
from worker_connector.eviction.base import EvictionPolicy
from worker_connector.eviction.expiry import Expiring, Expiry
from worker_connector.eviction.lfu import LeastFrequentlyUsed
from worker_connector.eviction.lru import FirstInFirstOut, LeastRecentlyUsed
from worker_connector.eviction.priorities import HIGH, LOW, NORMAL, Prioritised
from worker_connector.eviction.s3fifo import S3Fifo
from worker_connector.eviction.sieve import Sieve

__all__ = [
    "HIGH",
    "LOW",
    "NORMAL",
    "POLICIES",
    "AdaptiveReplacement",
    "EvictionPolicy",
    "Expiring",
    "Expiry",
    "FirstInFirstOut",
    "LeastFrequentlyUsed",
    "LeastRecentlyUsed",
    "Prioritised",
    "S3Fifo",
    "Sieve",
]

POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "arc": AdaptiveReplacement,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "fifo": FirstInFirstOut,
}
"""Policies by the name that the setting ``eviction_policy`` gives them."""
