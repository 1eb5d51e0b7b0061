"""What token ids sent along cost the router and save a vLLM worker, in CPU time per request.

    python -m benchmarks.token_ids [--repeats 12] [--json FILE]

One real vLLM server (CPU build, a two-layer model with a tokenizer trained on text like that it is sent, some four characters a token) answers
the same prompt of 1, 16 and 128 KB as text, with ids beside the text, and with ids in its place; chat and completions.
Its prefix cache holds the prompt after the first answer, so the engine has little to compute. Figures are medians over
repeats that take turns:

- ``worker``: CPU of vLLM's API-server process, all its threads, from request to answer;
- ``router``: CPU of making the body (JSON of ids, all of them made anew or all but the last kilobyte known) and of
  handing it to the kernel.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tokenizing import Talk, processor
from router.demo_model import CHAT_TEMPLATE, SPECIAL_TOKENS
from router.prompt import PromptBuilder
from router.prompt_ids import PromptIds
from router.splice import Kind, ids_of, splice, without_messages
from tests.support.engine import Engine, serve_engine

VOCABULARY = 6_000
CONTEXT = 65_536
SIZES = (1, 16, 128)
PATHS: dict[Kind, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def make_model(directory: Path) -> None:
    """Two small layers with random weights behind a byte-level tokenizer trained on the benchmark's own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    engine.train_from_iterator([Talk(0).text(1 << 20)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)


def body_of(kind: Kind, kilobytes: int) -> dict[str, Any]:
    talk = Talk(0)
    common = {"model": "small", "max_tokens": 1, "temperature": 0}
    if kind == "completions":
        return {**common, "prompt": talk.text(kilobytes << 10)}
    if kilobytes == 1:
        return {**common, "messages": [{"role": "user", "content": talk.text(1 << 10)}]}
    return {**common, "messages": talk.chat(kilobytes << 10)}


def bodies(builder: PromptBuilder, kind: Kind, body: dict[str, Any]) -> dict[str, Callable[[], bytes]]:
    """Ways to make the body a worker gets, by name."""
    raw = json.dumps(body).encode()
    text = builder.render(body) if kind == "chat" else body["prompt"]
    whole = builder.tokenizer.encode_bytes(text)
    assert builder.memory is not None
    known = builder.memory.finish(builder.memory.find(text[:-1000]))
    known = builder.memory.finish(builder.memory.find(text))
    known.json_parts()

    def parts(ids: PromptIds) -> list[bytes]:
        return ids_of([ids], several=False)

    ways: dict[str, Callable[[], bytes]] = {
        "text": lambda: raw,
        "ids, first": lambda: splice(raw, parts(PromptIds((), whole)), kind, given=False),
        "ids, known": lambda: splice(raw, parts(known), kind, given=False),
    }
    if kind == "chat":
        ways["ids only, first"] = lambda: without_messages(body, parts(PromptIds((), whole))) or b""
        ways["ids only, known"] = lambda: without_messages(body, parts(known)) or b""
    return ways


class Caller:
    """One connection to the worker; plain sockets, so that what is measured is not a client library."""

    def __init__(self, engine: Engine) -> None:
        parts = urlsplit(engine.url)
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=300)
        self._tasks = Path(f"/proc/{engine.process.pid}/task")

    def worker_cpu(self) -> float:
        """Milliseconds all threads of the API server have run."""
        total = 0
        for path in self._tasks.glob("*/schedstat"):
            try:
                total += int(path.read_text().split()[0])
            except OSError:  # a thread that ended
                continue
        return total / 1e6

    def call(self, kind: Kind, make: Callable[[], bytes]) -> tuple[float, float, int]:
        """Milliseconds of CPU of the router's part and of the worker's, and the prompt tokens the worker counted."""
        before = self.worker_cpu()
        started = time.process_time_ns()
        body = make()
        head = f"POST {PATHS[kind]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        self._socket.sendall(body)
        sent = (time.process_time_ns() - started) / 1e6
        answer = json.loads(self._answer())
        time.sleep(0.02)  # what the server does after its answer belongs to it too
        return sent, self.worker_cpu() - before, answer["usage"]["prompt_tokens"]

    def _answer(self) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._read()
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.split()[1] == b"200", data
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-le")
        )
        while len(body) < length:
            body += self._read()
        return body

    def _read(self) -> bytes:
        data = self._socket.recv(1 << 16)
        assert data, "the worker hung up"
        return data


def measure(caller: Caller, builder: PromptBuilder, kind: Kind, kilobytes: int, repeats: int) -> dict[str, Any]:
    ways = bodies(builder, kind, body_of(kind, kilobytes))
    caller.call(kind, ways["text"])
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, make in ways.items():
            taken[name].append(caller.call(kind, make))
    counts = {count for calls in taken.values() for _, _, count in calls}
    assert len(counts) == 1, counts
    row: dict[str, Any] = {"tokens": counts.pop()}
    for name, calls in taken.items():
        router, worker, _ = zip(*calls, strict=True)
        row[name] = {
            "bytes": len(ways[name]()),
            "router_ms": statistics.median(router),
            "worker_ms": statistics.median(worker),
        }
    return row


def show(title: str, row: dict[str, Any]) -> None:
    print(f"{title}, {row['tokens']} tokens")
    for name, figures in row.items():
        if name != "tokens":
            router, worker = figures["router_ms"], figures["worker_ms"]
            print(
                f"  {name:16} {figures['bytes']:8} bytes   router {router:7.3f}   worker {worker:8.3f}   "
                f"together {router + worker:8.3f} ms",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; milliseconds of CPU, medians of {arguments.repeats}")
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        make_model(model)
        builder = PromptBuilder.load(model)
        with serve_engine(str(model), Path(name)) as engine:
            caller = Caller(engine)
            for kind in PATHS:
                for kilobytes in SIZES:
                    title = f"{kind} {kilobytes} KB"
                    rows[title] = measure(caller, builder, kind, kilobytes, arguments.repeats)
                    show(title, rows[title])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
