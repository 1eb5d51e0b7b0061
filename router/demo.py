"""``warmroute demo``: the main job, seen on one machine without a GPU.

Two real vLLM engines with the connector, the gateway before them, and conversations held through the ``openai``
client: each stays on the worker that is warm for it, and comes back from the CPU tier after the GPU tier was emptied.
"""

import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from router.demo_fleet import DemoError, Fleet, engine_missing, free_port, install_engine, run_fleet

if TYPE_CHECKING:
    from openai import OpenAI

USERS = ("Ada", "Grace", "Linus", "Margaret")
DOCUMENT_WORDS = 4900
"""One token each: a document that the whole conversation is about."""

QUESTIONS = (
    "Summarise the document in one sentence.",
    "Which words stand out, and why?",
    "What would you leave out?",
    "Say it again for a child of ten.",
    "What did I ask you first?",
)
TURNS_BEFORE_RESET = 3


class Turn(msgspec.Struct):
    """What one turn of a conversation met."""

    conversation: str
    turn: int
    phase: str
    worker: str
    reason: str
    prompt_tokens: int
    hit_tokens: dict[str, int]
    ttft_s: float

    @property
    def hit(self) -> int:
        """Tokens reused, from any tier."""
        return sum(self.hit_tokens.values())


def main(*, exit_after: bool = False, json_path: Path | None = None, port: int = 8080) -> int:
    """Run the demo; 0 on success, 1 with an explanation on failure, 130 on Ctrl-C."""
    console = Console()
    try:
        with _terminate_as_interrupt():
            _run(console, exit_after=exit_after, json_path=json_path, port=port)
    except DemoError as error:
        console.print(f"[bold red]The demo stopped:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped; no process is left behind.")
        return 130
    return 0


def _run(console: Console, *, exit_after: bool, json_path: Path | None, port: int) -> None:
    with tempfile.TemporaryDirectory(prefix="warmroute-demo-") as folder, console.status("starting") as status:

        def report(text: str) -> None:
            status.update(text)

        _check_parts(report)
        report("making the model (a small Llama, random weights)")
        model = Path(folder) / "model"
        _make_model(model)
        with run_fleet(model, Path(folder), _port(port, console), report) as fleet:
            report("compiling the engines' kernels with a first prompt")
            _warm_up(fleet)
            turns = list(_converse(fleet, report))
            status.stop()
            _present(console, turns)
            if json_path is not None:
                json_path.write_text(json.dumps(_figures(turns), indent=2) + "\n")
            if not exit_after:
                _keep_serving(console, fleet)


def _check_parts(report: Any) -> None:
    try:
        import openai  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise DemoError("the openai client is missing: pip install 'warmroute[demo]'") from error
    if engine_missing():
        install_engine(report)


def _make_model(directory: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from router.demo_model import make_model  # noqa: PLC0415 - brings torch, which reads the variables above

    make_model(directory)


def _port(wanted: int, console: Console) -> int:
    import socket  # noqa: PLC0415

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
            return int(probe.getsockname()[1])
        except OSError:
            other = free_port()
            console.print(f"port {wanted} is taken, serving on {other} instead")
            return other


def _warm_up(fleet: Fleet) -> None:
    for engine in fleet.engines:
        body = {"model": "demo", "prompt": _words(engine.name, DOCUMENT_WORDS), "max_tokens": 2}
        for path, content in (("/v1/completions", body), ("/reset_prefix_cache?reset_external=true", None)):
            response = httpx.post(engine.url + path, json=content, timeout=180)
            if response.is_error:
                raise DemoError(f"{engine.name} answered {response.status_code} to {path}: {response.text[:500]}")


def _converse(fleet: Fleet, report: Any) -> Iterator[Turn]:
    from openai import OpenAI  # noqa: PLC0415 - an extra

    client = OpenAI(base_url=fleet.gateway.url + "/v1", api_key="none", max_retries=0, timeout=120)
    chats: dict[str, list[dict[str, str]]] = {
        user: [{"role": "system", "content": f"The document of {user}: {_words(user, DOCUMENT_WORDS)}"}]
        for user in USERS
    }
    for number, question in enumerate(QUESTIONS, 1):
        if number == TURNS_BEFORE_RESET + 1:
            _reset_gpu_tier(fleet)
        for user, messages in chats.items():
            report(f"{user}, turn {number} of {len(QUESTIONS)}")
            messages.append({"role": "user", "content": question})
            yield _turn(fleet, client, user, number, messages)


def _phase(number: int) -> str:
    if number == 1:
        return "cold"
    return "warm" if number <= TURNS_BEFORE_RESET else "after GPU reset"


def _turn(fleet: Fleet, client: "OpenAI", user: str, number: int, messages: list[Any]) -> Turn:
    started = time.perf_counter()
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=messages, stream=True, max_tokens=24, temperature=0
    )
    parts: list[str] = []
    first = 0.0
    for chunk in raw.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            parts.append(chunk.choices[0].delta.content)
    messages.append({"role": "assistant", "content": "".join(parts)})
    record = _record(fleet, raw.headers["x-request-id"])
    return Turn(
        conversation=user,
        turn=number,
        phase=_phase(number),
        worker=record["worker"],
        reason=record["reason"],
        prompt_tokens=record["prompt_tokens"],
        hit_tokens=record["actual_hit_tokens"],
        ttft_s=round(first, 4),
    )


