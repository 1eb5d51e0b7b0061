"""What ``warmroute cache`` does: asks a gateway or a report port, and shows the answers to people, or as JSON to programs."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from router.cache_control import EVERYTHING, MOST_CHUNKS, ask_worker, summary
from router.config import parse_address
from router.errors import RouterError

TIMEOUT_S = 60.0
_TIERS = ("gpu", "cpu", "disk", "remote")


class CacheError(RouterError):
    """Nothing could be asked; the text says what to do."""


class Target:
    """Who is asked: all workers of a gateway, one of them, or a report port itself."""

    def __init__(self, *, url: str, worker: str = "", at: str = "", token: str = "", report_token: str = "") -> None:
        self._url = url
        self._worker = worker
        self._token = token
        self._report_token = report_token
        self._at = at

    def ask(self, operation: str, what: str, chunks: list[str], arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """An entry for each worker.

        Raises:
            CacheError: nobody could be asked.
        """
        if bool(what) + bool(chunks) + bool(arguments.get("tag")) > 1:
            raise CacheError("give a request, chunks or a tag, not more than one of them")
        given = {name: value for name, value in arguments.items() if value not in (None, "", False)}
        if self._worker:
            if self._at:
                raise CacheError("--at names a worker of a gateway, --worker a report port: give one of them")
            return [self._ask_port(operation, what, chunks, given)]
        return self._ask_gateway(operation, _body(what, chunks), given)

    def _ask_gateway(self, operation: str, body: bytes, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        options = arguments | ({"worker": self._at} if self._at else {})
        url = f"{self._url.rstrip('/')}/admin/cache/{operation}"
        try:
            answer = httpx.post(url, content=body, params=options, headers=headers, timeout=TIMEOUT_S)
            content = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CacheError(f"no gateway answers at {self._url}: {error}. Name it with --url") from error
        except ValueError as error:
            raise CacheError(f"what answers at {self._url} is no gateway: it sent no JSON") from error
        if answer.status_code != httpx.codes.OK:
            raise CacheError(_reason(answer.status_code, content))
        return list(content["workers"])

    def _ask_port(self, operation: str, what: str, chunks: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
        if what:
            raise CacheError("a worker's report port knows no prompts: ask a gateway, or give --chunk")
        if len(chunks) > MOST_CHUNKS:
            raise CacheError(f"{len(chunks)} chunks are too many: {MOST_CHUNKS} fit one operation")
        try:
            address = parse_address(self._worker)
        except ValueError as error:
            raise CacheError(f"--worker {self._worker!r} is no report port: {error}") from error
        sent = arguments | ({"chunks": chunks} if chunks else {})
        if operation == "warm" and not (chunks or "tag" in arguments):
            sent = {"newest": EVERYTHING} | sent
        result, failure = asyncio.run(ask_worker(address, operation, sent, self._report_token))
        entry: dict[str, Any] = {"worker": self._worker}
        if failure:
            return entry | {"error": failure}
        return entry | (summary(result) if operation == "lookup" else {}) | {"result": result}


def run(
    operation: str, target: Target, what: str, chunks: list[str], arguments: dict[str, Any], *, as_json: bool
) -> int:
    """Do an operation and show what came of it; the exit status, 1 if a worker failed.

    Raises:
        CacheError: nobody could be asked.
    """
    entries = target.ask(operation, what, chunks, arguments)
    if as_json:
        print(json.dumps({"operation": operation, "workers": entries}, indent=2))  # noqa: T201 - the command's output
    else:
        _show(Console(markup=False), operation, entries)  # an IPv6 address and a tag may look like markup
    return int(any("error" in entry for entry in entries))


def _body(what: str, chunks: list[str]) -> bytes:
    if chunks:
        return json.dumps({"chunks": chunks}).encode()
    if what == "-":
        return sys.stdin.buffer.read() or b"{}"
    try:
        return Path(what).read_bytes() or b"{}" if what else b""
    except OSError as error:
        raise CacheError(f"cannot read {what}: {error}") from error


def _reason(status: int, content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    text = error.get("message") if isinstance(error, dict) else f"the gateway answered {status}"
    return f"{text}. Name the token with --token or WARMROUTE_ADMIN_TOKEN" if status in (401, 403) else str(text)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _show(console: Console, operation: str, entries: list[dict[str, Any]]) -> None:
    if not entries:
        console.print("there are no workers")
    elif operation == "lookup":
        _show_lookup(console, entries)
    elif operation == "stats":
        _show_stats(console, entries)
    elif operation == "pins":
        _show_pins(console, entries)
    elif operation == "generation":
        _show_generations(console, entries)
    elif operation == "tags":
        _show_tags(console, entries)
    else:
        _show_changes(console, entries)
    for entry in entries:
        if "error" in entry:
            console.print(Text.assemble((entry["worker"], "red"), f": {entry['error']}"))


def _show_lookup(console: Console, entries: list[dict[str, Any]]) -> None:
    table = _table("worker", "chunks", "hit", *_TIERS)
    for entry in _answered(entries):
        held = entry.get("held", {})
        counts = (entry.get("chunks", 0), entry.get("hit_chunks", 0), *(held.get(tier, 0) for tier in _TIERS))
        table.add_row(entry["worker"], *(_number(count) for count in counts))
    console.print(table)


def _show_stats(console: Console, entries: list[dict[str, Any]]) -> None:
    table = _table("worker", "tier", "held", "fits", "hit tokens", "evicted", "failed", "load MB/s", "state")
    for entry in _answered(entries):
        result = entry["result"]
        counts, tiers = result.get("counts", {}), result.get("tiers", {})
        for tier, held in result.get("held_chunks", {}).items():
            told = tiers.get(tier, {})
            failed = sum(counts.get(name, {}).get(tier, 0) for name in ("failed_loads", "failed_saves"))
            row = (
                held,
                counts.get("capacity_chunks", {}).get(tier, 0),
                counts.get("hit_tokens", {}).get(tier, 0),
                counts.get("evictions", {}).get(tier, 0),
                failed,
                told.get("bandwidth", 0) / 1e6,
            )
            table.add_row(entry["worker"], tier, *map(_number, row), _state(told))
    console.print(table)


def _show_pins(console: Console, entries: list[dict[str, Any]]) -> None:
    table = _table("worker", "chunk", "held", "ends in")
    for entry in _answered(entries):
        for each in entry["result"]["pins"]:
            left = each["expires_in_s"]
            ends = "never" if left is None else f"{left:,.0f} s"
            table.add_row(entry["worker"], each["chunk"], "yes" if each["held"] else "not yet", ends)
    console.print(table)


def _show_tags(console: Console, entries: list[dict[str, Any]]) -> None:
    table = _table("worker", "tag", "chunks")
    for entry in _answered(entries):
        for tag, count in entry["result"]["tags"].items():
            table.add_row(entry["worker"], tag, _number(count))
    console.print(table)


def _show_generations(console: Console, entries: list[dict[str, Any]]) -> None:
    table = _table("worker", "weights", "changed now")
    for entry in _answered(entries):
        result = entry["result"]
        name = result["generation"] or "those of the start"
        table.add_row(entry["worker"], name, "yes" if result["changed"] else "no")
    console.print(table)


def _show_changes(console: Console, entries: list[dict[str, Any]]) -> None:
    answered = _answered(entries)
    names = list(dict.fromkeys(name for entry in answered for name, value in entry["result"].items() if _plain(value)))
    table = _table("worker", *names, "at the engine's next step")
    for entry in answered:
        result = entry["result"]
        queued = ", ".join(result.get("queued", ())) or "-"
        table.add_row(entry["worker"], *(_number(result.get(name, 0)) for name in names), queued)
    console.print(table)


def _state(told: dict[str, Any]) -> str:
    if not told:
        return "-"
    state = "serves" if told.get("serving", True) else f"does not serve: {told.get('breaker', 'unavailable')}"
    if told.get("writing"):
        state = f"takes nothing: {told['writing']}"
    return state if told.get("scanned", True) else f"{state}, not listed yet"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold")
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in ("worker", "tier", "chunk", "tag", "state", "weights") else "right",
            overflow="fold",
        )
    return table


def _answered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry.get("result"), dict)]


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value else "-"
