"""Network policies, evaluated as a network plugin does: what must pass does, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.deploy.manifests import OVERLAYS, Workload, matches, of_kind, rendered, workloads

PROMETHEUS = "monitoring"
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@dataclass(frozen=True)
class Peer:
    """Somebody elsewhere: in another namespace, or outside the cluster where that is empty."""

    namespace: str


def _admits(peers: list[dict[str, Any]] | None, who: Workload | Peer) -> bool:
    if not peers:
        return True
    for peer in peers:
        if isinstance(who, Workload):
            if "podSelector" in peer and "namespaceSelector" not in peer and matches(peer["podSelector"], who.labels):
                return True
        elif "namespaceSelector" in peer and "podSelector" not in peer:
            labels = {"kubernetes.io/metadata.name": who.namespace}
            if who.namespace and matches(peer["namespaceSelector"], labels):
                return True
    return False


def _opens(ports: list[dict[str, Any]] | None, port: int, protocol: str, named: Mapping[str, int]) -> bool:
    if not ports:
        return True
    for rule in ports:
        wanted = rule["port"]
        number = named.get(wanted) if isinstance(wanted, str) else wanted
        if number == port and rule.get("protocol", "TCP") == protocol:
            return True
    return False


def _one_way(
    overlay: str,
    made: Workload,
    direction: str,
    other: Workload | Peer,
    *,
    port: int,
    protocol: str,
    ports: Mapping[str, int],
) -> bool:
    policies = [
        policy["spec"]
        for policy in of_kind(rendered(overlay), "NetworkPolicy")
        if matches(policy["spec"]["podSelector"], made.labels) and direction in policy["spec"]["policyTypes"]
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    end = "from" if direction == "Ingress" else "to"
    return not policies or any(
        _admits(rule.get(end), other) and _opens(rule.get("ports"), port, protocol, ports) for rule in rules
    )


def passes(
    overlay: str, source: Workload | Peer, target: Workload | Peer, port: int | str, protocol: str = "TCP"
) -> bool:
    """Whether a connection is let out and let in."""
    names = target.ports() if isinstance(target, Workload) else {}
    number = names[port] if isinstance(port, str) else port
    out = not isinstance(source, Workload) or _one_way(
        overlay, source, "Egress", target, port=number, protocol=protocol, ports=names
    )
    into = not isinstance(target, Workload) or _one_way(
        overlay, target, "Ingress", source, port=number, protocol=protocol, ports=names
    )
    return out and into


def by_component(overlay: str) -> dict[str, Workload]:
    return {made.component: made for made in workloads(rendered(overlay))}


@every_overlay
def test_every_pod_is_covered_in_both_directions(overlay: str) -> None:
    policies = [policy["spec"] for policy in of_kind(rendered(overlay), "NetworkPolicy")]
    for made in workloads(rendered(overlay)):
        covered = {
            direction
            for policy in policies
            if matches(policy["podSelector"], made.labels)
            for direction in policy["policyTypes"]
        }
        assert covered == {"Ingress", "Egress"}, made


@every_overlay
def test_ports_exist_where_they_are_opened(overlay: str) -> None:
    """Named ones in ordinary containers: older network plugins do not look for names among init containers."""
    made = workloads(rendered(overlay))

    def named(each: Workload) -> set[str]:
        return {port.get("name", "") for container in each.spec["containers"] for port in container.get("ports", ())}

    def opened(each: Workload, port: int | str) -> bool:
        return port in named(each) or port in each.ports().values()

    for policy in of_kind(rendered(overlay), "NetworkPolicy"):
        spec = policy["spec"]
        targets = [each for each in made if matches(spec["podSelector"], each.labels)]
        for rule in spec.get("ingress", ()):
            for port in rule.get("ports", ()):
                assert all(opened(each, port["port"]) for each in targets), (policy["metadata"]["name"], port)
        for rule in spec.get("egress", ()):
            peers = [peer["podSelector"] for peer in rule.get("to", ()) if "podSelector" in peer]
            reached = [each for each in made if any(matches(peer, each.labels) for peer in peers)]
            for port in rule.get("ports", ()):
                if isinstance(port["port"], str):
                    assert any(port["port"] in named(each) for each in reached), (policy["metadata"]["name"], port)


@every_overlay
def test_what_the_fleet_needs_passes(overlay: str) -> None:
    made = by_component(overlay)
    outside, monitoring = Peer(""), Peer(PROMETHEUS)
    pairs = [("router", "worker")] + ([("prefill-router", "prefill")] if "prefill" in made else [])
    for front, engine in pairs:
        assert passes(overlay, made[front], made[engine], "http")
        if "reports" in made[engine].ports():
            assert passes(overlay, made[front], made[engine], "reports")
        for api in (443, 6443):
            assert passes(overlay, made[front], outside, api), "the Kubernetes API"
        for each in (made[front], made[engine]):
            assert passes(overlay, monitoring, each, "http")
            assert passes(overlay, each, outside, 443), "the model hub"
    for each in made.values():
        assert passes(overlay, each, outside, 53, "UDP")
        assert passes(overlay, each, outside, 53, "TCP")


@every_overlay
def test_clients_reach_the_front_door_and_nothing_behind_it(overlay: str) -> None:
    made = by_component(overlay)
    behind_gateway = overlay == "disaggregated"
    assert passes(overlay, Peer("gateway-system"), made["router"], "http")
    assert passes(overlay, Peer("somebody"), made["router"], "http") is not behind_gateway
    for component, each in made.items():
        if component != "router":
            for port in each.ports():
                assert not passes(overlay, Peer("somebody"), each, port), (component, port)


@every_overlay
def test_prometheus_reads_metrics_and_not_reports(overlay: str) -> None:
    for each in by_component(overlay).values():
        for port in each.ports():
            expected = port == "http"
            assert passes(overlay, Peer(PROMETHEUS), each, port) is expected, (each, port)


def test_workers_reach_the_store_and_only_they_do() -> None:
    made = by_component("shared-valkey")
    store = made["valkey"]
    for port in ("valkey", "sentinel"):
        assert passes("shared-valkey", made["worker"], store, port)
        assert passes("shared-valkey", store, store, port)
        assert not passes("shared-valkey", made["router"], store, port)
    assert not passes("shared-valkey", made["router"], made["router"], 6379)


def test_prefill_and_decode_reach_each_other_and_sidecars_nothing_else() -> None:
    made = by_component("disaggregated")
    assert passes("disaggregated", made["worker"], made["prefill-router"], "http")
    for port in (5600, 40_000):
        assert passes("disaggregated", made["worker"], made["prefill"], port)
        assert passes("disaggregated", made["prefill"], made["worker"], port), "NIXL connects back"
    assert not passes("disaggregated", made["prefill"], made["router"], "http")
    assert not passes("disaggregated", made["worker"], made["router"], "http")
    assert not passes("disaggregated", made["worker"], Peer(""), 8000)
    assert not passes("disaggregated", made["router"], made["prefill"], "http")
