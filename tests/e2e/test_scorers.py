"""Scorers of all kinds in whole runs: their numbers computed again without the package, and what results.json says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.e2e.conftest import NEW_TOKENS, Heretic, Material, outcome_of, read_results
from tests.e2e.plain import PlainModel
from tests.judges import save_judge

NAMED = {
    "scores",
    "profiles",
    "versions",
    "timings",
    "batch_sizes",
    "finished",
    "capture",
    "evaluate",
    "overlaps",
    "asked",
}
"""What holds keys that are names of scorers, components, packages, stages, settings."""


def keys_of(value: Any, name: str = "") -> Iterator[str]:
    """Every key of results, those aside that are names."""
    if isinstance(value, list):
        for each in value:
            yield from keys_of(each, name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if name not in NAMED:
                yield key
            yield from keys_of(inner, key if name not in NAMED else name)


@torch.no_grad()
def teacher_forced(model: PlainModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities after a prompt and after each token of an answer, one pass without padding."""
    logits = model.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1)


@torch.no_grad()
def beginnings(model: PlainModel, prompts: list[str], tokens: int) -> list[list[int]]:
    """The first tokens of greedy answers, without what ends them."""
    found = []
    for prompt in prompts:
        ids = model.ids(prompt)
        row = model.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
        found.append(row[: row.index(2)] if 2 in row else row)
    return found


def perplexity_of(logp: torch.Tensor, tokens: list[int]) -> float:
    chosen = [logp[at, token] for at, token in enumerate(tokens)]
    return math.exp(-sum(map(float, chosen)) / len(chosen)) if chosen else 1.0


def test_numbers_of_all_scorers_are_right_and_documented(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """Of the original, and of the chosen edit on really edited weights; many trials in a pass."""
    folder = material.model("llama")
    original = PlainModel.load(folder)
    told = original.answers(material.prompts["target.eval"], NEW_TOKENS)
    sign = min(set("".join(told)), key=lambda sign: (abs(sum(sign in answer for answer in told) - len(told) / 2), sign))
    model = save_judge(tmp_path / "judge", sign=sign)
    (tmp_path / "texts.txt").write_text("cook a pear\nplums and leeks, thyme\n")
    scorers = (
        "scoring.scorers=[refusals,length,repetition,"
        f"{{_target_:classifier,model:{model},direction:none}},"
        "{_target_:kl_tokens,tokens:5},perplexity,"
        "{_target_:perplexity,name:on_text,of:text,tokens:9,prompts:texts.txt},"
        "{_target_:refusals,name:elsewhere,prompts:baseline.eval}]"
    )
    words = material.words(folder, "run.dir=run", "search.trials=4", "search.trials_per_pass=3", scorers)
    outcome = heretic(*words)
    assert outcome.status == 0, outcome.err
    results = read_results("run")
    edited = PlainModel.load(tmp_path / "run" / "model")
    baseline = material.prompts["baseline.eval"]
    rows = [original.ids(prompt)[0].tolist() for prompt in baseline]
    starts = beginnings(original, baseline, NEW_TOKENS)
    texts = [original.tokenizer(text)["input_ids"][:10] for text in ("cook a pear", "plums and leeks, thyme")]
    for scores, other in ((results["baseline"]["scores"], original), (results["verified"]["scores"], edited)):
        pairs = [
            (teacher_forced(original, row, start[:4]), teacher_forced(other, row, start[:4]))
            for row, start in zip(rows, starts, strict=True)
        ]
        kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)
        assert scores["kl_tokens"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        of_answers = [
            perplexity_of(teacher_forced(other, row, start), start) for row, start in zip(rows, starts, strict=True)
        ]
        assert scores["perplexity"] == pytest.approx(math.exp(sum(map(math.log, of_answers)) / len(rows)), rel=1e-4)
        of_texts = [perplexity_of(teacher_forced(other, text[:1], text[1:]), text[1:]) for text in texts]
        assert scores["on_text"] == pytest.approx(math.sqrt(of_texts[0] * of_texts[1]), rel=1e-4)
        answers = other.answers(material.prompts["target.eval"], NEW_TOKENS)
        assert scores["length"] == pytest.approx(sum(len(answer.split()) for answer in answers) / len(answers))
        assert scores["classifier"] == sum(sign in answer for answer in answers)
        assert scores["refusals"] == sum(any(map(answer.lower().__contains__, "aei")) for answer in answers)
        counted = sum(any(map(answer.lower().__contains__, "aei")) for answer in other.answers(baseline, NEW_TOKENS))
        assert scores["elsewhere"] == counted
    assert 0 < results["baseline"]["scores"]["classifier"] < len(told)
    assert results["baseline"]["scores"]["kl_tokens"] == 0.0 < results["verified"]["scores"]["kl_tokens"]
    selected = results["trials"][results["selected"]]["scores"]
    assert selected == pytest.approx(results["verified"]["scores"], rel=1e-4)
    [agreed] = results["agreement"]["edited"]
    assert (agreed["first"], agreed["second"]) == ("refusals", "classifier")
    assert agreed["both"] + agreed["first_only"] == results["verified"]["scores"]["refusals"]
    assert agreed["both"] + agreed["second_only"] == results["verified"]["scores"]["classifier"]
    assert "Agreement on answers of the edited model: Cohen's kappa" in outcome.out
    assert [each["name"] for each in results["scorers"]] == list(results["baseline"]["scores"])
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "scorers.md"))
    documented = set(re.findall(r"`([a-z_]+)`", pages))
    assert set(keys_of(results)) <= documented


