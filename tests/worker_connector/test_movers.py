import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the worker half needs torch")

from worker_connector import movers  # noqa: E402
from worker_connector.copier import Copier, Receipt  # noqa: E402
from worker_connector.errors import ConnectorError  # noqa: E402
from worker_connector.movers import SlotUse, Stream, Transfers  # noqa: E402
from worker_connector.plan import Comparison, LoadJob, SaveJob, Span, WorkerReport  # noqa: E402
from worker_connector.regions import Region, SlotLayout  # noqa: E402

BLOCKS, SLOTS, PER_CHUNK = 40, 6, 4
LAYOUT = SlotLayout([[Region(0, 512, 512), Region(BLOCKS * 512, 512, 512)]], [PER_CHUNK])
DEADLINE = 5.0
Compare = Callable[[Iterable[Comparison]], dict[int, float]]


class Rig:
    """A cache and a slab of plain tensors, with transfers between them."""

    def __init__(
        self, copier: type[Copier] = Copier, stream: Callable[[], Stream] = Stream, compare: Compare = lambda _: {}
    ) -> None:
        self.cache = torch.randint(0, 256, (BLOCKS * 1024,), dtype=torch.uint8)
        self.slab = torch.zeros(SLOTS * LAYOUT.slot_bytes, dtype=torch.uint8)
        self.transfers = Transfers(copier(self.cache, self.slab, LAYOUT), stream, compare)
        self.report = WorkerReport()
        self.finished: list[str] = []
        self.failed: list[str] = []

    def block(self, block: int) -> bytes:
        both = self.cache.view(2, BLOCKS, 512)
        return both[:, block].numpy().tobytes()

    def collect(self) -> None:
        finished, failed = self.transfers.take()
        self.finished += sorted(finished)
        self.failed += sorted(failed)
        self.report.merge(self.transfers.take_report())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, "the transfer did not end"
            self.collect()
            time.sleep(0.001)

    def save(self, job: int, slot: int, blocks: list[int]) -> None:
        self.transfers.save(SaveJob(job, [Span(slot, 0, 0, blocks)]))

    def load(self, request: str, slot: int, blocks: list[int], *, deadline: float = DEADLINE) -> None:
        self.transfers.load([LoadJob(request, [Span(slot, 0, 0, blocks)], deadline, blocks)])


@contextmanager
def rig(
    copier: type[Copier] = Copier, stream: Callable[[], Stream] = Stream, compare: Compare = lambda _: {}
) -> Iterator[Rig]:
    made = Rig(copier, stream, compare)
    try:
        yield made
    finally:
        assert made.transfers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warmroute-")]


