"""Writes what reference pages take from the code: `make docs-reference`; with --check, says which pages are out of date.

A page's part between two marks is made anew: an entry for everything the code has, in its order, with its facts. What
people wrote below an entry's facts stays; an entry that is not there yet begins with what the code says of it.
"""

import asyncio
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer.main
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from router.app import Gateway
from router.cli import app
from router.config import Settings
from router.discovery.kubernetes import PodWatch
from router.discovery.names import PodSpec
from router.discovery_metrics import DiscoveryState
from router.policy_metrics import PolicyState
from router.reload import RELOADABLE
from worker_connector.config import _PARSERS, DEFAULT_DISK_PATH, SETTINGS, ConnectorConfig
from worker_connector.config_names import SECTIONS
from worker_connector.stats import FIGURES, VISION_FIGURES

DOCS = Path(__file__).resolve().parent
_MARKS = re.compile(r"(?<=<!-- from the code: make docs-reference -->\n).*?(?=<!-- end -->)", re.DOTALL)

# The first setting of a group, and the group's heading.
_CONNECTOR = {
    "chunk_size": "Chunks",
    "enable_cpu": "CPU tier",
    "min_load_tokens": "Loads",
    "enable_disk": "Disk tier",
    "enable_remote": "Remote tier",
    "write_policy": "What goes down, and how long it stays",
    "enable_vision_cache": "Vision cache",
    "conversation_mode": "Conversations",
    "lower_tier_patience": "Patience with lower tiers",
    "model_name": "Identity",
    "report_host": "Reports",
}
_GATEWAY = {
    "workers": "Workers",
    "host": "Address",
    "policy": "Choosing",
    "tokenizer": "Prompts and answers",
    "max_in_flight": "Limits",
    "connect_timeout": "Failures",
    "report_heartbeat": "Index and records",
    "drain_timeout": "Stopping",
    "api_keys_file": "Access and TLS",
    "log_level": "Logs, processes and traces",
}
_UNSAID_DEFAULTS = {
    "cpu_ratio": "none",
    "numa_node": "`auto`",
    "enable_disk": "on where a path is given",
    "disk_path": f"`{DEFAULT_DISK_PATH}`",
    "enable_remote": "on where a URL is given",
    "model_name": "the served name",
    "weights_id": "the files' content",
    "weights_generation": "that of the files",
}


class Entry(NamedTuple):
    """What the code knows of a thing: its name, a line of facts, and what it says itself."""

    name: str
    facts: str
    says: str


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with its text as it should be."""
    for name, parts in {
        "configuration.md": [_grouped(connector(), _CONNECTOR), _grouped(gateway(), _GATEWAY)],
        "metrics.md": [{"": list(figures())}, {"": list(series())}],
    }.items():
        page = DOCS / name
        yield page, _filled(page.read_text(encoding="utf-8"), parts)
    page = DOCS / "cli.md"
    yield page, _MARKS.sub(lambda _: commands(), page.read_text(encoding="utf-8"))


def _filled(text: str, parts: Iterable[Mapping[str, list[Entry]]]) -> str:
    remaining = iter(parts)
    return _MARKS.sub(lambda found: _region(found[0], next(remaining)), text)


def _region(before: str, groups: Mapping[str, list[Entry]]) -> str:
    texts = dict(_texts(before))
    lines = []
    for title, entries in groups.items():
        lines += [f"\n### {title}\n"] if title else []
        level = "####" if title else "###"
        for entry in entries:
            lines.append(f"\n{level} `{entry.name}`\n\n{entry.facts}\n\n{texts.get(entry.name) or entry.says}\n")
    return "".join(lines) + "\n"


def _texts(region: str) -> Iterator[tuple[str, str]]:
    """What people wrote of each entry: all below its heading but the first paragraph."""
    for part in re.split(r"^(?=#{3,4} )", region, flags=re.MULTILINE):
        if heading := re.match(r"#{3,4} `([^`]+)`\n", part):
            yield heading[1], part[heading.end() :].strip().partition("\n\n")[2].strip()


def _grouped(entries: Iterable[Entry], starts: Mapping[str, str]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.name in starts:
            groups[starts[entry.name]] = []
        groups[next(reversed(groups))].append(entry)
    return groups


def connector() -> Iterator[Entry]:
    defaults = {field.name: field.default for field in dataclasses.fields(ConnectorConfig)}
    grouped = {flat: f"{section}: {{{key}: …}}" for section, keys in SECTIONS.items() for key, flat in keys.items()}
    for name in SETTINGS:
        default = _UNSAID_DEFAULTS.get(name) or _shown(defaults[name], is_size=name.endswith("_bytes"))
        facts = [f"Default: {default}", _takes(name), f"`WARMROUTE_{name.upper()}`"]
        facts += [f"`{grouped[name]}`"] if name in grouped else []
        yield Entry(name, " · ".join(fact for fact in facts if fact), "")


def _takes(name: str) -> str:
    """What values a setting takes, as its reader says when it gets a wrong one."""
    for wrong in (-1, "\0"):
        try:
            _PARSERS[name](wrong)
        except ValueError as error:
            said = str(error).removeprefix("available here: ").removeprefix("it must be ")
            said = (said.partition(": it is ")[2] or said).partition(": ")[0]
            return re.sub(r'"(\w+)"', r"`\1`", said).replace("and 2147483647", "and 2^31 - 1")
    return "text"


def gateway() -> Iterator[Entry]:
    for name, field in Settings.model_fields.items():
        facts = [f"Default: {_shown(field.default)}", _kind(field), f"`{_flag(name)}`", f"`WARMROUTE_{name.upper()}`"]
        facts += ["can change while running"] if name in RELOADABLE else []
        yield Entry(name, " · ".join(facts), f"{_capital(field.description or '')}.")


def _kind(field: FieldInfo) -> str:
    annotation = field.annotation
    words = [word for each in (annotation, *get_args(annotation)) for word in _words(each)]
    if words:
        return ", ".join(dict.fromkeys(words))
    bounds = [
        f"{sign} {getattr(each, member):,}"
        for each in field.metadata
        for member, sign in (("gt", "above"), ("ge", "at least"), ("le", "at most"))
        if hasattr(each, member)
    ]
    return ", ".join((_noun(annotation), *bounds))


def _words(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _noun(annotation: Any) -> str:
    kinds = {annotation, *get_args(annotation)}
    nouns = {bool: "true or false", int: "a whole number", float: "a number", SecretStr: "a secret", str: "text"}
    return next((noun for kind, noun in nouns.items() if kind in kinds), "a list")


def _flag(name: str) -> str:
    flags: dict[str, str] = {parameter.name: parameter.opts[0] for parameter in _commands()["serve"].params}
    return flags[name]


def _shown(value: Any, *, is_size: bool = False) -> str:
    if isinstance(value, SecretStr) or value in (None, "", []):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if is_size and value is not None:
        return f"`{value >> 30}GiB`" if value >= 1 << 30 else f"`{value >> 20}MiB`"
    return f"`{value:,}`" if isinstance(value, int) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def figures() -> Iterator[Entry]:
    """The connector's metrics."""
    for figure in (*FIGURES, *VISION_FIGURES):
        kind = "gauge" if figure.is_gauge else "counter"
        suffix = "" if figure.is_gauge else "_total"
        facts = f"{_capital(kind)}{', by `tier`' if figure.by_tier else ''}"
        yield Entry(f"warmroute_{figure.name}{suffix}", facts, figure.help)


