import json
import random
from pathlib import Path

import msgspec
import pytest

from benchmarks.dynamo_model import DynamoModel
from benchmarks.fleet_model import BlockCache, Job, ModelledWorker, Rates
from benchmarks.replay import POLICIES, Fleet, RouterChooser, Run, main, replay
from benchmarks.traces import BLOCK_TOKENS, Request, chunk_of, conversations, read_trace, resample, shared_prompt
from router.index import Index

RATES = Rates(prefill=10_000.0, step=0.01, decode=0.001)


def request(at: float, tokens: int, output: int, *blocks: int) -> Request:
    count = -(-tokens // BLOCK_TOKENS)
    ids = [*blocks, *(hash((at, tokens, number)) % 10**9 for number in range(count - len(blocks)))]
    return Request(at, tokens, output, tuple(map(chunk_of, ids[:count])))


def run_alone(worker: ModelledWorker) -> list[tuple[float, Job]]:
    first = []
    while worker.next_event < float("inf"):
        now = worker.next_event
        first += [(now, job) for job in worker.advance().first]
        worker.cache.check()
    return first


def test_a_prompt_takes_its_steps() -> None:
    worker = ModelledWorker(100, RATES)
    worker.submit(request(0, 10_000, 1), 0.0)
    ((at, _),) = run_alone(worker)
    assert at == pytest.approx(2 * 0.01 + 10_000 / 10_000), "8,192 tokens, then the rest"
    assert worker.computed_tokens == 10_000


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    worker = ModelledWorker(100, RATES)
    jobs = [worker.submit(request(number, 5000, 1), 0.0) for number in range(3)]
    first = run_alone(worker)
    assert [job for _, job in first] == jobs
    # The first begins alone; the other two come while its step runs.
    assert [at for at, _ in first] == pytest.approx([0.51, 0.51 + 0.01 + 0.8192, 0.51 + 0.01 + 0.8192 + 0.01 + 0.1808])


def test_decoding_slows_prompts_and_takes_their_place_in_the_step() -> None:
    worker = ModelledWorker(100, RATES)
    worker.submit(request(0, 512, 1000), 0.0)
    assert worker.advance().first
    assert worker.running == 1
    late = worker.submit(request(1, 8192, 1), 1.0)
    while not worker.advance().first:
        worker.cache.check()
    begun = 0.0612 + 0.011 * 86
    assert late.first_token == pytest.approx(begun + 0.01 + 0.8191 + 0.001 + 0.01 + 0.0001 + 0.001, abs=1e-3)


def test_a_hit_is_whole_blocks_less_the_last_token() -> None:
    worker = ModelledWorker(100, RATES)
    twice = request(0, 1024, 1, 1, 2)
    worker.submit(twice, 0.0)
    run_alone(worker)
    again = worker.submit(twice, 5.0)
    longer = worker.submit(request(5, 1300, 1, 1, 2), 5.0)
    run_alone(worker)
    assert (again.cached_blocks, longer.cached_blocks) == (1, 2)


def test_blocks_of_running_requests_stay_and_the_oldest_go_from_their_end() -> None:
    worker = ModelledWorker(8, RATES)
    worker.submit(request(0, 1536, 1, 1, 2, 3), 0.0)
    run_alone(worker)
    worker.submit(request(1, 1536, 1, 4, 5, 6), 10.0)
    run_alone(worker)
    worker.submit(request(2, 1536, 400, 7, 8, 9), 20.0)
    removed = worker.advance().removed
    assert removed == [chunk_of(3), chunk_of(2)]
    waiting = worker.submit(request(3, 2048, 1, 10, 11, 12, 13), 21.0)
    worker.advance()
    assert waiting.cached_blocks == 0
    worker.cache.check()
    run_alone(worker)
    assert waiting.first_token > 0


def test_a_request_that_can_never_fit_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="replay with more --blocks"):
        ModelledWorker(2, RATES).submit(request(0, 5000, 1), 0.0)


