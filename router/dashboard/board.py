"""What one process keeps for the dashboard, and how the processes of a gateway draw one picture together."""

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from router.dashboard.live import Changes, Cursor, Live, changes
from router.dashboard.prefixes import KEPT, Hashes, Prompt, paths
from router.dashboard.timeline import Rows, Timeline

if TYPE_CHECKING:
    from router.app import Gateway


class Board:
    """What one process keeps for the dashboard, and what it tells the other processes of it."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        self.enabled = gateway.settings.dashboard
        self.prompts: deque[Hashes] = deque(maxlen=KEPT if self.enabled else 0)
        """Chunk hashes of the latest prompts; the request path appends what it made anyway."""
        self.timeline = Timeline(gateway.metrics, gateway.admission)
        self.live = Live(self._changes, lambda: gateway.draining)

    async def on_call(self, operation: str, arguments: Any) -> Any:
        """What another process asks: its part of a picture that is drawn there. None for what is not known here."""
        match operation:
            case "dashboard-timeline":
                self.timeline.look()
                return self.timeline.rows(float(arguments))
            case "dashboard-decisions":
                return msgspec.to_builtins(self._own_changes(arguments))
            case "dashboard-queued":
                return self._gateway.admission.queued
            case "dashboard-prompts":
                return msgspec.to_builtins(paths(self.prompts), builtin_types=(bytes,))
            case _:
                return None

    async def rows(self, seconds: float) -> Rows:
        """Of all processes."""
        self.timeline.look()
        rows = self.timeline.rows(seconds)
        for answer in (await self._gateway.control.siblings.ask("dashboard-timeline", seconds)).values():
            rows += answer
        return rows

    async def queued(self) -> int:
        """Requests that wait to be served, of all processes."""
        others = await self._gateway.control.siblings.ask("dashboard-queued")
        return self._gateway.admission.queued + sum(map(int, others.values()))

    async def paths(self) -> list[Prompt]:
        """Of all processes."""
        found = paths(self.prompts)
        for answer in (await self._gateway.control.siblings.ask("dashboard-prompts")).values():
            found += msgspec.convert(answer, list[Prompt])
        return found

    async def _changes(self, cursors: Any) -> dict[int, Changes]:
        siblings = self._gateway.control.siblings
        found = {siblings.number: self._own_changes(cursors)}
        for number, answer in (await siblings.ask("dashboard-decisions", cursors)).items():
            found[number] = msgspec.convert(answer, Changes)
        return found

    def _own_changes(self, cursors: Any) -> Changes:
        given = cursors.get(str(self._gateway.control.siblings.number))
        return changes(self._gateway.accounting, msgspec.convert(given, Cursor) if given is not None else None)
