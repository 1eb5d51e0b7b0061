"""What a prompt costs the router: rendering, tokenizing, hashing and splicing the ids in, in CPU time of one core.

    python -m benchmarks.tokenizing TOKENIZER_DIRECTORY [--seconds 0.5] [--json FILE]

The conversations are sentences of Python's own manual in random order. Rows:

- ``1 KB``: a chat of one message, never seen before.
- ``16 KB``, ``128 KB``, grown: a chat of 32 messages whose earlier turns were sent before; its last answer and question,
  1,500 characters together, are seen for the first time.
- ``128 KB``, first: the same chat, none of it seen before.
- ``128 KB completion``: one text that grew by a paragraph, and one never seen before.

Each figure is the median over groups of prompts, each prompt measured once, by the process's CPU clock.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from kv_protocol.hashing import root_hash
from router.prompt import PromptBuilder
from router.prompt_ids import PromptIds
from router.splice import LEAN_FROM, Kind, ids_of, splice, with_prompt, without_messages

CHUNK_SIZE = 256
STEPS = ("render", "tokenize", "hash", "splice", "together")
_GROUP = 8
_LAST_ANSWER, _LAST_QUESTION = 1000, 500
_LEAST_GROUPS = 5
Body = dict[str, Any]


class Talk:
    """Endless English: sentences of Python's own manual, drawn at random."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        manual = " ".join(str(topic) for topic in topics.values())
        self._sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.:])\s+", manual)]

    def text(self, characters: int) -> str:
        sentences: list[str] = []
        size = 0
        while size < characters:
            sentences.append(self._rng.choice(self._sentences))
            size += len(sentences[-1]) + 1
        return "\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))[:characters]

    def chat(self, characters: int) -> list[dict[str, str]]:
        """A system prompt and 31 messages, the last one the user's; the last two are short."""
        roles = ("system", *("user", "assistant") * 15, "user")
        lengths = [*[(characters - _LAST_ANSWER - _LAST_QUESTION) // 30] * 30, _LAST_ANSWER, _LAST_QUESTION]
        return [{"role": role, "content": self.text(length)} for role, length in zip(roles, lengths, strict=True)]


def prompts(name: str, talk: Talk) -> Iterator[tuple[Kind, Body | None, Body]]:
    """What was sent before, and the body to be measured, without end."""
    while True:
        if name == "1 KB":
            yield "chat", None, {"messages": [{"role": "user", "content": talk.text(1000)}]}
        elif name.endswith("completion, grown"):
            text = talk.text(128 << 10)
            yield "completions", {"prompt": text}, {"prompt": text + "\n" + talk.text(2000)}
        elif name.endswith("completion, first"):
            yield "completions", None, {"prompt": talk.text(128 << 10)}
        else:
            messages = talk.chat(int(name.split(maxsplit=1)[0]) << 10)
            yield "chat", {"messages": messages[:-2]} if "grown" in name else None, {"messages": messages}


ROWS = (
    "1 KB",
    "16 KB, grown",
    "128 KB, grown",
    "128 KB, first",
    "128 KB completion, grown",
    "128 KB completion, first",
)


def measure(builder: PromptBuilder, name: str, seconds: float) -> dict[str, float]:
    """Microseconds by step, medians, and bytes and tokens of the last prompt."""
    taken: dict[str, list[float]] = {step: [] for step in STEPS}
    endless = prompts(name, Talk(ROWS.index(name)))
    until = time.perf_counter() + seconds
    root = root_hash(chunk_size=CHUNK_SIZE, model="benchmark")
    figures: dict[str, float] = {}
    while time.perf_counter() < until or len(taken["hash"]) < _LEAST_GROUPS:
        group = [next(endless) for _ in range(_GROUP)]
        known = [(kind, *_read(before)) for kind, before, _ in group if before is not None]
        _travel(builder, known, root, {step: [] for step in STEPS})
        travellers = [(kind, *_read(body)) for kind, _, body in group]
        ids = _travel(builder, travellers, root, taken)
        figures = {"bytes": len(travellers[-1][1]), "tokens": len(ids), "reused": ids.reused}
    return figures | {step: statistics.median(values) for step, values in taken.items()}


def _read(body: Body) -> tuple[bytes, Body]:
    raw = json.dumps({"model": "benchmark", **body, "stream": True}, ensure_ascii=False).encode()
    return raw, json.loads(raw)


def _travel(
    builder: PromptBuilder, group: list[tuple[Kind, bytes, Body]], root: bytes, taken: dict[str, list[float]]
) -> PromptIds:
    clock = time.process_time_ns
    marks = [clock()]
    texts = [builder.render(body) if kind == "chat" else body["prompt"] for kind, _, body in group]
    marks.append(clock())
    prompts = [_tokens(builder, text, special=kind != "chat") for (kind, _, _), text in zip(group, texts, strict=True)]
    marks.append(clock())
    for ids in prompts:
        ids.chunks(root, CHUNK_SIZE)
    marks.append(clock())
    for (kind, raw, body), ids in zip(group, prompts, strict=True):
        encoded = ids_of([ids], several=False)
        shorten = without_messages if kind == "chat" else with_prompt
        lean = shorten(body, encoded) if len(raw) >= LEAN_FROM else None
        _ = lean or splice(raw, encoded, kind, given=False)
    marks.append(clock())
    for step, (start, end) in zip(STEPS, (*pairwise(marks), (marks[0], marks[-1])), strict=True):
        taken[step].append((end - start) / 1000 / max(len(group), 1))
    return prompts[-1] if prompts else PromptIds((), b"")


def _tokens(builder: PromptBuilder, text: str, *, special: bool) -> PromptIds:
    if builder.memory is None:
        return PromptIds((), builder.tokenizer.encode_bytes(text, add_special_tokens=special))
    return builder.memory.finish(builder.memory.find(text, special=special))


def processor() -> str:
    """The machine's own name of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def show(rows: dict[str, dict[str, float]], write: Callable[[str], None] = print) -> None:
    columns = ("bytes", "tokens", "reused", *STEPS)
    write("  ".join([f"{'prompt':26}", *(f"{column:>8}" for column in columns)]))
    for name, figures in rows.items():
        write("  ".join([f"{name:26}", *(f"{figures[column]:8.{1 if column in STEPS else 0}f}" for column in columns)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    builder = PromptBuilder.load(arguments.tokenizer)
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {builder.backend}"
    print(f"{machine}; microseconds of CPU, medians")
    rows = {name: measure(builder, name, arguments.seconds) for name in ROWS}
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
