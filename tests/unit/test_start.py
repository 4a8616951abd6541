"""What a run says before it loads anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import progress
from heretic_ds.job import Job
from heretic_ds.stages.start import start_facts
from heretic_ds.world import World
from tests import families
from tests.conftest import ComposeSettings


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compose_settings: ComposeSettings) -> Any:
    """`checked(name)`: the inputs of a run in a folder `orchard`, on a model in that folder."""
    orchard = tmp_path / "orchard"
    orchard.mkdir()
    monkeypatch.chdir(orchard)
    (orchard / "prompts.txt").write_text("Sow plums.\n")
    sources = [
        f"prompts.{kind}.{part}.source=prompts.txt" for kind in ("target", "baseline") for part in ("train", "eval")
    ]

    def check(name: str) -> Job:
        families.save("llama", orchard / name)
        return Job.check(compose_settings(*sources, model=name), World())

    return check


@pytest.mark.parametrize(
    ("name", "told"), [("model", "orchard/model: "), ("tiny", "tiny: "), ("a/model/", "a/model: ")]
)
def test_a_folder_that_is_only_called_model_is_told_with_its_own(name: str, told: str, checked: Any) -> None:
    """As exports are called; given from within, it has no other name on the command line."""
    assert start_facts(checked(name), Path("runs"))["model"].startswith(told)


def test_nothing_is_downloaded_where_there_is_a_folder(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, work = list[str](), progress.work

    @contextmanager
    def noted(what: str, *more: Any, **named: Any) -> Iterator[Any]:
        shown.append(what)
        with work(what, *more, **named) as made:
            yield made

    monkeypatch.setattr(progress, "work", noted)
    checked("tiny")
    assert "opening the model" in shown and "downloading the model" not in shown
