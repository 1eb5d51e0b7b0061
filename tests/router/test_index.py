import random
import sys
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_protocol.digests import RunningDigest, SetDigest
from kv_protocol.messages import TIERS
from router.errors import TooManyChunks
from router.holders import with_tiers, without
from router.index import Hit, Index


def chunk(number: int) -> bytes:
    return sha256(number.to_bytes(8, "little")).digest()[:16]


def chunks(count: int, start: int = 0) -> list[bytes]:
    return [chunk(number) for number in range(start, start + count)]


def filled(**workers: dict[str, list[bytes]]) -> Index:
    index = Index()
    for worker, tiers in workers.items():
        index.open(worker)
        for tier, held in tiers.items():
            index.stored(worker, tier, held)
    index.check()
    return index


def digests_of(content: dict[str, set[bytes]]) -> dict[str, SetDigest]:
    digests = {}
    for tier, held in content.items():
        running = RunningDigest()
        for item in held:
            running.add(item)
        digests[tier] = running.take()
    return digests


def hit_by_definition(held: dict[str, set[bytes]], prompt: list[bytes]) -> Hit:
    gpu = 0
    while gpu < len(prompt) and prompt[gpu] in held["gpu"]:
        gpu += 1
    total = gpu
    while total < len(prompt) and any(prompt[total] in held[tier] for tier in TIERS[1:]):
        total += 1
    return Hit(gpu, total)


def test_a_hit_is_the_gpu_run_continued_behind_it() -> None:
    prompt = chunks(6)
    index = filled(
        whole={"gpu": prompt},
        continued={"gpu": prompt[:2], "cpu": prompt[2:4]},
        gap={"gpu": prompt[:2], "cpu": prompt[3:]},
        behind={"cpu": prompt[:3], "disk": prompt[3:5]},
        back={"gpu": [prompt[0], prompt[2]], "cpu": [prompt[1]]},
        nothing={},
    )
    hits = index.lookup(prompt, ["whole", "continued", "gap", "behind", "back", "nothing", "stranger"])
    assert hits == {
        "whole": Hit(6, 6),
        "continued": Hit(2, 4),
        "gap": Hit(2, 2),
        "behind": Hit(0, 5),
        "back": Hit(1, 2),
        "nothing": Hit(0, 0),
        "stranger": Hit(0, 0),
    }
    assert index.tiers("behind", prompt) == {"gpu": 0, "cpu": 3, "disk": 2, "remote": 0}
    assert index.tiers("continued", prompt) == {"gpu": 2, "cpu": 2, "disk": 0, "remote": 0}


def test_nobody_is_asked_about() -> None:
    assert filled(a={"gpu": chunks(3)}).lookup(chunks(3), []) == {}
    assert filled(a={"gpu": chunks(3)}).lookup([], ["a"]) == {"a": Hit(0, 0)}


@given(st.lists(st.dictionaries(st.sampled_from(TIERS), st.sets(st.integers(0, 11))), min_size=1, max_size=5))
def test_lookup_equals_its_definition(holdings: list[dict[str, set[int]]]) -> None:
    prompt = chunks(12)
    held = [{tier: {chunk(n) for n in numbers.get(tier, ())} for tier in TIERS} for numbers in holdings]
    index = Index()
    for number, content in enumerate(held):
        index.open(str(number))
        for tier in TIERS:
            index.stored(str(number), tier, content[tier])
    hits = index.lookup(prompt, [str(number) for number in range(len(held))])
    assert hits == {str(number): hit_by_definition(content, prompt) for number, content in enumerate(held)}


def test_dropping_takes_effect_at_once_and_is_swept_in_steps() -> None:
    index = filled(a={"gpu": chunks(500), "cpu": chunks(300)}, b={"gpu": chunks(500)})
    index.drop("a")
    assert index.lookup(chunks(500), ["a", "b"]) == {"a": Hit(0, 0), "b": Hit(500, 500)}
    index.check()
    steps = 0
    while index.sweep(100):
        index.check()
        steps += 1
    assert steps >= 5
    assert index.is_swept("b")
    index.drop("b")
    while index.sweep(100):
        pass
    assert len(index) == 0
    index.check()


