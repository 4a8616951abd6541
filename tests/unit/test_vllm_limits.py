"""How long rows of vLLM may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import FalconConfig

from heretic_ds.placements import vllm


@pytest.mark.parametrize(("context", "most"), [(2048, 2048), (100_000, 6016)])
def test_no_row_outgrows_what_is_stated(monkeypatch: pytest.MonkeyPatch, context: int, most: int) -> None:
    """vLLM refuses more, of a model whose attention has no positions to run out of (ALiBi), too."""
    monkeypatch.setattr(vllm, "end_tokens", lambda model, tokenizer: frozenset())
    opened = SimpleNamespace(
        config=FalconConfig(max_position_embeddings=context, alibi=True), skeleton=lambda: None, tokenizer=None
    )
    generation = SimpleNamespace(max_new_tokens=8, batch_size=0)
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(generation=generation),
        opened=opened,
        texts={"target.eval": None},
        prompts=lambda name: SimpleNamespace(rows=[[1] * 3000]),
    )
    assert vllm._limits(job, vllm.Vllm.Options()).max_model_len == most
