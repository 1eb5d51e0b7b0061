"""Pins in the disk tier: what is pinned is kept there too, by the engine that pinned it.

Each rank has a store of its own, which evicts what it makes room for. So ranks are told, in jobs of their tier, what to keep:
changes, and after a change of generation everything anew. Other engines that share a directory do not hear of it, and
remote stores evict by rules of their own.
"""

from collections.abc import Iterable
from typing import Literal

from worker_connector.tiers.base import Store
from worker_connector.tiers.disk import DiskStore
from worker_connector.tiers.guarded import Guarded

DISK = "disk"


class PinsBelow:
    """The scheduler's side: what ranks are still to be told. Everything runs under the ledger's lock but ``bool``. At most
    ``most`` chunks are kept below; the rest of what is pinned is kept above only."""

    def __init__(self) -> None:
        self.most = 0
        self._kept: set[bytes] = set()
        self._untold: dict[bytes, bool] = {}
        self._anew = False

    def __bool__(self) -> bool:
        return self._anew or bool(self._untold)

    def changed(self, chunks: Iterable[bytes], *, pinned: bool) -> None:
        """These chunks are pinned now, or no longer. O(1) each."""
        for chunk in chunks:
            if (chunk in self._kept) is pinned or (pinned and len(self._kept) >= self.most):
                continue
            (self._kept.add if pinned else self._kept.remove)(chunk)
            if self._untold.pop(chunk, None) is None:
                self._untold[chunk] = pinned

    def begin_again(self) -> None:
        """Objects have other names from now on."""
        self._anew = bool(self._kept or self._untold or self._anew)
        self._untold.clear()

    def take(self) -> list[tuple[Literal["pin", "unpin"], list[bytes]]]:
        """What ranks have to do, in order; an ``unpin`` that names no chunks means all."""
        if self._anew:
            jobs: list[tuple[Literal["pin", "unpin"], list[bytes]]] = [("unpin", []), ("pin", list(self._kept))]
            jobs = jobs if self._kept else jobs[:1]
        else:
            parts = {
                kind: [chunk for chunk, pinned in self._untold.items() if pinned is kind] for kind in (True, False)
            }
            jobs = [("pin", parts[True])] if parts[True] else []
            jobs += [("unpin", parts[False])] if parts[False] else []
        self._anew = False
        self._untold.clear()
        return jobs


class Keeper:
    """A rank's side: the objects that its store keeps, by name. On the tier's thread for writes."""

    def __init__(self) -> None:
        self._kept: set[str] = set()

    def pin(self, store: Store, keys: Iterable[str]) -> None:
        """Keep objects, now or when they come, where the store can."""
        disk = _disk_of(store)
        fresh = [key for key in dict.fromkeys(keys) if key not in self._kept]
        if disk is not None:
            disk.pin(fresh)
            self._kept.update(fresh)

    def unpin(self, store: Store, keys: Iterable[str]) -> None:
        """No longer keep these objects; all, if none is named."""
        disk = _disk_of(store)
        named = list(keys)
        ended = [key for key in named if key in self._kept] if named else list(self._kept)
        if disk is not None:
            disk.pin(ended, pin=False)
            self._kept.difference_update(ended)


def _disk_of(store: Store) -> DiskStore | None:
    inner = store.store if isinstance(store, Guarded) else store
    return inner if isinstance(inner, DiskStore) else None