class GatedCopier(Copier):
    """Waits for a signal before each copy."""

    gate = threading.Event()

    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        assert self.gate.wait(DEADLINE)
        return super().to_cache(spans, stream)

    def to_slab(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        assert self.gate.wait(DEADLINE)
        return super().to_slab(spans, stream)


@pytest.fixture(autouse=True)
def closed_gate() -> None:
    GatedCopier.gate = threading.Event()


class FailingCopier(Copier):
    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        if any(span.slot == 2 for span in spans):
            raise OSError("bad slot")
        return super().to_cache(spans, stream)

    def to_slab(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        if any(span.slot == 2 for span in spans):
            raise OSError("bad slot")
        return super().to_slab(spans, stream)


class SingleBatches(Copier):
    """Every span is a batch; counts them, and may be told to be slow."""

    copied = 0
    pause = 0.0

    def batches(self, spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
        return iter([[span] for span in spans])

    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        self.copied += 1
        time.sleep(self.pause)
        return super().to_cache(spans, stream)

    def to_slab(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        self.copied += 1
        time.sleep(self.pause)
        return super().to_slab(spans, stream)


def test_blocks_come_back_byte_for_byte_through_random_slots_and_blocks() -> None:
    rng = random.Random(5)
    with rig() as bench:
        stored: dict[int, list[bytes]] = {}
        for job in range(1, 60):
            slot = rng.randrange(SLOTS)
            blocks = rng.sample(range(1, BLOCKS), PER_CHUNK)
            if slot in stored and rng.random() < 0.6:
                bench.load(str(job), slot, blocks)
                bench.until(lambda job=job: str(job) in bench.finished)  # type: ignore[misc]
                assert [bench.block(block) for block in blocks] == stored[slot]
            else:
                bench.save(job, slot, blocks)
                bench.until(lambda job=job: bench.report.saved[job] == 1)  # type: ignore[misc]
                stored[slot] = [bench.block(block) for block in blocks]
        assert not bench.failed
        assert not bench.report.failed_saves


def test_submitting_does_not_wait_for_the_copy_and_each_end_is_told_once() -> None:
    with rig(GatedCopier) as bench:
        bench.save(1, 0, [1, 2, 3, 4])
        bench.load("a", 1, [5, 6, 7, 8])
        bench.collect()
        assert bench.finished == []
        assert not bench.report
        GatedCopier.gate.set()
        bench.until(lambda: bench.finished == ["a"] and bench.report.saved[1] == 1)
        for _ in range(3):
            bench.collect()
        assert bench.finished == ["a"]
        assert bench.report.saved[1] == 1
        assert [sample.nbytes for sample in bench.report.loads] == [4 * 1024]


def test_settle_returns_only_when_the_save_has_read_its_blocks() -> None:
    with rig(GatedCopier) as bench:
        bench.save(1, 0, [1, 2, 3, 4])
        before = [bench.block(block) for block in (1, 2, 3, 4)]
        threading.Timer(0.1, GatedCopier.gate.set).start()
        bench.transfers.settle([1])
        bench.cache.fill_(0)
        slot = bench.slab[: PER_CHUNK * 1024].view(2, PER_CHUNK, 512)
        assert [slot[:, at].numpy().tobytes() for at in range(PER_CHUNK)] == before


def test_settling_what_ended_or_never_began_does_not_wait() -> None:
    with rig() as bench:
        bench.save(1, 0, [1, 2, 3, 4])
        bench.until(lambda: bench.report.saved[1] == 1)
        began = time.monotonic()
        bench.transfers.settle([1, 7])
        assert time.monotonic() - began < 4


def test_a_save_that_takes_too_long_fails_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_SETTLE_SECONDS", 0.05)
    with rig(GatedCopier) as bench:
        bench.save(1, 0, [1, 2, 3, 4])
        bench.save(2, 1, [5, 6, 7, 8])
        bench.transfers.settle([1])
        GatedCopier.gate.set()
        bench.until(lambda: bench.report.saved[1] == bench.report.saved[2] == 1)
        assert bench.report.failed_saves == {1}


def compared_save(bench: Rig, job: int) -> None:
    bench.transfers.save(SaveJob(job, [Span(job, 0, 0, [1, 2, 3, 4])], [Comparison(4, job), Comparison(5, job)]))


def test_comparisons_are_told_with_the_save() -> None:
    with rig(compare=lambda pairs: {pair.held: 0.5 for pair in pairs}) as bench:
        compared_save(bench, 1)
        bench.until(lambda: bench.report.saved[1] == 1)
        assert bench.report.compared == {1: {4: 0.5, 5: 0.5}}
        assert not bench.report.failed_saves


def test_comparing_keeps_neither_the_engine_nor_other_saves() -> None:
    gate = threading.Event()

    def slowly(_: Iterable[Comparison]) -> dict[int, float]:
        assert gate.wait(DEADLINE)
        return {}

    with rig(compare=slowly) as bench:
        compared_save(bench, 1)
        bench.save(2, 3, [5, 6, 7, 8])
        bench.transfers.settle([1, 2])
        bench.until(lambda: bench.report.saved[2] == 1)
        assert not bench.report.saved[1], "a save is told before its slots are free of comparisons"
        gate.set()
        bench.until(lambda: bench.report.saved[1] == 1)


def test_a_comparison_that_fails_costs_nothing_but_itself(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Iterable[Comparison]) -> dict[int, float]:
        raise MemoryError("no room")

    with rig(compare=fail) as bench:
        for job in (1, 2):
            compared_save(bench, job)
        bench.until(lambda: bench.report.saved[1] == bench.report.saved[2] == 1)
        assert not bench.report.failed_saves
        assert "no room" in caplog.text


def test_closing_waits_for_a_comparison_and_drops_the_rest() -> None:
    begun, made = threading.Event(), list[Comparison]()

    def slowly(pairs: Iterable[Comparison]) -> dict[int, float]:
        begun.set()
        time.sleep(0.2)
        made.extend(pairs)
        return {}

    bench = Rig(compare=slowly)
    compared_save(bench, 1)
    assert begun.wait(DEADLINE)
    assert bench.transfers.close()
    assert len(made) == 1, "the slab may go away now"


def test_a_failed_load_names_its_slot_and_spares_the_others() -> None:
    with rig(FailingCopier) as bench:
        spans = [Span(1, 0, 0, [1, 2, 3, 4]), Span(2, 0, 0, [5, 6, 7, 8]), Span(3, 0, 0, [9, 10, 11, 12])]
        bench.transfers.load([LoadJob("a", spans, DEADLINE)])
        bench.load("b", 1, [13, 14, 15, 16])
        bench.until(lambda: bench.finished == ["a", "b"])
        assert bench.failed == ["a"]
        assert bench.report.failed_loads == {"a": {2}}


def test_a_failed_save_is_told_and_the_next_one_works() -> None:
    with rig(FailingCopier) as bench:
        bench.save(1, 2, [1, 2, 3, 4])
        bench.save(2, 3, [1, 2, 3, 4])
        bench.until(lambda: bench.report.saved[1] == bench.report.saved[2] == 1)
        assert bench.report.failed_saves == {1}


def test_a_late_load_fails_without_blaming_a_slot() -> None:
    with rig(GatedCopier) as bench:
        bench.load("a", 1, [1, 2, 3, 4])
        bench.load("b", 1, [5, 6, 7, 8], deadline=0.01)
        time.sleep(0.05)
        before = bench.block(5)
        GatedCopier.gate.set()
        bench.until(lambda: bench.finished == ["a", "b"])
        assert bench.failed == ["b"]
        assert bench.report.failed_loads == {"b": set()}
        assert bench.block(5) == before


def test_a_refused_load_copies_nothing_and_fails() -> None:
    with rig() as bench:
        before = bench.cache.clone()
        bench.transfers.load([LoadJob("a", [], DEADLINE, [1], refused=True)])
        bench.until(lambda: bench.finished == ["a"])
        assert bench.failed == ["a"]
        assert torch.equal(bench.cache, before)


def test_waiting_for_loads_ends_with_them_or_with_the_timeout() -> None:
    with rig(GatedCopier) as bench:
        bench.transfers.wait_for_loads(DEADLINE)
        bench.load("a", 1, [1, 2, 3, 4])
        began = time.monotonic()
        bench.transfers.wait_for_loads(0.05)
        assert 0.04 < time.monotonic() - began < 5
        GatedCopier.gate.set()
        bench.transfers.wait_for_loads(DEADLINE)
        bench.collect()
        assert bench.finished == ["a"]


class RecordingStream(Stream):
    """Notes the order in which marks are made and waited for."""

    log: list[str]

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> int:
        self.marks += 1
        self.log.append(f"mark {threading.current_thread().name}")
        return self.marks

    def begin(self, after: int) -> None:
        self.log.append(f"begin after {after} {threading.current_thread().name}")

    def finish(self) -> None:
        self.log.append(f"finish {threading.current_thread().name}")


@pytest.mark.parametrize("copier", [Copier, FailingCopier])
def test_copies_follow_a_mark_made_by_the_engine_and_are_over_when_reported(copier: type[Copier]) -> None:
    RecordingStream.log = []
    with rig(copier, RecordingStream) as bench:
        bench.save(1, 2, [1, 2, 3, 4])
        bench.until(lambda: bench.report.saved[1] == 1)
        bench.load("a", 2, [1, 2, 3, 4])
        bench.until(lambda: bench.finished == ["a"])
    me = threading.current_thread().name
    save, load = "warmroute-save", "warmroute-load"
    # Spans are copied one by one only when nothing of the failed batch is under way any more.
    again = [f"finish {load}"] if copier is FailingCopier else []
    assert RecordingStream.log == [
        f"mark {me}",
        f"begin after 1 {save}",
        f"finish {save}",
        f"mark {me}",
        f"begin after 1 {load}",
        *again,
        f"finish {load}",
    ]


class LateEvent:
    """An event of a GPU; ``waited`` notes which ones were waited for."""

    made: list["LateEvent"]
    waited: list[int]

    def __init__(self, *, blocking: bool) -> None:
        assert blocking
        self.made.append(self)

    def record(self, stream: Any) -> None:
        assert stream.cuda_stream

    def synchronize(self) -> None:
        self.waited.append(self.made.index(self))


def test_a_gpu_has_few_portions_under_way_and_none_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    LateEvent.made, LateEvent.waited = [], []
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=5))
    stream = movers.CudaStream(torch.device("cuda", 0))
    for _ in range(5):
        stream.pace()
    assert LateEvent.waited == [0, 1, 2]
    stream.finish()
    assert LateEvent.waited == [0, 1, 2, 5]
    stream.pace()
    assert LateEvent.waited == [0, 1, 2, 5]


def test_closing_drops_what_is_queued_and_ends_the_threads() -> None:
    bench = Rig(GatedCopier)
    for job in range(1, 20):
        bench.save(job, 0, [1, 2, 3, 4])
    threading.Timer(0.05, GatedCopier.gate.set).start()
    assert bench.transfers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warmroute-")]
    bench.collect()
    assert sum(bench.report.saved.values()) <= 1


def test_reports_of_ranks_add_up() -> None:
    first, second = WorkerReport(), WorkerReport()
    first.saved.update({1: 1, 2: 1})
    second.saved.update({1: 1})
    second.failed_saves.add(1)
    first.failed_loads["a"] = {1}
    second.failed_loads["a"] = {2}
    second.step = 4
    first.merge(second)
    assert dict(first.saved) == {1: 2, 2: 1}
    assert first.failed_saves == {1}
    assert first.failed_loads == {"a": {1, 2}}
    assert first.step == 4
    assert not WorkerReport()


def test_the_copies_of_one_batch_are_one_call_and_late_ones_end_between_batches() -> None:
    with rig(SingleBatches) as bench:
        copier: Any = bench.transfers._copier
        copier.pause = 0.05
        spans = [Span(slot, 0, 0, [4 * slot + at for at in range(1, 5)]) for slot in range(SLOTS)]
        bench.transfers.load([LoadJob("a", spans, 0.12)])
        bench.until(lambda: bench.finished == ["a"])
        assert bench.failed == ["a"]
        assert bench.report.failed_loads == {"a": set()}
        assert 2 <= copier.copied < SLOTS


def test_a_save_that_was_given_up_is_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_SETTLE_SECONDS", 0.05)
    with rig(SingleBatches) as bench:
        copier: Any = bench.transfers._copier
        copier.pause = 0.04
        bench.transfers.save(SaveJob(1, [Span(slot, 0, 0, [1, 2, 3, 4]) for slot in range(SLOTS)]))
        bench.transfers.settle([1])
        bench.until(lambda: bench.report.saved[1] == 1)
        assert bench.report.failed_saves == {1}
        assert copier.copied < SLOTS


def test_closing_ends_a_long_transfer_between_batches() -> None:
    bench = Rig(SingleBatches)
    copier: Any = bench.transfers._copier
    copier.pause = 0.05
    spans = [Span(at % SLOTS, 0, 0, [1, 2, 3, 4]) for at in range(40)]
    bench.transfers.load([LoadJob("a", spans, DEADLINE)])
    time.sleep(0.02)
    assert bench.transfers.close(timeout=0.5)
    assert copier.copied <= 2
    bench.collect()
    assert bench.failed == ["a"]


class StumblingCopier(Copier):
    """Fails where several spans come at once, and for slot 4."""

    def to_cache(self, spans: Sequence[Span], stream: int = 0) -> list[Receipt]:
        if len(spans) > 1 or spans[0].slot == 4:
            raise OSError("too many")
        return super().to_cache(spans, stream)


def test_only_slots_that_fail_on_their_own_are_blamed_for_their_batch() -> None:
    with rig(StumblingCopier) as bench:
        spans = [Span(slot, 0, 0, [4 * slot + at for at in range(1, 5)]) for slot in (1, 4, 2)]
        bench.transfers.load([LoadJob("a", spans, DEADLINE)])
        bench.transfers.load([LoadJob("b", [spans[0], spans[2]], DEADLINE)])
        bench.until(lambda: bench.finished == ["a", "b"])
        assert bench.failed == ["a"]
        assert bench.report.failed_loads == {"a": {4}}


def test_a_block_that_the_cache_lacks_spares_the_slots_of_the_others() -> None:
    with rig() as bench:
        spans = [Span(1, 0, 0, [1, 2, 3, 4]), Span(2, 0, 0, [5, 6, 7, BLOCKS]), Span(3, 0, 0, [9, 10, 11, 12])]
        bench.transfers.load([LoadJob("a", spans, DEADLINE)])
        bench.transfers.save(SaveJob(1, spans))
        bench.until(lambda: bench.finished == ["a"] and bench.report.saved[1] == 1)
        assert bench.report.failed_loads == {"a": {2}}
        assert bench.report.failed_saves == {1}


def test_a_slot_that_a_load_reads_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    with rig(GatedCopier) as bench:
        before = bench.slab.clone()
        bench.load("a", 1, [1, 2, 3, 4])
        bench.save(1, 1, [5, 6, 7, 8])
        GatedCopier.gate.set()
        bench.until(lambda: bench.finished == ["a"] and bench.report.saved[1] == 1)
        assert bench.report.failed_saves == {1}
        assert not bench.failed
        assert torch.equal(bench.slab, before)
        bench.save(2, 1, [5, 6, 7, 8])
        bench.until(lambda: bench.report.saved[2] == 1)
        assert bench.report.failed_saves == {1}
    assert "a defect" in caplog.text


def test_a_slot_that_a_save_writes_is_neither_read_nor_written_by_others() -> None:
    with rig(GatedCopier) as bench:
        before = bench.cache.clone()
        bench.save(1, 1, [1, 2, 3, 4])
        bench.save(2, 1, [5, 6, 7, 8])
        bench.load("a", 1, [9, 10, 11, 12])
        GatedCopier.gate.set()
        bench.until(lambda: bench.finished == ["a"] and bench.report.saved[1] == bench.report.saved[2] == 1)
        assert bench.report.failed_saves == {2}
        assert bench.report.failed_loads == {"a": {1}}
        assert torch.equal(bench.cache, before)


def test_what_ends_use_that_was_not_begun_is_a_defect() -> None:
    use = SlotUse()
    assert not use.read({1, 2})
    assert not use.read({2})
    assert use.write({2, 3}) == {2}
    use.end_read({1, 2})
    assert use.write({2}) == {2}
    use.end_read({2})
    assert not use.write({2})
    assert use.read({2}) == {2}
    use.end_write({2})
    assert not use
    with pytest.raises(AssertionError):
        use.end_read({2})
    with pytest.raises(AssertionError):
        use.end_write({2})


def test_damaged_bytes_fail_their_slot_and_are_told() -> None:
    def checked(*args: Any) -> Copier:
        return Copier(*args, verify=True)

    with rig(checked) as bench:  # type: ignore[arg-type]
        spans = [Span(slot, 0, 0, [4 * slot + at for at in range(1, 5)]) for slot in range(SLOTS)]
        bench.transfers.save(SaveJob(1, spans))
        bench.until(lambda: bench.report.saved[1] == 1)
        bench.transfers.load([LoadJob("a", spans, DEADLINE)])
        bench.until(lambda: bench.finished == ["a"])
        assert not bench.failed
        bench.slab[3 * LAYOUT.slot_bytes + 1234] ^= 16
        bench.transfers.load([LoadJob("b", spans, DEADLINE)])
        bench.until(lambda: bench.finished == ["a", "b"])
        assert bench.failed == ["b"]
        assert bench.report.failed_loads == {"b": {3}}
        assert bench.report.damaged == {3}


def test_transfers_are_refused_in_a_process_that_did_not_make_them() -> None:
    with rig() as bench:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                bench.save(1, 0, [1, 2, 3, 4])
            except RuntimeError as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0
        assert b"process" in os.read(reading, 1000)
        os.close(reading)
        bench.save(2, 0, [1, 2, 3, 4])
        bench.until(lambda: bench.report.saved[2] == 1)


class UnreadyCopier(Copier):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.saves._open_context = self._refuse

    def _refuse(self) -> Any:
        raise ConnectorError("no such device")


def test_a_mover_that_cannot_be_set_up_is_an_error_at_start() -> None:
    with pytest.raises(ConnectorError, match="no such device"):
        Rig(UnreadyCopier)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warmroute-")]
