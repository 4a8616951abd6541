"""The example's job on the real model, shortened. `make demo-real` fetches the model that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_ds.demo import real_model
from tests.conftest import ROOT
from tests.e2e.conftest import Heretic, outcome_of, read_results

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model() -> Path:
    folder = ROOT / real_model.FOLDER
    if not real_model.is_made(folder):
        pytest.skip(
            f"{real_model.FOLDER} is not there: run `python -m heretic_ds.demo.real_model`, or `make demo-real`"
        )
    return folder


def test_a_short_search_shows_the_behaviour_repeats_and_exports(heretic: Heretic, model: Path, tmp_path: Path) -> None:
    words = ["experiment=demo_real", f"model.path={model}", "search.trials=4", "search.startup_trials=2"]
    for folder in ("first", "second"):
        outcome = heretic(*words, f"run.dir={folder}", "export.max_kl=10")
        assert outcome.status == 0, outcome.err
    first, second = read_results("first"), read_results("second")
    prompts = first["prompts"]["target_eval"]
    assert first["baseline"]["refusals"] >= 0.95 * prompts, "all were kept for showing it; rounding may turn a few"
    assert outcome_of(first["trials"]) == outcome_of(second["trials"])
    assert min(trial["refusals"] for trial in first["trials"]) < first["baseline"]["refusals"]
    assert first["verified"] == second["verified"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "first" / "model").chat_template
    assert json.loads((tmp_path / "first" / "model" / "heretic_ds.json").read_text())["trial"] == first["selected"]
