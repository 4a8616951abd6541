"""What one model does with the prompts of the final scores: what it answers, and how likely it finds the original's
answers.

Shapes: K positions of a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heretic_ds.ablation.divergence import first_token_kl, log_probabilities
from heretic_ds.placements import Evaluating
from heretic_ds.prompts import PromptSet, TokenRows
from heretic_ds.scoring.repetition import repeated_runs
from heretic_ds.world import World

RUN = 4
"""Tokens of the runs by which repetition is measured."""

_Told = dict[int, tuple[float, float, float]]
"""By place of the prompt: KL divergence of the first token and mean over all positions, mean negative log-likelihood
of the given answer's tokens."""


@dataclass
class Likelihoods:
    """How one model continues baseline prompts as the original answered them, beside what the original would say.

    One pass over every prompt with the first tokens of the original's answer, teacher-forced. The original's logits
    stay on the host, in the dtype that they came in, for the prompts that are this process's work: K·V numbers each.
    """

    answers: TokenRows
    """The first tokens of the original's answers; empty ones have no likelihood."""
    reference_KV: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def continuations(self) -> list[list[int]]:
        """What prompts are continued by: the last token of an answer is only predicted."""
        return [list(answer[:-1]) for answer in self.answers]

    def of_original(self, engine: Evaluating, prompts: TokenRows, world: World) -> list[float]:
        """Remember the original's distributions; its negative log-likelihood of its own tokens, by prompt, nats."""
        told: _Told = {}

        def read(places: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
            for place, each_KV in zip(places, logits_KV, strict=True):
                self.reference_KV[place] = each_KV.to("cpu", copy=True)
                told[place] = (0.0, 0.0, self._unlikelihood(place, log_probabilities(each_KV)))
            return [0.0] * len(places)

        engine.distributions(prompts, [None], read, self.continuations)
        return [each[2] for each in _from_all_ranks(told, len(prompts), world)]

    def of_other(self, engine: Evaluating, prompts: TokenRows, world: World) -> tuple[list[float], ...]:
        """KL(original || this model) in nats of the first token and as the mean over all positions, and this model's
        negative log-likelihood of the original's tokens, each by prompt."""
        told: _Told = {}

        def read(places: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
            for place, each_KV in zip(places, logits_KV, strict=True):
                expected_KV = log_probabilities(self.reference_KV[place].to(each_KV.device))
                kl_K = first_token_kl(expected_KV, each_KV)
                unlikelihood = self._unlikelihood(place, log_probabilities(each_KV))
                told[place] = (kl_K[0].item(), kl_K.mean().item(), unlikelihood)
            return [0.0] * len(places)

        engine.distributions(prompts, [None], read, self.continuations)
        found = _from_all_ranks(told, len(prompts), world)
        return tuple([each[place] for each in found] for place in range(3))

    def _unlikelihood(self, place: int, logp_KV: Tensor) -> float:
        tokens_K = torch.tensor(self.answers[place], dtype=torch.int64, device=logp_KV.device)
        if len(tokens_K) == 0:
            return math.nan
        return -logp_KV[: len(tokens_K)].gather(1, tokens_K[:, None]).double().mean().item()


def _from_all_ranks(told: _Told, n: int, world: World) -> list[tuple[float, float, float]]:
    """What ranks found, each for prompts of its own; where several worked on one prompt, what the first of them did."""
    found: _Told = {}
    for part in reversed(world.gather(told)):
        found.update(part)
    return [found[place] for place in range(n)]


def repetition(answer: Sequence[int]) -> float:
    """Share of an answer's runs of :data:`RUN` tokens that occurred in it before; 0 for shorter answers."""
    return repeated_runs(answer, RUN)


@dataclass(frozen=True)
class Answers:
    """What one model answers to the prompts of one kind."""

    rows: TokenRows
    texts: Sequence[str]

    @classmethod
    def of(
        cls, engine: Evaluating, prompts: PromptSet, text_of: Callable[[TokenRows], list[str]], longest: int
    ) -> Answers:
        """Whole greedy answers, of at most ``longest`` tokens."""
        rows = [answer[:longest] for answer in engine.generate(prompts.rows, [None])[0]]
        return cls(rows, text_of(rows))
