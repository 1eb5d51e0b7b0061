"""Lossy tiers beside exact ones: nothing that a lossy copy went into is ever written down as exact."""

import random
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import BLOCK, CHUNK, Request, prompt
from tests.worker_connector.tiered_engine import TieredEngine, _Under
from worker_connector import ledger as ledger_module
from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.lower import TierRules

EXACT, LOSSY = TierRules(name="disk"), TierRules(name="remote", lossy=True)


class Approximate(tuple[int, int]):
    """What a block holds for a token, and not exactly."""

    __slots__ = ()


def is_approximate(content: Any) -> bool:
    return any(isinstance(token, Approximate) for held in content.values() for token in held.values())


class LossyEngine(TieredEngine):
    """What is written to a lossy tier comes back as approximate, and what is computed from that is approximate too."""

    def __init__(self, rules: tuple[TierRules, ...] = (EXACT, LOSSY), **options: Any) -> None:
        super().__init__(rules=rules, **options)
        self.rules = {each.name: each for each in rules}
        self.written = {(name, kind): 0 for name in self.rules for kind in ("exact", "approximate")}

    def _forward(self, request: Request, count: int) -> None:
        start = request.num_computed_tokens
        super()._forward(request, count)
        for memory in self.memory:
            read = [
                memory[table[at // BLOCK]][at % BLOCK]
                for group, table in zip(self.groups, request.tables, strict=True)
                for at in range(group.first_needed(start), start)
            ]
            if any(isinstance(token, Approximate) for token in read):
                for table in request.tables:
                    for at in range(start, start + count):
                        held = memory[table[at // BLOCK]]
                        held[at % BLOCK] = Approximate(held[at % BLOCK])

    def _end_job(self, under: _Under) -> None:
        job, lossy = under.job, self.rules[under.job.tier].lossy
        store = self.stores[job.tier]
        super()._end_job(under)
        for piece in job.pieces if job.kind == "write" else ():
            missing, content = store[under.rank, piece.chunk]
            spoilt = is_approximate(content)
            assert lossy or not spoilt, "an exact tier got what is not exact"
            self.written[job.tier, "approximate" if spoilt else "exact"] += 1
            if piece.tokens:
                assert not spoilt, "a tail is kept raw, and taken for exact"
            elif lossy:
                kept: Any = {
                    place: {at: Approximate(token) for at, token in held.items()} for place, held in content.items()
                }
                store[under.rank, piece.chunk] = missing, kept
        if job.kind == "fetch" and lossy:
            result = self._next_report.tiers[job.job]
            result.lossy |= {piece.chunk for piece in job.pieces if not piece.tokens} - result.failed.keys()


def remembers(engine: LossyEngine) -> bool:
    return engine.ledger.has_approximate


def lose(engine: LossyEngine, *tiers: str) -> None:
    for tier in tiers:
        engine.stores[tier].clear()
        engine.ledger.cleared(tier)
    engine.reset_prefix_cache()
    engine.ledger.gpu_cleared()
    engine.lose_cpu()


def test_a_chunk_from_a_lossy_tier_and_what_is_computed_on_it_stay_out_of_the_exact_one() -> None:
    engine, tokens = LossyEngine(), prompt(1, 2 * CHUNK)
    engine.serve("a", [*tokens, 1])
    assert engine.chunks_in("disk") == engine.chunks_in("remote")
    lose(engine, "disk")
    engine.serve("b", [*tokens, *prompt(2, 2 * CHUNK + 1)])
    assert engine.written["remote", "approximate"] == 2
    assert not engine.chunks_in("disk")
    # The same from the engine's own cache, with nothing of it left in slots.
    engine.lose_cpu()
    engine.serve("c", [*tokens, *prompt(3, 2 * CHUNK + 1)])
    assert not engine.chunks_in("disk")
    engine.serve("d", prompt(4, 2 * CHUNK + 1))
    assert len(engine.chunks_in("disk")) == 2


def test_the_beginning_of_a_lossy_chunk_in_the_engines_own_cache_counts() -> None:
    engine, tokens = LossyEngine(), prompt(1, 2 * CHUNK)
    engine.serve("a", [*tokens, 1])
    lose(engine, "disk")
    engine.serve("b", [*tokens, 2])
    engine.lose_cpu()
    # Half of the first chunk is the engine's own; the chunk has another name.
    engine.serve("c", [*tokens[: CHUNK // 2], *prompt(5, 2 * CHUNK)])
    assert not engine.chunks_in("disk")


def test_a_tail_that_was_computed_on_the_beginning_of_a_lossy_chunk_passes_it_on() -> None:
    engine, stem, end = LossyEngine(), prompt(1, 9 * CHUNK), prompt(2, 2 * CHUNK)
    engine.serve("a", [*stem, 1])
    *_, last = engine.planner.lower._ledger.content()["disk"]
    lose(engine)
    engine.stores["disk"].pop((0, last))
    engine.ledger.removed("disk", [last])
    engine.serve("b", [*stem, 2])
    assert engine.written["remote", "approximate"] == 0
    # A tail behind eight exact chunks, of which the beginning is the engine's own.
    branch = [*stem[: 8 * CHUNK + CHUNK // 2], *end]
    tail = engine.serve("c", branch[: 9 * CHUNK - 1])
    assert tail.loads == 0
    engine.reset_prefix_cache()
    engine.ledger.gpu_cleared()
    before = len(engine.chunks_in("disk"))
    longer = engine.serve("d", branch)
    assert longer.loads == 1
    assert len(engine.chunks_in("disk")) == before
    assert engine.written["remote", "approximate"]


def test_where_all_tiers_are_exact_nothing_is_held_back() -> None:
    engine = LossyEngine(rules=(EXACT, TierRules(name="remote")))
    engine.serve("a", prompt(1, 3 * CHUNK + 1))
    lose(engine, "disk")
    engine.serve("b", prompt(1, 3 * CHUNK + 1))
    engine.serve("c", [*prompt(1, CHUNK + 5), *prompt(2, 2 * CHUNK)])
    assert not engine.ledger.has_approximate
    assert engine.written["disk", "exact"] > 3


def test_emptying_the_engines_cache_and_the_slots_ends_it() -> None:
    engine = LossyEngine()
    engine.serve("a", prompt(1, 3 * CHUNK + 1))
    lose(engine, "disk")
    engine.serve("b", prompt(1, 3 * CHUNK + 1))
    assert remembers(engine)
    lose(engine, "disk", "remote")
    engine.ledger.gpu_cleared()
    assert not remembers(engine)
    engine.serve("c", prompt(1, 3 * CHUNK + 1))
    assert len(engine.chunks_in("disk")) == 3


def test_a_move_to_an_exact_tier_leaves_what_is_not_exact() -> None:
    engine = LossyEngine()
    engine.serve("a", prompt(1, 2 * CHUNK + 1))
    lose(engine, "disk")
    engine.serve("b", prompt(1, 2 * CHUNK + 1))
    chunks = list(engine.chunks_in("remote"))
    assert engine.planner.lower.demote("disk", chunks) == 0
    assert engine.planner.lower.demote("remote", chunks) == 2
    engine.run()


@pytest.mark.parametrize("seed", range(12))
def test_at_random(seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"windows": (0, 24)} if seed % 3 == 1 else {}
    engine = LossyEngine(
        blocks=rng.choice([40, 64]),
        slots=rng.choice([6, 12, 32]),
        ranks=1 + seed % 2,
        delay=lambda: rng.randrange(3),
        **options,
    )
    stems = [prompt(number, 3 * CHUNK) for number in range(3)]
    for number in range(60):
        stem = rng.choice(stems)
        tokens = [*stem[: rng.randrange(len(stem) + 1)], *prompt(rng.randrange(4), rng.randrange(1, 2 * CHUNK))]
        engine.add(f"r{number}", tokens, max_tokens=rng.choice([1, 1, 20]))
        for _ in range(rng.randrange(4)):
            engine.step()
        chance = rng.random()
        if chance < 0.15:
            engine.run()
            engine.stores["disk"].clear()
            engine.ledger.cleared("disk")
        elif chance < 0.3:
            engine.lose_cpu()
        elif chance < 0.35:
            engine.run()
            engine.reset_prefix_cache()
            engine.ledger.gpu_cleared()
    engine.run()
    assert engine.written["disk", "exact"]
    assert seed > 2 or engine.written["remote", "approximate"]


def test_what_is_remembered_is_bounded_and_what_is_held_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_APPROXIMATE", 10)
    ledger = Ledger(LeastRecentlyUsed())
    ledger.set_capacity(2)
    held, named = b"held", b"gpu"
    slot = ledger.reserve(held, approximate=True)
    assert slot is not None
    ledger.commit(slot)
    ledger.gpu_stored([named])
    ledger.mark_approximate([named])
    others = [number.to_bytes(16) for number in range(100)]
    for other in others:
        ledger.mark_approximate([other])
    assert ledger.first_approximate([b"x", held]) == 1
    assert ledger.first_approximate([named]) == 0
    assert ledger.first_approximate([*others[:70], b"x"]) == 71
    assert ledger.first_approximate(others[-8:]) == 0
    ledger.gpu_cleared()
    assert ledger.first_approximate([named, *others, held]) == 101
