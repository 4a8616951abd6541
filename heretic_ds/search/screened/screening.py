"""What candidates are compared by: one pass over a part of the prompts, without answers. K positions, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.prompts import TokenRows
from heretic_ds.scoring.base import GivesDistributions, MeasuresDivergence
from heretic_ds.scoring.kl import Divergence, first_token_kl, log_probabilities
from heretic_ds.scoring.likelihood import RefusalLikelihood
from heretic_ds.scoring.values import combined
from heretic_ds.search.trials import TrialScores

T = TypeVar("T")

TOKENS = 3
"""First tokens of the original's answers, whose likelihood counts."""
TARGET, BASELINE = (8, 16), (16, 32)
"""Prompts of each kind: an eighth of the targets and a fifth of the baseline, but at least and at most so many."""


class Screening:
    """Compares edits on one engine by the likelihood of the original's answers and the KL divergence.

    Both kinds of prompts share a pass, whose reference is the model as it is when this is made. Where distributions lie
    in another process, which compares them there, it is two passes.
    """

    def __init__(self, engine: GivesDistributions, target: TokenRows, answers: TokenRows, baseline: TokenRows) -> None:
        """``answers`` are what the original gives to the ``target`` prompts, which it declines, by their tokens."""
        given = [place for place, answer in enumerate(answers) if answer]
        places = spread(given, part(len(given), 8, *TARGET))
        tokens = [answers[place][:TOKENS] for place in places]
        self._baseline = spread(baseline, part(len(baseline), 5, *BASELINE))
        self._engine, self._target = engine, [target[place] for place in places]
        self._divergence: Divergence | None = None
        self._reference_1V: dict[int, Tensor] = {}
        if isinstance(engine, MeasuresDivergence):
            self._likelihood = RefusalLikelihood().begin(engine, self._target, tokens)
            self._divergence = Divergence().begin(engine, self._baseline)
            return
        self._likelihood = RefusalLikelihood().get_ready(engine, self._target, tokens)
        self._rows = [*self._baseline, *self._target]
        self._continuations = [*([()] * len(self._baseline)), *self._likelihood.continuations]
        # Over the same rows as later passes: a replica reads edits of those prompts whose original it has seen.
        engine.distributions(self._rows, [None], self._remember, self._continuations)

    def of(self, edits: Sequence[Edit]) -> list[TrialScores]:
        """For each edit the likelihood, as ``refusals``, and the KL divergence."""
        if self._divergence is not None:
            found = zip(self._likelihood.of(edits), self._divergence.of(edits), strict=True)
            return [TrialScores(likelihood, kl) for likelihood, kl in found]
        kls = len(self._baseline)
        values = self._engine.distributions(self._rows, edits, self._read, self._continuations)
        return [TrialScores(combined(each[kls:], "mean"), combined(each[:kls], "mean")) for each in values]

    def _remember(self, places: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        others, declined = self._kinds(places)
        self._likelihood.remember(self._targets(places, declined), [logits_KV[at] for at in declined])
        for at in others:
            self._reference_1V[places[at]] = log_probabilities(logits_KV[at]).cpu()
        return [0.0] * len(places)

    def _read(self, places: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        """KL of a baseline prompt, likelihood of a target prompt."""
        others, declined = self._kinds(places)
        found = [0.0] * len(places)
        likelihoods = self._likelihood.read(self._targets(places, declined), [logits_KV[at] for at in declined])
        kls: list[float] = []
        if others:
            logits_NV = torch.cat([logits_KV[at] for at in others])
            reference_NV = torch.cat([self._reference_1V[places[at]] for at in others]).to(logits_NV.device)
            kls = first_token_kl(reference_NV, logits_NV).tolist()
        for at, value in zip([*declined, *others], [*likelihoods, *kls], strict=True):
            found[at] = value
        return found

    def _kinds(self, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which of the rows are baseline prompts, and which target prompts."""
        first = len(self._baseline)
        others = [at for at, place in enumerate(places) if place < first]
        return others, [at for at, place in enumerate(places) if place >= first]

    def _targets(self, places: Sequence[int], declined: Sequence[int]) -> list[int]:
        """Where rows lie among the target prompts."""
        return [places[at] - len(self._baseline) for at in declined]


def screened_rows(target: int, baseline: int) -> int:
    """Rows that a candidate has in its pass, of so many prompts of each kind."""
    return part(target, 8, *TARGET) + part(baseline, 5, *BASELINE)


def part(count: int, divisor: int, least: int, most: int) -> int:
    """How many of so many prompts are screened on."""
    return min(count, max(least, min(most, math.ceil(count / divisor))))


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]
