import random

from worker_connector.eviction import POLICIES, LeastRecentlyUsed


def test_every_named_policy_can_be_made() -> None:
    for policy in POLICIES.values():
        assert policy().victim() is None


def test_lru_gives_up_the_longest_unused() -> None:
    lru = LeastRecentlyUsed()
    for chunk in (b"a", b"b", b"c"):
        lru.add(chunk)
    lru.touch(b"a")
    assert lru.victim() == b"b"
    lru.hold(b"b")
    assert lru.victim() == b"c"
    lru.release(b"b")
    lru.discard(b"c")
    assert lru.victim() == b"a"


def test_touching_a_held_or_unknown_chunk_does_not_make_it_a_victim() -> None:
    lru = LeastRecentlyUsed()
    lru.add(b"a")
    lru.hold(b"a")
    lru.touch(b"a")
    lru.touch(b"b")
    assert lru.victim() is None


def test_lru_against_a_plain_list() -> None:
    rng, lru, order = random.Random(3), LeastRecentlyUsed(), []  # type: ignore[var-annotated]
    for _ in range(2000):
        chunk = bytes([rng.randrange(20)])
        match rng.randrange(4):
            case 0 if chunk not in order:
                lru.add(chunk)
                order.append(chunk)
            case 1 if chunk in order:
                lru.touch(chunk)
                order.remove(chunk)
                order.append(chunk)
            case 2 if chunk in order:
                lru.hold(chunk)
                order.remove(chunk)
                lru.release(chunk)
                order.append(chunk)
            case 3 if order and rng.random() < 0.5:
                victim = lru.victim()
                assert victim == order[0]
                lru.discard(victim)
                order.pop(0)
    assert order
