"""Every manifest, as kustomize renders it: valid for Kubernetes, and whole in itself."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import (
    KUBERNETES,
    NAMESPACE,
    OVERLAYS,
    ROOT,
    UNNAMESPACED,
    Workload,
    matches,
    of_kind,
    quantity,
    rendered,
    strings,
    workloads,
)

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate (dev)")

NEWEST = sorted(
    {".".join(version.split(".")[:2]) for version in kubernetes_validate.utils.all_versions()},
    key=lambda minor: [int(part) for part in minor.split(".")],
)[-2:]
# Kinds that come with operators, and the version of their API that the manifests are written for: the Prometheus
# operator's monitoring.coreos.com/v1, Gateway API v1 (1.0 and later; timeouts from 1.1), KServe 0.15.
FOREIGN = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ServingRuntime": "serving.kserve.io/v1alpha1",
    "InferenceService": "serving.kserve.io/v1beta1",
}
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def pods(overlay: str) -> list[Workload]:
    return workloads(rendered(overlay))


@every_overlay
@pytest.mark.parametrize("version", NEWEST)
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    checked = 0
    for manifest in rendered(overlay):
        if manifest["kind"] in FOREIGN:
            assert manifest["apiVersion"] == FOREIGN[manifest["kind"]]
            continue
        kubernetes_validate.utils.validate(manifest, version, strict=True)
        checked += 1
    assert checked > 10


def test_two_minors_are_checked() -> None:
    assert len(set(NEWEST)) == 2
    assert all(kubernetes_validate.utils.validate(of_kind(rendered("base"), "Service")[0], v) == v for v in NEWEST)


def test_an_invalid_manifest_is_found() -> None:
    (service, *_) = of_kind(rendered("base"), "Service")
    service["spec"]["ports"][0]["tragetPort"] = "http"
    with pytest.raises(kubernetes_validate.utils.ValidationError):
        kubernetes_validate.utils.validate(service, NEWEST[-1], strict=True)


def test_what_kserve_makes_of_its_kinds_would_be_valid_pods() -> None:
    """A runtime and a predictor are a pod's spec, but for what is KServe's own."""
    (made,) = [workload for workload in pods("kserve") if workload.kind == "InferenceService"]
    own = {"supportedModelFormats", "minReplicas", "maxReplicas"}
    spec = {name: value for name, value in made.spec.items() if name not in own}
    assert own <= made.spec.keys()
    assert [container["name"] for container in spec["containers"]] == ["kserve-container"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "made", "labels": dict(made.labels)}, "spec": spec}
    for version in NEWEST:
        kubernetes_validate.utils.validate(pod, version, strict=True)


@every_overlay
def test_names_are_unique_and_everything_is_in_one_namespace(overlay: str) -> None:
    manifests = rendered(overlay)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)
    for manifest in manifests:
        if manifest["kind"] not in UNNAMESPACED:
            assert manifest["metadata"]["namespace"] == NAMESPACE
    assert ("Namespace", NAMESPACE) in names


@every_overlay
def test_no_secret_is_checked_in(overlay: str) -> None:
    assert not of_kind(rendered(overlay), "Secret")


def _selectors(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Label selectors that are meant for pods."""
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Service":
            return [{"matchLabels": spec["selector"]}]
        case "PodDisruptionBudget" | "PodMonitor":
            return [spec["selector"]]
        case "Deployment" | "StatefulSet":
            spread = spec["template"]["spec"]["topologySpreadConstraints"]
            return [spec["selector"], *(rule["labelSelector"] for rule in spread)]
        case "NetworkPolicy":
            rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
            peers = [peer for rule in rules for peer in (*rule.get("from", ()), *rule.get("to", ()))]
            return [spec["podSelector"], *(peer["podSelector"] for peer in peers if "podSelector" in peer)]
    return []


@every_overlay
def test_every_selector_matches_pods(overlay: str) -> None:
    for manifest in rendered(overlay):
        for selector in _selectors(manifest):
            assert selector, manifest["metadata"]["name"]
            assert any(matches(selector, made.labels) for made in pods(overlay)), (manifest["metadata"], selector)


@every_overlay
def test_every_workload_selects_its_own_pods_and_no_others(overlay: str) -> None:
    for manifest in of_kind(rendered(overlay), "Deployment", "StatefulSet"):
        selected = [made.name for made in pods(overlay) if matches(manifest["spec"]["selector"], made.labels)]
        assert selected == [manifest["metadata"]["name"]]


