"""The connector's figures: what was asked, what was reused, what was moved.

Every figure is kept by exactly one half, so that summing over an engine's processes counts nothing twice: the
scheduler half keeps what concerns requests, tiers and readers; bytes and seconds are kept by whoever learns of a
transfer's end (the scheduler half if its workers' acknowledgements carry them). One thread writes; reading a summary
from another thread is safe.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One counter or gauge: its Prometheus name without the ``warmroute_`` and ``_total`` around it."""

    name: str
    help: str
    by_tier: bool = False
    is_gauge: bool = False


FIGURES = (
    Figure("requests", "Requests that began to run."),
    Figure("requests_with_hit", "Requests that reused at least one token."),
    Figure("prompt_tokens", "Prompt tokens of the requests that began to run."),
    Figure("hit_tokens", "Prompt tokens reused instead of computed, by the tier they came from.", by_tier=True),
    Figure("timed_hits", "Requests with a hit whose prefill speed was known, so that their saving could be estimated."),
    Figure("avoided_seconds", "Prefill time of the reused tokens of timed_hits, at the measured speed, in seconds."),
    Figure("waited_seconds", "Time that requests of timed_hits waited for their loads, in seconds."),
    Figure(
        "load_chunks", "Chunks loaded: from the CPU tier into the GPU, from lower ones into the CPU tier.", by_tier=True
    ),
    Figure("load_bytes", "Bytes of them.", by_tier=True),
    Figure("load_seconds", "Time that loads took, in seconds.", by_tier=True),
    Figure("save_chunks", "Chunks saved: from the GPU into the CPU tier, from there into lower ones.", by_tier=True),
    Figure("save_bytes", "Bytes of them.", by_tier=True),
    Figure("save_seconds", "Time that saves took, in seconds.", by_tier=True),
    Figure("failed_saves", "Chunks that a lower tier did not take.", by_tier=True),
    Figure(
        "incompressible_chunks", "Chunks written raw to a lower tier, because exp12 cannot hold them.", by_tier=True
    ),
    Figure("missing_chunks", "Chunks that were no longer in a lower tier when they were fetched.", by_tier=True),
    Figure("lower_tier_timeouts", "Requests that waited for lower tiers as long as they may, and went on without."),
    Figure("evictions", "Chunks evicted to make room.", by_tier=True),
    Figure("failed_loads", "Chunks whose load failed; their tokens were computed instead.", by_tier=True),
    Figure(
        "damaged_chunks",
        "Chunks among them whose bytes were not those that were saved; of the CPU tier, seen where verify is on.",
        by_tier=True,
    ),
    Figure("skipped_loads", "Chunks not loaded because computing them was predicted to be faster.", by_tier=True),
    Figure("compared_chunks", "Chunks of the CPU tier that the shadow check computed again and compared."),
    Figure("different_chunks", "Chunks among them that were not the same, and were dropped."),
    Figure("dropped_readers", "Report readers dropped because they did not keep up."),
    Figure("relists", "Snapshots sent to report readers."),
    Figure("report_readers", "Report readers connected now.", is_gauge=True),
    Figure("failing_ranks", "Ranks whose store does not serve now, or takes nothing.", by_tier=True, is_gauge=True),
    Figure("store_bytes", "Bytes of the objects that ranks know in their store.", by_tier=True, is_gauge=True),
    Figure("quarantined_objects", "Objects that ranks put aside since they started.", by_tier=True, is_gauge=True),
    Figure("held_chunks", "Chunks held now.", by_tier=True, is_gauge=True),
    Figure("capacity_chunks", "Chunks that fit.", by_tier=True, is_gauge=True),
)
"""Every figure there is."""

