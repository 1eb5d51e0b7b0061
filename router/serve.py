"""``warmroute serve``: one process, or several under a supervisor."""

import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from router import logs
from router.access import make_access
from router.app import Application, create_app
from router.config import Settings
from router.discovery.dns import check_srv
from router.discovery.kubernetes import check_kubernetes
from router.processes import Supervisor
from router.reload import Sources
from router.server import make_server
from router.siblings import Siblings
from router.tls import check_tls
from router.tracing import check_installed

_log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """Raises:
    ConfigError: a setting asks for what is not installed, or names a file that cannot be used.
    """
    check_srv(settings.discover)
    check_kubernetes(settings.kubernetes_selector)
    check_installed(settings.otlp_traces_endpoint)
    make_access(settings.api_keys_file, settings.api_keys.get_secret_value())
    check_tls(settings)


def serve(settings: Settings, sources: Sources) -> int:
    """Serve until told to stop; the exit status.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    if settings.processes == 1:
        return _serve_alone(settings, sources)

    def run(number: int, sockets: list[socket.socket], directory: Path) -> None:
        logs.set_up(settings.log_level, settings.log_format, number)
        siblings = Siblings(directory, number, settings.processes)
        app = create_app(settings, sources, siblings)
        app.owns_process = True
        _on_hangup(app, files=_files(settings, sources))
        with suppress(KeyboardInterrupt):
            make_server(app, settings).run(sockets)

    return Supervisor(
        run,
        count=settings.processes,
        host=settings.host,
        port=settings.port,
        drain_timeout=settings.drain_delay + settings.drain_timeout,
        pass_hangup=_files(settings, sources),
    ).supervise()


def _serve_alone(settings: Settings, sources: Sources) -> int:
    logs.set_up(settings.log_level, settings.log_format)
    app = create_app(settings, sources)
    app.owns_process = True
    _on_hangup(app, files=_files(settings, sources))
    try:
        make_server(app, settings).run()
    except KeyboardInterrupt:
        return 130
    return 0


def _files(settings: Settings, sources: Sources) -> bool:
    """Whether there is anything to read again."""
    return bool(sources.file or settings.api_keys_file)


def _on_hangup(app: Application, *, files: bool) -> None:
    """SIGHUP has the configuration file and the file of keys read again. Without either, and when the terminal has gone
    away, it stops the gateway as SIGTERM does, without losing requests; under nohup it does that only if there is a
    file to read."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or (signal.getsignal(hangup) is not signal.SIG_DFL and not files):
        return
    had_terminal = _has_terminal()

    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)

    def reload_or_stop() -> None:
        if had_terminal and not _has_terminal():
            stop()
            return
        app.gateway.control.ask_reload()
        if app.gateway.access is not None:
            app.gateway.access.ask_reload()

    act: Callable[[], None] = reload_or_stop if files else stop
    signal.signal(hangup, lambda *_: act())


def _has_terminal() -> bool:
    try:
        with Path("/dev/tty").open("rb"):
            return sys.platform != "win32"
    except OSError:
        return False
