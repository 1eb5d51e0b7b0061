"""The identity of a running engine, from vLLM's configuration and the model's files.

Everything is read from vLLM's objects by name, so nothing here imports vLLM.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from kv_protocol.identity import GroupGeometry, Identity
from worker_connector.errors import ConfigurationError
from worker_connector.geometry import Group

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")
_THREADS = 4
_NOTES = Path("~/.cache/warmroute/digests").expanduser()
_LONG_BYTES = 1 << 30
# What of a configuration says where a model came from, and not what it computes.
_NOT_COMPUTED = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})

_log = logging.getLogger("vllm.warmroute.scheduler")


def engine_identity(
    vllm_config: Any, cache: Any, groups: Sequence[Group], block_bytes: Sequence[int], weights: str
) -> Identity:
    """The identity of an engine: ``cache`` is its KVCacheConfig, ``block_bytes`` are by group, on one rank, and
    ``weights`` is what ``weights_identity`` says."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_dtype = str(vllm_config.cache_config.cache_dtype)
    return Identity(
        weights=weights,
        kv_dtype=_type_name(model.dtype) if kv_dtype == "auto" else kv_dtype,
        layout=str(getattr(cache, "kv_cache_layout", None) or ""),
        groups=tuple(
            _geometry(group, cache.kv_cache_groups[group.index], size)
            for group, size in zip(groups, block_bytes, strict=True)
        ),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        compute=_compute(model),
    )


def weights_identity(model: str, revision: str | None = None, override: str = "") -> str:
    """A name for a model's weights that other weights do not have: ``override`` if it is given, or else the content of
    the weight files, wherever they lie and whatever they are called after.

    Files in Hugging Face's cache are named by their content, so they need not be read; others are, at about a gigabyte
    a second and thread, once: what was found is noted under ~/.cache/warmroute/digests, by path, size, inode and time of change.

    Raises:
        ConfigurationError: the files cannot be found.
    """
    if override:
        return f"named:{override}"
    directory = Path(model) if Path(model).is_dir() else _cached(model, revision)
    if directory is None:
        raise ConfigurationError(
            f"the weights of {model} cannot be told from other weights, because their files are neither a directory nor in "
            "Hugging Face's cache: set weights_id to a name that changes with them"
        )
    return f"content:{directory_digest(directory, _WEIGHTS).hex()}"


def adapter_digest(directory: Path) -> bytes:
    """32 bytes that tell the content of a LoRA adapter, its configuration included.

    Raises:
        ConfigurationError: there is no adapter.
    """
    return directory_digest(directory, _WEIGHTS | {".json"})


def directory_digest(directory: Path, suffixes: frozenset[str]) -> bytes:
    """SHA-256 over the digests of a directory's files with these suffixes, without their names, which mean nothing.

    Raises:
        ConfigurationError: there are none, or one cannot be read.
    """
    files = sorted(path for path in directory.iterdir() if path.suffix in suffixes and path.is_file())
    if not files:
        raise ConfigurationError(f"{directory} has no files that end in {', '.join(sorted(suffixes))}")
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_content_digest, files))
    except OSError as error:
        raise ConfigurationError(f"{error.filename} cannot be read: {error.strerror}") from error
    return sha256(b"".join(sorted(digests))).digest()


def _content_digest(path: Path) -> bytes:
    real = Path(os.path.realpath(path))
    if path.is_symlink() and _CONTENT_NAME.fullmatch(real.name):
        return bytes.fromhex(real.name)
    status = real.stat()
    note = _NOTES / sha256(f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}".encode()).hexdigest()
    with suppress(OSError, ValueError):
        return bytes.fromhex(note.read_text(encoding="ascii").strip())
    if status.st_size >= _LONG_BYTES:
        _log.info("Reading %s to tell its weights from others (%.1f GB)", real, status.st_size / 1e9)
    with real.open("rb") as file:
        digest = file_digest(file, "sha256").digest()
    with suppress(OSError):
        _NOTES.mkdir(parents=True, exist_ok=True, mode=0o700)
        written = note.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        written.write_text(digest.hex(), encoding="ascii")
        written.replace(note)
    return digest


def _cached(model: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - there wherever vLLM is
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _geometry(group: Group, given: Any, block_bytes: int) -> GroupGeometry:
    spec = given.kv_cache_spec
    members = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    first = members[0]
    return GroupGeometry(
        kind=group.kind,
        block_size=group.block_size,
        block_bytes=block_bytes,
        layers=len(given.layer_names),
        heads=int(getattr(first, "num_kv_heads", 0) or 0),
        head_size=int(getattr(first, "head_size", 0) or 0),
        dtype=",".join(sorted({_type_name(getattr(member, "dtype", "")) for member in members})),
        reach=group.window or group.local,
        members=",".join(given.layer_names),
    )


def _compute(model: Any) -> str:
    """Element type and quantisation, and a digest of the model's configuration with all overrides."""
    config: Any = getattr(model, "hf_text_config", None) or getattr(model, "hf_config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    told = dict(sorted((key, value) for key, value in fields.items() if key not in _NOT_COMPUTED))
    digest = sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return f"{_type_name(model.dtype)} {getattr(model, 'quantization', None) or 'unquantised'} {digest}"


def _type_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
