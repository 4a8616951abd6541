"""How likely an edited model still gives the original's answers: what says of refusals, without generating, where a
count is flat. Shapes: K positions of a prompt, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.ablation.divergence import log_probabilities
from heretic_ds.scoring.base import DistributionScorer, GivesDistributions, TokenRows


class RefusalLikelihood(DistributionScorer):
    """Mean, over prompts, of the probability of the first tokens of what the original model answered, as a share of the
    original's own probability of them, at most 1.

    One pass over each prompt with those tokens after it (teacher-forced), as cheap as one for a KL divergence. The
    probability of a prompt's tokens is that of all of them in a row: p = prod_k p(t_k | prompt, t_1 ... t_{k-1}). Of
    long-winded answers it is small even for the original, so that each prompt is measured by its own.
    """

    name = "refusal_likelihood"

    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        """``continuations`` are the first tokens of the answers, one or more to each prompt."""
        if continuations is None or not all(continuations):
            raise ValueError("a likelihood needs tokens to each prompt")
        self._engine, self._prompts, self._tokens = engine, prompts, continuations
        self.continuations = [tokens[:-1] for tokens in continuations]  # the last one is predicted, not passed over
        self._original = [0.0] * len(prompts)
        [self._original] = engine.distributions(prompts, [None], self.read, self.continuations)
        return self

    def of(self, edits: Sequence[Edit | None]) -> list[float]:
        """For each edit the mean over prompts."""
        found = self._engine.distributions(self._prompts, edits, self.read, self.continuations)
        return [self.mean(each) for each in found]

    def read(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        """The logarithm of each prompt's probability, from the logits at the places of its tokens."""
        found = []
        for prompt, each_KV in zip(prompts, logits_KV, strict=True):
            tokens_K1 = torch.tensor(self._tokens[prompt], device=each_KV.device)[:, None]
            found.append(log_probabilities(each_KV).gather(1, tokens_K1).sum())
        return [] if not found else torch.stack(found).tolist()

    def mean(self, logarithms: Sequence[float]) -> float:
        """What all prompts' logarithms come to."""
        shares = [math.exp(min(0.0, edited - own)) for edited, own in zip(logarithms, self._original, strict=True)]
        return math.fsum(shares) / len(shares)
