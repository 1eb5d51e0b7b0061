"""Report streams against simulated workers."""

import asyncio
import random
import time
from typing import Any

import pytest

from kv_protocol.messages import Admitted, Heartbeat, Snapshot, Stored, encode, pack
from router import reports
from router.reports import call
from tests.support.simulated_worker import CHUNK, RunningGateway, SimulatedWorker, run, running_gateway, until

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


def believed(gateway: RunningGateway, name: str) -> dict[str, set[bytes]]:
    held = gateway.gateway.index.contents(name)
    return {tier: held[tier] for tier in ("gpu", "cpu")}


def synced(gateway: RunningGateway, name: str, worker: SimulatedWorker) -> Any:
    return lambda: believed(gateway, name) == worker.tiers


def state(gateway: RunningGateway, name: str) -> Any:
    return gateway.gateway.registry.get(name)


def test_simulated_snapshot_then_changes() -> None:
    async def scenario() -> None:
        worker = SimulatedWorker()
        chunks = worker.hashes(TEXT)
        worker.tiers["cpu"].update(chunks[:3])
        async with running_gateway(await worker.start()) as gateway:
            assert believed(gateway, "a") == worker.tiers
            worker.store("gpu", chunks)
            worker.remove("cpu", chunks[1:2])
            await until(synced(gateway, "a", worker))
            worker.clear("gpu")
            await until(synced(gateway, "a", worker))
            gateway.gateway.index.check()

    run(scenario())


def test_simulated_seeded_histories_end_equal() -> None:
    """Stores, evictions, resets and reconnects at random; when it is quiet the index is the ledger."""

    async def scenario() -> None:
        rng = random.Random(20)
        workers = [await SimulatedWorker().start() for _ in range(2)]
        async with running_gateway(*workers) as gateway:
            pool = workers[0].hashes("x" * 16 * 200)
            for _ in range(300):
                worker = rng.choice(workers)
                tier = rng.choice(["gpu", "cpu"])
                some = rng.sample(pool, rng.randint(1, 40))
                action = rng.choices(["store", "remove", "clear", "reset", "digest", "rest"], [8, 6, 1, 1, 3, 6])[0]
                match action:
                    case "store":
                        worker.store(tier, some)
                    case "remove":
                        worker.remove(tier, some)
                    case "clear":
                        worker.clear(tier)
                    case "reset":
                        worker.reset_readers()
                    case "digest":
                        worker.publish_digest()
                    case _:
                        await asyncio.sleep(0.01)
                gateway.gateway.index.check()
            for name, worker in zip("ab", workers, strict=True):
                await until(synced(gateway, name, worker))
                worker.publish_digest()
                await until(lambda name=name: state(gateway, name).digests_checked)
            gateway.gateway.index.check()
            assert [state(gateway, name).digest_mismatches for name in "ab"] == [0, 0]
            assert workers[0].opened > 1

    run(scenario())


def test_simulated_flipped_bit_is_found_and_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "AUDIT_ROUND_S", 0.1)

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes("x" * 16 * 50))
            await until(synced(gateway, "a", worker))
            index = gateway.gateway.index
            victim = next(iter(worker.tiers["gpu"]))
            index._parts[victim[0]][victim] = 0b10
            assert believed(gateway, "a") != worker.tiers
            await until(lambda: worker.opened == 2)
            await until(synced(gateway, "a", worker))
            index.check()
            assert worker.opened == 2
            assert (await gateway.get("/admin/index"))["workers"]["a"]["relists"] == {"audit": 1}
            worker.publish_digest()
            await until(lambda: state(gateway, "a").digests_checked)
            assert state(gateway, "a").digest_mismatches == 0

    run(scenario())


def test_simulated_lost_change_is_found() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.tiers["gpu"].update(worker.hashes(TEXT))  # the worker knows, the stream does not say
            worker.publish_digest()
            await until(synced(gateway, "a", worker))
            assert state(gateway, "a").digest_mismatches == 1

    run(scenario())


