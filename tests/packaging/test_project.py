"""What the project says of itself in files that no code reads: they agree with one another, and name what is there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from heretic_ds import __version__, needs
from tests.conftest import ROOT
from tests.packaging.conftest import PARTS_OF_THE_BUILD

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNPINNED = {"vllm", "trackio", "wandb"}
"""For environments of their own, or of services that tests do not reach."""
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def requirements(*extras: str) -> Iterator[Requirement]:
    """What the package needs, and these extras, without the package itself."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    yield from (each for each in map(Requirement, texts) if each.name != PROJECT["name"])


def texts_of(*patterns: str) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        for file in ROOT.glob(pattern):
            if "__pycache__" not in file.parts:
                yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    needed = [each for each in requirements(*EXTRAS) if canonicalize_name(each.name) not in UNPINNED]
    assert [str(each) for each in needed if canonicalize_name(each.name) not in pins] == []
    assert [str(each) for each in needed if pins[canonicalize_name(each.name)] not in each.specifier] == []


def test_deepspeed_is_a_dependency_and_the_same_where_it_is_missing() -> None:
    [listed] = [each for each in requirements() if each.name == "deepspeed"]
    assert listed.specifier == Requirement(needs.DEEPSPEED).specifier
    assert str(listed.marker) == 'sys_platform == "linux"'


def test_extras_that_are_named_exist() -> None:
    named = re.compile(r"(?:heretic-ds|\.)\[([a-z,]+)\]")
    found = {
        (file, extra)
        for file, text in texts_of("heretic_ds/**/*.py", "docs/*.md", "*.md", "Makefile", "docker/*", "conf/**/*.yaml")
        for extras in named.findall(text)
        for extra in extras.split(",")
    }
    assert len(found) > 5
    assert {(file, extra) for file, extra in found if extra not in EXTRAS} == set()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["cff-version"] == "1.2.0" and citation["title"] and citation["authors"] and citation["message"]
    assert PROJECT["urls"]["The method"] == citation["references"][0]["url"]


def test_the_workflow_runs_what_people_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"run": ".ci/run"} in steps
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_hooks_before_a_commit_run_what_the_environment_has() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    words = [word for hook in hooks for word in hook["entry"].split()]
    assert {word for word in words if word.startswith(".venv/bin/")} == {".venv/bin/ruff", ".venv/bin/python"}
    assert [word for word in words if word.startswith("tests/") and not (ROOT / word).is_file()] == []


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_copy_all_that_a_build_needs(file: Path) -> None:
    copied = {
        source
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }
    assert copied == {*PARTS_OF_THE_BUILD, "constraints.txt"}
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert admitted == copied


def test_both_devices_have_an_image() -> None:
    assert [file.name for file in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


def test_no_file_names_the_host_of_a_registry() -> None:
    """Where packages come from is for those who install to say."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no clone")
    host = re.compile(rb"pyp[i]\.org|pythonho[s]ted\.org|anaco[n]da\.org")
    files = [ROOT / name for name in tracked.stdout.split("\0") if name]
    assert [str(file) for file in files if file.is_file() and host.search(file.read_bytes())] == []