@every_overlay
def test_every_service_finds_one_workload_and_its_ports(overlay: str) -> None:
    for service in of_kind(rendered(overlay), "Service"):
        (made,) = [each for each in pods(overlay) if matches({"matchLabels": service["spec"]["selector"]}, each.labels)]
        for port in service["spec"]["ports"]:
            number = made.ports().get(port["targetPort"], port["targetPort"])
            assert number in made.ports().values(), (service["metadata"]["name"], port)
            if service["spec"].get("clusterIP") == "None":
                assert port["port"] == number, "a headless service translates no port"


@every_overlay
def test_stateful_pods_have_the_headless_service_they_are_named_by(overlay: str) -> None:
    services = {service["metadata"]["name"]: service for service in of_kind(rendered(overlay), "Service")}
    for manifest in of_kind(rendered(overlay), "StatefulSet"):
        service = services[manifest["spec"]["serviceName"]]
        assert service["spec"]["clusterIP"] == "None"
        assert matches({"matchLabels": service["spec"]["selector"]}, manifest["spec"]["template"]["metadata"]["labels"])


@every_overlay
def test_every_workload_has_a_budget_and_several_pods(overlay: str) -> None:
    budgets = of_kind(rendered(overlay), "PodDisruptionBudget")
    scaled = {
        (each["scaleTargetRef"]["kind"], each["scaleTargetRef"]["name"]): each["minReplicas"]
        for each in (scaler["spec"] for scaler in of_kind(rendered(overlay), "HorizontalPodAutoscaler"))
    }
    for made in pods(overlay):
        assert sum(matches(budget["spec"]["selector"], made.labels) for budget in budgets) == 1, made
        manifest = next(m for m in rendered(overlay) if (m["kind"], m["metadata"]["name"]) == (made.kind, made.name))
        least = scaled.get((made.kind, made.name)) or manifest["spec"].get("replicas")
        assert (least or manifest["spec"]["predictor"]["minReplicas"]) >= 2, made
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == 1


@every_overlay
def test_pods_are_as_safe_as_they_can_be(overlay: str) -> None:
    for made in pods(overlay):
        whole = made.spec.get("securityContext", {})
        for container in made.containers():
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own.get("runAsNonRoot", whole.get("runAsNonRoot")) is True
            assert own.get("runAsUser", whole.get("runAsUser")) > 0
            assert own.get("seccompProfile", whole.get("seccompProfile")) == {"type": "RuntimeDefault"}
            assert any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", ())) or (
                container["image"].split(":")[0].endswith(("valkey", "routing-sidecar"))
            )
        assert made.spec.get("enableServiceLinks", False) is False or made.kind == "InferenceService"
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            assert not made.spec.get(name)
        assert made.spec["automountServiceAccountToken"] is made.component.endswith("router"), made


@every_overlay
def test_every_container_says_what_it_needs_and_how_it_is(overlay: str) -> None:
    for made in pods(overlay):
        for container in made.containers():
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert quantity(container["resources"]["limits"]["memory"]) >= quantity(
                container["resources"]["requests"]["memory"]
            )
            assert "cpu" not in container["resources"]["limits"], "a limit throttles the event loop"
            runs_on = container in made.spec["containers"] or container.get("restartPolicy") == "Always"
            assert {"startupProbe", "livenessProbe"} <= container.keys() or not runs_on, container["name"]
        assert any("readinessProbe" in container for container in made.containers())


@every_overlay
def test_every_volume_is_mounted_and_every_mount_has_a_volume(overlay: str) -> None:
    for made in pods(overlay):
        volumes = [volume["name"] for volume in made.spec.get("volumes", ())]
        volumes += [claim["metadata"]["name"] for claim in made.claims]
        mounted = {mount["name"] for container in made.containers() for mount in container.get("volumeMounts", ())}
        assert sorted(volumes) == sorted(mounted), made
        for container in made.containers():
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(set(paths)) == len(paths)
            assert all("subPath" not in mount for mount in container.get("volumeMounts", ()))