def _record(fleet: Fleet, request_id: str) -> dict[str, Any]:
    """The gateway's own account of a request, once the worker has reported what it really reused."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        response = httpx.get(fleet.gateway.url + "/admin/requests", params={"id": request_id}, timeout=10)
        records = response.raise_for_status().json()["requests"]
        if records and records[0]["actual_hit_tokens"] is not None:
            return dict(records[0])
        time.sleep(0.05)
    raise DemoError(f"no worker reported what request {request_id} reused; see {fleet.gateway.log}")


def _reset_gpu_tier(fleet: Fleet) -> None:
    """Empty the engines' own prefix caches; the connector's CPU tier stays."""
    for engine in fleet.engines:
        deadline = time.monotonic() + 20
        while httpx.post(engine.url + "/reset_prefix_cache", timeout=30).is_error:
            if time.monotonic() > deadline:
                raise DemoError(f"{engine.name} did not reset its prefix cache; see {engine.log}")
            time.sleep(0.2)
    time.sleep(0.5)


def _words(seed: str, count: int) -> str:
    """Words that no other seed shares, so that nothing is warm by accident."""
    source = random.Random(seed)  # noqa: S311 - not a secret
    lexicon = ("import", "return", "class", "value", "error", "string", "object", "method", "count", "module", "list")
    return " ".join(source.choice(lexicon) for _ in range(count))


def _figures(turns: list[Turn]) -> dict[str, Any]:
    cold, warm = _medians(turns)
    return {
        "turns": [msgspec.to_builtins(turn) for turn in turns],
        "cold_ttft_s": cold,
        "warm_ttft_s": warm,
        "cold_to_warm": round(cold / warm, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _medians(turns: list[Turn]) -> tuple[float, float]:
    """Median time to first token in seconds: of first turns, and of turns that found their cache in any tier."""
    cold = [turn.ttft_s for turn in turns if turn.turn == 1]
    warm = [turn.ttft_s for turn in turns if turn.turn > 1 and turn.hit]
    if not warm:
        raise DemoError("no turn found its cache: this is a defect, please report it with the figures above")
    return statistics.median(cold), statistics.median(warm)


def _present(console: Console, turns: list[Turn]) -> None:
    table = Table(title="Every turn, as the workers reported it", header_style="bold", expand=False)
    for column, justify in (
        ("conversation", "left"),
        ("turn", "right"),
        ("worker", "left"),
        ("why", "left"),
        ("prompt", "right"),
        ("hit: GPU", "right"),
        ("hit: CPU", "right"),
        ("TTFT", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for before, turn in zip([None, *turns], turns, strict=False):
        if before is not None and before.phase != turn.phase:
            table.add_section()
        table.add_row(
            turn.conversation,
            str(turn.turn),
            turn.worker,
            turn.reason,
            f"{turn.prompt_tokens:,}",
            _tokens(turn, "gpu"),
            _tokens(turn, "cpu"),
            f"[{_colour(turn)}]{turn.ttft_s * 1000:,.0f} ms[/]",
        )
    console.print(table)
    console.print(_summary(turns))


def _tokens(turn: Turn, tier: str) -> str:
    tokens = turn.hit_tokens.get(tier, 0)
    return f"{tokens:,}" if tokens else "-"


def _colour(turn: Turn) -> str:
    return "green" if turn.hit else "yellow"


def _summary(turns: list[Turn]) -> Panel:
    cold, warm = _medians(turns)
    after = [turn.ttft_s for turn in turns if turn.hit_tokens.get("cpu")]
    lines = [
        f"cold            {cold * 1000:8,.0f} ms   median time to first token, nothing to reuse",
        f"warm            {warm * 1000:8,.0f} ms   [bold green]{cold / warm:.1f}x sooner[/]",
    ]
    if after:
        back = statistics.median(after)
        lines.append(
            f"from CPU tier   {back * 1000:8,.0f} ms   [bold green]{cold / back:.1f}x sooner[/], "
            "after the GPU tier was emptied"
        )
    stayed = _stayed(turns)
    lines.append(f"turns that stayed with the worker that was warm for them: {stayed[0]} of {stayed[1]}")
    return Panel("\n".join(lines), title="Cold against warm", expand=False)


def _stayed(turns: list[Turn]) -> tuple[int, int]:
    previous: dict[str, str] = {}
    kept = total = 0
    for turn in turns:
        if turn.conversation in previous:
            total += 1
            kept += int(turn.worker == previous[turn.conversation])
        previous[turn.conversation] = turn.worker
    return kept, total


def _keep_serving(console: Console, fleet: Fleet) -> None:
    url = fleet.gateway.url
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16})
    console.print(f"\nServing on [bold]{url}[/] until Ctrl-C. Try it:\n")
    console.print(f"curl -i {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'", soft_wrap=True)
    console.print(f"curl {url}/admin/workers", soft_wrap=True)
    console.print(f"and in a browser: {url}/dashboard\n", soft_wrap=True)
    while True:
        for child in (*fleet.engines, fleet.gateway):
            if child.process.poll() is not None:
                raise DemoError(f"{child.name} ended. The end of its log:\n{child.tail()}")
        time.sleep(1)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, and so does SIGINT where a shell in the background had it ignored, so that the
    children are ended."""

    def interrupt(_sign: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {sign: signal.signal(sign, interrupt) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


if __name__ == "__main__":
    sys.exit(main())
