import random
import tracemalloc
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from kv_protocol.blocks import BlockChunks
from kv_protocol.hashing import Media, chunk_hashes, root_hash

CHUNK, BLOCK = 8, 2
PER_CHUNK = CHUNK // BLOCK


def _root(lora: str = "", salt: str = "") -> bytes:
    return root_hash(chunk_size=CHUNK, model="m", lora=lora, cache_salt=salt)


def _names(tokens: list[int], tag: str = "") -> list[tuple[Any, ...]]:
    """Names of a prompt's blocks, each covering everything before it, as an engine's hashes do."""
    return [(tag, *tokens[: end + BLOCK]) for end in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def _expected(tokens: list[int], **names: str) -> list[bytes]:
    return chunk_hashes(_root(**names), tokens, CHUNK)


@pytest.fixture
def blocks() -> BlockChunks:
    return BlockChunks(CHUNK, _root)


TOKENS = list(range(100, 100 + 3 * CHUNK))
NAMES = _names(TOKENS)


def test_chunks_appear_when_their_last_block_is_stored(blocks: BlockChunks) -> None:
    first, second, third = _expected(TOKENS)
    assert blocks.stored(NAMES[:3], None, TOKENS[:6], BLOCK) == []
    assert blocks.stored(NAMES[3:6], NAMES[2], TOKENS[6:12], BLOCK) == [first]
    assert blocks.stored(NAMES[6:], NAMES[5], TOKENS[12:], BLOCK) == [second, third]
    assert set(blocks.chunks) == {first, second, third}
    blocks.check()


def test_a_removed_block_ends_its_chunk_alone_and_its_return_revives_it(blocks: BlockChunks) -> None:
    first, second, third = _expected(TOKENS)
    blocks.stored(NAMES, None, TOKENS, BLOCK)
    assert blocks.removed([NAMES[5]]) == [second]
    assert set(blocks.chunks) == {first, third}
    assert blocks.stored([NAMES[5]], NAMES[4], TOKENS[10:12], BLOCK) == [second]
    blocks.check()


def test_a_shared_leading_block_ends_every_branch(blocks: BlockChunks) -> None:
    other = [*TOKENS[:4], 1, 2, 3, 4]
    blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK)
    blocks.stored(_names(other)[2:], NAMES[1], other[4:], BLOCK)
    both = {_expected(TOKENS[:8])[0], _expected(other)[0]}
    assert set(blocks.chunks) == both
    assert set(blocks.removed([NAMES[0]])) == both
    assert set(blocks.stored([NAMES[0]], None, TOKENS[:2], BLOCK)) == both


def test_a_block_held_twice_survives_one_removal(blocks: BlockChunks) -> None:
    chunk = _expected(TOKENS[:8])
    assert blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK) == chunk
    assert blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK) == []
    assert blocks.removed(NAMES[:4]) == []
    assert blocks.removed(NAMES[3:4]) == chunk
    blocks.check()


def test_orphans_are_counted_and_healed_when_the_chain_is_stored(blocks: BlockChunks) -> None:
    assert blocks.stored(NAMES[4:], NAMES[3], TOKENS[8:], BLOCK) == []
    assert blocks.orphans == 1
    assert len(blocks) == 0
    assert blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK) == _expected(TOKENS)
    blocks.check()


def test_a_block_back_without_the_one_before_it_does_not_complete_its_chunk(blocks: BlockChunks) -> None:
    first, second, third = _expected(TOKENS)
    blocks.stored(NAMES, None, TOKENS, BLOCK)
    assert blocks.removed([NAMES[3], NAMES[4], NAMES[6]]) == [first, second]
    assert blocks.stored([NAMES[4]], NAMES[3], TOKENS[8:10], BLOCK) == []
    assert blocks.stored([NAMES[6]], NAMES[5], TOKENS[12:14], BLOCK) == []
    assert blocks.stored([NAMES[3]], NAMES[2], TOKENS[6:8], BLOCK) == [first, second]
    assert third in blocks
    blocks.check()


def test_removals_of_unknown_blocks_are_counted(blocks: BlockChunks) -> None:
    assert blocks.removed(["nobody", "nothing"]) == []
    assert blocks.unknown_removals == 2


def test_clearing_leaves_nothing(blocks: BlockChunks) -> None:
    blocks.stored(NAMES, None, TOKENS, BLOCK)
    blocks.stored(_names(TOKENS, "orphan")[4:], "absent", TOKENS[8:], BLOCK)
    blocks.cleared()
    assert (len(blocks), blocks.blocks, blocks._children) == (0, 0, {})


def test_two_chains_with_one_chunk_hash_end_together(blocks: BlockChunks) -> None:
    # An adapter loaded again under its name has other blocks and the same chunks.
    chunk = _expected(TOKENS[:8], lora="a")
    assert blocks.stored(_names(TOKENS[:8], "old"), None, TOKENS[:8], BLOCK, lora="a") == chunk
    assert blocks.stored(_names(TOKENS[:8], "again"), None, TOKENS[:8], BLOCK, lora="a") == []
    assert blocks.removed(_names(TOKENS[:8], "old")[-1:]) == []
    assert blocks.removed(_names(TOKENS[:8], "again")[-1:]) == chunk
    blocks.check()


