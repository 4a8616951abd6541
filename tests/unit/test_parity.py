"""What the check of split models says about logits, without a model."""

from __future__ import annotations

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.runner import parity

LOGITS_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))


def test_logits_of_another_model_are_refused() -> None:
    parity.check(LOGITS_BV + 1e-5, LOGITS_BV, torch.float32, "evaluate.backend=autotp", "choose another")
    with pytest.raises(UserError, match=r"evaluate\.backend=autotp gives other logits .*; choose another$"):
        parity.check(LOGITS_BV.roll(1, 0), LOGITS_BV, torch.float32, "evaluate.backend=autotp", "choose another")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dtype_too_narrow_is_named(value: float) -> None:
    reference_BV = LOGITS_BV.clone()
    reference_BV[0, 0] = value
    with pytest.raises(UserError, match=r"not finite in float16; set another model\.dtype"):
        parity.check(reference_BV, reference_BV, torch.float16, "evaluate.backend=autotp", "choose another")


def test_every_rank_of_a_replica_has_rows_in_another_order() -> None:
    rows = parity.sample_rows(100, 5)
    assert len({tuple(row) for row in rows}) == 5 and parity.sample_rows(100, 5) == rows
