"""`task=evaluate evaluate.against=`: somebody's model beside its original."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families
from tests.e2e.conftest import Heretic, Material, read_results
from tests.e2e.test_fixed_edit import EDIT

WORDS = ("model.dtype=float32", "scoring.markers=[e]")


def test_an_exported_model_scores_as_it_did_when_it_was_verified(material: Material, heretic: Heretic) -> None:
    base = material.model("llama")
    outcome = heretic(*material.words(base, *WORDS, *EDIT, "task=evaluate", "run.dir=fixed"))
    assert outcome.status == 0, outcome.err
    outcome = heretic(*material.words(base, *WORDS, *EDIT, "task=export", "run.dir=run", "export.dir=edited"))
    assert outcome.status == 0, outcome.err
    outcome = heretic(*material.words("edited", *WORDS, "task=evaluate", f"evaluate.against={base}"))
    assert outcome.status == 0, outcome.err
    expected, results = read_results("fixed"), read_results(f"runs/edited-against-{base.name}")
    assert results["against"] == base.name and results["baseline"] == expected["baseline"]
    assert results["verified"]["refusals"] == expected["verified"]["refusals"]
    assert results["verified"]["kl"] == pytest.approx(expected["verified"]["kl"], rel=1e-4, abs=1e-6)
    assert results["verified"]["kl"] > 1e-3


def test_mistakes(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    base = material.model("llama")
    other = families.save("llama", tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<|user|>"', '"<|person|>"'))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace("<|user|>", "<|person|>"))
    for words, told in (
        (("task=evaluate", f"evaluate.against={tmp_path}/nowhere"), "evaluate.against="),
        (("task=evaluate", f"evaluate.against={base}", *EDIT), "compares two models as they are"),
        ((f"evaluate.against={base}",), "is for task=evaluate"),
        (("task=evaluate", f"evaluate.against={other}"), "another vocabulary"),
    ):
        outcome = heretic(*material.words(base, *WORDS, "run.dir=run", *words))
        assert outcome.status == 2 and told in outcome.err, outcome.err
        assert not (tmp_path / "run").exists()
