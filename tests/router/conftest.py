import logging
import os
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def vllm() -> Iterator[None]:
    """vLLM's own code, in this process, with its warnings and logs kept out of the tests."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("vllm", reason="needs vLLM (CPU build)", exc_type=ImportError)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
