"""Control requests of the report port: what is where, what goes, what stays, what comes and what moves (docs/report-protocol.md).

They are called on threads of the report server and take the ledger's lock. What concerns the CPU tier and the records
takes effect at once. What the ranks have to do, which is every read, write and deletion in a lower tier, is left to the
engine's thread, in ``run_queued`` at its next step: an engine without requests sleeps, and nothing from outside wakes it.
What is to be deleted is not found any more from the moment of the call. Answers name in ``queued`` the tiers for which that is so. Chunks that are to be warmed are handed over in portions, so
that none waits in a queue for longer than a fetch may take.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

from kv_protocol.errors import MalformedFrame
from kv_protocol.hashing import HASH_BYTES
from kv_protocol.identity import generation_name
from kv_protocol.messages import unpack
from worker_connector.errors import ImpossibleOperation
from worker_connector.ledger import CPU, GPU, Ledger
from worker_connector.lookups import Lookups
from worker_connector.lower import LowerTiers
from worker_connector.pins import Pins
from worker_connector.stats import Counts
from worker_connector.tags import Tags

MOST_PIN_SECONDS = 366 * 86_400.0
_MOST_QUEUED = 64
_MOST_LISTED = 10_000
_POLL_SECONDS = 0.002
_SLICE = 1024
_YIELD_SECONDS = 0.0002

Arguments = dict[str, Any]


class Operations:
    """``totals`` gives the figures since the start, ``lookups`` who looks up chunks in lower tiers, if there is one now,
    ``ranks`` the state of a tier's store on every rank."""

    def __init__(
        self,
        ledger: Ledger,
        lower: LowerTiers,
        pins: Pins,
        tags: Tags,
        *,
        totals: Callable[[], Counts] = dict,
        lookups: Callable[[], Lookups | None] = lambda: None,
        ranks: Callable[[str], list[dict[str, Any]]] = lambda _tier: [],
    ) -> None:
        self._ledger = ledger
        self._lower = lower
        self._pins = pins
        self._tags = tags
        self._totals = totals
        self._lookups = lookups
        self._ranks = ranks
        self._queue: deque[Callable[[], object]] = deque()
        self._warming: OrderedDict[bytes, tuple[str, bool]] = OrderedDict()

    def table(self) -> dict[str, Callable[[Arguments], Any]]:
        """Every operation by its name."""
        return {
            "stats": self.stats,
            "lookup": self.lookup,
            "clear": self.clear,
            "pin": self.pin,
            "unpin": self.unpin,
            "pins": self.pins,
            "tags": self.tags,
            "warm": self.warm,
            "move": self.move,
            "flush": self.flush,
            "generation": self.generation,
        }

    # ---- on the engine's thread ---------------------------------------------------------------------------------

    @property
    def has_queued(self) -> bool:
        """Whether the engine's next step has something to begin. Takes no lock."""
        return bool(self._queue or self._warming)

    @property
    def is_expected(self) -> bool:
        """Whether an engine without requests must keep stepping: for as long as fetches end and more can begin."""
        return bool(self._queue) or bool(self._warming and (self._lower.fetch_room or self._lower.is_expected()))

    def run_queued(self) -> None:
        """Begin what waits for the engine. Before the step is planned."""
        with self._ledger.lock:
            while self._queue:
                self._queue.popleft()()
            self._feed()

    def warm_later(self, tier: str, chunks: Iterable[bytes], *, evict: bool = False) -> int:
        """Fetch chunks of a lower tier into the CPU tier in the next steps; how many that is, without those that are
        on their way already. O(1) each."""
        with self._ledger.lock:
            before = len(self._warming)
            self._warming |= {
                chunk: (tier, evict) for chunk in chunks if chunk not in self._warming and not self._ledger.holds(chunk)
            }
            return len(self._warming) - before

    def _feed(self) -> None:
        while self._warming and (room := self._lower.fetch_room):
            portion: dict[tuple[str, bool], list[bytes]] = {}
            for _ in range(min(room, len(self._warming))):
                chunk, how = self._warming.popitem(last=False)
                portion.setdefault(how, []).append(chunk)
            begun = sum(self._lower.promote(tier, chunks, evict=evict) for (tier, evict), chunks in portion.items())
            if not begun and any(not self._ledger.holds(chunk) for chunks in portion.values() for chunk in chunks):
                self._warming.clear()  # no slot can be had: the rest would not get one either

    # ---- what there is ------------------------------------------------------------------------------------------

    def stats(self, arguments: Arguments) -> dict[str, Any]:
        """All figures, and every tier's."""
        _only(arguments)
        lookups, bandwidth = self._lookups(), self._lower.bandwidth()
        told = lookups.figures() if lookups is not None else {}
        pins = {"chunks": len(self._pins), "waiting": self._pins.waiting()}
        with self._ledger.lock:
            held = self._ledger.counts()
            return {
                "counts": self._totals(),
                "held_chunks": held,
                "capacity_chunks": self._ledger.capacity,
                "free_chunks": self._ledger.free_slots,
                "tiers": {
                    name: {
                        "bandwidth": bandwidth[name],
                        "unwritten": self._lower.unwritten(name),
                        **told.get(name, {}),
                        "ranks": self._ranks(name),
                    }
                    for name in self._lower.names
                },
                "pins": pins,
                "queued": len(self._queue) + len(self._warming),
                "generation": self._lower.generation,
            }

    def lookup(self, arguments: Arguments) -> dict[str, list[str]]:
        """Which tiers hold each chunk, the fastest first. With ``ask``, lower tiers are asked for what is on no record
        of theirs, which takes ``lookup_timeout`` at most."""
        _only(arguments, "chunks", "tag", "ask")
        chunks = self._chosen(arguments) or []
        if _flag(arguments, "ask"):
            self._ask(chunks)
        found: dict[str, list[str]] = {}
        for part in _slices(chunks):
            with self._ledger.lock:
                found |= {chunk.hex(): self._tiers_of(chunk) for chunk in part}
        return found

    def pins(self, arguments: Arguments) -> dict[str, Any]:
        """The pinned chunks, up to ``limit`` of them."""
        _only(arguments, "limit")
        limit = _count(arguments, "limit", 1000, most=_MOST_LISTED)
        with self._ledger.lock:
            listed = [
                {
                    "chunk": chunk.hex(),
                    "expires_in_s": None if left is None else round(left, 3),
                    "held": self._ledger.lookup(chunk) is not None,
                }
                for chunk, left in self._pins.entries(limit)
            ]
            return {"count": len(self._pins), "pins": listed}

    def tags(self, arguments: Arguments) -> dict[str, Any]:
        """How many chunks are known by each of up to ``limit`` tags, those used last first."""
        _only(arguments, "limit")
        limit = _count(arguments, "limit", 1000, most=_MOST_LISTED)
        return {"count": len(self._tags), "tags": self._tags.counts(limit)}

    # ---- what goes ----------------------------------------------------------------------------------------------

    def clear(self, arguments: Arguments) -> dict[str, Any]:
        """Drop the chunks named, or all of them, from one tier or from all behind the GPU. Pins on them end where the
        CPU tier is meant too."""
        _only(arguments, "chunks", "tag", "tier")
        chunks = self._chosen(arguments)
        tiers = [self._named(arguments)] if arguments.get("tier") else [CPU, *self._lower.names]
        below = [tier for tier in tiers if tier != CPU and chunks != []]
        with self._ledger.lock:
            self._make_sure_of_room(len(below))
            removed = {tier: self._clear_tier(tier, chunks) for tier in tiers}
        return {"removed": sum(removed.values()), "tiers": removed, "queued": below}

    def _clear_tier(self, tier: str, chunks: Sequence[bytes] | None) -> int:
        before = self._ledger.counts()[tier]
        if tier == CPU:
            self._clear_cpu(chunks)
        elif chunks != []:
            named, generation = chunks or (), self._lower.generation
            self._lower.begin_drop(tier, named)
            self._queue_work(lambda: self._lower.drop(tier, named, generation))
        return before - self._ledger.counts()[tier]

    def _clear_cpu(self, chunks: Sequence[bytes] | None) -> None:
        if chunks is None:
            self._pins.clear()
            self._ledger.clear_cpu()
            return
        self._pins.unpin(chunks)
        for chunk in chunks:
            self._ledger.forget(chunk)

    # ---- what stays ---------------------------------------------------------------------------------------------

    def pin(self, arguments: Arguments) -> dict[str, int]:
        """Keep chunks from eviction from the CPU and the disk tier, for ``seconds`` or until they are unpinned."""
        _only(arguments, "chunks", "tag", "seconds")
        return self._pins.pin(self._chosen(arguments, needed=True), _seconds(arguments))._asdict()

    def unpin(self, arguments: Arguments) -> dict[str, int]:
        """End pins: those of the chunks named, or all."""
        _only(arguments, "chunks", "tag")
        chunks = self._chosen(arguments)
        ended = self._pins.unpin(chunks) if chunks is not None else self._pins.clear()
        return {"changed": ended}

    # ---- whose it is --------------------------------------------------------------------------------------------

    def generation(self, arguments: Arguments) -> dict[str, Any]:
        """What the engine's weights are called. With ``name``, what others with the same weights call them too, from now on:
        what the engine computed since its last reset is kept, shared by that name, and what others left by it is found. With
        ``start``, they are those that it started with."""
        _only(arguments, "name", "start")
        before = self._lower.generation
        if (name := _generation(arguments)) is not None and name != before:
            with self._ledger.lock:
                self._lower.rename(name)
                self._warming.clear()
            if (lookups := self._lookups()) is not None:
                lookups.list_again()
        return {"generation": self._lower.generation, "changed": self._lower.generation != before}

    # ---- what comes, and what moves -----------------------------------------------------------------------------

    def warm(self, arguments: Arguments) -> dict[str, Any]:
        """Bring chunks into the CPU tier: those named, or the ``newest`` so many of the lower tiers. Named ones may
        displace others, newest ones take free slots only."""
        _only(arguments, "chunks", "tag", "newest", "tier", "seconds")
        seconds, tiers = _seconds(arguments), self._below(arguments)
        if (chosen := self._chosen(arguments)) is not None:
            self._ask(chosen)
            return self._warm(chosen, tiers, evict=True, seconds=seconds)
        newest = _count(arguments, "newest", 0)
        with self._ledger.lock:
            most = max(0, min(newest, self._ledger.free_slots - len(self._warming)))
            found = [chunk for tier in tiers for chunk in self._ledger.newest(tier, most + self._ledger.capacity)]
            chunks = [chunk for chunk in dict.fromkeys(found) if not self._ledger.holds(chunk)][:most]
        # From the last to the first: what was used last is then the last to be evicted.
        return self._warm(chunks[::-1], tiers, evict=False, seconds=seconds)

    def _warm(self, chunks: list[bytes], tiers: list[str], *, evict: bool, seconds: float | None) -> dict[str, Any]:
        with self._ledger.lock:
            absent = [chunk for chunk in chunks if not self._ledger.holds(chunk)]
            sources = [(self._fastest(chunk, tiers), chunk) for chunk in absent]
            found = [(tier, chunk) for tier, chunk in sources if tier]
            room = max(0, self._ledger.capacity // 2 - len(self._warming))
            taken = found[:room] if evict else found
            for tier in tiers:
                self.warm_later(tier, [chunk for source, chunk in taken if source == tier], evict=evict)
            answer: dict[str, Any] = {
                "chunks": len(taken),
                "present": len(chunks) - len(absent),
                "missing": len(absent) - len(found),
                "refused": len(found) - len(taken),
                "queued": sorted({tier for tier, _ in taken}),
            }
            if seconds is not None:
                answer["pinned"] = self._pins.pin(chunks, seconds)._asdict()
            return answer

    def move(self, arguments: Arguments) -> dict[str, Any]:
        """Write chunks of the CPU tier to a lower tier, the fastest if none is named, and drop each from the CPU tier
        when it is there. Pinned ones stay."""
        _only(arguments, "chunks", "tag", "tier")
        chunks, tier = self._chosen(arguments, needed=True), self._below(arguments)[0]
        with self._ledger.lock:
            held = [slot for chunk in chunks if (slot := self._ledger.lookup(chunk)) is not None]
            able = [slot.chunk for slot in held if not (slot.hidden or slot.confined or slot.kept)]
            if able and self._lower.may_write:
                self._queue_work(lambda: self._lower.demote(tier, able))
            moving = len(able) if self._lower.may_write else 0
            return {
                "chunks": moving,
                "missing": len(chunks) - len(held),
                "refused": len(held) - moving,
                "queued": [tier] if moving else [],
            }

    def flush(self, arguments: Arguments) -> dict[str, Any]:
        """Write the chunks of the CPU tier that a lower tier lacks to it, before all others and those used last first:
        all of them, or the ``newest`` so many. Without a ``tier`` it is the remote one, or the slowest there is. Nothing
        leaves the CPU tier. Asked again, it names what is still lacking; ``stats`` tells how far it is."""
        _only(arguments, "tier", "newest")
        tier = self._below(arguments)[-1]
        newest = _count(arguments, "newest", 1 << 40)
        held, lacking, present = self._ledger.hottest(), list[bytes](), 0
        for part in _slices(held):
            with self._ledger.lock:
                lacking += [chunk for chunk in part if self._lower.may_hand_over(tier, chunk)]
                present += sum(tier in self._ledger.below(chunk) for chunk in part)
        del lacking[newest:]
        if lacking:
            with self._ledger.lock:
                self._queue_work(lambda: self._lower.hand_over(tier, lacking))
        return {
            "tier": tier,
            "chunks": len(lacking),
            "present": present,
            "refused": len(held) - present - len(lacking) if len(lacking) < newest else 0,
            "queued": [tier] if lacking else [],
        }

    # ---- inside -------------------------------------------------------------------------------------------------

    def _queue_work(self, work: Callable[[], object]) -> None:
        self._make_sure_of_room(1)
        self._queue.append(work)

    def _make_sure_of_room(self, operations: int) -> None:
        if len(self._queue) + operations > _MOST_QUEUED:
            raise ImpossibleOperation(
                f"{_MOST_QUEUED} operations wait for the engine's next step already: it has no requests, so send it one"
            )

    @overload
    def _chosen(self, arguments: Arguments, *, needed: Literal[True]) -> list[bytes]: ...

    @overload
    def _chosen(self, arguments: Arguments) -> list[bytes] | None: ...

    def _chosen(self, arguments: Arguments, *, needed: bool = False) -> list[bytes] | None:
        """The chunks that a request names, by themselves or by a tag; None where it names none."""
        if "tag" not in arguments:
            return _chunks(arguments, needed=needed) if needed or "chunks" in arguments else None
        if "chunks" in arguments or not isinstance(arguments["tag"], str):
            raise ImpossibleOperation("tag is a name, and stands in the place of chunks")
        return self._tags.chunks(arguments["tag"])

    def _ask(self, chunks: Sequence[bytes]) -> None:
        """Have the lower tiers asked for what nobody is known to hold; returns with their answer, or in time without."""
        lookups = self._lookups()
        if lookups is None:
            return
        unknown: list[bytes] = []
        for part in _slices(chunks):
            with self._ledger.lock:
                unknown += [chunk for chunk in part if not (self._ledger.holds(chunk) or self._ledger.below(chunk))]
        if not unknown:
            return
        question = lookups.ask(unknown)
        while question.pending:
            time.sleep(_POLL_SECONDS)

    def _tiers_of(self, chunk: bytes) -> list[str]:
        above = ((GPU, self._ledger.in_gpu(chunk)), (CPU, self._ledger.lookup(chunk) is not None))
        return [*(tier for tier, held in above if held), *self._ledger.below(chunk)]

    def _fastest(self, chunk: bytes, tiers: Sequence[str]) -> str:
        return next((tier for tier in self._ledger.below(chunk) if tier in tiers), "")

    def _named(self, arguments: Arguments) -> str:
        """The tier behind the GPU that a request names."""
        tier, tiers = arguments.get("tier"), [CPU, *self._lower.names]
        if tier == GPU:
            raise ImpossibleOperation("the gpu tier is the engine's own prefix cache: POST its /reset_prefix_cache")
        if tier not in tiers:
            raise ImpossibleOperation(f"there is no tier {tier!r} here; there are: {', '.join(tiers)}")
        return str(tier)

    def _below(self, arguments: Arguments) -> list[str]:
        """The lower tier that a request names, or all of them."""
        if not self._lower.names:
            raise ImpossibleOperation("there is no lower tier here: set enable_disk or enable_remote")
        if not arguments.get("tier"):
            return self._lower.names
        if (tier := self._named(arguments)) == CPU:
            raise ImpossibleOperation(f"cpu is no lower tier; there are: {', '.join(self._lower.names)}")
        return [tier]


def _slices(chunks: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    """Parts of a list, small enough that the engine can do without the ledger for one of them."""
    for at in range(0, len(chunks), _SLICE):
        if at:
            time.sleep(_YIELD_SECONDS)  # or this thread takes the lock again before the engine's wakes up
        yield chunks[at : at + _SLICE]


def _only(arguments: Arguments, *known: str) -> None:
    if unknown := sorted(set(arguments) - set(known)):
        raise ImpossibleOperation(f"unknown argument {unknown[0]!r}; known: {', '.join(known) or 'none'}")


def _chunks(arguments: Arguments, *, needed: bool = False) -> list[bytes]:
    """The chunks a control request names: packed bytes, or a list of hex digests."""
    given = arguments.get("chunks", b"")
    try:
        chunks = unpack(given) if isinstance(given, bytes) else [bytes.fromhex(digest) for digest in given]
    except (MalformedFrame, TypeError, ValueError) as error:
        raise ImpossibleOperation(f"chunks are packed bytes or a list of hexadecimal digests: {error}") from error
    if any(len(chunk) != HASH_BYTES for chunk in chunks):
        raise ImpossibleOperation(f"a chunk is named by {HASH_BYTES} bytes, or {2 * HASH_BYTES} hex digits")
    if needed and not chunks:
        raise ImpossibleOperation("name the chunks: 'chunks' is missing or empty")
    return list(dict.fromkeys(chunks))


def _flag(arguments: Arguments, name: str) -> bool:
    value = arguments.get(name, False)
    if not isinstance(value, bool):
        raise ImpossibleOperation(f"{name} is true or false, not {value!r}")
    return value


def _generation(arguments: Arguments) -> str | None:
    """The generation that a request names, empty for that of the start, None where it only asks."""
    value = arguments.get("name")
    if _flag(arguments, "start"):
        if value is not None:
            raise ImpossibleOperation("start stands for a name: give one of them")
        return ""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ImpossibleOperation(f"name is a text, not {value!r}")
    try:
        return generation_name(value)
    except ValueError as error:
        raise ImpossibleOperation(f"name is {value!r}, but {error}") from error


def _count(arguments: Arguments, name: str, default: int, most: int = 1 << 40) -> int:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ImpossibleOperation(f"{name} is a number from 1 to {most}, not {value!r}")
    return value


def _seconds(arguments: Arguments) -> float | None:
    value = arguments.get("seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ImpossibleOperation(f"seconds is a number, not {value!r}")
    if not 0 < value <= MOST_PIN_SECONDS:
        raise ImpossibleOperation(f"seconds is more than 0 and at most {MOST_PIN_SECONDS:.0f}, not {value!r}")
    return float(value)
