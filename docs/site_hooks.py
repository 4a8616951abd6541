"""For mkdocs: shows on the site what lies in the repository alone, and makes plain words of docstrings' markup.

A link of a page to a file outside ``docs/`` (``../conf/config.yaml``) leads in the repository to that file. On the site
it leads to a page that is made of the file. A link to something that is no file is a warning: ``--strict`` fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = get_plugin_logger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?(?:[\w.]*\.)?([\w.]+?)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside ``docs/`` that a page links to."""
    for file in list(files.documentation_pages()):
        for link in LINK.findall(file.content_string):
            path = _outside(link, file)
            if path is None or files.get_file_from_path(_page_of(path)) is not None:
                continue
            if not (ROOT / path).is_file():
                log.warning("%s links to %s, which is no file of the repository", file.src_uri, path)
                continue
            files.append(
                File.generated(config, _page_of(path), content=_shown(path), inclusion=InclusionLevel.NOT_IN_NAV)
            )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside ``docs/`` to their pages."""

    def led(found: re.Match[str]) -> str:
        path = _outside(found[1], page.file)
        if path is None:
            return found[1]
        return posixpath.relpath(_page_of(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name things with reStructuredText roles, ``:class:`~a.b.C```, and end with ``::`` before code."""
    return ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>") if page.file.src_uri == "api.md" else html


def _outside(link: str, file: File) -> str | None:
    """Path in the repository of what a page links to; None where that lies in ``docs/``."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), link))
    return None if path.startswith("docs/") else path


def _page_of(path: str) -> str:
    return f"source/{path}.md"


def _shown(path: str) -> str:
    """A page with one file on it, which the search leaves out."""
    kind = Path(path).suffix.removeprefix(".")
    language = {"py": "python", "yaml": "yaml", "md": "markdown", "sh": "bash", "json": "json"}.get(kind, "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n``````{language}\n{text.rstrip()}\n``````\n"
