"""Bookkeeping of the tiers stays small and true, however long chunks are turned over.

``WARMROUTE_STRESS=1000000`` makes the random operations as many as that.
"""

import os

import pytest

from tests.worker_connector.soak import Turnover, bookkeeping, soak

OPERATIONS = int(os.environ.get("WARMROUTE_STRESS", "20000"))


def test_a_chunk_on_record_costs_less_than_500_bytes() -> None:
    assert bookkeeping(4000) <= 500


def test_the_process_does_not_grow_with_what_was_turned_over() -> None:
    sizes = list(soak(30_000, 2_000))
    assert sizes[-1] - sizes[2] < 4 << 20, sizes


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_operations_leave_every_invariant_whole(ranks: int) -> None:
    turnover = Turnover(40, seed=ranks, ranks=ranks, fail=0.2, slots=24, late=0.3)
    while turnover.operations < OPERATIONS:
        turnover.step()
        turnover.check()
        turnover.disturb()
        turnover.check()
    assert turnover.ledger.evictions > OPERATIONS // 100
