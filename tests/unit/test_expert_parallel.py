"""The parts of ``expert_parallel`` that need no ranks: what is refused, names, and trials of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.conversions import Assembled
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.edits.tables import Rows
from heretic_ds.errors import UserError
from heretic_ds.placements.expert_parallel.edits import TravellingRows
from heretic_ds.placements.expert_parallel.layers import ExpertLayers, renamed
from tests import families

SERVED = ("mixtral", "qwen3_moe", "qwen2_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3")


def _layers(family: str, degree: int = 2, phase: str = "evaluate") -> ExpertLayers:
    model = families.build(family)
    return ExpertLayers(model, find_anatomy(model), degree, phase, torch.device("cpu"))


@pytest.mark.parametrize("family", SERVED)
def test_looking_at_a_model_leaves_it_as_it_is(family):
    model = families.build(family)
    before = [(name, id(module)) for name, module in model.named_modules()]
    ExpertLayers(model, find_anatomy(model), 2, "evaluate", torch.device("cpu"))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "olmoe", "qwen3_next"])
@pytest.mark.parametrize("phase", ["capture", "evaluate"])
def test_a_family_without_a_preset_is_refused_in_one_line(family, phase):
    with pytest.raises(UserError, match=rf"no preset for a {family} model.* mixtral.*; set {phase}=tensor_parallel$"):
        _layers(family, phase=phase)


def test_a_degree_that_does_not_divide_the_experts_is_refused():
    with pytest.raises(UserError, match=r"capture\.degree=3 does not divide the 4 experts of model\.layers\.0"):
        _layers("mixtral", 3, "capture")
    _layers("mixtral", 4)


def test_a_family_with_a_preset_but_no_experts_is_refused():
    config = families.EXTRA["qwen2_moe"]()
    config.mlp_only_layers = [0, 1]
    model = families.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"cannot serve this qwen2_moe model.*; set evaluate=tensor_parallel$") as error:
        ExpertLayers(model, find_anatomy(model), 2, "evaluate", torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_experts_that_autoep_overlooks_are_refused():
    """Left alone they would stay whole on every rank, and be edited by none of this placement's rules."""
    layers = _layers("mixtral")
    layers._specs.pop()
    with pytest.raises(UserError, match=r"does not take the experts at model\.layers\.1\.mlp\.experts"):
        layers._check_experts("evaluate")


@pytest.mark.parametrize("family", SERVED)
def test_one_expert_can_be_read_alone(family, tmp_path):
    """Reading expert by expert would otherwise convert the whole block's for each."""
    choice = ModelChoice(path=str(families.save(family, tmp_path)), device="cpu")
    _, checkpoint = open_model(choice).empty_model(torch.float32)
    experts = [source for name, source in checkpoint.sources.items() if ".experts." in name]
    assert experts and all(isinstance(source, Assembled) for source in experts)


def test_the_longest_beginning_is_renamed():
    renamings = {"a.gate": "a.router.gate", "a.gate.bias": "a.router.bias", "a.b": "c"}
    assert renamed("a.gate.weight", renamings) == "a.router.gate.weight"
    assert renamed("a.gate.bias", renamings) == "a.router.bias"
    assert renamed("a.gates.weight", renamings) == "a.gates.weight"
    assert renamed("a.b", renamings) == "c"


def test_trials_follow_tokens_to_their_experts():
    layer = nn.Linear(1, 1)
    layer.ep_size = 1
    rows = Rows(torch.device("cpu"))
    rows.assign([0, 1, 2])  # two tokens a row
    travelling = TravellingRows(layer, rows)
    expert_NC = torch.tensor([[0, 2], [2, 0], [1, 2], [2, 0], [0, 1], [2, 1]])
    counts_E = torch.bincount(expert_NC.flatten(), minlength=4).int()
    travelling.travel(nn.Identity(), (), (None, expert_NC, counts_E))
    trial_S = travelling.tokens(len(travelling._trial_S)).tolist()
    # Each expert's rows begin at a multiple of 8, its tokens in their order.
    assert trial_S[:4] == [0, 0, 1, 2] and trial_S[8:11] == [1, 2, 2] and trial_S[16:21] == [0, 0, 1, 1, 2]


def test_rows_without_trials_are_a_mistake():
    travelling = TravellingRows(nn.Linear(1, 1), Rows(torch.device("cpu")))
    with pytest.raises(RuntimeError, match="trials of 5 rows"):
        travelling.tokens(5)