def test_a_returning_worker_does_not_inherit_its_past() -> None:
    index = filled(a={"gpu": chunks(100)})
    index.drop("a")
    index.sweep(10)
    index.open("a")
    assert index.lookup(chunks(100), ["a"]) == {"a": Hit(0, 0)}
    index.stored("a", "gpu", chunks(3))
    while index.sweep(7):
        index.check()
    assert index.lookup(chunks(100), ["a"]) == {"a": Hit(3, 3)}
    index.check()


def test_clearing_a_tier_hides_it_before_it_is_swept() -> None:
    index = filled(a={"gpu": chunks(100), "cpu": chunks(50)})
    index.cleared("a", "gpu")
    assert index.lookup(chunks(100), ["a"]) == {"a": Hit(0, 50)}
    assert index.sizes("a") == {"gpu": 0, "cpu": 50, "disk": 0, "remote": 0}
    index.stored("a", "gpu", chunks(2))
    assert index.lookup(chunks(100), ["a"]) == {"a": Hit(2, 50)}
    index.check()


def test_slots_are_used_again() -> None:
    index = Index()
    for _ in range(50):
        index.open("a")
        index.stored("a", "gpu", chunks(10))
        index.drop("a")
        while index.sweep(1000):
            pass
    assert index._slot_count == 1
    assert len(index) == 0


def test_opening_twice_is_refused() -> None:
    index = filled(a={})
    with pytest.raises(ValueError, match="in the index already"):
        index.open("a")


def test_what_is_known_already_changes_nothing() -> None:
    index = filled(a={"gpu": chunks(3)})
    index.stored("a", "gpu", chunks(3))
    index.removed("a", "gpu", chunks(2, start=50))
    index.check()
    assert index.sizes("a")["gpu"] == 3


def test_digests_agree_with_the_worker() -> None:
    content = {"gpu": set(chunks(200)), "cpu": set(chunks(80, 150))}
    index = filled(a={tier: list(held) for tier, held in content.items()})
    assert index.verify("a", digests_of(content)) == []
    content["cpu"].pop()
    assert index.verify("a", digests_of(content)) == ["cpu"]
    assert index.verify("a", {"gpu": digests_of(content)["gpu"]}) == ["cpu"]


@pytest.mark.parametrize("damage", ["flipped", "lost", "invented"])
def test_damage_to_the_contents_is_found_within_one_round_of_parts(damage: str) -> None:
    index = filled(a={"gpu": chunks(1000)}, b={"gpu": chunks(1000, 5000)})
    victim = chunk(7)
    part = index._parts[victim[0]]
    held = index._columns["a"][0].grown[None]
    if damage == "flipped":
        part[victim] = without(with_tiers(part[victim], 0, 2), 1) or 0
    elif damage == "lost":
        del part[victim]
    else:
        part[bytes([victim[0]]) + bytes(15)] = held
    with pytest.raises(AssertionError):
        index.check()
    found = [index.audit(130)]
    while index.audited:
        found.append(index.audit(130))
    assert found.count(["a"]) == 1, "the other worker is whole, and each part is recounted once in a round"
    assert found.count([]) == len(found) - 1 > 10


def test_an_audit_counts_each_part_as_it_was_at_one_moment() -> None:
    rng = random.Random(3)
    pool = chunks(2000)
    index = filled(a={"gpu": pool[:1000]}, b={"cpu": pool[500:]})
    for _ in range(600):
        worker, tier = rng.choice([("a", "gpu"), ("b", "cpu")])
        rng.choice([index.stored, index.removed])(worker, tier, rng.sample(pool, 30))
        if rng.random() < 0.02:
            index.cleared("b", "cpu")
        if rng.random() < 0.02:
            index.drop("a")
            index.open("a")
        if rng.random() < 0.3:
            index.sweep(50)
        assert index.audit(3) == []
    index.check()


def test_chunks_that_come_and_go_do_not_swell_the_index() -> None:
    index = filled(a={"gpu": []})
    held = [bytes([0]) + chunk(number)[1:] for number in range(39_000)]
    index.stored("a", "gpu", held)
    slim = sys.getsizeof(index._parts[0])
    for step in range(1, 6):
        fresh = [bytes([0]) + chunk(number + step * 39_000)[1:] for number in range(39_000)]
        for at in range(0, 39_000, 500):
            index.removed("a", "gpu", held[at : at + 500])
            index.stored("a", "gpu", fresh[at : at + 500])
        held = fresh
    assert sys.getsizeof(index._parts[0]) > slim, "else there is nothing to compact"
    for _ in range(256):
        index.compact()
    assert sys.getsizeof(index._parts[0]) <= slim
    index.check()
    assert index.lookup(held[:50], ["a"]) == {"a": Hit(50, 50)}


