"""What a trial is measured by: an edit goes in, its scores on the eval prompts come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from heretic_ds.ablation import Edit
from heretic_ds.placements import Evaluating
from heretic_ds.prompts import PromptSet, TokenRows
from heretic_ds.scoring import refuse_unscreened
from heretic_ds.scoring.agreement import Agreement, agreements
from heretic_ds.scoring.base import Decided, DistributionScorer, Scorer
from heretic_ds.scoring.kl import Divergence
from heretic_ds.scoring.values import Values, score_and_values, values_of_edits
from heretic_ds.search.screened.screening import Screening
from heretic_ds.search.trials import TrialScores
from heretic_ds.settings.scoring import MAXIMIZE
from heretic_ds.world import World

log = logging.getLogger(__name__)


class _Told(NamedTuple):
    """A scorer's number, and what it is made of where the scorer tells."""

    score: float
    values: Values | None


@dataclass
class _Asked:
    """Prompts that are answered, and the scorers of these answers."""

    prompts: PromptSet
    scorers: list[Scorer] = field(default_factory=list)
    decided: Decided | None = None
    """When a row may stop."""

    def scored(self, answers: Sequence[str], alone: bool) -> tuple[dict[str, _Told], tuple[Agreement, ...]]:
        """What the scorers say of the answers, and how far those agree that flag answers."""
        prompts = list(self.prompts.texts)
        told = {each.name: _Told(*score_and_values(each, prompts, answers, alone)) for each in self.scorers}
        flagging = [each.name for each in self.scorers if each.flags]
        flags = {name: values.each for name in flagging if (values := told[name].values) is not None}
        return told, agreements(flags)


@dataclass(frozen=True)
class How:
    """What is done beside scoring, and what not."""

    early_stop: bool = True
    """Rows stop as soon as every scorer of their answers has decided."""
    print_answers: bool = False
    """Each prompt and its answer are logged; rows then run to their end."""
    values: bool = False
    """Scores come with the numbers of every prompt that they are made of, see
    :class:`heretic_ds.scoring.values.Values`."""


