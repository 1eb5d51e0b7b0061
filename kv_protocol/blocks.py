"""From an engine's blocks to whole chunks.

An engine reports its prefix cache block by block: a block is named by the engine's own hash, says which block comes
before it, and carries its token ids. A chunk is a run of blocks from one chunk boundary to the next, and is *whole*
while every one of them is present. This module follows the blocks and says which chunks became whole and which ended.

Blocks form a forest by their parents' hashes. Each present block learns, once its parents are known, its place in its
chunk and the hash of the chunk before (its *base*); a block in the last place of its chunk also gets the chunk's own
hash. Removing a block leaves the blocks behind it where they are, for when it comes back: chunks that contained it end,
chunks behind those stay. A block stored while the block before it is unknown is an *orphan*: counted, part of no chunk,
and healed as soon as the chain before it is stored. An engine may hold one block twice, so presence is counted.

A block whose content cannot be tied to tokens exactly (another size than the chunks divide into, prompt embeddings,
media whose extent is not known) is *opaque*: neither it nor anything behind it is in a chunk. So a hash given out
here is never a guess.
"""

import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kv_protocol.hashing import Media, chunk_hash, chunk_hashes, token_bytes

BlockHash = Hashable
Root = Callable[[str, str], bytes]
"""LoRA adapter and cache salt -> root hash."""


class _Content(NamedTuple):
    tokens: bytes  # little-endian uint32
    media: tuple[Media, ...]  # offsets count from the block's first token
    root: bytes  # of a first block; empty otherwise


@dataclass(slots=True)
class _Block:
    parent: BlockHash | None
    copies: int
    content: _Content | None  # None: opaque
    base: bytes | None = None  # hash before this block's chunk; None while not known
    place: int = 0  # in its chunk, from 0
    is_end: bool = False  # in the last place of its chunk
    chunk: bytes | None = None  # hash of the chunk that ends here, once it was whole
    whole: bool = False