def test_the_cache_keeps_its_invariants_under_random_traffic() -> None:
    rng, worker, now = random.Random(1), ModelledWorker(40, RATES), 0.0
    for number in range(400):
        now += rng.expovariate(5)
        while worker.next_event <= now:
            worker.advance()
            worker.cache.check()
        chain = rng.randrange(6) * 100
        tokens = rng.randint(1, 8000)
        worker.submit(request(number, tokens, rng.randint(1, 50), *range(chain, chain + tokens // 512)), now)
    run_alone(worker)
    assert worker.cache.room == 40
    assert (worker.uncached_tokens, worker.running, worker.waiting) == (0, 0, 0)


def test_reports_keep_the_routers_index_equal_to_the_caches() -> None:
    run = Run("least-ttft", workers=4, blocks=60, speed=4.0, rates=RATES)
    chooser = RouterChooser(run)
    fleet = Fleet(run, chooser)
    fleet.serve(conversations(users=60, turns=5, per_second=1.0))
    for name, model in zip(chooser._names, fleet._models, strict=True):
        cache: BlockCache = model.cache
        assert chooser._index.contents(name)["gpu"] == set(cache._idle)
    for worker in chooser._workers:
        assert (worker.load.own, worker.load.in_flight) == (0, 0)


def test_dynamo_adds_prefill_and_decode_blocks() -> None:
    index = Index()
    for name in ("a", "b"):
        index.open(name)
    model = DynamoModel(["a", "b"], index, seed=1)
    long, short = request(0, 5120, 10, *range(10)), request(0, 1024, 10, 90, 91)
    index.stored("a", "gpu", long.whole)
    assert model._cost("a", long, 10) == 0 + 10
    assert model._cost("b", long, 0) == 10 + 10
    assert model.choose(long) == "a"
    tokens = model.sent("a", short, 0)
    assert model._cost("a", long, 10) == 2 + 12
    assert model._cost("a", long, 12) == 0 + 12, "the credit covers what is queued, too, and no more"
    assert model.choose(short) == "b"
    model.first_token("a", tokens)
    model.finished("a", short)
    assert model._cost("a", long, 10) == 10


TRACE = conversations(users=240, turns=6, per_second=1.6, think_s=25.0, turn_tokens=2500)


@pytest.mark.parametrize("blocks", [160, 640])
@pytest.mark.parametrize("policy", ["longest-hit", "least-ttft"])
def test_cache_aware_policies_beat_round_robin_and_dynamo(policy: str, blocks: int) -> None:
    """In reuse and in mean time to first token, at tight and at ample caches."""
    ours, turns, dynamo = (replay(TRACE, Run(name, blocks=blocks)) for name in (policy, "round-robin", "dynamo"))
    for other in (turns, dynamo):
        assert ours.reuse > other.reuse
        assert ours.ttft_ms["mean"] < other.ttft_ms["mean"]
        assert ours.ttft_ms["p99"] <= other.ttft_ms["p99"] * 1.02
    assert ours.load_spread < 1.5


@pytest.mark.parametrize("policy", ["longest-hit", "least-ttft"])
@pytest.mark.parametrize("per_second", [2, 10, 40, 100])
def test_one_system_prompt_for_everybody_does_not_herd(policy: str, per_second: int) -> None:
    """Times to first token no worse than round-robin's, and the work spread over the fleet."""
    trace = shared_prompt(requests=min(1500, 60 * per_second), per_second=per_second)
    ours, turns = (replay(trace, Run(name, blocks=1024)) for name in (policy, "round-robin"))
    assert ours.ttft_ms["mean"] <= turns.ttft_ms["mean"] * 1.03
    assert ours.ttft_ms["p99"] <= turns.ttft_ms["p99"] * 1.25
    if per_second >= 10:
        assert ours.load_spread < 1.4


@pytest.mark.parametrize("policy", ["longest-hit", "least-ttft"])
def test_routers_that_share_the_workers_do_not_herd(policy: str) -> None:
    """A burst every three seconds, over four routers that know nothing of each other."""
    bursts = [msgspec.structs.replace(item, at=item.at // 3 * 3) for item in TRACE]
    ours, turns = (replay(bursts, Run(name, blocks=640, routers=4)) for name in (policy, "round-robin"))
    assert ours.ttft_ms["mean"] < turns.ttft_ms["mean"]


def test_a_burst_in_one_millisecond_spreads() -> None:
    burst = [request(0.0, 6000 + number, 10) for number in range(28)]
    for policy in ("longest-hit", "least-ttft", "least-loaded"):
        run = Run(policy, workers=7, blocks=1024)
        fleet = Fleet(run, RouterChooser(run))
        fleet.serve(burst)
        assert [model.computed_tokens // 6000 for model in fleet._models] == [4] * 7, policy


def test_a_seed_makes_a_replay_repeatable() -> None:
    first, second = (replay(TRACE[:300], Run("longest-hit", seed=3)) for _ in range(2))
    assert first.ttft_ms == second.ttft_ms


def test_resampled_traffic_is_the_same_requests_at_other_times() -> None:
    moved = resample(TRACE, 1)
    assert sorted(item.blocks for item in moved) == sorted(item.blocks for item in TRACE)
    assert [item.at for item in moved] == sorted(item.at for item in moved)
    assert [item.blocks for item in moved] != [item.blocks for item in TRACE]


def write(path: Path, requests: list[Request]) -> Path:
    ids: dict[bytes, int] = {}
    lines = [
        {
            "timestamp": round(item.at * 1000),
            "input_length": item.input_tokens,
            "output_length": item.output_tokens,
            "hash_ids": [ids.setdefault(block, len(ids)) for block in item.blocks],
        }
        for item in requests
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return path


def test_the_command_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "trace.jsonl", TRACE[:200])
    assert len(read_trace(trace)) == 200
    assert main([str(trace), "--blocks", "640", "--speed", "2", "--policy", "longest-hit", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["reuse"] < 1
    assert set(figures["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert figures["load_spread"] >= 1
    assert figures["decisions_per_s"] > 1000


def test_the_command_compares_every_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "trace.jsonl", TRACE[:60])
    written = tmp_path / "figures.json"
    assert main([str(trace), "--policy", "all", "--json", str(written), "--set", "saturation-seconds=1.5"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["policy", *POLICIES]
    assert [item["policy"] for item in json.loads(written.read_text())] == list(POLICIES)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["{bad}"], "line 1 is no request"), (["missing"], "No such file"), (["{ok}", "--set", "x"], "SETTING=VALUE")],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text('{"timestamp": 1}\n', encoding="utf-8")
    ok = write(tmp_path / "ok", TRACE[:1])
    assert main([item.format(bad=bad, ok=ok) for item in arguments]) == 1
    assert text in capsys.readouterr().err