def test_a_worker_may_not_fill_the_index() -> None:
    index = Index()
    index.open("a", limit=100)
    index.stored("a", "gpu", chunks(60))
    index.stored("a", "gpu", chunks(60))
    index.stored("a", "cpu", chunks(40))
    with pytest.raises(TooManyChunks, match="more than 100 chunks"):
        index.stored("a", "cpu", chunks(1, start=60))
    index.check()


def test_a_set_of_workers_asked_about_again_is_looked_up_as_it_is_now() -> None:
    index = filled(a={"gpu": chunks(4)}, b={})
    assert index.lookup(chunks(4), ["a", "b"]) == {"a": Hit(4, 4), "b": Hit(0, 0)}
    index.drop("a")
    assert index.lookup(chunks(4), ["a", "b"]) == {"a": Hit(0, 0), "b": Hit(0, 0)}
    index.open("c")
    index.stored("c", "gpu", chunks(2))
    index.open("a")
    index.stored("a", "cpu", chunks(4))
    assert index.lookup(chunks(4), ["a", "b"]) == {"a": Hit(0, 4), "b": Hit(0, 0)}
    assert index.lookup(chunks(4), ["a", "c"]) == {"a": Hit(0, 4), "c": Hit(2, 2)}
    result = index.lookup(chunks(4), ["a", "c"])
    result["a"] = Hit(9, 9)
    assert index.lookup(chunks(4), ["a", "c"])["a"] == Hit(0, 4), "a result is the caller's"
    for number in range(200):
        index.lookup(chunks(1), [f"stranger {number}"])
    assert len(index._groups) <= 64


@pytest.mark.parametrize("strangers", [0, 62, 100])
def test_random_histories_keep_every_invariant(strangers: int) -> None:
    """Strangers hold nothing; they only take slots, so that sets of every form occur."""
    for seed in range(4):
        _random_history(random.Random(seed), strangers)


def _random_history(rng: random.Random, strangers: int) -> None:
    index = Index()
    for number in range(strangers):
        index.open(f"stranger {number}")
    ledger: dict[str, dict[str, set[bytes]]] = {}
    pool = chunks(40)
    for _ in range(200):
        worker = rng.choice("abcdefghijkl")
        tier = rng.choice(TIERS)
        some = rng.sample(pool, rng.randint(1, 30))
        if worker not in ledger:
            index.open(worker)
            ledger[worker] = {name: set() for name in TIERS}
        action = rng.choices(["store", "remove", "clear", "drop", "sweep"], [12, 5, 1, 1, 4])[0]
        if action == "store":
            index.stored(worker, tier, some)
            ledger[worker][tier].update(some)
        elif action == "remove":
            index.removed(worker, tier, some)
            ledger[worker][tier].difference_update(some)
        elif action == "clear":
            index.cleared(worker, tier)
            ledger[worker][tier].clear()
        elif action == "drop":
            index.drop(worker)
            del ledger[worker]
        else:
            index.sweep(rng.randint(1, 40))
        index.check()
        assert index.audit(10) == []
        prompt = rng.sample(pool, 10)
        expected = {name: hit_by_definition(held, prompt) for name, held in ledger.items()}
        assert index.lookup(prompt, list(ledger)) == expected
    for name, held in ledger.items():
        assert index.contents(name) == held
        assert index.sizes(name) == {tier: len(content) for tier, content in held.items()}
        assert index.verify(name, digests_of(held)) == []
        for prompt in (rng.sample(pool, 10) for _ in range(20)):
            hit = hit_by_definition(held, prompt)
            behind = [next(t for t in TIERS[1:] if item in held[t]) for item in prompt[hit.gpu : hit.total]]
            assert index.tiers(name, prompt) == {tier: behind.count(tier) for tier in TIERS} | {"gpu": hit.gpu}
