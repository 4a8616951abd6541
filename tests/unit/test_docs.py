"""The documentation: links lead somewhere, tables and quotations are current, the site builds without a warning."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in ("example", "screens"))
"""Pages of the site; what lies in the two folders is shown by others."""


def prose(file: Path) -> str:
    """A page without its code."""
    return re.sub(r"^(`{3,}).*?^\1`*$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(file: Path) -> set[str]:
    """What `#...` may name on a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda file: file.name)
def test_links_lead_to_files_and_headings_of_the_repository(file: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.is_file() and target.is_relative_to(ROOT), f"{file.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{file.name} links to {link}, but there is no such heading"


def in_navigation(entries: object) -> Iterator[str]:
    """The pages of a part of the navigation, which is nested."""
    if isinstance(entries, str):
        yield entries
    for entry in entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ():
        yield from in_navigation(entry)


def test_the_navigation_has_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = list(in_navigation(yaml.safe_load(text.replace("!!python/name:", ""))["nav"]))
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES], "mkdocs.yml: nav"


def test_the_table_of_families_is_what_the_tests_run() -> None:
    fresh = runpy.run_path(str(DOCS / "make_families.py"))["render"]()
    assert f"\n{fresh}\n" in (DOCS / "families.md").read_text(encoding="utf-8"), "docs/families.md: run `make docs`"


def test_the_table_of_hardware_is_what_the_planner_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "planner_map.py"))["table"]
    kept = json.loads((ROOT / "benchmarks" / "results" / "planner_map.json").read_text(encoding="utf-8"))
    page = (DOCS / "hardware.md").read_text(encoding="utf-8")
    assert f"\n{table(kept['rows'])}\n" in page, "docs/hardware.md: run `python benchmarks/planner_map.py --page`"


def texts_of_the_package() -> list[str]:
    """Every text in the package's code; what is filled in is cut out."""
    texts = []
    for file in (ROOT / "heretic_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
    return texts


def test_messages_that_are_explained_are_messages_of_the_package() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*?(?=\n\n)", page, flags=re.MULTILINE | re.DOTALL)
    explained = [line.split("`")[1] for table in tables for line in table.splitlines()[2:]]
    assert len(explained) > 30
    texts = texts_of_the_package()
    for message in explained:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(r"[\s\S]*?".join(parts))
        assert any(pattern.search(text) for text in texts), f"docs/troubleshooting.md explains {message!r}"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    # Not `--quiet`: warnings that are not said are not counted either.
    pytest.importorskip("mkdocs", reason="the site is built where the extra `docs` is installed")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    pages = {page.parent.relative_to(tmp_path).as_posix(): page for page in tmp_path.rglob("index.html")}
    assert {page.stem for page in PAGES} - {"index"} <= set(pages)
    linked = {link for page in PAGES for link in re.findall(r"\]\(\.\./([^)#]+)\)", prose(page))}
    assert linked and {f"source/{path}" for path in linked} <= set(pages)
    for name in (".", "api", "architecture", "from_heretic"):
        html = pages[name].read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"((?:https?:)?//[^\"]+)", html)
        assert not fetched, f"{name} fetches from other computers"
    api = pages["api"].read_text(encoding="utf-8")
    for documented in (
        "errors.UserError",
        "ablation.edit.edit_weight",
        "placements.base.Placement",
        "scoring.base.Scorer",
    ):
        assert f'id="heretic_ds.{documented}"' in api
    assert ":class:" not in api and ":func:" not in api and ":meth:" not in api
