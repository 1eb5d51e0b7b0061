"""From an engine's blocks to chunks: what its KV events say, in the chunk hashes that prompts are looked up by.

An event names blocks by the engine's own hashes and gives their tokens. A block is kept with what came before it in its
chunk, so that the block that fills a chunk tells the chunk's hash; the chunk is held in a tier while all of its blocks
are. What cannot be named exactly is not counted: blocks whose beginning was not heard of, blocks with media or prompt
embeddings, cache groups that keep a window only.

An engine may hold a block twice, and tells when it drops one of the two: the block then counts as gone until it is
stored again. Errors are to this side: less is believed than is held.

Memory: some 25 bytes per token held.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from kv_protocol.hashing import chunk_hash, root_hash, token_bytes
from kv_protocol.messages import TIERS
from router.errors import TooManyChunks
from router.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event

SLICE = 64
"""Blocks after which others may have a turn."""
_MEDIA = {None: "gpu", "GPU": "gpu", "CPU": "cpu", "STORAGE": "disk"}
_WHOLE = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of cache groups that keep every block of a prompt."""

Key = int | bytes


class Change(NamedTuple):
    """What became of chunks in a tier; "cleared" stands for all of them."""

    what: Literal["stored", "removed", "cleared"]
    tier: str
    chunks: list[bytes]
    blocks: int = 1
    """How many blocks were looked at for it."""


class _Block:
    """``parent`` is the block before it in the same chunk, ``before`` the hash that its chunk follows on, None where that
    cannot be known; ``filled`` how many tokens of the chunk there are with it. ``ends`` are the blocks that fill a chunk of
    which this is part. It stays on record while it is held anywhere, or has ``children`` on record."""

    __slots__ = ("before", "children", "chunk", "ends", "filled", "key", "parent", "tiers", "tokens")

    def __init__(self, key: Key, before: bytes | None, parent: "_Block | None", tokens: bytes, filled: int) -> None:
        self.key = key
        self.children = 0
        self.before = before
        self.parent = parent
        self.tokens = tokens
        self.filled = filled
        self.chunk: bytes | None = None
        self.tiers = 0
        self.ends: tuple[_Block, ...] | set[_Block] = ()

    def members(self) -> "Iterator[_Block]":
        """Itself and the blocks before it in its chunk, last first."""
        block: _Block | None = self
        while block is not None:
            yield block
            block = block.parent


