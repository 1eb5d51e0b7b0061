import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.hashing import Media, chunk_hashes, root_hash, token_bytes
from tests.kv_protocol.literal_hashes import literal_hashes

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("chunk_hash_vectors.json").read_text("utf-8"))
PAGE = Path(__file__).parents[2] / "docs" / "chunk-hashes.md"

token_ids = st.integers(0, 2**32 - 1)
names = st.text(max_size=8)
prompts = st.lists(token_ids, max_size=40)


def _hashes(vector: dict[str, Any]) -> tuple[str, list[str]]:
    root = root_hash(
        chunk_size=vector["chunk_size"], model=vector["model"], lora=vector["lora"], cache_salt=vector["cache_salt"]
    )
    media = [Media(**item) for item in vector["media"]]
    return root.hex(), [each.hex() for each in chunk_hashes(root, vector["tokens"], vector["chunk_size"], media=media)]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_published_vector(vector: dict[str, Any]) -> None:
    assert _hashes(vector) == (vector["root"], vector["hashes"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors_follow_from_the_documented_format_alone(vector: dict[str, Any]) -> None:
    fields = {key: value for key, value in vector.items() if key not in ("name", "root", "hashes")}
    root, hashes = literal_hashes(**fields)
    assert (root.hex(), [each.hex() for each in hashes]) == (vector["root"], vector["hashes"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_page_shows_the_vectors(vector: dict[str, Any]) -> None:
    page = PAGE.read_text("utf-8")
    assert vector["root"] in page
    assert all(each in page for each in vector["hashes"])


@given(prompts, st.integers(1, 9), names, names, names)
def test_equals_the_literal_reading(tokens: list[int], size: int, model: str, lora: str, salt: str) -> None:
    root = root_hash(chunk_size=size, model=model, lora=lora, cache_salt=salt)
    expected = literal_hashes(chunk_size=size, model=model, lora=lora, cache_salt=salt, tokens=tokens)
    assert (root, chunk_hashes(root, tokens, size)) == expected


@given(prompts, prompts, st.integers(1, 9))
def test_a_prefix_keeps_its_hashes(tokens: list[int], more: list[int], size: int) -> None:
    root = root_hash(chunk_size=size, model="m")
    short, long = chunk_hashes(root, tokens, size), chunk_hashes(root, tokens + more, size)
    assert len(short) == len(tokens) // size
    assert long[: len(short)] == short


@given(st.lists(token_ids, min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_a_changed_token_changes_every_hash_from_its_chunk_on(
    tokens: list[int], size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(token_ids.filter(lambda token: token != tokens[at]))
    root = root_hash(chunk_size=size, model="m")
    changed = [*tokens[:at], other, *tokens[at + 1 :]]
    for index, (one, two) in enumerate(
        zip(chunk_hashes(root, tokens, size), chunk_hashes(root, changed, size), strict=True)
    ):
        assert (one == two) == (index < at // size)


@given(st.lists(token_ids, min_size=9, max_size=40), st.integers(1, 9), st.data())
def test_hashing_goes_on_from_any_chunk(tokens: list[int], size: int, data: st.DataObject) -> None:
    root = root_hash(chunk_size=size, model="m")
    media = [Media("image", 3, 7)]
    whole = chunk_hashes(root, tokens, size, media=media)
    done = data.draw(st.integers(0, len(whole) - 1))
    parent = whole[done - 1] if done else root
    rest = chunk_hashes(parent, tokens[done * size :], size, media=media, start=done * size)
    assert whole[:done] + rest == whole


@given(st.lists(token_ids, min_size=8, max_size=24), names, names, names, names)
def test_every_name_changes_every_hash(tokens: list[int], model: str, lora: str, salt: str, other: str) -> None:
    root = root_hash(chunk_size=4, model=model, lora=lora, cache_salt=salt)
    roots = [
        root_hash(chunk_size=4, model=other, lora=lora, cache_salt=salt),
        root_hash(chunk_size=4, model=model, lora=other, cache_salt=salt),
        root_hash(chunk_size=4, model=model, lora=lora, cache_salt=other),
    ]
    mine = set(chunk_hashes(root, tokens, 4))
    for given_name, changed in zip((model, lora, salt), roots, strict=True):
        assert bool(mine & set(chunk_hashes(changed, tokens, 4))) == (given_name == other)


def test_names_do_not_run_into_each_other() -> None:
    roots = {
        root_hash(chunk_size=4, model=m, lora=a, cache_salt=s)
        for m, a, s in [
            ("ab", "", ""),
            ("a", "b", ""),
            ("a", "", "b"),
            ("", "ab", ""),
            ("", "a", "b"),
            ("", "", "ab"),
        ]
    }
    assert len(roots) == 6


def test_the_chunk_size_changes_every_hash() -> None:
    tokens = list(range(16))
    sets = [set(chunk_hashes(root_hash(chunk_size=n, model="m"), tokens, n)) for n in (2, 4, 8)]
    assert len(set.union(*sets)) == sum(map(len, sets))


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 30), st.integers(1, 12))
def test_media_change_every_hash_from_their_first_chunk_on(offset: int, length: int, other: int, size: int) -> None:
    root = root_hash(chunk_size=4, model="m")
    tokens = [7] * 48
    plain = chunk_hashes(root, tokens, 4)
    with_media = chunk_hashes(root, tokens, 4, media=[Media("x", offset, length)])
    first = offset // 4
    assert with_media[:first] == plain[:first]
    assert not set(with_media[first:]) & set(plain)
    elsewhere = chunk_hashes(root, tokens, 4, media=[Media("x", other, size)])
    same = (offset, length) == (other, size)
    assert (elsewhere[-1] == with_media[-1]) == same
    assert chunk_hashes(root, tokens, 4, media=[Media("y", offset, length)])[-1] != with_media[-1]


def test_the_order_in_which_media_are_given_does_not_matter() -> None:
    root, items = root_hash(chunk_size=4, model="m"), [Media("b", 3, 3), Media("a", 0, 2), Media("c", 9, 4)]
    assert chunk_hashes(root, [1] * 16, 4, media=items) == chunk_hashes(root, [1] * 16, 4, media=items[::-1])


def test_independent_of_process_and_hash_seed() -> None:
    code = (
        "from kv_protocol.hashing import *\n"
        "root = root_hash(chunk_size=4, model='m', lora='l', cache_salt='s')\n"
        "print([h.hex() for h in chunk_hashes(root, list(range(12)), 4, media=[Media('x', 1, 2)])])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(printed) == 1


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "1", None])
def test_tokens_that_are_no_uint32_are_refused(token: Any) -> None:
    with pytest.raises(ValueError, match="token ids must be integers between 0 and"):
        token_bytes([1, token])


def test_impossible_sizes_and_starts_are_refused() -> None:
    for size in (0, -1, 2**32):
        with pytest.raises(ValueError, match="chunk_size must be between 1 and"):
            root_hash(chunk_size=size, model="m")
    with pytest.raises(ValueError, match=r"start \(3\) must be a multiple of chunk_size \(4\)"):
        chunk_hashes(b"", [1] * 8, 4, start=3)
