"""The manifests as kustomize renders them, and what they say, for tests to hold against the code."""

import functools
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", *sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
WORKLOADS = frozenset({"Deployment", "StatefulSet"})
UNNAMESPACED = frozenset({"Namespace"})
NAMESPACE = "warmroute"

Manifest = dict[str, Any]


def kustomize(folder: Path) -> str:
    """What kustomize makes of a folder; the test is skipped where neither it nor kubectl is installed."""
    if (binary := shutil.which("kustomize")) is not None:
        command = [binary, "build", str(folder)]
    elif (binary := shutil.which("kubectl")) is not None:
        command = [binary, "kustomize", str(folder)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed: the manifests cannot be rendered")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _rendered(overlay: str) -> bytes:
    text = kustomize(KUBERNETES / ("base" if overlay == "base" else f"overlays/{overlay}"))
    return pickle.dumps([manifest for manifest in yaml.safe_load_all(text) if manifest])


def rendered(overlay: str) -> list[Manifest]:
    """Every manifest of an overlay, for whoever asks to keep."""
    manifests: list[Manifest] = pickle.loads(_rendered(overlay))
    return manifests


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    found = [manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} {kind} are called {name}"
    return found[0]


@dataclass(frozen=True)
class Workload:
    """Whatever makes pods: its name, the pods' labels and their spec."""

    kind: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    claims: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def containers(self) -> list[Manifest]:
        return [*self.spec["containers"], *self.spec.get("initContainers", ())]

    def ports(self) -> dict[str, int]:
        """By name; names are unique within a pod."""
        given = [port for container in self.containers() for port in container.get("ports", ())]
        assert len({port["name"] for port in given}) == len(given), f"{self}: two ports share a name"
        return {port["name"]: port["containerPort"] for port in given}

    def container(self, name: str) -> Manifest:
        return next(container for container in self.containers() if container["name"] == name)


def workloads(manifests: list[Manifest]) -> list[Workload]:
    """Those of Kubernetes, and what KServe makes of an InferenceService and its runtime."""
    found = []
    for manifest in of_kind(manifests, *WORKLOADS):
        template = manifest["spec"]["template"]
        claims = tuple(manifest["spec"].get("volumeClaimTemplates", ()))
        labels = template["metadata"]["labels"]
        found.append(Workload(manifest["kind"], manifest["metadata"]["name"], labels, template["spec"], claims))
    for service in of_kind(manifests, "InferenceService"):
        predictor = dict(service["spec"]["predictor"])
        runtime = named(manifests, "ServingRuntime", predictor.pop("model")["runtime"])
        labels = predictor.pop("labels")
        found.append(
            Workload("InferenceService", service["metadata"]["name"], labels, {**runtime["spec"], **predictor})
        )
    return found


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """A LabelSelector as Kubernetes reads it; an empty one matches everything."""
    selector = selector or {}
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In", rule
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def values(container: Mapping[str, Any], literals: Mapping[str, str]) -> dict[str, str]:
    """A container's environment, with $(NAME) replaced as the kubelet does it; what comes from elsewhere is of ``literals``
    by ``kind/name/key``."""
    found: dict[str, str] = {}
    for item in container.get("env", ()):
        if "value" in item:
            found[item["name"]] = expanded(str(item["value"]), found)
        else:
            ((kind, where),) = item["valueFrom"].items()
            key = where.get("fieldPath") or f"{where['name']}/{where['key']}"
            found[item["name"]] = literals[f"{kind}/{key}"]
    return found


def expanded(text: str, environ: Mapping[str, str]) -> str:
    """$(NAME) replaced; one that nothing defines would stay as it stands, and is an error here."""

    def value(match: re.Match[str]) -> str:
        assert match[1] in environ, f"$({match[1]}) is not defined before its use"
        return environ[match[1]]

    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", value, text)


def command(container: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """What is run."""
    return [expanded(word, environ) for word in (*container.get("command", ()), *container.get("args", ()))]


def strings(value: object) -> Iterator[str]:
    """Every string in a manifest."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def quantity(text: str | int) -> int:
    """A Kubernetes quantity of bytes."""
    match = re.fullmatch(r"(\d+)([KMGT]i)?", str(text))
    assert match, text
    return int(match[1]) * 1024 ** ("KMGT".index(match[2][0]) + 1 if match[2] else 0)
