"""The ``gpu`` tier: vLLM's own prefix-cache blocks, watched and turned into whole chunks.

vLLM's block pool writes an event for every block it caches, evicts or clears, once it is told to. The tier tells it so
and reads the events before vLLM takes them; what the user configured for vLLM's own event publisher stays as it was,
and without such a configuration vLLM still sees none.

Only full-attention groups count: a sliding-window group keeps no more than its window, so its blocks say nothing about
the prompt's start. A chunk is in the tier while it is whole in every full-attention group.

Everything here runs on the engine's thread.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from kv_protocol.blocks import BlockChunks
from kv_protocol.hashing import Media, root_hash

# A child of vLLM's logger, so that its handlers and level apply inside an engine.
_log = logging.getLogger("vllm.warmroute.gpu_tier")


class GpuLedger(Protocol):
    """What the tier tells of its changes. ``lock`` is held around every call."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...
    def gpu_stored(self, chunks: Iterable[bytes]) -> None: ...
    def gpu_removed(self, chunks: Iterable[bytes]) -> None: ...
    def gpu_cleared(self) -> None: ...


class GpuTier:
    """Watches one engine's block pool.

    ``kv_cache_manager`` is vLLM's KVCacheManager (or its BlockPool, all that is known before 0.30),
    ``groups`` are the ``kv_cache_groups`` of its KVCacheConfig. ``on_cleared`` is called at once after a successful
    reset of the prefix cache, because an idle engine takes no step that would report it: it should drain and publish. ``before_reset`` is called before
    each attempt.
    """

    def __init__(
        self,
        kv_cache_manager: Any,
        groups: Sequence[Any],
        *,
        chunk_size: int,
        model: str,
        on_cleared: Callable[[], None] = lambda: None,
        before_reset: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = getattr(kv_cache_manager, "block_pool", kv_cache_manager)
        self._groups = self._watched_groups(groups, chunk_size, model)
        self._on_cleared = on_cleared
        self._before_reset = before_reset
        self._pending: list[tuple[Any, Sequence[Media] | None]] = []
        self._cursor = 0  # events of the pool's queue already read
        self._repeats: set[int] = set()  # positions in the queue of stores that tell of blocks stored before
        self._media: dict[int, Sequence[Media]] = {}  # position in the queue -> media of a store
        if (reset := getattr(self._pool, "reset_prefix_cache", None)) is not None:
            self._pool.reset_prefix_cache = partial(self._resetting, reset)
        if self._groups:
            self._watch()

    @property
    def is_reported(self) -> bool:
        """Whether the tier has content to report at all."""
        return bool(self._groups)

    @property
    def chunks(self) -> set[bytes]:
        """The chunks in the tier, as last drained."""
        first, *others = self._groups.values() or (None,)
        return {chunk for chunk in first.chunks if self._is_in(chunk, others)} if first else set()

    def drain(self, ledger: GpuLedger) -> bool:
        """Tell the ledger what changed since the last call, in order; returns whether anything did. About a hundred
        nanoseconds when nothing did."""
        if not self._groups or not (self._pool.kv_event_queue or self._pending):
            return False
        self._pull()
        if not self._pending:
            return False
        pending, self._pending = self._pending, []
        steps = _Steps()
        for event, media in pending:
            self._apply(event, media, steps)
        with ledger.lock:
            for action, chunks in steps.taken:
                _tell(ledger, action, chunks)
        return bool(steps.taken)

    def _watched_groups(self, groups: Sequence[Any], chunk_size: int, model: str) -> dict[int, BlockChunks]:
        if not getattr(self._pool, "enable_caching", True):
            _log.warning("prefix caching is off in the engine: the gpu tier is not reported")
            return {}
        full = [index for index, group in enumerate(groups) if _is_full_attention(group.kv_cache_spec)]
        if not full:
            _log.warning("no KV-cache group has full attention: the gpu tier is not reported")
        root = partial(_root, chunk_size, model)
        return {index: BlockChunks(chunk_size, root) for index in full}

    def _watch(self) -> None:
        pool = self._pool
        self._user_wants_events = bool(pool.enable_kv_cache_events)
        pool.enable_kv_cache_events = True
        self._take_events = pool.take_events
        pool.take_events = self._taken
        pool.cache_full_blocks = partial(self._caching, pool.cache_full_blocks)
        if (emit := getattr(pool, "emit_cached_block_events", None)) is not None:
            pool.emit_cached_block_events = partial(self._repeating, emit)

    def _taken(self) -> list[Any]:
        """Stands in for ``BlockPool.take_events``."""
        self._pull()
        events: list[Any] = self._take_events()
        self._forget_positions()
        return events if self._user_wants_events else []

    def _caching(self, cache_full_blocks: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        request = kwargs["request"] if "request" in kwargs else args[0]
        if not getattr(request, "mm_features", None):
            return cache_full_blocks(*args, **kwargs)
        before = len(self._pool.kv_event_queue)
        result = cache_full_blocks(*args, **kwargs)
        given = inspect.signature(cache_full_blocks).bind(*args, **kwargs).arguments
        media = _media(request, int(given["num_cached_blocks"]) * int(given["block_size"]))
        self._media.update((at, media) for at in range(before, len(self._pool.kv_event_queue)))
        return result

    def _repeating(self, emit: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = len(self._pool.kv_event_queue)
        result = emit(*args, **kwargs)
        self._repeats.update(range(before, len(self._pool.kv_event_queue)))
        return result

    def _resetting(self, reset_prefix_cache: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_reset()
        done = reset_prefix_cache(*args, **kwargs)
        if done:
            self._on_cleared()
        return done

    def _pull(self) -> None:
        queue = self._pool.kv_event_queue if self._groups else ()
        for at in range(self._cursor, len(queue)):
            if at not in self._repeats:
                self._pending.append((queue[at], self._media.get(at)))
        self._cursor = len(queue)
        if self._cursor and not self._user_wants_events:
            self._take_events()
            self._forget_positions()

    def _forget_positions(self) -> None:
        self._cursor = 0
        self._repeats.clear()
        self._media.clear()

    def _apply(self, event: Any, media: Sequence[Media] | None, steps: "_Steps") -> None:
        # By name: vLLM is imported in the facade alone.
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            for blocks in self._groups.values():
                blocks.cleared()
            steps.add("cleared", [])
            return
        index = getattr(event, "group_idx", None) or 0
        group = self._groups.get(index)
        if group is None:
            return
        others = [blocks for at, blocks in self._groups.items() if at != index]
        if kind == "BlockStored":
            steps.add("stored", [chunk for chunk in _store(group, event, media) if self._is_in(chunk, others)])
        elif kind == "BlockRemoved":
            steps.add("removed", [chunk for chunk in group.removed(event.block_hashes) if self._is_in(chunk, others)])

    def _is_in(self, chunk: bytes, groups: Iterable[BlockChunks]) -> bool:
        return all(chunk in group for group in groups)


class _Steps:
    """Changes in order, neighbours of one kind together."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, list[bytes]]] = []

    def add(self, action: str, chunks: list[bytes]) -> None:
        if action != "cleared" and not chunks:
            return
        if self.taken and self.taken[-1][0] == action:
            self.taken[-1][1].extend(chunks)
        else:
            self.taken.append((action, chunks))


def _tell(ledger: GpuLedger, action: str, chunks: list[bytes]) -> None:
    if action == "stored":
        ledger.gpu_stored(chunks)
    elif action == "removed":
        ledger.gpu_removed(chunks)
    else:
        ledger.gpu_cleared()


def _store(group: BlockChunks, event: Any, media: Sequence[Media] | None) -> list[bytes]:
    return group.stored(
        event.block_hashes or (),
        event.parent_block_hash,
        event.token_ids,
        event.block_size,
        lora=getattr(event, "lora_name", None) or "",
        extra_keys=getattr(event, "extra_keys", None),
        media=media,
    )


def _media(request: Any, start: int) -> list[Media]:
    """A request's media items with offsets that count from its token ``start``."""
    return [
        Media(feature.identifier, feature.mm_position.offset - start, feature.mm_position.length)
        for feature in request.mm_features
    ]


def _root(chunk_size: int, model: str, lora: str, cache_salt: str) -> bytes:
    return root_hash(chunk_size=chunk_size, model=model, lora=lora, cache_salt=cache_salt)


def _is_full_attention(spec: Any) -> bool:
    nested = getattr(spec, "kv_cache_specs", None)
    if isinstance(nested, Mapping):
        return bool(nested) and all(_is_full_attention(each) for each in nested.values())
    return any(kind.__name__ == "FullAttentionSpec" for kind in type(spec).__mro__)
