"""What is known of a request that waits for lower tiers, and whom ``worker_connector.fetches`` deals with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from worker_connector.ledger import Slot
from worker_connector.plan import Piece
from worker_connector.request_state import RequestState


class Question(Protocol):
    """A look-up under way."""

    @property
    def pending(self) -> bool:
        """Whether an answer may still come in time."""
        ...


class Asks(Protocol):
    """Who looks up chunks in the lower tiers; what is found is put on record under the ledger's lock."""

    def ask(self, chunks: Sequence[bytes], tails: Sequence[bytes] = ()) -> Question:
        """Begin a look-up. Returns at once."""
        ...


class Jobs(Protocol):
    """Who has jobs done."""

    def may_fetch(self, tier: str, chunk: bytes) -> bool:
        """Whether a tier may be asked for a chunk that is on its record."""
        ...

    def fetch(self, tier: str, pairs: Sequence[tuple[Piece, Slot]]) -> int:
        """Plan a fetch; its number."""
        ...

    def withdraw(self, number: int) -> bool:
        """Forget a job that was not sent; whether there was such a one."""
        ...


class Wanted(NamedTuple):
    """A chunk, or a tail of so many ``tokens``, to be fetched from a tier."""

    tier: str
    chunk: bytes
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Wait:
    """One request's dealings with the lower tiers. ``began`` is when the engine first asked, ``since`` when the last chunk
    came, ``ready`` how many had come then. ``gain`` chunks came from below or are to come, for which it waits since
    ``paid_since``. ``left`` chunks are found to be worth it and not planned yet: with ``has_turn``, there is room for them.
    ``served``: the engine gave it its blocks."""

    arrival: int = 0
    state: RequestState | None = None
    first: int = 0
    began: float | None = None
    asked_at: float = float("-inf")
    since: float = 0.0
    ready: int = 0
    gain: int = 0
    left: int = 0
    has_turn: bool = False
    over: bool = False
    served: bool = False
    paid_since: float | None = None
    counted: bool = False
    asked: int = 0
    asked_tails: set[int] = field(default_factory=set)
    questions: list[Question] = field(default_factory=list)
    tried: dict[tuple[str, bytes], int] = field(default_factory=dict)
    came: set[bytes] = field(default_factory=set)
    origins: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    held: dict[bytes, Slot] = field(default_factory=dict)
    answer: bool = False
    question: tuple[int, int, bool] | None = None
    version: int = -1
    recheck: float = 0.0
    pending: int = 0


class _Answered:
    pending = False


ANSWERED: Question = _Answered()
"""Stands where a question was not asked."""
