"""Several router processes on one port, and the process that keeps them running.

The supervisor serves nothing: it binds the port, forks the processes and waits. On Linux every process has a socket of
its own (SO_REUSEPORT), so that the kernel spreads connections evenly; the supervisor keeps them all, so that connections
waiting for a process that died are taken by its successor. Processes share nothing but a directory: each watches every
worker. A process ends when its supervisor does, however that ended.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from router.errors import ConfigError
from router.totals import CountFiles

POLL_S = 0.1
CALM_S = 10.0
"""A process that lived this long is restarted at once."""
BACKOFF_S = (0.5, 30.0)
GRACE_S = 10.0
"""What a process may take beyond ``drain_timeout`` until it is killed."""

_log = logging.getLogger(__name__)

Run = Callable[[int, list[socket.socket], Path], None]
"""What a process does: its number, its sockets, the shared directory. Returning ends the process."""


class Child(msgspec.Struct, eq=False):
    """One place among the processes. ``pid`` is 0 while nobody is there."""

    number: int
    sockets: list[socket.socket]
    pid: int = 0
    started: float = 0.0
    failures: int = 0
    due: float = 0.0


class Supervisor:
    """Keeps ``count`` processes running until told to stop. ``hangup`` is what SIGHUP means: passed on, or stop."""

    def __init__(
        self, run: Run, *, count: int, host: str, port: int, drain_timeout: float, pass_hangup: bool = False
    ) -> None:
        self._run = run
        self._host, self._port = host, port
        self._patience = drain_timeout + GRACE_S
        self._pass_hangup = pass_hangup
        self._received: list[int] = []
        self._children = [Child(number, []) for number in range(count)]
        self._directory = Path()
        self._lifeline = (-1, -1)
        self._pid = os.getpid()

    def supervise(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status.

        Raises:
            ConfigError: the port cannot be listened on.
        """
        self._bind_all()
        self._directory = Path(tempfile.mkdtemp(prefix="warmroute-"))
        self._lifeline = os.pipe()
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sign, lambda number, _: self._received.append(number))
        try:
            _log.info("serving on %s:%d with %d processes", self._host, self._port, len(self._children))
            return self._watch()
        finally:
            self._end()

    def _watch(self) -> int:
        while True:
            now = time.monotonic()
            self._reap(now)
            for child in self._children:
                if not child.pid and now >= child.due:
                    self._start(child)
            for sign in self._taken():
                if sign == signal.SIGHUP and self._pass_hangup:
                    self._signal(signal.SIGHUP)
                else:
                    self._stop()
                    return 130 if sign == signal.SIGINT else 0
            time.sleep(POLL_S)

    def _taken(self) -> list[int]:
        received, self._received[:] = list(self._received), []
        return received

    def _start(self, child: Child) -> None:
        try:
            child.sockets = child.sockets or self._bind()
        except OSError as error:
            _log.error("process %d cannot listen on %s:%d: %s", child.number, self._host, self._port, error)
            child.due = time.monotonic() + BACKOFF_S[1]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            child.pid, child.started = pid, time.monotonic()
            return
        status = 1
        try:
            self._become(child)
            self._run(child.number, child.sockets, self._directory)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001 - whatever it was, this process must not go on as a second supervisor
            _log.exception("process %d failed", child.number)
        finally:
            if os.getppid() != self._pid:
                shutil.rmtree(self._directory, ignore_errors=True)  # nobody else is left to do it
            logging.shutdown()
            os._exit(status)

    def _become(self, child: Child) -> None:
        """In the forked process: leave behind what is the supervisor's."""
        os.setpgid(0, 0)  # Ctrl-C reaches the supervisor alone, which passes it on once
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before and after the server has its own
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(self._lifeline[1])
        for other in self._children:
            if other is not child:
                for one in other.sockets:
                    one.close()
        watch = threading.Thread(target=_end_with, args=(self._lifeline[0], self._patience), daemon=True)
        watch.start()

    def _reap(self, now: float) -> None:
        for child in self._children:
            if child.pid and (status := _ended(child.pid)) is not None:
                CountFiles(self._directory).fold(child.pid)
                self._ended(child, status, now)

    def _ended(self, child: Child, status: int, now: float) -> None:
        lived = now - child.started
        child.failures = 0 if lived >= CALM_S else child.failures + 1
        shortest, longest = BACKOFF_S
        pause = min(longest, shortest * 2.0 ** (child.failures - 1)) if child.failures else 0.0
        if child.failures > 1:
            # Nobody comes soon: connections are better refused than left waiting.
            for one in child.sockets:
                one.close()
            child.sockets = []
        _log.error(
            "process %d (pid %d) ended with status %d after %.1f s; it is started again in %.1f s",
            *(child.number, child.pid, status, lived, pause),
        )
        child.pid, child.due = 0, now + pause

    def _stop(self) -> None:
        """Let every process finish what it has, then end those that do not."""
        for child in self._children:
            for one in child.sockets:
                one.close()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self._patience
        while any(child.pid for child in self._children):
            for child in self._children:
                if child.pid and _ended(child.pid) is not None:
                    child.pid = 0
            if signal.SIGINT in self._taken():
                deadline = time.monotonic()
            if time.monotonic() >= deadline:
                _log.warning("ending processes that did not finish in time")
                self._signal(signal.SIGKILL)
                deadline = time.monotonic() + GRACE_S
            time.sleep(POLL_S / 2)

    def _signal(self, sign: signal.Signals) -> None:
        for child in self._children:
            if child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, sign)

    def _end(self) -> None:
        self._signal(signal.SIGKILL)  # only where something went wrong is anybody left
        for descriptor in self._lifeline:
            os.close(descriptor)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _bind_all(self) -> None:
        try:
            addresses = _addresses(self._host, self._port)
            for family, address in addresses:
                _check_free(family, address)
            self._children[0].sockets = self._bind()
            self._port = self._children[0].sockets[0].getsockname()[1]
            for child in self._children[1:]:
                child.sockets = self._bind()
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._host}:{self._port}: {error}") from error

    def _bind(self) -> list[socket.socket]:
        if sys.platform != "linux" and self._children[0].sockets:
            return [one.dup() for one in self._children[0].sockets]
        port, sockets = self._port, []
        for family, (host, _, *rest) in _addresses(self._host, self._port):
            sockets.append(_bound(family, (host, port, *rest), shared=True))
            port = port or sockets[0].getsockname()[1]
        return sockets


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int, *tuple[int, ...]]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))  # type: ignore[misc]


def _bound(family: socket.AddressFamily, address: tuple[str | int, ...], *, shared: bool) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared and sys.platform == "linux":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def _check_free(family: socket.AddressFamily, address: tuple[str | int, ...]) -> None:
    """A shared port would let a second gateway in silently, to take half of the traffic."""
    _bound(family, address, shared=False).close()


def _ended(pid: int) -> int | None:
    """The status of a process that ended, negative for a signal; None while it runs."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if reaped else None


def _end_with(lifeline: int, patience: float) -> None:
    """Wait until the supervisor is gone, then end this process as SIGTERM does, and for certain after ``patience``."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os._exit(1)