def test_simulated_nothing_is_believed_while_disconnected() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))
            worker._servers[1].close()
            worker.say_bye("tired")
            await until(lambda: state(gateway, "a").source == "none")
            assert not any(believed(gateway, "a").values())
            seen = await gateway.worker("a")
            assert (seen["cache_source"], seen["routed_by"]) == ("none", "load only")
            assert "tired" in seen["reports"]["error"]
            assert (await gateway.chat(TEXT)).headers["x-warmroute-hit-tokens"] == "0"

    run(scenario())


def test_simulated_reborn_worker_starts_cold() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))
            await worker.kill()
            await until(lambda: not state(gateway, "a").up)
            await worker.restart()
            await until(lambda: state(gateway, "a").up and state(gateway, "a").synced)
            assert state(gateway, "a").epochs == 2
            assert not any(believed(gateway, "a").values())

    run(scenario())


def test_simulated_stream_without_heartbeats_is_dropped() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))
            worker.silent = True
            await until(lambda: worker.opened > 1)
            worker.silent = False
            await until(synced(gateway, "a", worker))

    run(scenario())


def test_simulated_large_snapshot_leaves_the_loop_free() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            many = [number.to_bytes(16, "big") for number in range(1 << 120, (1 << 120) + 60_000)]
            worker.tiers["gpu"].update(many)
            worker.publish(Stored("gpu", pack(many)))
            longest, last = 0.0, time.thread_time()
            async with asyncio.timeout(10):
                while gateway.gateway.index.sizes("a")["gpu"] < len(many):
                    await asyncio.sleep(0)
                    now = time.thread_time()
                    longest, last = max(longest, now - last), now
            assert longest < 0.05, f"a turn of the event loop took {longest * 1000:.0f} ms"

    run(scenario())


def test_simulated_strange_messages_end_the_stream_not_the_gateway() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            for nonsense in (b"\x05\0\0\0hello", b"\xff\xff\xff\xff", encode(Snapshot("gpu", b"odd"))):
                opened = worker.opened
                for writer in worker.readers:
                    writer.write(nonsense)
                await until(lambda opened=opened: worker.opened > opened and state(gateway, "a").synced)
            worker.publish(Stored("tape", pack(worker.hashes(TEXT))))
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))
            assert (await gateway.chat(TEXT)).status_code == 200

    run(scenario())


def test_simulated_outcomes_are_compared_with_predictions() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            chunks = worker.hashes(TEXT)
            worker.store("gpu", chunks[:2])
            worker.store("cpu", chunks[2:4])
            await until(synced(gateway, "a", worker))
            worker.admit = {"gpu": 32, "cpu": 32}
            answer = await gateway.chat(TEXT)
            await until(lambda: state(gateway, "a").predictions["exact"] == 1)
            [record] = (await gateway.get("/admin/requests", id=answer.headers["x-request-id"]))["requests"]
            assert record["predicted_hit_tokens"] == 4 * CHUNK
            assert record["actual_hit_tokens"] == {"gpu": 32, "cpu": 32}
            assert record["worker"] == "a"
            assert record["prompt_tokens"] == len(TEXT)
            assert record["ttft_s"] > 0
            worker.publish(Admitted("another router's", 10, {"gpu": 10}))

    run(scenario())


def test_simulated_wrong_predictions_cost_trust_and_a_relisting() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))
            worker.cached_tokens = 0
            for _ in range(4):
                await gateway.chat(TEXT)
            await until(lambda: worker.opened == 2)
            seen = await gateway.worker("a")
            assert seen["predictions"] == {"exact": 0, "over": 4, "under": 0}
            assert seen["trust"] < 0.5
            assert await gateway.metric('warmroute_router_worker_relists_total{cause="trust",worker="a"}') == 1
            await until(synced(gateway, "a", worker))
            worker.cached_tokens = len(TEXT) // CHUNK * CHUNK
            for _ in range(4):
                await gateway.chat(TEXT)
            assert (await gateway.worker("a"))["trust"] > 0.5

    run(scenario())


def test_simulated_control_call() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        assert await call(("127.0.0.1", worker.report_port), "stats") == {"operation": "stats"}
        await worker.kill()

    run(scenario())


NAN = float("nan")


