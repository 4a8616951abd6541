"""Whether trials share forward passes, rows stop early, and passes over prompts start from what is known changes speed
and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from heretic_ds.ablation import Edit, Profile
from heretic_ds.runner.engine import Runner
from heretic_ds.runner.reuse import Reuse
from tests.e2e.conftest import Heretic, Material, read_results

TRIALS = 8
SEED = 9
"""Of trials of which the first edits a block that later ones leave alone: what it leaves behind would show in them."""
WAYS = [(1, False, False), (1, True, False), (1, False, True), (4, False, False), (4, True, True)]
"""Trials in a pass, early stop, and reuse of what is known of prompts."""


def first_edited(trial: dict[str, Any]) -> int:
    """The first block that a trial edits."""
    edit = Edit(None, {component: Profile(**numbers) for component, numbers in trial["profiles"].items()})
    return next(block for block in range(4) if any(edit.strength(component, block) for component in edit.profiles))


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Every trial's answers [trial][prompt][token], after those of the original: finer than how many are refusals."""
    noted: list[list[list[int]]] = []
    generate = Runner.generate

    def generate_and_note(engine: Runner, *arguments: Any) -> list[list[list[int]]]:
        noted.extend(answers := generate(engine, *arguments))
        return answers

    monkeypatch.setattr(Runner, "generate", generate_and_note)
    return noted


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ways_to_evaluate_trials_agree(
    heretic: Heretic,
    material: Material,
    tmp_path,
    monkeypatch: pytest.MonkeyPatch,
    answered: list[list[list[int]]],
    family: str,
) -> None:
    """All trials are drawn at random, so that every way evaluates the same ones."""
    found: list[list[dict[str, Any]]] = []
    answers: list[list[list[list[int]]]] = []
    late_passes: list[int] = []
    late = Reuse._late

    def noted_late(passes: Reuse, now: Any, *more: Any) -> Any:
        late_passes.append(now.start)
        return late(passes, now, *more)

    monkeypatch.setattr(Reuse, "_late", noted_late)
    for together, early_stop, reuse in WAYS:
        run = tmp_path / f"run-{together}-{early_stop}-{reuse}"
        late_passes.clear()
        answered.clear()
        outcome = heretic(
            *material.words(
                material.model(family), f"run.dir={run}", "search.strategy=direct", f"search.trials={TRIALS}",
                f"search.startup_trials={TRIALS}", f"search.seed={SEED}", f"search.trials_per_pass={together}",
                f"generation.early_stop={early_stop}", f"generation.prefill_reuse={reuse}",
            )
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        assert (len(late_passes) >= 2 * TRIALS // together) is reuse
        results = read_results(run)
        found.append(results["trials"])
        answers.append(list(answered))
        assert max(trial["pass"] for trial in results["trials"]) == TRIALS // together - 1
    first = found[0]
    assert len({trial["refusals"] for trial in first}) > 1
    assert first_edited(first[0]) < max(map(first_edited, first))
    for trials in found[1:]:
        for trial, expected in zip(trials, first, strict=True):
            assert trial["profiles"] == expected["profiles"]
            assert trial["refusals"] == expected["refusals"]
            assert abs(trial["kl"] - expected["kl"]) <= 1e-6 + 1e-4 * expected["kl"]
    for (_, early_stop, _), of_trials in zip(WAYS, answers, strict=True):
        for of_prompts, expected_of_prompts in zip(of_trials, answers[0], strict=True):
            for answer, expected_answer in zip(of_prompts, expected_of_prompts, strict=True):
                assert answer == (expected_answer[: len(answer)] if early_stop else expected_answer)
