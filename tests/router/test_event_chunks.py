"""From blocks to chunks: what KV events say, against a plain model of an engine's prefix cache."""

import random
from collections.abc import Iterable

import pytest

from kv_protocol.hashing import chunk_hashes, root_hash
from kv_protocol.messages import TIERS
from router.errors import TooManyChunks
from router.event_chunks import SLICE, EventChunks
from router.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event

CHUNK, BLOCK = 16, 4


class Held:
    """What the changes make of chunks, by tier."""

    def __init__(self, chunk_size: int = CHUNK, most: int = 10_000) -> None:
        self.chunks = EventChunks("m", chunk_size, most)
        self.tiers: dict[str, set[bytes]] = {tier: set() for tier in TIERS}

    def apply(self, *events: Event) -> set[bytes]:
        for event in events:
            for change in self.chunks.apply(event):
                match change.what:
                    case "stored":
                        self.tiers[change.tier].update(change.chunks)
                    case "removed":
                        self.tiers[change.tier].difference_update(change.chunks)
                    case "cleared":
                        self.tiers[change.tier].clear()
        return self.tiers["gpu"]


def block_hash(tokens: Iterable[int], keys: object = None) -> int:
    return hash((tuple(tokens), repr(keys)))


def stored(
    tokens: list[int], start: int = 0, *, keys: list[list[object] | None] | None = None, **more: object
) -> BlockStored:
    """The event of a prompt's whole blocks from a block on."""
    ends = range((start + 1) * BLOCK, len(tokens) + 1, BLOCK)
    hashes: list[int | bytes] = [block_hash(tokens[:end], keys) for end in ends]
    parent = block_hash(tokens[: start * BLOCK], keys) if start else None
    return BlockStored(
        hashes,
        parent,
        tokens[start * BLOCK : len(hashes) * BLOCK + start * BLOCK],
        BLOCK,
        "GPU",
        extra_keys=keys,
        **more,  # type: ignore[arg-type]
    )


def removed(tokens: list[int], *blocks: int, keys: object = None, medium: str = "GPU") -> BlockRemoved:
    return BlockRemoved([block_hash(tokens[: (number + 1) * BLOCK], keys) for number in blocks], medium)


def chunks_of(tokens: list[int], *, lora: str = "", salt: str = "") -> list[bytes]:
    return chunk_hashes(root_hash(chunk_size=CHUNK, model="m", lora=lora, cache_salt=salt), tokens, CHUNK)


PROMPT = list(range(100, 150))


def test_a_prompts_chunks_are_those_that_a_router_looks_up() -> None:
    assert Held().apply(stored(PROMPT)) == set(chunks_of(PROMPT))
    assert len(chunks_of(PROMPT)) == 3


