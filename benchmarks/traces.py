"""Traces to replay: read from files in Mooncake's format, varied, or made up.

A trace file holds one request a line: ``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens,
and ``hash_ids``, one per block of 512 prompt tokens, the last of which may be partial. Equal ids mean an equal prompt up
to the end of that block.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec

from kv_protocol.hashing import HASH_BYTES

BLOCK_TOKENS = 512


class Line(msgspec.Struct):
    """One line of a trace file."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class Request(msgspec.Struct, frozen=True):
    """``at`` in seconds from the start of the trace. ``blocks`` are chunk hashes, the last block's too if partial."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[bytes, ...]

    @property
    def whole(self) -> tuple[bytes, ...]:
        """The blocks that are full: only these can be in a cache."""
        return self.blocks[: self.input_tokens // BLOCK_TOKENS]


@cache
def chunk_of(block: int) -> bytes:
    """A chunk hash for a block id: as long and as evenly spread as a real one."""
    return hashlib.blake2b(block.to_bytes(8, "little", signed=True), digest_size=HASH_BYTES).digest()


def read_trace(path: Path) -> list[Request]:
    """The requests of a file, in order of time.

    Raises:
        ValueError: a line is not a request; the text names it.
    """
    decoder = msgspec.json.Decoder(Line)
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            lines.append(decoder.decode(text))
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number} is no request of a trace: {error}") from error
    return _requests(lines)


def resample(requests: Sequence[Request], seed: int) -> list[Request]:
    """Other traffic of the same kind: whole conversations begin at other times, in another order.

    Requests that share more than the first block are one conversation and keep their distances in time.
    """
    rng = random.Random(seed)
    conversations: dict[bytes, list[Request]] = {}
    for number, request in enumerate(requests):
        key = request.blocks[1] if len(request.blocks) > 1 else number.to_bytes(8, "little")
        conversations.setdefault(key, []).append(request)
    groups = list(conversations.values())
    starts = [group[0].at for group in groups]
    rng.shuffle(starts)
    end = max((request.at for request in requests), default=0.0)
    moved = [
        msgspec.structs.replace(request, at=(start + request.at - group[0].at) % (end + 1))
        for start, group in zip(starts, groups, strict=True)
        for request in group
    ]
    return sorted(moved, key=lambda request: request.at)


def shared_prompt(
    *,
    requests: int,
    per_second: float,
    prompt_blocks: int = 12,
    own_tokens: int = 600,
    output: int = 200,
    seed: int = 1,
) -> list[Request]:
    """Every user has the same long system prompt and a short question of its own; Poisson arrivals."""
    rng = random.Random(seed)
    at, made = 0.0, []
    for number in range(requests):
        at += rng.expovariate(per_second)
        tokens = prompt_blocks * BLOCK_TOKENS + rng.randint(own_tokens // 2, own_tokens * 3 // 2)
        own = -(-tokens // BLOCK_TOKENS) - prompt_blocks
        blocks = [*range(prompt_blocks), *(1_000_000 + number * 1000 + i for i in range(own))]
        made.append(Line(at * 1000, tokens, max(1, round(rng.expovariate(1 / output))), blocks))
    return _requests(made)


def conversations(
    *, users: int, turns: int, per_second: float, think_s: float = 30.0, turn_tokens: int = 1500, seed: int = 1
) -> list[Request]:
    """Users who begin one after another and come back for up to ``turns`` turns with all that was said before."""
    rng = random.Random(seed)
    made, start, block = [], 0.0, 1
    for _ in range(users):
        start += rng.expovariate(per_second)
        at, tokens, blocks = start, rng.randint(100, 2 * turn_tokens), [0]
        for _ in range(rng.randint(1, turns)):
            whole = tokens // BLOCK_TOKENS
            while len(blocks) < whole:
                blocks.append(block := block + 1)
            block += 1
            partial = [block] if tokens % BLOCK_TOKENS and whole else []
            made.append(Line(at * 1000, tokens, rng.randint(50, 500), blocks[: max(whole, 1)] + partial))
            at += rng.expovariate(1 / think_s)
            tokens += rng.randint(100, 2 * turn_tokens)
    return _requests(made)


def _requests(lines: Iterable[Line]) -> list[Request]:
    made = [
        Request(line.timestamp / 1000, line.input_length, line.output_length, tuple(map(chunk_of, line.hash_ids)))
        for line in lines
    ]
    return sorted(made, key=lambda request: request.at)
