"""What comes before the first trial: nothing is measured twice, and trials do not depend on when it was measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from heretic_ds.planner import calibrate
from tests.e2e.conftest import Heretic, Material, read_results

MEASURED = ("generation.batch_size=0", "prompts.response_prefix=auto", "search.trials=4", "run.interactive=false")


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """Trials but for their seconds."""
    return [{key: trial[key] for key in trial if key != "seconds"} for trial in read_results(folder)["trials"]]


@pytest.fixture
def words(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search whose batch sizes are to be measured, with a cache folder to itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return material.words(material.model("llama"), *MEASURED)


def test_batch_sizes_are_measured_once_for_a_model_and_a_machine(
    words: list[str], heretic: Heretic, tmp_path: Path
) -> None:
    first = heretic(*words, "run.dir=first", "export.dir=out-1")
    assert first.status == 0, first.err
    for passes in ("residuals", "distributions", "answers"):
        assert first.out.count(f"batch size for {passes}: ") == 1
    [file] = calibrate.cache_folder().glob("batches-*.json")
    second = heretic(*words, "run.dir=second", "export.dir=out-2")
    assert second.status == 0, second.err
    assert second.out.count("batch size for ") == second.out.count(" rows (as measured before)") == 3
    sizes = [read_results(tmp_path / name)["batch_sizes"] for name in ("first", "second")]
    [found] = sizes[0].values()
    assert sizes[0] == sizes[1] and found.keys() == {"capture", "kl", "generate"}
    file.unlink()
    third = heretic(*words, "run.dir=third", "export.dir=out-3", "generation.batch_size=5")
    assert third.status == 0 and not file.exists()


def test_trials_are_those_of_a_run_that_had_measured_before(words: list[str], heretic: Heretic, tmp_path: Path) -> None:
    """A run that is killed before its first trial and goes on: scores of the original that were taken while batch sizes
    were measured would make other trials, in their last digits."""
    assert heretic(*words, "run.dir=whole", "export.dir=out-1").status == 0
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("fingerprint.json", "config.yaml", "directions.safetensors", "measured.json"):
        shutil.copy(tmp_path / "whole" / name, begun)
    calibrate.cache_folder().rename(tmp_path / "elsewhere")
    assert heretic(*words, "run.dir=begun", "export.dir=out-2").status == 0
    assert trials_of(begun) == trials_of(tmp_path / "whole")
    fewer = heretic(*words, "run.dir=whole", "export.dir=out-1", "search.trials=3")
    assert fewer.status == 0 and "4 trials are done already; search.trials=3 asks for no more" in fewer.out
