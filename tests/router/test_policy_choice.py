"""Policies at work in a gateway: chosen by header, watched by a shadow, taught by answers."""

from typing import Any

from tests.support.simulated_worker import CHUNK, SimulatedWorker, chat_body, run, running_gateway, until

TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


async def warm_pair() -> tuple[SimulatedWorker, SimulatedWorker]:
    return await SimulatedWorker().start(), await SimulatedWorker().start()


def test_simulated_header_names_the_policy_where_allowed() -> None:
    async def scenario() -> None:
        a, b = await warm_pair()
        async with running_gateway(a, b, policy="round-robin", policy_header=True) as gateway:
            b.store("gpu", b.hashes(TEXT)[:4])
            await until(lambda: gateway.gateway.index.sizes("b")["gpu"] == 4)

            async def asked(policy: str) -> Any:
                headers = {"x-warmroute-policy": policy}
                return await gateway.client.post("/v1/chat/completions", json=chat_body(TEXT), headers=headers)

            for _ in range(4):
                assert (await asked("longest-hit")).headers["x-warmroute-worker"] == "b"
            reason = (await asked("least-ttft")).headers["x-warmroute-reason"]
            assert f"holds {4 * CHUNK} of {len(TEXT)} tokens" in reason
            refused = await asked("longest")
            assert refused.status_code == 400
            assert "longest-hit" in refused.json()["error"]["message"]
            turns = [(await gateway.chat(TEXT)).headers["x-warmroute-reason"] for _ in range(2)]
            assert turns == ["round robin"] * 2

    run(scenario())


def test_simulated_shadow_is_shown_and_pace_is_learned_from_streams_alone() -> None:
    async def scenario() -> None:
        a, b = await warm_pair()
        async with running_gateway(a, b, policy="round-robin", shadow_policy="longest-hit") as gateway:
            b.store("gpu", b.hashes(TEXT)[:4])
            await until(lambda: gateway.gateway.index.sizes("b")["gpu"] == 4)
            for _ in range(6):
                await gateway.chat(TEXT)
            shown = await gateway.get("/admin/policy")
            assert shown["policy"] == "round-robin"
            assert (shown["shadow"]["same"], shown["shadow"]["other"]) == (3, 3)
            assert shown["shadow"]["saved_tokens"] == 3 * 4 * CHUNK
            worker = gateway.gateway.registry.workers[0]
            assert not worker.pace._speeds, "an answer that comes as a whole says nothing of its first token"
            long = "x" * 4000
            for number in range(24):
                await gateway.chat(f"{number} {long}", stream=True)
            assert all(item.pace.learned_speed > 0 for item in gateway.gateway.registry.workers)
            metric = 'warmroute_router_shadow_decisions_total{policy="longest-hit",result="other"}'
            assert await gateway.metric(metric) >= 3

    run(scenario())
