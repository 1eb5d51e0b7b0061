"""Control operations on a stand-in engine with lower tiers, which checks every token it reads."""

import random
import threading
from typing import Any

import pytest

from tests.worker_connector.scripted_engine import CHUNK, prompt
from tests.worker_connector.tiered_engine import TieredEngine
from worker_connector.errors import ImpossibleOperation
from worker_connector.ledger import CPU
from worker_connector.lower import TierRules
from worker_connector.operations import Operations
from worker_connector.pins import Pins
from worker_connector.tags import Tags

TIERS = (TierRules(name="disk"), TierRules(name="remote"))
BACK = (TierRules(name="disk", writes="back"),)


class Controlled:
    """An engine and its operations; what they leave to the engine is begun before each of its steps."""

    def __init__(self, **options: Any) -> None:
        self.engine = TieredEngine(**{"rules": TIERS, **options})
        self.ledger = self.engine.ledger
        lower = self.engine.planner.lower
        self.pins = Pins(self.ledger, lambda: self.engine.now)
        self.tags = Tags(self.ledger)
        self.engine.planner.mark = lambda chunks, controls: self.tags.add(controls.tags, chunks)
        self.operations = Operations(self.ledger, lower, self.pins, self.tags, totals=self.engine.planner.stats.total)

    def __call__(self, operation: str, /, **arguments: Any) -> Any:
        return self.operations.table()[operation](arguments)

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.pins.expire()
            if self.operations.has_queued:
                self.operations.run_queued()
            self.engine.step()
            self.engine.planner.check()
            self.pins.check()

    def is_awake(self) -> bool:
        """Whether operations keep an engine without requests stepping."""
        return self.operations.is_expected

    def settle(self) -> None:
        """Step, without a request, until nothing is left to do."""
        for _ in range(200):
            self.step()
            if not self.operations.has_queued and not self.engine.planner.has_unfinished_transfers():
                return
        raise AssertionError("operations do not end")

    def chunks(self, name: str, number: int, chunks: int) -> list[str]:
        """Serve a prompt of so many chunks; their digests."""
        before = set(self.ledger.content()[CPU])
        self.engine.serve(name, prompt(number, chunks * CHUNK + 1))
        self.settle()
        return [chunk.hex() for chunk in self.ledger.content()[CPU] if chunk not in before]


def raw(digests: list[str]) -> bytes:
    return b"".join(map(bytes.fromhex, digests))


def test_lookup_names_every_tier_that_has_a_chunk() -> None:
    control = Controlled()
    held = control.chunks("a", 1, 3)
    assert control("lookup", chunks=held) == {chunk: ["cpu", "disk", "remote"] for chunk in held}
    control("clear", tier="cpu", chunks=held[:1])
    control.ledger.removed("remote", [bytes.fromhex(held[1])])
    found = control("lookup", chunks=raw([*held, "00" * 16]))
    assert [found[chunk] for chunk in held] == [["disk", "remote"], ["cpu", "disk"], ["cpu", "disk", "remote"]]
    assert found["00" * 16] == []


def test_what_is_on_no_record_is_asked_for_if_that_is_wished() -> None:
    writer = Controlled()
    held = writer.chunks("a", 1, 2)
    reader = Controlled()

    class Lookups:
        def ask(self, chunks: list[bytes]) -> Any:
            reader.ledger.stored("disk", chunks)
            return type("Question", (), {"pending": False})

    reader.operations._lookups = Lookups  # type: ignore[assignment]
    assert reader("lookup", chunks=held) == {chunk: [] for chunk in held}
    assert reader("lookup", chunks=held, ask=True) == {chunk: ["disk"] for chunk in held}


