"""How Sphinx builds these pages: `make docs`."""

from typing import Any

from docutils import nodes

project = "warmroute"
author = "The warmroute authors"
copyright = author  # noqa: A001 - Sphinx's name
html_title = project

extensions = ["myst_parser"]
nitpicky = True

myst_heading_anchors = 4  # as GitHub makes them, so that links hold in both places
myst_links_external_new_tab = False
suppress_warnings = [
    "myst.header",  # a page may begin its levels where its reader needs them
    "misc.highlighting_failure",  # an ellipsis stands for what an example leaves out
]

html_theme = "furo"
html_static_path: list[str] = []
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    # Fonts of the reader's own machine: a page asks no other host for anything.
    "light_css_variables": {"font-stack": "system-ui, sans-serif", "font-stack--monospace": "ui-monospace, monospace"},
    "top_of_page_buttons": [],
}


def setup(app: Any) -> None:
    """Links that name a page by its file, as they are read in the repository, show the page's title."""
    app.connect("doctree-resolved", _show_titles)


def _show_titles(app: Any, page: nodes.document, _name: str) -> None:
    for link in page.findall(nodes.reference):
        title = app.env.titles.get(link.astext().removeprefix("docs/").removesuffix(".md"))
        if title is not None and link.astext().endswith(".md"):
            link.children = [nodes.Text(title.astext())]