class Objective:
    """Scores edits on one engine against the original model, whose answers and distributions are taken once.

    ``target`` prompts are answered for the ``scorers`` that need answers; ``baseline`` prompts give the KL divergence,
    and the distributions that others need. Scorers that ``own`` names have prompts of their own. The first scorer is
    what the search goes by. ``text_of`` turns answers' token ids into text, which rank 0 of the ``world`` scores.
    """

    def __init__(
        self,
        engine: Evaluating,
        target: PromptSet,
        baseline: PromptSet,
        scorers: Sequence[Scorer | DistributionScorer],
        text_of: Callable[[Sequence[Sequence[int]]], list[str]],
        how: How = How(),
        own: Mapping[str, PromptSet] | None = None,
        world: World | None = None,
    ) -> None:
        self._engine, self._own, self._world = engine, own or {}, world or World()
        self._goes_by = scorers[0]
        self._first, self._maximize = scorers[0].name, scorers[0].direction == MAXIMIZE
        self._target, self._text_of = target, text_of
        self._how = how
        of_answers = [scorer for scorer in scorers if isinstance(scorer, Scorer)]
        self._get_ready(of_answers)
        self._asked = self._ask(target, of_answers, how.early_stop and not how.print_answers)
        self._answers: list[str] = []
        """What was answered to target prompts under the edit that was scored last."""
        self.screening: Screening | None = None
        """What edits are compared by before they are scored, where the search does so."""
        answers = [engine.generate(asked.prompts.rows, [None], asked.decided)[0] for asked in self._asked]
        self._original_tokens = answers
        self._divergence = Divergence().begin(engine, baseline.rows)
        others = [scorer for scorer in scorers if isinstance(scorer, DistributionScorer)]
        self._of_distributions = self._begun(others, baseline)
        self._order = [scorer.name for scorer in scorers]
        [told] = self._without_answers([None], [each for each in self._of_distributions if not _from_itself(each)])
        for scorer in filter(_from_itself, (self._divergence, *self._of_distributions)):
            prompts = len(self._own.get(scorer.name, baseline).rows)
            told[scorer.name] = _Told(0.0, Values((0.0,) * prompts, "mean"))
        [self.original] = self._scored([[each] for each in answers], [told])
        """Scores of the original model."""
        self._original_answers = self._answers

    def score(self, edits: Sequence[Edit | None]) -> list[TrialScores]:
        """Scores of each edit; None stands for the weights as they are."""
        told = self._without_answers(edits, [self._divergence, *self._of_distributions])
        generate = self._engine.generate
        return self._scored([generate(asked.prompts.rows, edits, asked.decided) for asked in self._asked], told)

    def of_other(
        self, engine: Evaluating, target: PromptSet, baseline: PromptSet, own: Mapping[str, PromptSet] | None = None
    ) -> TrialScores:
        """Scores of another model, whose engine this is and whose tokenizer has put the same prompts; its divergence is
        that from the original here. Raises UserError where a scorer or a placement cannot compare two models."""
        told: dict[str, _Told] = {}
        own = own or {}
        for scorer in (self._divergence, *self._of_distributions):
            rows = own.get(scorer.name, baseline).rows
            values = Values(tuple(scorer.each_other(engine, rows)), scorer.combine or "mean")
            told[scorer.name] = _Told(values.score, values)
        answers = []
        for asked in self._asked:
            given = next((own[each.name] for each in asked.scorers if each.name in own), target)
            answers.append(engine.generate(given.rows, [None], asked.decided))
        return self._scored(answers, [told])[0]

    def declined(self) -> tuple[TokenRows, TokenRows]:
        """The prompts that the original model declines, and what it answers to them until its scores are settled: those
        to which the first scorer gives a number above 0 alone. Every rank calls it. Raises UserError where that scorer
        is not of answers, or is to be maximised."""
        asked = [(at, scorer) for at, each in enumerate(self._asked) for scorer in each.scorers]
        of_first = [(at, scorer) for at, scorer in asked if scorer.name == self._first]
        refuse_unscreened(self._goes_by)
        [(place, first)] = of_first
        prompts, answers = self._asked[place].prompts, self._original_tokens[place]
        told = list(zip(prompts.texts, self._text_of(answers), strict=True))
        found = self._world.decide(
            lambda: [at for at, (prompt, answer) in enumerate(told) if first.score([prompt], [answer]) > 0],
            self._scoring,
        )
        return [prompts.rows[at] for at in found], [answers[at] for at in found]

    def examples(self, most: int) -> list[dict[str, str]]:
        """The first target prompts, at most so many, with what the original model answered and what was answered under
        the edit that was scored last. An answer ends where its scores were settled."""
        told = list(zip(self._target.texts, self._original_answers, self._answers, strict=True))
        return [dict(zip(("prompt", "original", "edited"), each, strict=True)) for each in told[:most]]

    def _get_ready(self, scorers: Sequence[Scorer]) -> None:
        """Before the first pass: what it takes, such as a judge's weights, takes memory that batches then lack."""
        slow = [scorer for scorer in scorers if type(scorer).ready is not Scorer.ready]
        self._scoring = "scoring the answers" if slow else None
        if slow:

            def prepare() -> None:
                for scorer in slow:
                    scorer.ready()

            self._world.decide(prepare, "making scorers ready")

    def _ask(self, target: PromptSet, scorers: Sequence[Scorer], early_stop: bool) -> list[_Asked]:
        """The scorers by the prompts whose answers they score; target prompts come first, and are always answered."""
        found = [_Asked(target)]
        for scorer in scorers:
            given = self._own.get(scorer.name, target)
            asked = next((each for each in found if each.prompts == given), None)
            if asked is None:
                found.append(asked := _Asked(given))
            asked.scorers.append(scorer)
        for asked in found:
            asked.decided = self._early_stop(asked.scorers) if early_stop else None
        return found

    def _begun(self, scorers: Sequence[DistributionScorer], baseline: PromptSet) -> list[DistributionScorer]:
        """Scorers that have taken the original, with what they want of its own answers."""
        given = [self._own.get(scorer.name, baseline) for scorer in scorers]
        answered: list[tuple[PromptSet, TokenRows]] = []
        begun = []
        for scorer, prompts in zip(scorers, given, strict=True):
            continuations = prompts.continuations
            if scorer.answer_tokens:
                wanted = [each.answer_tokens for each, its in zip(scorers, given, strict=True) if its == prompts]
                known = next((answers for asked, answers in answered if asked == prompts), None)
                if known is None:
                    answered.append((prompts, known := self._beginnings(prompts.rows, max(wanted))))
                continuations = [answer[: scorer.answer_tokens] for answer in known]
            begun.append(scorer.begin(self._engine, prompts.rows, continuations))
        return begun

    def _beginnings(self, prompts: TokenRows, tokens: int) -> TokenRows:
        """At least the first so many tokens of the original's answers, if they have as many."""
        return self._engine.generate(prompts, [None], lambda answers: [len(each) >= tokens for each in answers])[0]

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

    def _scored(
        self, answers: Sequence[Sequence[Sequence[Sequence[int]]]], others: Sequence[dict[str, _Told]]
    ) -> list[TrialScores]:
        """Scores of answers, ``[asked][edit][prompt][token]``, with those that needed none, by edit."""
        texts = [[self._text_of(rows) for rows in of_edits] for of_edits in answers]
        self._answers = texts[0][-1]
        if self._how.print_answers:
            for asked, of_edits in zip(self._asked, texts, strict=True):
                for answer in (pair for each in of_edits for pair in zip(asked.prompts.texts, each, strict=True)):
                    log.info("prompt: %s\nanswer: %s", *answer)

        def score() -> list[TrialScores]:
            return [
                self._of_edit(list(each), told) for each, told in zip(zip(*texts, strict=True), others, strict=True)
            ]

        return self._world.decide(score, self._scoring)

    def _of_edit(self, texts: Sequence[Sequence[str]], others: dict[str, _Told]) -> TrialScores:
        """Scores of one edit, from the answers to each list of prompts that is asked."""
        told, agreed = dict(others), list[Agreement]()
        for asked, answers in zip(self._asked, texts, strict=True):
            found, pairs = asked.scored(answers, self._how.values)
            told |= found
            agreed += pairs
        kept = {name: each.values for name, each in told.items() if each.values is not None} if self._how.values else {}
        return TrialScores(
            refusals=told[self._first].score,
            kl=told[self._divergence.name].score,
            scores={name: told[name].score for name in self._order},
            maximize=self._maximize,
            values=kept,
            agreements=tuple(agreed),
        )

    def _early_stop(self, scorers: Sequence[Scorer]) -> Decided | None:
        """A row may stop when every scorer has decided on it; a scorer that cannot tell keeps all rows going."""
        tests = [getattr(scorer, "decided", None) for scorer in scorers]
        if any(test is None for test in tests):
            return None

        def decided(answers: Sequence[Sequence[int]]) -> list[bool]:
            return [all(test is not None and test(text) for test in tests) for text in self._text_of(answers)]

        return decided


def _from_itself(scorer: DistributionScorer) -> bool:
    """Whether the original's number is that of a model compared with itself, 0 without a pass."""
    return isinstance(scorer, Divergence)
