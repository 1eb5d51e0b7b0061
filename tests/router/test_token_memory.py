import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from kv_protocol.hashing import chunk_hashes, root_hash
from router import token_memory
from router.boundaries import Boundaries
from router.prompt_ids import MAX_ROOTS, PromptIds
from router.token_memory import TokenMemory
from router.tokenizer import Tokenizer
from tests.router.prompt_samples import PIECES, make_tokenizers, random_text

MARKS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]
LINES = {"added", "bytes", "bytes-split", "deepseek", "gpt2-class", "legacy-added", "wordpiece"} | {
    f"qwen{kind}" for kind in ("-class", "-forced", "35-class")
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(path) for name, path in make_tokenizers(tmp_path_factory.mktemp("memory")).items()}


@pytest.fixture(scope="module")
def engines(kinds: dict[str, Tokenizer]) -> dict[str, Engine]:
    return {name: Engine.from_str(tokenizer._reference.to_str()) for name, tokenizer in kinds.items()}


def memory_of(tokenizer: Tokenizer, limit: int = 1 << 20, step: int = 20) -> TokenMemory:
    memory = tokenizer.memory(MARKS, limit)
    assert memory is not None
    memory._step = step
    return memory


def encode(memory: TokenMemory, text: str, *, special: bool = False) -> PromptIds:
    return memory.finish(memory.find(text, special=special))


def test_lines_are_used_where_they_are_known_to_be_safe(kinds: dict[str, Tokenizer]) -> None:
    found = {name for name, tokenizer in kinds.items() if memory_of(tokenizer)._boundaries.lines}
    assert found == LINES
    assert all(memory_of(tokenizer)._boundaries.marks == tuple(MARKS) for tokenizer in kinds.values())


def conversation(rng: random.Random) -> Iterator[str]:
    """A text that grows, now and then goes back to an earlier state, and is edited."""
    states = [""]
    for _ in range(rng.randrange(2, 12)):
        text = rng.choice(states[-3:])
        if rng.random() < 0.2 and text:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
        turn = random_text(rng, 30) if rng.random() < 0.8 else "\n".join(random_text(rng, 6) for _ in range(12))
        text += rng.choice([f"<|im_start|>user\n{turn}<|im_end|>\n", f"{turn}\nLine", turn, ""])
        states.append(text)
        yield text


@pytest.mark.parametrize("name", [*sorted(LINES), "metaspace", "gemma", "unigram", "llama-class", "bytes-prefix"])
def test_tokens_are_those_of_the_whole_text(
    name: str, kinds: dict[str, Tokenizer], engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_memory, "_SHORT_TAIL", 15)
    memory, engine, rng, reused = memory_of(kinds[name], limit=60_000), engines[name], random.Random(name), 0
    root = root_hash(chunk_size=8, model=name)
    for _ in range(25):
        for text in conversation(rng):
            special = rng.random() < 0.3
            ids = encode(memory, text, special=special)
            expected = engine.encode(text, add_special_tokens=special).ids
            assert ids.tolist() == expected, text
            assert len(ids) == len(expected)
            assert ids.chunks(root, 8) == chunk_hashes(root, expected, 8)
            assert b"".join(ids.json_parts()) == str(expected).replace(" ", "").encode()
            reused += ids.reused
            memory.check()
    assert reused
    assert memory.evicted


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["bytes", "bytes-split", "gemma", "metaspace", "wordpiece", "unigram", "qwen-class", "added"]),
    st.lists(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join), max_size=6),
)
def test_every_cut_is_safe(
    kinds: dict[str, Tokenizer], engines: dict[str, Engine], name: str, pieces: list[str]
) -> None:
    text = "".join(f"{piece}{mark}" for piece, mark in zip(pieces, ["\nLine", "<|im_start|>", "\nx"] * 2, strict=False))
    engine = engines[name]
    boundaries = memory_of(kinds[name])._boundaries
    for cut in boundaries.every(text):
        left, right = (
            engine.encode(text[:cut], add_special_tokens=False),
            engine.encode(text[cut:], add_special_tokens=False),
        )
        assert left.ids + right.ids == engine.encode(text, add_special_tokens=False).ids, (text[:cut], text[cut:])


