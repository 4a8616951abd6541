"""Which strategy a search follows where the settings leave it open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic_ds.errors import UserError
from heretic_ds.fingerprint import fingerprint
from heretic_ds.stages.search import settle_strategy
from heretic_ds.world import World
from tests.conftest import ComposeSettings

LENGTHS = {"_target_": "length", "direction": "maximize"}


@pytest.fixture
def strategy(compose_settings: ComposeSettings, tmp_path: Path):
    """`strategy("search.trials=3")`: what a run in the folder `run` follows, with a changed first scorer where one is
    given."""

    def of(*words: str, scorer: object = None) -> str:
        settings = compose_settings(f"run.dir={tmp_path / 'run'}", *words)
        if scorer is not None:
            settings.scoring.scorers = [scorer]
        return settle_strategy(settings, World()).search.strategy

    return of


def test_a_new_run_is_screened_where_its_first_scorer_allows_it(strategy) -> None:
    assert strategy() == "screened"
    assert strategy(scorer=LENGTHS) == "direct"
    assert strategy("search.strategy=direct") == "direct"


@pytest.mark.parametrize("began", ["direct", "screened"])
def test_a_run_goes_on_as_it_began(began: str, strategy, compose_settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    known = fingerprint(compose_settings(f"search.strategy={began}"))
    (folder / "fingerprint.json").write_text(json.dumps(known))
    assert strategy() == began and strategy("task=export", "export.trial=1") == began
    assert strategy("search.strategy=screened") == "screened"  # what was asked for; opening the folder may refuse it


def test_a_run_of_a_version_that_knew_no_strategies_scored_every_trial(strategy, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text("{}")
    assert strategy() == "direct"


def test_a_damaged_folder_is_one_sentence(strategy, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text("[")
    with pytest.raises(UserError, match=r"fingerprint\.json"):
        strategy()
    assert strategy("task=upload") == "auto"  # which opens no run's folder


def test_a_folder_that_another_task_begins_may_be_searched_as_a_new_one(strategy) -> None:
    assert strategy("task=geometry") == strategy("task=chat") == "screened" and strategy("task=evaluate") == "direct"
