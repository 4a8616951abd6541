"""The objective: what is asked of an engine, and how its answers become scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from heretic_ds.ablation import Edit
from heretic_ds.prompts import PromptSet
from heretic_ds.scoring import DistributionScorer, LengthScorer, RefusalScorer, Scorer
from heretic_ds.search.objective import How, Objective

TARGET = PromptSet(["t one", "t two", "t three"], [[1], [2], [3]])
BASELINE = PromptSet(["b one", "b two"], [[4], [5]])
EDITS = [Edit(0.5, {}), Edit(None, {})]
WORDS = {0: "", 1: "no", 2: "gladly", 3: "no way"}


class FakeEngine:
    """Answers every prompt with one token: the edit's number, 1 without an edit."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.decided: Any = None

    def distributions(self, rows: Any, edits: Sequence[Edit | None], read: Any, more: Any = None) -> list[list[float]]:
        self.calls.append(("distributions", (rows, list(edits))))
        return [[0.25 * (1 + number)] * len(rows) for number in range(len(edits))]

    def generate(self, rows: Any, edits: Sequence[Edit | None], decided: Any = None) -> list[list[list[int]]]:
        self.calls.append(("generate", (rows, list(edits))))
        self.decided = decided
        tokens = [1 if edit is None else 2 + EDITS.index(edit) for edit in edits]
        return [[[token]] * (len(rows) - 1) + [[0]] for token in tokens]


def text_of(answers: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(WORDS[token] for token in answer) for answer in answers]


def objective(engine: FakeEngine, scorers: Sequence[Scorer], **options: Any) -> Objective:
    return Objective(engine, TARGET, BASELINE, scorers, text_of, How(**options))  # type: ignore[arg-type]


def test_the_original_is_measured_once_before_everything() -> None:
    engine = FakeEngine()
    measured = objective(engine, [RefusalScorer(["no"]), LengthScorer()])
    assert measured.original.refusals == 3 and measured.original.kl == 0.0
    assert measured.original.scores == {"refusals": 3, "length": pytest.approx(2 / 3)}
    assert engine.calls == [("generate", (TARGET.rows, [None])), ("distributions", (BASELINE.rows, [None]))]


def test_each_edit_gets_its_own_numbers() -> None:
    engine = FakeEngine()
    measured = objective(engine, [RefusalScorer(["no"])])
    scores = measured.score(EDITS)
    assert [score.refusals for score in scores] == [1, 3] and [score.kl for score in scores] == [0.25, 0.5]
    assert engine.calls[2:] == [
        ("distributions", (BASELINE.rows, EDITS)),
        ("generate", (TARGET.rows, EDITS)),
    ]


def test_the_first_scorer_is_what_the_search_minimises() -> None:
    first = objective(FakeEngine(), [LengthScorer(), RefusalScorer(["no"])])
    assert first.original.refusals == pytest.approx(2 / 3) and first.original.scores["refusals"] == 3


class Gladly(RefusalScorer):
    name = "gladly"

    def __init__(self) -> None:
        super().__init__(["gladly"])


def test_rows_stop_when_every_scorer_has_decided() -> None:
    engine = FakeEngine()
    objective(engine, [RefusalScorer(["no"]), Gladly()])
    assert engine.decided([[1], [2], [1, 2], [0]]) == [False, False, True, False]
    objective(engine, [RefusalScorer(["no"])])
    assert engine.decided([[1], [2]]) == [True, False]


@pytest.mark.parametrize(
    ("scorers", "options"),
    [
        ([RefusalScorer(["no"]), LengthScorer()], {}),
        ([RefusalScorer(["no"])], {"early_stop": False}),
        ([RefusalScorer(["no"])], {"print_answers": True}),
    ],
    ids=["a scorer that needs whole answers", "switched off", "answers are to be read"],
)
def test_rows_run_to_their_end(scorers: list[Scorer], options: dict[str, bool]) -> None:
    engine = FakeEngine()
    objective(engine, scorers, **options).score(EDITS)
    assert engine.decided is None


def test_answers_are_shown_with_their_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "heretic_ds"):
        objective(FakeEngine(), [RefusalScorer(["no"])], print_answers=True)
    assert [record.getMessage() for record in caplog.records] == [
        "prompt: t one\nanswer: no", "prompt: t two\nanswer: no", "prompt: t three\nanswer: ",
    ]  # fmt: skip


class Likelihood(DistributionScorer):
    """Needs no answers."""

    name = "likelihood"

    def begin(self, engine: Any, prompts: Any, continuations: Any = None) -> Likelihood:
        engine.calls.append(("begun", prompts))
        return self

    def of(self, edits: Sequence[Edit | None]) -> list[float]:
        return [0.5 if edit is None else EDITS.index(edit) for edit in edits]


def test_scorers_that_need_distributions_get_no_answers() -> None:
    """And do not keep rows going that those of answers have decided on."""
    engine = FakeEngine()
    measured = objective(engine, [RefusalScorer(["no"]), Likelihood()])
    assert ("begun", BASELINE.rows) in engine.calls and engine.decided is not None
    assert measured.original.scores == {"refusals": 3, "likelihood": 0.5}
    assert [score.scores["likelihood"] for score in measured.score(EDITS)] == [0, 1]
    assert objective(FakeEngine(), [Likelihood(), RefusalScorer(["no"])]).original.refusals == 0.5