@pytest.mark.parametrize(
    ("lora", "first_keys", "names"),
    [
        ("", None, {}),
        ("", ("tenant",), {"salt": "tenant"}),
        ("", (("cache_salt", "tenant"),), {"salt": "tenant"}),
        ("adapter", ("adapter",), {"lora": "adapter"}),
        ("adapter", ("adapter", "tenant"), {"lora": "adapter", "salt": "tenant"}),
        ("adapter", ["adapter", "adapter"], {"lora": "adapter", "salt": "adapter"}),
        ("adapter", (("lora", "adapter", "/path"), ("cache_salt", "t")), {"lora": "adapter", "salt": "t"}),
    ],
)
def test_salt_and_adapter_are_bound(blocks: BlockChunks, lora: str, first_keys: Any, names: dict[str, str]) -> None:
    later = [lora] if lora else None
    keys = [first_keys, later, later, later]
    stored = blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK, lora=lora, extra_keys=keys)
    assert stored == chunk_hashes(_root(**names), TOKENS[:8], CHUNK)


@pytest.mark.parametrize(
    "keys",
    [
        [None, (b"digest",), None, None],
        [(("prompt_embeds", b"digest"),), None, None, None],
        [None, ("a text on a later block",), None, None],
        [("salt", "and another"), None, None, None],
        [None, (("image", 1),), None, None],
        [None, (5,), None, None],
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_in_no_chunk_and_nothing_behind_it(blocks: BlockChunks, keys: list[Any]) -> None:
    assert blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK, extra_keys=keys) == []
    assert blocks.stored(NAMES[4:], NAMES[3], TOKENS[8:], BLOCK) == []
    assert blocks.removed(NAMES) == []
    assert (blocks.blocks, blocks.unknown_removals) == (0, 0)
    blocks.check()


IMAGE = Media("image", 5, 6)
IMAGE_KEYS: list[Any] = [
    None,
    None,
    (("image", 1),),
    (("image", -1),),
    (("mm", "image", -3),),
    [["image", -5]],
    None,
    None,
]


@pytest.mark.parametrize("cut", range(1, 8))
def test_media_are_bound_however_the_prompt_is_cut(blocks: BlockChunks, cut: int) -> None:
    tokens, at = TOKENS[:16], cut * BLOCK
    stored = blocks.stored(NAMES[:cut], None, tokens[:at], BLOCK, extra_keys=IMAGE_KEYS[:cut], media=[IMAGE])
    later = Media("image", IMAGE.offset - at, IMAGE.length)
    stored += blocks.stored(
        NAMES[cut:8], NAMES[cut - 1], tokens[at:], BLOCK, extra_keys=IMAGE_KEYS[cut:], media=[later]
    )
    assert stored == chunk_hashes(_root(), tokens, CHUNK, media=[IMAGE])
    blocks.check()


@pytest.mark.parametrize("media", [None, [], [Media("image", 4, 6)], [Media("other", 5, 6)], [Media("image", 5, 20)]])
def test_media_that_disagree_with_the_keys_give_no_wrong_chunk(blocks: BlockChunks, media: Any) -> None:
    stored = blocks.stored(NAMES[:8], None, TOKENS[:16], BLOCK, extra_keys=IMAGE_KEYS, media=media)
    assert len(stored) <= 1
    assert set(stored) <= set(chunk_hashes(_root(), TOKENS[:16], CHUNK, media=media or ()))


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(TOKENS[:7], BLOCK), (TOKENS[:12], 3), (TOKENS[:8], 0), ([-1] * 8, BLOCK), ([2**32] * 8, BLOCK)],
)
def test_tokens_that_do_not_fit_their_blocks_give_no_chunk(blocks: BlockChunks, tokens: list[int], size: int) -> None:
    assert blocks.stored(NAMES[:4], None, tokens, size) == []
    assert blocks.blocks == 4


def test_a_readable_copy_makes_up_for_an_unreadable_one(blocks: BlockChunks) -> None:
    blocks.stored(NAMES[:4], None, TOKENS[:7], BLOCK)
    assert blocks.stored(NAMES[:4], None, TOKENS[:8], BLOCK) == _expected(TOKENS[:8])
    blocks.check()


def test_blocks_that_name_themselves_as_parents_do_no_harm(blocks: BlockChunks) -> None:
    assert blocks.stored(["a"], "b", [1, 2], BLOCK) == []
    assert blocks.stored(["b"], "a", [1, 2], BLOCK) == []
    assert blocks.stored(["c"], "c", [1, 2], BLOCK) == []
    blocks.check()
    assert blocks.removed(["a", "b", "c"]) == []
    assert blocks._children == {}


