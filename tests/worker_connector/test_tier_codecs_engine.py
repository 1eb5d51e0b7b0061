"""Encoded tiers under a real engine: exact ones change no token, lossy ones serve and say so."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.worker_connector.tier_scenarios import EngineProcess, prompt
from worker_connector.chunk_object import HEADER_BYTES, MAGIC, Header, read_header

pytestmark = pytest.mark.engine

CHUNK, BLOCK, LONG = 256, 32, 3000


def objects(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path.read_bytes().startswith(MAGIC)]


def headers_in(directory: Path) -> list[Header]:
    return [read_header(path.read_bytes()[:HEADER_BYTES]) for path in objects(directory)]


def codecs_in(directory: Path) -> set[str]:
    """Of whole chunks; tails are raw."""
    return {str(header.codec) for header in headers_in(directory) if header.tokens == CHUNK}


def empty(directory: Path) -> None:
    for path in objects(directory):
        path.unlink()


def test_exact_tiers_give_the_same_tokens_and_lossy_ones_are_kept_apart(small_model: str, tmp_path: Path) -> None:
    disk, remote, other = tmp_path / "disk", tmp_path / "remote", tmp_path / "other"
    remote.mkdir()
    other.mkdir()
    settings = {"disk_codec": "exp12", "cpu_bytes": 64 << 20}
    exactly = {**settings, "disk_path": str(disk), "remote_url": f"file://{remote}"}
    spare = tmp_path / "spare"
    lossily = {**settings, "disk_path": str(spare), "remote_url": f"file://{other}", "remote_codec": "fp8+zstd"}
    with ExitStack() as stack:
        # Side by side: most of a start keeps one core busy.
        exact, lossy = (
            EngineProcess(small_model, tmp_path, name, each, {"dtype": "bfloat16"})
            for name, each in (("exact", exactly), ("lossy", lossily))
        )
        stack.callback(exact.close)
        stack.callback(lossy.close)
        exact_tiers(exact.wait_ready(), disk, remote)
        lossy_tiers(lossy.wait_ready(), spare, other)


def exact_tiers(engine: EngineProcess, disk: Path, remote: Path) -> None:
    (cold,) = engine.serve(prompt(1, LONG))
    engine.lose()
    assert codecs_in(disk) == {"exp12"}
    assert codecs_in(remote) == {"raw"}
    (encoded,) = engine.serve(prompt(1, LONG))
    empty(disk)
    engine.lose()
    (raw,) = engine.serve(prompt(1, LONG))
    engine.call("settle")
    assert cold["cached"] == 0
    assert min(encoded["cached"], raw["cached"]) >= LONG // CHUNK * CHUNK
    assert encoded["tokens"] == raw["tokens"]
    assert not engine.lines("approximate")


def lossy_tiers(engine: EngineProcess, disk: Path, other: Path) -> None:
    engine.serve(prompt(1, LONG))
    engine.lose()
    assert codecs_in(other) == {"fp8+zstd"}
    empty(disk)
    (answer,) = engine.serve([*prompt(1, LONG), *prompt(2, LONG)])
    engine.lose()
    assert answer["cached"] >= LONG // CHUNK * CHUNK
    assert engine.stats()["tiers"]["remote"]["load_chunks"] >= LONG // CHUNK
    # The first prompt's tail was computed exactly and is raw in every tier; the second one's was computed on lossy chunks.
    exact = LONG % CHUNK // BLOCK * BLOCK
    assert {header.tokens for header in headers_in(disk)} <= {exact}, (
        "what was computed on lossy chunks is no exact copy"
    )
    assert len(objects(other)) >= 2 * LONG // CHUNK
    assert len(engine.lines("Tier remote keeps chunks as fp8+zstd", "approximate")) == 1
