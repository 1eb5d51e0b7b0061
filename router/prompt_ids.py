"""The token ids of one prompt: what is known of its beginning from earlier prompts, and the rest.

A prompt's known beginning is a chain of ``Prefix``es. Each holds its own tokens only, and what was made of them once:
their chunk hashes under every namespace that asked, and their JSON. A prompt that shares its beginning with an earlier
one costs what its own end costs.
"""

import sys
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from kv_protocol.hashing import run_hashes, token_bytes

MAX_ROOTS = 4
"""Namespaces whose hashes one prefix keeps: workers of one model rarely differ in chunk size, tenants do in salt."""
_WIDTH = 4
_HASH_COST = 57  # a bytes object of 16, and a pointer to it
_LITTLE_ENDIAN = sys.byteorder == "little"

_encode = msgspec.json.Encoder().encode
Charge = Callable[["Prefix", int], None]


class Run(NamedTuple):
    """Chunks that end within one prefix; ``last`` hash and ``carry``, the tokens after it, are where to go on."""

    hashes: list[bytes]
    last: bytes
    carry: bytes


class Prefix:
    """Text from ``start`` to ``end`` behind ``parent``'s, and its tokens as little-endian uint32.

    Immutable but for what is derived from it on demand; ``charge`` is told how many bytes that takes.
    """

    __slots__ = (
        "_charge",
        "_json",
        "_runs",
        "alive",
        "branches",
        "cost",
        "count",
        "end",
        "ids",
        "key",
        "parent",
        "start",
        "text",
    )

    def __init__(self, parent: "Prefix | None", text: str, ids: bytes, charge: Charge) -> None:
        self.parent = parent
        self.text = text
        self.ids = ids
        self.start: int = parent.end if parent is not None else 0
        self.end: int = self.start + len(text)
        self.count: int = (parent.count if parent is not None else 0) + len(ids) // _WIDTH
        self.branches = 0
        self.alive = False
        self.key: Hashable = None
        self.cost = sys.getsizeof(text) + sys.getsizeof(ids) + _PREFIX_COST
        self._json: bytes | None = None
        self._runs: dict[bytes, Run] = {}
        self._charge = charge

    def json(self) -> bytes:
        """The ids, comma-separated; made once."""
        if self._json is None:
            self._json = ids_json(self.ids)
            self._charge(self, len(self._json))
        return self._json

    def run(self, root: bytes, last: bytes, carry: bytes, chunk_size: int) -> Run:
        """Its chunks in the namespace of ``root``, going on from ``last`` and ``carry``; made once."""
        known = self._runs.get(root)
        if known is not None:
            return known
        run = _run(last, carry + self.ids, chunk_size)
        added = len(run.hashes) * _HASH_COST + len(run.carry) + _RUN_COST
        if len(self._runs) >= MAX_ROOTS:
            dropped = self._runs.pop(next(iter(self._runs)), None)
            if dropped is not None:
                added -= len(dropped.hashes) * _HASH_COST + len(dropped.carry) + _RUN_COST
        self._runs[root] = run
        self._charge(self, added)
        return run


_PREFIX_COST = 900  # the object itself, its key and their places in tables
_RUN_COST = 300


class PromptIds:
    """Token ids of one prompt, counted with ``len``. Cheap to pass around; the ids themselves are made on demand."""

    __slots__ = ("_chain", "_count", "_tail")

    def __init__(self, chain: Sequence[Prefix], tail: bytes) -> None:
        self._chain = chain
        self._tail = tail
        self._count = len(tail) // _WIDTH + (chain[-1].count if chain else 0)

    @classmethod
    def of(cls, ids: Iterable[int]) -> "PromptIds":
        """Raises ValueError: an id is not a uint32."""
        return cls((), token_bytes(list(ids)))

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptIds) and self.data() == other.data()

    __hash__ = None  # type: ignore[assignment]

    @property
    def reused(self) -> int:
        """Tokens that come from earlier prompts or are kept for later ones."""
        return self._chain[-1].count if self._chain else 0

    def data(self) -> bytes:
        """The ids as little-endian uint32. O(tokens)."""
        return b"".join([*(prefix.ids for prefix in self._chain), self._tail])

    def tolist(self) -> list[int]:
        """The ids. O(tokens)."""
        return to_ids(self.data())

    def chunks(self, root: bytes, chunk_size: int) -> list[bytes]:
        """Hashes of the whole chunks, 16 bytes each, as ``kv_protocol.hashing.chunk_hashes`` gives them.

        O(prefixes + tokens not hashed before in this namespace); about 1 µs per chunk of 256 tokens.
        """
        if not self._chain:
            return run_hashes(root, self._tail, chunk_size)
        hashes: list[bytes] = []
        last, carry = root, b""
        for prefix in self._chain:
            own, last, carry = prefix.run(root, last, carry, chunk_size)
            hashes += own
        return hashes + _run(last, carry + self._tail, chunk_size).hashes

    def json_parts(self) -> list[bytes]:
        """Pieces of JSON that make the list of ids when joined; those of known prefixes are not made again."""
        parts = [b"["]
        for prefix in self._chain:
            if prefix.ids:
                parts += (prefix.json(), b",")
        if self._tail:
            parts.append(ids_json(self._tail))
        elif len(parts) > 1:
            parts.pop()
        parts.append(b"]")
        return parts


def _run(last: bytes, data: bytes, chunk_size: int) -> Run:
    hashes = run_hashes(last, data, chunk_size)
    return Run(hashes, hashes[-1] if hashes else last, data[len(hashes) * chunk_size * _WIDTH :])


def to_ids(data: bytes) -> list[int]:
    """Token ids from little-endian uint32."""
    if _LITTLE_ENDIAN:
        return memoryview(data).cast("I").tolist()
    values = array("I", data)
    values.byteswap()
    return values.tolist()


def ids_json(data: bytes) -> bytes:
    """Ids given as little-endian uint32, comma-separated."""
    return _encode(to_ids(data))[1:-1]