def _references(made: Workload) -> set[tuple[str, str, str]]:
    """(kind, name, key) of what pods read of ConfigMaps and Secrets; key empty for all of it."""
    found = set()
    for volume in made.spec.get("volumes", ()):
        if config := volume.get("configMap"):
            found.add(("ConfigMap", config["name"], ""))
        if secret := volume.get("secret"):
            found |= {("Secret", secret["secretName"], item["key"]) for item in secret.get("items", [{"key": ""}])}
    for container in made.containers():
        for item in container.get("env", ()):
            source = item.get("valueFrom", {})
            for kind, name in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if where := source.get(kind):
                    found.add((name, where["name"], where["key"]))
    return found


@every_overlay
def test_config_maps_exist_and_secrets_are_those_the_documentation_makes(overlay: str) -> None:
    manifests = rendered(overlay)
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind(manifests, "ConfigMap")}
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for made in pods(overlay):
        for kind, name, key in _references(made):
            if kind == "ConfigMap":
                assert name in maps, (made, name)
                assert not key or key in maps[name], (made, name, key)
            else:
                (section,) = re.findall(rf"create secret generic {name}\b((?:[^\n]*\\\n)*[^\n]*)", text) or [""]
                assert not key or f"{key}=" in section, f"docs/kubernetes.md does not make {key} of the secret {name}"


@every_overlay
def test_scaling_has_a_target_and_bounds(overlay: str) -> None:
    manifests = rendered(overlay)
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        (made,) = [each for each in pods(overlay) if (each.kind, each.name) == (target["kind"], target["name"])]
        (manifest,) = [m for m in of_kind(manifests, target["kind"]) if m["metadata"]["name"] == target["name"]]
        assert "replicas" not in manifest["spec"], "every apply would set it again, whatever was scaled to"
        assert 2 <= scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] == "ContainerResource":
                container = made.container(metric["containerResource"]["container"])
                assert metric["containerResource"]["name"] in container["resources"]["requests"]


@every_overlay
def test_images_are_ours_or_named_with_a_version(overlay: str) -> None:
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    for made in pods(overlay):
        for container in made.containers():
            name, _, tag = container["image"].rpartition(":")
            assert re.fullmatch(r"v?\d+(\.\d+)+(-alpine)?", tag), container["image"]
            if "warmroute" in name:
                assert tag == version[1]


def test_our_images_are_what_the_dockerfile_builds() -> None:
    dockerfile = ROOT / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("no Dockerfile here")
    targets = set(re.findall(r"^FROM\s+\S+\s+AS\s+(\S+)", dockerfile.read_text(), re.MULTILINE | re.IGNORECASE))
    images = {
        container["image"].rpartition(":")[0].rpartition("/")[2]
        for overlay in OVERLAYS
        for made in pods(overlay)
        for container in made.containers()
    }
    ours = {image.removeprefix("warmroute-") for image in images if image.startswith("warmroute-")}
    assert ours == {"router", "worker"} <= targets


@every_overlay
def test_no_placeholder_is_left(overlay: str) -> None:
    for text in strings(rendered(overlay)):
        assert not re.search(r"\b(TODO|FIXME|CHANGEME|xxx)\b", text), text


def test_every_overlay_is_described() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for overlay in OVERLAYS[1:]:
        assert f"`overlays/{overlay}`" in text


def test_routes_lead_to_a_port_of_the_front_door() -> None:
    for overlay in OVERLAYS:
        services = {s["metadata"]["name"]: s for s in of_kind(rendered(overlay), "Service")}
        for route in of_kind(rendered(overlay), "HTTPRoute"):
            for rule in route["spec"]["rules"]:
                assert rule["timeouts"]["request"] == "0s", "answers may take long"
                for backend in rule["backendRefs"]:
                    ports = {port["port"] for port in services[backend["name"]]["spec"]["ports"]}
                    assert backend["port"] in ports
                for match in rule["matches"]:
                    assert match["path"]["type"] in ("PathPrefix", "Exact")
                    assert not match["path"]["value"].startswith(("/admin", "/metrics", "/dashboard"))
                    assert match["path"]["value"] != "/", "the admin endpoints stay within the cluster"


def test_every_folder_is_rendered() -> None:
    """No file lies about that no kustomization names."""
    named_files = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        for text in strings(content):
            named_files.add((path.parent / text.rpartition("=")[2]).resolve())
    for path in KUBERNETES.rglob("*"):
        if path.is_file() and path.name not in ("kustomization.yaml", "README.md"):
            assert path.resolve() in named_files, path