class EventChunks:
    """One engine's blocks. ``complete`` is whether everything it holds was heard of."""

    def __init__(self, model: str, chunk_size: int, most_blocks: int) -> None:
        self.complete = False
        self._model = model
        self._chunk_size = chunk_size
        self._most = most_blocks
        self._blocks: dict[Key, _Block] = {}
        self._group: int | None = None

    def __len__(self) -> int:
        """Blocks on record."""
        return len(self._blocks)

    def apply(self, event: Event) -> Iterator[Change]:
        """Take an event, and say what it means for chunks, at most ``SLICE`` blocks at a time.

        Raises:
            TooManyChunks: more blocks than the limit are on record.
            ValueError: the event contradicts itself.
        """
        match event:
            case AllBlocksCleared():
                self._blocks.clear()
                self.complete = True
                yield from (Change("cleared", tier, []) for tier in TIERS)
            case BlockStored() if self._counts(event):
                yield from self._stored(event)
            case BlockRemoved() if event.group_idx in (None, self._group):
                yield from self._removed(event)

    def _counts(self, event: BlockStored) -> bool:
        """Whether an event is of the group that answers for the prompt: the first seen that keeps every block."""
        if event.kv_cache_spec_kind not in _WHOLE:
            return False
        if self._group is None:
            self._group = event.group_idx
        return event.group_idx == self._group

    def _stored(self, event: BlockStored) -> Iterator[Change]:
        hashes, size = event.block_hashes, event.block_size
        tier = "remote" if event.locality == "REMOTE" else _MEDIA.get(event.medium)
        if tier is None or not hashes:
            return
        if not event.token_ids or (tier != "gpu" and event.extra_keys is None):
            # Of other tiers an engine may name blocks alone, or leave out what goes into their hashes beside the tokens.
            yield from self._named(hashes, tier)
            return
        if size <= 0 or len(event.token_ids) != len(hashes) * size:
            return  # blocks of a window, or part of one: which tokens are whose is not said
        tokens = token_bytes(event.token_ids)
        keys = event.extra_keys or [None] * len(hashes)
        if len(keys) != len(hashes):
            raise ValueError(f"an event names {len(hashes)} blocks, and keys of {len(keys)}")
        parent = self._blocks.get(event.parent_block_hash) if event.parent_block_hash is not None else None
        first = event.parent_block_hash is None
        for at in range(0, len(hashes), SLICE):
            fresh: list[bytes] = []
            for number in range(at, min(at + SLICE, len(hashes))):
                own = tokens[number * size * 4 : (number + 1) * size * 4]
                salt = _plain(keys[number], event.lora_name)
                made = self._made(hashes[number], parent, own, salt, event.lora_name, first=first)
                parent = self._placed(made)
                first = False
                fresh += self._taken(parent, tier)
            yield Change("stored", tier, fresh, min(SLICE, len(hashes) - at))

    def _named(self, hashes: Sequence[Key], tier: str) -> Iterator[Change]:
        for at in range(0, len(hashes), SLICE):
            known = [block for key in hashes[at : at + SLICE] if (block := self._blocks.get(key)) is not None]
            chunks = [chunk for block in known for chunk in self._taken(block, tier)]
            yield Change("stored", tier, chunks, min(SLICE, len(hashes) - at))

    def _made(
        self, key: Key, parent: _Block | None, tokens: bytes, salt: str | None, lora: str | None, *, first: bool
    ) -> _Block:
        """A block that follows ``parent``, or begins a prompt. ``salt`` is None where more than tokens goes into it."""
        size = len(tokens) // 4
        if first:
            fits = salt is not None and self._chunk_size % size == 0
            before = _root(self._chunk_size, self._model, lora or "", salt or "") if fits else None
            return _Block(key, before, None, tokens, size)
        if parent is None or parent.before is None or salt != "":
            return _Block(key, None, None, tokens, 0)
        if parent.chunk is not None:
            return _Block(key, parent.chunk, None, tokens, size)
        filled = parent.filled + size
        fits = filled <= self._chunk_size
        return _Block(key, parent.before if fits else None, parent if fits else None, tokens, filled)

    def _placed(self, made: _Block) -> _Block:
        """The block on record under a hash, now with its place, where only ``made`` has one."""
        block = self._blocks.get(made.key)
        if block is None:
            if len(self._blocks) >= self._most:
                raise TooManyChunks(f"more than {self._most:,} blocks")
            block = self._blocks[made.key] = made
        elif made.before is None or block.before is not None:
            return block
        else:
            block.before, block.parent, block.filled = made.before, made.parent, made.filled
        if block.parent is not None:
            block.parent.children += 1
        if block.before is not None and block.filled == self._chunk_size:
            members = list(block.members())
            block.chunk = chunk_hash(block.before, b"".join(member.tokens for member in reversed(members)))
            for member in members:
                _join(member, block)
        return block

    def _taken(self, block: _Block, tier: str) -> list[bytes]:
        """The chunks that are whole in a tier now that it holds a block."""
        bit = _bit(tier)
        block.tiers |= bit
        return [
            end.chunk
            for end in block.ends
            if end.chunk is not None and all(member.tiers & bit for member in end.members())
        ]

    def _removed(self, event: BlockRemoved) -> Iterator[Change]:
        tier = "remote" if event.locality == "REMOTE" else _MEDIA.get(event.medium)
        if tier is None:
            return
        bit = _bit(tier)
        for at in range(0, len(event.block_hashes), SLICE):
            gone: list[bytes] = []
            for key in event.block_hashes[at : at + SLICE]:
                block = self._blocks.get(key)
                if block is None or not block.tiers & bit:
                    continue
                gone += [end.chunk for end in block.ends if end.chunk is not None]
                block.tiers &= ~bit
                self._forget(block)
            yield Change("removed", tier, gone, min(SLICE, len(event.block_hashes) - at))

    def _forget(self, block: _Block | None) -> None:
        """Take a block off the record if nothing holds it there, and those before it that it held."""
        while block is not None and not block.tiers and not block.children:
            del self._blocks[block.key]
            if block.chunk is not None:
                for member in block.members():
                    _part(member, block)
            if block.parent is not None:
                block.parent.children -= 1
            block = block.parent


def _join(member: _Block, end: _Block) -> None:
    if isinstance(member.ends, set):
        member.ends.add(end)
    elif not member.ends:
        member.ends = (end,)
    elif member.ends != (end,):
        member.ends = {*member.ends, end}


def _part(member: _Block, end: _Block) -> None:
    if isinstance(member.ends, set):
        member.ends.discard(end)
    elif member.ends == (end,):
        member.ends = ()


def _bit(tier: str) -> int:
    return 1 << TIERS.index(tier)


def _plain(keys: Sequence[Any] | None, lora: str | None) -> str | None:
    """The salt among the keys that go into a block's hash beside its tokens, empty without one; None where there is more
    than a salt. An adapter's name comes first where there is an adapter, and is told apart by it."""
    rest = list(keys or ())
    if lora and rest[:1] == [lora]:
        del rest[0]
    if not rest:
        return ""
    return rest[0] if len(rest) == 1 and isinstance(rest[0], str) else None


@lru_cache(maxsize=1024)
def _root(chunk_size: int, model: str, lora: str, salt: str) -> bytes:
    return root_hash(chunk_size=chunk_size, model=model, lora=lora, cache_salt=salt)
