"""The half of the connector that runs beside the scheduler: ledger, planner, GPU tier and report server, wired up."""

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kv_protocol.hashing import HASH_BYTES
from kv_protocol.identity import Identity
from kv_protocol.messages import Hello, TierInfo
from worker_connector import vision_cache_resets
from worker_connector.chunk_object import ObjectKey
from worker_connector.config import ConnectorConfig
from worker_connector.conversations import Conversations
from worker_connector.engine_blocks import EngineBlocks
from worker_connector.errors import UnsupportedCache
from worker_connector.eviction import POLICIES, Prioritised
from worker_connector.geometry import Group, describe_groups
from worker_connector.gpu_tier import GpuTier
from worker_connector.ledger import CPU, GPU, Ledger
from worker_connector.lookups import Lookups
from worker_connector.operations import Operations
from worker_connector.pins import MOST_SHARE, REQUESTS_SHARE, Pins
from worker_connector.plan import StepPlan, WorkerReport
from worker_connector.planner import Planner
from worker_connector.regions import SlotLayout, group_regions
from worker_connector.report_server import ReportServer, Timing
from worker_connector.request_controls import Controls
from worker_connector.shape import fresh_generation, identity_of, shape_of
from worker_connector.stats import Counts, Stats
from worker_connector.tags import Tags
from worker_connector.tier_figures import RankStores
from worker_connector.tier_stores import DISK, capacity_of, open_stores, rules_of

WARMUP_SECONDS = 30.0
"""How long an engine without requests keeps stepping for lower tiers to be listed, so that it can warm up."""
IDLE_WAIT_SECONDS = 0.005
"""How long a step without a forward waits for look-ups."""
GAUGE_SECONDS = 0.5
"""Gauges are looked at this often while no counter moves."""

_log = logging.getLogger("vllm.warmroute.scheduler")


