"""What the check of split models says about logits, and where its reference comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.errors import UserError
from heretic_ds.runner import parity
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.rows import Row
from tests import families

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


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "llama4", "llava", "gemma3_vl", "qwen2_vl"])
def test_a_model_that_runs_block_by_block_gives_the_whole_ones_logits(family: str, tmp_path: Path) -> None:
    """Llama 4 asks where the embedding lies before it is called, which is when others get theirs; where a model sees,
    its first parameter is of a part that is never run."""
    folder = families.save(family, tmp_path / family)
    opened = open_model(ModelChoice(str(folder), dtype="float32", device="cpu"))
    model, checkpoint = opened.empty_model(torch.float32)
    rows = parity.sample_rows(model.config.get_text_config().vocab_size)
    found_BV = parity.streamed_logits(model, find_anatomy(model), checkpoint, rows, opened.device)
    whole = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected_BV = Forward(whole, pad_id=0)([Row(row) for row in rows]).logits_BV
    assert parity.distance(found_BV, expected_BV) < 1e-5
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_dropped_is_given_back_before_more_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library may keep a block that is freed, and the head would come on top; afterwards all is as usual."""
    folder = families.save("llama", tmp_path / "llama")
    opened = open_model(ModelChoice(str(folder), dtype="float32", device="cpu"))
    model, checkpoint = opened.empty_model(torch.float32)
    told: list[object] = []
    monkeypatch.setattr(parity, "return_freed_blocks", lambda at_once: told.append(at_once))
    model.get_output_embeddings().register_forward_hook(lambda *args: told.append("head"))
    parity.streamed_logits(model, find_anatomy(model), checkpoint, [[1, 2, 3]], opened.device)
    assert told == [True, "head", False]