@pytest.mark.parametrize("tier", ["cpu", "disk", "remote"])
def test_one_tier_is_cleared_of_some_chunks_or_all(tier: str) -> None:
    control = Controlled()
    held = control.chunks("a", 1, 4)
    answer = control("clear", chunks=held[:1], tier=tier)
    assert answer == {"removed": 1, "tiers": {tier: 1}, "queued": [tier] if tier != "cpu" else []}
    counts = {"cpu": 4, "disk": 4, "remote": 4, "gpu": 0}
    assert control.ledger.counts() == counts | {tier: 3}
    if tier != "cpu":
        assert len(control.engine.chunks_in(tier)) == 4, "nothing reaches a store before the engine's step"
        control.settle()
        assert bytes.fromhex(held[0]) not in control.engine.chunks_in(tier)
    assert control("clear", tier=tier)["removed"] == 3
    control.settle()
    assert control.ledger.counts() == counts | {tier: 0}
    assert tier == "cpu" or not control.engine.chunks_in(tier)


def test_what_a_look_up_meets_while_it_is_being_deleted_leaves_the_record_again() -> None:
    control = Controlled(rules=TIERS[:1])
    held = [bytes.fromhex(chunk) for chunk in control.chunks("a", 1, 3)]
    for arguments in ({"chunks": [chunk.hex() for chunk in held[:1]]}, {}):
        control("clear", tier="disk", **arguments)
        control.engine.hold_tiers = True
        control.step()
        control.ledger.stored("disk", held[:1])
        control.engine.hold_tiers = False
        control.settle()
        assert not control.ledger.below(held[0])


def test_everything_behind_the_gpu_is_cleared_with_its_pins() -> None:
    control = Controlled()
    held = control.chunks("a", 1, 3)
    control("pin", chunks=held)
    assert control("clear") == {
        "removed": 9,
        "tiers": {"cpu": 3, "disk": 3, "remote": 3},
        "queued": ["disk", "remote"],
    }
    control.settle()
    assert control("pins")["count"] == 0
    assert not control.engine.chunks_in("disk") | control.engine.chunks_in("remote")
    assert control("stats")["held_chunks"] == {"gpu": 0, "cpu": 0, "disk": 0, "remote": 0}


def test_pins_are_counted_listed_and_end() -> None:
    control = Controlled(slots=8)
    held = control.chunks("a", 1, 2)
    assert control("pin", chunks=held, seconds=30) == {"changed": 2, "waiting": 0, "refused": 0}
    assert control("pin", chunks=["00" * 16]) == {"changed": 0, "waiting": 1, "refused": 0}
    listed = {each["chunk"]: each for each in control("pins")["pins"]}
    assert [listed[chunk]["held"] for chunk in held] == [True, True]
    assert 29 < listed[held[0]]["expires_in_s"] <= 30
    assert listed["00" * 16] == {"chunk": "00" * 16, "expires_in_s": None, "held": False}
    assert control("stats")["pins"] == {"chunks": 3, "waiting": 1}
    for number in range(2, 6):
        control.chunks(f"r{number}", number, 4)
    assert set(held) <= {chunk.hex() for chunk in control.ledger.content()[CPU]}
    control.engine.now += 31
    control.step()
    assert control("pins")["count"] == 1
    assert control("unpin") == {"changed": 1}


def test_named_chunks_are_warmed_even_where_others_have_to_go() -> None:
    control = Controlled(slots=8)
    held = control.chunks("a", 1, 3)
    for number in (2, 3, 4):
        control.chunks(f"r{number}", number, 4)
    assert not set(held) & {chunk.hex() for chunk in control.ledger.content()[CPU]}
    answer = control("warm", chunks=[*held, "00" * 16], seconds=60)
    assert {name: answer[name] for name in ("chunks", "present", "missing", "refused", "queued")} == {
        "chunks": 3,
        "present": 0,
        "missing": 1,
        "refused": 0,
        "queued": ["disk"],
    }
    assert answer["pinned"]["waiting"] == 4
    control.settle()
    assert set(held) <= {chunk.hex() for chunk in control.ledger.content()[CPU]}
    control.engine.reset_prefix_cache()
    assert control.engine.serve("again", prompt(1, 3 * CHUNK + 1)).loads == 1


def test_the_newest_take_free_slots_only() -> None:
    control = Controlled(slots=8)
    held = control.chunks("a", 1, 4) + control.chunks("b", 2, 4)
    assert control("warm", newest=10)["chunks"] == 0
    control("clear", chunks=held[:6], tier="cpu")
    answer = control("warm", newest=10, tier="disk")
    assert (answer["chunks"], answer["queued"]) == (6, ["disk"])
    control.settle()
    assert control.ledger.counts()[CPU] == 8


