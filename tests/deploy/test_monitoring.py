"""Rules, adapter and dashboard name series that exist, and every alert has its cure."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, OVERLAYS, ROOT, matches, named, of_kind, rendered, workloads
from tests.deploy.metric_names import asked, exposed, grouped, wrong

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "warmroute.json"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"] if "record" in rule}
LABELS_OF_RECORDED = {name: grouped(expression) - {"le"} for name, expression in RECORDED.items()}
PANELS = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: install it (Debian: apt-get install prometheus)"
)


def promtool(*arguments: str, folder: Path) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_series_are_known() -> None:
    """What the other tests hold expressions against is not empty, and they can fail."""
    assert exposed()["warmroute_router_requests_total"] == {"worker", "model", "status"}
    assert exposed()["warmroute_router_ttft_seconds_bucket"] == {"worker", "le"}
    assert exposed()["warmroute_router_worker_breaker_state"] == {"worker", "state"}
    assert exposed()["warmroute_held_chunks"] >= {"tier", "engine"}
    assert wrong("sum by (tier) (warmroute_router_worker_up)") == ["nothing here has a label tier"]
    assert wrong('warmroute_router_worker_up{wroker="x"}') == ["warmroute_router_worker_up has no label wroker"]
    assert wrong("rate(warmroute_router_requests[5m])") == ["nobody exposes warmroute_router_requests"]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_exists(rule: dict[str, Any]) -> None:
    assert asked(rule["expr"])
    assert wrong(rule["expr"], LABELS_OF_RECORDED) == []


@pytest.mark.parametrize("name", RECORDED)
def test_recording_rules_ask_for_what_exists(name: str) -> None:
    assert wrong(RECORDED[name], LABELS_OF_RECORDED) == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_its_cure(rule: dict[str, Any]) -> None:
    (cure,) = re.findall(rf"^### {rule['alert']}\n\n(.*?)(?=\n#|\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert len(cure.split()) > 12
    assert rule["annotations"]["runbook_url"].endswith(f"docs/operations.md#{rule['alert'].lower()}")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"]):
        assert label in grouped(rule["expr"]) | set().union(
            *(LABELS_OF_RECORDED.get(series.name, frozenset()) for series in asked(rule["expr"]))
        )


def test_no_cure_without_an_alert() -> None:
    written = set(re.findall(r"^### (Warmroute\w+)$", OPERATIONS, re.MULTILINE))
    assert written == {rule["alert"] for rule in ALERTS}


def test_the_operators_rules_are_the_same() -> None:
    manifest = yaml.safe_load((KUBERNETES / "components" / "monitoring" / "rules.yaml").read_text(encoding="utf-8"))
    assert manifest["spec"]["groups"] == GROUPS


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    promtool("check", "rules", str(RULES), folder=PROMETHEUS)


@needs_promtool
@pytest.mark.parametrize("cases", ["alerts_test.yaml", "alerts_of_days_test.yaml"])
def test_alerts_fire_when_they_should_and_not_otherwise(cases: str, tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path / "rules.yaml")
    shutil.copy(Path(__file__).parent / cases, tmp_path / cases)
    promtool("test", "rules", cases, folder=tmp_path)


@needs_promtool
def test_prometheus_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__rate_interval", "5m", query)}
        for number, query in enumerate(queries)
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "rules.yaml", folder=tmp_path)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_show_what_exists(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        assert asked(expression)
        assert wrong(expression) == []
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            sources = set().union(*(exposed()[series.name] for series in asked(expression)))
            assert label in grouped(expression) or (not grouped(expression) and label in sources | {"instance"})
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert "id" not in dashboard, "an id of another Grafana would overwrite something"
    assert dashboard["title"] == "warmroute"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(dashboard["panels"]))) - {"__rate_interval"}
    assert used <= variables.keys()
    for variable in variables.values():
        if variable["type"] == "query":
            assert wrong(variable["definition"]) == []
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_part_of_the_fleet_has_its_row() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == [
        "At a glance",
        "Traffic",
        "Time to first token",
        "Hit rate by tier",
        "Predicted and actual",
        "Trust in the index",
        "Queue and load",
        "Breakers and retries",
        "Tiers",
        "Stores",
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_scale_by_what_the_adapter_makes(overlay: str) -> None:
    rules = yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text(encoding="utf-8"))["rules"]
    made = {rule["name"]["as"]: rule for rule in rules}
    services = {service["metadata"]["name"] for service in of_kind(rendered(overlay), "Service")}
    for rule in rules:
        assert wrong(rule["seriesQuery"]) == []
        assert rule["resources"]["overrides"].keys() == {"namespace", "service"}
    used = set()
    for scaler in of_kind(rendered(overlay), "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] == "Object":
                assert metric["object"]["metric"]["name"] in made
                assert metric["object"]["describedObject"]["kind"] == "Service"
                assert metric["object"]["describedObject"]["name"] in services
                used.add(metric["object"]["metric"]["name"])
    if overlay == "base":
        assert used == made.keys()


@needs_promtool
def test_prometheus_accepts_what_the_adapter_asks(tmp_path: Path) -> None:
    rules = []
    for rule in yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text(encoding="utf-8"))["rules"]:
        series = rule["seriesQuery"].partition("{")[0]
        query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "service")
        query = query.replace("<<.LabelMatchers>>", 'namespace="warmroute", service="warmroute"')
        assert "<<" not in query
        rules.append({"record": f"adapter:{len(rules)}", "expr": query})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))
    promtool("check", "rules", "rules.yaml", folder=tmp_path)


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay != "base"])
def test_monitors_find_routers_and_engines(overlay: str) -> None:
    manifests = rendered(overlay)
    monitor = named(manifests, "ServiceMonitor", "warmroute-router")
    services = [
        s for s in of_kind(manifests, "Service") if matches(monitor["spec"]["selector"], s["metadata"]["labels"])
    ]
    pods = workloads(manifests)
    found = {
        made.component
        for made in pods
        for s in services
        if matches({"matchLabels": s["spec"]["selector"]}, made.labels)
    }
    assert found == {made.component for made in pods if made.component.endswith("router")}
    for endpoint in monitor["spec"]["endpoints"]:
        assert all(endpoint["port"] in {port["name"] for port in s["spec"]["ports"]} for s in services)
        assert endpoint["path"] == "/metrics"
    monitor = named(manifests, "PodMonitor", "warmroute-worker")
    engines = [made for made in pods if matches(monitor["spec"]["selector"], made.labels)]
    assert {made.component for made in engines} == {"worker", "prefill"} & {made.component for made in pods}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert all(endpoint["port"] in made.ports() for made in engines)
