"""``task=benchmark`` as a command: the original beside an export, on one device and on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.conftest import Heretic, Material
from tests.e2e.test_fixed_edit import EDIT
from tests.unit.test_harness import write_tasks

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is missing: pip install "heretic-ds[eval]"')

pytestmark = pytest.mark.slow


@pytest.fixture
def words(material: Material, heretic: Heretic, tmp_path: Path) -> list[str]:
    """A command that asks a tiny model and an export of it; the export is there."""
    usual = ("scoring.markers=[e]", "run.dir=run", "model.dtype=float32")
    outcome = heretic(*material.words(material.model("llama"), "task=export", *usual, *EDIT))
    assert outcome.status == 0, outcome.err
    tasks = [
        "benchmark.tasks=[tiny_choice,tiny_answer,tiny_text]",
        f"benchmark.include={write_tasks(tmp_path / 'tasks')}",
    ]
    return [str(material.model("llama")), "task=benchmark", *usual, *tasks, "benchmark.chat_template=false"]


def scores_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    return found


def test_both_models_are_asked_once(words: list[str], heretic: Heretic) -> None:
    first = heretic(*words)
    assert first.status == 0, first.err
    shown = first.out + first.err
    assert "tiny_choice (acc, n=4)" in shown and "difference" in shown and "%|" not in shown  # no bar of a library
    found = scores_in(Path("run"))
    values = {name: [score["value"] for score in found[name]["scores"]] for name in ("original", "export")}
    assert values["original"] != values["export"]
    changes = [entry["value"] for entry in found["differences"]]
    assert changes == [b - a for a, b in zip(values["original"], values["export"], strict=True)]
    again = heretic(*words)
    assert again.status == 0 and "asking" not in again.out + again.err and scores_in(Path("run")) == found
    other = heretic(*words, "benchmark.limit=2", "benchmark.models=export")
    assert "asking the export" in other.out + other.err and "tiny_choice (acc, n=2)" in other.out + other.err


@pytest.mark.thorough
@pytest.mark.distributed
def test_two_ranks_answer_as_one(words: list[str], heretic: Heretic, tmp_path: Path) -> None:
    """Questions are shared out, or a model is, and every score is that of one process."""
    assert heretic(*words).status == 0
    alone = scores_in(Path("run"))
    for placement in ("replicated", "tensor_parallel"):
        folder = f"run.dir={placement}"
        given = [word for word in words if not word.startswith("run.dir=")]
        ranks = [sys.executable, "-m", "heretic_ds.launching", "-n", "2", "--", *given, folder, "export.dir=run/model"]
        done = subprocess.run(
            [*ranks, f"evaluate={placement}"], env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found = scores_in(tmp_path / placement)
        for name in ("original", "export"):
            for own, one in zip(found[name]["scores"], alone[name]["scores"], strict=True):
                assert own["value"] == pytest.approx(one["value"], rel=1e-5, abs=1e-6), (name, own)


def test_what_is_missing_is_said_before_a_model_is_loaded(words: list[str], heretic: Heretic) -> None:
    """An export that is not there, tasks that are not, a placement that keeps the model elsewhere."""
    for more, said in {
        "export.dir=nowhere": "nowhere holds no whole exported model to ask",
        "benchmark.tasks=[tiny_choise]": "has no task 'tiny_choise'",
        "benchmark.tasks=[]": "give benchmark=heretic",
        "benchmark.limit=0": "benchmark.limit is 0",
    }.items():
        outcome = heretic(*words, more)
        assert outcome.status == 2 and said in outcome.err and not Path("run/benchmark.json").exists(), outcome.err
