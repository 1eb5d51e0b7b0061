"""``warmroute cache``: looks into the caches of workers and controls them, through a gateway or at a worker's report port."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NamedTuple

import typer

cache = typer.Typer(name="cache", help="Look into the caches of workers and control them.", no_args_is_help=True)

What = Annotated[str, typer.Argument(help="file with a request body whose prompt is meant; - for standard input")]
Chunk = Annotated[list[str] | None, typer.Option("--chunk", help="a chunk's hexadecimal digest; repeat for each")]
Tag = Annotated[str, typer.Option("--tag", help="name that requests were given; stands for their chunks")]
Url = Annotated[str, typer.Option("--url", help="the gateway")]
Worker = Annotated[str, typer.Option("--worker", help="HOST:PORT of a worker's report port, to ask it and no gateway")]
At = Annotated[str, typer.Option("--at", help="name of one worker at the gateway; all if not said")]
Token = Annotated[str, typer.Option("--token", envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the gateway")]
ReportToken = Annotated[
    str, typer.Option("--report-token", envvar="WARMROUTE_REPORT_TOKEN", help="token of the worker's report port")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Tier = Annotated[str, typer.Option("--tier", help="cpu, disk or remote")]
Seconds = Annotated[
    float | None, typer.Option("--for", help="seconds for which they stay pinned; for good if not said")
]
GATEWAY = "http://127.0.0.1:8080"


class _Where(NamedTuple):
    url: str
    worker: str
    at: str
    token: str
    report_token: str


def _run(
    operation: str, where: _Where, *, what: str = "", chunks: list[str] | None = None, as_json: bool, **arguments: Any
) -> None:
    from router import cache_command  # noqa: PLC0415 - keeps the other commands quick

    target = cache_command.Target(**where._asdict())
    try:
        status = cache_command.run(operation, target, what, chunks or [], arguments, as_json=as_json)
    except cache_command.CacheError as error:
        typer.echo(f"warmroute: {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(status)


def _shared(
    *,
    url: Url = GATEWAY,
    worker: Worker = "",
    at: At = "",
    token: Token = "",
    report_token: ReportToken = "",
    as_json: Json = False,
) -> tuple[_Where, bool]:
    """The options of every command: which caches are meant, and whether JSON is printed."""
    return _Where(url, worker, at, token, report_token), as_json


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of every command behind its own; it gets them as ``where`` and ``as_json``."""
    shared = inspect.signature(_shared).parameters
    own = [each for name, each in inspect.signature(function).parameters.items() if name not in ("where", "as_json")]

    @wraps(function)
    def run(**given: Any) -> None:
        where, as_json = _shared(**{name: given.pop(name) for name in shared})
        function(where=where, as_json=as_json, **given)

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined] # what typer reads
    return cache.command()(run)


@_command
def lookup(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    ask: Annotated[bool, typer.Option("--ask", help="ask lower tiers for what nobody knows of")] = False,
    where: _Where,
    as_json: bool,
) -> None:
    """Say which tiers of each worker hold a prompt's chunks."""
    _run("lookup", where, what=request, chunks=chunk, as_json=as_json, tag=tag, ask=ask)


@_command
def clear(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    everything: Annotated[bool, typer.Option("--all", help="everything there is, of all prompts")] = False,
    tier: Tier = "",
    where: _Where,
    as_json: bool,
) -> None:
    """Drop a prompt's chunks, or everything, from one tier or all behind the GPU."""
    _said_what(request or tag, chunk, everything=everything)
    _run("clear", where, what=request, chunks=chunk, as_json=as_json, tag=tag, tier=tier)


@_command
def pin(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    seconds: Seconds = None,
    where: _Where,
    as_json: bool,
) -> None:
    """Keep a prompt's chunks from eviction from the CPU tier and the workers' disks."""
    _run("pin", where, what=request, chunks=chunk, as_json=as_json, tag=tag, seconds=seconds)


@_command
def unpin(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    everything: Annotated[bool, typer.Option("--all", help="all pins")] = False,
    where: _Where,
    as_json: bool,
) -> None:
    """End the pins on a prompt's chunks, or all."""
    _said_what(request or tag, chunk, everything=everything)
    _run("unpin", where, what=request, chunks=chunk, as_json=as_json, tag=tag)


@_command
def pins(
    *,
    limit: Annotated[int, typer.Option("--limit", help="how many to list of each worker")] = 1000,
    where: _Where,
    as_json: bool,
) -> None:
    """List what is pinned."""
    _run("pins", where, as_json=as_json, limit=limit)


@_command
def tags(
    *,
    limit: Annotated[int, typer.Option("--limit", help="how many to list of each worker")] = 1000,
    where: _Where,
    as_json: bool,
) -> None:
    """List the tags that requests were given, and how many chunks each stands for."""
    _run("tags", where, as_json=as_json, limit=limit)


@_command
def warm(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    newest: Annotated[int | None, typer.Option("--newest", help="the so many that came last")] = None,
    tier: Tier = "",
    seconds: Seconds = None,
    where: _Where,
    as_json: bool,
) -> None:
    """Bring a prompt's chunks, or the newest of the lower tiers, into the CPU tier."""
    _run("warm", where, what=request, chunks=chunk, as_json=as_json, tag=tag, newest=newest, tier=tier, seconds=seconds)


@_command
def move(
    request: What = "",
    *,
    chunk: Chunk = None,
    tag: Tag = "",
    tier: Tier = "",
    where: _Where,
    as_json: bool,
) -> None:
    """Write a prompt's chunks to a lower tier and drop them from the CPU tier."""
    _run("move", where, what=request, chunks=chunk, as_json=as_json, tag=tag, tier=tier)


@_command
def generation(
    name: Annotated[str, typer.Argument(help="what the weights are called; only shown if not said")] = "",
    *,
    start: Annotated[bool, typer.Option("--start", help="they are those that the engines started with")] = False,
    where: _Where,
    as_json: bool,
) -> None:
    """Say what weights engines have since their last reset; those that say the same share what lies below."""
    _run("generation", where, as_json=as_json, name=name, start=start)


@_command
def flush(
    *,
    newest: Annotated[int | None, typer.Option("--newest", help="the so many that were used last")] = None,
    tier: Tier = "",
    where: _Where,
    as_json: bool,
) -> None:
    """Write what the CPU tier holds and the remote tier lacks there, and keep it in the CPU tier."""
    _run("flush", where, as_json=as_json, newest=newest, tier=tier)


@_command
def stats(
    *,
    where: _Where,
    as_json: bool,
) -> None:
    """Show the figures of every tier."""
    _run("stats", where, as_json=as_json)


def _said_what(request: str, chunks: list[str] | None, *, everything: bool) -> None:
    if everything == bool(request or chunks):
        typer.echo("warmroute: name a request, chunks (--chunk), a tag (--tag), or everything (--all)", err=True)
        raise typer.Exit(2)
