"""Log lines: as text or as JSON, written by a thread of their own so that a log reader that stalls stalls nobody else.

No line holds a prompt, an answer or a secret. The access log has one line per request.
"""

import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from router.client import Client

LONGEST_QUEUE = 10_000
"""Lines that may wait; more are dropped and counted."""
_FLUSH_S = 2.0
_STDERR = 2
_STANDARD = "%(asctime)s %(levelname)s %(name)s: %(message)s"

access = logging.getLogger("warmroute.access")
dropped = 0
"""Lines dropped by this process because their reader did not keep up."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and a record's
    ``fields``."""

    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._fixed: dict[str, Any] = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fixed,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """One line for people; a record's ``fields`` follow as ``name=value``."""

    def __init__(self, process: int | None = None) -> None:
        super().__init__(_STANDARD if process is None else f"[{process}] {_STANDARD}")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields: dict[str, Any] = getattr(record, "fields", {})
        shown = " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value not in (None, ""))
        return f"{text} {shown}" if shown else text


class QueuedHandler(logging.Handler):
    """Writes to a file descriptor from a thread. Lines beyond ``LONGEST_QUEUE`` are dropped, not waited for."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._more = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        global dropped  # noqa: PLW0603 - one figure per process, read by the metrics
        if len(self._lines) >= LONGEST_QUEUE:
            dropped += 1
            return
        try:
            self._lines.append(self.format(record))
        except Exception:  # noqa: BLE001 - a line that cannot be formatted is logging's to report
            self.handleError(record)
        self._more.set()

    def flush(self) -> None:
        """Wait until everything is written, but not for long."""
        deadline = time.monotonic() + _FLUSH_S
        while self._lines and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        self._ended = True
        self._more.set()
        self._thread.join(_FLUSH_S)
        super().close()

    def _write(self) -> None:
        while not self._ended or self._lines:
            self._more.wait()
            self._more.clear()
            while self._lines:
                batch = [self._lines.popleft() for _ in range(min(len(self._lines), 256))]
                try:
                    _write_all(self._descriptor, ("\n".join(batch) + "\n").encode("utf-8", "replace"))
                except OSError:
                    return  # nobody reads any more


def set_up(level: str, style: Literal["text", "json"], process: int | None = None) -> None:
    """Log to standard error from now on, instead of wherever it went before."""
    root = logging.getLogger()
    for handler in tuple(root.handlers):
        root.removeHandler(handler)
    handler = QueuedHandler(_STDERR)
    handler.setFormatter(JsonFormatter(process) if style == "json" else TextFormatter(process))
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "asyncio", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_access(client: "Client", request_id: str, seconds: float) -> None:
    """The access log's line for one request that is over."""
    decision, scope = client.decision, client.scope
    peer = scope.get("client")
    fields: dict[str, Any] = {
        "request_id": request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": client.status,
        "client": peer[0] if peer else "",
        "duration_ms": _ms(seconds),
    }
    if decision is not None:
        fields |= {
            "model": decision.model,
            "worker": decision.worker,
            "reason": decision.reason,
            "outcome": decision.outcome,
            "attempts": decision.attempts,
            "prompt_tokens": decision.prompt_tokens,
            "predicted_hit_tokens": decision.predicted_hit_tokens,
            "hit_tokens": decision.actual_hit_tokens,
            "cached_tokens": decision.cached_tokens,
            "ttft_ms": _ms(decision.ttft_s),
        }
    access.info("request", extra={"fields": fields})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return f'"{text}"' if " " in text else text


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