@pytest.mark.parametrize("speed", [NAN, float("inf"), -1.0])
def test_simulated_figures_that_are_no_numbers_harm_nothing(speed: float) -> None:
    async def scenario() -> None:
        a, b = await SimulatedWorker().start(), await SimulatedWorker().start()
        a.prefill_speed = speed
        async with running_gateway(a, b) as gateway:
            a.publish(Heartbeat(0, 0, 0, NAN, speed, {}, {"cpu": NAN}))
            a.store("gpu", a.hashes(TEXT))
            await until(lambda: state(gateway, "a").heartbeat and gateway.gateway.index.sizes("a")["gpu"])
            answer = await gateway.chat(TEXT)
            assert (answer.status_code, answer.headers["x-warmroute-worker"]) == (200, "a")
            assert (await gateway.worker("a"))["healthy"]

    run(scenario())


def test_simulated_nonsense_ends_the_stream_and_not_the_watch() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            frames = [encode(Admitted("x", 5, {"gpu": -5})), encode(Stored("gpu", b"odd"))]
            for frame in frames:
                opened = worker.opened
                for writer in worker.readers:
                    writer.write(frame)
                await until(lambda opened=opened: worker.opened > opened, 8)
                await until(lambda: state(gateway, "a").synced)
            worker.store("gpu", worker.hashes(TEXT))
            await until(synced(gateway, "a", worker))

    run(scenario())


def test_simulated_an_unforeseen_fault_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            watcher = gateway.gateway._watchers["a"]

            def fail(*_: Any) -> None:
                raise ZeroDivisionError

            watcher._admitted = fail
            worker.publish(Admitted("x", 1, {}))
            await until(lambda: worker.opened > 1)
            await until(lambda: state(gateway, "a").synced)

    run(scenario())
    assert "could not be taken" in caplog.text


def test_simulated_report_streams_that_flap_fail_no_request() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            for _ in range(8):
                opened = worker.opened
                asking = [asyncio.create_task(gateway.chat("x")) for _ in range(5)]
                worker.reset_readers()
                assert {(await one).status_code for one in asking} == {200}
                assert (await gateway.chat("x")).status_code == 200
                await until(lambda opened=opened: worker.opened > opened or opened > 2, 8)

    run(scenario())


def test_simulated_a_lost_stream_has_the_worker_described_again() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, health_interval=4) as gateway:
            worker.loras = ["adapter"]
            worker.reset_readers()
            await until(lambda: "adapter" in gateway.gateway.registry.pools)

    run(scenario())


def test_simulated_worker_that_reports_more_than_it_can_hold_is_not_believed() -> None:
    async def scenario() -> None:
        liar, honest = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(liar, honest, max_worker_chunks=1000) as gateway:
            many = [number.to_bytes(16, "big") for number in range(1 << 120, (1 << 120) + 5_000)]
            liar.publish(Stored("gpu", pack(many)))
            await until(lambda: "more than 1,000 chunks" in state(gateway, "a").reports_error)
            assert gateway.gateway.index.size("a") == 0
            assert (await gateway.chat(TEXT)).status_code == 200
            honest.store("gpu", honest.hashes(TEXT))
            await until(synced(gateway, "b", honest))
            await until(synced(gateway, "a", liar))

    run(scenario())


def test_simulated_a_tier_cleared_by_all_workers_at_once() -> None:
    async def scenario() -> None:
        workers = [await SimulatedWorker().start() for _ in range(3)]
        many = [number.to_bytes(16, "big") for number in range(1 << 120, (1 << 120) + 20_000)]
        for worker in workers:
            worker.tiers["cpu"].update(many)
        async with running_gateway(*workers) as gateway:
            for worker in workers:
                worker.store("gpu", many)
            for name, worker in zip("abc", workers, strict=True):
                await until(synced(gateway, name, worker))
                worker.clear("gpu")
                worker.store("gpu", many[:5])
            for name, worker in zip("abc", workers, strict=True):
                await until(synced(gateway, name, worker))
                worker.publish_digest()
                await until(lambda name=name: state(gateway, name).digests_checked)
            gateway.gateway.index.check()
            assert [state(gateway, name).digest_mismatches for name in "abc"] == [0, 0, 0]
            assert [worker.opened for worker in workers] == [1, 1, 1]

    run(scenario())
