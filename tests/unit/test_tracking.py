"""Which tracker the settings name, and what trackers make of trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heretic_ds.ablation.edit import Edit
from heretic_ds.ablation.profile import Profile
from heretic_ds.errors import UserError
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings import conf_dir
from heretic_ds.settings.tracking import TrackingSettings
from heretic_ds.stages.facts import parameters
from heretic_ds.tracking import make_tracker
from heretic_ds.tracking.base import Tracker, metrics_of, outcome_of
from tests.conftest import ComposeSettings

RECORD = TrialRecord(7, 7, "complete", Edit(2.5, {"mlp": Profile(1, 2, 0.5, 3)}), 3, 0.01, {"a b": 1, "c": None}, 2.5)


def test_every_file_of_the_group_is_a_tracker(compose_settings: ComposeSettings, monkeypatch) -> None:
    names = sorted(file.stem for file in (conf_dir() / "tracking").glob("*.yaml"))
    assert names == ["mlflow", "none", "tensorboard", "trackio", "wandb"]
    for name in names:
        settings = compose_settings(f"tracking={name}").tracking
        with monkeypatch.context() as installed:
            installed.setattr("importlib.util.find_spec", lambda name: name)
            tracker = make_tracker(settings)
        assert (tracker is None) == (name == "none")
        assert tracker is None or (isinstance(tracker, Tracker) and tracker.package == name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tracking.uri=http://host"], "tracking.uri is for tracking=mlflow, but tracking is none"),
        (["tracking=mlflow", "tracking.uri=https://ann:pw@host/x"], "MLFLOW_TRACKING_PASSWORD"),
        (["tracking=mlflow", "tracking.project="], "tracking.project is empty"),
        (["tracking=excel"], "there is no tracking=excel; choose one of mlflow, none, tensorboard, trackio, wandb"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], said: str, compose_settings: ComposeSettings) -> None:
    from heretic_ds.cli.command import COMPOSITION_ERRORS
    from heretic_ds.cli.errors import explain

    with pytest.raises((UserError, *COMPOSITION_ERRORS.__args__)) as refused:
        compose_settings(*words)
    error = refused.value
    assert said in (str(error) if isinstance(error, UserError) else explain(error))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Excel", "tracking.name is 'Excel'; choose one of none, tensorboard"),
        ("nowhere.Class", "tracking.name: nowhere.Class cannot be imported"),
        ("json.dumps", "json.dumps is not a class derived from heretic_ds.tracking.Tracker"),
    ],
)
def test_a_tracker_that_is_none(name: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        make_tracker(TrackingSettings(name=name))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_numbers_of_a_trial_and_of_the_outcome() -> None:
    assert metrics_of(RECORD) == {
        "refusals": 3.0, "kl": 0.01, "seconds": 2.5, "scores/a b": 1.0, "edit/direction_index": 2.5,
        "edit/mlp/max_weight": 1.0, "edit/mlp/max_weight_position": 2.0, "edit/mlp/min_weight": 0.5,
        "edit/mlp/min_weight_distance": 3.0,
    }  # fmt: skip
    failed = TrialRecord(8, 8, "failed", Edit(None, {}), None, None, {}, 1.0)
    assert metrics_of(failed) == {"seconds": 1.0}
    results: dict[str, Any] = {"baseline": {"refusals": 67}, "verified": {"refusals": 0, "kl": 0.5}, "selected": 16}
    assert outcome_of(results) == {
        "original/refusals": 67, "verified/refusals": 0, "verified/kl": 0.5, "selected": 16,
    }  # fmt: skip
    assert outcome_of({**results, "verified": None, "selected": None}) == {"original/refusals": 67}


def test_a_trial_in_words() -> None:
    assert RECORD.in_words() == (
        "trial 7: refusals 3, KL 0.01, a b 1, c None, 2.50 s; direction 2.500; mlp max_weight 1.000, "
        "max_weight_position 2.000, min_weight 0.500, min_weight_distance 3.000"
    )
    assert TrialRecord(8, 8, "failed", Edit(None, {}), None, None, {}, 1.0).in_words() == "trial 8: failed, 1.00 s"


def test_a_log_of_one_line_an_entry(tmp_path: Path) -> None:
    import logging

    from heretic_ds.run_folder import RunFolder

    with RunFolder.open(tmp_path / "run", "", {}) as folder:
        folder.write_log("lost: there is no log yet")
        folder.attach_log(logging.getLogger("heretic_ds.test_of_the_log"))
        folder.write_log("two\nlines")
    [line] = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert line.endswith("INFO heretic_ds.run_folder: two lines")


def test_trackers_are_told_no_secrets(compose_settings: ComposeSettings) -> None:
    token = "hf_" + 20 * "a"
    told = parameters(compose_settings(f"prompts.system=say {token}"))
    assert told["prompts.system"] == "say ***"
