"""What the doctor found: one finding per check and target, shown as a table or as JSON."""

import json
from collections.abc import Iterable
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

Result = Literal["ok", "warn", "fail", "skip"]

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]FAIL[/]", "skip": "[dim]skip[/]"}

CHECKS = {
    "reachable": "HTTP is answered",
    "version": "what runs there",
    "admin": "the admin endpoints can be used",
    "config": "the configuration file in use is the one on disk",
    "ready": "every model has a worker that takes requests",
    "clock": "clocks agree",
    "limits": "open files suffice for the requests let in; prompts can fill chunks",
    "models": "the worker says what it serves",
    "routable": "the gateway would send requests to the worker",
    "tokenize": "the worker tokenizes for others",
    "parity": "template and tokenizer give the worker's own tokens",
    "token-ids": "the worker takes token ids in place of text",
    "reports": "the report port answers, lists and beats",
    "events": "an engine without the connector publishes its KV events where they can be read",
    "chunk-hash": "what the worker computes is reported under the hash expected",
    "cached-tokens": "the worker says how many tokens it reused",
    "index": "the gateway knows what the worker reports",
    "forwarding": "a request through the gateway is routed by its tokens and accounted for",
    "same-chunks": "workers of a model have one chunk size and name",
    "same-cache": "workers of a model have interchangeable caches",
    "same-tokens": "workers of a model tokenize alike",
    "same-version": "workers run the same versions",
    "same-workers": "gateways watch the same workers",
}
"""Every check by name; docs/troubleshooting.md has a heading for each."""


class Finding(msgspec.Struct, frozen=True):
    """``found`` is the evidence; ``fix`` what to do about it, empty where nothing is to be done."""

    check: str
    target: str
    result: Result
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.check in CHECKS, f"{self.check} is no check"


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed; warnings and skipped checks do not count."""
    return all(finding.result != "fail" for finding in findings)


def as_json(findings: list[Finding]) -> str:
    return json.dumps({"ok": healthy(findings), "findings": msgspec.to_builtins(findings)}, indent=2)


def show(console: Console, findings: list[Finding]) -> None:
    """A table by target, and a line that sums it up."""
    table = Table(header_style="bold")
    for column in ("target", "check", "", "found"):
        table.add_column(column, overflow="fold")
    before = ""
    for finding in findings:
        if before and before != finding.target:
            table.add_section()
        text = finding.found + (f"\n[bold]fix:[/] {finding.fix}" if finding.fix and finding.result != "ok" else "")
        shown = "" if before == finding.target else finding.target
        table.add_row(shown, finding.check, _MARKS[finding.result], text)
        before = finding.target
    console.print(table, highlight=False)
    counts = {result: sum(finding.result == result for finding in findings) for result in _MARKS}
    verdict = "[green]healthy[/]" if healthy(findings) else "[bold red]not healthy[/]"
    console.print(
        f"{verdict}: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed, {counts['skip']} skipped"
    )
