"""``warmroute keys``: make, show, replace and remove API keys in their file. A gateway that runs takes the change by itself.

The file is replaced as a whole, under a lock, and readable by its owner alone. Comments in it are lost by that.
"""

import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from router.access import KeySpec, check_keys, hash_key, make_key, read_keys
from router.errors import ConfigError

keys = typer.Typer(name="keys", help="Make and remove the API keys of clients.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option("--file", envvar="WARMROUTE_API_KEYS_FILE", help="the file of keys", show_default=True)
]
Name = Annotated[str, typer.Argument(help="the key's name")]
DEFAULT_FILE = Path("keys.yaml")


@keys.command("add")
def add(
    name: Name,
    *,
    file: File = DEFAULT_FILE,
    model: Annotated[list[str] | None, typer.Option(help="a model it may use, or a pattern; repeat for each")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="limit of requests")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="limit of tokens, prompts and answers together")] = None,
    concurrency: Annotated[int | None, typer.Option(help="limit of requests at once")] = None,
    priority: Annotated[int, typer.Option(help="the most urgent its requests may be; smaller is more urgent")] = 0,
    weight: Annotated[float, typer.Option(help="share of the queue against other keys")] = 1.0,
    expires: Annotated[str | None, typer.Option(help="when it ends, as 2030-01-01T00:00:00Z")] = None,
    shared_cache: Annotated[bool, typer.Option("--shared-cache", help="share the workers' caches with others")] = False,
    share_cache_with: Annotated[str, typer.Option(help="name of a key to share the workers' caches with")] = "",
) -> None:
    """Make a key and print it, this once: the file keeps only its hash.

    It shares no cache with other keys, so that nobody can tell from response times what others asked, unless one of the
    options says so.
    """
    key = make_key()

    def change(present: list[KeySpec]) -> list[KeySpec]:
        if any(spec.name == name for spec in present):
            raise ConfigError(f"there is a key {name!r} already; 'warmroute keys rotate {name}' replaces it")
        salt = "" if shared_cache else _salt_of(present, share_cache_with) or secrets.token_hex(16)
        members: dict[str, Any] = {
            "name": name,
            "hash": hash_key(key),
            "models": model or [],
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrency": concurrency,
            "priority": priority,
            "weight": weight,
            "cache_salt": salt,
            "expires": expires,
        }
        return [*present, _made(members)]

    _change(file, change)
    typer.echo(f"the key of {name}, shown this once:", err=True)
    typer.echo(key)


@keys.command("list")
def show(*, file: File = DEFAULT_FILE) -> None:
    """Print names, limits and models; no key and no salt can be shown."""
    with _explained():
        for spec in read_keys(file):
            typer.echo(_line(spec))


@keys.command("rotate")
def rotate(
    name: Name,
    *,
    file: File = DEFAULT_FILE,
    now: Annotated[bool, typer.Option("--now", help="refuse the keys it had at once")] = False,
) -> None:
    """Make another key of a name and print it. The one it had stays in force until 'warmroute keys retire'."""
    key = make_key()

    def change(spec: KeySpec) -> KeySpec:
        kept = () if now else spec.hashes
        return spec.model_copy(update={"hash": [*kept, hash_key(key)] if kept else hash_key(key)})

    _change_one(file, name, change)
    typer.echo(f"the key of {name}, shown this once:", err=True)
    typer.echo(key)


@keys.command("retire")
def retire(name: Name, *, file: File = DEFAULT_FILE) -> None:
    """Refuse every key of a name but the latest."""
    _change_one(file, name, lambda spec: spec.model_copy(update={"hash": spec.hashes[-1]}))


@keys.command("disable")
def disable(
    name: Name,
    *,
    file: File = DEFAULT_FILE,
    enable: Annotated[bool, typer.Option("--undo", help="allow it again")] = False,
) -> None:
    """Refuse a key for now."""
    _change_one(file, name, lambda spec: spec.model_copy(update={"disabled": not enable}))


@keys.command("remove")
def remove(name: Name, *, file: File = DEFAULT_FILE) -> None:
    """Remove a key. What it was used for is counted no more."""

    def change(present: list[KeySpec]) -> list[KeySpec]:
        _find(present, name)
        return [spec for spec in present if spec.name != name]

    _change(file, change)


def _change_one(file: Path, name: str, change: Callable[[KeySpec], KeySpec]) -> None:
    def change_all(present: list[KeySpec]) -> list[KeySpec]:
        _find(present, name)
        return [change(spec) if spec.name == name else spec for spec in present]

    _change(file, change_all)


def _change(file: Path, change: Callable[[list[KeySpec]], list[KeySpec]]) -> None:
    file = file.resolve()  # a link stays one
    with _explained(), _locked(file):
        present = read_keys(file) if file.exists() else []
        _write(file, check_keys(change(present), str(file)))


def _find(present: list[KeySpec], name: str) -> KeySpec:
    found = next((spec for spec in present if spec.name == name), None)
    if found is None:
        names = ", ".join(spec.name for spec in present) or "none"
        raise ConfigError(f"there is no key {name!r}; there are: {names}")
    return found


def _salt_of(present: list[KeySpec], name: str) -> str:
    if not name:
        return ""
    salt = _find(present, name).cache_salt.get_secret_value()
    if not salt:
        raise ConfigError(f"key {name!r} shares its cache with everybody: use --shared-cache")
    return salt


def _made(members: dict[str, Any]) -> KeySpec:
    try:
        return KeySpec.model_validate({key: value for key, value in members.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _write(file: Path, specs: list[KeySpec]) -> None:
    entries = [spec.model_dump(mode="json", exclude_defaults=True) for spec in specs]
    text = yaml.safe_dump({"keys": entries}, sort_keys=False, allow_unicode=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # readable by its owner alone
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
        if file.exists():
            status = file.stat()
            with suppress(PermissionError):  # only the superuser can, and whoever owns it need not
                os.chown(temporary, status.st_uid, status.st_gid)
            os.chmod(temporary, status.st_mode & 0o770)  # noqa: PTH101 - a path as text
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two commands at once must not lose each other's change."""
    if not file.parent.is_dir():
        raise ConfigError(f"there is no directory {file.parent} to keep the keys in")
    lock = file.with_name(f".{file.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (ConfigError, OSError) as error:
        typer.echo(f"warmroute: {error}", err=True)
        raise typer.Exit(2) from None


def _line(spec: KeySpec) -> str:
    limits = {
        "requests/min": spec.requests_per_minute,
        "tokens/min": spec.tokens_per_minute,
        "at once": spec.concurrency,
    }
    parts = [f"{value} {what}" for what, value in limits.items() if value is not None] or ["no limits"]
    parts.append("models: " + (", ".join(spec.models) or "all"))
    parts.append("own cache" if spec.cache_salt.get_secret_value() else "shared cache")
    if spec.priority:
        parts.append(f"priority {spec.priority}")
    if len(spec.hashes) > 1:
        parts.append(f"{len(spec.hashes)} keys in force")
    if spec.expires is not None:
        parts.append(f"until {spec.expires.isoformat()}")
    if spec.disabled:
        parts.append("disabled")
    return f"{spec.name}: " + "; ".join(parts)
