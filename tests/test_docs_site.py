"""The pages as a site: built strictly, with links that hold, nothing from other hosts, and reference pages as the code is."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from router.config import policy_names
from worker_connector.config import SETTINGS
from worker_connector.config_names import ABSENT, ALIASES, UNNEEDED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MISSING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(MISSING), reason=f"pip install 'warmroute[docs]': {', '.join(MISSING)} missing")
_FETCHED = {
    "audio": "src", "embed": "src", "iframe": "src", "image": "href", "img": "src", "input": "src", "object": "data",
    "script": "src", "source": "src", "track": "src", "use": "href", "video": "src",
}  # fmt: skip
"""Elements that a browser fetches for, and where they say what."""
_FETCHED_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "modulepreload",
    "manifest",
}


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-d", str(site) + ".doctrees"]
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", *options, str(source), str(site)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("docs") / "site"
    done = build(DOCS, site)
    assert done.returncode == 0, done.stderr
    return site


class Page(HTMLParser):
    """What a built page fetches, links to, and can be linked to by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: set[str] = set()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.add(has["href"])
        if tag in _FETCHED and _FETCHED[tag] in has:
            self.fetched.add(has[_FETCHED[tag]])
        if tag == "link" and _FETCHED_LINKS & set(has.get("rel", "").split()):
            self.fetched.add(has["href"])


def built(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


@needs_sphinx
def test_every_page_is_built_and_reached_from_the_first(site: Path) -> None:
    pages = {page.stem for page in DOCS.glob("*.md")}
    first = Page(site / "index.html")
    reached = {urlsplit(link).path.removesuffix(".html") for link in first.links}
    assert len(pages) > 25
    assert pages - reached - {"index"} == set()


@needs_sphinx
def test_links_and_anchors_of_built_pages_lead_somewhere(site: Path) -> None:
    pages = built(site)
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            found = target.exists() and (not parts.fragment or unquote(parts.fragment) in anchors)
            broken += [] if is_elsewhere(link) or found else [f"{path.name}: {link}"]
    assert not broken


@needs_sphinx
def test_built_pages_ask_no_other_host_for_anything(site: Path) -> None:
    pages = built(site)
    fetched = {address for page in pages.values() for address in page.fetched}
    assert any(address.split("?")[0].endswith(".css") for address in fetched)
    assert not [address for address in fetched if is_elsewhere(address)]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        asked = re.findall(r"""(?:url\(|@import\s+)["']?([^"')\s]+)""", text)
        assert not [address for address in asked if is_elsewhere(address)], style.name


@needs_sphinx
def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_bytes((DOCS / "conf.py").read_bytes())
    (source / "tiers.md").write_text("---\norphan: true\n---\n# Tiers\n")
    (source / "index.md").write_text("# Pages\n\n[x](tiers.md#tiers)\n")
    assert build(source, tmp_path / "well").returncode == 0
    spoilt = ("no-such-page.md", "tiers.md#no-such-heading", "images/no-such.svg")
    (source / "index.md").write_text("# Pages\n\n[x]({})\n\n[x]({})\n\n![x]({})\n".format(*spoilt))
    done = build(source, tmp_path / "spoilt")
    assert done.returncode != 0
    assert [each for each in spoilt if each.split("#")[-1] not in done.stderr] == []


def anchors(page: Path) -> set[str]:
    """Headings of a page as GitHub names them."""
    found: list[str] = []
    for title in re.findall(
        r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.append(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    again = {f"{name}-{n}" for name in found for n in range(1, found.count(name))}
    return set(found) | again


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def links(page: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if not is_elsewhere(target) and not target.startswith("mailto:"):
            path, _, fragment = target.partition("#")
            yield path, fragment


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("C*.md")), *sorted(DOCS.glob("*.md"))], ids=str)
def test_links_of_sources_lead_somewhere(page: Path) -> None:
    """As they are read where the repository is shown, beside the files that are no pages."""
    for path, fragment in links(page):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), f"{page.name} links to {path}#{fragment}, which is no heading"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_as_the_code_is(reference: ModuleType) -> None:
    stale = [page.name for page, text in reference.pages() if read(page) != text]
    assert not stale, "run: make docs-reference"


def test_every_entry_of_a_reference_page_says_something(reference: ModuleType) -> None:
    for page, _ in reference.pages():
        for part in re.split(r"^(?=#)", read(page), flags=re.MULTILINE):
            if re.match(r"#+ `", part):
                assert len(part.strip().split("\n\n")) >= 3, f"{page.name}: {part.splitlines()[0]}"


def test_what_people_wrote_stays_and_what_the_code_says_is_made_anew(reference: ModuleType) -> None:
    entries = {"": [reference.Entry("old", "Default: 2", "said"), reference.Entry("fresh", "Default: 3", "Said.")]}
    page = "\n### `old`\n\nDefault: 1\n\nBy hand.\n\nMore.\n\n### `gone`\n\nDefault: 0\n\nNothing.\n"
    made = reference._region(page, entries)
    assert made == "\n### `old`\n\nDefault: 2\n\nBy hand.\n\nMore.\n\n### `fresh`\n\nDefault: 3\n\nSaid.\n\n"


def test_every_command_has_its_heading(reference: ModuleType) -> None:
    commands = reference._commands()
    page = read(DOCS / "cli.md")
    assert {"serve", "worker", "cache lookup", "keys add"} <= set(commands)
    assert not [name for name in commands if f"\n## `warmroute {name}`\n" not in page]


def test_what_migrating_says_is_here_is_here(reference: ModuleType) -> None:
    """Flags and settings in the last column of its tables, and names that are said to be read."""
    commands = reference._commands().values()
    flags = {name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)}
    settings = {*reference.SETTINGS, *reference.Settings.model_fields}
    rows = re.findall(r"^\|.*\| (.*) \|$", read(DOCS / "migrating.md"), flags=re.MULTILINE)
    said = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    assert len(said) > 60
    named = {re.split(r"[ =:]", word)[0] for word in said}
    assert {flag for flag in named if flag.startswith("--")} - flags == {
        "--served-model-name",
        "--tensor-parallel-size",
    }
    assert {name for name in named if re.fullmatch(r"[a-z]+(_[a-z]+)+", name)} - settings == set()
    policies = {word.split()[1] for word in said if re.fullmatch(r"--policy [a-z-]+", word)}
    assert policies <= set(policy_names())
    folders = {word for word in said if word.startswith("deploy/")}
    assert folders
    assert all((ROOT / folder).exists() for folder in folders)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(LMCACHE_\w+)`", (DOCS / "migrating.md").read_text()))))
def test_variables_that_migrating_names_are_read(name: str) -> None:
    known = {*SETTINGS, *ALIASES, *ABSENT, *UNNEEDED, "config_file"}
    assert name.removeprefix("LMCACHE_").lower() in known


def test_commands_that_pages_name_are_there(reference: ModuleType) -> None:
    commands = set(reference._commands())
    groups = {name.split()[0] for name in commands}
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        code = " ".join(re.findall(r"^```.*?^```|`[^`\n]+`", read(page), flags=re.MULTILINE | re.DOTALL))
        called = re.findall(r"(?:^|[`$&]\s*|-- )warmroute ([a-z]+)(?: ([a-z]+))?", code, flags=re.MULTILINE)
        unknown = [name for name, _ in called if name not in groups]
        unknown += [f"{name} {sub}" for name, sub in called if sub and name in {"cache", "keys"}
                    and f"{name} {sub}" not in commands]  # fmt: skip
        assert not unknown, page.name
