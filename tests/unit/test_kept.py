"""What is kept of a set of prompts: no more of it than passes can use, and as much as memory is set aside for."""

from __future__ import annotations

import pytest

from heretic_ds.anatomy import find_anatomy
from heretic_ds.runner import reuse
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.kept import boundaries_within, shared_beginning
from heretic_ds.runner.rows import rows_of
from tests import families

LAYERS = 4
ROWS = [[10, 11, 12, 20, 21], [10, 11, 12, 30], [10, 11, 12, 40, 41, 42, 43]]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(reuse, "PASS_IN_TOKENS", 1)
    return families.build("llama", layers=LAYERS)


def learned(model, answers=True, comm=ALONE):
    forward = reuse.Reuse(model, find_anatomy(model), families.PAD, True, comm)
    forward.learn(ROWS, answers, lambda work: work(rows_of(ROWS)))
    (kept,) = forward._kept.values()
    return kept


def boundaries(model, answers=True):
    kept = learned(model, answers)
    return () if kept is None else kept.boundaries


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_keys_are_kept_of_no_block_that_every_pass_computes_and_of_no_prompt_that_is_only_scored(model, answers, step):
    class FirstRankSays(Comm):
        def alike(self, value):
            return value if isinstance(value, bool) else step

    kept = learned(model, answers, FirstRankSays())
    assert kept.boundaries == tuple(range(step, LAYERS, step))
    assert set(kept.hidden_ND) == set(kept.boundaries)
    assert set(kept.keys_NHK) == set(kept.values_NHK) == set(range(kept.boundaries[-1] if answers else 0))
    assert {len(each) for each in (*kept.keys_NHK.values(), *kept.values_NHK.values())} <= {len(kept.tokens_N)}


def test_large_models_may_keep_a_share_of_their_weights(model, monkeypatch):
    """Small ones may keep what is little for any machine."""
    monkeypatch.setattr(reuse, "_SHARE_OF_WEIGHTS", 0.0)
    assert boundaries(model) == (1, 2, 3)  # of the least that is set aside
    monkeypatch.setattr(reuse, "_LEAST_BYTES", 0)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config, tokens = model.config, sum(map(len, ROWS))
    of_input = 4 * config.hidden_size
    of_keys = 2 * 4 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    for enough, less in (((1, 2, 3), (2,)), ((2,), ())):
        needed = tokens * (len(enough) * of_input + enough[-1] * of_keys)
        for more, found in ((1, enough), (-1, less)):
            monkeypatch.setattr(reuse, "_SHARE_OF_WEIGHTS", (needed + more) / weights)
            assert boundaries(model) == found
    monkeypatch.setattr(reuse, "_SHARE_OF_WEIGHTS", 0.0)
    assert boundaries(model) == ()


@pytest.mark.parametrize("blocks", [1, 2, 7, 32])
def test_boundaries_are_as_many_as_fit(blocks):
    assert boundaries_within(blocks, 10, 3, 10**9) == tuple(range(1, blocks))
    for most in range(0, 400, 7):
        chosen = boundaries_within(blocks, 10, 3, most)
        assert not chosen or len(chosen) * 10 + chosen[-1] * 3 <= most
    assert boundaries_within(32, 10, 0, 35) == (8, 16, 24)
    assert boundaries_within(32, 10, 0, 10**9, alike=lambda step: 16) == (16,)


def test_what_rows_share():
    assert shared_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 9]]) == 2
    assert shared_beginning([[1, 2], [1, 2, 4]]) == 1  # a row keeps a token of its own
    assert shared_beginning([[1, 2], [1, 2]]) == 1
    assert shared_beginning([[3], [1, 2]]) == 0
