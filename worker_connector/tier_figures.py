"""What the scheduler half can tell of the lower tiers for itself.

Each process has stores of its own. Those of the scheduler half look up and list; the ranks' read and write. So state and
tallies here are those of looking up, a tier's objects and bytes are what this process has met there, and what became of
reads and writes is in the counters, which ranks report with every step.
"""

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
