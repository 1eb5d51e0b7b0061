"""vLLM's command line as far as ``warmroute worker`` has to read it; everything else passes as it was given.

vLLM takes ``--some-flag V``, ``--some_flag=V``, JSON flags piece by piece as ``--flag.key V``, and a YAML file of flags
(``--config``), over which the command line wins.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from router.errors import ConfigError

_SHORTEST = {
    "--kv-transfer-config": "--kv-t",
    "--kv-offloading-size": "--kv-offloading-s",
    "--ec-transfer-config": "--ec-t",
}


class EngineFlags:
    """The tokens after ``vllm serve``, in their order."""

    def __init__(self, tokens: Sequence[str], file: Mapping[str, Any]) -> None:
        self.tokens = list(tokens)
        self._file = file

    @classmethod
    def parse(cls, tokens: Sequence[str]) -> Self:
        """Reads the file that ``--config`` names, too.

        Raises:
            ConfigError: the file cannot be read, or a flag that must be understood here is abbreviated.
        """
        flags = cls(tokens, {})
        for token in tokens:
            _refuse_abbreviation(_key(token))
        if path := flags.value("--config"):
            flags._file = _read_file(path)
        return flags

    def has(self, *names: str) -> bool:
        """Whether one of the flags is given, with or without a value."""
        return any(_key(token) in names for token in self.tokens) or any(self._of_file(name) for name in names)

    def value(self, *names: str) -> str | None:
        """The value of the first of these flags that is given; of one given repeatedly, the last, and of
        a file's list the first. None without it."""
        found = [value for name, value, _ in self._valued() if name in names]
        if found:
            return found[-1]
        for name in names:
            if (value := self._of_file(name)) is not None:
                return str(value[0] if isinstance(value, list) and value else value)
        return None

    def take(self, name: str) -> str | None:
        """Like ``value``, and vLLM does not get it.

        Raises:
            ConfigError: it stands in the file, from where it cannot be taken.
        """
        if self._of_file(name) is not None:
            flag = name.removeprefix("--")
            raise ConfigError(f"{flag} stands in vLLM's --config file: give it on the command line instead")
        value = self.value(name)
        self._remove(name)
        return value

    def take_object(self, name: str) -> dict[str, Any]:
        """The JSON object that a flag and its dotted pieces make up, which vLLM does not get as they stand.

        Raises:
            ConfigError: it is no JSON object.
        """
        base = self._of_file(name)
        found = dict(base) if isinstance(base, Mapping) else _object(name, base)
        for key, value, _ in self._valued():
            if key == name:
                found = _object(name, value)
        for key, value, _ in self._valued():
            if key.startswith(f"{name}."):
                _put(found, key.removeprefix(f"{name}.").split("."), value)
        self._remove(name)
        return found

    def _remove(self, name: str) -> None:
        gone = {at for key, _, place in self._valued() if key.partition(".")[0] == name for at in place}
        self.tokens = [token for at, token in enumerate(self.tokens) if at not in gone]

    def _valued(self) -> Iterator[tuple[str, str, range]]:
        """Flag, value and place of everything that may be a flag with a value."""
        for at, token in enumerate(self.tokens):
            if not token.startswith("-"):
                continue
            if "=" in token:
                yield _key(token), token.partition("=")[2], range(at, at + 1)
            elif at + 1 < len(self.tokens):
                yield _key(token), self.tokens[at + 1], range(at, at + 2)

    def _of_file(self, name: str) -> Any:
        plain = name.lstrip("-")
        for spelling in (plain, plain.replace("-", "_")):
            if spelling in self._file:
                return self._file[spelling]
        return None


def _key(token: str) -> str:
    """``--some_flag.some_key=V`` as ``--some-flag.some_key``."""
    if not token.startswith("-"):
        return ""
    flag, dot, rest = token.partition("=")[0].partition(".")
    return flag.replace("_", "-") + dot + rest


def _refuse_abbreviation(key: str) -> None:
    for name, shortest in _SHORTEST.items():
        if name != key.partition(".")[0] and name.startswith(key) and key.startswith(shortest):
            raise ConfigError(f"write {name} in full, not {key}: it is merged with what the connector needs")


def _read_file(path: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))  # noqa: PTH111 - ~user too
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"vLLM's --config names {path}, which cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"vLLM's --config names {path}, which is no YAML") from error
    return content if isinstance(content, dict) else {}


def _object(name: str, text: Any) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(str(text))
    except ValueError as error:
        raise ConfigError(
            f'{name} is no JSON: {error}. Quote it for the shell: {name} \'{{"key": "value"}}\''
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} takes a JSON object, not a {type(found).__name__}")
    return found


def _put(target: dict[str, Any], path: Sequence[str], text: str) -> None:
    for key in path[:-1]:
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} is given as a value and as an object: keep one of them")
        target = inner
    if path[-1].endswith("+"):
        raise ConfigError(f"give the list {path[-1][:-1]} as JSON, in one --kv-transfer-config")
    try:
        target[path[-1]] = json.loads(text)
    except ValueError:
        target[path[-1]] = text
