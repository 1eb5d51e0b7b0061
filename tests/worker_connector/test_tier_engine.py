"""Lower tiers inside real vLLM engines (CPU build), on real servers and directories, which are harmed while requests run.

Every answer is compared with the one that was computed with nothing cached, in float32.
"""

import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.worker_connector.tier_scenarios import EngineProcess, prompt
from tests.worker_connector.tiers.servers import Proxy, RedisServer, S3Server, command, eventually, needs_redis
from worker_connector.chunk_object import HEADER_BYTES, read_header
from worker_connector.native import crc32c

CHUNK = 256
LONG = 5000
SHORT = 2000
DEADLINE = 1.0
PATIENT = {"remote_timeout": 10, "lookup_timeout": 3, "lower_tier_patience": 20}
"""The S3 server of the tests takes a hundred times as long as a real one."""

pytestmark = [pytest.mark.engine, needs_redis]


def chunks_in(tokens: int) -> int:
    """Tokens of a prompt that surely come from a lower tier. Those of its tail come too if they are found in time."""
    return tokens // CHUNK * CHUNK


# ---- what can be done to objects ------------------------------------------------------------------------------------


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def foreign(content: bytes, rng: random.Random) -> bytes:
    """Undamaged, and of another engine's identity."""
    header = read_header(content[:HEADER_BYTES])
    key = header.key._replace(identity=rng.randbytes(16))
    return header._replace(key=key).pack() + content[HEADER_BYTES:]


def forged(content: bytes, _rng: random.Random) -> bytes:
    """Other bytes with right checksums: nothing can tell, so the tokens change."""
    payload = content[HEADER_BYTES:].translate(bytes(byte ^ 0x3C for byte in range(256)))
    header = read_header(content[:HEADER_BYTES])
    checksum = crc32c(payload)
    return header._replace(payload_crc=checksum, packed_crc=checksum).pack() + payload


Harm = Callable[[bytes, random.Random], bytes]
HARMS: dict[str, Harm] = {"truncated": truncated, "flipped": flipped, "foreign": foreign}


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.object") if "quarantine" not in str(path))


def harm_files(directory: Path, how: Harm, rng: random.Random) -> int:
    files = files_of(directory)
    for path in files:
        content = how(path.read_bytes(), rng)
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)
    return len(files)


def remove_files(directory: Path) -> None:
    for path in files_of(directory):
        path.unlink()


def harm_values(server: RedisServer, how: Harm, rng: random.Random) -> int:
    import redis

    with redis.Redis(port=server.port, socket_timeout=10) as client:
        keys = list(client.scan_iter("warmroute:*"))
        for key in keys:
            client.set(key, how(client.get(key), rng))
        return len(keys)


# ---- two engines share ----------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """Two engines at work at the same time. ``one`` has a directory and three stores, ``two`` only the Redis ones."""

    model: str
    workspace: Path
    redis: list[RedisServer]
    s3: S3Server
    one: EngineProcess
    two: EngineProcess

    @property
    def directory(self) -> Path:
        return self.workspace / "disk"

    @property
    def s3_url(self) -> str:
        return f"s3://chunks/fleet?endpoint={self.s3.url}&region=us-east-1&key_id=key&secret=secret"

    @property
    def redis_urls(self) -> str:
        return " ".join(f"redis://127.0.0.1:{server.port}" for server in self.redis)


