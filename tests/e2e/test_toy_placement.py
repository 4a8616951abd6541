"""A placement from outside the package: one class, one YAML file that names it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.conftest import Heretic, read_results

PLACEMENT = '''
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from heretic_ds.checkpoint.open import load_weights
from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.runner.comm import ALONE
from heretic_ds.runner.engine import Runner, Traits
from heretic_ds.settings import within


class Toy(Placement):
    """The whole model in one process, which keeps a diary."""

    name, phases = "toy", frozenset({"evaluate"})
    whole = True

    @dataclass
    class Options(Placement.Options):
        """What the diary is."""

        diary: str = "diary.txt"
        """File to write into."""
        lines: int = within(1, ge=1)
        """Lines for each entry."""

    options: Options

    def check(self, job) -> None:
        if self.options.lines > 9:
            raise UserError(f"{self.phase}.lines={self.options.lines} makes a long diary; set at most 9")

    def build(self, job) -> Runner:
        loaded = load_weights(job.opened)
        traits = Traits(self.name, decoding=self.noted)
        engine = runner_of(job, loaded.model, ALONE, traits)
        engine.whole = loaded
        return engine

    @contextmanager
    def noted(self, max_new_tokens):
        """Writes down that answers are made."""
        with Path(self.options.diary).open("a") as file:
            file.write("answers\\n" * self.options.lines)
        yield
'''

CHOICE = """
# A toy.
_target_: my_placements.toy.Toy
degree: null
diary: diary.txt
lines: 1
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The demo job, made short, that evaluates on the toy, whose class and file are written."""
    for file, text in {"mine/my_placements/toy.py": PLACEMENT, "conf/evaluate/toy.yaml": CHOICE}.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    return [
        "experiment=demo", "evaluate=toy", f"hydra.searchpath=[file://{tmp_path}/conf]", "search.trials=2",
        "search.startup_trials=2", "search.trials_per_pass=1", "generation.max_new_tokens=12", "export.max_kl=50",
        "verify.answer_tokens=12", "model.device=cpu", "prompts.response_prefix=", "run.dir=run",
        *(f"prompts.{kind}.{part}.slice=0:12" for kind in ("target", "baseline") for part in ("train", "eval", "test")),
    ]  # fmt: skip


def test_the_demo_runs_on_it(words: list[str], tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "heretic_ds", *words, "evaluate.lines=3"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}/mine"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    results = read_results(tmp_path / "run")
    assert results["world"]["capture"] == {"placement": "replicated", "degree": 1}
    assert results["world"]["evaluate"] == {"placement": "toy", "degree": 1}
    assert len(results["trials"]) == 2 and results["verified"] is not None
    diary = (tmp_path / "diary.txt").read_text().splitlines()
    assert len(diary) >= 3 * 4 and set(diary) == {"answers"}  # of the original, two trials, and one verification
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.lines=none", "evaluate.lines=none does not fit: evaluate.lines takes a whole number"),
        ("evaluate.lines=0", "evaluate.lines is 0; it has to be at least 1"),
        ("evaluate.lines=10", "evaluate.lines=10 makes a long diary; set at most 9"),
        ("evaluate.degree=2", "evaluate.degree is 2, but a toy model lies on one rank; leave it null"),
        ("evaluate.dairy=x", "there is no setting evaluate.dairy; did you mean evaluate.diary?"),
        (
            "evaluate.backend=autotp",
            "evaluate.backend=autotp is for evaluate=tensor_parallel alone, but evaluate is toy",
        ),
    ],
)
def test_its_mistakes_are_one_line(
    override: str, said: str, words: list[str], heretic: Heretic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "mine")
    ended = heretic(*words, override)
    assert (ended.status, ended.err) == (2, f"heretic-ds: {said}\n")
    assert not (tmp_path / "run").exists()
