import resource

import pytest

from router import cli
from router.config import load


@pytest.mark.parametrize(
    ("limits", "raised", "warned"),
    [
        ((64, 64), (64, 64), True),
        ((64, 200), (200, 200), True),
        ((64, resource.RLIM_INFINITY), (2276, resource.RLIM_INFINITY), False),
        ((64, 100_000), (2276, 100_000), False),
        ((50_000, 100_000), None, False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, False),
    ],
)
def test_open_files_suffice_for_the_requests_that_are_let_in(
    limits: tuple[int, int],
    raised: tuple[int, int] | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: given.append(pair))
    cli._raise_file_limit(load({"max_in_flight": 1000, "max_queue": 20}, {}))
    assert given == ([raised] if raised else [])
    assert ("ulimit -n" in caplog.text) == warned


def test_a_gateway_without_workers_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    cli._warn_if_alone(load({"discover": ["dns://fleet:80"]}, {}))
    assert not caplog.text
    cli._warn_if_alone(load({}, {}))
    assert "--worker http://HOST:PORT" in caplog.text
