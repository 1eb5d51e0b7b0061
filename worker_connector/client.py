"""A blocking client of the report port, for a few calls from a program or a command line."""

import os
import socket
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from kv_protocol.errors import ProtocolError
from kv_protocol.messages import Bye, Call, FrameDecoder, Hello, Message, Open, Reply, check_version, encode
from worker_connector import runtime_files
from worker_connector.errors import StatsUnavailable
from worker_connector.stats import combine, summary

DEFAULT_PORT = 5571


class ControlClient:
    """One connection to a worker's report port.

    Raises:
        OSError: nothing listens there, or a deadline (seconds, per call) passed.
        ProtocolError: the worker turned the connection down, or is no report server.
    """

    def __init__(self, host: str, port: int, *, token: str = "", timeout: float = 10.0) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._decoder = FrameDecoder()
        self._inbox: list[Message] = []
        self._next_id = 1
        self._connection = socket.create_connection((host, port), timeout=timeout)
        try:
            self._connection.sendall(encode(Open(watch=False, token=token, reader="client")))
            self.hello = self._wait_for_hello()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def call(self, operation: str, **arguments: Any) -> Any:
        """The result of a control operation.

        Raises:
            ProtocolError: the worker answered with an error.
        """
        self._deadline = time.monotonic() + self._timeout
        number, self._next_id = self._next_id, self._next_id + 1
        self._connection.sendall(encode(Call(number, operation, arguments)))
        while True:
            message = self._receive()
            if isinstance(message, Reply) and message.id == number:
                if message.error:
                    raise ProtocolError(message.error)
                return message.result

    def close(self) -> None:
        self._connection.close()

    def _wait_for_hello(self) -> Hello:
        message = self._receive()
        if not isinstance(message, Hello):
            raise ProtocolError(f"expected hello, got {type(message).__name__.lower()}: is this a report port?")
        check_version(message)
        return message

    def _receive(self) -> Message:
        while not self._inbox:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {self._timeout:g} s")
            self._connection.settimeout(left)
            data = self._connection.recv(1 << 16)
            if not data:
                raise ProtocolError("the other side closed the connection: is this a report port?")
            self._inbox.extend(self._decoder.feed(data))
        message = self._inbox.pop(0)
        if isinstance(message, Bye):
            raise ProtocolError(message.reason)
        return message


def get_cache_stats(url: str | None = None, *, token: str = "", timeout: float = 10.0) -> dict[str, Any]:
    """The cache figures of one engine, or of all engines of this program together.

    Without ``url``, the engines started by this program (``vllm.LLM`` runs each in a child process) on this machine.
    ``url`` is a worker's report address: ``tcp://host:port``, ``host:port`` or ``host``; ``token`` is what its
    ``report_token`` says, by default that of the environment (``WARMROUTE_REPORT_TOKEN``).

    Returns:
        ``hit_rate`` (share of prompt tokens reused), ``avg_ttft_reduction`` (mean seconds saved per request with a hit),
        ``requests``, ``requests_with_hit``, ``prompt_tokens``, ``hit_tokens``, ``report`` (readers), ``tiers`` (by name:
        hit tokens; chunks, bytes and seconds loaded and saved; evictions; failed and skipped loads; chunks held and
        fitting), ``vision`` (of engines with a vision cache: ``VISION_FIGURES`` without their prefix) and ``engines`` (how
        many were asked).

    Raises:
        StatsUnavailable: no engine was found, or one did not answer; the text says why.
    """
    token = token or os.environ.get("WARMROUTE_REPORT_TOKEN", "")
    where = [_address(url, token)] if url is not None else list(_own_engines())
    if not where:
        raise StatsUnavailable(
            "no engine with the warmroute connector was started by this program: create vllm.LLM with "
            'kv_transfer_config=KVTransferConfig(kv_connector="WarmrouteConnector", kv_role="kv_both") first, '
            "or pass the report address of a worker, such as 127.0.0.1:5571"
        )
    counts = [_ask(*address, timeout) for address in where]
    return {**summary(combine(counts)), "engines": len(counts)}


def _ask(host: str, port: int, token: str, timeout: float) -> dict[str, dict[str, float]]:
    try:
        with ControlClient(host, port, token=token, timeout=timeout) as client:
            answer = client.call("stats")
    except (OSError, ProtocolError) as error:
        raise StatsUnavailable(f"the report port {host}:{port} gave no figures: {error}") from error
    counts = answer.get("counts") if isinstance(answer, dict) else None
    if not isinstance(counts, dict):
        raise StatsUnavailable(f"the report port {host}:{port} gave no figures: its answer has no counts")
    return counts


def _own_engines() -> Iterable[tuple[str, int, str]]:
    me = os.getpid()
    for server in runtime_files.running():
        if me == server.pid or me in server.ancestors:
            yield server.host, server.port, server.token


def _address(url: str, token: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise StatsUnavailable(f"{url!r} is no report address: {error}") from error
    if not host or parts.scheme not in ("", "tcp"):
        raise StatsUnavailable(f"{url!r} is no report address: give host:port or tcp://host:port")
    return host, port or DEFAULT_PORT, token