class BlockChunks:
    """The chunks that an engine's present blocks make up, for one KV-cache group.

    Memory is proportional to the blocks present. Storing a block costs O(blocks per chunk) where a chunk ends and O(1)
    elsewhere; removing one costs O(blocks behind it in its chunk).
    """

    def __init__(self, chunk_size: int, root: Root) -> None:
        self.chunk_size = chunk_size
        self.orphans = 0
        """Blocks stored while the block before them was not present, in all."""
        self.unknown_removals = 0
        """Removals of blocks that were not present, in all."""
        self._root = root
        self._blocks: dict[BlockHash, _Block] = {}
        self._children: dict[BlockHash, set[BlockHash]] = {}  # block, present or not -> present blocks behind it
        self._chunks: dict[bytes, int] = {}  # whole chunk -> how many chains make it up

    def __len__(self) -> int:
        """How many chunks are whole."""
        return len(self._chunks)

    def __contains__(self, chunk: bytes) -> bool:
        return chunk in self._chunks

    @property
    def chunks(self) -> KeysView[bytes]:
        """The whole chunks, in no order."""
        return self._chunks.keys()

    @property
    def blocks(self) -> int:
        """How many different blocks are present."""
        return len(self._blocks)

    def stored(
        self,
        hashes: Sequence[BlockHash],
        parent: BlockHash | None,
        tokens: Sequence[int],
        block_size: int,
        *,
        lora: str = "",
        extra_keys: Sequence[Any] | None = None,
        media: Sequence[Media] | None = None,
    ) -> list[bytes]:
        """Note blocks stored one behind the other; returns the chunks that became whole.

        ``parent`` is the block before the first, None at the start of a prompt. ``extra_keys`` are vLLM's, one entry
        per block. ``media`` are the prompt's media items, with offsets that count from the first of ``tokens``; without
        them, blocks that hold media are opaque.
        """
        data = self._token_bytes(tokens, len(hashes), block_size)
        width = block_size * 4
        appeared: list[bytes] = []
        if data is not None and not media and not any(extra_keys or ()):
            root = self._root(lora, "") if parent is None else b""
            for index, block_hash in enumerate(hashes):
                self._store(block_hash, parent, _Content(data[index * width : (index + 1) * width], (), root), appeared)
                parent, root = block_hash, b""
            return appeared
        for index, block_hash in enumerate(hashes):
            content = None
            if data is not None:
                keys = extra_keys[index] if extra_keys and index < len(extra_keys) else None
                found = _media_in(media or (), index * block_size, block_size)
                salt = _salt(keys, lora, found, first=parent is None)
                if salt is not None:
                    root = self._root(lora, salt) if parent is None else b""
                    content = _Content(data[index * width : (index + 1) * width], found, root)
            self._store(block_hash, parent, content, appeared)
            parent = block_hash
        return appeared

    def removed(self, hashes: Iterable[BlockHash]) -> list[bytes]:
        """Note one copy of each block gone; returns the chunks that ended."""
        ended: list[bytes] = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                self.unknown_removals += 1
                continue
            block.copies -= 1
            if not block.copies:
                self._remove(block_hash, block, ended)
        return ended

    def cleared(self) -> None:
        """Note every block gone."""
        self._blocks.clear()
        self._children.clear()
        self._chunks.clear()

    def check(self) -> None:
        """Verify every invariant; O(blocks times blocks per chunk)."""
        chains: dict[bytes, int] = {}
        for block_hash, block in self._blocks.items():
            assert block.copies > 0, block_hash
            assert block.parent is None or block_hash in self._children[block.parent], block_hash
            assert block.base is not None or self._place(block) is None, block_hash
            complete = block.base is not None and block.is_end and self._run(block) is not None
            assert block.whole == complete, block_hash
            if block.whole:
                assert block.chunk is not None, block_hash
                chains[block.chunk] = chains.get(block.chunk, 0) + 1
        for parent, children in self._children.items():
            assert children, parent
            assert all(self._blocks[child].parent == parent for child in children), parent
        assert chains == self._chunks

    def _token_bytes(self, tokens: Sequence[int], blocks: int, block_size: int) -> bytes | None:
        if block_size <= 0 or self.chunk_size % block_size or len(tokens) != blocks * block_size:
            return None
        try:
            return token_bytes(tokens)
        except ValueError:
            return None

    def _store(
        self, block_hash: BlockHash, parent: BlockHash | None, content: _Content | None, appeared: list[bytes]
    ) -> None:
        block = self._blocks.get(block_hash)
        if block is None:
            block = self._blocks[block_hash] = _Block(parent, 1, content)
            if parent is not None:
                self.orphans += parent not in self._blocks
                self._children.setdefault(parent, set()).add(block_hash)
            if block_hash not in self._children:
                if (placed := self._place(block)) is not None:
                    block.base, block.place, block.is_end = placed
                    if block.is_end:
                        self._finish(block, appeared)
                return
        else:
            block.copies += 1
            # A copy whose content is known makes up for one whose content was not.
            if block.content is not None or content is None:
                return
            block.content = content
        self._settle(block_hash, block, appeared)

    def _remove(self, block_hash: BlockHash, block: _Block, ended: list[bytes]) -> None:
        for end in self._ends(block_hash, block):
            self._end(end, ended)
        del self._blocks[block_hash]
        if block.parent is not None:
            siblings = self._children[block.parent]
            siblings.discard(block_hash)
            if not siblings:
                del self._children[block.parent]

    def _settle(self, block_hash: BlockHash, block: _Block, appeared: list[bytes]) -> None:
        """Place a block and whatever thereby becomes known behind it, and revive the chunks that go through it."""
        todo = [(block_hash, block)]
        while todo:
            at, block = todo.pop()
            if block.base is None:
                placed = self._place(block)
                if placed is None:
                    continue
                block.base, block.place, block.is_end = placed
            if block.is_end:
                self._finish(block, appeared)
            for child_hash in self._children.get(at, ()):
                child = self._blocks[child_hash]
                # Behind a chunk's end, a block that has its place is part of another chunk.
                if child.base is None or not block.is_end:
                    todo.append((child_hash, child))

    def _place(self, block: _Block) -> tuple[bytes, int, bool] | None:
        """Base, place and whether the chunk ends here, from the block before; None while they cannot be known."""
        if block.content is None:
            return None
        width = len(block.content.tokens)
        last = self.chunk_size * 4 // width - 1
        if block.parent is None:
            return block.content.root, 0, last == 0
        parent = self._blocks.get(block.parent)
        if parent is None or parent.content is None or len(parent.content.tokens) != width:
            return None
        base = parent.chunk if parent.is_end else parent.base
        place = 0 if parent.is_end else parent.place + 1
        return None if base is None else (base, place, place == last)

    def _finish(self, end: _Block, appeared: list[bytes]) -> None:
        if end.whole or end.base is None or (run := self._run(end)) is None:
            return
        if end.chunk is None:
            end.chunk = self._hash(end.base, run)
        end.whole = True
        chains = self._chunks.get(end.chunk, 0)
        self._chunks[end.chunk] = chains + 1
        if not chains:
            appeared.append(end.chunk)

    def _end(self, end: _Block, ended: list[bytes]) -> None:
        if not end.whole or end.chunk is None:
            return
        end.whole = False
        self._chunks[end.chunk] -= 1
        if not self._chunks[end.chunk]:
            del self._chunks[end.chunk]
            ended.append(end.chunk)

    def _ends(self, block_hash: BlockHash, block: _Block) -> Iterator[_Block]:
        """The present last blocks of the chunks that contain the block."""
        todo = [(block_hash, block)]
        while todo:
            at, block = todo.pop()
            if block.base is None:
                continue
            if block.is_end:
                yield block
            else:
                todo += [(child, self._blocks[child]) for child in self._children.get(at, ())]

    def _run(self, end: _Block) -> list[_Content] | None:
        """The contents of the chunk that ends here, in order; None while one is missing."""
        run: list[_Content] = []
        block: _Block | None = end
        while block is not None and block.base is not None and block.content is not None:
            run.append(block.content)
            if not block.place:
                return run[::-1]
            block = self._blocks.get(block.parent)
        return None

    def _hash(self, base: bytes, run: list[_Content]) -> bytes:
        data = b"".join([content.tokens for content in run])
        if not any(content.media for content in run):
            return chunk_hash(base, data)
        width = len(run[0].tokens) // 4
        media = {
            Media(item.hash, item.offset + place * width, item.length)
            for place, content in enumerate(run)
            for item in content.media
        }
        tokens = struct.unpack(f"<{self.chunk_size}I", data)
        return chunk_hashes(base, tokens, self.chunk_size, media=sorted(media))[0]


