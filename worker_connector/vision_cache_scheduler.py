"""The vision cache's half beside the scheduler: decides what ranks load, keep and forget."""

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from worker_connector.stats import Counts, Stats
from worker_connector.vision_cache_ledger import Entry, VisionLedger
from worker_connector.vision_cache_plan import NOTHING, VisionPlan, VisionReport

GAUGE_SECONDS = 0.5
"""Gauges are looked at this often while no counter moves."""

_DIGEST = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{64})?")
"""What vLLM calls a media item after its content (blake3, SHA-256, SHA-512)."""

_log = logging.getLogger("vllm.warmroute.vision")


class VisionScheduler:
    """One engine's decisions. ``embed_bytes`` is the size of an embedding by modality, as far as it is known; for others
    it is learnt from the first output, which is not kept."""

    def __init__(self, ledger: VisionLedger, embed_bytes: Mapping[str, int]) -> None:
        self.ledger = ledger
        self.stats = Stats()
        self._embed_bytes = dict(embed_bytes)
        self._loads: dict[str, int] = {}
        self._wanted: dict[tuple[str, int], tuple[str, int, str]] = {}
        self._forget_all = False
        self._gauges_due = 0.0
        self.stats.set("vision_capacity_bytes", ledger.capacity)

    def has(self, identifier: str) -> bool:
        """Whether every rank has this item's output. O(1)."""
        return identifier in self.ledger

    def expect(self, request: Any, computed: int) -> None:
        """A request will be scheduled from its token ``computed`` on. An output under its item's name that has another
        number of embeddings is not its item's, and goes. O(1) once the request is past its media."""
        features = request.mm_features
        if not len(self.ledger) or not features or _end(features[-1]) <= computed:
            return
        for feature in features:
            entry = self.ledger.find(feature.identifier)
            if entry is not None and entry.embeds != feature.mm_position.get_num_embeds():
                self.ledger.drop(feature.identifier)

    def allocated(self, request: Any, index: int) -> None:
        """vLLM's encoder cache has room for this item, which it will be given in this step: by a load if ``has`` said so
        last, by the encoder otherwise."""
        feature = request.mm_features[index]
        identifier, embeds = feature.identifier, feature.mm_position.get_num_embeds()
        entry = self.ledger.use(identifier)
        if entry is None:
            self._wanted[request.request_id, index] = identifier, embeds, feature.modality
            return
        self._loads[identifier] = entry.ticket
        self.stats.add("vision_hits", 1)
        self.stats.add("vision_hit_embeddings", embeds)
        self.stats.add("vision_load_bytes", entry.nbytes)

    def plan(self, output: Any) -> VisionPlan:
        """What ranks are to do in this step.

        A step without tokens is not shown to the ranks' connectors, so nothing is planned for it: what was to be loaded
        is kept for the next one, unless vLLM gave its place away meanwhile.
        """
        for identifier in output.free_encoder_mm_hashes:
            self._loads.pop(identifier, None)
        if not output.total_num_scheduled_tokens:
            self._wanted.clear()
            return NOTHING
        self._lose(self.ledger.next_step())
        plan = VisionPlan(forget_all=self._forget_all)
        plan.loads, self._loads, self._forget_all = self._loads, {}, False
        self._grant(plan, output.scheduled_encoder_inputs)
        plan.forget = self.ledger.take_forgotten()
        return plan if plan != NOTHING else NOTHING

    def absorb(self, report: VisionReport) -> None:
        """What ranks did."""
        arrived, lost = self.ledger.absorb(report)
        for entry in (*arrived, *lost):
            if nbytes := report.nbytes.get(entry.ticket):
                self._embed_bytes[entry.modality] = -(-nbytes // entry.embeds)
        for entry in arrived:
            self.stats.add("vision_saves", 1)
            self.stats.add("vision_save_bytes", entry.nbytes)
        # What the grant was too small for is no failure: its size is known from now on.
        self._lose([entry for entry in lost if report.nbytes.get(entry.ticket, 0) <= entry.nbytes])
        if report.without_memory:
            self._switch_off(report.without_memory)

    def reset(self, *, also_loads: bool) -> None:
        """Outputs made so far are of no use any more. ``also_loads``: nor are those that vLLM's encoder cache was promised,
        which it has forgotten too."""
        dropped = self.ledger.clear()
        self._forget_all = True
        self._wanted.clear()
        if also_loads:
            self._loads.clear()
        if dropped:
            _log.info("The vision cache was emptied: %d outputs of the encoder are gone", dropped)

    def take_stats(self) -> Counts:
        """Figures since the last call; nothing while nothing was counted."""
        now = time.monotonic()
        if not self.stats.has_news and now < self._gauges_due:
            return {}
        self._gauges_due = now + GAUGE_SECONDS
        self._gauge()
        return self.stats.take()

    def totals(self) -> Counts:
        """Figures since the start."""
        gauges: Counts = {"vision_entries": {"": len(self.ledger)}, "vision_bytes": {"": self.ledger.used}}
        return {**self.stats.total(), **gauges}

    def _grant(self, plan: VisionPlan, scheduled: Mapping[str, list[int]]) -> None:
        wanted, self._wanted = self._wanted, {}
        for (request, index), (identifier, embeds, modality) in wanted.items():
            if index not in scheduled.get(request, ()):
                continue  # its request was preempted in the step that scheduled it
            self.stats.add("vision_encoded", 1)
            if not self.ledger.capacity or not embeds or _DIGEST.fullmatch(identifier) is None:
                continue
            # Of an unknown size, one byte per embedding asks ranks to tell.
            nbytes = embeds * self._embed_bytes.get(modality, 1)
            grant, evicted = self.ledger.reserve(identifier, embeds, modality, nbytes)
            self.stats.add("vision_evictions", evicted)
            if grant is not None:
                plan.saves[identifier] = grant

    def _lose(self, entries: list[Entry]) -> None:
        if entries:
            self.stats.add("vision_failed_saves", len(entries))

    def _switch_off(self, ranks: int) -> None:
        if self.ledger.capacity:
            _log.error(
                "The vision cache is off: %d ranks have no memory for it, and an output is kept by all ranks or none. Their "
                "log says why",
                ranks,
            )
        self.ledger = VisionLedger(0, 1)
        self._forget_all = True
        self.stats.set("vision_capacity_bytes", 0)

    def _gauge(self) -> None:
        self.stats.set("vision_entries", len(self.ledger))
        self.stats.set("vision_bytes", self.ledger.used)


def _end(feature: Any) -> int:
    return int(feature.mm_position.offset + feature.mm_position.length)
