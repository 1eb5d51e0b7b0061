"""The policies by name."""

import random

from router.config import Settings
from router.policies.base import Candidate, Choice, Policy, Query, candidate
from router.policies.load import LeastLoaded, RoundRobin
from router.policies.longest_hit import LongestHit

__all__ = ["Candidate", "Choice", "Policy", "Query", "candidate", "make_policy"]


def make_policy(settings: Settings) -> Policy:
    """The policy that the settings name, seeded as they say."""
    rng = random.Random(settings.seed)  # noqa: S311 - breaks ties, guards nothing
    match settings.policy:
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded(rng)
        case "longest-hit":
            return LongestHit(rng, settings.saturation_seconds, settings.saturation_tokens)
