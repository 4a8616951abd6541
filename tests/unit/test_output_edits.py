"""Edits of outputs against edits of weights: the same numbers, for every family, many trials to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from heretic_ds.ablation import ROW_NORMS, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.engines.decoding import last_logits
from heretic_ds.engines.output_edits import OutputEdits
from heretic_ds.engines.weights import WeightEditor
from tests import families
from tests.unit.test_resident import EDIT, LENGTHS, ablation_for, engine_for, greedy_alone, prompts, state

ONE_BLOCK = Edit(None, {"attention": Profile(0.8, 0.0, 0.8, 0.5)})
"""Leaves the MLP, and every block but the first, as they are."""
STRONG = Edit(0.9, {"attention": Profile(-0.7, 0.3, 1.5, 2.0), "mlp": Profile(1.5, 1.0, 1.2, 1.5)})
EDITS: tuple[Edit | None, ...] = (EDIT, ONE_BLOCK, None, STRONG)
PAD = families.PAD


def trial_rows(trials: int) -> list[tuple[int, list[int]]]:
    """Rows (trial, prompt) of one batch in which trials alternate."""
    return [(index % trials, row) for index, row in enumerate(row for row in prompts() for _ in range(2))]


@torch.inference_mode()
def logits_by_weights(model, ablation, edits: Sequence[Edit | None], rows) -> Tensor:
    """Logits of rows (trial, prompt), each with its trial's edit in the weights.

    Every trial runs the whole batch: families that compute parts in float32 round by the batch's composition.
    """
    editor = WeightEditor(model, find_anatomy(model))
    editor.prepare(ablation)
    of_trial = []
    for edit in edits:
        editor.wear(edit)
        of_trial.append(last_logits(model, [row for _, row in rows], PAD))
    editor.wear(None)
    return torch.stack([of_trial[trial][position] for position, (trial, _) in enumerate(rows)])


@torch.inference_mode()
def logits_by_outputs(model, ablation, edits: Sequence[Edit | None], rows) -> Tensor:
    """The same in one pass."""
    outputs = OutputEdits(model, find_anatomy(model), ablation)
    with outputs.active(edits):
        outputs.assign([trial for trial, _ in rows])
        return last_logits(model, [row for _, row in rows], PAD)


def distance(logits_BV: Tensor, expected_BV: Tensor) -> float:
    """Largest difference of any row, as a part of that row's spread."""
    spread_B = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm(dim=-1)
    return ((logits_BV - expected_BV).norm(dim=-1) / spread_B).max().item()


@pytest.fixture(scope="module", params=families.REQUIRED)
def family(request):
    return request.param, families.build(request.param)


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_a_batch_of_trials_equals_edited_weights(family, row_norm, through_norm):
    _, model = family
    ablation = ablation_for(engine_for(model), row_norm, through_norm)
    rows = trial_rows(len(EDITS))
    expected_BV = logits_by_weights(model, ablation, EDITS, rows)
    assert distance(logits_by_outputs(model, ablation, EDITS, rows), expected_BV) < 1e-5
    unedited_BV = last_logits(model, [row for _, row in rows], PAD)
    apart = [(expected_BV[i] - unedited_BV[i]).norm().item() for i, (trial, _) in enumerate(rows) if EDITS[trial]]
    assert min(apart) > 1e-3, "an edit without an effect shows nothing"


@pytest.mark.parametrize("name", families.REQUIRED)
def test_in_float64_the_two_forms_differ_by_rounding_alone(name):
    model = families.build(name, dtype=torch.float64)
    ablation = ablation_for(engine_for(model), "full", through_norm=True)
    rows = trial_rows(len(EDITS))
    try:
        expected_BV = logits_by_weights(model, ablation, EDITS, rows)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"does not run in float64: {error}")
    if expected_BV.dtype != torch.float64:
        pytest.skip(f"computes in {expected_BV.dtype}")
    assert distance(logits_by_outputs(model, ablation, EDITS, rows), expected_BV) < 1e-12


def test_scores_and_answers_of_trials_in_one_pass_equal_those_one_by_one(family):
    name, model = family
    before = state(model)
    engine = engine_for(model, batch_size=4)
    engine.prepare(ablation_for(engine))
    reference = engine.reference(prompts())
    together = engine.kl(prompts(), reference, EDITS), engine.generate(prompts(), EDITS)
    compared = 0
    for edit, kl, answers in zip(EDITS, *together, strict=True):
        alone = engine.kl(prompts(), reference, [edit])[0]
        assert abs(kl - alone) < 1e-6 + 1e-4 * alone
        for row, answer, expected in zip(prompts(), answers, engine.generate(prompts(), [edit])[0], strict=True):
            if answer != expected:
                engine.apply(edit) if edit else engine.restore()
                assert greedy_alone(model, row, {families.EOS})[1] < 1e-4, name
                engine.restore()
                continue
            compared += 1
    assert compared >= 0.8 * len(EDITS) * len(LENGTHS)
    assert engine.max_edits_per_pass > 1
    engine.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
