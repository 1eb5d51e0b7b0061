"""What is told of the stores of the lower tiers.

Each process has stores of its own. Those of the scheduler half look up and list: the state and tallies of ``figures_of`` are
those of looking up, and a tier's objects and bytes are what that process has met there. The ranks' stores read and write.
What became of that is in the counters; the state of the stores, and what they hold as far as each rank knows, ranks tell
with a step when it has changed, and ``RankStores`` keeps it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskStore
from worker_connector.tiers.guarded import Guarded
from worker_connector.tiers.replicas import Replicas


def figures_of(store: Store) -> dict[str, Any]:
    """A store's name, whether it answers this process, and its figures as plain data."""
    if isinstance(store, Replicas):
        members = [figures_of(member) for member in store.members]
        serving = any(member["serving"] for member in members)
        return {"store": store.name, "serving": serving, "group": dict(store.figures), "members": members}
    if isinstance(store, Guarded):
        return {
            "store": store.name,
            "serving": store.state == "closed",
            "breaker": store.state,
            "openings": store.openings,
            "late": store.late,
            "hung": store.hung,
            "operations": {name: asdict(tally) for name, tally in store.tallies().items()},
            **_figures_of_disk(store.store),
        }
    return {"store": store.name, "serving": True, **_figures_of_disk(store)}


def _figures_of_disk(store: Store) -> dict[str, Any]:
    return asdict(store.figures()) if isinstance(store, DiskStore) else {}


def state_of(store: Store) -> dict[str, Any]:
    """Whether a rank's store serves, and what it holds: ``serving``; of a guarded one ``breaker``, of the disk ``writing``
    (empty, or why nothing is written), ``objects``, ``bytes`` and ``quarantined``; of a group its ``members``."""
    if isinstance(store, Replicas):
        members = [{"store": member.name, **state_of(member)} for member in store.members]
        return {"serving": any(member["serving"] for member in members), "members": members}
    if isinstance(store, Guarded):
        return {**state_of(store.store), "serving": store.state == "closed", "breaker": store.state}
    if not isinstance(store, DiskStore):
        return {"serving": True}
    found = store.figures()
    return {
        "serving": True,
        "writing": found.writing,
        "objects": found.objects,
        "bytes": found.object_bytes,
        "quarantined": found.quarantined,
    }


class RankStores:
    """The last known state of every rank's stores. Written by the engine's thread, read by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[int, tuple[float, dict[str, dict[str, Any]]]] = {}

    def told(self, stores: Mapping[int, dict[str, dict[str, Any]]]) -> None:
        """What ranks told with a step."""
        now = self._clock()
        self._known = {**self._known, **{rank: (now, tiers) for rank, tiers in stores.items()}}

    def of(self, tier: str) -> list[dict[str, Any]]:
        """A tier's state by rank; ``told_s`` is for how many seconds no rank has told another one."""
        now = self._clock()
        return [
            {"rank": rank, "told_s": round(now - told, 1), **tiers[tier]}
            for rank, (told, tiers) in sorted(self._known.items())
            if tier in tiers
        ]

    def gauges(self) -> Iterator[tuple[str, str, float]]:
        """Figures by name and tier. What a disk holds all ranks know; the one that knows of most counts."""
        for tier in sorted({tier for _, tiers in self._known.values() for tier in tiers}):
            ranks = self.of(tier)
            yield "failing_ranks", tier, sum(not rank["serving"] or bool(rank.get("writing")) for rank in ranks)
            yield "quarantined_objects", tier, sum(rank.get("quarantined", 0) for rank in ranks)
            yield "store_bytes", tier, max(rank.get("bytes", 0) for rank in ranks)
