"""Samples are those of ``prometheus_client``'s own counters and histograms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from router.tallies import Spreads, Tallies

BOUNDS = (0.00005, 0.001, 0.5, 1, 2.5, 300)
LABELS = st.tuples(st.sampled_from(["a", 'b "quoted"']), st.sampled_from([200, 404]))
AMOUNTS = st.one_of(st.sampled_from([*BOUNDS, 0.0, 0.0005, 1e9]), st.floats(0, 1000))


def shown(registry: CollectorRegistry) -> list[str]:
    return sorted(line for line in generate_latest(registry).decode().splitlines() if "_created" not in line)


@given(st.lists(st.tuples(LABELS, AMOUNTS), max_size=30))
def test_samples_are_the_usual_ones(observed: list[tuple[tuple[str, int], float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies, spreads = Tallies("n", "Text", "x", "y"), Spreads("h", "Text", BOUNDS, "x", "y")
    for family in (tallies, spreads):
        ours.register(family)
    counter = Counter("warmroute_router_n", "Text", ("x", "y"), registry=theirs)
    histogram = Histogram("warmroute_router_h", "Text", ("x", "y"), buckets=BOUNDS, registry=theirs)
    for labels, amount in observed:
        tallies.labels(*labels).inc(amount)
        spreads.labels(*labels).observe(amount)
        counter.labels(*labels).inc(amount)
        histogram.labels(*labels).observe(amount)
    assert shown(ours) == shown(theirs)


def test_series_without_labels_and_forgotten_ones() -> None:
    registry, alone, many = CollectorRegistry(), Tallies("alone", "Text"), Tallies("many", "Text", "worker", "status")
    registry.register(alone)
    registry.register(many)
    alone.labels().value += 2
    for worker in ("a", "b"):
        many.labels(worker, 200).inc()
    many.forget("worker", "a")
    text = generate_latest(registry).decode()
    assert "warmroute_router_alone_total 2.0" in text
    assert 'worker="b"' in text
    assert 'worker="a"' not in text
    with pytest.raises(ValueError, match="has the labels worker, status"):
        many.labels("a")
