"""The doctor, on fleets that are well and on fleets that are not."""

import asyncio
import json
from typing import Any

import pytest

from router.config import ConfigError
from router.demo_fleet import free_port
from router.doctor import Options, examine
from router.doctor import run as run_doctor
from router.findings import CHECKS, Finding, healthy
from tests.support.simulated_worker import SimulatedWorker, run, running_gateway


class CachingWorker(SimulatedWorker):
    """Keeps what it computed in its gpu tier, reports it, and says what it reused."""

    reporting = True

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], raw: bytes) -> bool:
        body = json.loads(raw)
        chunks = self.hashes_of(self.tokenize(body))
        held = next((number for number, chunk in enumerate(chunks) if chunk not in self.tiers["gpu"]), len(chunks))
        self.cached_tokens = held * self.chunk_size
        self.admit = {"gpu": held * self.chunk_size}
        headers.setdefault("x-request-id", "doctor")
        if self.reporting:
            self.store("gpu", chunks)
        return await super()._answer(writer, headers, raw)

    def hashes_of(self, ids: list[int]) -> list[bytes]:
        from kv_protocol.hashing import chunk_hashes, root_hash

        return chunk_hashes(root_hash(chunk_size=self.chunk_size, model=self.model), ids, self.chunk_size)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what never comes."""
    for module in ("router.doctor", "router.doctor_worker"):
        monkeypatch.setattr(f"{module}.TIMEOUT_S", 1.5)


def by_check(findings: list[Finding], target: str | None = None) -> dict[str, str]:
    """The worst result of each check."""
    order = ("skip", "ok", "warn", "fail")
    worst: dict[str, str] = {}
    for finding in findings:
        if target is None or target in finding.target:
            before = worst.get(finding.check, "skip")
            worst[finding.check] = max(before, finding.result, key=order.index)
    return worst


def fix_of(findings: list[Finding], check: str) -> str:
    return next(f"{f.found} {f.fix}" for f in findings if f.check == check and f.result in ("warn", "fail"))


def test_simulated_a_healthy_fleet_is_proven() -> None:
    async def scenario() -> None:
        a, b = await CachingWorker().start(), await CachingWorker().start()
        async with running_gateway(a, b) as gateway:
            findings = await examine([f"http://127.0.0.1:{gateway.port}"], Options())
            seen = by_check(findings)
            assert healthy(findings), findings
            proven = ("reachable", "admin", "ready", "routable", "reports", "chunk-hash", "index", "cached-tokens")
            assert {check: seen[check] for check in proven} == dict.fromkeys(proven, "ok")
            assert {seen[check] for check in ("same-chunks", "same-cache", "same-tokens", "same-version")} == {"ok"}
            assert len([f for f in findings if f.check == "chunk-hash"]) == 2

    run(scenario())


@pytest.mark.usefixtures("impatient")
def test_simulated_each_ill_is_named_with_its_cure() -> None:
    async def scenario() -> None:
        silent, other, gone = CachingWorker(), CachingWorker(), CachingWorker()
        silent.reporting = False
        other.chunk_size = 8
        for worker in (silent, other, gone):
            await worker.start()
        async with running_gateway(silent, other, gone) as gateway:
            await gone.kill()
            url = f"http://127.0.0.1:{gateway.port}"
            findings = await examine([url], Options())
            assert not healthy(findings)
            assert by_check(findings, "a")["chunk-hash"] == "fail"
            assert "nothing was reported" in fix_of(findings, "chunk-hash")
            assert "prefix caching" in fix_of(findings, "chunk-hash")
            assert by_check(findings)["same-chunks"] == "fail"
            assert "a: ('simulated', 16)" in fix_of(findings, "same-chunks")
            assert by_check(findings, "c")["reachable"] == "fail"
            gateway.gateway.control.reloader.error = "the file: retries: wrong"
            assert "retries: wrong" in fix_of(await examine([url], Options(probe=False)), "config")

    run(scenario())


@pytest.mark.usefixtures("impatient")
def test_simulated_a_worker_alone() -> None:
    async def scenario() -> None:
        worker = await CachingWorker().start()
        findings = await examine([worker.spec()], Options())
        assert by_check(findings)["chunk-hash"] == "ok"
        assert healthy(findings)
        unprobed = by_check(await examine([worker.spec()], Options(probe=False)))
        assert "chunk-hash" not in unprobed
        bare = await SimulatedWorker(reports=False).start()
        assert by_check(await examine([bare.spec()], Options()))["reports"] == "skip"
        wrong = await examine([f"{worker.url},reports=127.0.0.1:{worker.port}"], Options())
        assert by_check(wrong)["reports"] == "fail"
        closed = await examine([f"{worker.url},reports=127.0.0.1:{free_port()}"], Options())
        assert "cannot be reached" in fix_of(closed, "reports")
        for one in (worker, bare):
            await one.kill()

    run(scenario())


def test_simulated_reuse_that_is_not_told() -> None:
    async def scenario() -> None:
        class Untold(CachingWorker):
            def _usage(self, tokens: list[int]) -> dict[str, Any]:
                return {"prompt_tokens": len(tokens), "completion_tokens": 1}

        worker = await Untold().start()
        findings = await examine([worker.spec()], Options())
        assert by_check(findings)["cached-tokens"] == "warn"
        assert "--enable-prompt-tokens-details" in fix_of(findings, "cached-tokens")
        await worker.kill()

    run(scenario())


@pytest.mark.usefixtures("impatient")
def test_simulated_other_hashes_are_told_from_silence() -> None:
    async def scenario() -> None:
        class Otherwise(CachingWorker):
            def hashes_of(self, ids: list[int]) -> list[bytes]:
                return [bytes([255 - chunk[0]]) + chunk[1:] for chunk in super().hashes_of(ids)]

        worker = await Otherwise().start()
        findings = await examine([worker.spec()], Options())
        assert "the hashes differ" in fix_of(findings, "chunk-hash")
        await worker.kill()

    run(scenario())


def test_simulated_without_the_token_the_rest_is_still_examined() -> None:
    async def scenario() -> None:
        async with running_gateway(await CachingWorker().start(), admin_token="t") as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            findings = await examine([url], Options())
            assert by_check(findings)["admin"] == "fail"
            assert "--token" in fix_of(findings, "admin")
            assert healthy(await examine([url], Options(admin_token="t")))

    run(scenario())


def test_simulated_gateways_that_watch_different_workers() -> None:
    async def scenario() -> None:
        a, b = await CachingWorker().start(), await CachingWorker().start()
        async with running_gateway(a, b) as one, running_gateway(a) as two:
            urls = [f"http://127.0.0.1:{gateway.port}" for gateway in (one, two)]
            findings = await examine(urls, Options(probe=False))
            assert by_check(findings, str(two.port))["same-workers"] == "fail"
            assert b.url in fix_of(findings, "same-workers")

    run(scenario())


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor([f"http://127.0.0.1:{free_port()}"], Options(), json_output=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["findings"][0]["check"]) == (False, "reachable")
    assert answer["findings"][0]["fix"]
    assert run_doctor([f"127.0.0.1:{free_port()}"], Options(), json_output=False) == 1
    assert "not healthy" in capsys.readouterr().out


def test_targets_are_checked() -> None:
    with pytest.raises(ConfigError, match="neither a gateway's URL"):
        run_doctor(["ftp://x"], Options(), json_output=True)


def test_every_finding_is_a_documented_check() -> None:
    with pytest.raises(AssertionError):
        Finding("unheard-of", "x", "ok", "y")
    assert all(CHECKS.values())
