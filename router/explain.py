"""Why a request goes where it goes, and where its hit ends and why.

A hit ends at the first chunk the worker does not hold. What became of that chunk is read from what workers reported
lately, from the index, and from earlier requests that lacked the same chunk.
"""

import asyncio
import time
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from kv_protocol.hashing import root_hash
from router.errors import NotFound
from router.explain_live import look
from router.workers import Worker

if TYPE_CHECKING:
    from router.app import Gateway
    from router.choosing import Namespace, Plan, Routed

MOST_HOLDERS = 16
"""Workers told of one chunk; others that hold it are counted."""
_MOST_NAMED = 4


class _Known:
    """What is known of all workers together, looked up once for as many of them as are explained."""

    def __init__(self, gateway: "Gateway", recent: list[dict[str, Any]]) -> None:
        self.gateway = gateway
        self._holders: dict[bytes, dict[str, list[str]]] = {}
        self._other_names: dict[Namespace, str | None] = {}
        self._lacking: dict[str, list[dict[str, Any]]] = {}
        for request in recent:
            self._lacking.setdefault(request["missing"], []).append(request)

    def lacking(self, chunk: bytes) -> list[dict[str, Any]]:
        """The latest requests whose hit ended at a chunk."""
        return self._lacking.get(chunk.hex(), [])

    def holders(self, chunk: bytes) -> dict[str, list[str]]:
        """Who holds a chunk, and in which tiers. O(workers) once."""
        if chunk not in self._holders:
            self._holders[chunk] = _holders(self.gateway, chunk)
        return self._holders[chunk]

    def under_another_name(self, plan: "Plan", namespace: "Namespace") -> str | None:
        """Whether workers whose chunks have other names hold a prompt. O(workers) once for each namespace."""
        if namespace not in self._other_names:
            others = {known for peer in self.gateway.registry.workers if (known := peer.namespace)} - {namespace}
            found = (_under_another_name(self.gateway, plan, other, namespace) for other in sorted(others))
            self._other_names[namespace] = next(filter(None, found), None)
        return self._other_names[namespace]


async def explain_body(
    gateway: "Gateway", plan: "Plan", routed: "Routed | None", *, live: bool = False
) -> list[dict[str, Any]]:
    """For each worker that could take a request: where its hit would end, and why. With ``live``, each
    worker is asked itself where the first missing chunk is now."""
    if routed is None:
        return []
    recent = await gateway.control.requests(gateway.settings.recent_requests)
    known = _Known(gateway, recent)
    ends = [_end_of(known, plan, item.worker) for item in routed.candidates]
    if live:
        await asyncio.gather(
            *(_ask(gateway, item.worker, end) for item, end in zip(routed.candidates, ends, strict=True))
        )
    return ends


async def explain_id(gateway: "Gateway", request_id: str, *, live: bool = False) -> dict[str, Any]:
    """A request that was routed: its decision, and where its hit ended at its worker, and why.

    Raises:
        NotFound: it is not among the latest.
    """
    recent = await gateway.control.requests(gateway.settings.recent_requests)
    decision = next((item for item in recent if item["request_id"] == request_id), None)
    if decision is None:
        raise NotFound(
            f"no request {request_id!r} among the last {len(recent)}; recent_requests says how many are kept",
            param="id",
            code="request_not_found",
        )
    end = _end_then(_Known(gateway, recent), decision)
    if live and (worker := gateway.registry.get(decision["worker"])) is not None:
        await _ask(gateway, worker, end)
    return {"decision": decision, "end": end}


async def _ask(gateway: "Gateway", worker: Worker, end: dict[str, Any]) -> None:
    if end.get("first_missing") and worker.spec.report_address is not None:
        token = gateway.settings.report_token.get_secret_value()
        end["live"] = await look(worker.spec.report_address, bytes.fromhex(end["first_missing"]), token)


