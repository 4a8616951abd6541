"""What is kept of a set of prompts: no more of it than passes can use, and as much as memory is set aside for."""

from __future__ import annotations

import pytest
import torch

from heretic_ds.anatomy import find_anatomy
from heretic_ds.runner import prompt_learning
from heretic_ds.runner.prompt_learning import Learning
from tests import families

LAYERS = 4
ROWS = [[10, 11, 12, 20, 21], [10, 11, 12, 30], [10, 11, 12, 40, 41, 42, 43]]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(prompt_learning, "PASS_IN_TOKENS", 1)
    return families.build("llama", layers=LAYERS)


def learning_of(model):
    return Learning(model, list(model.get_submodule(find_anatomy(model).blocks).children()), families.PAD)


def planned(model, answers=True):
    return learning_of(model).planned(ROWS, answers, lambda value: value)


def boundaries(model, answers=True):
    states = planned(model, answers)
    return () if states is None else states.boundaries


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_keys_are_kept_of_no_block_that_every_pass_computes(model, answers, step):
    learning = learning_of(model)
    states = learning.planned(ROWS, answers, lambda value: step)
    with torch.inference_mode():
        learning.keep(states, ROWS)
    last = states.boundaries[-1]
    assert set(states.hidden_ND) == set(states.boundaries) and last < LAYERS
    assert len(states.keys_NHK) == len(states.values_NHK) == last
    assert {len(keys) for keys in states.keys_NHK} == {states.tokens if answers else states.shared}


def test_large_models_may_keep_a_share_of_their_weights(model, monkeypatch):
    """Small ones may keep what is little for any machine."""
    monkeypatch.setattr(prompt_learning, "_SHARE_OF_WEIGHTS", 0.0)
    assert boundaries(model) == (1, 2, 3)  # of the least that is set aside
    monkeypatch.setattr(prompt_learning, "_LEAST_BYTES", 0)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config, tokens = model.config, sum(map(len, ROWS))
    of_input = 4 * config.hidden_size
    of_keys = 2 * 4 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    for enough, less in (((1, 2, 3), (2,)), ((2,), ())):
        needed = tokens * (len(enough) * of_input + enough[-1] * of_keys)
        for more, found in ((1, enough), (-1, less)):
            monkeypatch.setattr(prompt_learning, "_SHARE_OF_WEIGHTS", (needed + more) / weights)
            assert boundaries(model) == found
    monkeypatch.setattr(prompt_learning, "_SHARE_OF_WEIGHTS", 0.0)
    assert boundaries(model) == ()
