"""``warmroute drain``: what a worker does before it stops. Fit for a preStop hook.

In this order, within one deadline: the routers named are told to send nothing more; the hottest chunks go to the remote
tier while requests still run; the last requests are waited for, and what they left is handed over too. Without routers
named (those that watch the Kubernetes API see the pod terminate by themselves) and without a report port it still waits.
"""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx

from kv_protocol.errors import MalformedFrame, ProtocolError
from kv_protocol.messages import Bye, FrameDecoder, Heartbeat, Open
from router.discovery.registration import TROUBLE
from router.handover import Handover, hand_over
from router.reports import connect

CALL_S = 5.0
IDLE_BEATS = 2
"""Heartbeats without a request after which none is left: one may have been sent just before routers knew."""


@dataclass(frozen=True)
class Leave:
    """What is asked: the worker's URL and report port here, its name at the routers, and the routers' URLs. ``rank`` is one
    of several data-parallel ranks, whose report port is so much above."""

    url: str
    reports: tuple[str, int] | None
    name: str = ""
    rank: int | None = None
    routers: Sequence[str] = ()
    tier: str = ""
    seconds: float = 60.0
    settle: float = 2.0
    token: str = field(default="", repr=False)
    report_token: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)

    @property
    def address(self) -> tuple[str, int] | None:
        """Of the report port."""
        return None if self.reports is None else (self.reports[0], self.reports[1] + (self.rank or 0))


def run(leave: Leave, ranks: int = 1) -> int:
    """Drain an engine of so many data-parallel ranks; 0 if all was handed over and no request is left, 1 if something was
    not done in time."""
    leaves = [leave] if ranks == 1 else [replace(leave, rank=rank) for rank in range(ranks)]

    async def all_of_them() -> int:
        return max(await asyncio.gather(*map(drain, leaves)))

    return asyncio.run(all_of_them())


async def drain(leave: Leave) -> int:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + leave.seconds
    told = await asyncio.gather(*(_tell(router, leave) for router in leave.routers))
    first = await _hand_over(leave, deadline)
    _say(str(first))
    idle = await _wait_idle(leave, deadline)
    if first.result == "impossible":
        return 0 if all(told) and idle else 1
    last = await _hand_over(leave, deadline) if deadline > loop.time() else first
    if last.chunks:
        _say(str(last))
    return 0 if all(told) and idle and last.result == "done" else 1


async def _tell(router: str, leave: Leave) -> bool:
    headers = {"authorization": f"Bearer {leave.token}"} if leave.token else {}
    name = leave.name or leave.url
    body = {"worker": name if leave.rank is None else f"{name}#{leave.rank}", "drain": True}
    try:
        async with httpx.AsyncClient(timeout=CALL_S) as client:
            answer = await client.post(f"{router.rstrip('/')}/admin/workers/drain", json=body, headers=headers)
        why = "" if answer.is_success else f"it answered {answer.status_code}: {answer.text[:300]}"
    except TROUBLE as error:
        why = str(error) or type(error).__name__
    if why:
        _say(f"{router} could not be told to send nothing more: {why}")
    return not why


async def _hand_over(leave: Leave, deadline: float) -> Handover:
    if (reports := leave.address) is None:
        return Handover("impossible", why="no report port is named")
    seconds = max(0.1, deadline - asyncio.get_running_loop().time())
    return await hand_over(reports, lambda: _wake(leave), token=leave.report_token, tier=leave.tier, seconds=seconds)


async def _wake(leave: Leave) -> None:
    """One token, so that an engine that sleeps takes a step. Whether it is answered does not matter."""
    headers = {"authorization": f"Bearer {leave.api_key}"} if leave.api_key else {}
    headers |= {} if leave.rank is None else {"x-data-parallel-rank": str(leave.rank)}
    try:
        async with httpx.AsyncClient(base_url=leave.url, timeout=CALL_S * 2, headers=headers) as client:
            models = (await client.get("/v1/models")).json()["data"]
            model = next(card["id"] for card in models if not card.get("parent"))
            await client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
    except (*TROUBLE, ValueError, KeyError, TypeError, StopIteration) as error:
        _say(f"the engine could not be asked for a token to wake it: {str(error) or type(error).__name__}")


async def _wait_idle(leave: Leave, deadline: float) -> bool:
    """Whether no request is left; where that cannot be known, whether the time to settle has passed."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, min(leave.settle, deadline - loop.time())))
    if (reports := leave.address) is None:
        return True
    try:
        async with asyncio.timeout_at(deadline):
            await _follow_until_idle(reports, leave.report_token)
    except TimeoutError:
        _say("requests are still running")
        return False
    except (OSError, ProtocolError) as error:
        _say(f"whether requests are left cannot be known: {str(error) or type(error).__name__}")
    return True


async def _follow_until_idle(address: tuple[str, int], token: str) -> None:
    reader, writer = await connect(address, Open(token=token, reader="warmroute drain"))
    decoder, idle = FrameDecoder(), 0
    try:
        while data := await reader.read(256 << 10):
            for message in decoder.feed(data):
                if isinstance(message, Bye):
                    raise MalformedFrame(message.reason)
                if isinstance(message, Heartbeat):
                    idle = 0 if message.running or message.waiting else idle + 1
            if idle >= IDLE_BEATS:
                return
        raise MalformedFrame("the report stream ended")
    finally:
        writer.transport.abort()


def _say(text: str) -> None:
    sys.stderr.write(f"warmroute: {text}\n")
