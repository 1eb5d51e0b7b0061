"""The ``warmroute`` command."""

import asyncio
import inspect
import logging
import os
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from router.cache_cli import cache
from router.config import DEFAULT_REPORT_PORT, LOOPBACK, Settings, parse_address
from router.errors import ConfigError
from router.keys_cli import keys

app = typer.Typer(
    name="warmroute",
    help="Routes every prompt to the vLLM instance that already holds the most of its KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_RENAMED = {"workers": "--worker", "discover": "--discover"}
_HIDDEN_DEFAULTS = frozenset({"admin_token", "api_keys", "report_token", "worker_api_key", "workers", "discover"})


class _Serve(TyperCommand):
    """Reads flags of other routers, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from router.foreign_flags import translate  # noqa: PLC0415 - keeps the other commands quick

        try:
            read = translate(args)
        except ConfigError as error:
            _quit(str(error))
        for note in read.notes:
            typer.echo(f"warmroute: {note}", err=True)
        return super().parse_args(ctx, read.arguments)


def serve(config: str | None, **flags: Any) -> None:
    """Run the gateway."""
    from router import serve as serving  # noqa: PLC0415 - keeps the other commands quick
    from router.reload import Sources  # noqa: PLC0415

    _explain_workers(flags.pop("mistaken_workers", None))
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    sources = Sources(given, file=config)
    try:
        settings = sources.load()
        serving.check(settings)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        _warn_if_open(settings)
        _warn_if_alone(settings)
        _raise_file_limit(settings)
        status = serving.serve(settings, sources)
    except ConfigError as error:
        _quit(str(error))
    raise typer.Exit(status)


@app.command()
def version() -> None:
    """Print the version."""
    from router.api.openai import package_version  # noqa: PLC0415 - only here

    typer.echo(package_version())


@app.command()
def stats(
    address: Annotated[str, typer.Argument(help="HOST:PORT of a worker's report port")] = (
        f"127.0.0.1:{DEFAULT_REPORT_PORT}"
    ),
    token: Annotated[str, typer.Option(envvar="WARMROUTE_REPORT_TOKEN", help="token of the report port")] = "",
) -> None:
    """Print a worker's cache figures as JSON."""
    import json  # noqa: PLC0415

    from kv_protocol.errors import ProtocolError  # noqa: PLC0415
    from router.reports import call  # noqa: PLC0415

    try:
        figures = asyncio.run(call(parse_address(address), "stats", token=token))
    except (OSError, ProtocolError, ValueError) as error:
        text = str(error) or type(error).__name__
        _quit(f"no figures from {address}: {text}. Is it the report port of a running worker?")
    typer.echo(json.dumps(figures, indent=2, default=str))


@app.command()
def explain(
    request: Annotated[str, typer.Argument(help="file with a request body, - for standard input, or a request's id")],
    *,
    url: Annotated[str, typer.Option(help="the gateway")] = "http://127.0.0.1:8080",
    token: Annotated[str, typer.Option(envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the gateway")] = "",
    endpoint: Annotated[str, typer.Option(help="chat or completions, where the body leaves it open")] = "",
    live: Annotated[bool, typer.Option("--live", help="ask the workers where the missing chunk is now")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which worker a request goes to and why, and where its hit ends and why."""
    from router import explain_command  # noqa: PLC0415 - keeps the other commands quick

    try:
        status = explain_command.run(request, url=url, token=token, endpoint=endpoint, as_json=as_json, live=live)
    except explain_command.ExplainError as error:
        _quit(str(error))
    raise typer.Exit(status)


@app.command()
def doctor(
    targets: Annotated[
        list[str], typer.Argument(help="URLs of gateways, and of workers: URL[,reports=HOST:PORT|none]")
    ],
    *,
    token: Annotated[str, typer.Option(envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the gateways")] = "",
    report_token: Annotated[
        str, typer.Option(envvar="WARMROUTE_REPORT_TOKEN", help="token of the workers' report ports")
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="WARMROUTE_API_KEY", help="API key for requests")] = "",
    tokenizer: Annotated[str, typer.Option(help="directory of the model's tokenizer, to compare with")] = "",
    chat_template: Annotated[str, typer.Option(help="file with the chat template the workers were started with")] = "",
    probe: Annotated[bool, typer.Option(help="have each worker compute a short prompt, as proof")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Prove that gateways and workers work together, or say what is wrong and how to mend it."""
    from router import doctor as examination  # noqa: PLC0415 - keeps the other commands quick

    options = examination.Options(token, report_token, api_key, tokenizer, chat_template, probe)
    try:
        status = examination.run(targets, options, json_output=as_json)
    except ConfigError as error:
        _quit(str(error))
    raise typer.Exit(status)


@app.command()
def register(
    gateways: Annotated[list[str], typer.Argument(help="URLs of the gateways")],
    *,
    worker: Annotated[
        str, typer.Option(help="URL[,reports=HOST:PORT|none][,name=NAME][,dp=N] as the gateways reach it")
    ],
    ttl: Annotated[float, typer.Option(min=0.5, help="seconds without renewal after which it is drained")] = 30.0,
    token: Annotated[str, typer.Option(envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the gateways")] = "",
    process: Annotated[
        int | None, typer.Option("--while", metavar="PID", help="end the registration when this process has ended")
    ] = None,
) -> None:
    """Keep a worker registered at gateways while it is well; run it beside the worker."""
    from router.config import WorkerSpec  # noqa: PLC0415 - keeps the other commands quick
    from router.discovery.registration import register as keep  # noqa: PLC0415

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        specs = WorkerSpec.all_of(worker)
    except ValueError as error:
        _quit(str(error))
    asyncio.run(keep(specs, gateways, ttl=ttl, token=token, process=process))


@app.command()
def drain(
    url: Annotated[str, typer.Argument(help="the worker's own URL, as this command reaches it")] = (
        "http://127.0.0.1:8000"
    ),
    *,
    reports: Annotated[str, typer.Option(help="HOST:PORT of its report port, or none")] = (
        f"127.0.0.1:{DEFAULT_REPORT_PORT}"
    ),
    router: Annotated[list[str] | None, typer.Option(help="URL of a router to tell; repeat for each")] = None,
    name: Annotated[str, typer.Option(envvar="HOSTNAME", help="the worker's name or URL at the routers")] = "",
    dp: Annotated[int, typer.Option(min=1, max=64, help="data-parallel ranks of the engine")] = 1,
    tier: Annotated[str, typer.Option(help="where chunks are handed to; default: remote, or the slowest tier")] = "",
    deadline: Annotated[float, typer.Option(min=1, help="seconds for everything")] = 60.0,
    settle: Annotated[float, typer.Option(min=0, help="seconds until every router knows that the worker leaves")] = 2.0,
    token: Annotated[str, typer.Option(envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the routers")] = "",
    report_token: Annotated[
        str, typer.Option(envvar="WARMROUTE_REPORT_TOKEN", help="token of the worker's report port")
    ] = "",
    api_key: Annotated[
        str, typer.Option(envvar=["WARMROUTE_API_KEY", "VLLM_API_KEY"], help="API key of the worker")
    ] = "",
) -> None:
    """Have a worker hand its hottest chunks over and finish its requests before it stops: a preStop hook."""
    from router import drain_command  # noqa: PLC0415 - keeps the other commands quick

    try:
        address = None if reports == "none" else parse_address(reports)
    except ValueError as error:
        _quit(str(error))
    leave = drain_command.Leave(
        url, address, name, routers=router or (), tier=tier, seconds=deadline, settle=settle, token=token,
        report_token=report_token, api_key=api_key,
    )  # fmt: skip
    raise typer.Exit(drain_command.run(leave, dp))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def worker(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL [FLAGS OF VLLM SERVE]...", help="as for `vllm serve`")
    ] = None,
    *,
    routers: Annotated[
        list[str] | None,
        typer.Option("--router", envvar="WARMROUTE_ROUTERS", help="URL of a router to register at; repeat for each"),
    ] = None,
    advertise: Annotated[
        str, typer.Option(envvar="WARMROUTE_ADVERTISE", help="http://HOST:PORT at which routers reach this worker")
    ] = "",
    worker_name: Annotated[
        str, typer.Option(envvar="WARMROUTE_WORKER_NAME", help="what the routers call it [default: HOST:PORT]")
    ] = "",
    ttl: Annotated[float, typer.Option(min=0.5, help="seconds without renewal after which routers drain it")] = 30.0,
    token: Annotated[str, typer.Option(envvar="WARMROUTE_ADMIN_TOKEN", help="admin token of the routers")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="setting of the connector (cpu_bytes=64GiB); repeat for each"),
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="print the commands that would run, and end")] = False,
) -> None:
    """Start vLLM's server with the connector in it; flags that are not listed here are vLLM's."""
    from router import worker_command  # noqa: PLC0415 - keeps the other commands quick

    wish = worker_command.Wish(routers or (), advertise, worker_name, ttl, token, settings or ())
    try:
        launch = worker_command.prepare(arguments or (), wish, os.environ)
        for note in launch.notes:
            typer.echo(f"warmroute: {note}", err=True)
        if show:
            typer.echo(worker_command.shown(launch))
            return
        worker_command.run(launch, os.environ)
    except ConfigError as error:
        _quit(str(error))


@app.command()
def demo(
    *,
    exit_after: Annotated[bool, typer.Option("--exit", help="end after the conversation")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
    port: Annotated[int, typer.Option(help="port of the gateway")] = 8080,
) -> None:
    """Start two real vLLM workers and the gateway here, and show what warm means."""
    from router import demo as demonstration  # noqa: PLC0415 - brings its own dependencies

    raise typer.Exit(demonstration.main(exit_after=exit_after, json_path=json_path, port=port))


def main() -> None:
    """Entry point of the ``warmroute`` command."""
    app()


def _quit(message: str) -> Any:
    typer.echo(f"warmroute: {message}", err=True)
    raise typer.Exit(2)


def _explain_workers(value: str | None) -> None:
    """``--workers`` is a number of processes elsewhere; workers are vLLM's here."""
    if value is None:
        return
    if value.isdigit():
        _quit(f"several router processes are --processes {value}; a vLLM worker is --worker http://HOST:PORT")
    _quit(f"each worker is named by a flag of its own: --worker {value.split()[0] if value.split() else 'URL'}")


def _warn_if_alone(settings: Settings) -> None:
    if not settings.workers and not settings.discover and not settings.pods:
        logging.getLogger(__name__).warning(
            "no workers are named (--worker http://HOST:PORT, --discover dns://NAME:PORT, --kubernetes-selector): "
            "waiting for them to be added or to register at /admin/workers"
        )


def _raise_file_limit(settings: Settings) -> None:
    """A request takes two connections; beyond the limit of open files clients are reset without a word."""
    try:
        import resource  # noqa: PLC0415 - not on every system
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.max_in_flight + settings.max_queue + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            logging.getLogger(__name__).warning(
                "only %d files may be open, and %d requests in flight and %d waiting may need %d: "
                "raise the limit (ulimit -n), or lower --max-in-flight and --max-queue",
                *(soft, settings.max_in_flight, settings.max_queue, wanted),
            )


def _warn_if_open(settings: Settings) -> None:
    if settings.host in LOOPBACK:
        return
    log = logging.getLogger(__name__)
    if not settings.admin_token.get_secret_value():
        log.warning(
            "listening on %s without an admin token: the admin endpoints are closed; set --admin-token to open them",
            settings.host,
        )
    if not settings.api_keys_file and not settings.api_keys.get_secret_value() and not settings.tls_client_ca:
        log.warning(
            "listening on %s without API keys: whoever reaches this address can use the models; "
            "set --api-keys-file ('warmroute keys add' makes one), or --tls-client-ca",
            settings.host,
        )
    elif not settings.tls_cert:
        log.warning("listening on %s without TLS: API keys travel in the clear; set --tls-cert", settings.host)


def _option(name: str) -> inspect.Parameter:
    """One flag per setting, described by the setting itself."""
    field = Settings.model_fields[name]
    flag = _RENAMED.get(name, "--" + name.replace("_", "-"))
    text = field.description or ""
    if name not in _HIDDEN_DEFAULTS and field.default is not None and field.default != "":
        text += f" [default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
    kind: Any = list[str] | None if name in _RENAMED else _flag_type(field.annotation) | None
    declaration = f"{flag}/--no-{flag[2:]}" if kind == bool | None else flag
    annotation = Annotated[kind, typer.Option(declaration, help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag_type(annotation: Any) -> Any:
    if get_origin(annotation) is UnionType:
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation if annotation in (bool, int, float) else str


def _add_serve() -> None:
    help_text = "YAML file of settings; flags and environment win [env: WARMROUTE_ROUTER_CONFIG]"
    config = Annotated[str | None, typer.Option("--config", help=help_text, show_default=False)]
    first = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
    mistaken = Annotated[str | None, typer.Option("--workers", hidden=True)]
    second = inspect.Parameter("mistaken_workers", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=mistaken)
    parameters = [first, second, *(_option(name) for name in Settings.model_fields)]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # read by typer
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(cls=_Serve)(serve)


_add_serve()
app.add_typer(keys)
app.add_typer(cache)

if __name__ == "__main__":
    main()
