"""A pass over prompts: logits of the last positions, and what the head is given for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heretic_ds.runner.forward import Forward
from heretic_ds.runner.rows import Row
from tests import families
from tests.unit.test_decode import prompts


@pytest.mark.parametrize("last", [None, 1, 2])
@pytest.mark.parametrize("family", families.REQUIRED)
def test_the_head_gets_the_last_positions_of_all_rows_in_one_piece(family: str, last: int | None) -> None:
    """Else it multiplies row by row where its weights are frozen, and reads them as many times."""
    model, rows = families.build(family), [Row(prompt) for prompt in prompts()]
    model.requires_grad_(False)
    forward, given = Forward(model, families.PAD), []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.inference_mode():
        logits = forward(rows, last=last).logits_BV
        whole_BSV = model(**_batch(rows)).logits
    handle.remove()
    assert given[0].is_contiguous() and given[0].shape[:2] == (len(rows), last or 1)
    expected = whole_BSV[:, -1] if last is None else whole_BSV[:, -last:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("annotation", "positions"), [("int | torch.Tensor", torch.Tensor), (int, int), (None, int)])
def test_a_model_is_told_positions_as_it_takes_them(
    annotation: Any, positions: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a number where its code says so, or takes anything."""
    model, given = families.build("llama"), []
    whole = model.forward

    def some(input_ids: Any, attention_mask: Any = None, logits_to_keep: Any = 0, **options: Any) -> Any:
        given.append(logits_to_keep)
        return whole(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **options)

    def anything(input_ids: Any, **options: Any) -> Any:
        return some(input_ids, **options)

    some.__annotations__["logits_to_keep"] = annotation
    monkeypatch.setattr(model, "forward", anything if annotation is None else some)
    rows = [Row(prompt) for prompt in prompts()]
    with torch.inference_mode():
        logits = Forward(model, families.PAD)(rows, last=2).logits_BV
    assert isinstance(given[0], positions) and logits.shape[:2] == (len(rows), 2)


def _batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[families.PAD] * (longest - len(row)) + list(row.prompt) for row in rows])
    mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids_BS,
        "attention_mask": mask_BS,
        "position_ids": (mask_BS.cumsum(dim=1) - 1).clamp(min=0),
    }
