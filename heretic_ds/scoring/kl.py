"""Divergence of next-token distributions. Shapes: B prompts, K positions of a prompt, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.scoring.base import DistributionScorer, GivesDistributions, TokenRows


def log_probabilities(logits_BV: Tensor) -> Tensor:
    """Log-softmax [B, V] over the vocabulary, in float32, whatever the model's dtype."""
    return torch.log_softmax(logits_BV, dim=-1, dtype=torch.float32)


def first_token_kl(reference_logp_BV: Tensor, logits_BV: Tensor) -> Tensor:
    """KL(original || edited) [B] in nats: sum over v of p_v (ln p_v - ln q_v).

    ``reference_logp_BV`` holds the original's :func:`log_probabilities`, ``logits_BV`` the edited model's
    logits. Tokens that the original never gives (ln p = -inf, as for masked vocabulary) add nothing; one that
    only the edited model never gives makes the divergence infinite. Summed in float64; rounding below zero is
    cut off.
    """
    if reference_logp_BV.shape != logits_BV.shape:
        raise ValueError(
            f"reference {tuple(reference_logp_BV.shape)} and logits {tuple(logits_BV.shape)} differ in shape"
        )
    reference_logp_BV = reference_logp_BV.float()
    gap_BV = reference_logp_BV - log_probabilities(logits_BV)
    p_BV = reference_logp_BV.exp()
    terms_BV = torch.where(p_BV == 0, 0.0, p_BV * gap_BV)
    return terms_BV.sum(dim=-1, dtype=torch.float64).clamp(min=0)


class Divergence(DistributionScorer):
    """KL(original || edited) of the next-token distributions of a list of prompts, in nats.

    First-token distributions, or with continuations those after the prompt and after each of its continuation's tokens,
    of which a prompt's divergence is the mean. The reference is the model as it is when this begins; it lies on the
    host, float32, for the prompts that are this process's work.
    """

    name = "kl"

    def __init__(self) -> None:
        self.reference_KV: dict[int, Tensor] = {}
        """Log-probabilities by place of the prompt."""

    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        self._engine, self._prompts, self._continuations = engine, prompts, continuations
        engine.distributions(prompts, [None], self._remember, continuations)
        return self

    def of(self, edits: Sequence[Edit | None]) -> list[float]:
        """For each edit the mean over prompts."""
        found = self._engine.distributions(self._prompts, edits, self._divergences, self._continuations)
        return [math.fsum(each) / len(each) for each in found]

    def _remember(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        for prompt, each_KV in zip(prompts, logits_KV, strict=True):
            self.reference_KV[prompt] = log_probabilities(each_KV).cpu()
        return [0.0] * len(prompts)

    def _divergences(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        counts, logits_NV = [len(each) for each in logits_KV], torch.cat(list(logits_KV))
        reference_NV = torch.cat([self.reference_KV[prompt] for prompt in prompts]).to(logits_NV.device)
        parts = first_token_kl(reference_NV, logits_NV).split(counts)
        found: list[float] = torch.stack([part.mean() for part in parts]).tolist()
        return found
