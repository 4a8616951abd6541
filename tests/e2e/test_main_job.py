"""The main job and the tasks around it: what they leave behind, what may change between two runs, what is repeated."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import plain
from tests.e2e.conftest import NEW_TOKENS, SIZES, Heretic, Material, Started, files_below, outcome_of, read_results
from tests.e2e.plain import PlainModel

KEYS = {
    "schema", "task", "model", "world", "prompts", "baseline", "trials", "pareto", "selected", "verified", "timings",
    "peak_memory_bytes", "versions",
}  # fmt: skip
TRIAL_KEYS = {"index", "pass", "state", "direction_index", "profiles", "refusals", "kl", "scores", "seconds"}
PROFILE_KEYS = {"max_weight", "max_weight_position", "min_weight", "min_weight_distance"}
ONE_EDIT = [
    f"ablation.profiles.mlp.{key}"
    for key in ("max_weight=1", "max_weight_position=2", "min_weight=0.5", "min_weight_distance=1")
]


def check_contract(results: dict[str, Any], task: str, model: Path, trials: int) -> None:
    """Every public key of ``results.json``, with a value that can be."""
    assert results.keys() >= KEYS
    assert (results["schema"], results["task"], results["model"]) == (1, task, str(model))
    placement = {"placement": "replicated", "degree": 1}
    assert results["world"] == {"size": 1, "capture": placement, "evaluate": placement}
    assert results["prompts"] == {f"{kind}_eval": SIZES[f"{kind}.eval"] for kind in ("target", "baseline")}
    assert 0 < results["baseline"]["refusals"] <= SIZES["target.eval"]
    assert [trial["index"] for trial in results["trials"]] == list(range(trials))
    for trial in results["trials"]:
        assert trial.keys() >= TRIAL_KEYS and trial["state"] == "complete"
        assert 0 <= trial["refusals"] <= SIZES["target.eval"] and 0 <= trial["kl"] < math.inf
        assert trial["scores"]["refusals"] == trial["refusals"] and 0 < trial["seconds"] < 60
        assert trial["direction_index"] is None or 0 <= trial["direction_index"] <= 3
        assert all(numbers.keys() == PROFILE_KEYS for numbers in trial["profiles"].values())
    assert results["pareto"] and set(results["pareto"]) <= set(range(trials))
    assert results["selected"] in results["pareto"]
    selected = results["trials"][results["selected"]]
    assert results["verified"]["refusals"] == selected["refusals"]
    assert results["verified"]["kl"] == pytest.approx(selected["kl"], rel=1e-6)
    assert {"load", "capture", "search", "verify", "export"} <= results["timings"].keys()
    assert all(0 <= seconds < 100 for seconds in results["timings"].values())
    assert len(results["peak_memory_bytes"]["host"]) == len(results["peak_memory_bytes"]["device"]) == 1
    assert results["peak_memory_bytes"]["host"][0] > 10**8
    assert {"python", "torch", "transformers", "safetensors", "heretic-ds"} <= results["versions"].keys()


def test_the_whole_job(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    model = material.model("llama")
    words = material.words(model)
    first = heretic(*words)
    assert first.status == 0 and first.err == ""
    run = tmp_path / "runs" / model.name  # the default
    results = read_results(run)
    check_contract(results, "abliterate", model, trials=6)
    fewest = min(trial["refusals"] for trial in results["trials"])
    assert results["verified"]["refusals"] == fewest
    left = ["study.journal", "directions.safetensors", "config.yaml", "run.log", "pareto.png"]
    assert all((run / name).stat().st_size > 0 for name in left)
    assert re.findall(r"^trial (\d+)  refusals", first.out, re.MULTILINE) == list("012345")

    before = files_below(tmp_path)
    again = heretic(*words)
    assert again.status == 0 and f"runs/{model.name} is finished" in again.out
    assert files_below(tmp_path) == before

    more = heretic(*words, "generation.batch_size=4", "capture.degree=1", "search.trials=9")
    assert more.status == 0, more.err
    sizes = json.loads((run / "measured.json").read_text())["batch_sizes"]["replicated, 1 of 1 ranks, cpu"]
    assert set(sizes.values()) == {4}
    longer = read_results(run)
    check_contract(longer, "abliterate", model, trials=9)
    assert outcome_of(longer["trials"][:6]) == outcome_of(results["trials"])
    manifest = json.loads((run / "model" / "heretic_ds.json").read_text())
    assert manifest["trial"] == longer["selected"]
    assert manifest["edit"]["profiles"] == longer["trials"][longer["selected"]]["profiles"]

    other = next(index for index in (8, 7) if index != longer["selected"])
    assert heretic(*words, "task=export", f"export.trial={other}", "export.dir=other").status == 0
    manifest = json.loads((tmp_path / "other" / "heretic_ds.json").read_text())
    assert manifest["trial"] == other and manifest["verified"]["refusals"] == longer["trials"][other]["refusals"]
    assert manifest["verified"]["kl"] == pytest.approx(longer["trials"][other]["kl"], rel=1e-4)
    assert read_results(run) == longer


def test_the_exported_model_is_the_verified_one(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    for family in ("gpt2", "mixtral"):
        model = material.model(family)
        assert heretic(*material.words(model, f"run.dir={family}", "search.trials=3")).status == 0
        results, exported = read_results(family), tmp_path / family / "model"
        before, after = PlainModel.load(model), PlainModel.load(exported)
        prompts = material.prompts["baseline.eval"]
        logp = [plain_model.first_token_log_probabilities(prompts) for plain_model in (before, after)]
        expected = plain.kl(*logp)
        assert results["verified"]["kl"] == pytest.approx(expected, abs=1e-6 + 1e-4 * expected, rel=0)
        alone = heretic(*material.words(exported, "task=evaluate", f"run.dir={family}-alone"))
        assert alone.status == 0, alone.err
        evaluated = read_results(f"{family}-alone")
        assert evaluated["trials"][0]["refusals"] == evaluated["baseline"]["refusals"]
        assert evaluated["baseline"]["refusals"] == results["verified"]["refusals"]
        assert evaluated["trials"][0]["kl"] < 1e-6


def test_fixed_edits_share_a_folder(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    model = material.model("llama")
    words = material.words(model, "task=evaluate")
    run = tmp_path / "runs" / f"{model.name}-evaluate"
    assert heretic(*words).status == 0
    unedited = read_results(run)
    check_contract(unedited, "evaluate", model, trials=1)
    assert unedited["trials"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert heretic(*words, *ONE_EDIT).status == 0
    edited = read_results(run)
    check_contract(edited, "evaluate", model, trials=1)
    assert edited["trials"][0]["kl"] > 1e-3
    assert heretic(*words, *ONE_EDIT, "ablation.direction_index=1.5").status == 0
    latest = read_results(run)
    assert latest["trials"][0]["direction_index"] == 1.5
    assert latest["trials"][0]["kl"] != edited["trials"][0]["kl"]


def test_no_trial_within_the_limit(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=3", "export.max_kl=1e-9")
    outcome = heretic(*words)
    results = read_results("run")
    nearest = min(results["trials"], key=lambda trial: trial["kl"])
    assert outcome.status == 1
    [line] = outcome.err.splitlines()
    assert f"the closest was trial {nearest['index']} with KL {nearest['kl']:.3g}" in line
    assert "export.max_kl" in line
    assert results["selected"] is None and results["verified"] is None and results["pareto"]
    assert not (tmp_path / "run" / "model").exists()
    widened = heretic(*(word for word in words if "max_kl" not in word), "export.max_kl=50")
    assert widened.status == 0 and read_results("run")["selected"] is not None
    assert outcome_of(read_results("run")["trials"]) == outcome_of(results["trials"])


def test_a_named_trial_is_exported_instead(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=4", "export.trial=1")
    assert heretic(*words, "export.max_kl=1e-9").status == 0
    assert read_results("run")["selected"] == 1
    assert json.loads((tmp_path / "run" / "model" / "heretic_ds.json").read_text())["trial"] == 1


def test_a_scorer_of_ones_own_and_answers_in_print(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    (tmp_path / "my_scorers.py").write_text(
        "from heretic_ds.scoring import Scorer\n\n\n"
        "class Vowels(Scorer):\n"
        "    name = 'vowels'\n\n"
        "    def score(self, prompts, answers):\n"
        "        return sum(answer.count(letter) for answer in answers for letter in 'aeiou')\n"
    )
    model = material.model("llama")
    words = material.words(model, "run.dir=run", "search.trials=2", "scoring.scorers=[my_scorers.Vowels,refusals]")
    outcome = heretic(*words, "scoring.print_answers=true")
    assert outcome.status == 0, outcome.err
    answers = PlainModel.load(model).answers(material.prompts["target.eval"], NEW_TOKENS)
    vowels = sum(answer.count(letter) for answer in answers for letter in "aeiou")
    refusals = sum(any(letter in answer.lower() for letter in "aei") or not answer.strip() for answer in answers)
    results = read_results("run")
    assert results["baseline"] == {"refusals": vowels, "scores": {"vowels": vowels, "refusals": refusals}}
    assert all(trial["scores"].keys() == {"vowels", "refusals"} for trial in results["trials"])
    for prompt, answer in zip(material.prompts["target.eval"], answers, strict=True):
        assert f"prompt: {prompt}\nanswer: {answer}" in outcome.out


def test_chat_from_a_pipe(
    heretic: Heretic, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = material.model("llama")
    assert heretic(*material.words(model, "search.trials=2")).status == 0
    before = files_below(tmp_path / "runs")
    question = material.prompts["target.eval"][0]
    said = {}
    for name, more in (("original", []), ("edited", ["export.trial=1"])):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
        outcome = heretic(*material.words(model, "task=chat", f"task.answer_tokens={NEW_TOKENS}", *more))
        assert outcome.status == 0, outcome.err
        said[name] = outcome.out
    [answer] = PlainModel.load(model).answers([question], NEW_TOKENS)
    assert answer.strip() in said["original"] and said["original"] != said["edited"]
    trial = files_below(tmp_path / "runs").keys()
    assert trial == before.keys()


def test_other_libraries_do_not_speak_through_hydra(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """Whose own messages about the jobs of a sweep are shown, once."""
    words = material.words(material.model("llama"), "task=evaluate")
    outcome = heretic(*words, "-m", f"run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("[HYDRA] Launching 1 jobs locally") == 1
    handlers = [type(handler).__name__ for handler in logging.getLogger().handlers]
    assert "StreamHandler" not in handlers and not logging.getLogger("hydra").propagate


def test_libraries_say_nothing_in_what_a_whole_run_says(
    start: Callable[[list[str]], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed would, which transformers imports as it saves a model where accelerate is installed."""
    pytest.importorskip("accelerate", reason="nothing imports DeepSpeed then")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    few = ("search.trials=1", "search.startup_trials=1", "run.interactive=false", "run.dir=run")
    started = start(["experiment=demo", *few])
    assert started.end() == 0
    assert "WARNING" not in started.said() and "wrote 57 tensors" in started.said()
