"""Responses that a worker keeps: which worker made which, so that what asks for one goes there.

vLLM keeps responses in the memory of the process that made them. The router learns ids as it passes responses on, and
remembers the latest of them; where API keys are in use it also gives the ids, which then say whose they are. For an id it does not know (it was restarted, or another router passed it on) it asks the
workers, all at once, within one deadline and for a few such ids at a time.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256
from urllib.parse import quote

from router.errors import Busy, NotFound, Unavailable, UpstreamError
from router.parse import Request
from router.workers import Registry, Worker

KEEP = 100_000
"""Ids remembered; about 300 bytes each."""
ASK_TIMEOUT_S = 5.0
ASK_AT_ONCE = 8
LONGEST_ID = 256


def id_for(tenant: str) -> str:
    """A fresh id that says whose it is, so that any router can tell."""
    return _mark_of(tenant) + uuid.uuid4().hex


def _mark_of(tenant: str) -> str:
    return "resp_" + sha256(b"warmroute tenant\0" + tenant.encode()).hexdigest()[:16]


class StoredResponses:
    """Ids of responses and who keeps them. Memory is bounded by ``keep``."""

    def __init__(self, registry: Registry, keep: int = KEEP) -> None:
        self._registry = registry
        self._keep = keep
        self._keepers: OrderedDict[str, str] = OrderedDict()
        self._asking = asyncio.Semaphore(ASK_AT_ONCE)

    def __len__(self) -> int:
        return len(self._keepers)

    def learn(self, identifier: str, worker: str) -> None:
        """A worker made this response. O(1)."""
        self._keepers[identifier] = worker
        self._keepers.move_to_end(identifier)
        if len(self._keepers) > self._keep:
            self._keepers.popitem(last=False)

    async def place(self, request: Request, identifier: str, tenant: str) -> None:
        """Bind a request to the worker that keeps a response, and to a model it serves where it names none. ``tenant`` is
        the key's name, empty where keys are not in use.

        Raises:
            NotFound: nobody has it, or it is another tenant's.
            Unavailable: the worker that has it is gone or down.
            Busy: too many unknown ids are being looked for.
        """
        if tenant and not identifier.startswith(_mark_of(tenant)):
            raise _not_found(identifier)
        keeper = self._keepers.get(identifier) or await self._ask(identifier)
        worker = self._registry.get(keeper)
        if worker is None or not worker.up:
            raise Unavailable(
                f"worker {keeper} keeps the response {identifier!r} and cannot be reached: it is lost unless that "
                "worker comes back",
                code="response_unavailable",
                retry_after=1,
            )
        request.only = worker.name
        if not request.model:
            request.model = next((card.id for card in worker.models.values() if not card.parent), "")

    async def _ask(self, identifier: str) -> str:
        if not 0 < len(identifier) <= LONGEST_ID:
            raise _not_found(identifier)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                async with self._asking:
                    worker = await _first_with(self._registry.workers, identifier)
        except TimeoutError:
            raise Busy("the workers are being asked for too many unknown responses", retry_after=1) from None
        if worker is None:
            raise _not_found(identifier)
        return worker.name


async def _first_with(workers: Iterable[Worker], identifier: str) -> Worker | None:
    one_per_url = {worker.spec.url.partition("#")[0]: worker for worker in workers if worker.up}
    target = f"/v1/responses/{quote(identifier, safe='')}"

    async def has(worker: Worker) -> bool:
        try:
            return (await worker.upstream.fetch("GET", target, timeout=ASK_TIMEOUT_S)).status == 200
        except UpstreamError:
            return False

    asked = list(one_per_url.values())
    answers = await asyncio.gather(*(has(worker) for worker in asked))
    return next((worker for worker, yes in zip(asked, answers, strict=True) if yes), None)


def _not_found(identifier: str) -> NotFound:
    return NotFound(
        f"the response {identifier!r} is not kept by any worker; workers keep responses only when they run with "
        "VLLM_ENABLE_RESPONSES_API_STORE=1",
        code="response_not_found",
    )