def _end_of(known: _Known, plan: "Plan", worker: Worker) -> dict[str, Any]:
    gateway = known.gateway
    end: dict[str, Any] = {"worker": worker.name, "held_chunks": 0, "chunks": 0}
    if (namespace := worker.namespace) is None:
        return end | _because("not_watched", _not_watched(worker))
    if not plan.tokenized.prompts:
        return end | _because(
            "not_tokenized", f"the prompt's tokens are not known: {plan.tokenized.why or 'no prompt'}"
        )
    chunks = gateway.pipeline.chooser.chunks(plan, namespace)
    held = gateway.index.lookup(chunks, [worker.name])[worker.name].total
    end |= {"held_chunks": held, "chunks": len(chunks), "chunk_size": namespace[1]}
    if held >= len(chunks):
        return end | _because("complete", _complete(plan, namespace))
    why = _why_missing(known, worker, chunks[held], before=time.time())
    if why["cause"] == "never_stored" and (kin := _under_another_root(known, plan, worker, namespace, held)):
        why = _because("other_root", kin)
    return end | {"first_missing": chunks[held].hex()} | why


def _end_then(known: _Known, decision: dict[str, Any]) -> dict[str, Any]:
    worker = known.gateway.registry.get(decision["worker"])
    if worker is None:
        return _because("gone", f"worker {decision['worker']!r} is not there any more")
    if not decision["prompt_tokens"]:
        return _because("not_tokenized", "the prompt's tokens were not known, so it was routed by load")
    if not decision["missing"]:
        watched = worker.namespace is not None
        text = "every whole chunk of the prompt was held" if watched else _not_watched(worker)
        return _because("complete" if watched else "not_watched", text)
    chunk = bytes.fromhex(decision["missing"])
    return {"first_missing": decision["missing"]} | _why_missing(known, worker, chunk, before=decision["at"])


def _why_missing(known: _Known, worker: Worker, chunk: bytes, *, before: float) -> dict[str, Any]:
    """The likeliest cause first. ``before`` is Unix time: what happened later is not the cause."""
    gateway, holders, lacking = known.gateway, known.holders(chunk), known.lacking(chunk)
    why = (
        _departed(gateway, worker, chunk, before)
        or _computing(worker, lacking, before)
        or _cleared(gateway, worker, before)
        or _elsewhere(worker, holders, lacking, before)
        or _never(gateway, worker, before)
    )
    named = dict(islice(holders.items(), MOST_HOLDERS))
    more = {"more_holders": len(holders) - len(named)} if len(holders) > len(named) else {}
    return why | {"held_now_by": named} | more


def _departed(gateway: "Gateway", worker: Worker, chunk: bytes, before: float) -> dict[str, Any] | None:
    departure = gateway.history.last(worker.name, chunk)
    if departure is None or departure.at > before:
        return None
    age = _ago(before - departure.at)
    return _because(
        "evicted",
        f"{worker.name} held this chunk and gave it up {age} before, last in its {departure.tier} tier: "
        "the tiers are smaller than what is asked for again",
    ) | {"tier": departure.tier, "seconds_before": round(before - departure.at, 3)}


def _computing(worker: Worker, lacking: list[dict[str, Any]], before: float) -> dict[str, Any] | None:
    for other in lacking:
        same = other["worker"] == worker.name and other["at"] < before
        if same and (other["outcome"] == "running" or other["at"] + (other["ttft_s"] or 0.0) > before):
            return _because(
                "being_computed",
                f"request {other['request_id']} was computing it there, sent {_ago(before - other['at'])} before",
            )
    return None


def _cleared(gateway: "Gateway", worker: Worker, before: float) -> dict[str, Any] | None:
    clearing = gateway.history.last_clearing(worker.name)
    if clearing is None or clearing.at > before:
        return None
    age = _ago(before - clearing.at)
    text = f"{worker.name}'s {clearing.tier} tier was emptied {age} before, and the chunk has not been stored since"
    return _because("cleared", text) | {"tier": clearing.tier}


def _elsewhere(
    worker: Worker, holders: dict[str, list[str]], lacking: list[dict[str, Any]], before: float
) -> dict[str, Any] | None:
    others = len(holders) - (worker.name in holders)
    if not others:
        return None
    first = islice((name for name in holders if name != worker.name), _MOST_NAMED)
    sent = next(
        (r for r in lacking if r["worker"] in holders and r["worker"] != worker.name and r["at"] < before), None
    )
    text = f"the chunk was computed at {_listed(first, others)}, not at {worker.name}"
    if sent is not None:
        text += f": request {sent['request_id']} went there {_ago(before - sent['at'])} before ({sent['reason']})"
    return _because("elsewhere", text)


