"""The policies by name."""

import random

from router.config import PolicyName, Settings
from router.policies.base import Candidate, Choice, Policy, Query, candidate
from router.policies.by_header import ByHeader
from router.policies.least_ttft import LeastTtft
from router.policies.load import LeastLoaded, PowerOfTwo, Random, RoundRobin
from router.policies.longest_hit import LongestHit
from router.policies.saturation import Saturation
from router.policies.session import Session
from router.policies.shadow import Comparison, Shadowed

__all__ = ["Candidate", "Choice", "Comparison", "Policy", "Query", "candidate", "comparison_of", "make_policy"]


def make_policy(settings: Settings) -> Policy:
    """The policy that the settings name, seeded as they say; with its shadow, and by request header where allowed."""
    rng = random.Random(settings.seed)  # noqa: S311 - breaks ties, guards nothing
    policy = _make(settings, settings.policy, rng)
    if settings.shadow_policy != "none":
        policy = Shadowed(policy, _make(settings, settings.shadow_policy, random.Random(settings.seed)))  # noqa: S311
    if settings.policy_header:
        return ByHeader(policy, lambda name: _make(settings, name, rng))
    return policy


def comparison_of(policy: Policy) -> Comparison | None:
    """What a shadow policy found, if one is on."""
    if isinstance(policy, ByHeader):
        policy = policy.default
    return policy.comparison if isinstance(policy, Shadowed) else None


def _make(settings: Settings, name: PolicyName, rng: random.Random) -> Policy:
    match name:
        case "longest-hit":
            return LongestHit(rng, settings.saturation_seconds, settings.saturation_tokens)
        case "least-ttft":
            return LeastTtft(rng, settings.compute_weight)
        case "least-loaded":
            return LeastLoaded(rng)
        case "power-of-two":
            return PowerOfTwo(rng)
        case "round-robin":
            return RoundRobin()
        case "session":
            saturation = Saturation(settings.saturation_seconds, settings.saturation_tokens)
            return Session(rng, settings.session_header, saturation)
        case "random":
            return Random(rng)