def test_blocks_may_come_one_by_one() -> None:
    held = Held()
    for number in range(len(PROMPT) // BLOCK):
        held.apply(stored(PROMPT[: (number + 1) * BLOCK], number))
        assert held.tiers["gpu"] == set(chunks_of(PROMPT[: (number + 1) * BLOCK]))


def test_a_chunk_lacks_what_one_of_its_blocks_lacks() -> None:
    held = Held()
    held.apply(stored(PROMPT))
    first, second, third = chunks_of(PROMPT)
    assert held.apply(removed(PROMPT, 5)) == {first, third}
    assert held.apply(stored(PROMPT, 4)) == {first, second, third}
    assert held.apply(removed(PROMPT, 11, 10, 9, 8)) == {first, second}
    assert held.apply(removed(PROMPT, 0)) == {second}


def test_prompts_that_part_within_a_chunk_have_their_own_ends() -> None:
    held = Held()
    others = [PROMPT[:10] + [number] * 10 for number in range(5)]
    for other in others:
        held.apply(stored(other))
    assert held.tiers["gpu"] == {chunks_of(other)[0] for other in others}
    held.apply(removed(others[2], 3, 4))
    assert held.tiers["gpu"] == {chunks_of(other)[0] for other in others if other is not others[2]}
    assert held.apply(removed(PROMPT, 1)) == set()  # shared by all of them
    held.apply(*(stored(other) for other in others))
    assert len(held.tiers["gpu"]) == 5


@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize("lora", ["", "adapter"])
def test_salts_and_adapters_are_part_of_the_chunks(salt: str, lora: str) -> None:
    base: list[object] = [lora] if lora else []
    blocks = len(PROMPT) // BLOCK
    keys = [[*base, *([salt] if salt and not number else [])] or None for number in range(blocks)]
    event = stored(PROMPT, keys=keys, lora_name=lora or None)
    assert Held().apply(event) == set(chunks_of(PROMPT, lora=lora, salt=salt))


@pytest.mark.parametrize(
    "keys",
    [[["image", 3]], [b"digest"], ["salt", ["image", 0]], [7]],
    ids=["media", "embeddings", "salt and media", "number"],
)
def test_what_cannot_be_named_exactly_is_not_counted(keys: list[object]) -> None:
    blocks = len(PROMPT) // BLOCK
    at_start = stored(PROMPT, keys=[keys, *[None] * (blocks - 1)])
    assert Held().apply(at_start) == set()
    later = stored(PROMPT, keys=[*[None] * 5, keys, *[None] * (blocks - 6)])
    assert Held().apply(later) == set(chunks_of(PROMPT)[:1])


def test_what_follows_on_something_unheard_of_is_counted_when_that_is_heard_of() -> None:
    held = Held()
    assert held.apply(stored(PROMPT, 3)) == set()
    assert held.apply(stored(PROMPT)) == set(chunks_of(PROMPT))  # announced again, from its beginning


def test_windows_other_groups_and_blocks_that_do_not_fit_are_left_alone() -> None:
    held = Held()
    held.apply(stored(PROMPT, group_idx=1, kv_cache_spec_kind="sliding_window"))
    held.apply(stored(PROMPT, group_idx=0, kv_cache_spec_kind="full_attention"))
    assert held.tiers["gpu"] == set(chunks_of(PROMPT))
    held.apply(BlockRemoved([block_hash(PROMPT[:BLOCK])], "GPU", group_idx=1))
    assert held.tiers["gpu"] == set(chunks_of(PROMPT))
    assert Held(chunk_size=10).apply(stored(PROMPT)) == set()
    odd = stored(PROMPT)
    odd.token_ids = odd.token_ids[:-1]
    assert Held().apply(odd) == set()


def test_tiers_are_kept_apart() -> None:
    held = Held()
    held.apply(stored(PROMPT))
    names = BlockStored(stored(PROMPT).block_hashes, None, [], BLOCK, "CPU")
    held.apply(names, BlockStored(names.block_hashes, None, [], BLOCK, "STORAGE", locality="REMOTE"))
    assert held.tiers["cpu"] == held.tiers["remote"] == set(chunks_of(PROMPT))
    held.apply(removed(PROMPT, *reversed(range(12))))
    assert held.tiers["gpu"] == set()
    assert held.tiers["cpu"] == set(chunks_of(PROMPT))
    held.apply(AllBlocksCleared())
    assert not any(held.tiers.values())
    assert not len(held.chunks)
    assert held.chunks.complete


def test_what_goes_into_blocks_beside_tokens_is_learnt_from_the_gpus_events_alone() -> None:
    """Offloading connectors leave salts and media out of theirs."""
    salted: list[list[object] | None] = [["tenant"], *[None] * 11]
    named = BlockStored(stored(PROMPT, keys=salted).block_hashes, None, PROMPT[: 12 * BLOCK], BLOCK, "CPU")
    held = Held()
    held.apply(named)
    assert held.tiers["cpu"] == set()
    held.apply(stored(PROMPT, keys=salted), named)
    assert held.tiers["cpu"] == set(chunks_of(PROMPT, salt="tenant"))
    held.apply(removed(PROMPT, *range(12), keys=salted))
    assert held.tiers == {"gpu": set(), "cpu": set(chunks_of(PROMPT, salt="tenant")), "disk": set(), "remote": set()}


def test_records_are_bounded() -> None:
    held = Held(most=8)
    with pytest.raises(TooManyChunks, match="more than 8 blocks"):
        held.apply(stored(PROMPT))


def test_events_that_contradict_themselves_are_refused() -> None:
    event = stored(PROMPT)
    event.extra_keys = [None]
    with pytest.raises(ValueError, match="12 blocks, and keys of 1"):
        Held().apply(event)


def test_long_events_are_cut() -> None:
    tokens = list(range(BLOCK * SLICE * 3))
    changes = list(EventChunks("m", CHUNK, 10_000).apply(stored(tokens)))
    assert len(changes) == 3
    assert [chunk for change in changes for chunk in change.chunks] == chunks_of(tokens)


@pytest.mark.parametrize("seed", range(20))
def test_against_an_engine_at_random(seed: int) -> None:
    """Prompts that share beginnings, evictions from the ends and from anywhere, prompts computed again, resets: never is a
    chunk believed of which a block is gone, and after a prompt was computed all of its chunks are believed."""
    rng = random.Random(seed)
    held, blocks = Held(), set[int]()
    stems = [[rng.randrange(9) for _ in range(rng.randrange(40))] for _ in range(4)]
    prompts = [rng.choice(stems) + [rng.randrange(9) for _ in range(rng.randrange(60))] for _ in range(12)]
    hashes = {tuple(p): [block_hash(p[:end]) for end in range(BLOCK, len(p) + 1, BLOCK)] for p in prompts}
    for _ in range(400):
        prompt = rng.choice(prompts)
        own = hashes[tuple(prompt)]
        action = rng.random()
        if action < 0.5:
            start = next((number for number, each in enumerate(own) if each not in blocks), len(own))
            if start < len(own):  # what an engine still has it does not compute, and announces nothing of
                held.apply(stored(prompt, start))
                blocks.update(own)
            assert set(chunks_of(prompt)) <= held.tiers["gpu"]
        elif action < 0.99 and own:
            number = len(own) - 1 if rng.random() < 0.7 else rng.randrange(len(own))
            gone = [own[number]] if rng.random() < 0.5 else own[number:]
            held.apply(BlockRemoved(list(reversed(gone)), "GPU"))
            blocks.difference_update(gone)
        elif action > 0.995:
            held.apply(AllBlocksCleared())
            blocks.clear()
        true = {
            chunk
            for p in prompts
            for at, chunk in enumerate(chunks_of(p))
            if set(hashes[tuple(p)][at * CHUNK // BLOCK : (at + 1) * CHUNK // BLOCK]) <= blocks
        }
        assert held.tiers["gpu"] == true
        assert len(held.chunks) <= len(blocks) * CHUNK // BLOCK
    held.apply(BlockRemoved([each for own in hashes.values() for each in own], "GPU"))
    assert not len(held.chunks)
    assert not held.tiers["gpu"]