def _media_in(media: Sequence[Media], start: int, length: int) -> tuple[Media, ...]:
    """The items that overlap a block, with offsets that count from its first token."""
    return tuple(
        Media(item.hash, item.offset - start, item.length)
        for item in media
        if item.offset < start + length and item.offset + item.length > start
    )


def _salt(keys: Sequence[Any] | None, lora: str, media: tuple[Media, ...], *, first: bool) -> str | None:
    """The cache salt among a block's extra keys, empty without one; None when a key is beyond understanding.

    Events carry a LoRA name and a salt as texts (the name first, the salt on a prompt's first block only), media as
    ``(hash, offset in the block)`` and prompt embeddings as bytes; vLLM's block hashes tag each with its source.
    """
    texts: list[str] = []
    seen: set[tuple[str, int]] = set()
    for key in keys or ():
        match key:
            case str(text) | ("cache_salt", str(text)) | ["lora", str(text), str()]:
                texts.append(text)
            case [str(media_hash), int(offset)] | ["mm", str(media_hash), int(offset)]:
                seen.add((media_hash, offset))
            case _:
                return None
    if lora and texts[:1] == [lora]:
        del texts[0]
    if len(texts) > first or seen != {(item.hash, item.offset) for item in media}:
        return None
    return texts[0] if texts else ""