def series() -> Iterator[Entry]:
    """The gateway's metrics, of one in which everything that has some is switched on."""
    for family, labels in asyncio.run(_families()):
        facts = _capital(family.type) + (f", by {', '.join(f'`{label}`' for label in labels)}" if labels else "")
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield Entry(name, facts, f"{_capital(family.documentation)}.")


async def _families() -> list[tuple[Any, Iterable[str]]]:
    gateway = Gateway(Settings(api_keys=f"team:{'k' * 40}", shadow_policy="least-ttft"))  # type: ignore[arg-type]
    watch = PodWatch(PodSpec(selector="app=vllm"), lambda *_: None, watch_seconds=60, timeout=5)
    watch.answered_at = 0.0
    worker = SimpleNamespace(name="", pace=SimpleNamespace(learned_speed=1.0, fixed=1.0))
    collectors = gateway.metrics._registry._collector_to_names  # noqa: SLF001 - the registry lists none of its own accord
    found: dict[str, tuple[Any, Iterable[str]]] = {}
    policies = PolicyState(lambda: gateway.policy, lambda: [worker])  # type: ignore[list-item]
    for collector in (*collectors, policies, DiscoveryState(lambda: [watch])):
        for family in collector.collect():
            labels = getattr(collector, "_names", ()) or getattr(collector, "_labelnames", ())
            found.setdefault(family.name, (family, labels or getattr(family, "_labelnames", ()) or _labels(family)))
    return [each for name, each in found.items() if name.startswith("warmroute_")]


def _labels(family: Any) -> Iterable[str]:
    return dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")


def commands() -> str:
    """A heading for each command, with its arguments and options."""
    return "".join(f"\n{_described(name, command)}" for name, command in _commands().items()) + "\n"


def _commands(group: Any = None, before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        nested = hasattr(command, "commands")
        found |= _commands(command, f"{before}{name} ") if nested else {f"{before}{name}": command}
    return dict(sorted(found.items()))


def _described(name: str, command: Any) -> str:
    parameters = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
    if name == "serve":
        parameters = [each for each in parameters if each.name == "config"]
    arguments = " ".join(_usage(each) for each in parameters if not _is_option(each))
    options = "[options]" if any(map(_is_option, parameters)) else ""
    usage = " ".join(part for part in (f"warmroute {name}", arguments, options) if part)
    text = f"## `warmroute {name}`\n\n{_capital((command.help or '').strip())}\n\n```text\n{usage}\n```\n"
    if rows := [_row(each) for each in parameters if _is_option(each) or each.help]:
        text += "\n| | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    if name == "serve":
        text += "\nEvery setting of the [gateway](configuration.md#gateway) is a flag: `max_queue` is `--max-queue`.\n"
    return text


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


def _row(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts] if _is_option(parameter) else [_metavar(parameter)]
    variables = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
    shown = ", ".join(f"`{name}`" for name in (*names, *variables))
    default = parameter.default
    said = "" if default in (False, "") or not _is_plain(default) else f"`{str(default).removesuffix('.0').lower()}`"
    return f"| {shown} | {said} | {(parameter.help or '').replace('|', chr(92) + '|')} |".replace("\n", " ")


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _usage(parameter: Any) -> str:
    name = _metavar(parameter)
    return name if parameter.required or name.endswith("...") else f"[{name}]"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> int:
    """Writes the pages, or with --check returns 1 where one is out of date."""
    stale = [(page, text) for page, text in pages() if page.read_text(encoding="utf-8") != text]
    for page, text in stale:
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        said = "is out of date: make docs-reference" if "--check" in sys.argv else "is written"
        sys.stdout.write(f"docs/{page.name} {said}\n")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
