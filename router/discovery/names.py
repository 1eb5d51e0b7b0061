"""How what names workers is written: ``dns://NAME:PORT`` or ``dns+srv://NAME``, and pods by their labels."""

import re
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

SCHEMES = ("dns://", "dns+srv://")
NOT_READY = "its pod is not ready"
TERMINATING = "its pod is terminating"
"""Why a worker is held."""
_PORT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


class DnsSpec(BaseModel):
    """A name to resolve again and again. ``reports`` is the workers' report port, ``none``, or empty for the usual
    one; ``port`` is 0 where SRV records name it; ``dp`` how many data-parallel ranks each address has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    port: int = 0
    kind: Literal["address", "srv"] = "address"
    reports: str = ""
    dp: int = Field(default=1, ge=1, le=64)

    @field_validator("reports")
    @classmethod
    def _reports_is_a_port(cls, reports: str) -> str:
        if reports not in ("", "none") and not (reports.isascii() and reports.isdigit() and 0 < int(reports) < 65536):
            raise ValueError(f"reports of a name is a port number or none, got {reports!r}")
        return reports

    @property
    def title(self) -> str:
        """The name as it is written in settings, without options."""
        return f"dns+srv://{self.name}" if self.kind == "srv" else f"dns://{self.name}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``dns://NAME:PORT[,reports=PORT|none][,dp=N]`` or ``dns+srv://NAME[,…]``.

        Raises:
            ValueError: a part is not understood.
        """
        url, *options = text.strip().split(",")
        parts = urlsplit(url)
        members: dict[str, Any] = {}
        for option in options:
            key, _, members[key] = option.partition("=")
        if set(members) - {"reports", "dp"}:
            raise ValueError(f"{text!r}: of a name only reports=PORT, reports=none and dp=N can be said")
        srv = parts.scheme == "dns+srv"
        if parts.scheme not in ("dns", "dns+srv") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"a name is dns://NAME:PORT or dns+srv://NAME, got {text!r}")
        if srv == (parts.port is not None):
            raise ValueError(
                f"{text!r}: SRV records name the port themselves" if srv else f"{text!r} names no port: dns://NAME:PORT"
            )
        return cls(name=parts.hostname, port=parts.port or 0, kind="srv" if srv else "address", **members)


def is_name(item: object) -> bool:
    """Whether an entry of ``workers`` is a name to resolve and not a worker."""
    return isinstance(item, str) and item.strip().startswith(SCHEMES)


class PodSpec(BaseModel):
    """Pods of a Kubernetes namespace (empty: the gateway's own) that are workers. ``port`` and ``reports`` are numbers or
    the names of container ports, ``reports`` may be ``none``; ``dp`` is how many data-parallel ranks each pod has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    selector: str
    namespace: str = ""
    port: str = "8000"
    reports: str = "5571"
    scheme: Literal["http", "https"] = "http"
    dp: int = Field(default=1, ge=1, le=64)

    @field_validator("port", "reports")
    @classmethod
    def _is_a_port(cls, port: str) -> str:
        if port.isascii() and port.isdigit():
            if not 0 < int(port) < 65536:
                raise ValueError(f"a port is a number from 1 to 65535, or a container port's name, got {port}")
        elif not _PORT_NAME.fullmatch(port) or not any(map(str.isalpha, port)):
            raise ValueError(f"a port is a number or a container port's name (a-z, 0-9 and -), got {port!r}")
        return port

    @field_validator("namespace")
    @classmethod
    def _is_a_namespace(cls, namespace: str) -> str:
        if namespace and not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"a namespace is a-z, 0-9 and -, got {namespace!r}")
        return namespace

    @property
    def title(self) -> str:
        """How the pods are called in logs, metrics and ``/admin/workers``."""
        return f"k8s://{self.namespace}/{self.selector}"
