"""What of a run's settings and files tells its scores from those of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from heretic_ds.fingerprint import completed, differences, fingerprint
from heretic_ds.settings import Settings

SCORE_CHANGES = [
    "model.path=other/model", "model.revision=v2", "model.dtype=float32", "prompts.system=hello",
    "prompts.target.eval.slice='0:10'", "prompts.baseline.train.source=other/set",
    "prompts.response_prefix=''",
    "direction.orthogonalize=false", "direction.winsorize_quantile=0.9", "ablation.row_norm=none",
    "direction.method=som", "ablation.rank=2",
    "ablation.through_norm=true", "search.seed=1", "search.startup_trials=5", "search.kl_target=0.1",
    "generation.max_new_tokens=50", "scoring.scorers=[a.b.C]", "scoring.markers=[sorry]",
]  # fmt: skip
FREE_CHANGES = [
    "search.trials=5", "search.trials_per_pass=4", "capture._target_=a.b.C", "evaluate.degree=2",
    "generation.batch_size=3", "generation.early_stop=false", "generation.prefill_reuse=false", "export.max_kl=1",
    "export.dir=x", "run.dir=y", "scoring.print_answers=true", "model.device=cpu", "task.name=export",
]  # fmt: skip


def settings(*overrides: str) -> Settings:
    base = OmegaConf.structured(Settings())
    sources = [
        f"prompts.{kind}.{part}.source=some/{kind}" for kind in ("target", "baseline") for part in ("train", "eval")
    ]
    merged = OmegaConf.merge(base, OmegaConf.from_dotlist(["model.path=some/model", *sources, *overrides]))
    result = OmegaConf.to_object(merged)
    assert isinstance(result, Settings)
    return result


def test_long_values_that_differ_at_the_end_are_still_named() -> None:
    long = [f"marker number {number}" for number in range(40)]
    assert differences({"scoring.markers": long}, {"scoring.markers": [*long, "x"]}) == [
        "scoring.markers has other content"
    ]
    one, two = {"model.files": {"a": "1", "b": "2"}}, {"model.files": {"a": "1", "b": "3"}}
    assert differences(one, two) == ['model.files.b was "2", is now "3"']


def test_settings_that_came_later_leave_earlier_folders_as_they_are() -> None:
    assert not {"direction.method", "direction.groups", "ablation.rank"} & fingerprint(settings()).keys()
    assert fingerprint(settings("direction.groups=5")) == fingerprint(settings())
    median = "direction.method=median_of_means"
    [told] = differences(fingerprint(settings(median)), fingerprint(settings(median, "direction.groups=5")))
    assert told.startswith("direction.groups ")


def test_folders_from_before_there_were_strategies_are_direct_ones() -> None:
    direct, screened = fingerprint(settings()), fingerprint(settings("search.strategy=screened"))
    before = {key: value for key, value in direct.items() if key not in ("search.strategy", "search.candidates")}
    assert completed(before, direct) == direct != before
    assert differences(completed(before, screened), screened)[1] == 'search.strategy was "direct", is now "screened"'
    assert fingerprint(settings("search.candidates=4")) == direct  # direct screens none
    assert differences(screened, fingerprint(settings("search.strategy=screened", "search.candidates=4")))


@pytest.mark.parametrize("override", SCORE_CHANGES)
def test_what_changes_scores_changes_the_fingerprint(override: str) -> None:
    before, now = fingerprint(settings()), fingerprint(settings(override))
    key = override.split("=")[0]
    assert len(differences(before, now)) == 1
    assert differences(before, now)[0].startswith(f"{key} ")


@pytest.mark.parametrize("override", FREE_CHANGES)
def test_what_does_not_change_scores_is_free(override: str) -> None:
    assert fingerprint(settings()) == fingerprint(settings(override))


def test_any_fixed_edit_is_evaluated_in_one_folder_that_is_not_the_search_s() -> None:
    edit = "ablation.profiles.mlp.max_weight=1.0"
    assert fingerprint(settings("task.name=evaluate")) != fingerprint(settings())
    assert fingerprint(settings("task.name=evaluate")) == fingerprint(settings("task.name=evaluate", edit))


def test_local_files_count_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"\1" * 300000)
    prompts.write_text("one\n")
    overrides = [f"model.path={model}", f"prompts.target.eval.source={prompts}"]
    before = fingerprint(settings(*overrides))
    monkeypatch.chdir(tmp_path)
    assert fingerprint(settings("model.path=model", "prompts.target.eval.source=prompts.txt")) == before
    prompts.write_text("two\n")
    assert [text.split()[0] for text in differences(before, fingerprint(settings(*overrides)))] == [
        "prompts.target.eval.content"
    ]
    prompts.write_text("one\n")
    (model / "model.safetensors").write_bytes(b"\1" * 299999 + b"\2")
    (found,) = differences(before, fingerprint(settings(*overrides)))
    assert found.startswith("model.files.model.safetensors was ")
    assert fingerprint(settings(), **{"model.commit": "abc"})["model.commit"] == "abc"


def test_settings_that_make_only_the_built_in_classifier_faster_do_not_count() -> None:
    for target, same in (("classifier", True), ("heretic_ds.scoring.Classifier", True), ("mine.Scorer", False)):
        small, large = settings(), settings()
        small.scoring.scorers = [{"_target_": target, "batch_size": 1}]
        large.scoring.scorers = [{"_target_": target, "batch_size": 2}]
        assert (fingerprint(small) == fingerprint(large)) == same
