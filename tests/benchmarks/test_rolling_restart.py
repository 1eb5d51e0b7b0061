"""Every router and every worker restarted under load."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.rolling_restart import Clients, cluster, roll


@pytest.mark.slow
def test_a_rolling_restart_loses_no_request_and_keeps_the_hits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(240), cluster(tmp_path) as made:
            clients = Clients(made.balancer.port, 8)
            result = await roll(made, clients, requests=160)
            print(result)
            assert not result["lost"], result["why"]
            assert result["drain_statuses"] == [0] * 4
            assert result["shared_chunks"]
            assert result["windows"] > 3
            assert result["kept"] >= 0.9, result

    asyncio.run(scenario())
