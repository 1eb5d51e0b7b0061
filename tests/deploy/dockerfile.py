"""A Dockerfile's instructions and a compose file's services, as far as tests have to read them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


@dataclass
class Stage:
    """``instructions`` in their order, each a word in capitals and the rest of its line."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == word]

    def only(self, word: str) -> str:
        (rest,) = self.all(word)
        return rest

    def exec_form(self, word: str) -> list[str]:
        return list(json.loads(self.only(word)))

    @property
    def environment(self) -> dict[str, str]:
        pairs = [pair for line in self.all("ENV") for pair in line.split()]
        return dict(pair.split("=", 1) for pair in pairs)


def read_dockerfile(path: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """Arguments before the first stage with their defaults, and the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name, base)
        elif not stages:
            name, _, default = rest.partition("=")
            arguments[name] = default
        else:
            stage.instructions.append((word, rest.strip()))
    return arguments, stages


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!reset", lambda *_: None)


def read_compose(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """With variables put in, as compose does it.

    Raises:
        KeyError: a variable that the file demands is not set.
    """
    return dict(_filled(yaml.load(path.read_text(encoding="utf-8"), _Loader), environ))


def _filled(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _value(match, environ), value)
    if isinstance(value, dict):
        return {key: _filled(each, environ) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, environ) for each in value]
    return value


def _value(match: re.Match[str], environ: Mapping[str, str]) -> str:
    name, kind, rest = match.groups()
    if given := environ.get(name):
        return given
    if kind == "-":
        return str(rest)
    raise KeyError(f"{name}: {rest}")
