"""Final scores: the export read from disk again, beside the original, on prompts that nothing was chosen by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_ds import pipeline
from heretic_ds.search.objective import Objective
from heretic_ds.stages.finish import Exported
from heretic_ds.stages.opening import Run
from heretic_ds.stages.sharing import rescoring
from tests.conftest import RunCommand
from tests.e2e import plain
from tests.e2e.conftest import Heretic, Material, files_below, outcome_of, read_results
from tests.e2e.plain import PlainModel
from tests.e2e.test_fixed_edit import EDIT

FINAL = ("verify.final=true", "verify.answer_tokens=16", "verify.kl_tokens=5", "verify.resamples=200")
TEST = {"target": ["stew kale, 1", "fry a pear, 2", "boil leeks, 3"], "baseline": ["mow grass, 4", "dig a hole, 5"]}


@pytest.fixture
def words(material: Material, tmp_path: Path) -> list[str]:
    """A short search with final scores on prompts of their own."""
    given = []
    for kind, prompts in TEST.items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(prompts) + "\n")
        given.append(f"prompts.{kind}.test.source={tmp_path}/{kind}.txt")
    usual = ("model.dtype=float32", "search.trials=3", "run.dir=run", *FINAL)
    return material.words(material.model("llama"), *usual, *given)


def manifest_of(folder: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "heretic_ds.json").read_text())
    return content


def test_they_are_those_of_the_files(words: list[str], heretic: Heretic, material: Material) -> None:
    """Each number once more, by plain transformers from both folders; in results, manifest, card, report and log."""
    outcome = heretic(*words)
    assert outcome.status == 0 and outcome.err == ""
    final = read_results("run")["final"]
    assert final["held_out"] and final["form"] == "model"
    assert final["prompts"] == {
        "target": {"part": "test", "prompts": 3, "seen": 0}, "baseline": {"part": "test", "prompts": 2, "seen": 0},
    }  # fmt: skip
    models = [PlainModel.load(folder) for folder in (material.model("llama"), Path("run/model"))]
    for kind, prompts in TEST.items():
        answers = [model.answers(prompts, 16) for model in models]
        counts = [sum(not text.strip() or any(c in text.lower() for c in "aei") for text in texts) for texts in answers]
        found = final["scores"][kind]["refusals"]
        assert [found["original"]["score"], found["edited"]["score"]] == counts
    logp = [model.first_token_log_probabilities(TEST["baseline"]) for model in models]
    found = final["scores"]["baseline"]
    assert found["kl_first_token"]["edited"]["score"] == pytest.approx(plain.kl(*logp), rel=1e-4)
    assert found["kl"]["edited"]["score"] > 0 and found["kl"]["original"] is None
    assert 1 <= found["perplexity"]["original"]["score"] < found["perplexity"]["edited"]["score"]
    assert found["kl"]["edited"]["low"] <= found["kl"]["edited"]["score"] <= found["kl"]["edited"]["high"]
    assert manifest_of("run/model")["final"] == final
    card, report = Path("run/model/README.md").read_text(), Path("run/report.html").read_text()
    assert "neither the direction nor the choice of the edit had seen" in card
    assert "of 3 target prompts (test)" in card and "held-out target prompts" in card and "Final scores" in report
    assert "Final scores: the exported model" in outcome.out and "3 target prompts (test)" in outcome.out
    before = files_below(Path("run"))
    assert "is finished" in heretic(*words).out and files_below(Path("run")) == before


def test_the_search_never_sees_test_prompts(
    words: list[str], heretic: Heretic, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ones change nothing of it, and in its own folder they change the final scores alone."""
    asked: list[str] = []
    begin = Objective.__init__

    def noted(self: Objective, engine: Any, target: Any, baseline: Any, *more: Any, **named: Any) -> None:
        asked.extend([*target.texts, *baseline.texts])
        begin(self, engine, target, baseline, *more, **named)

    monkeypatch.setattr(Objective, "__init__", noted)
    assert heretic(*words).status == 0
    first, exported = read_results("run"), files_below(tmp_path / "run" / "model")
    assert set(asked) == {*material.prompts["target.eval"], *material.prompts["baseline.eval"]}
    (tmp_path / "target.txt").write_text("roast nothing, 1\nbake it all, 2\n")
    assert heretic(*words, "run.dir=other").status == 0
    other = read_results("other")
    for key in ("baseline", "pareto", "selected", "verified"):
        assert first[key] == other[key], key
    assert outcome_of(first["trials"]) == outcome_of(other["trials"])
    assert first["final"]["scores"]["target"] != other["final"]["scores"]["target"]
    again = heretic(*words)
    assert again.status == 0 and "holds this very model already" in again.out
    assert {**read_results("run")["final"], "asked": None} == {**other["final"], "asked": None}
    now = files_below(tmp_path / "run" / "model")
    assert {name for name in now if now[name] != exported[name]} == {"README.md", "heretic_ds.json"}


