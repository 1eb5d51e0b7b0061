"""What the names of test files say."""


def has_engines(node_id: str) -> bool:
    """Whether a test may start real engines: it is in a file ``*_engine.py``, or below ``e2e``."""
    file = node_id.partition("::")[0]
    return file.endswith("_engine.py") or "/e2e/" in f"/{file}"
