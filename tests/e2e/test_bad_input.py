"""Mistakes: each is one clear line on standard error and exit status 2, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families
from tests.conftest import RunCommand
from tests.e2e.conftest import Heretic, Material, files_below, read_results

PROFILE = [
    f"ablation.profiles.mlp.{key}"
    for key in ("max_weight=1", "max_weight_position=2", "min_weight=0.5", "min_weight_distance=1")
]


@pytest.fixture
def refused(heretic: Heretic, tmp_path: Path) -> Callable[..., str]:
    """`refused(words)`: the one line that the command ends with, having written nothing below its working folder."""

    def run(words: list[str], status: int = 2) -> str:
        before = files_below(tmp_path)
        outcome = heretic(*words)
        assert outcome.status == status, outcome.err
        assert files_below(tmp_path) == before
        assert not (tmp_path / "runs").exists() or any((tmp_path / "runs").iterdir())
        [line] = outcome.err.splitlines()
        assert line.startswith("heretic-ds: ") and len(line) < 500
        return line.removeprefix("heretic-ds: ")

    return run


@pytest.fixture
def damaged(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of a model to be spoilt."""
    folder = tmp_path_factory.mktemp("damaged") / "llama"
    shutil.copytree(material.model("llama"), folder)
    yield folder
    shutil.rmtree(folder)


def test_missing_model_folder(refused, material: Material, tmp_path: Path) -> None:
    line = refused(material.words(tmp_path / "nowhere", "prompts.target.train.source=a-set/of-the-hub"))
    assert f"model.path={tmp_path / 'nowhere'}" in line and "no such folder" in line


def test_truncated_weights(refused, material: Material, damaged: Path) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} is truncated" in refused(material.words(damaged))


def test_nan_in_the_weights(refused, material: Material, damaged: Path) -> None:
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(material.words(damaged))
    assert "model.layers.2.mlp.up_proj.weight" in line and "NaN" in line


def test_no_chat_template(refused, material: Material, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = families.tokenizer()
    tokenizer.chat_template = None
    model = families.save("llama", tmp_path_factory.mktemp("bare") / "llama", tokenizer)
    line = refused(material.words(model))
    assert "no chat template" in line and "prompts.template" in line


def test_empty_prompt_file(refused, material: Material, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    line = refused(material.words(material.model("llama"), "prompts.target.eval.source=empty.txt"))
    assert line.startswith("prompts.target.eval.source: empty.txt is empty")


def test_wrong_column_and_wrong_split(refused, material: Material, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("question\nWhat grows in the shade?\n")
    words = material.words(material.model("llama"), "prompts.baseline.train.source=table.csv")
    line = refused(words)
    assert line.startswith("prompts.baseline.train.column: ") and "its columns are: question" in line
    words = material.words(material.model("llama"), "prompts.baseline.eval.split=nowhere")
    assert refused(words).startswith("prompts.baseline.eval.split: ")


def test_prompts_longer_than_the_context(refused, material: Material, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("short\n" + "plums " * 60 + "\n")
    line = refused(material.words(material.model("llama"), "prompts.target.train.source=long.txt"))
    assert line.startswith("prompts.target.train: prompt 1 has ") and "context of 256" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serch.trials=3"], "there is no setting serch.trials; did you mean search.trials?"),
        (["search.trials=-1"], "search.trials is -1; it has to be at least 1"),
        (["search.trials=many"], "search.trials takes a whole number"),
        ([*PROFILE], "ablation.profiles.mlp is set, but task=abliterate searches for it"),
        (["export.trial=6"], "export.trial is 6, but search.trials=6 ends with trial 5"),
        (["scoring.scorers=[nowhere.Class]"], "scoring.scorers: nowhere.Class cannot be imported"),
        (["task=export", "export.trial=1"], "holds no trials"),
        (["task=export"], "no edit was named"),
        (["task=chat", "export.trial=1"], "holds no trials"),
    ],
)
def test_settings(words: list[str], said: str, refused, material: Material) -> None:
    assert said in refused(material.words(material.model("llama"), *words))


def test_an_original_that_declines_nothing(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """What was captured stays, and is used by the same command with other markers, which nothing else refuses."""
    outcome = heretic(*material.words(material.model("llama"), "scoring.markers=[never said by anyone]"))
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert "nothing to search for" in line and "scoring.markers" in line
    captured = files_below(tmp_path)
    assert list(captured) == ["runs/llama-layers4/directions.safetensors"]
    assert heretic(*material.words(material.model("llama"), "search.trials=2")).status == 0
    assert files_below(tmp_path).items() > captured.items()


def test_a_used_export_folder(refused, material: Material, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    model = material.model("llama")
    line = refused(material.words(model, "export.dir=mine"))
    assert f"export.dir={tmp_path / 'mine'} exists and is not empty" in line and "export.overwrite=true" in line
    assert "is not the folder of a model" in refused(material.words(model, "export.dir=mine", "export.overwrite=true"))
    line = refused(material.words(model, f"export.dir={model}", "export.overwrite=true"))
    assert "holds the original model itself" in line


def test_a_run_folder_of_another_configuration(refused, heretic: Heretic, material: Material) -> None:
    model = material.model("llama")
    assert heretic(*material.words(model, "search.trials=2")).status == 0
    for override, difference in (
        ("search.seed=3", "search.seed was 0, is now 3"),
        ("ablation.row_norm=none", 'ablation.row_norm was "full", is now "none"'),
        ("generation.max_new_tokens=9", "generation.max_new_tokens was 12, is now 9"),
    ):
        line = refused(material.words(model, "search.trials=3", override))
        assert difference in line and "run.dir" in line
    line = refused(material.words(model, "task=export", "export.trial=2", "export.dir=other"))
    assert "its trials are 0 to 1" in line
    other = 1 - read_results("runs/llama-layers4")["selected"]
    line = refused(material.words(model, "task=export", f"export.trial={other}"))
    assert "exists and is not empty" in line


def test_a_corrupt_journal(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "search.trials=3", "run.dir=run")
    assert heretic(*words).status == 0
    journal = tmp_path / "run" / "study.journal"
    good = journal.read_text().splitlines(keepends=True)
    words = material.words(material.model("llama"), "search.trials=4", "run.dir=run")
    for bad in (
        [*good[:2], "no record\n", *good[2:]],
        [*good[:2], '{"op_code": 99}\n', *good[2:]],
        [*good[:2], '{"op_code": 4, "worker_id": "x"}\n', *good[2:]],
    ):
        journal.write_text("".join(bad))
        outcome = heretic(*words)
        assert outcome.status == 2, outcome.err
        [line] = outcome.err.splitlines()
        assert "study.journal" in line and "run.dir" in line
        assert journal.read_text() == "".join(bad)


def test_real_commands(run_command: RunCommand, material: Material, damaged: Path, tmp_path: Path) -> None:
    """Nothing that libraries print comes beside the line, before any of them is loaded and after."""
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for words in (material.words(damaged), ["search.trials=-1", "a/model"]):
        ended = run_command(*words)
        assert ended.returncode == 2
        [line] = ended.stderr.splitlines()
        assert line.startswith("heretic-ds: ")
    assert list(tmp_path.iterdir()) == []
