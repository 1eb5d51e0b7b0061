"""Settings of ``warmroute serve``: flags win over the environment, which wins over the YAML file."""

import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from router.discovery.names import DnsSpec, PodSpec, is_name
from router.errors import ConfigError
from router.foreign_flags import hint
from router.kv_events import Source
from router.secrets import Secret

ENV_PREFIX = "WARMROUTE_"
CONFIG_VARIABLE = "WARMROUTE_ROUTER_CONFIG"
DEFAULT_REPORT_PORT = 5571
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

PolicyName = Literal["longest-hit", "least-ttft", "least-loaded", "power-of-two", "round-robin", "session", "random"]

_log = logging.getLogger(__name__)
MOST_RANKS = 1024
_RANK = re.compile(r"0|[1-9][0-9]{0,3}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
# What an orchestrator adds for a service named after us, and variables that other parts of the product read.
_FOREIGN_VARIABLES = re.compile(r"WARMROUTE_(SERVICE_.*|PORT_\d+_.*)")
_TYPO_RATIO = 0.85


class WorkerSpec(BaseModel):
    """One worker: where its HTTP endpoint and its report port are. ``reports`` is HOST:PORT, or ``none``; ``key`` its own
    API key. ``events`` and ``replay`` are where an engine without the connector publishes its KV events, and replays them;
    unsaid, it is asked; ``none`` has them left alone. ``URL#RANK`` is one data-parallel rank of an engine, whose ports are
    the engine's plus the rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    reports: str = ""
    events: str = ""
    replay: str = ""
    name: str = ""
    key: Secret = SecretStr("")

    @field_validator("key")
    @classmethod
    def _key_fits_headers(cls, key: SecretStr) -> SecretStr:
        return _header_safe(key)

    @field_validator("url")
    @classmethod
    def _url_is_http(cls, url: str) -> str:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a worker's URL holds no user and password: http://HOST:PORT")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"a worker is http://HOST:PORT, got {url!r}")
        if parts.fragment and not _RANK.fullmatch(parts.fragment):
            raise ValueError(f"what follows # in a worker's URL is its data-parallel rank, got {url!r}")
        _ = parts.port  # raises ValueError when it is no port number
        rank = f"#{parts.fragment}" if parts.fragment else ""
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}{rank}"

    @field_validator("name")
    @classmethod
    def _name_fits_headers(cls, name: str) -> str:
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"a worker's name is letters, digits, '.', '_', ':' and '-', got {name!r}")
        return name

    @model_validator(mode="after")
    def _ports_are_addresses(self) -> Self:
        _ = self.report_address
        if self.events not in ("", "none"):
            _ = self.event_source
            if self.reports not in ("", "none"):
                raise ValueError(
                    "events= is for an engine without the connector, reports= for one with it: give one of them"
                )
        elif self.replay:
            raise ValueError("replay= is where the KV events of events=HOST:PORT are replayed: name both")
        return self

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def rank(self) -> int | None:
        """The data-parallel rank requests ask the engine for; None where the engine is one worker."""
        fragment = urlsplit(self.url).fragment
        return int(fragment) if fragment else None

    @property
    def title(self) -> str:
        """The name given, or HOST:PORT; with the rank, where there is one."""
        name = self.name or f"{self.host}:{self.port}"
        return name if self.rank is None else f"{name}#{self.rank}"

    @property
    def report_address(self) -> tuple[str, int] | None:
        """Host and port of the report stream; None for an engine without the connector."""
        if self.reports == "none" or (not self.reports and self.events not in ("", "none")):
            return None
        host, port = parse_address(self.reports) if self.reports else (self.host, DEFAULT_REPORT_PORT)
        return host, port + (self.rank or 0)

    @property
    def has_events(self) -> bool:
        """Whether KV events tell of its cache, if it publishes any."""
        return self.report_address is None and self.events != "none"

    @property
    def event_source(self) -> Source:
        """Where its KV events were said to be; both endpoints are empty where that was not said."""
        return Source(*(self._endpoint(address) if address else "" for address in (self.events, self.replay)))

    def _endpoint(self, address: str) -> str:
        host, port = parse_address(address)
        return f"tcp://{f'[{host}]' if ':' in host else host}:{port + (self.rank or 0)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``URL[,reports=HOST:PORT|none][,events=HOST:PORT|none[,replay=HOST:PORT]][,name=NAME][,key=KEY|file:PATH|env:NAME]``.

        Raises:
            ValueError: a part is not understood.
        """
        specs = cls.all_of(text)
        if len(specs) > 1:
            raise ValueError(f"{text!r} names several workers; name the ranks one by one, as URL#0")
        return specs[0]

    @classmethod
    def all_of(cls, given: str | Mapping[str, Any]) -> list[Self]:
        """Like ``parse``, with ``,dp=N`` for the N data-parallel ranks of an engine, a worker each; or from members.

        Raises:
            ValueError: a part is not understood.
        """
        members = _members(given) if isinstance(given, str) else dict(given)
        if (ranks := members.pop("dp", None)) is None:
            return [cls(**members)]
        url, count = members.get("url", ""), str(ranks)
        if not count.isascii() or not count.isdigit() or not 0 < int(count) <= MOST_RANKS or "#" in url:
            raise ValueError(f"dp={ranks} of worker {url!r}: the number of data-parallel ranks, from 1 to {MOST_RANKS}")
        return [cls(**{**members, "url": f"{url}#{rank}"}) for rank in range(int(count))]


def _members(text: str) -> dict[str, Any]:
    url, *options = text.strip().split(",")
    members: dict[str, Any] = {"url": url}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in ("reports", "events", "replay", "name", "key", "dp"):
            known = "reports=HOST:PORT, events=HOST:PORT, replay=HOST:PORT, name=NAME, key=KEY and dp=N"
            raise ValueError(f"{key!r} of worker {url!r} is none of {known}")
        members[key] = value
    return members


class Settings(BaseSettings):
    """Everything that can be set. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    workers: Annotated[list[WorkerSpec], NoDecode] = Field(
        default=[], description="URL[,reports=HOST:PORT][,name=NAME] of a worker, or dns://NAME:PORT; repeat for each"
    )
    discover: Annotated[list[DnsSpec], NoDecode] = Field(
        default=[], description="dns://NAME:PORT[,reports=PORT|none] or dns+srv://NAME whose addresses are workers"
    )
    discovery_interval: float = Field(default=10.0, gt=0, description="time between two look-ups of a name")
    discovery_timeout: float = Field(
        default=5.0, gt=0, description="longest wait for a look-up, or an answer of the Kubernetes API"
    )
    kubernetes_selector: str = Field(
        default="", description="labels of the pods that are workers, as app=vllm: found by the Kubernetes API"
    )
    kubernetes_namespace: str = Field(default="", description="the pods' namespace; default: the gateway's own")
    kubernetes_port: str = Field(default="8000", description="number or name of the pods' HTTP port")
    kubernetes_report_port: str = Field(
        default=str(DEFAULT_REPORT_PORT), description="number or name of their report port, or none"
    )
    kubernetes_scheme: Literal["http", "https"] = Field(default="http", description="how the pods are spoken to")
    kubernetes_ranks: int = Field(default=1, ge=1, le=64, description="data-parallel ranks in each pod")
    kubernetes_watch_seconds: float = Field(
        default=60.0, ge=1, le=3600, description="how long one watch of the Kubernetes API lasts; the next one goes on"
    )
    drain_handover: float = Field(
        default=0.0, ge=0, le=3600, description="how long a leaving worker may write hot chunks to the remote tier"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    policy: PolicyName = Field(default="longest-hit", description="how a worker is chosen")
    saturation_seconds: float = Field(
        default=2.0, gt=0, description="lead in prefill work, in seconds of it, at which the warmest worker gives way"
    )
    saturation_tokens: int | None = Field(
        default=None, gt=0, description="the same lead as uncached tokens; overrides saturation-seconds"
    )
    compute_weight: float = Field(
        default=4.0, ge=1, description="least-ttft: what a second of computing counts beside one of waiting"
    )
    session_header: str = Field(
        default="x-session-id", pattern=r"^[A-Za-z0-9-]+$", description="session: the header that names the session"
    )
    shadow_policy: PolicyName | Literal["none"] = Field(
        default="none", description="policy that is asked beside the active one, changes nothing and is compared"
    )
    policy_header: bool = Field(default=False, description="let a request name its policy in x-warmroute-policy")
    tokenizer: str = Field(
        default="", description="directory of the tokenizer; default: what the worker's model list names, if it is here"
    )
    chat_template: str = Field(default="", description="file with the chat template the workers were started with")
    pass_through: bool = Field(
        default=True, description="pass paths that are not known on to workers, except those that control a worker"
    )
    forward_token_ids: bool = Field(default=True, description="send token ids along, so that workers need not tokenize")
    prompt_memory_bytes: int = Field(
        default=256 << 20, ge=0, description="tokens of earlier prompts kept for each model; 0 keeps none"
    )
    assumed_cache_tokens: int = Field(
        default=1_000_000,
        ge=0,
        description="tokens sent to a worker that count as held where it does not report and its engine does not say how "
        "many fit; 0 counts nothing that was only sent",
    )
    warmup_prompts: str = Field(default="", description="file of prompts that every worker computes when it starts")
    response_headers: bool = Field(default=True, description="add x-warmroute-* headers to responses")
    max_in_flight: int = Field(default=1024, ge=1, description="requests served at once; more wait in the queue")
    max_queue: int = Field(default=1024, ge=0, description="requests that may wait; more are answered 429")
    queue_timeout: float = Field(default=30.0, gt=0, description="longest wait in the queue")
    max_body_bytes: int = Field(default=64 << 20, ge=1024, description="largest request body")
    max_bodies_bytes: int = Field(default=1 << 30, ge=1024, description="bodies held at once, all requests together")
    max_header_bytes: int = Field(default=64 << 10, ge=1024, description="largest request head")
    max_headers: int = Field(default=100, ge=1, description="most headers in a request")
    body_timeout: float = Field(default=60.0, gt=0, description="longest wait for a request's head, and for its body")
    client_timeout: float = Field(default=300.0, gt=0, description="longest stall of a client that does not read")
    connect_timeout: float = Field(default=2.0, gt=0, description="longest wait for a connection to a worker")
    first_byte_timeout: float = Field(default=600.0, gt=0, description="longest wait for a worker's first byte")
    idle_timeout: float = Field(default=120.0, gt=0, description="longest silence of a worker within a response")
    retries: int = Field(default=2, ge=0, description="other workers tried before a response has begun")
    retry_ratio: float = Field(default=0.2, ge=0, le=10, description="retries per request that the fleet has to bear")
    retry_backoff: float = Field(
        default=0.05, ge=0, le=1, description="longest wait before the first retry; it doubles"
    )
    breaker_failures: int = Field(default=5, ge=1, description="failures in a row that open a worker's breaker")
    breaker_seconds: float = Field(default=5.0, gt=0, description="how long an open breaker keeps a worker out")
    health_interval: float = Field(default=1.0, gt=0, description="time between health checks")
    health_timeout: float = Field(default=2.0, gt=0, description="longest wait for a health check")
    report_heartbeat: float = Field(default=1.0, gt=0, description="the workers' heartbeat period; three missed end it")
    verify_entries: int = Field(default=20_000, ge=0, description="index entries recounted each second")
    max_worker_chunks: int = Field(
        default=4_000_000, ge=1, description="most chunks the index takes from a worker, counted once for every tier"
    )
    recent_requests: int = Field(default=1000, ge=0, le=1_000_000, description="routing decisions kept for inspection")
    drain_timeout: float = Field(default=30.0, ge=0, description="how long requests may finish after a stop signal")
    drain_delay: float = Field(
        default=0.0, ge=0, description="how long connections are still taken after a stop signal"
    )
    drain_idle: float = Field(default=1.0, ge=0, description="how long a stopping gateway keeps idle connections open")
    api_keys_file: str = Field(default="", description="file of the keys that clients must show")
    api_keys: Secret = Field(default=SecretStr(""), description="NAME:KEY of each client, in place of a file of keys")
    open_probes: bool = Field(default=True, description="health, readiness, metrics and version need no key")
    cors_origins: str = Field(default="", description="origins of the web pages that may call the gateway; * for any")
    tls_cert: str = Field(default="", description="file of the certificate chain to serve HTTPS with")
    tls_key: str = Field(default="", description="file of its private key")
    tls_client_ca: str = Field(default="", description="file of the CAs whose certificates clients must show")
    worker_api_key: Secret = Field(
        default=SecretStr(""), description="API key of the workers that name none themselves"
    )
    worker_ca: str = Field(
        default="", description="file of the CAs of the workers' certificates; default: the system's"
    )
    worker_cert: str = Field(default="", description="file of the certificate that is shown to workers")
    worker_cert_key: str = Field(default="", description="file of its private key")
    worker_tls_verify: bool = Field(default=True, description="whether the workers' certificates are checked")
    admin_token: Secret = Field(default=SecretStr(""), description="bearer token of the admin endpoints")
    dashboard: bool = Field(
        default=True, description="serve the dashboard at `/dashboard`, and its data below `/admin`"
    )
    report_token: Secret = Field(default=SecretStr(""), description="token of the workers' report ports")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how log lines are written")
    access_log: bool = Field(default=False, description="one log line per request, without any of its text")
    processes: int = Field(default=1, ge=1, le=256, description="router processes that share the port")
    config_interval: float = Field(default=2.0, gt=0, description="time between two looks at the configuration file")
    models_interval: float = Field(default=30.0, gt=0, description="time between two looks at a worker's model list")
    otlp_traces_endpoint: str = Field(default="", description="OTLP/HTTP URL that traces are sent to; empty: no traces")
    trace_ratio: float = Field(default=1.0, ge=0, le=1, description="share of traces begun here that are recorded")
    seed: int | None = Field(default=None, description="seed of random choices, for repeatable runs")

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_from_text(cls, value: Any) -> Any:
        items = re.split(r"[\s;]+", value.strip()) if isinstance(value, str) else value
        if _is_count(items):
            raise ValueError(
                "workers are vLLM workers, each as http://HOST:PORT; to run several router processes, set processes"
            )
        if not isinstance(items, list | tuple):
            raise ValueError("workers is a list of URL[,reports=HOST:PORT][,name=NAME]")  # noqa: TRY004 - pydantic's
        return [spec for item in items if item for spec in _specs_of(item)]

    @field_validator("discover", mode="before")
    @classmethod
    def _names_from_text(cls, value: Any) -> Any:
        items = re.split(r"[\s;]+", value.strip()) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError("discover is a list of dns://NAME:PORT")  # noqa: TRY004 - pydantic's
        return [DnsSpec.parse(item) if isinstance(item, str) else item for item in items if item]

    @model_validator(mode="before")
    @classmethod
    def _names_among_workers(cls, values: Any) -> Any:
        """A ``dns://`` entry of ``workers`` belongs to ``discover``."""
        workers = values.get("workers")
        items = re.split(r"[\s;]+", workers.strip()) if isinstance(workers, str) else workers
        if not isinstance(items, list | tuple) or not any(map(is_name, items)):
            return values
        names = values.get("discover") or []
        named = re.split(r"[\s;]+", names.strip()) if isinstance(names, str) else list(names)
        return values | {
            "workers": [item for item in items if not is_name(item)],
            "discover": named + [item for item in items if is_name(item)],
        }

    @field_validator("worker_api_key")
    @classmethod
    def _key_fits_headers(cls, key: SecretStr) -> SecretStr:
        return _header_safe(key)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins_from_list(cls, value: Any) -> Any:
        return " ".join(map(str, value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _files_come_in_pairs(self) -> Self:
        for cert, key in (("tls_cert", "tls_key"), ("worker_cert", "worker_cert_key")):
            if bool(getattr(self, cert)) != bool(getattr(self, key)):
                raise ValueError(f"{cert} and {key} belong together: set both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.api_keys_file and self.api_keys.get_secret_value():
            raise ValueError("api_keys_file and api_keys exclude each other: set one of them")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        titles = [worker.title for worker in self.workers]
        twice = {title for title in titles if titles.count(title) > 1}
        if twice:
            raise ValueError(f"workers share a name: {', '.join(sorted(twice))}")
        urls = [worker.url for worker in self.workers]
        if again := {url for url in urls if urls.count(url) > 1}:
            raise ValueError(f"a worker is named once, not again: {', '.join(sorted(again))}")
        return self

    @model_validator(mode="after")
    def _pods_are_described(self) -> Self:
        _ = self.pods
        return self

    @property
    def pods(self) -> PodSpec | None:
        """The pods to look for; None where Kubernetes is not asked."""
        if not self.kubernetes_selector.strip():
            return None
        return PodSpec(
            selector=self.kubernetes_selector.strip(),
            namespace=self.kubernetes_namespace,
            port=self.kubernetes_port,
            reports=self.kubernetes_report_port,
            scheme=self.kubernetes_scheme,
            dp=self.kubernetes_ranks,
        )

    @property
    def admin_open(self) -> bool:
        """Whether the admin endpoints may be used without a token: only where no other machine reaches them."""
        return self.host in LOOPBACK

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)  # load() merges the sources itself, to name the one that is wrong


def _specs_of(item: Any) -> Sequence[Any]:
    return WorkerSpec.all_of(item) if isinstance(item, str | Mapping) else [item]


def load(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, file: str | None = None
) -> Settings:
    """Settings from flags, environment and YAML file, in this order of precedence.

    Raises:
        ConfigError: a key is unknown (the nearest valid one is named) or a value is wrong.
    """
    environ = os.environ if environ is None else environ
    file = file or environ.get(CONFIG_VARIABLE) or ""
    merged = {**(_from_file(file) if file else {}), **_from_environment(environ), **(flags or {})}
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def parse_address(text: str) -> tuple[str, int]:
    """Host and port from ``HOST:PORT``; an IPv6 host is written in brackets.

    Raises:
        ValueError: it is not that.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"an address is HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


def nearest(key: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid key most like ``key``, if any is."""
    return next(iter(difflib.get_close_matches(key, list(valid), 1, cutoff)), None)


def policy_names() -> tuple[str, ...]:
    return get_args(PolicyName)


def _from_file(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration file {path} is not YAML{_place(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not a {type(content).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in Settings.model_fields:
            raise ConfigError(f"{path}: {_unknown(key)}")
    return values


def _place(error: yaml.YAMLError) -> str:
    """Where and why, without what stands there, which may be a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f": line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    why = re.split("['\"]", getattr(error, "problem", None) or "")[0].strip()
    return f"{where}: {why}" if why else where


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        if _FOREIGN_VARIABLES.fullmatch(variable) or (key == "port" and "://" in value):
            continue
        if key in Settings.model_fields:
            values[key] = value
        elif nearest(key, Settings.model_fields, _TYPO_RATIO):
            raise ConfigError(f"environment variable {variable}: {_unknown(key)}")
        else:
            _log.debug("environment variable %s is none of the router's", variable)
    return values


def _header_safe(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("an API key is printable ASCII without spaces")
    return key


def _is_count(items: Any) -> bool:
    texts = items if isinstance(items, list | tuple) else [items]
    return bool(texts) and all(isinstance(text, int) or (isinstance(text, str) and text.isdigit()) for text in texts)


def _unknown(key: str) -> str:
    if meaning := hint(key):
        return f"unknown setting {key!r}: {meaning}"
    near = nearest(key, Settings.model_fields)
    return f"unknown setting {key!r}" + (f"; did you mean {near!r}?" if near else "")


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(dict(item)) for item in error.errors(include_url=False))


def _explain_one(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _unknown(where)
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
