"""Documentation is held against the code: what a user can set or read is described."""

import asyncio
import re
from pathlib import Path

import pytest

from kv_protocol import messages
from router.admission import Admission
from router.api import make_rest
from router.app import Gateway
from router.cache_control import OPERATIONS
from router.config import Settings
from router.endpoints import BY_LOAD, OWN, PROMPTS, REFUSED, REFUSED_BELOW
from router.findings import CHECKS
from router.index import Index
from router.metrics import Metrics
from router.reload import RELOADABLE
from router.workers import Registry
from worker_connector.config import SETTINGS
from worker_connector.config_names import ABSENT, ALIASES, UNNEEDED
from worker_connector.stats import FIGURES, VISION_FIGURES

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
HTTP_API = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted({*SETTINGS, *Settings.model_fields}))
def test_every_setting_has_its_heading(name: str) -> None:
    wanted = (name in SETTINGS) + (name in Settings.model_fields)
    assert CONFIGURATION.count(f"\n#### `{name}`\n") == wanted


@pytest.mark.parametrize("name", sorted({*ALIASES, *ABSENT, *UNNEEDED}))
def test_every_name_from_elsewhere_is_described(name: str) -> None:
    assert f"`{name}" in CONFIGURATION


@pytest.mark.parametrize("figure", [*FIGURES, *VISION_FIGURES], ids=lambda figure: figure.name)
def test_every_figure_of_the_connector_has_its_heading(figure: object) -> None:
    assert f"\n### `warmroute_{figure.name}" in METRICS  # type: ignore[attr-defined]


def test_every_metric_of_the_gateway_has_its_heading() -> None:
    settings = Settings()
    admission = Admission(settings.max_in_flight, settings.max_queue, settings.queue_timeout, settings.max_bodies_bytes)
    shown = Metrics(Registry(), Index(), admission).render().decode()
    names = {name for name in re.findall(r"^# HELP (\S+)", shown, re.MULTILINE) if not name.endswith("_created")}
    assert len(names) > 25
    own = {name for name in names if name.startswith("warmroute_")}
    assert not [name for name in sorted(own) if f"\n### `{name}`\n" not in METRICS]
    assert not [name for name in sorted(names - own) if f"`{name}`" not in METRICS]


@pytest.mark.parametrize("path", sorted({*PROMPTS, *BY_LOAD, *OWN}))
def test_every_endpoint_has_its_heading(path: str) -> None:
    assert f"### `{path}`\n" in HTTP_API


def test_every_route_of_the_application_has_its_heading() -> None:
    async def served() -> set[str]:
        return {getattr(route, "path", "") for route in make_rest(Gateway(Settings())).routes}

    shown = {"/v1/models/{model:path}", "/dashboard/{name:path}"}  # below a heading, in its text
    paths = asyncio.run(served()) - shown
    assert len(paths) > 20
    assert not [path for path in sorted(paths) if f"\n### `{path}`\n" not in HTTP_API]


@pytest.mark.parametrize("path", sorted({*REFUSED, *REFUSED_BELOW}))
def test_every_path_that_is_never_passed_on_is_named_with_its_reason(path: str) -> None:
    why = REFUSED.get(path) or REFUSED_BELOW[path]
    assert f"| `{path}{'*' if path in REFUSED_BELOW else ''}` | {why} |\n" in HTTP_API


def test_every_message_of_the_report_protocol_is_described_with_its_fields() -> None:
    page = (ROOT / "docs" / "report-protocol.md").read_text(encoding="utf-8")
    kinds = {kind.__struct_config__.tag: kind for kind in vars(messages).values() if hasattr(kind, "__struct_config__")}
    described = {str(tag): kind for tag, kind in kinds.items() if tag is not None}
    assert len(described) > 10
    for tag, kind in described.items():
        said = "".join(re.findall(rf"^.*\b{tag}\b.*$", page, re.MULTILINE))
        assert not [name for name in kind.__struct_fields__ if not re.search(rf"\b{name}\b", said)], tag


@pytest.mark.parametrize("name", ["operations.md", "report-protocol.md"])
def test_every_operation_on_caches_is_described(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert [operation for operation in OPERATIONS if f"\n| `{operation}` | " not in page] == []


def test_every_check_of_the_doctor_has_a_heading() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\S+)$", page, re.MULTILINE)) == set(CHECKS)


def test_every_setting_that_can_be_changed_while_running_is_named() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    listed = page.partition("These can be changed: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == RELOADABLE