VISION_FIGURES = (
    Figure("vision_hits", "Media items whose encoder output was loaded instead of computed."),
    Figure("vision_hit_embeddings", "Embeddings of them, which is what the encoder was spared."),
    Figure("vision_encoded", "Media items that the encoder computed."),
    Figure("vision_load_bytes", "Bytes of the outputs of vision_hits, on each rank."),
    Figure("vision_saves", "Outputs that every rank keeps in host memory since."),
    Figure("vision_save_bytes", "Bytes of them, on each rank."),
    Figure("vision_failed_saves", "Outputs that a rank failed to keep, so that none does."),
    Figure("vision_evictions", "Outputs evicted to make room."),
    Figure("vision_entries", "Outputs kept now.", is_gauge=True),
    Figure("vision_bytes", "Bytes taken by them, on each rank.", is_gauge=True),
    Figure("vision_capacity_bytes", "Bytes that the cache may take, on each rank.", is_gauge=True),
)
"""Those of the vision cache, which has a connector of its own in vLLM."""

GAUGES = frozenset(figure.name for figure in (*FIGURES, *VISION_FIGURES) if figure.is_gauge)

Counts = dict[str, dict[str, float]]
"""Figure name -> tier ("" for figures without tiers) -> value."""


class Stats:
    """Totals since the start, and what came since ``take`` was called last."""

    def __init__(self) -> None:
        self._total: Counts = {}
        self._since: Counts = {}

    def request(
        self,
        prompt_tokens: int,
        hit_tokens: Mapping[str, int],
        *,
        prefill_speed: float = 0.0,
        load_seconds: float = 0.0,
    ) -> None:
        """A request began to run with these hits by tier, after waiting ``load_seconds`` for its loads.
        ``prefill_speed`` is the engine's measured tokens per second, 0 while unknown: the request's saving is then
        not estimated."""
        hits = sum(hit_tokens.values())
        self.add("requests", 1)
        self.add("prompt_tokens", prompt_tokens)
        if hits:
            self.add("requests_with_hit", 1)
            if prefill_speed > 0:
                self.add("timed_hits", 1)
                self.add("avoided_seconds", hits / prefill_speed)
                self.add("waited_seconds", load_seconds)
        for tier, tokens in hit_tokens.items():
            self.add("hit_tokens", tokens, tier)

    def loaded(self, tier: str, chunks: int, nbytes: int, seconds: float) -> None:
        self._moved("load", tier, chunks, nbytes, seconds)

    def saved(self, tier: str, chunks: int, nbytes: int, seconds: float) -> None:
        self._moved("save", tier, chunks, nbytes, seconds)

    def evicted(self, tier: str, chunks: int = 1) -> None:
        self.add("evictions", chunks, tier)

    def load_failed(self, tier: str, chunks: int = 1) -> None:
        self.add("failed_loads", chunks, tier)

    def tier_failed(self, tier: str, kind: str, cause: str) -> None:
        """A lower tier failed one chunk of a ``fetch`` or ``write``. ``cause`` is "missing", "bad", or the store's word."""
        if kind != "fetch":
            self.add("failed_saves", 1, tier)
        elif cause == "missing":
            self.add("missing_chunks", 1, tier)
        else:
            self.add("failed_loads", 1, tier)
            if cause == "bad":
                self.add("damaged_chunks", 1, tier)

    def load_skipped(self, tier: str, chunks: int = 1) -> None:
        self.add("skipped_loads", chunks, tier)

    def add(self, name: str, amount: float, tier: str = "") -> None:
        """Count ``amount`` more of a counter. O(1)."""
        for counts in (self._total, self._since):
            tiers = counts.setdefault(name, {})
            tiers[tier] = tiers.get(tier, 0) + amount

    def set(self, name: str, value: float, tier: str = "") -> None:
        """Set a gauge. O(1)."""
        if self._total.setdefault(name, {}).get(tier) != value:
            self._total[name][tier] = value
            self._since.setdefault(name, {})[tier] = value

    def bring(self, name: str, total: float) -> None:
        """Bring a counter that is kept elsewhere up to its total."""
        known = self._total.get(name, {}).get("", 0)
        if total > known:
            self.add(name, total - known)

    @property
    def has_news(self) -> bool:
        """Whether anything was counted or set since ``take`` was called last."""
        return bool(self._since)

    def take(self) -> Counts:
        """What was counted and set since the last call."""
        since, self._since = self._since, {}
        return since

    def total(self) -> Counts:
        """Everything since the start."""
        return {name: dict(tiers) for name, tiers in list(self._total.items())}

    def _moved(self, kind: str, tier: str, chunks: int, nbytes: int, seconds: float) -> None:
        self.add(f"{kind}_chunks", chunks, tier)
        self.add(f"{kind}_bytes", nbytes, tier)
        self.add(f"{kind}_seconds", seconds, tier)


