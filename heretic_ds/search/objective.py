"""What a trial is measured by: an edit goes in, its scores on the eval prompts come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from heretic_ds.ablation import Edit
from heretic_ds.placements import Evaluating
from heretic_ds.prompts import PromptSet
from heretic_ds.scoring.base import Decided, DistributionScorer, Scorer
from heretic_ds.scoring.kl import Divergence
from heretic_ds.scoring.values import Values, values_of, values_of_edits
from heretic_ds.search.trials import TrialScores

log = logging.getLogger(__name__)


class _Told(NamedTuple):
    """A scorer's number, and what it is made of where the scorer tells."""

    score: float
    values: Values | None


class Objective:
    """Scores edits on one engine against the original model, whose answers and distributions are taken once.

    ``target`` prompts are answered for the ``scorers`` that need answers; ``baseline`` prompts give the KL divergence,
    and the distributions that others need. The first scorer is what the search minimises. ``text_of`` turns answers'
    token ids into text.
    """

    def __init__(
        self,
        engine: Evaluating,
        target: PromptSet,
        baseline: PromptSet,
        scorers: Sequence[Scorer | DistributionScorer],
        text_of: Callable[[Sequence[Sequence[int]]], list[str]],
        early_stop: bool = True,
        print_answers: bool = False,
        values: bool = False,
    ) -> None:
        """``values``: scores come with the numbers of every prompt that they are made of, see
        :class:`heretic_ds.scoring.values.Values`."""
        self._engine, self._target = engine, target
        self._first, self._text_of = scorers[0].name, text_of
        self._of_answers = [scorer for scorer in scorers if isinstance(scorer, Scorer)]
        self._print_answers, self._values = print_answers, values
        self._decided = self._early_stop() if early_stop and not print_answers else None
        self._answers: list[str] = []
        """What was answered under the edit that was scored last."""
        answers = engine.generate(target.rows, [None], self._decided)[0]
        self._divergence = Divergence().begin(engine, baseline.rows)
        others = [scorer for scorer in scorers if isinstance(scorer, DistributionScorer)]
        self._of_distributions = [scorer.begin(engine, baseline.rows) for scorer in others]
        [told] = self._without_answers([None], self._of_distributions)
        told[self._divergence.name] = _Told(0.0, Values((0.0,) * len(baseline.rows), "mean"))
        self.original = self._scored(answers, told)
        """Scores of the original model."""
        self._original_answers = self._answers

    def score(self, edits: Sequence[Edit | None]) -> list[TrialScores]:
        """Scores of each edit; None stands for the weights as they are."""
        told = self._without_answers(edits, [self._divergence, *self._of_distributions])
        answers = self._engine.generate(self._target.rows, edits, self._decided)
        return [self._scored(*given) for given in zip(answers, told, strict=True)]

    def of_other(self, engine: Evaluating, target: PromptSet, baseline: PromptSet) -> TrialScores:
        """Scores of another model, whose engine this is and whose tokenizer has put the same prompts; its divergence is
        that from the original here. Raises UserError where a scorer or a placement cannot compare two models."""
        answers = engine.generate(target.rows, [None], self._decided)[0]
        told: dict[str, _Told] = {}
        for scorer in (self._divergence, *self._of_distributions):
            values = Values(tuple(scorer.each_other(engine, baseline.rows)), scorer.combine or "mean")
            told[scorer.name] = _Told(values.score, values)
        return self._scored(answers, told)

    def examples(self, most: int) -> list[dict[str, str]]:
        """The first target prompts, at most so many, with what the original model answered and what was answered under
        the edit that was scored last. An answer ends where its scores were settled."""
        told = list(zip(self._target.texts, self._original_answers, self._answers, strict=True))
        return [dict(zip(("prompt", "original", "edited"), each, strict=True)) for each in told[:most]]

    def _without_answers(
        self, edits: Sequence[Edit | None], scorers: Sequence[DistributionScorer]
    ) -> list[dict[str, _Told]]:
        """What scorers that need no answers give each edit, by name."""
        told: list[dict[str, _Told]] = [{} for _ in edits]
        for scorer in scorers:
            values = values_of_edits(scorer, edits)
            if values is None:
                found = [_Told(score, None) for score in scorer.of(edits)]
            else:
                found = [_Told(each.score, each) for each in values]
            for each, number in zip(told, found, strict=True):
                each[scorer.name] = number
        return told

    def _scored(self, rows: Sequence[Sequence[int]], others: dict[str, _Told]) -> TrialScores:
        """Scores of the answers to the target prompts, with those that needed none."""
        answers, prompts = self._text_of(rows), list(self._target.texts)
        self._answers = answers
        if self._print_answers:
            for prompt, answer in zip(prompts, answers, strict=True):
                log.info("prompt: %s\nanswer: %s", prompt, answer)
        scores = {scorer.name: scorer.score(prompts, answers) for scorer in self._of_answers}
        scores |= {scorer.name: others[scorer.name].score for scorer in self._of_distributions}
        values: dict[str, Values | None] = {}
        if self._values:
            values = {scorer.name: values_of(scorer, prompts, answers) for scorer in self._of_answers}
            values |= {name: told.values for name, told in others.items()}
        return TrialScores(
            refusals=scores[self._first],
            kl=others[self._divergence.name].score,
            scores=scores,
            values={name: each for name, each in values.items() if each is not None},
        )

    def _early_stop(self) -> Decided | None:
        """A row may stop when every scorer has decided on it; a scorer that cannot tell keeps all rows going."""
        tests = [getattr(scorer, "decided", None) for scorer in self._of_answers]
        if any(test is None for test in tests):
            return None

        def decided(answers: Sequence[Sequence[int]]) -> list[bool]:
            return [all(test is not None and test(text) for test in tests) for text in self._text_of(answers)]

        return decided
