"""How pytest-xdist deals tests to its processes. Imported only where it runs."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support.files import has_engines


class EnginesApart(LoadScopeScheduling):
    """One process has all tests with real engines: no more engines run at a time than one test asks for, and fixtures are
    shared. Meanwhile the others take the rest, a file at a time, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return "engines" if has_engines(nodeid) else nodeid.partition("::")[0]


def make_scheduler(config: pytest.Config, log: Any) -> EnginesApart:
    config.option.loadscopereorder = False
    return EnginesApart(config, log)