class SchedulerHalf:
    """One engine's (data-parallel rank's) part. ``vllm_config`` and ``cache`` are vLLM's VllmConfig and KVCacheConfig.

    Raises:
        ConfigurationError: the chunk size does not fit the engine's blocks.
    """

    def __init__(
        self, config: ConnectorConfig, vllm_config: Any, cache: Any, *, may_load: bool, may_save: bool
    ) -> None:
        self.config = config
        self.model = config.model_name or _served_name(vllm_config.model_config)
        self.stats = Stats()
        self.ledger = Ledger(Prioritised(POLICIES[config.eviction_policy]), config.ttl)
        self._vllm_config = vllm_config
        self._cache = cache
        self._groups, self._layout = self._describe(may_store=may_load or may_save)
        self._ranks = vllm_config.parallel_config.world_size
        self._gpu: GpuTier | None = None
        self._server: ReportServer | None = None
        self._awaits_ranks = False
        self._introduced: list[tuple[int, ObjectKey | None]] = []
        self._manager: Any = None
        self._gauges_due = 0.0
        self._held: dict[str, int] = {}
        self._lookups: Lookups | None = None
        self._warm_until = time.monotonic() + WARMUP_SECONDS if config.cache_warmup and may_load else 0.0
        self.planner = Planner(
            config,
            self.ledger,
            self._groups,
            model=self.model,
            ranks=self._ranks,
            chunk_bytes=self._layout.payload_bytes if self._layout else 0,
            may_load=may_load and self._layout is not None,
            may_save=may_save and self._layout is not None,
            stats=self.stats,
            gpu_usage=self._gpu_usage,
            tiers=rules_of(config) if self._layout is not None else (),
        )

        self.planner.lower.generation = config.weights_generation
        self.planner.lower.fetches.least = config.min_load_tokens
        self.rank_stores = RankStores()
        below = self.planner.lower.pins_below
        below.most = self._most_pins_below()
        self.pins = Pins(self.ledger)
        self.tags = Tags(self.ledger)
        self.planner.mark = self._mark
        if config.conversation_mode:
            self.planner.turn_ended = Conversations(self.pins, config.conversation_seconds).turn_ended
        self.pins.changed = lambda chunks, pinned: below.changed(chunks, pinned=pinned)
        self.operations = Operations(
            self.ledger,
            self.planner.lower,
            self.pins,
            self.tags,
            totals=self._totals,
            lookups=lambda: self._lookups,
            ranks=self.rank_stores.of,
        )

    def bind(self, manager: Any) -> None:
        """Watch the engine's prefix cache. ``manager`` is vLLM's KVCacheManager, or its BlockPool."""
        self._manager = manager
        if self.config.conversation_mode:
            self.planner.hold_blocks(EngineBlocks(manager))
        groups = self._cache.kv_cache_groups
        self._gpu = GpuTier(
            manager,
            groups,
            chunk_size=self.config.chunk_size,
            model=self.model,
            on_cleared=self._gpu_cleared,
            before_reset=self.planner.let_blocks_go,
        )

    def start(self, slots: Iterable[int], objects: Sequence[ObjectKey | None] = ()) -> None:
        """Size the CPU tier to what every rank has, and open the report port. ``objects`` is, for each rank, what its objects
        in lower tiers are called, with any chunk: pipeline ranks have other layers, and so another identity."""
        ranks = list(slots)
        self.ledger.set_capacity(min(ranks, default=0))
        if any(ranks) and not all(ranks):
            _log.error(
                "Nothing is kept behind the GPU: rank %d has no room for a chunk, and a chunk is in a tier when all of the %d "
                "ranks have it. That rank's log says why",
                ranks.index(0),
                len(ranks),
            )
        self._start_server()
        self._look_below(objects)

    def await_ranks(self) -> None:
        """Start once the ranks have said in their first step what they have; until then nothing is kept or reported."""
        self._awaits_ranks = True
        _log.info("Another connector has the handshake: tiers and reports begin with the engine's first step")

    def introduced(self, slots: Iterable[int], objects: Sequence[ObjectKey | None]) -> None:
        """What ranks said in their first step, which need not be the same one: what not every rank has room for is nowhere."""
        if not self._awaits_ranks:
            return
        self._introduced += zip(slots, objects, strict=True)
        if len(self._introduced) >= self._ranks:
            self._awaits_ranks = False
            self.start(*zip(*self._introduced, strict=True))

    def added(self, request: Any) -> None:
        """The engine got a request."""
        self._empty_gpu_if_stale()
        self.planner.added(request)

    def plan_step(self, output: Any) -> StepPlan:
        """The step's plan for the workers."""
        if self._server is None and not self._awaits_ranks:
            self._start_server()
        self._drain()
        if self._warm_until:
            self._warm_up()
        self.pins.expire()
        if self.operations.has_queued:
            self.operations.run_queued()
        plan = self.planner.plan_step(output)
        if plan.idle and self._lookups is not None:
            # Nobody is delayed, and empty steps in a row would take the processor from whoever looks up.
            self._lookups.wait(IDLE_WAIT_SECONDS)
        return plan

    def has_unfinished_transfers(self) -> bool:
        """Whether an engine without requests must keep stepping."""
        if self.planner.has_unfinished_transfers() or self.operations.is_expected:
            return True
        return time.monotonic() < self._warm_until

    def absorb(self, report: WorkerReport | None, finished: Iterable[str]) -> None:
        """What the workers did in a step."""
        self._drain()
        if report is not None and report.stores:
            self.rank_stores.told(report.stores)
            for name, tier, value in self.rank_stores.gauges():
                self.stats.set(name, value, tier)
        self.planner.absorb(report, finished)

    def reset(self) -> None:
        """The engine's weights may be others from now on: its KV of before is of no use, and lower tiers know it by another
        identity until somebody names its weights."""
        generation = fresh_generation()
        self.planner.clear(generation, gpu_is_empty=self._gpu_is_empty())
        vision_cache_resets.announce(self._vllm_config)
        if self._lookups is not None:
            self._lookups.list_again()
        if self.planner.lower:
            _log.info(
                "The cache was reset: KV is kept for weights of generation %s, which no other engine has. If they are still "
                "those of before, or others have them too, name them: warmroute cache generation NAME",
                generation,
            )

    def drain_and_publish(self) -> None:
        """Tell readers of the GPU tier's changes now, whether or not a step follows."""
        self._empty_gpu_if_stale()
        self._drain()
        self.planner.publish_changes()

    def take_stats(self) -> Counts:
        """Figures since the last call; nothing in steps in which nothing was counted or held, for a while."""
        now, held = time.monotonic(), self.ledger.counts()
        if not self.stats.has_news and held == self._held and now < self._gauges_due:
            return {}
        self._gauges_due, self._held = now + GAUGE_SECONDS, held
        if self._server is not None:
            self.stats.set("report_readers", self._server.readers)
            self.stats.bring("dropped_readers", self._server.dropped_readers)
            self.stats.bring("relists", self._server.relists)
        for tier, chunks in held.items():
            self.stats.set("held_chunks", chunks, tier)
        return self.stats.take()

    def close(self) -> None:
        """Close the report port and end the look-ups. Safe to call more than once."""
        lookups, self._lookups = self._lookups, None
        if lookups is not None:
            lookups.close()
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.planner.publish = lambda _: None

    def _describe(self, *, may_store: bool) -> tuple[tuple[Group, ...], SlotLayout | None]:
        try:
            groups = describe_groups(self._cache, self._vllm_config.parallel_config, self.config.chunk_size)
            return groups, SlotLayout(group_regions(self._cache), [group.blocks_per_chunk for group in groups])
        except UnsupportedCache as reason:
            if may_store:
                _log.warning("KV blocks of this model are not offloaded, the engine runs as without them: %s", reason)
            return (), None

    def _mark(self, chunks: list[bytes], controls: Controls) -> None:
        """A request that asked for something ended."""
        if controls.keep:
            self.pins.pin(chunks, controls.keep, share=REQUESTS_SHARE, extend=True)
        if controls.tags:
            self.tags.add(controls.tags, chunks)

    def _drain(self) -> None:
        if self._gpu is not None:
            self._gpu.drain(self.ledger)

    def _gpu_cleared(self) -> None:
        self.planner.gpu_emptied()
        self.drain_and_publish()

    def _empty_gpu_if_stale(self) -> None:
        """What a reset left in the engine's own prefix cache goes as soon as no request uses it."""
        if self.planner.is_stale and not self._gpu_usage():
            if (pool := self._block_pool()) is not None:
                pool.reset_prefix_cache()
            self.planner.gpu_emptied()

    def _most_pins_below(self) -> int:
        """How many chunks may be pinned in the disk tier, so that there is always room for others."""
        if self._layout is None or not self.config.enable_disk:
            return 0
        raw = replace(self.config, disk_codec="raw")
        return int(MOST_SHARE * capacity_of(DISK, raw, self._layout.payload_bytes, self._ranks))

    def _block_pool(self) -> Any:
        return getattr(self._manager, "block_pool", self._manager)

    def _gpu_is_empty(self) -> bool:
        """Whether the engine's own prefix cache has no block, of a request or for later ones."""
        return not self._gpu_usage() and not len(getattr(self._block_pool(), "cached_block_hash_to_block", ()))

    def _gpu_usage(self) -> float:
        pool = self._block_pool()
        return float(pool.get_usage()) if hasattr(pool, "get_usage") else 0.0

    # ---- reports ------------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        config, rank = self.config, _data_parallel_rank(self._vllm_config)
        server = ReportServer(
            config.report_host,
            config.report_port + rank if config.report_port else 0,
            config.report_token,
            self._hello(rank),
            self.planner,
            self.operations.table(),
            ephemeral_if_busy=config.report_port_is_default,
            timing=Timing(heartbeat=config.report_heartbeat_seconds, digest=config.report_digest_seconds),
            queue_bytes=config.report_queue_bytes,
            max_readers=config.report_max_readers,
        )
        self._server = server
        server.start()
        self.planner.publish = server.publish

    def _hello(self, rank: int) -> Hello:
        blocks = [group.block_size for group in self._groups] or [self._vllm_config.cache_config.block_size]
        gpu_chunks = self._cache.num_blocks * min(blocks) // self.config.chunk_size
        payload_bytes = self._layout.payload_bytes if self._layout else 0
        chunk_bytes = payload_bytes * self._ranks
        capacities = {GPU: gpu_chunks, CPU: self.ledger.capacity}
        for name in self.planner.lower.names:
            capacities[name] = capacity_of(name, self.config, payload_bytes, self._ranks)
        for name, capacity in capacities.items():
            self.stats.set("capacity_chunks", capacity, name)
        return Hello(
            epoch=uuid.uuid4().hex,
            model=self.model,
            chunk_size=self.config.chunk_size,
            block_size=min(blocks),
            identity=self._identity(),
            tiers=[TierInfo(name, capacity, chunk_bytes) for name, capacity in capacities.items()],
            data_parallel_rank=rank,
            max_model_len=self._vllm_config.model_config.max_model_len,
            version=_version(),
        )

    def _identity(self) -> Identity:
        return identity_of(self.config, self._vllm_config, self._cache, self._groups, self._layout)

    def _look_below(self, objects: Sequence[ObjectKey | None]) -> None:
        """Begin to look up chunks in the lower tiers."""
        if self._layout is None or not self.config.has_lower_tiers or self._lookups is not None:
            return
        ranks = self._names_of(objects, self._layout)
        self._lookups = self.planner.lower.asks = Lookups(
            self.ledger,
            open_stores(self.config),
            lambda chunk: [rank._replace(chunk=chunk) for rank in ranks],
            rules_of(self.config),
            timeout=self.config.lookup_timeout,
            found=self.planner.publish_found,
            scope=self.planner.lower,
        )

    def _names_of(self, told: Sequence[ObjectKey | None], layout: SlotLayout) -> list[ObjectKey]:
        """What the ranks call their objects, in their order, with any chunk; as far as they do not tell, as it follows from
        what the scheduler knows."""
        names = {name.rank: name for name in told if name is not None}
        if names.keys() != set(range(self._ranks)):
            shape = shape_of(self.config, self._vllm_config, self._cache, self._groups, layout, rank=0)
            names = {rank: shape._replace(rank=rank).key(bytes(HASH_BYTES)) for rank in range(shape.ranks)}
        return [names[rank] for rank in sorted(names)]

    def _warm_up(self) -> None:
        """Once the lower tiers were listed, fetch what was used last until half of the CPU tier is full."""
        if self._lookups is None or self._lookups.scanned or time.monotonic() >= self._warm_until:
            self._warm_until = 0.0
            with self.ledger.lock:
                for tier in self.planner.lower.names:
                    room = self.ledger.free_slots - self.ledger.capacity // 2
                    # From the last to the first: what was used last is then the last to be evicted.
                    chunks = self.ledger.newest(tier, max(0, room))[::-1]
                    if fetched := self.operations.warm_later(tier, chunks):
                        _log.info("Warming up: %d chunks are fetched from tier %s", fetched, tier)

    def _totals(self) -> Counts:
        """Figures since the start. What changes while the engine takes no step is looked up."""
        totals: Counts = {**self.stats.total(), "held_chunks": {**self.ledger.counts()}}
        totals |= vision_cache_resets.totals(self._vllm_config)
        if (server := self._server) is not None:
            totals["report_readers"] = {"": server.readers}
            totals["dropped_readers"] = {"": server.dropped_readers}
            totals["relists"] = {"": server.relists}
        return totals


def _served_name(model_config: Any) -> str:
    served = model_config.served_model_name
    if isinstance(served, list | tuple):
        served = served[0] if served else None
    return str(served or model_config.model)


def _data_parallel_rank(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", None) or getattr(parallel, "data_parallel_rank", 0) or 0)


def _version() -> str:
    try:
        return version("warmroute")
    except PackageNotFoundError:
        return ""
