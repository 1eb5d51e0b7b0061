from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.tags import MOST_TAGS, Tags


def chunks(start: int, count: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in range(start, start + count)]


def test_tags_gather_chunks_once_each() -> None:
    tags = Tags(Ledger(LeastRecentlyUsed()))
    tags.add(["a"], chunks(0, 3))
    tags.add(["a", "b"], chunks(2, 3))
    assert tags.chunks("a") == chunks(0, 5)
    assert tags.counts(1) == {"b": 3}
    assert tags.chunks("c") == []


def test_the_book_is_bounded_and_what_was_used_last_stays() -> None:
    tags = Tags(Ledger(LeastRecentlyUsed()), most_chunks=10)
    for number in range(5):
        tags.add([str(number)], chunks(number, 4))
        tags.add(["0"], chunks(0, 1))
    assert tags.counts(9) == {"0": 4, "4": 4}
    tags.add(["all"], chunks(0, 11))
    assert len(tags) == 0
    for number in range(MOST_TAGS + 10):
        tags.add([str(number)], [])
    assert len(tags) == MOST_TAGS
