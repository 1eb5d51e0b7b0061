"""``warmroute explain``: asks a running gateway and shows the answer to people, or as JSON to programs."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from router.errors import RouterError

TIMEOUT_S = 30.0
_TIERS = ("gpu", "cpu", "disk", "remote")


class ExplainError(RouterError):
    """The gateway could not be asked, or refused; the text says what to do."""


def run(what: str, *, url: str, token: str, endpoint: str, as_json: bool, live: bool = False) -> int:
    """Explain a file with a request body, ``-`` for standard input, or else the id of a request; the exit status.

    Raises:
        ExplainError: as above.
    """
    body = _body(what)
    params = {"live": "true"} if live else {}
    if body is not None:
        params |= {"endpoint": endpoint} if endpoint else {}
        answer = _ask(url, token, "POST", params=params, content=body)
    else:
        answer = _ask(url, token, "GET", params=params | {"id": what})
    if as_json:
        print(json.dumps(answer, indent=2))  # noqa: T201 - the command's output
    elif body is not None:
        _show_body(Console(), answer)
    else:
        _show_decision(Console(), answer)
    return 0


def _body(what: str) -> bytes | None:
    if what == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(what).read_bytes() if Path(what).is_file() else None
    except OSError as error:
        raise ExplainError(f"cannot read {what}: {error}") from error


def _ask(url: str, token: str, method: str, **arguments: Any) -> Any:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.request(
            method, f"{url.rstrip('/')}/admin/explain", headers=headers, timeout=TIMEOUT_S, **arguments
        )
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ExplainError(f"no gateway answers at {url}: {error}. Name it with --url") from error
    except ValueError as error:
        raise ExplainError(f"what answers at {url} is no gateway: it sent no JSON") from error
    if answer.status_code != httpx.codes.OK:
        raise ExplainError(_reason(answer.status_code, content))
    return content


def _reason(status: int, content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    text = error.get("message") if isinstance(error, dict) else f"the gateway answered {status}"
    return f"{text}. Name the token with --token or WARMROUTE_ADMIN_TOKEN" if status in (401, 403) else str(text)


def _show_body(console: Console, answer: Any) -> None:
    console.print(f"[bold]{answer['worker'] or 'nobody'}[/] would take it: {answer['reason']}", highlight=False)
    console.print(
        f"{answer['prompt_tokens']:,} prompt tokens for {answer['model']}, tokenized by {answer['tokenized_by']}"
        + (f" ({answer['why_not_router']})" if answer["why_not_router"] else ""),
        highlight=False,
    )
    table = Table(header_style="bold")
    for column in ("worker", *_TIERS, "load", "in flight", "trust", "where its hit ends, and why"):
        table.add_column(column, justify="left" if column[0] == "w" else "right", overflow="fold")
    ends = {end["worker"]: end for end in answer["ends"]}
    for item in answer["candidates"]:
        by_tier = item["hit_tokens_by_tier"]
        table.add_row(
            item["worker"],
            *(f"{by_tier.get(tier, 0):,}" if by_tier.get(tier) else "-" for tier in _TIERS),
            f"{item['load']:,.0f}",
            str(item["in_flight"]),
            f"{item['trust']:.2f}",
            _end(ends[item["worker"]]),
            style="green" if item["worker"] == answer["worker"] else "",
        )
    console.print(table)


def _show_decision(console: Console, answer: Any) -> None:
    decision, end = answer["decision"], answer["end"]
    console.print(f"[bold]{decision['worker']}[/] took it: {decision['reason']}", highlight=False)
    table = Table(show_header=False, box=None)
    actual = decision["actual_hit_tokens"]
    told = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in (actual or {}).items() if tokens) or "none"
    rows = {
        "model": decision["model"],
        "outcome": f"{decision['outcome']}, status {decision['status']}, {decision['attempts']} attempt(s)",
        "prompt": f"{decision['prompt_tokens']:,} tokens, counted by {decision['tokenized_by']}",
        "predicted hit": f"{decision['predicted_hit_tokens']:,} tokens",
        "actual hit": told if actual is not None else "not reported",
        "first byte": f"{decision['ttft_s'] * 1000:,.1f} ms" if decision["ttft_s"] is not None else "never came",
        "its hit ended": _end(end),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def _end(end: Any) -> str:
    place = f"after {end['held_chunks']} of {end['chunks']} chunks: " if end.get("chunks") else ""
    live = end.get("live")
    return f"{place}{end['why']}" + (f"\nnow: {live['why']}" if live else "")