def test_a_grown_text_costs_its_end_only(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["bytes"]
    memory = memory_of(tokenizer, step=2048)
    text, encoded = "", list[int]()
    whole = tokenizer.encode_bytes

    def counting(piece: str) -> bytes:
        encoded.append(len(piece))
        return whole(piece)

    memory._encode = counting
    for turn in range(20):
        text += f"<|im_start|>user\n{turn} {'word ' * 200}<|im_end|>\n"
        encoded.clear()
        encode(memory, text + "<|im_start|>assistant\n")
        assert sum(encoded) < (1200 if turn > 2 else 4000)
        text += f"<|im_start|>assistant\n{'answer ' * 5}<|im_end|>\n"


def test_texts_that_open_alike_share_their_opening(kinds: dict[str, Tokenizer]) -> None:
    memory = memory_of(kinds["bytes"], step=2048)
    shared = "<|im_start|>system\n" + "You are kind.\nAlways. " * 1000
    encode(memory, f"{shared}<|im_end|>\n<|im_start|>user\none<|im_end|>\n")
    found = memory.find(f"{shared}<|im_end|>\n<|im_start|>user\nanother<|im_end|>\n")
    assert found.missing < 4096


def test_a_sample_that_agrees_is_not_believed(kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_memory, "_key", lambda _, cut, special: (special, cut, "", ""))
    memory, engine = memory_of(kinds["bytes"]), Engine.from_str(kinds["bytes"]._reference.to_str())
    for word in ("first", "other", "third"):
        text = f"<|im_start|>{word} and much more text than one step<|im_end|> and on"
        assert encode(memory, text).tolist() == engine.encode(text, add_special_tokens=False).ids
        memory.check()


def test_memory_is_bounded(kinds: dict[str, Tokenizer]) -> None:
    memory = memory_of(kinds["bytes"], limit=200_000)
    rng = random.Random(1)
    for number in range(300):
        ids = encode(memory, f"<|im_start|>{number} {random_text(rng, 60) * 5}<|im_end|>\n")
        for salt in range(MAX_ROOTS + 3):
            ids.chunks(root_hash(chunk_size=4, model="m", cache_salt=str(salt)), 4)
        ids.json_parts()
        memory.check()
    assert memory.evicted > 10
    assert len(memory) > 5
    memory.clear()
    assert (memory.used, len(memory)) == (0, 0)


def test_nothing_is_kept_without_room(kinds: dict[str, Tokenizer]) -> None:
    assert kinds["bytes"].memory(MARKS, 0) is None
    memory = memory_of(kinds["bytes"], limit=100)
    encode(memory, "<|im_start|>text that is longer than a step<|im_end|>")
    assert len(memory) == 0
    memory.check()


def test_pieces_that_do_not_make_the_whole_are_found_out(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Boundaries, "every", lambda _, text: [len(text) // 2] if len(text) > 1 else [])
    assert kinds["bytes"].memory(MARKS) is None


def test_threads_share_it(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["bytes"]
    memory = memory_of(tokenizer, limit=40_000)
    rng = random.Random(5)
    texts = [text for _ in range(6) for text in conversation(rng)]
    expected = [tokenizer.encode(text) for text in texts]
    root = root_hash(chunk_size=4, model="m")
    hashes = [chunk_hashes(root, ids, 4) for ids in expected]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(3):
            for text, ids, chunks in zip(texts, expected, hashes, strict=True):
                found = encode(memory, text)
                if found.tolist() != ids or found.chunks(root, 4) != chunks:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    memory.check()


@pytest.mark.parametrize(
    ("token", "safe"),
    [
        ({"content": "<|a|>"}, True),
        ({"content": "<|a|>", "normalized": True}, False),
        ({"content": "<|a|>", "lstrip": True}, False),
        ({"content": "<|a|>", "single_word": True}, False),
        ({"content": "a"}, False),
        ({"content": "##a##"}, False),
        ({"content": " <a>"}, False),
    ],
)
def test_which_tokens_open_a_cut(token: dict[str, object], safe: bool) -> None:
    flags = {"normalized": False, "lstrip": False, "single_word": False, "rstrip": False}
    serialized = {"added_tokens": [flags | token, flags | {"content": "<|b|>"}], "model": {}}
    mark = str(token["content"])
    assert (mark in Boundaries.of(serialized, [mark, "absent"]).marks) is safe


@pytest.mark.parametrize("other", ["<|a|>longer", "x<|a|>", "x<|", "<<|a"])
def test_tokens_that_touch_another_open_no_cut(other: str) -> None:
    flags = {"normalized": False, "lstrip": False, "single_word": False, "rstrip": False}
    serialized = {"added_tokens": [flags | {"content": "<|a|>"}, flags | {"content": other}], "model": {}}
    assert "<|a|>" not in Boundaries.of(serialized, ["<|a|>"]).marks


def test_loads_for_every_kind_of_directory(tmp_path: Path) -> None:
    for name, path in make_tokenizers(tmp_path).items():
        assert Tokenizer.load(path).memory(["<|im_start|>"]) is not None, name
