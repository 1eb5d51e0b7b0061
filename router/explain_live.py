"""What a worker itself says, now, of a chunk that its hit lacked: where it is, or which tier might have it and why it
cannot be told."""

import asyncio
from typing import Any

from router.cache_control import ask_worker

_LOWER = ("disk", "remote")


async def look(address: tuple[str, int], chunk: bytes, token: str) -> dict[str, Any]:
    """``cause``, ``why`` and the ``tiers`` that hold the chunk. Asks the worker twice at once; never raises for it."""
    (found, error), (stats, also) = await asyncio.gather(
        ask_worker(address, "lookup", {"chunks": chunk, "ask": True}, token), ask_worker(address, "stats", {}, token)
    )
    if error or also:
        return {"tiers": [], "cause": "unreachable", "why": f"the worker does not say: {error or also}"}
    try:
        return judge([str(tier) for tier in found[chunk.hex()]], dict(stats))
    except (AttributeError, KeyError, TypeError, ValueError):
        return {
            "tiers": [],
            "cause": "unreachable",
            "why": "the worker's answer cannot be read: is it an older version?",
        }


def judge(tiers: list[str], stats: dict[str, Any]) -> dict[str, Any]:
    """The likeliest cause, from the tiers that hold the chunk and the worker's figures."""
    lower = {name: dict(told) for name, told in stats.get("tiers", {}).items()}
    silent = {name: _state(told) for name, told in lower.items() if not told.get("serving", True)}
    refusing = [f"{name} takes nothing ({told['writing']})" for name, told in lower.items() if told.get("writing")]
    if held_above := [tier for tier in tiers if tier not in _LOWER]:
        return _because(tiers, "held", f"it is in {_list(held_above)}: it came since, or its report is on its way")
    if serving := [tier for tier in tiers if tier not in silent]:
        return _because(tiers, "held_below", f"it is in {_list(serving)}, and would be fetched from there")
    if silent:
        states = "; ".join(f"{name}: {state}" for name, state in silent.items())
        text = f"it is in {_list(tiers)}, which does not serve" if tiers else "it may be in a tier that does not serve"
        return _because(tiers, "tier_failure", f"{text} ({states})")
    if unlisted := [name for name, told in lower.items() if not told.get("scanned", True)]:
        return _because(tiers, "not_listed", f"it is in no tier that is known; {_list(unlisted)} is still being listed")
    if refusing:
        return _because(tiers, "tier_failure", f"it is in no tier; {', '.join(refusing)}" + _failures(stats))
    return _because(tiers, "absent", "it is in no tier" + _failures(stats))


def _failures(stats: dict[str, Any]) -> str:
    """What went wrong in this worker's tiers since it started, which may have taken the chunk."""
    counts = stats.get("counts", {})
    causes = {
        "evictions": "evicted",
        "damaged_chunks": "found damaged",
        "failed_loads": "failed to load",
        "failed_saves": "were not taken",
        "missing_chunks": "were gone when fetched",
    }
    parts = [
        f"{count:,.0f} {text} ({tier})"
        for name, text in causes.items()
        for tier, count in counts.get(name, {}).items()
        if count
    ]
    return f"; of its chunks, since it started, {', '.join(parts)}" if parts else ""


def _state(told: dict[str, Any]) -> str:
    return f"its circuit breaker is {told['breaker']}" if told.get("breaker") else "unavailable"


def _list(tiers: list[str]) -> str:
    return " and ".join(tiers)


def _because(tiers: list[str], cause: str, text: str) -> dict[str, Any]:
    return {"tiers": tiers, "cause": cause, "why": text}
