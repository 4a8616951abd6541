"""What a trial is measured by: an edit goes in, its scores on the eval prompts come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from heretic_ds.ablation import Edit
from heretic_ds.placements import Evaluating
from heretic_ds.prompts import PromptSet
from heretic_ds.scoring.base import Decided, Scorer
from heretic_ds.scoring.kl import Divergence
from heretic_ds.search.trials import TrialScores

log = logging.getLogger(__name__)


class Objective:
    """Scores edits on one engine against the original model, whose answers and distributions are taken once.

    ``target`` prompts are answered and scored by ``scorers``, the first of which is what the search minimises;
    ``baseline`` prompts give the KL divergence. ``text_of`` turns answers' token ids into text.
    """

    def __init__(
        self,
        engine: Evaluating,
        target: PromptSet,
        baseline: PromptSet,
        scorers: Sequence[Scorer],
        text_of: Callable[[Sequence[Sequence[int]]], list[str]],
        early_stop: bool = True,
        print_answers: bool = False,
    ) -> None:
        self._engine, self._target = engine, target
        self._scorers, self._text_of = scorers, text_of
        self._print_answers = print_answers
        self._decided = self._early_stop() if early_stop and not print_answers else None
        self.original = self._score_answers(engine.generate(target.rows, [None], self._decided)[0], kl=0.0)
        """Scores of the original model."""
        self._divergence = Divergence(engine, baseline.rows)

    def score(self, edits: Sequence[Edit | None]) -> list[TrialScores]:
        """Scores of each edit; None stands for the weights as they are."""
        kls = self._divergence.of(edits)
        answers = self._engine.generate(self._target.rows, edits, self._decided)
        return [self._score_answers(rows, kl) for rows, kl in zip(answers, kls, strict=True)]

    def _score_answers(self, rows: Sequence[Sequence[int]], kl: float) -> TrialScores:
        answers = self._text_of(rows)
        if self._print_answers:
            for prompt, answer in zip(self._target.texts, answers, strict=True):
                log.info("prompt: %s\nanswer: %s", prompt, answer)
        scores = {scorer.name: scorer.score(list(self._target.texts), answers) for scorer in self._scorers}
        return TrialScores(refusals=scores[self._scorers[0].name], kl=kl, scores=scores)

    def _early_stop(self) -> Decided | None:
        """A row may stop when every scorer has decided on it; a scorer that cannot tell keeps all rows going."""
        tests = [getattr(scorer, "decided", None) for scorer in self._scorers]
        if any(test is None for test in tests):
            return None

        def decided(answers: Sequence[Sequence[int]]) -> list[bool]:
            return [all(test is not None and test(text) for test in tests) for text in self._text_of(answers)]

        return decided
