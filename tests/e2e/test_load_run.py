"""What a run of the command leaves, read by a program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import heretic_ds as hd
from heretic_ds.errors import UserError
from tests.e2e.conftest import Heretic, Material, read_results


def test_the_best_edit_of_a_run_is_the_exported_model(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    outcome = heretic(*material.words(material.model("llama"), "run.dir=run", "model.dtype=float32"))
    assert outcome.status == 0, outcome.err
    run, results = hd.load_run("run"), read_results("run")
    assert run.best_trial.index == results["selected"] and run.model == str(material.model("llama"))
    assert [trial.index for trial in run.front] == results["pareto"] and len(run.trials) == 6
    model = AutoModelForCausalLM.from_pretrained(material.model("llama"), dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float32).state_dict()
    hd.apply(model, run.best)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="has no trial 9"):
        run.edit(9)
    with pytest.raises(UserError, match=r"holds no results\.json"):
        hd.load_run(tmp_path / "nowhere")