def test_warming_goes_on_in_portions_and_gives_up_where_no_slot_can_be_had() -> None:
    control = Controlled(slots=8)
    held = control.chunks("a", 1, 4)
    control("clear", chunks=held, tier="cpu")
    control.engine.planner.lower._job_pieces = 1
    assert control("warm", chunks=held)["chunks"] == 4
    control.operations.run_queued()
    assert control("stats")["queued"] == 2
    control.settle()
    assert control.ledger.counts()[CPU] == 4
    control.operations.warm_later("disk", [bytes([number]) * 16 for number in range(50, 90)], evict=False)
    control.settle()
    assert not control.operations.has_queued


def test_moved_chunks_leave_when_the_tier_has_them_and_pinned_ones_stay() -> None:
    control = Controlled(rules=BACK, slots=16)
    held = control.chunks("a", 1, 4)
    assert control.ledger.counts()["disk"] == 0
    control("pin", chunks=held[:1])
    assert control("move", chunks=[*held, "00" * 16]) == {"chunks": 3, "missing": 1, "refused": 1, "queued": ["disk"]}
    assert control.ledger.counts()[CPU] == 4
    control.settle()
    assert control.ledger.counts() == {"gpu": 0, "cpu": 1, "disk": 3}
    control.engine.reset_prefix_cache()
    assert control.engine.serve("again", prompt(1, 4 * CHUNK + 1)).loads == 1


def test_a_chunk_that_could_not_be_written_stays() -> None:
    control = Controlled(rules=BACK, slots=16)
    held = control.chunks("a", 1, 4)
    control.engine.fail = lambda job, _chunk, _rank: "full" if job.kind == "write" else ""
    control("move", chunks=held, tier="disk")
    control.settle()
    assert control.ledger.counts() == {"gpu": 0, "cpu": 4, "disk": 0}


def test_what_a_tier_has_already_leaves_at_the_next_step() -> None:
    control = Controlled()
    held = control.chunks("a", 1, 2)
    control("move", chunks=held)
    control.step()
    assert control.ledger.counts()[CPU] == 0


