"""Asking a worker for one token: whether it works at all, where its answers to others' requests leave that open."""

import msgspec

from router.errors import UpstreamError
from router.workers import Worker

PROBE_TIMEOUT_S = 10.0
_NOT_HERE = frozenset({404, 405, 501})


async def works(worker: Worker, timeout: float = PROBE_TIMEOUT_S) -> bool:  # noqa: ASYNC109 - covers each question
    """Whether it computes a prompt of one letter, as a completion or, where it serves none, as an embedding.

    A worker that refuses the question (4xx) answers, and counts as working.
    """
    model = next((card.id for card in worker.models.values() if not card.parent), "")
    questions = (
        ("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1}),
        ("/v1/embeddings", {"model": model, "input": "x"}),
    )
    for target, body in questions:
        try:
            answer = await worker.upstream.fetch("POST", target, msgspec.json.encode(body), timeout=timeout)
        except UpstreamError:
            return False
        if answer.status not in _NOT_HERE:
            return answer.status < 500
    return True
