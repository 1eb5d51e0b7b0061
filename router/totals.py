"""One answer to Prometheus from several processes.

Counters and histograms are added up; gauges, which say how things are in one process, get a ``process`` label. A sum
must never fall, or Prometheus takes it for a restart: what a process said last is kept in a file before it is said, and
what processes that ended had counted is folded into one more file.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_SUMMED = frozenset({"counter", "histogram", "summary"})
_KEPT_PIDS = 256
_ATTEMPTS = 3

Labels = tuple[tuple[str, str], ...]


class Family(msgspec.Struct, array_like=True):
    """One metric family; samples are (name, labels, value)."""

    name: str
    help: str
    kind: str
    samples: list[tuple[str, Labels, float]]


class Snapshot(msgspec.Struct):
    """What one process has to say: ``process`` is its number."""

    pid: int
    process: int
    families: list[Family]


class Retired(msgspec.Struct):
    """What ended processes had counted, and which those are."""

    pids: list[int] = []
    families: list[Family] = []


def families_of(registry: CollectorRegistry) -> list[Family]:
    """A registry's metrics as they are now. O(series)."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, tuple(sample.labels.items()), float(sample.value)) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]


def render(snapshots: Iterable[Snapshot], retired: Iterable[Family] = ()) -> bytes:
    """All of it in the text exposition format. O(series of all processes)."""
    merged: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, Labels], float]] = {}
    for number, families in [*((s.process, s.families) for s in snapshots), (-1, list(retired))]:
        for family in families:
            held = merged.setdefault(family.name, family)
            _add(values.setdefault(held.name, {}), family, number)
    registry = CollectorRegistry()
    registry.register(_Merged(merged.values(), values))
    return generate_latest(registry)


def counts(families: Iterable[Family]) -> list[Family]:
    """The families that are added up."""
    return [family for family in families if family.kind in _SUMMED]


class _Merged(Collector):
    def __init__(self, families: Iterable[Family], values: dict[str, dict[tuple[str, Labels], float]]) -> None:
        self._families = families
        self._values = values

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.kind)
            for (name, labels), value in self._values[family.name].items():
                metric.add_sample(name, dict(labels), value)
            yield metric


def _add(into: dict[tuple[str, Labels], float], family: Family, process: int) -> None:
    for name, labels, value in family.samples:
        if family.kind not in _SUMMED:
            into[name, (*labels, ("process", str(process)))] = value
        elif name.endswith("_created"):
            into[name, labels] = min(value, into.get((name, labels), value))
        else:
            into[name, labels] = into.get((name, labels), 0.0) + value


class CountFiles:
    """The files, in the directory that the processes share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, snapshot: Snapshot) -> None:
        """Put down what a process has counted, to be done before it is said."""
        content = Snapshot(snapshot.pid, snapshot.process, counts(snapshot.families))
        self._write(self._path(snapshot.pid), content)

    def others(self, living: dict[int, Snapshot]) -> list[Family]:
        """The counts of processes that did not speak for themselves, ended or not. ``living`` is by process id; those
        that were folded meanwhile are taken out of it."""
        for _ in range(_ATTEMPTS):
            retired = self._retired()
            families = list(retired.families)
            for path in self._directory.glob("counts-*"):
                snapshot = self._read(path)
                if snapshot is not None and snapshot.pid not in living and snapshot.pid not in retired.pids:
                    families += snapshot.families
            if self._retired().pids == retired.pids:
                break  # no process was folded while we looked
        for pid in set(living) & set(retired.pids):
            del living[pid]
        return families

    def fold(self, pid: int) -> None:
        """A process has ended: add what it counted to what others before it did. For the supervisor alone."""
        path = self._path(pid)
        snapshot = self._read(path)
        if snapshot is None:
            return
        before = self._retired()
        families = _summed([*before.families, *snapshot.families])
        self._write(self._directory / "retired", Retired([*before.pids, pid][-_KEPT_PIDS:], families))
        path.unlink(missing_ok=True)

    def _path(self, pid: int) -> Path:
        return self._directory / f"counts-{pid}"

    def _retired(self) -> Retired:
        try:
            return msgspec.msgpack.decode((self._directory / "retired").read_bytes(), type=Retired)
        except FileNotFoundError:
            return Retired()

    @staticmethod
    def _read(path: Path) -> Snapshot | None:
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Snapshot)
        except FileNotFoundError:
            return None

    @staticmethod
    def _write(path: Path, content: object) -> None:
        beside = path.with_name("." + path.name)
        beside.write_bytes(msgspec.msgpack.encode(content))
        beside.replace(path)


def _summed(families: Iterable[Family]) -> list[Family]:
    values: dict[str, dict[tuple[str, Labels], float]] = {}
    heads: dict[str, Family] = {}
    for family in families:
        heads.setdefault(family.name, family)
        _add(values.setdefault(family.name, {}), family, -1)
    return [
        Family(head.name, head.help, head.kind, [(*key, value) for key, value in values[head.name].items()])
        for head in heads.values()
    ]
