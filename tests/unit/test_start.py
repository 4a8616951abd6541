"""What a run says before it loads anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import progress
from heretic_ds.checkpoint.open import open_model
from heretic_ds.errors import UserError
from heretic_ds.foreign import limits
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


def test_long_test_prompts_that_nobody_named_are_left_out(
    checked: Any, compose_settings: ComposeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Named ones are refused, and not looked at where there are no final scores; a scorer's own are no test prompts."""
    job = checked("model")
    context = job.opened.config.max_position_embeddings
    long = "plums " * context

    def lengths_of(*overrides: str, **texts: list[str]) -> set[str]:
        settings = compose_settings("prompts.target.eval.source=prompts.txt", *overrides, model="model")
        other = replace(job, settings=settings, texts={"target.test": ["Sow.", long], "baseline.test": [long]} | texts)
        other.check_lengths()
        return {name for name, found in other.texts.items() if found == ["Sow."]} | (other.texts.keys() - job.texts)

    with caplog.at_level(logging.INFO, "heretic_ds"):
        assert lengths_of() == {"target.test"}
    assert "prompts.target.test: 1 of 2 prompts are left out: they have no room for" in caplog.text
    named = "prompts.target.test.source=prompts.txt"
    with pytest.raises(UserError, match=r"prompts\.target\.test: prompt 1 has .* generation\.max_new_tokens"):
        lengths_of(named)
    for unused in ("verify.final=false", "task=geometry", "task=evaluate"):
        assert lengths_of(named, unused) == {"target.test", "baseline.test"}
    with pytest.raises(UserError, match=r"scoring\.scorers\.test\.prompts: prompt 0"):
        lengths_of("verify.final=false", **{"scoring.test": [long]})
    assert not any(name.endswith(".test.digest") and name.startswith("prompts") for name in job.inputs())


def test_a_screened_search_refuses_scorers_that_it_cannot_go_by_before_anything_is_loaded(
    checked: Any, compose_settings: ComposeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = checked("model").settings
    monkeypatch.setattr("heretic_ds.job.open_model", lambda *_: pytest.fail("something was loaded"))
    for first in ("kl_tokens", {"_target_": "length", "direction": "maximize"}):
        settings.scoring.scorers, settings.search.strategy = [first], "screened"
        with pytest.raises(UserError, match="screened needs a first scorer of answers that is minimised"):
            Job.check(settings, World())


@pytest.mark.parametrize(("ranks", "times"), [(1, 1), (2, 2)])
def test_a_model_is_opened_once(ranks: int, times: int, checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one rank there is; the first of several does so before the others."""
    opened = []

    def counted(choice: Any) -> Any:
        opened.append(choice.path)
        return open_model(choice)

    class Alone(World):
        """Several ranks, of which this is the only one to be heard."""

        def decide(self, make: Any, what: str | None = None) -> Any:
            return make()

        agree = decide

        def gather(self, value: Any) -> list[Any]:
            return [value]

    monkeypatch.setattr("heretic_ds.job.open_model", counted)
    monkeypatch.setitem(globals(), "World", lambda: Alone(0, ranks))
    checked("orange")
    assert opened == ["orange"] * times


def test_all_prompts_are_rendered_in_one_process(checked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To copy this one takes as long as to render many; it is given time for each of them."""
    asked: list[int | None] = []

    def counted(work: Any, seconds: int | None = None) -> Any:
        asked.append(seconds)
        return limits.in_child(work, seconds)

    monkeypatch.setattr("heretic_ds.prompts.chat.in_child", counted)
    job = checked("orange")
    job.texts |= {f"{kind}.train": [f"Sow {kind} plums."] for kind in ("target", "baseline")}
    asked.clear()
    job.check_lengths()
    assert asked == [limits.SECONDS]
    asked.clear()
    job.chat.prepare([f"Sow plum {number}." for number in range(1001)])
    assert asked == [4 * limits.SECONDS, limits.SECONDS]