def test_memory_is_bounded_by_the_blocks_present(blocks: BlockChunks) -> None:
    source, live = random.Random(7), []
    tracemalloc.start()
    try:
        sizes = []
        for number in range(3000):
            tokens = [number, *(source.randrange(1000) for _ in range(15))]
            names = _names(tokens)
            blocks.stored(names, None, tokens, BLOCK)
            live.append(names)
            if len(live) > 50:
                # Evicted from any end: early blocks may go while later ones stay for a while.
                gone = live.pop(0)
                blocks.removed(source.sample(gone, len(gone)))
            if number in (500, 2999):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    blocks.check()
    assert blocks.blocks == 50 * 8
    assert sizes[1] < sizes[0] * 1.5


# ---- against a model -------------------------------------------------------------------------------------------------


@dataclass
class _Known:
    copies: int
    readable: bool
    placed: bool = False
    hashed: bool = False


class Model:
    """Reads the rules literally, over and over, from the full names of blocks."""

    def __init__(self) -> None:
        self.present: dict[tuple[Any, ...], _Known] = {}

    def stored(self, name: tuple[Any, ...], *, readable: bool) -> None:
        known = self.present.get(name)
        if known is None:
            self.present[name] = _Known(1, readable)
        else:
            known.copies += 1
            known.readable |= readable
        while self._learn():
            pass

    def removed(self, name: tuple[Any, ...]) -> None:
        if (known := self.present.get(name)) is not None:
            known.copies -= 1
            if not known.copies:
                del self.present[name]

    def chunks(self) -> set[bytes]:
        return {
            _expected(list(name[1:]))[-1]
            for name, known in self.present.items()
            if known.hashed and self._complete(name)
        }

    def _learn(self) -> bool:
        learned = False
        for name, known in self.present.items():
            if not known.placed and known.readable and self._can_place(name):
                known.placed = learned = True
            if known.placed and not known.hashed and self._is_end(name) and self._complete(name):
                known.hashed = learned = True
        return learned

    def _can_place(self, name: tuple[Any, ...]) -> bool:
        if len(name) == 1 + BLOCK:
            return True
        parent = self.present.get(name[:-BLOCK])
        return parent is not None and (parent.hashed if self._is_end(name[:-BLOCK]) else parent.placed)

    def _complete(self, name: tuple[Any, ...]) -> bool:
        chunk = [name[: len(name) - BLOCK * back] for back in range(PER_CHUNK)]
        return all(each in self.present and self.present[each].placed for each in chunk)

    def _is_end(self, name: tuple[Any, ...]) -> bool:
        return (len(name) - 1) % CHUNK == 0


class AgainstTheModel(RuleBasedStateMachine):
    prompts = Bundle("prompts")

    @initialize()
    def start(self) -> None:
        self.blocks, self.model = BlockChunks(CHUNK, _root), Model()

    @rule(target=prompts, length=st.integers(1, 14), letter=st.integers(0, 1))
    def prompt(self, length: int, letter: int) -> list[int]:
        return [letter] * (length * BLOCK)

    @rule(target=prompts, base=prompts, keep=st.integers(0, 14), length=st.integers(1, 10), letter=st.integers(2, 4))
    def branch(self, base: list[int], keep: int, length: int, letter: int) -> list[int]:
        return base[: keep * BLOCK] + [letter] * (length * BLOCK)

    @rule(tokens=prompts, start=st.integers(0, 13), count=st.integers(1, 14), readable=st.integers(0, 9))
    def store(self, tokens: list[int], start: int, count: int, readable: int) -> None:
        names = _names(tokens)[start : start + count]
        if not names:
            return
        part = tokens[start * BLOCK : (start + len(names)) * BLOCK]
        before = self.model.chunks()
        for name in names:
            self.model.stored(name, readable=bool(readable))
        parent = _names(tokens)[start - 1] if start else None
        appeared = self.blocks.stored(names, parent, part if readable else part[1:], BLOCK)
        assert len(appeared) == len(set(appeared))
        assert set(appeared) == self.model.chunks() - before

    @rule(tokens=prompts, positions=st.lists(st.integers(0, 13), min_size=1, max_size=6))
    def remove(self, tokens: list[int], positions: list[int]) -> None:
        names = [name for at, name in enumerate(_names(tokens)) if at in positions]
        before = self.model.chunks()
        for name in names:
            self.model.removed(name)
        ended = self.blocks.removed(names)
        assert len(ended) == len(set(ended))
        assert set(ended) == before - self.model.chunks()

    @rule(tokens=prompts)
    def remove_all(self, tokens: list[int]) -> None:
        self.remove(tokens, list(range(14)))

    @rule()
    def clear(self) -> None:
        self.blocks.cleared()
        self.model = Model()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check()
        assert set(self.blocks.chunks) == self.model.chunks()
        assert self.blocks.blocks == len(self.model.present)


AgainstTheModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstTheModel = AgainstTheModel.TestCase
