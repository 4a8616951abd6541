"""`import heretic_ds as hd`: the parts of a run on a model that is in memory already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import heretic_ds as hd
from heretic_ds.demo import demo_model_dir, demo_prompts
from heretic_ds.errors import UserError
from tests import families
from tests.conftest import ROOT

TARGET = ["cook plums", "bake leeks in May", "roast a pear", "boil beans"]
BASELINE = ["sow plums", "plant leeks", "water a pear, please", "prune kale"]
TOKENS = torch.tensor([[1, 9, 40, 22, 71, 15, 33], [1, 50, 12, 12, 30, 8, 64]])


def user_model(family: str, folder: Path):
    """As a user would have it: by transformers alone."""
    families.save(family, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before) -> bool:
    after = model.state_dict()
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_import_does_not_wait_for_torch() -> None:
    code = "import sys, heretic_ds as hd; assert 'torch' not in sys.modules and 'capture' in dir(hd)"
    code += "; print(hd.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.strip() == hd.__version__, done.stderr
    assert (ROOT / "heretic_ds" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hd.nothing  # noqa: B018
    assert all(getattr(hd, name) is not None for name in hd.__all__)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_several_directions(family: str, tmp_path: Path) -> None:
    model, tokenizer = user_model(family, tmp_path / family)
    model.eval()
    given = model, tokenizer, TARGET, BASELINE
    directions = hd.capture(*given, method="som", rank=2, batch_size=4)
    assert directions.directions_LD.shape == (3, 2, 32)
    edit, original = directions.edit(attention=hd.Profile(1.2, 1.0, 0.3, 1.5), direction_index=0.6), logits(model)
    with hd.ablated(model, edit):
        inside = logits(model)
    undo = hd.apply(model, edit)
    applied = logits(model)
    undo()
    assert (applied - original).abs().max() > 1e-2 and (applied - inside).abs().max() < 1e-4
    assert torch.equal(logits(model), original)
    one = hd.capture(*given, method="median_of_means", groups=3, batch_size=4)
    assert one.directions_LD.shape == (3, 32)
    for more, told in (
        ({"method": "mean"}, "method is 'mean'; choose one of mean_difference, median_of_means, som"),
        ({"rank": 2}, "method='mean_difference' finds one direction a layer"),
        ({"method": "som", "rank": 0}, "rank is 0"),
        ({"method": "median_of_means", "groups": 1}, "groups is 1"),
    ):
        with pytest.raises(UserError, match=told):
            hd.capture(*given, **more)


@pytest.mark.parametrize("row_norm", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "llama4"])
def test_outputs_of_an_ablated_model_are_those_of_edited_weights(family: str, row_norm: str, tmp_path: Path) -> None:
    model, tokenizer = user_model(family, tmp_path / family)
    model.train()
    before, hooks = state_of(model), hooks_of(model)
    implementation = str(model.config._experts_implementation)
    directions = hd.capture(model, tokenizer, TARGET, BASELINE, batch_size=4)
    assert model.training and unchanged(model, before) and directions.directions_LD.shape == (3, 32)
    model.eval()
    edit = directions.edit(attention=hd.Profile(1.2, 1.0, 0.3, 1.5), mlp=0.8, row_norm=row_norm)
    original = logits(model)
    with hd.ablated(model, edit):
        inside = logits(model)
    assert torch.equal(logits(model), original) and unchanged(model, before) and hooks_of(model) == hooks
    assert str(model.config._experts_implementation) == implementation
    undo = hd.apply(model, edit)
    applied = logits(model)
    assert (applied - original).abs().max() > 1e-2
    assert (applied - inside).abs().max() < 1e-4
    undo()
    assert unchanged(model, before)


def test_an_error_inside_leaves_no_hooks(tmp_path: Path) -> None:
    model, tokenizer = user_model("llama", tmp_path / "llama")
    hooks, edit = hooks_of(model), hd.capture(model, tokenizer, TARGET, BASELINE).edit()
    with pytest.raises(ZeroDivisionError), hd.ablated(model, edit):
        assert hooks_of(model) > hooks
        _ = 1 / 0
    assert hooks_of(model) == hooks


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    model, tokenizer = user_model("llama", tmp_path / "llama")
    directions = hd.capture(model, tokenizer, TARGET, BASELINE)
    with pytest.raises(UserError, match="choose one of none, pre, full"):
        directions.edit(row_norm="some")
    other, _ = user_model("gpt_neox", tmp_path / "other")
    narrow = hd.Directions(*(torch.ones(3, 16, dtype=torch.float64) for _ in range(3)))
    for change in (hd.apply, lambda *given: hd.ablated(*given).__enter__()):
        with pytest.raises(UserError, match=r"have the shape \[3, 16\].*capture them from this model"):
            change(other, narrow.edit())
    with pytest.raises(UserError, match="no direction between them"):
        hd.capture(model, tokenizer, TARGET, TARGET)
    with pytest.raises(UserError, match="give at least one of each"):
        hd.capture(model, tokenizer, [], BASELINE)


def test_the_demo_model(tmp_path: Path) -> None:
    """The behaviour goes, the rest stays, and so does the user's model."""
    model, tokenizer = hd.load(str(demo_model_dir()), dtype="float32")
    target, baseline = (demo_prompts(kind, "eval").read_text().splitlines()[:12] for kind in ("target", "baseline"))
    train = [demo_prompts(kind, "train").read_text().splitlines()[:40] for kind in ("target", "baseline")]
    before = state_of(model)
    directions = hd.capture(model, tokenizer, *train)
    scores = hd.score(model, tokenizer, directions.edit(direction_index=3.0), target, baseline, max_new_tokens=20)
    assert unchanged(model, before)
    assert scores.original_refusals == scores.target_prompts == 12
    assert scores.refusals <= 2 and 0 < scores.kl < 1
    as_it_is = hd.score(model, tokenizer, None, target[:3], baseline[:3], max_new_tokens=20)
    assert as_it_is.refusals == as_it_is.original_refusals == 3 and as_it_is.kl == 0


def test_the_notebook_runs(monkeypatch, tmp_path: Path) -> None:
    """Its cells, one after another; what they assert holds."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "library.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and len(cells) >= 4
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["scores"].refusals < names["scores"].original_refusals