def merge(into: Counts, other: Counts) -> Counts:
    """Sum of counters; of a gauge, the other's value where it has one. Changes and returns ``into``."""
    for name, tiers in other.items():
        mine = into.setdefault(name, {})
        for tier, value in tiers.items():
            mine[tier] = value if name in GAUGES else mine.get(tier, 0) + value
    return into


def combine(engines: Iterable[Counts]) -> Counts:
    """Figures of several engines as one: counters and gauges are summed."""
    whole: Counts = {}
    for counts in engines:
        for name, tiers in counts.items():
            mine = whole.setdefault(name, {})
            for tier, value in tiers.items():
                mine[tier] = mine.get(tier, 0) + value
    return whole


def summary(counts: Counts) -> dict[str, Any]:
    """Figures as a user reads them.

    ``hit_rate`` is the share of prompt tokens that were reused; ``avg_ttft_reduction`` the mean seconds saved per
    request with a hit: its hit tokens over the measured prefill speed, less the time its loads took.
    """
    timed = _of(counts, "timed_hits")
    saved = _of(counts, "avoided_seconds") - _of(counts, "waited_seconds")
    prompt_tokens = _of(counts, "prompt_tokens")
    hit_tokens = sum(counts.get("hit_tokens", {}).values())
    return {
        "hit_rate": hit_tokens / prompt_tokens if prompt_tokens else 0.0,
        "avg_ttft_reduction": saved / timed if timed else 0.0,
        "requests": int(_of(counts, "requests")),
        "requests_with_hit": int(_of(counts, "requests_with_hit")),
        "prompt_tokens": int(prompt_tokens),
        "hit_tokens": int(hit_tokens),
        "compared_chunks": int(_of(counts, "compared_chunks")),
        "different_chunks": int(_of(counts, "different_chunks")),
        "report": {name: int(_of(counts, name)) for name in ("report_readers", "dropped_readers", "relists")},
        "tiers": {tier: _tier_summary(counts, tier) for tier in _tiers(counts)},
        **_vision_summary(counts),
    }


def _vision_summary(counts: Counts) -> dict[str, dict[str, int]]:
    """Only of engines that have a vision cache."""
    if "vision_capacity_bytes" not in counts:
        return {}
    return {"vision": {name.removeprefix("vision_"): int(_of(counts, name)) for name, *_ in VISION_FIGURES}}


def _tier_summary(counts: Counts, tier: str) -> dict[str, float]:
    values = {
        figure.name: _of(counts, figure.name, tier) for figure in FIGURES if figure.by_tier and figure.name in counts
    }
    whole = {name: value if name.endswith("_seconds") else int(value) for name, value in values.items()}
    for kind in ("load", "save"):
        if seconds := values.get(f"{kind}_seconds"):
            whole[f"{kind}_bandwidth"] = values.get(f"{kind}_bytes", 0.0) / seconds
    return whole


def _tiers(counts: Counts) -> list[str]:
    return sorted({tier for tiers in counts.values() for tier in tiers if tier})


def _of(counts: Counts, name: str, tier: str = "") -> float:
    return counts.get(name, {}).get(tier, 0)