def test_a_first_scorer_that_is_maximised(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """The search wants it large, people see its true numbers, and the same command goes on as if never stopped."""
    (tmp_path / "maximised_scorers.py").write_text(
        "from heretic_ds.scoring import Scorer\n\n\n"
        "class Vowels(Scorer):\n"
        "    name, combine, direction = 'vowels', 'mean', 'maximize'\n\n"
        "    def each(self, prompts, answers):\n"
        "        return [sum(answer.count(letter) for letter in 'aeiou') for answer in answers]\n"
    )
    words = material.words(material.model("llama"), "scoring.scorers=[maximised_scorers.Vowels]")
    usual = [word for word in words if not word.startswith("search.trials=")]
    assert heretic(*usual, "run.dir=whole", "search.trials=6").status == 0
    whole = read_results("whole")
    found = [trial["refusals"] for trial in whole["trials"]]
    assert min(found) >= 0 and len(set(found)) > 1
    assert max(whole["pareto"], key=lambda index: found[index]) == whole["pareto"][0]
    assert whole["selected"] == max(range(6), key=lambda index: (found[index], -whole["trials"][index]["kl"]))
    records = map(json.loads, (tmp_path / "whole" / "study.journal").read_text().splitlines())
    minimised = [record["user_attrs"]["minimised"][0] for record in records if "values" in record]
    assert minimised == pytest.approx([-each / whole["baseline"]["refusals"] for each in found])
    assert heretic(*usual, "run.dir=parts", "search.trials=4").status == 0
    assert heretic(*usual, "run.dir=parts", "search.trials=6").status == 0
    assert outcome_of(read_results("parts")["trials"]) == outcome_of(whole["trials"])


def test_a_judge_that_was_trained_anew_is_another_one(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """And where and how fast it works is not what it gives."""
    judge = save_judge(tmp_path / "judge")
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=2")
    scorers = f"scoring.scorers=[refusals,{{_target_:classifier,model:{judge}%s}}]"
    assert heretic(*words, scorers % "").status == 0
    again = heretic(*words, scorers % ",batch_size:3,device:cpu")
    assert again.status == 0 and "nothing was done" in again.out
    save_judge(judge, labels=("REFUSAL", "ANSWER"))
    refused = heretic(*words, scorers % "", "search.trials=3")
    assert refused.status == 2 and "scoring.classifier.files" in refused.err


@pytest.mark.parametrize(
    ("scorers", "said"),
    [
        (
            "[refusals,{_target_:classifier,model:nowhere/here/at/all}]",
            "classifier.model=nowhere/here/at/all cannot be",
        ),
        ("[refusals,{_target_:perplexity,token:3}]", "perplexity has no setting token; did you mean tokens?"),
        ("[refusals,{_target_:length,prompts:nowhere.txt}]", "scoring.scorers.length.prompts.source: there is no file"),
        ("[{_target_:length,direction:none},refusals]", "begins with 'length', which is only reported"),
    ],
)
def test_mistakes_are_one_line(heretic: Heretic, material: Material, tmp_path: Path, scorers: str, said: str) -> None:
    outcome = heretic(*material.words(material.model("llama"), "run.dir=run", f"scoring.scorers={scorers}"))
    assert outcome.status == 2 and said in outcome.err and not (tmp_path / "run").exists()
    assert len(outcome.err.strip().splitlines()) == 1
