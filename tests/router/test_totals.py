"""Figures of several processes added up."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from router.totals import CountFiles, Snapshot, counts, families_of, render


def speak(pid: int, process: int, served: dict[str, int], waits: tuple[float, ...] = ()) -> Snapshot:
    registry = CollectorRegistry()
    counter = Counter("served", "Served", ["worker"], registry=registry)
    gauge = Gauge("running", "Running", ["worker"], registry=registry)
    histogram = Histogram("wait", "Wait", registry=registry, buckets=(1, 10))
    for worker, count in served.items():
        counter.labels(worker).inc(count)
        gauge.labels(worker).set(count)
    for wait in waits:
        histogram.observe(wait)
    return Snapshot(pid, process, families_of(registry))


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_counters_and_histograms_add_up_and_gauges_keep_apart() -> None:
    shown = values(render([speak(1, 0, {"a": 2, "b": 1}, (0.5, 5)), speak(2, 1, {"a": 3}, (50,))]))
    assert shown["served_total", (("worker", "a"),)] == 5
    assert shown["served_total", (("worker", "b"),)] == 1
    assert shown["running", (("process", "0"), ("worker", "a"))] == 2
    assert shown["running", (("process", "1"), ("worker", "a"))] == 3
    assert [shown["wait_bucket", (("le", le),)] for le in ("1.0", "10.0", "+Inf")] == [1, 2, 3]
    assert shown["wait_sum", ()] == 55.5


def total(files: CountFiles, living: list[Snapshot]) -> float:
    by_pid = {snapshot.pid: snapshot for snapshot in living}
    others = files.others(by_pid)
    return values(render(by_pid.values(), others)).get(("served_total", (("worker", "a"),)), 0)


def test_what_an_ended_process_counted_stays(tmp_path: Path) -> None:
    files = CountFiles(tmp_path)
    first, second = speak(11, 0, {"a": 5}), speak(12, 1, {"a": 7})
    for snapshot in (first, second):
        files.keep(snapshot)
    assert total(files, [first, second]) == 12
    assert total(files, [second]) == 12, "a process that does not answer is known by its file"
    files.fold(11)
    assert total(files, [second]) == 12
    assert total(files, [first, second]) == 12, "a late answer of one that was folded does not count twice"
    files.fold(12)
    files.fold(12)
    assert total(files, []) == 12
    assert not list(tmp_path.glob("counts-*"))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["serve", "scrape", "die"])), max_size=40))
def test_a_sum_never_falls_and_loses_nothing_that_was_said(steps: list[tuple[int, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = CountFiles(Path(folder))
        served = dict.fromkeys(range(4), 0)
        pids = {number: number + 1 for number in range(4)}
        seen = 0.0
        for number, step in steps:
            if step == "serve":
                served[number] += 1
            elif step == "die":
                files.fold(pids[number])
                pids[number] += 10
                served[number] = 0
            else:
                living = [speak(pids[n], n, {"a": count}) for n, count in served.items()]
                for snapshot in living:
                    files.keep(snapshot)
                now = total(files, living)
                assert now >= seen
                seen = now


def test_only_what_adds_up_is_kept_in_files() -> None:
    assert {family.kind for family in counts(speak(1, 0, {"a": 1}).families)} == {"counter", "histogram"}
