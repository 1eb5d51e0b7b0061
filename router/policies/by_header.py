"""The policy a request names in ``x-warmroute-policy``, where the settings allow that."""

from collections.abc import Callable, Sequence
from typing import get_args

from router.config import PolicyName, nearest
from router.errors import InvalidRequest
from router.policies.base import Candidate, Choice, Policy, Query

HEADER = b"x-warmroute-policy"


class ByHeader:
    """The default policy, unless a request asks for another; each is made when it is first asked for."""

    def __init__(self, default: Policy, make: Callable[[PolicyName], Policy]) -> None:
        self.name = default.name
        self.uses_hits = True
        self.uses_tiers = True
        self.learns = True
        self.default = default
        self._make = make
        self._made: dict[str, Policy] = {default.name: default}

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        """Raises:
        InvalidRequest: there is no policy of the name.
        """
        wanted = query.header(HEADER)
        return (self.default if wanted is None else self._named(wanted)).choose(query, candidates)

    def _named(self, wanted: bytes) -> Policy:
        name = wanted.decode("latin-1").strip().lower()
        if name not in self._made:
            self._made[name] = self._make(_known(name))
        return self._made[name]


def _known(name: str) -> PolicyName:
    known: dict[str, PolicyName] = {item: item for item in get_args(PolicyName)}
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = f"did you mean {near}? " if near else ""
    raise InvalidRequest(
        f"{HEADER.decode()} names no policy: {hint}there are {', '.join(known)}", param=HEADER.decode()
    )
