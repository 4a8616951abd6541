"""What a trial is measured by: an edit goes in, its scores on the eval prompts come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.placements import Evaluating
from heretic_ds.prompts import PromptSet
from heretic_ds.scoring.base import Decided, DistributionScorer, Scorer
from heretic_ds.scoring.kl import Divergence
from heretic_ds.search.trials import TrialScores

log = logging.getLogger(__name__)


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
    ) -> None:
        self._engine, self._target = engine, target
        self._first, self._text_of = scorers[0].name, text_of
        self._of_answers = [scorer for scorer in scorers if isinstance(scorer, Scorer)]
        self._print_answers = print_answers
        self._decided = self._early_stop() if early_stop and not print_answers else None
        self._answers: list[str] = []
        """What was answered under the edit that was scored last."""
        answers = engine.generate(target.rows, [None], self._decided)[0]
        self._divergence = Divergence().begin(engine, baseline.rows)
        others = [scorer for scorer in scorers if isinstance(scorer, DistributionScorer)]
        self._of_distributions = [scorer.begin(engine, baseline.rows) for scorer in others]
        self.original = self._scored(answers, 0.0, [scorer.of([None])[0] for scorer in self._of_distributions])
        """Scores of the original model."""
        self._original_answers = self._answers

    def score(self, edits: Sequence[Edit | None]) -> list[TrialScores]:
        """Scores of each edit; None stands for the weights as they are."""
        kls = self._divergence.of(edits)
        others = [scorer.of(edits) for scorer in self._of_distributions]
        answers = self._engine.generate(self._target.rows, edits, self._decided)
        of_edits = [[found[place] for found in others] for place in range(len(edits))]
        return [self._scored(*given) for given in zip(answers, kls, of_edits, strict=True)]

    def of_other(self, engine: Evaluating, target: PromptSet, baseline: PromptSet) -> TrialScores:
        """Scores of another model, whose engine this is and whose tokenizer has put the same prompts; its divergence is
        that from the original here. Raises UserError where a scorer or a placement cannot compare two models."""
        if self._of_distributions:
            names = ", ".join(scorer.name for scorer in self._of_distributions)
            raise UserError(f"scoring.scorers: {names} cannot compare two models; leave it out")
        answers = engine.generate(target.rows, [None], self._decided)[0]
        return self._scored(answers, self._divergence.of_other(engine, baseline.rows), [])

    def examples(self, most: int) -> list[dict[str, str]]:
        """The first target prompts, at most so many, with what the original model answered and what was answered under
        the edit that was scored last. An answer ends where its scores were settled."""
        told = list(zip(self._target.texts, self._original_answers, self._answers, strict=True))
        return [dict(zip(("prompt", "original", "edited"), each, strict=True)) for each in told[:most]]

    def _scored(self, rows: Sequence[Sequence[int]], kl: float, others: Sequence[float]) -> TrialScores:
        answers = self._answers = self._text_of(rows)
        if self._print_answers:
            for prompt, answer in zip(self._target.texts, answers, strict=True):
                log.info("prompt: %s\nanswer: %s", prompt, answer)
        scores = {scorer.name: scorer.score(list(self._target.texts), answers) for scorer in self._of_answers}
        scores |= {scorer.name: score for scorer, score in zip(self._of_distributions, others, strict=True)}
        return TrialScores(refusals=scores[self._first], kl=kl, scores=scores)

    def _early_stop(self) -> Decided | None:
        """A row may stop when every scorer has decided on it; a scorer that cannot tell keeps all rows going."""
        tests = [getattr(scorer, "decided", None) for scorer in self._of_answers]
        if any(test is None for test in tests):
            return None

        def decided(answers: Sequence[Sequence[int]]) -> list[bool]:
            return [all(test is not None and test(text) for test in tests) for text in self._text_of(answers)]

        return decided
