import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_connector.tiers.base import LoanEnded, Outcome, Sink, Source, Status

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@given(parts=sizes, steps=st.lists(st.integers(0, 50), max_size=12))
def test_a_sink_is_filled_in_order_across_its_parts(parts: list[int], steps: list[int]) -> None:
    room = [bytearray(size) for size in parts]
    sink = Sink(*room)
    wrote = bytearray()
    for step in steps:
        piece = bytes((len(wrote) + i) % 251 for i in range(step))
        if len(wrote) + step > sink.size:
            with pytest.raises(ValueError, match="larger than the room"):
                sink.write(piece)
            break
        sink.write(piece)
        wrote += piece
        assert sink.filled == len(wrote)
    assert b"".join(room).startswith(bytes(wrote))


@given(parts=sizes, most=st.integers(1, 60))
def test_a_source_gives_its_parts_in_order(parts: list[int], most: int) -> None:
    views = [bytes([at]) * size for at, size in enumerate(parts)]
    source = Source(*views)
    seen: list[bytes] = []
    source.each(lambda view: seen.append(bytes(view)), most)
    assert b"".join(seen) == b"".join(views) == source.join()
    assert all(len(piece) <= most for piece in seen)


@given(parts=sizes, most=st.integers(1, 60))
def test_a_source_is_copied_piece_by_piece(parts: list[int], most: int) -> None:
    source = Source(*(bytes([at]) * size for at, size in enumerate(parts)))
    room, copied = bytearray(most), b""
    while taken := source.copy(len(copied), memoryview(room)):
        copied += room[:taken]
    assert copied == source.join()


def test_nothing_is_written_after_the_end_of_a_loan() -> None:
    room = bytearray(8)
    outer = Sink(room)
    inner = outer.lend()
    inner.write(b"abcd")
    inner.end()
    with pytest.raises(LoanEnded):
        inner.write(b"x")
    with pytest.raises(LoanEnded):
        inner.finish()
    assert not inner.lent
    assert outer.lent
    again = outer.lend()
    again.write(b"wxyz")
    outer.end()
    assert not again.lent
    with pytest.raises(LoanEnded):
        again.write(b"late")
    assert bytes(room) == b"wxyz\0\0\0\0"


def test_the_end_of_a_loan_waits_for_whoever_is_writing() -> None:
    sink = Sink(bytearray(4)).lend()
    inside, go = threading.Event(), threading.Event()

    def slow(view: memoryview) -> int:
        inside.set()
        assert go.wait(30)
        view[:1] = b"x"
        return 1

    writer = threading.Thread(target=sink.fill, args=(4, slow))
    writer.start()
    assert inside.wait(30)
    ender = threading.Thread(target=sink.end)
    ender.start()
    time.sleep(0.05)
    assert ender.is_alive()
    go.set()
    writer.join(30)
    ender.join(30)
    assert not ender.is_alive()
    assert sink.filled == 1


def test_a_source_that_is_taken_back_is_not_read() -> None:
    source = Source(b"ab", b"cd").lend()
    seen: list[bytes] = []

    def send(view: memoryview) -> None:
        seen.append(bytes(view))

    source.each(send, 1)
    source.end()
    with pytest.raises(LoanEnded):
        source.each(send)
    with pytest.raises(LoanEnded):
        source.join()
    assert seen == [b"a", b"b", b"c", b"d"]


def test_outcomes_say_whether_the_object_is_where_it_was_asked_to_be() -> None:
    assert [each.value for each in Status if Outcome(each).ok] == ["found", "stored", "deleted"]


def test_an_object_is_examined_once_when_it_is_whole_and_again_after_it_changed() -> None:
    room, seen = bytearray(4), []

    def examine(size: int) -> bytes:
        seen.append(bytes(room[:size]))
        return seen[-1]

    sink = Sink(room, examine=examine)
    inner = sink.lend()
    inner.write(b"abc")
    assert sink.finding is None
    inner.finish()
    assert sink.finding == b"abc"
    sink.filled = inner.filled
    sink.finish()
    assert seen == [b"abc"]
    again = sink.lend()
    again.write(b"wxyz")
    assert sink.finding is None, "what was found is of other bytes"
    again.finish()
    assert sink.finding == b"wxyz"
    again.rewind()
    assert sink.finding is None


def test_a_source_is_completed_by_whoever_uses_it_first_and_once() -> None:
    head, made = bytearray(2), []

    def prepare() -> None:
        made.append(1)
        head[:] = b"hi"

    source = Source(head, b"there", prepare=prepare)
    lent = source.lend()
    assert not made
    assert source.size == 7
    assert lent.join() == b"hithere" == source.join()
    assert len(made) == 1


@given(parts=sizes, at=st.integers(0, 60), most=st.integers(0, 60))
def test_a_source_is_poured_from_anywhere_as_the_views_that_have_it(parts: list[int], at: int, most: int) -> None:
    source = Source(*(bytes([number]) * size for number, size in enumerate(parts)))
    seen: list[bytes] = []

    def send(views: list[memoryview]) -> int:
        assert all(view.nbytes for view in views)
        seen.append(b"".join(views))
        return 1

    assert source.pour(at, most, send) == 1
    assert seen == [source.join()[at : at + most]]