@pytest.fixture(scope="module")
def shared(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    workspace = tmp_path_factory.mktemp("shared")
    redis = [RedisServer(workspace / f"redis{number}") for number in range(2)]
    s3 = S3Server()
    with ExitStack() as stack:
        for server in redis:
            stack.callback(server.kill)
            server.start()
        stack.callback(s3.kill)
        s3.start("chunks")
        found = Shared(small_model, workspace, redis, s3, None, None)  # type: ignore[arg-type]
        remote = {"remote_url": f"{found.redis_urls} {found.s3_url}", "replicas": 3, **PATIENT}
        found.one = EngineProcess(small_model, workspace, "one", {"disk_path": str(found.directory), **remote})
        stack.callback(found.one.close)
        found.two = EngineProcess(small_model, workspace, "two", {"remote_url": found.redis_urls, "replicas": 2})
        stack.callback(found.two.close)
        found.one.wait_ready()
        found.two.wait_ready()
        yield found


@pytest.fixture(scope="module")
def cold(shared: Shared) -> dict[int, list[int]]:
    """What the first engine answered to some prompts, by seed, and wrote down then."""
    answers = shared.one.serve(*map(prompt, range(5)))
    assert [answer["cached"] for answer in answers] == [0] * 5
    shared.one.call("settle")
    assert len(files_of(shared.directory)) >= 5 * (LONG // CHUNK)
    return {seed: answer["tokens"] for seed, answer in enumerate(answers)}


def test_what_one_engine_computed_another_loads_from_redis(shared: Shared, cold: dict[int, list[int]]) -> None:
    (answer,) = shared.two.serve(prompt(0))
    assert answer["tokens"] == cold[0]
    assert answer["cached"] >= chunks_in(LONG)
    assert shared.two.stats()["tiers"]["remote"]["hit_tokens"] >= chunks_in(LONG)


@pytest.mark.usefixtures("cold")
def test_and_the_other_way_round_at_the_same_time(shared: Shared) -> None:
    (theirs,) = shared.two.serve(prompt(50))
    shared.two.call("settle")
    (mine,) = shared.one.serve(prompt(50))
    assert mine["tokens"] == theirs["tokens"]
    assert mine["cached"] >= chunks_in(LONG)


def test_a_spoilt_copy_is_refused_and_an_undetectable_one_changes_the_tokens(
    shared: Shared, cold: dict[int, list[int]]
) -> None:
    for server in shared.redis:
        harm_values(server, flipped, random.Random(1))
    shared.two.lose()
    (refused,) = shared.two.serve(prompt(1))
    assert (refused["tokens"], refused["cached"]) == (cold[1], 0)
    assert shared.two.stats()["tiers"]["remote"]["damaged_chunks"] > 0
    for server in shared.redis:
        command(server.port, "FLUSHALL")
    shared.two.lose()
    shared.two.serve(prompt(1))
    shared.two.call("settle")
    for server in shared.redis:
        harm_values(server, forged, random.Random(2))
    shared.two.lose()
    (fooled,) = shared.two.serve(prompt(1))
    assert fooled["cached"] >= chunks_in(LONG)
    assert fooled["tokens"] != cold[1]
    for server in shared.redis:
        command(server.port, "FLUSHALL")
    shared.two.lose()


def test_one_of_two_replicas_is_dead(shared: Shared, cold: dict[int, list[int]]) -> None:
    (answer,) = shared.two.serve(prompt(2))
    assert answer["tokens"] == cold[2]
    shared.two.lose()
    shared.redis[0].kill()
    cached = []
    for _ in range(4):  # the first may spend its time on finding out that one is dead
        found = shared.two.call("beside", decoding=prompt(60, CHUNK - 50), prompts=[prompt(2)], tokens=32)
        assert found["answers"][0]["tokens"] == cold[2]
        assert max(found["gaps"]) < DEADLINE
        cached.append(found["answers"][0]["cached"])
        shared.two.lose()
    assert max(cached) >= chunks_in(LONG)
    shared.redis[0].start()

    def is_written_again() -> bool:
        shared.two.serve(prompt(random.randrange(10**6, 10**9), SHORT), tokens=1)
        return int(command(shared.redis[0].port, "DBSIZE")) > 0

    eventually(is_written_again, 40)


def times(engine: EngineProcess, seeds: range) -> tuple[float, float]:
    """Seconds to the first token, of the runs that other work on the machine disturbed least: with nothing cached, and from
    the lower tier."""
    cold, warm = [], []
    for seed in seeds:
        (first,) = engine.serve(prompt(seed), tokens=1)
        engine.lose()
        (again,) = engine.serve(prompt(seed), tokens=1)
        if again["cached"] >= chunks_in(LONG):  # less where writing did not keep up with the machine's other work
            cold.append(first["seconds"])
            warm.append(again["seconds"])
    assert len(cold) >= len(seeds) // 2
    middle = statistics.median(cold) * 1e3, statistics.median(warm) * 1e3
    print(f"{again['cached']} tokens cached")
    print(f"TTFT of 5,000 tokens: cold {middle[0]:.1f} ms, warm {middle[1]:.1f} ms, 1/{middle[0] / middle[1]:.1f}")
    return min(cold), min(warm)


@pytest.mark.usefixtures("cold")
def test_redis_answers_in_a_fraction_of_the_time(shared: Shared) -> None:
    shared.one.call("settle")
    seconds = times(shared.two, range(100, 107))
    assert seconds[1] <= seconds[0] / 6  # on a machine that does other work; docs/performance.md has figures


@pytest.fixture(scope="module")
def restarted(shared: Shared, cold: dict[int, list[int]]) -> Iterator[EngineProcess]:
    """The first engine, killed and started again: the directory is as it was, the stores are without Redis."""
    assert cold
    shared.one.kill()
    settings = {"disk_path": str(shared.directory), "remote_url": shared.s3_url, **PATIENT}
    with EngineProcess(shared.model, shared.workspace, "restarted", settings) as engine:
        yield engine


def test_a_restart_keeps_the_disk_tier(restarted: EngineProcess, cold: dict[int, list[int]]) -> None:
    (answer,) = restarted.serve(prompt(3))
    assert answer["tokens"] == cold[3]
    assert answer["cached"] >= chunks_in(LONG)
    assert restarted.stats()["tiers"]["disk"]["hit_tokens"] >= chunks_in(LONG)


def test_the_disk_answers_in_a_fraction_of_the_time(restarted: EngineProcess) -> None:
    seconds = times(restarted, range(200, 207))
    assert seconds[1] <= seconds[0] / 6  # on a machine that does other work; docs/performance.md has figures


def test_what_is_not_on_disk_comes_from_s3(
    restarted: EngineProcess, shared: Shared, cold: dict[int, list[int]]
) -> None:
    remove_files(shared.directory)
    restarted.lose()
    (answer,) = restarted.serve(prompt(4))
    assert answer["tokens"] == cold[4]
    assert answer["cached"] >= chunks_in(LONG)
    assert restarted.stats()["tiers"]["remote"]["hit_tokens"] >= chunks_in(LONG)


def test_other_weights_under_the_same_name_get_nothing(restarted: EngineProcess, shared: Shared) -> None:
    (first,) = restarted.serve(prompt(310))
    restarted.call("settle")
    restarted.close()
    before = len(files_of(shared.directory))
    assert before >= LONG // CHUNK
    kept = Path(f"{shared.model}.kept")
    shutil.copytree(shared.model, kept)
    try:
        change_weights(shared.model)
        settings = {"disk_path": str(shared.directory), "remote_url": shared.s3_url, **PATIENT}
        with EngineProcess(shared.model, shared.workspace, "other", settings) as engine:
            (answer,) = engine.serve(prompt(310))
            assert answer["cached"] == 0
            assert answer["tokens"] != first["tokens"]
            engine.lose()
            (again,) = engine.serve(prompt(310))
            assert again["cached"] >= chunks_in(LONG)
            assert again["tokens"] == answer["tokens"]
            assert engine.stats()["tiers"]["disk"].get("damaged_chunks", 0) == 0
    finally:
        shutil.rmtree(shared.model)
        kept.rename(shared.model)
    assert len(files_of(shared.directory)) > before


def change_weights(model: str) -> None:
    code = f"""
from safetensors.torch import load_file, save_file
from pathlib import Path
for path in Path({model!r}).glob("*.safetensors"):
    tensors = load_file(path)
    name = sorted(each for each in tensors if "layers.0" in each and tensors[each].ndim == 2)[0]
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata={{"format": "pt"}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- everything that goes wrong --------------------------------------------------------------------------------------


@dataclass
class Harmed:
    """An engine whose disk is a small file system of its own, and whose Redis is reached through a proxy."""

    engine: EngineProcess
    directory: Path
    redis: RedisServer
    proxy: Proxy
    rng: random.Random
    mounted: bool
    next_seed: int = 1000

    def prompt(self) -> list[int]:
        self.next_seed += 1
        return prompt(self.next_seed, SHORT)

    def written(self, *, disk: bool = True) -> tuple[list[int], list[int]]:
        """A prompt that lies in the lower tiers, only; on disk too, or not. And its answer."""
        remove_files(self.directory)
        command(self.redis.port, "FLUSHALL")
        tokens = self.prompt()
        (cold,) = self.engine.serve(tokens, tokens=16)
        assert cold["cached"] == 0
        self.engine.lose()
        if not disk:
            with suppress(AssertionError):  # of a store that does not recover in time, the caller will say
                eventually(lambda: command(self.redis.port, "DBSIZE") >= SHORT // CHUNK, 2)
            self.engine.call("settle")
            remove_files(self.directory)
        return tokens, cold["tokens"]

    def beside(self, tokens: list[int]) -> dict[str, Any]:
        """The answer, while another request decodes that is never held up."""
        found = self.engine.call("beside", decoding=prompt(7, CHUNK - 50), prompts=[tokens], tokens=16)
        answer: dict[str, Any] = found["answers"][0]
        assert answer["reason"] == "length"
        worst = max(found["gaps"])
        print(
            f"longest gap {worst * 1e3:.0f} ms, answer in {answer['seconds'] * 1e3:.0f} ms, cached {answer['cached']}"
        )
        assert worst < DEADLINE
        return answer

    def recovers(self, seconds: float = 40.0, *, disk: bool) -> None:
        """Until prompts are written to and loaded from the tier again."""
        until = time.monotonic() + seconds
        while True:
            tokens, cold = self.written(disk=disk)
            (answer,) = self.engine.serve(tokens, tokens=16)
            assert answer["tokens"] == cold
            if answer["cached"] >= chunks_in(SHORT) and (not disk or files_of(self.directory)):
                return
            assert time.monotonic() < until, f"the tier did not recover: {answer['cached']} tokens were cached"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def harmed(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harmed]:
    workspace = tmp_path_factory.mktemp("harmed")
    directory = workspace / "small"
    directory.mkdir()
    with ExitStack() as stack:
        mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(directory)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if mounted:
            stack.callback(subprocess.run, ["umount", "-l", str(directory)], check=True)
        redis = RedisServer(workspace / "redis")
        stack.callback(redis.kill)
        redis.start()
        proxy = Proxy(redis.port)
        stack.callback(proxy.close)
        settings = {
            "disk_path": str(directory),
            "disk_timeout": DEADLINE,
            "remote_url": f"redis://127.0.0.1:{proxy.port}",
            "remote_timeout": DEADLINE,
            "lower_tier_patience": 2 * DEADLINE,
            "cpu_bytes": 64 << 20,
        }
        engine = EngineProcess(small_model, workspace, "harmed", settings, {"max_num_batched_tokens": 512})
        stack.callback(engine.close)
        engine.wait_ready()
        yield Harmed(engine, directory, redis, proxy, random.Random(5), mounted)


@pytest.fixture(autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{request.node.name}: {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_file_is_computed_or_fetched_elsewhere(harmed: Harmed, harm: str) -> None:
    tokens, cold = harmed.written()
    before = harmed.engine.stats()["tiers"]["disk"].get("damaged_chunks", 0)
    assert harm_files(harmed.directory, HARMS[harm], harmed.rng)
    assert harmed.beside(tokens)["tokens"] == cold
    assert harmed.engine.stats()["tiers"]["disk"]["damaged_chunks"] > before
    assert harmed.engine.lines("is bad and is discarded", "disk")
    harmed.recovers(disk=True)


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_value_is_computed(harmed: Harmed, harm: str) -> None:
    tokens, cold = harmed.written(disk=False)
    before = harmed.engine.stats()["tiers"]["remote"].get("damaged_chunks", 0)
    assert harm_values(harmed.redis, HARMS[harm], harmed.rng)
    assert harmed.beside(tokens)["tokens"] == cold
    assert harmed.engine.stats()["tiers"]["remote"]["damaged_chunks"] > before
    harmed.recovers(disk=False)


def test_read_errors(harmed: Harmed) -> None:
    tokens, cold = harmed.written()
    harmed.engine.fault("eio")
    assert harmed.beside(tokens)["tokens"] == cold
    harmed.engine.fault("")
    harmed.recovers(disk=True)
    assert len(harmed.engine.lines("WARNING", "Input/output error")) == 1


def fill(directory: Path) -> None:
    with (directory / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1 << 16)):
            pass


def test_a_full_disk(harmed: Harmed) -> None:
    if not harmed.mounted:
        pytest.skip("no small file system can be mounted here")
    tokens, cold = harmed.written()
    fill(harmed.directory)
    assert harmed.beside(tokens)["tokens"] == cold
    other = harmed.prompt()
    (first,) = harmed.engine.serve(other, tokens=16)
    harmed.engine.lose()
    assert harmed.beside(other)["tokens"] == first["tokens"]
    (harmed.directory / "filler").unlink()
    harmed.recovers(disk=True)
    assert len(harmed.engine.lines("WARNING", "No space left on device")) == 1


def hang(harmed: Harmed) -> None:
    harmed.redis.signal(signal.SIGSTOP)


def swallow(harmed: Harmed) -> None:
    harmed.proxy.mode = "swallow"


def slow_down(harmed: Harmed) -> None:
    harmed.proxy.mode, harmed.proxy.bytes = "slow", 16 << 10


def reset(harmed: Harmed) -> None:
    harmed.proxy.mode, harmed.proxy.bytes = "reset", 300_000


def lock_out(harmed: Harmed) -> None:
    command(harmed.redis.port, "CONFIG", "SET", "requirepass", "secret")
    import redis

    with redis.Redis(port=harmed.redis.port, password="secret") as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def kill(harmed: Harmed) -> None:
    harmed.redis.kill()


def heal(harmed: Harmed) -> None:
    harmed.proxy.mode = "pass"
    if harmed.redis.process is None:
        harmed.redis.start()
    harmed.redis.signal(signal.SIGCONT)
    import redis

    client = redis.Redis(port=harmed.redis.port, password="secret", socket_timeout=5)
    with client, suppress(redis.AuthenticationError):
        client.config_set("requirepass", "")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (hang, "no answer"),
        (swallow, "no answer"),
        (slow_down, "no answer"),
        (reset, "closed the connection"),
        (lock_out, "password"),
        (kill, "cannot be reached"),
    ],
    ids=["hung", "silent", "slow", "reset", "password", "killed"],
)
def test_a_store_that_fails(harmed: Harmed, fault: Callable[[Harmed], None], cause: str) -> None:
    for _ in range(3):  # where other work keeps the machine busy, a deadline may pass before the cause is seen
        tokens, cold = harmed.written(disk=False)
        said = len(harmed.engine.lines("It is left alone"))
        fault(harmed)
        try:
            for _ in range(2):
                assert harmed.beside(tokens)["tokens"] == cold
                harmed.engine.call("lose")
                remove_files(harmed.directory)
        finally:
            heal(harmed)
        harmed.recovers(disk=False)
        lines = harmed.engine.lines("It is left alone")[said:]
        print(*lines, sep="\n")
        assert len(lines) <= 2, "the failure was said again and again"
        if any(cause in line for line in harmed.engine.lines("It is left alone")):
            return
    pytest.fail(f"the cause was never named: {lines}")


def test_a_server_that_evicts(harmed: Harmed) -> None:
    prompts = [harmed.prompt() for _ in range(5)]
    command(harmed.redis.port, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    command(harmed.redis.port, "CONFIG", "SET", "maxmemory", "20mb")
    try:
        cold = [harmed.engine.serve(each, tokens=16)[0]["tokens"] for each in prompts]
        harmed.engine.lose()
        remove_files(harmed.directory)
        for each, answer in zip(prompts, cold, strict=True):
            assert harmed.beside(each)["tokens"] == answer
    finally:
        command(harmed.redis.port, "CONFIG", "SET", "maxmemory", "0")
    harmed.recovers(disk=False)


def test_every_request_was_answered_and_nothing_was_left(harmed: Harmed) -> None:
    assert not harmed.engine.lines("Traceback", "Worker")
    assert not harmed.engine.lines("Traceback", "EngineCore")
    assert harmed.engine.process.poll() is None
