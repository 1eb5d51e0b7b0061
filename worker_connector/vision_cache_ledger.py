"""Which outputs of the vision encoder every rank has, and where: the one authority over the ranks' memory."""

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass

from worker_connector.vision_cache_plan import Grant, VisionReport

ALIGNMENT = 512
"""Outputs begin at multiples of this many bytes, which suits every element type and a GPU's copies."""

PATIENCE_STEPS = 1000
"""Steps after which ranks that did not say whether they have an output are taken not to."""


class Arena:
    """A stretch of ``size`` bytes that is given out in pieces, lowest place first. O(holes) per call."""

    def __init__(self, size: int) -> None:
        self.size = size // ALIGNMENT * ALIGNMENT
        self._holes: list[tuple[int, int]] = [(0, self.size)] if self.size else []

    def take(self, nbytes: int) -> int | None:
        """The offset of a piece of ``nbytes``, rounded up; None where no hole is large enough."""
        wanted = rounded(nbytes)
        for at, (offset, size) in enumerate(self._holes):
            if size >= wanted:
                self._holes[at : at + 1] = [(offset + wanted, size - wanted)] if size > wanted else []
                return offset
        return None

    def give_back(self, offset: int, nbytes: int) -> None:
        """A piece, or the rest of one, is free again."""
        size = rounded(nbytes)
        at = bisect_left(self._holes, (offset, 0))
        if at < len(self._holes) and offset + size == self._holes[at][0]:
            size += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == offset:
            at -= 1
            before = self._holes.pop(at)
            offset, size = before[0], before[1] + size
        self._holes.insert(at, (offset, size))

    @property
    def free(self) -> int:
        return sum(size for _, size in self._holes)

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Offset and size of what is free, in order."""
        return list(self._holes)


@dataclass
class Entry:
    """One output. ``embeds`` is how many embeddings vLLM said it has, ``ranks`` how many ranks have it."""

    identifier: str
    ticket: int
    offset: int
    nbytes: int
    embeds: int
    modality: str
    step: int = 0
    ranks: int = 0


class VisionLedger:
    """Outputs in ``size`` bytes of each of ``ranks`` ranks; the one used longest ago goes first."""

    def __init__(self, size: int, ranks: int) -> None:
        self._arena = Arena(size)
        self._ranks = ranks
        self._present: OrderedDict[str, Entry] = OrderedDict()
        self._pending: dict[int, Entry] = {}
        self._pending_names: set[str] = set()
        self._forget: list[int] = []
        self._next_ticket = 1
        self._step = 0

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._present

    def __len__(self) -> int:
        """Outputs that every rank has."""
        return len(self._present)

    @property
    def capacity(self) -> int:
        return self._arena.size

    @property
    def used(self) -> int:
        """Bytes of each rank that are taken or promised."""
        return self._arena.size - self._arena.free

    def find(self, identifier: str) -> Entry | None:
        """An output that every rank has."""
        return self._present.get(identifier)

    def use(self, identifier: str) -> Entry | None:
        """Like ``find``, and it was used last."""
        entry = self._present.get(identifier)
        if entry is not None:
            self._present.move_to_end(identifier)
        return entry

    def reserve(self, identifier: str, embeds: int, modality: str, nbytes: int) -> tuple[Grant | None, int]:
        """Room for an output, and how many others went for it. None where it is there or on its way, or cannot fit."""
        if identifier in self._present or identifier in self._pending_names or nbytes <= 0:
            return None, 0
        if rounded(nbytes) > self._evictable():
            return None, 0
        evicted = 0
        while (offset := self._arena.take(nbytes)) is None:
            if not self._present:
                return None, evicted
            self.drop(next(iter(self._present)))
            evicted += 1
        entry = Entry(identifier, self._next_ticket, offset, rounded(nbytes), embeds, modality, self._step)
        self._next_ticket += 1
        self._pending[entry.ticket] = entry
        self._pending_names.add(identifier)
        return Grant(entry.ticket, offset, nbytes), evicted

    def absorb(self, report: VisionReport) -> tuple[list[Entry], list[Entry]]:
        """What ranks say: the outputs that are there from now on, and those that are not to be."""
        lost = [entry for ticket in sorted(report.refused) if (entry := self._withdraw(ticket)) is not None]
        arrived = []
        for ticket, ranks in report.kept.items():
            if (entry := self._pending.get(ticket)) is None:
                continue
            entry.ranks += ranks
            if entry.ranks >= self._ranks:
                self._arrive(entry, report.nbytes.get(ticket, entry.nbytes))
                arrived.append(entry)
        return arrived, lost

    def next_step(self) -> list[Entry]:
        """Begin a step. Outputs that ranks kept silent about for too long are given up and returned."""
        self._step += 1
        late = []
        for ticket, entry in list(self._pending.items()):
            if entry.step + PATIENCE_STEPS > self._step:
                break
            late.append(entry)
            self._withdraw(ticket)
        return late

    def drop(self, identifier: str) -> None:
        """Forget an output that is there."""
        entry = self._present.pop(identifier, None)
        if entry is not None:
            self._free(entry)

    def clear(self) -> int:
        """Forget everything, also what is on its way; how many outputs were there. Ranks are to be told separately."""
        known = len(self._present)
        self._present.clear()
        self._pending.clear()
        self._pending_names.clear()
        self._forget.clear()
        self._arena = Arena(self._arena.size)
        return known

    def take_forgotten(self) -> list[int]:
        """The tickets that ranks have to forget, once each."""
        forget, self._forget = self._forget, []
        return forget

    def check(self) -> None:
        """Raise AssertionError unless every byte belongs to exactly one output or hole."""
        entries = [*self._present.values(), *self._pending.values()]
        pieces = sorted([*((entry.offset, entry.nbytes) for entry in entries), *self._arena.holes])
        at = 0
        for offset, size in pieces:
            assert offset == at, "pieces overlap, or leave room that nobody has"
            assert size > 0, "an empty piece"
            at += size
        assert at == self._arena.size, "the memory's end belongs to nobody"
        assert self._pending_names == {entry.identifier for entry in self._pending.values()}, "names of what is pending"
        assert not self._pending_names & self._present.keys(), "both there and on its way"

    def _evictable(self) -> int:
        return self._arena.free + sum(entry.nbytes for entry in self._present.values())

    def _arrive(self, entry: Entry, nbytes: int) -> None:
        del self._pending[entry.ticket]
        self._pending_names.discard(entry.identifier)
        size = rounded(nbytes)
        if size < entry.nbytes:
            self._arena.give_back(entry.offset + size, entry.nbytes - size)
            entry.nbytes = size
        self._present[entry.identifier] = entry

    def _withdraw(self, ticket: int) -> Entry | None:
        entry = self._pending.pop(ticket, None)
        if entry is not None:
            self._pending_names.discard(entry.identifier)
            self._free(entry)
        return entry

    def _free(self, entry: Entry) -> None:
        self._arena.give_back(entry.offset, entry.nbytes)
        self._forget.append(entry.ticket)


def rounded(nbytes: int) -> int:
    """What an output of ``nbytes`` takes up."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