def _never(gateway: "Gateway", worker: Worker, before: float) -> dict[str, Any]:
    if worker.source == "routed":
        return _because(
            "never_sent", f"{worker.name} does not say what it holds, and nothing with this chunk was sent there lately"
        )
    since = gateway.history.since(worker.name)
    watched = f" in the {_ago(before - since)} it has been watched" if since is not None and since < before else ""
    return _because(
        "never_stored", f"{worker.name} has not reported this chunk{watched}: the prompt differs from there"
    )


def _holders(gateway: "Gateway", chunk: bytes) -> dict[str, list[str]]:
    found = {}
    for worker in gateway.registry.workers:
        tiers = [tier for tier, count in gateway.index.tiers(worker.name, [chunk]).items() if count]
        if tiers:
            found[worker.name] = tiers
    return found


def _under_another_root(known: _Known, plan: "Plan", worker: Worker, namespace: "Namespace", held: int) -> str | None:
    """Whether the same tokens are held without the request's salt, or for another adapter: kept apart on purpose."""
    gateway, (model, size) = known.gateway, namespace
    prompt = plan.tokenized.prompts[0]
    loras = {pool.lora for pool in gateway.registry.pools.values() if pool.base == plan.pool.base}
    for lora in sorted(loras - {plan.pool.lora}):
        root = root_hash(chunk_size=size, model=model, lora=lora, cache_salt=plan.request.cache_salt)
        if gateway.index.lookup(prompt.chunks(root, size), [worker.name])[worker.name].total > held:
            return f"the same tokens are held for {lora or plan.pool.base!r}: caches of adapters are never shared"
    if why := known.under_another_name(plan, namespace):
        return why
    if plan.request.cache_salt:
        root = root_hash(chunk_size=size, model=model, lora=plan.pool.lora, cache_salt="")
        if gateway.index.lookup(prompt.chunks(root, size), [worker.name])[worker.name].total > held:
            return "the same tokens are held without this cache_salt: caches of different salts are never shared"
    return None


def _under_another_name(gateway: "Gateway", plan: "Plan", other: "Namespace", namespace: "Namespace") -> str | None:
    """Whether the same tokens are held by a worker whose chunks have other names: of another model, or another size."""
    root = root_hash(chunk_size=other[1], model=other[0], lora=plan.pool.lora, cache_salt=plan.request.cache_salt)
    chunks = plan.tokenized.prompts[0].chunks(root, other[1])
    peers = [peer.name for peer in gateway.registry.workers if peer.namespace == other]
    held = gateway.index.lookup(chunks, peers)
    holders = [name for name in peers if held[name].total]
    if not holders:
        return None
    names = _listed(holders[:_MOST_NAMED], len(holders))
    if other[0] == namespace[0]:
        return f"the same tokens are held by {names} in chunks of {other[1]}, not {namespace[1]}: chunk_size differs"
    return (
        f"the same tokens are held by {names} for model {other[0]!r}, not {namespace[0]!r}: if the weights are the same, "
        "give both workers one model_name"
    )


def _complete(plan: "Plan", namespace: "Namespace") -> str:
    size = namespace[1]
    if plan.prompt_tokens < size:
        return f"the prompt's {plan.prompt_tokens} tokens do not fill one chunk of {size}"
    return "every whole chunk of the prompt is held; what is left does not fill a chunk"


def _not_watched(worker: Worker) -> str:
    why = worker.reports_error or worker.events_error or "it has no report port"
    return f"nothing is known of {worker.name}'s cache: {why}"


def _listed(names: Iterable[str], count: int) -> str:
    """The first of so many names, and how many more there are."""
    first = list(names)
    more = f" and {count - len(first)} more" if count > len(first) else ""
    return ", ".join(first) + more


def _because(cause: str, text: str) -> dict[str, Any]:
    return {"cause": cause, "why": text}


def _ago(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
