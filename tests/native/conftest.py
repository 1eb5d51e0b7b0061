"""Rigs: one per backend and instruction set, with one and with two threads."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.native.rig import Backend, Missing, Rig, backends


@pytest.fixture(scope="session", params=backends(), ids=lambda backend: backend.name)
def rigs(request: pytest.FixtureRequest) -> Iterator[list[Rig]]:
    """A rig with one thread and one with two."""
    backend: Backend = request.param
    try:
        made = [Rig(backend, threads) for threads in (1, 2)]
    except Missing as reason:
        pytest.skip(f"{backend.name}: {reason}")
    yield made
    for rig in made:
        rig.close()


@pytest.fixture(scope="session", params=[0, 1], ids=["one thread", "two threads"])
def rig(rigs: list[Rig], request: pytest.FixtureRequest) -> Rig:
    """Every backend, with one thread and with two."""
    return rigs[request.param]


@pytest.fixture(autouse=True)
def _numbers_of_every_kind() -> Iterator[None]:
    """The oracle computes with NaNs and infinities on purpose."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield
