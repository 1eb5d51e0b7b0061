"""Secrets in settings: given as they are, or by where they are: ``file:PATH`` or ``env:NAME``."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SecretStr


def read_secret(value: Any) -> Any:
    """The secret itself, without the line end of a file.

    Raises:
        ValueError: the file cannot be read, or the variable is not set. The text names the place, never the content.
    """
    if not isinstance(value, str):
        return value
    kind, colon, place = value.partition(":")
    if colon and kind == "file":
        return _from_file(place)
    if colon and kind == "env":
        if place not in os.environ:
            raise ValueError(f"the environment variable {place} is not set")
        return os.environ[place]
    return value


def _from_file(place: str) -> str:
    try:
        secret = Path(place).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"the secret in {place} cannot be read: {reason}") from None
    if not secret:
        raise ValueError(f"the secret in {place} is empty")
    return secret


Secret = Annotated[SecretStr, BeforeValidator(read_secret)]
"""A setting that is a secret."""
