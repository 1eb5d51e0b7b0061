import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_connector.stats import FIGURES, GAUGES, Counts, Stats, combine, merge, summary

NAMES = [figure.name for figure in FIGURES]
counts = st.dictionaries(
    st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["", "gpu", "cpu"]), st.integers(0, 1000), max_size=3)
)


def test_a_summary_of_nothing() -> None:
    answer = summary(Stats().total())
    assert (answer["hit_rate"], answer["avg_ttft_reduction"], answer["tiers"]) == (0.0, 0.0, {})


def test_rates_by_hand() -> None:
    stats = Stats()
    stats.request(1000, {"gpu": 256, "cpu": 512}, prefill_speed=1000.0, load_seconds=0.1)
    stats.request(1000, {"cpu": 256}, prefill_speed=1000.0, load_seconds=0.056)
    stats.request(1000, {"gpu": 256})  # before the prefill speed was known
    stats.request(1000, {})
    stats.loaded("cpu", 3, 3000, 0.5)
    stats.loaded("cpu", 1, 1000, 0.3)
    stats.saved("cpu", 8, 8000, 2.0)
    stats.evicted("cpu", 2)
    stats.load_failed("cpu")
    stats.load_skipped("cpu", 4)
    stats.set("held_chunks", 6, "cpu")
    answer = summary(stats.total())
    assert answer["hit_rate"] == (256 + 512 + 256 + 256) / 4000
    assert answer["avg_ttft_reduction"] == pytest.approx(((0.768 - 0.1) + (0.256 - 0.056)) / 2)
    assert (answer["requests"], answer["requests_with_hit"], answer["prompt_tokens"]) == (4, 3, 4000)
    assert answer["tiers"]["gpu"]["hit_tokens"] == 512
    assert answer["tiers"]["cpu"] == {
        "hit_tokens": 768,
        "load_chunks": 4,
        "load_bytes": 4000,
        "load_seconds": 0.8,
        "load_bandwidth": 5000.0,
        "save_chunks": 8,
        "save_bytes": 8000,
        "save_seconds": 2.0,
        "save_bandwidth": 4000.0,
        "evictions": 2,
        "failed_loads": 1,
        "skipped_loads": 4,
        "held_chunks": 6,
    }


def test_a_load_that_took_longer_than_computing_counts_against() -> None:
    stats = Stats()
    stats.request(100, {"cpu": 100}, prefill_speed=1000.0, load_seconds=0.5)
    assert summary(stats.total())["avg_ttft_reduction"] == pytest.approx(-0.4)


def test_intervals_add_up_to_the_total() -> None:
    stats, seen = Stats(), {}
    for number in range(5):
        stats.request(100, {"gpu": number})
        stats.set("held_chunks", number, "cpu")
        merge(seen, stats.take())
    assert seen == stats.total()
    assert stats.take() == {}


def test_a_gauge_that_did_not_change_is_not_sent_again() -> None:
    stats = Stats()
    stats.set("held_chunks", 5, "cpu")
    stats.take()
    stats.set("held_chunks", 5, "cpu")
    assert stats.take() == {}
    stats.set("held_chunks", 0, "cpu")
    assert stats.take() == {"held_chunks": {"cpu": 0}}


def test_a_counter_kept_elsewhere_is_brought_up_to_its_total() -> None:
    stats = Stats()
    for total in (0, 3, 3, 5):
        stats.bring("relists", total)
    assert stats.total() == {"relists": {"": 5}}


@given(counts, counts, counts)
def test_processes_and_engines_add_up_in_any_order(one: Counts, two: Counts, three: Counts) -> None:
    def copy(each: Counts) -> Counts:
        return {name: dict(tiers) for name, tiers in each.items()}

    left = merge(merge(copy(one), two), three)
    right = merge(copy(one), merge(copy(two), three))
    assert left == right
    assert combine([one, two, three]) == combine([three, one, two])
    for name, tiers in combine([one, two, three]).items():
        for tier, value in tiers.items():
            assert value == sum(each.get(name, {}).get(tier, 0) for each in (one, two, three))
            if name not in GAUGES:
                assert left[name][tier] == value


def test_a_summary_may_be_read_while_figures_are_kept() -> None:
    stats, stop, errors = Stats(), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                summary(stats.total())
            except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3000):
        stats.request(10, {f"tier{number % 300}": 1})
        stats.add(f"name{number}", 1, "cpu")
    stop.set()
    reader.join()
    assert errors == []
    assert summary(stats.total())["requests"] == 3000


def test_figures_have_names_and_help_of_their_own() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(figure.help.endswith(".") for figure in FIGURES)
    assert not any(name.endswith("_total") for name in NAMES)