@pytest.mark.parametrize(
    ("operation", "arguments", "text"),
    [
        ("clear", {"tier": "gpu"}, "reset_prefix_cache"),
        ("clear", {"tier": "tape"}, "there are: cpu, disk, remote"),
        ("warm", {"chunks": [], "tier": "cpu"}, "cpu is no lower tier"),
        ("warm", {"newest": 0}, "newest is a number"),
        ("warm", {"newest": True}, "newest is a number"),
        ("warm", {}, "newest is a number"),
        ("pin", {}, "name the chunks"),
        ("pin", {"chunks": ["zz"]}, "hexadecimal"),
        ("pin", {"chunks": ["ab"]}, "16 bytes"),
        ("pin", {"chunks": 5}, "hexadecimal"),
        ("pin", {"chunks": ["00" * 16], "seconds": float("nan")}, "seconds"),
        ("pin", {"chunks": ["00" * 16], "seconds": -1}, "seconds"),
        ("pin", {"chunks": ["00" * 16], "second": 1}, "unknown argument 'second'"),
        ("lookup", {"chunks": [], "ask": 1}, "ask is true or false"),
        ("pins", {"limit": 1 << 30}, "limit"),
        ("generation", {"name": 5}, "name is a text"),
        ("generation", {"name": ""}, "1 to 128 printable"),
        ("generation", {"name": "a\nb"}, "1 to 128 printable"),
        ("generation", {"name": "a", "start": True}, "give one of them"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(operation: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ImpossibleOperation, match=text):
        Controlled()(operation, **arguments)


def test_without_lower_tiers_nothing_can_be_warmed_or_moved() -> None:
    control = Controlled(rules=())
    for operation in ("warm", "move"):
        with pytest.raises(ImpossibleOperation, match="no lower tier"):
            control(operation, chunks=["00" * 16])
    assert control("clear")["queued"] == []


def test_an_engine_that_sleeps_takes_only_so_many_operations() -> None:
    control = Controlled()
    for _ in range(64):
        control("clear", tier="disk")
    with pytest.raises(ImpossibleOperation, match="send it one"):
        control("clear", tier="disk")


def test_what_is_refused_is_not_half_done() -> None:
    control = Controlled()
    control.chunks("a", 1, 3)
    for _ in range(63):
        control("clear", tier="disk", chunks=["00" * 16])
    before = control.ledger.counts()
    with pytest.raises(ImpossibleOperation, match="send it one"):
        control("clear")
    assert control.ledger.counts() == before
    control.settle()
    assert control("clear")["removed"] == 9


def test_what_is_cleared_is_not_found_before_the_engine_steps() -> None:
    control = Controlled(rules=TIERS[:1])
    held = [bytes.fromhex(chunk) for chunk in control.chunks("a", 1, 3)]
    lower = control.engine.planner.lower
    control("clear", tier="disk", chunks=[held[0].hex()])
    assert lower.may_be_found("disk", held) == held[1:]
    control("clear", tier="disk")
    assert lower.may_be_found("disk", held) == []
    control.ledger.stored("disk", held)  # by who looked before
    assert lower.promote("disk", held) == 0
    control.settle()
    assert lower.may_be_found("disk", held) == held
    assert not control.engine.chunks_in("disk")


def test_weights_are_named_and_their_chunks_are_shared_by_that_name() -> None:
    control = Controlled(rules=TIERS[:1])
    held = control.chunks("a", 1, 3)
    assert control("generation") == {"generation": "", "changed": False}
    assert control("generation", name="step 7") == {"generation": "step 7", "changed": True}
    assert control("generation", name="step 7")["changed"] is False
    assert control("stats")["generation"] == "step 7"
    assert control.ledger.counts() == {"gpu": 0, "cpu": 3, "disk": 0}
    control.settle()
    assert control.ledger.counts()["disk"] == 3
    assert len(control.engine.stores["disk"]) == 6, "of both names"
    control("clear", tier="disk")
    control("generation", start=True)
    control.settle()
    assert len(control.engine.stores["disk"]) == 6, "what was to be cleared had another name"
    assert control("lookup", chunks=held) == {chunk: ["cpu", "disk"] for chunk in held}
    control.settle()
    assert control("clear", tier="disk")["queued"] == ["disk"]


def test_an_engine_keeps_stepping_while_warming_goes_on_and_no_longer() -> None:
    control = Controlled(slots=8)
    held = control.chunks("a", 1, 4)
    control("clear", chunks=held, tier="cpu")
    control.engine.planner.lower._job_pieces = 1
    assert not control.is_awake()
    control("warm", chunks=held)
    assert control.is_awake()
    control.engine.hold_tiers = True
    control.step()
    assert control.is_awake()
    control.engine.now += 61
    assert not control.is_awake(), "fetches that never end keep no engine awake"
    control.engine.hold_tiers = False
    control.settle()
    assert control.ledger.counts()[CPU] == 4


def test_a_tag_stands_for_the_chunks_of_its_requests() -> None:
    control = Controlled()
    for number, tags in ((1, ["red"]), (2, ["red", "blue"]), (3, [])):
        tagged = {"kv_transfer_params": {"warmroute": {"tags": tags}}}
        control.engine.serve(f"r{number}", prompt(number, 2 * CHUNK + 1), **tagged)
    control.settle()
    assert control("tags") == {"count": 2, "tags": {"blue": 2, "red": 4}}
    assert len(control("lookup", tag="red")) == 4
    assert control("pin", tag="blue")["changed"] == 2
    assert control("unpin", tag="red")["changed"] == 2
    assert control("clear", tag="never used", tier="cpu")["removed"] == 0
    assert control("clear", tag="blue", tier="cpu")["removed"] == 2
    assert control("warm", tag="red")["chunks"] == 2
    control.settle()
    assert control("move", tag="red")["chunks"] == 4
    with pytest.raises(ImpossibleOperation, match="in the place of chunks"):
        control("clear", tag="red", chunks=[])


def test_a_chunk_named_twice_counts_once() -> None:
    control = Controlled()
    held = control.chunks("a", 1, 1) * 3
    assert control("pin", chunks=held)["changed"] == 1
    assert control("unpin", chunks=held)["changed"] == 1
    assert control("move", chunks=held)["chunks"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_among_random_requests_keep_every_invariant(seed: int) -> None:
    control, rng = Controlled(slots=12), random.Random(seed)
    known: list[str] = ["00" * 16]
    for number in range(60):
        control.engine.serve(f"r{number}", prompt(rng.randrange(8), rng.randrange(1, 5) * CHUNK + 1))
        held = [chunk.hex() for chunks in control.ledger.content().values() for chunk in chunks]
        known = sorted({*known, *held})
        chosen = rng.sample(known, min(len(known), rng.randrange(1, 6)))
        match rng.randrange(7):
            case 0:
                control("clear", chunks=chosen, tier=rng.choice(["cpu", "disk", "remote"]))
            case 1:
                control("pin", chunks=chosen, seconds=rng.choice([0.01, 5]))
            case 2:
                control("unpin", chunks=chosen)
            case 3:
                control("warm", chunks=chosen)
            case 4:
                control("move", chunks=chosen, tier=rng.choice(["disk", "remote"]))
            case 5:
                control("warm", newest=rng.randrange(1, 9))
            case _:
                control.engine.reset_prefix_cache()
        control.step(rng.randrange(3))
    control.settle()
    control("unpin")
    control.step()


def test_flush_writes_what_the_shared_tier_lacks_the_hottest_first() -> None:
    controlled = Controlled(rules=(TierRules(name="remote", writes="back"),), slots=24)
    cold = controlled.chunks("a", 1, 4)
    hot = controlled.chunks("b", 2, 4)
    controlled.settle()
    assert controlled("stats")["held_chunks"]["remote"] == 0
    answer = controlled("flush")
    assert answer == {"tier": "remote", "chunks": 8, "present": 0, "refused": 0, "queued": ["remote"]}
    assert controlled.is_awake()
    controlled.step()
    written = [controlled.ledger.content()["remote"]]
    while controlled("stats")["tiers"]["remote"]["unwritten"] or not written[-1]:
        controlled.step()
        written.append(controlled.ledger.content()["remote"])
    order = [chunk.hex() for chunk in written[-1]]
    assert set(order) == {*cold, *hot}
    assert set(order[:4]) == set(hot), "what was used last is written first"
    assert controlled("stats")["held_chunks"]["cpu"] == 8, "nothing leaves"
    again = controlled("flush", tier="remote")
    assert (again["chunks"], again["present"], again["queued"]) == (0, 8, [])


def test_flush_of_the_newest_writes_no_more() -> None:
    controlled = Controlled(rules=(TierRules(name="remote", writes="none"),), slots=24)
    controlled.chunks("a", 1, 4)
    hot = controlled.chunks("b", 2, 4)
    controlled("flush", newest=2)
    controlled.settle()
    held = {chunk.hex() for chunk in controlled.ledger.content()["remote"]}
    assert held == set(hot[:2]), "the beginning of what was used last"


def test_flush_needs_a_lower_tier() -> None:
    with pytest.raises(ImpossibleOperation, match="no lower tier"):
        Controlled(rules=())("flush")


class CountingLock:
    """Tells how often something was done in one hold of it, at most."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.done = self.most = 0

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.most, self.done = max(self.most, self.done), 0


def test_flushing_much_leaves_the_ledger_to_the_engine_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Controlled(slots=5000, rules=TIERS[:1])
    for number in range(5000):
        slot = control.ledger.reserve(number.to_bytes(16, "big"))
        assert slot is not None
        control.ledger.commit(slot)
    lock, lower = CountingLock(), control.engine.planner.lower
    may_hand_over = lower.may_hand_over

    def counted(tier: str, chunk: bytes) -> bool:
        lock.done += 1
        return may_hand_over(tier, chunk)

    monkeypatch.setattr(control.ledger, "lock", lock)
    monkeypatch.setattr(lower, "may_hand_over", counted)
    assert control("flush")["chunks"] == 5000
    assert 0 < lock.most <= 1024