def test_a_damaged_file_shows(words: list[str], heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored is what lies on disk, and not what was in memory."""
    assert heretic(*words).status == 0
    whole = read_results("run")

    def damaged(run: Run, *exported: Exported) -> None:
        file = exported[0].folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= -3
        save_file(tensors, file, metadata={"format": "pt"})
        rescoring.final_scores(run, *exported)

    monkeypatch.setattr(pipeline, "final_scores", damaged)
    assert heretic(*words, "run.dir=broken").status == 0
    broken = read_results("broken")
    assert broken["verified"] == whole["verified"]
    for name in ("kl_first_token", "kl", "perplexity"):
        found, expected = (results["final"]["scores"]["baseline"][name] for results in (broken, whole))
        assert found["original"] == expected["original"] and found["edited"] != expected["edited"]


class Killed(BaseException):
    """As if the process had ended."""


def test_a_run_that_was_ended_goes_on_where_it_was(
    words: list[str], heretic: Heretic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(rescoring, "measure_other", end)
        heretic(*words)
    left = read_results("run")
    assert left["selected"] is not None and left.get("final") is None and "finished" not in left
    weights = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pipeline, "finish", end)
        assert "holds this very model already" in heretic(*words).out
    final = manifest_of("run/model")["final"]
    with monkeypatch.context() as patched:
        patched.setattr(rescoring, "_score", end)  # they are there
        assert heretic(*words).status == 0
    results = read_results("run")
    assert results["final"] == final and results["finished"]
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_without_prompts_of_their_own(heretic: Heretic, material: Material) -> None:
    usual = ("model.dtype=float32", "search.trials=2", "run.dir=run", *FINAL)
    outcome = heretic(*material.words(material.model("llama"), *usual))
    assert outcome.status == 0
    final = read_results("run")["final"]
    assert not final["held_out"]
    assert final["prompts"]["target"] == {"part": "eval", "prompts": 14, "seen": 14}
    assert "none, so final scores are on the eval prompts" in outcome.out
    assert "final scores of target prompts are on the eval prompts, which also chose the edit" in outcome.out
    assert "Not all of these prompts were held back" in Path("run/model/README.md").read_text()
    off = heretic(*material.words(material.model("llama"), *usual, "verify.final=false"))
    assert off.status == 0 and read_results("run")["final"] is None


def test_answers_have_the_room_that_there_is(words: list[str], heretic: Heretic) -> None:
    outcome = heretic(*words, "verify.answer_tokens=100000")
    assert outcome.status == 0 and "the model's context has room for answers of" in outcome.out
    assert 16 < read_results("run")["final"]["answer_tokens"] < 1000


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_an_adapter_is_read_back(
    words: list[str], heretic: Heretic, material: Material, tmp_path: Path, family: str
) -> None:
    """It is the edit itself, so that the original with it scores as the edited model does."""
    named = [str(material.model(family)), *words[1:], "task=export", "ablation.row_norm=pre", *EDIT]
    for form in ("model", "adapter"):
        outcome = heretic(*named, f"export.format={form}", f"run.dir={form}")
        assert outcome.status == 0, outcome.err
    model, adapter = (manifest_of(tmp_path / form / "model")["final"] for form in ("model", "adapter"))
    assert adapter["form"] == "adapter"
    for kind in TEST:
        for name, expected in model["scores"][kind].items():
            found = adapter["scores"][kind][name]["edited"]["score"]
            assert found == pytest.approx(expected["edited"]["score"], rel=1e-3, abs=1e-6), name
    file = tmp_path / "adapter" / "model" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    assert model["scores"]["baseline"]["kl"]["edited"]["score"] > 1e-3 and torch.any(tensors[name] != 0)
    save_file({**tensors, "extra": tensors[name].clone()}, file)
    manifest = manifest_of(file.parent)
    del manifest["final"]
    (file.parent / "heretic_ds.json").write_text(json.dumps(manifest))
    outcome = heretic(*named, "export.format=adapter", "run.dir=adapter", "export.overwrite=true")
    assert outcome.status == 2 and "holds extra, which is no part of the model" in outcome.err


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["adapter", pytest.param("model", marks=pytest.mark.thorough)])
def test_two_ranks_find_what_one_does(
    words: list[str], heretic: Heretic, run_command: RunCommand, tmp_path: Path, form: str
) -> None:
    """Of a model, and of an adapter, which is added to the original's files where no rank has a whole weight."""
    usual = (*words, "task=export", "ablation.row_norm=pre", "generation.batch_size=3", *EDIT)
    assert heretic(*usual, "run.dir=one").status == 0
    placed = ("capture=tensor_parallel", "evaluate=tensor_parallel", "run.launch=2", f"export.format={form}")
    two = run_command(*usual, *placed, "run.dir=two", timeout=280)
    assert two.returncode == 0, two.stderr
    expected, found = (manifest_of(tmp_path / name / "model")["final"]["scores"] for name in ("one", "two"))
    for kind in TEST:
        assert found[kind].keys() == expected[kind].keys()
        for name, scores in expected[kind].items():
            numbers, told = (
                [each["edited"][end] for end in ("score", "low", "high")] for each in (scores, found[kind][name])
            )
            assert told == pytest.approx(numbers, rel=1e-3, abs=1e-6), name
    assert [entry.name for entry in (tmp_path / "two").iterdir() if entry.name.startswith(".model")] == []
